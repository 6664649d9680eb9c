"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.roles.judges import Judge
from server.core.roles.tasks import Task
from server.routes.common import find_model, services_of
from server.services import ServedModel, Services


async def list_models(request: Request) -> Response:
    """The model and its adapters, each with sentiment and without."""
    services = services_of(request)
    data = [_model(services, model) for model in services.models.values()]
    return JSONResponse({"object": "list", "data": data})


async def retrieve_model(request: Request) -> Response:
    """One model by its id."""
    services = services_of(request)
    model = find_model(services, request.path_params["model_id"])
    return JSONResponse(_model(services, model))


def _model(services: Services, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": services.created,
        "owned_by": "qwen-all-in-one",
        # For an adapter, the base model, as vLLM lists adapters.
        "parent": services.model_id if model.adapter.name else None,
        "context_length": services.max_context - model.adapter.num_virtual_tokens,
        "capabilities": {
            "sentiment": not model.is_plain,
            "tools": True,
            "structured_output": True,
            "vision": False,
            # Whether a task may be judged by a head, if this is better than its labels' scores.
            "heads": services.engine.has_hidden_states,
        },
        # The tasks of /v1/classify and /v1/extract.
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
        # None: the judge is fitted when the task is first used.
        "judged_by": judge.kind if judge else None,
        # The layers of the model that the judge needs; None: all.
        "num_layers": max(judge.layers, default=None) if judge else None,
        # Measured on held-out examples; None: the task has no examples.
        "num_examples": validation.num_examples if validation else None,
        "accuracy": round(validation.accuracy, 4) if validation else None,
    }
