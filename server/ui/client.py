"""How the page calls the server: through the openai client, at the address it came by itself."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import gradio as gr
from openai import AsyncOpenAI, AsyncStream, DefaultAsyncHttpxClient

from server.ui.commands import arguments_of

# Where a request's scope says whether the server itself speaks http or https.
OWN_SCHEME = "qwen.own_scheme"


def own_url(request: gr.Request) -> str:
    """The address of the socket the browser's request came in by.

    Neither the Host header, or whoever sends it could have the key sent elsewhere, nor the
    scheme, which a proxy's headers change.
    """
    assert request.request is not None
    scope = request.request.scope
    host, port = scope["server"]
    return f"{scope[OWN_SCHEME]}://{f'[{host}]' if ':' in host else host}:{port}"


def seen_url(request: gr.Request) -> str:
    """The address as the browser knows it, for lines to be copied."""
    assert request.request is not None
    return str(request.request.base_url).rstrip("/").removesuffix("/gradio_api")


@asynccontextmanager
async def connect(url: str, api_key: str) -> AsyncIterator[AsyncOpenAI]:
    """A client of the server at `url`."""
    # No proxy of the environment, no certificates: the server is on this machine. No retries
    # either: a person is told at once, and how long to wait.
    http_client = DefaultAsyncHttpxClient(trust_env=False, verify=False)
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key=api_key or "unused", max_retries=0, http_client=http_client
    ) as client:
        yield client


@dataclass(frozen=True)
class ServedModel:
    """What GET /v1/models tells. tasks: the labels of each by its name; none if it extracts."""

    id: str
    tasks: dict[str, list[dict[str, str]]]


async def served_model(client: AsyncOpenAI) -> ServedModel:
    """The model that is being served."""
    model = (await client.models.list()).data[0]
    tasks = (model.model_extra or {})["tasks"]
    return ServedModel(model.id, {task["name"]: task.get("labels", []) for task in tasks})


@dataclass(frozen=True)
class Piece:
    """What one chunk of a streamed answer brought."""

    text: str = ""
    sentiment: dict[str, Any] | None = None
    analyses: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None


async def stream_chat(client: AsyncOpenAI, body: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
    """The pieces of the answer to a request for a streamed chat."""
    chunks = await client.chat.completions.create(**arguments_of(body))
    async with chunks, aclosing(_generator_of(chunks)) as generator:
        async for chunk in generator:
            delta = chunk.choices[0].delta if chunk.choices else None
            ours = chunk.model_extra or {}
            yield Piece(
                (delta.content or "") if delta else "",
                ours.get("sentiment"),
                ours.get("analyses"),
                chunk.usage.model_dump() if chunk.usage else None,
            )


def _generator_of(chunks: AsyncStream[Any]) -> AsyncGenerator[Any, None]:
    """The generator behind a stream, which `close` of the stream leaves suspended.

    The two refer to each other, so only the garbage collector would end the generator. It may run
    in another thread, while the event loop ends the generators of httpx2 beneath this one: "async
    generator already executing".
    """
    return cast(AsyncGenerator[Any, None], chunks._iterator)


async def classify(
    client: AsyncOpenAI, texts: Sequence[str], task: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The judgement of each text. task: `task`, or `instructions` and `labels`."""
    response = await client.post(
        "/classify", body={"input": list(texts), **task}, cast_to=dict[str, Any]
    )
    data: list[dict[str, Any]] = response["data"]
    return data
