"""GET /health."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.routes.common import services_of


async def health(request: Request) -> Response:
    """Whether the engine works, which model it has, and how the sentiment cache does."""
    services = services_of(request)
    is_alive = services.engine.is_alive
    classifier = services.classifier
    return JSONResponse(
        {
            "status": "ok" if is_alive else "stopped",
            "model": services.model_id,
            "warning": services.warning,
            "sentiment_cache": {"hits": classifier.num_hits, "misses": classifier.num_misses},
        },
        status_code=200 if is_alive else 503,
    )
