"""GET /health: alive? GET /ready: may requests come?"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.routes.common import services_of


async def health(request: Request) -> Response:
    """Whether the engine works, which model it has, and how the sentiment cache does."""
    services = services_of(request)
    is_alive, breakdown = services.engine.is_alive, services.engine.breakdown
    classifier = services.classifier
    return JSONResponse(
        {
            "status": "ok" if is_alive else "stopped",
            "reason": f"the engine broke down: {breakdown!r}" if breakdown else None,
            "model": services.model_id,
            "warning": services.warning,
            "sentiment_cache": {"hits": classifier.num_hits, "misses": classifier.num_misses},
        },
        status_code=200 if is_alive else 503,
    )


async def ready(request: Request) -> Response:
    """Whether a request that came now would be served."""
    gate = request.app.state.gate
    is_ready = services_of(request).engine.is_alive and not gate.is_closed
    return JSONResponse(
        {"status": "ready" if is_ready else "stopping", "requests": gate.num_requests},
        status_code=200 if is_ready else 503,
    )
