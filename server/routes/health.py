"""GET /health: whether the engine works. GET /ready: whether a request would be served now."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.routes.common import services_of


async def health(request: Request) -> Response:
    """Whether the engine works, its model, and the hits of the sentiment cache."""
    services = services_of(request)
    is_alive = services.engine.is_alive
    classifier = services.classifier
    return JSONResponse(
        {
            "status": "ok" if is_alive else "stopped",
            "reason": services.engine.trouble,
            "model": services.model_id,
            "warning": services.warning,
            "sentiment_cache": {"hits": classifier.num_hits, "misses": classifier.num_misses},
        },
        status_code=200 if is_alive else 503,
    )


async def ready(request: Request) -> Response:
    """Whether a request would be served now."""
    gate, engine = request.app.state.gate, services_of(request).engine
    if gate.is_closed:
        status = "stopping"
    elif not engine.is_alive:
        status = "no engine"
    else:
        status = "ready" if gate.is_open else "busy"
    return JSONResponse(
        {"status": status, "requests": gate.num_requests},
        status_code=200 if status == "ready" else 503,
    )
