"""POST /v1/classify: labels of texts."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.roles.details import Details, judge_details
from server.core.roles.tasks import Task, inline_task
from server.errors import InvalidRequestError
from server.protocol.base import classification, new_id, now, usage
from server.protocol.classify import ClassifyRequest
from server.routes.common import (
    check_tasks,
    read,
    refuse_adapter,
    unless_disconnected,
    work_of,
)
from server.services import Services


async def classify(request: Request) -> Response:
    """Labels one or more texts, which are computed as a batch."""
    services, body = await read(request, ClassifyRequest)
    refuse_adapter(services, body.model)
    results = await unless_disconnected(
        request,
        judge_details(
            services.classifier,
            _task_of(body, services),
            body.texts,
            work_of(request),
            with_sentences=body.sentences,
            with_words=body.explain,
            param=body.param,
        ),
    )
    computed = [each for result in results for each in result.computed]
    return JSONResponse(
        {
            "id": new_id("classify"),
            "object": "list",
            "created": now(),
            "model": services.model_id,
            "data": [
                {"index": i, **_item(body, text, result)}
                for i, (text, result) in enumerate(zip(body.texts, results, strict=True))
            ],
            "usage": usage(
                sum(result.num_prompt_tokens for result in computed),
                0,
                sum(result.num_cached_tokens for result in computed),
            ),
        }
    )


def _item(body: ClassifyRequest, text: str, result: Details) -> dict[str, Any]:
    item = dict(classification(result.whole) or {})
    if body.sentences:
        if result.is_mixed is not None:
            item["mixed"] = result.is_mixed
        item["sentences"] = [
            {"offset": span.offset, "length": span.length, **(classification(each) or {})}
            for span, each in result.sentences
        ]
    if body.explain:
        item["words"] = [
            {
                "offset": span.offset,
                "length": span.length,
                "text": span.of(text),
                "weight": round(weight, 6),
            }
            for span, weight in result.words
        ]
    return item


def _task_of(body: ClassifyRequest, services: Services) -> Task:
    if body.labels is not None and body.instructions is not None:
        return inline_task(body.instructions, body.labels)
    name = body.task or "sentiment"
    if name in services.extract_tasks:
        raise InvalidRequestError(
            f"The task {name!r} gives no labels; use /v1/extract for it.", param="task"
        )
    check_tasks([name], services.tasks, lambda _: "task")
    return services.tasks[name]
