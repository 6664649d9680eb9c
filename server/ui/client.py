"""Calls the server through the openai client, at the address of the browser's own request."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import gradio as gr
from openai import AsyncOpenAI, AsyncStream, DefaultAsyncHttpxClient

from server.ui.commands import arguments_of

# Key of a request's scope: the scheme that the server itself uses, http or https.
OWN_SCHEME = "qwen.own_scheme"


def own_url(request: gr.Request) -> str:
    """The address of the socket that received the browser's request.

    It does not depend on the Host header, which a client could set to have the key sent elsewhere,
    or on the request's scheme, which a proxy's headers change.
    """
    assert request.request is not None
    scope = request.request.scope
    host, port = scope["server"]
    return f"{scope[OWN_SCHEME]}://{f'[{host}]' if ':' in host else host}:{port}"


def browser_url(request: gr.Request) -> str:
    """The address that the browser uses, for lines to copy."""
    assert request.request is not None
    return str(request.request.base_url).rstrip("/").removesuffix("/gradio_api")


@asynccontextmanager
async def connect(url: str, api_key: str) -> AsyncIterator[AsyncOpenAI]:
    """A client of the server at `url`."""
    # The server is on this machine: no proxy from the environment, no check of its certificate.
    # No retries either: the page shows at once how long to wait.
    http_client = DefaultAsyncHttpxClient(trust_env=False, verify=False)
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key=api_key or "unused", max_retries=0, http_client=http_client
    ) as client:
        yield client


@dataclass(frozen=True)
class ServedModel:
    """A model of GET /v1/models. tasks: name -> labels, empty for a task that extracts."""

    id: str
    tasks: dict[str, list[dict[str, str]]]


async def served_model(client: AsyncOpenAI) -> ServedModel:
    """The model that the server serves."""
    model = (await client.models.list()).data[0]
    tasks = (model.model_extra or {})["tasks"]
    return ServedModel(model.id, {task["name"]: task.get("labels", []) for task in tasks})


@dataclass(frozen=True)
class Piece:
    """The content of one chunk of a streamed answer."""

    text: str = ""
    sentiment: dict[str, Any] | None = None
    analyses: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None


async def stream_chat(client: AsyncOpenAI, body: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
    """The pieces of the answer. body: a chat request with `stream`."""
    chunks = await client.chat.completions.create(**arguments_of(body))
    async with chunks, aclosing(_generator_of(chunks)) as generator:
        async for chunk in generator:
            delta = chunk.choices[0].delta if chunk.choices else None
            extra = chunk.model_extra or {}
            yield Piece(
                (delta.content or "") if delta else "",
                extra.get("sentiment"),
                extra.get("analyses"),
                chunk.usage.model_dump() if chunk.usage else None,
            )


def _generator_of(chunks: AsyncStream[Any]) -> AsyncGenerator[Any, None]:
    """The generator behind a stream, which the stream's `close` leaves suspended.

    The two refer to each other, so only the garbage collector would close the generator. It may
    run in another thread while the event loop closes httpx2's generators below this one, which
    raises "async generator already executing".
    """
    return cast(AsyncGenerator[Any, None], chunks._iterator)


async def classify(
    client: AsyncOpenAI, texts: Sequence[str], task: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The result of each text. task: `task`, or `instructions` and `labels`."""
    response = await client.post(
        "/classify", body={"input": list(texts), **task}, cast_to=dict[str, Any]
    )
    data: list[dict[str, Any]] = response["data"]
    return data
