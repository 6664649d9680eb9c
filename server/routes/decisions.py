"""POST /v1/decisions: typed questions about one input."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.protocol.decisions import DecisionsRequest, decision_usage
from server.routes.common import check_model, services_of, unless_disconnected


async def decisions(request: Request) -> Response:
    """Answers all questions; what they share of their prompts is computed once."""
    services = services_of(request)
    body = DecisionsRequest.parse(await request.body())
    check_model(services, body.model)
    tasks = [question.task() for question in body.questions]
    results = await unless_disconnected(
        request, services.classifier.answer(tasks, body.conversation())
    )
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
