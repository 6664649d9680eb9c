"""POST /v1/extract: pieces of texts, such as their keywords."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.concurrency import all_of
from server.core.roles.tasks import ExtractTask
from server.errors import InvalidRequestError
from server.protocol.base import new_id, now, usage
from server.protocol.extract import ExtractRequest
from server.routes.common import read, refuse_adapter, unless_disconnected, work_of
from server.services import Services


async def extract(request: Request) -> Response:
    """Extracts from one or more texts, which are computed concurrently."""
    services, body = await read(request, ExtractRequest)
    refuse_adapter(services, body.model)
    task, work = _task_of(body, services), work_of(request)
    results = await unless_disconnected(
        request,
        all_of(
            services.extractor.extract(task, text, body.max_items, work, param=body.param(i))
            for i, text in enumerate(body.texts)
        ),
    )
    computed = [result for result in results if not result.is_cached]
    return JSONResponse(
        {
            "id": new_id("extract"),
            "object": "list",
            "created": now(),
            "model": services.model_id,
            "data": [
                {"index": i, "items": result.items, "cached": result.is_cached}
                for i, result in enumerate(results)
            ],
            "usage": usage(
                sum(result.num_prompt_tokens for result in computed),
                sum(result.num_completion_tokens for result in computed),
                sum(result.num_cached_tokens for result in computed),
            ),
        }
    )


def _task_of(body: ExtractRequest, services: Services) -> ExtractTask:
    if body.task in services.tasks:
        raise InvalidRequestError(
            f"The task {body.task!r} gives labels; use /v1/classify for it.", param="task"
        )
    if body.task not in services.extract_tasks:
        names = ", ".join(sorted(services.extract_tasks))
        raise InvalidRequestError(
            f"There is no extract task {body.task!r}; this server has {names}.", param="task"
        )
    return services.extract_tasks[body.task]
