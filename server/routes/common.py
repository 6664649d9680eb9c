"""Shared by all handlers: read the body, find the model, watch for a disconnect."""

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

# Such a body takes at most a few milliseconds to parse.
MAX_INLINE_BYTES = 32 * 1024


def services_of(request: Request) -> Services:
    """The services this application was made with."""
    services: Services = request.app.state.services
    return services


async def parse(request: Request, kind: type[R]) -> R:
    """Parses the body; a long one off the event loop."""
    body = await request.body()
    if len(body) <= MAX_INLINE_BYTES:
        return kind.parse(body)
    return await asyncio.to_thread(kind.parse, body)


async def read(request: Request, kind: type[R]) -> tuple[Services, R]:
    """The services, and the parsed body.

    Raises:
        InvalidRequestError: the body is invalid.
        NotFoundError: the body names a model that is not served.
    """
    services, body = services_of(request), await parse(request, kind)
    if body.model is not None:
        find_model(services, body.model)
    return services, body


def find_model(services: Services, model: str) -> ServedModel:
    """The model of this id: the base model or an adapter of it (`:NAME`), either with `:plain`.

    Raises:
        NotFoundError: there is no such model.
    """
    if model not in services.models:
        *first, last = map(repr, services.models)
        raise NotFoundError(
            f"The model {model!r} does not exist here; this server has {', '.join(first)} and "
            f"{last}.",
            param="model",
            code="model_not_found",
        )
    return services.models[model]


def refuse_adapter(services: Services, model: str | None) -> None:
    """For routes that judge texts: there the task names the adapter.

    Raises:
        InvalidRequestError: the request names an adapter.
    """
    if model is not None and find_model(services, model).adapter.name:
        raise InvalidRequestError(
            "'model': a task is judged with the adapter that its file names, if any; use "
            f"{services.model_id!r}.",
            param="model",
        )


def check_tasks(
    names: Sequence[str], existing: Collection[str], param: Callable[[int], str]
) -> None:
    """Checks that the tasks exist. param: the request's field with the name of an index.

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
    """The result of `handler`, which is cancelled on a disconnect or when the deadline passes.

    Raises:
        ClientDisconnect: the client has disconnected.
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
        # Lets both run their `finally` before the request ends.
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Returns when the client disconnects. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def work_of(request: Request) -> Work:
    """The request's unit of work in the engine."""
    work: Work = request.scope["work"]
    return work
