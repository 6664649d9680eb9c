"""What every handler does first: read the body, find the model, watch the client."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from server.core.engine.work import Work
from server.errors import InvalidRequestError, NotFoundError, RequestTimeoutError
from server.protocol import base
from server.services import ServedModel, Services

T = TypeVar("T")
R = TypeVar("R", bound=base.RequestBody)

# What takes a few milliseconds to parse, whatever it holds.
MAX_INLINE_BYTES = 32 * 1024


def services_of(request: Request) -> Services:
    """The services this application was made with."""
    services: Services = request.app.state.services
    return services


async def parse(request: Request, kind: type[R]) -> R:
    """What the body says, or what is wrong with it; a long one is read off the event loop."""
    body = await request.body()
    if len(body) <= MAX_INLINE_BYTES:
        return kind.parse(body)
    return await asyncio.to_thread(kind.parse, body)


async def read(request: Request, kind: type[R]) -> tuple[Services, R]:
    """The services, and what the body asks of them.

    Raises:
        InvalidRequestError: something is wrong with the body.
        NotFoundError: it names another model than the one served.
    """
    services, body = services_of(request), await parse(request, kind)
    if body.model is not None:
        find_model(services, body.model)
    return services, body


def find_model(services: Services, model: str) -> ServedModel:
    """What is asked for: the model or an adapter of it (`:NAME`), or without sentiment (`:plain`).

    Raises:
        NotFoundError: there is no such model here.
    """
    if model not in services.models:
        *others, last = map(repr, services.models)
        raise NotFoundError(
            f"The model {model!r} does not exist here; this server has {', '.join(others)} and "
            f"{last}.",
            param="model",
            code="model_not_found",
        )
    return services.models[model]


def refuse_adapter(services: Services, model: str | None) -> None:
    """For what is judged: there the task chooses.

    Raises:
        InvalidRequestError: the request names an adapter.
    """
    if model is not None and find_model(services, model).adapter.name:
        raise InvalidRequestError(
            "'model': a task is judged with the adapter that its file names, if any; ask for "
            f"{services.model_id!r}.",
            param="model",
        )


def check_tasks(
    names: Sequence[str], existing: Collection[str], param: Callable[[int], str]
) -> None:
    """param: where the request has the name of an index.

    Raises:
        InvalidRequestError: there is no such task.
    """
    for i, name in enumerate(names):
        if name not in existing:
            raise InvalidRequestError(
                f"There is no task {name!r}; this server has {', '.join(sorted(existing))}.",
                param=param(i),
            )


async def unless_disconnected(request: Request, handler: Coroutine[Any, Any, T]) -> T:
    """The result of `handler`, which is cancelled if the client leaves or the deadline passes.

    Raises:
        ClientDisconnect: the client left.
        RequestTimeoutError: the deadline has passed.
    """
    task = asyncio.create_task(handler)
    watcher = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait(
            (task, watcher),
            timeout=work_of(request).seconds_left,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not task.done():
            raise ClientDisconnect if watcher.done() else RequestTimeoutError
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
        # Let both run their `finally` before the request is gone.
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Returns when the client leaves. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def work_of(request: Request) -> Work:
    """The request's unit of work in the engine."""
    work: Work = request.scope["work"]
    return work
