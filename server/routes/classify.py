"""POST /v1/classify: the judgement alone."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.roles.classification import Classification
from server.core.roles.tasks import Task, inline_task
from server.errors import InvalidRequestError
from server.protocol.base import classification, new_id, now, usage
from server.protocol.classify import ClassifyRequest
from server.routes.common import check_tasks, read, unless_disconnected, work_of
from server.services import Services


async def classify(request: Request) -> Response:
    """Labels one text or several, which are computed as a batch."""
    services, body = await read(request, ClassifyRequest)
    task = _task_of(body, services)

    async def judge() -> list[Classification]:
        prepared = await asyncio.to_thread(
            services.classifier.prepare, task, body.texts, body.param
        )
        return await services.classifier.judge(prepared, work_of(request))

    results = await unless_disconnected(request, judge())
    computed = [result for result in results if not result.is_cached]
    return JSONResponse(
        {
            "id": new_id("classify"),
            "object": "list",
            "created": now(),
            "model": services.model_id,
            "data": [
                {"index": i, **(classification(result) or {})} for i, result in enumerate(results)
            ],
            "usage": usage(
                sum(result.num_prompt_tokens for result in computed),
                0,
                sum(result.num_cached_tokens for result in computed),
            ),
        }
    )


def _task_of(body: ClassifyRequest, services: Services) -> Task:
    if body.labels is not None and body.instructions is not None:
        return inline_task(body.instructions, body.labels)
    name = body.task or "sentiment"
    if name in services.extract_tasks:
        raise InvalidRequestError(
            f"The task {name!r} gives no labels; ask /v1/extract for it.", param="task"
        )
    check_tasks([name], services.tasks, lambda _: "task")
    return services.tasks[name]
