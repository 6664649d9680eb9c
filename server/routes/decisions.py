"""POST /v1/decisions: typed questions about one input."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.protocol.decisions import DecisionsRequest, decision_usage
from server.routes.common import read, refuse_adapter, unless_disconnected, work_of


async def decisions(request: Request) -> Response:
    """Answers all questions; the common part of their prompts is computed once."""
    services, body = await read(request, DecisionsRequest)
    refuse_adapter(services, body.model)
    tasks = [question.task() for question in body.questions]
    answers = services.classifier.answer(tasks, body.conversation(), work_of(request))
    results = await unless_disconnected(request, answers)
    return JSONResponse(
        {
            "model": services.model_id,
            "answers": [
                question.answer(result)
                for question, result in zip(body.questions, results, strict=True)
            ],
            "usage": decision_usage(results),
        }
    )
