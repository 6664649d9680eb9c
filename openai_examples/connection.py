"""Where the server is. Every example begins with one of these; this file shows nothing itself."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from openai import APIConnectionError, APIError, AsyncOpenAI, OpenAI

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"


def base_url() -> str:
    """The server's address: OPENAI_BASE_URL, or this machine."""
    return os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL


def api_key() -> str:
    """OPENAI_API_KEY; the client insists on one, the server only if it was started with keys."""
    return os.environ.get("OPENAI_API_KEY") or "unused"


def connect() -> OpenAI:
    """A client of the server."""
    return OpenAI(base_url=base_url(), api_key=api_key())


def connect_async() -> AsyncOpenAI:
    """The same for asyncio."""
    return AsyncOpenAI(base_url=base_url(), api_key=api_key())


def served_model(client: OpenAI) -> str:
    """The id of the model that is being served."""
    return client.models.list().data[0].id


@contextmanager
def clear_errors() -> Iterator[None]:
    """Ends the program with one sentence if there is no server, or with the server's own."""
    try:
        yield
    except APIConnectionError:
        sys.exit(f"No server answers at {base_url()}. Start one with: make serve")
    except APIError as error:
        sys.exit(error.message)
