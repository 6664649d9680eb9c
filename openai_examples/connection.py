"""Connects to the server. Used by every example; not an example itself."""

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
    """OPENAI_API_KEY. The client requires a key; the server only if it was started with keys."""
    return os.environ.get("OPENAI_API_KEY") or "unused"


def connect() -> OpenAI:
    """A client of the server."""
    return OpenAI(base_url=base_url(), api_key=api_key())


def connect_async() -> AsyncOpenAI:
    """A client of the server for asyncio."""
    return AsyncOpenAI(base_url=base_url(), api_key=api_key())


def served_model(client: OpenAI) -> str:
    """The id of the model that the server serves."""
    return client.models.list().data[0].id


@contextmanager
def clear_errors() -> Iterator[None]:
    """Exits with one sentence if no server answers, or with the server's error message."""
    try:
        yield
    except APIConnectionError:
        sys.exit(f"No server answers at {base_url()}. Start one with: make serve")
    except APIError as error:
        sys.exit(error.message)
