"""All routes of the server. Handlers know JSON and services, never tensors."""

from starlette.routing import Route

from server.routes.chat import chat_completions
from server.routes.classify import classify
from server.routes.completions import text_completions
from server.routes.decisions import decisions
from server.routes.extract import extract
from server.routes.health import health, ready
from server.routes.metrics import metrics
from server.routes.models import list_models, retrieve_model
from server.routes.responses import responses
from server.routes.tokenize import detokenize, tokenize

ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", text_completions, methods=["POST"]),
    Route("/v1/responses", responses, methods=["POST"]),
    Route("/v1/classify", classify, methods=["POST"]),
    Route("/v1/extract", extract, methods=["POST"]),
    Route("/v1/decisions", decisions, methods=["POST"]),
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{model_id:path}", retrieve_model, methods=["GET"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
