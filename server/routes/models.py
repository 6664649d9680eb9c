"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.roles.judges import Judge
from server.core.roles.tasks import Task
from server.routes.common import check_model, services_of
from server.services import PLAIN_SUFFIX, Services


async def list_models(request: Request) -> Response:
    """The model, and the same one without sentiment."""
    services = services_of(request)
    ids = (services.model_id, services.model_id + PLAIN_SUFFIX)
    return JSONResponse({"object": "list", "data": [_model(services, i) for i in ids]})


async def retrieve_model(request: Request) -> Response:
    """One of them."""
    services = services_of(request)
    model_id = request.path_params["model_id"]
    check_model(services, model_id)
    return JSONResponse(_model(services, model_id))


def _model(services: Services, model_id: str) -> dict[str, Any]:
    return {
        "id": model_id,
        "object": "model",
        "created": services.created,
        "owned_by": "qwen-all-in-one",
        "context_length": services.max_context,
        "capabilities": {
            "sentiment": not model_id.endswith(PLAIN_SUFFIX),
            "tools": True,
            "structured_output": True,
            "vision": False,
        },
        # What /v1/classify and /v1/extract may be asked for by name.
        "tasks": [
            *(_task(task, services.judges.get(task.version)) for task in services.tasks.values()),
            *({"name": name, "kind": "extract"} for name in services.extract_tasks),
        ],
    }


def _task(task: Task, judge: Judge | None) -> dict[str, Any]:
    validation = judge.validation if judge else None
    return {
        "name": task.name,
        "kind": "labels",
        "labels": [label.model_dump(include={"value", "text", "emoji"}) for label in task.labels],
        # None: the task has not been used yet, and its judge is fitted when it is.
        "judged_by": judge.kind if judge else None,
        # Of the model; None: all of them.
        "num_layers": max(judge.layers, default=None) if judge else None,
        # On examples that the judge was not fitted to; None: the task has no examples.
        "num_examples": validation.num_examples if validation else None,
        "accuracy": round(validation.accuracy, 4) if validation else None,
    }
