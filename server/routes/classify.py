"""POST /v1/classify: the judgement alone."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.concurrency import all_of
from server.core.roles.classifier import Classification
from server.core.roles.tasks import Task, inline_task
from server.errors import ContextLengthError, InvalidRequestError
from server.protocol.base import classification, new_id, now, usage
from server.protocol.classify import ClassifyRequest
from server.routes.common import check_model, services_of, unless_disconnected
from server.services import Services


async def classify(request: Request) -> Response:
    """Labels one text or several, which are computed as a batch."""
    services = services_of(request)
    body = ClassifyRequest.parse(await request.body())
    if body.model is not None:
        check_model(services, body.model)
    task = _task_of(body, services)

    async def judge(index: int, text: str) -> Classification:
        try:
            return await services.classifier.classify(task, text)
        except ContextLengthError as error:
            raise ContextLengthError(
                error.num_prompt_tokens, error.max_context, body.param(index)
            ) from error

    passes = (judge(index, text) for index, text in enumerate(body.texts))
    results = await unless_disconnected(request, all_of(passes))
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
    if name not in services.tasks:
        raise InvalidRequestError(
            f"There is no task {name!r}; this server has {', '.join(sorted(services.tasks))}.",
            param="task",
        )
    return services.tasks[name]
