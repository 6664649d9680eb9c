"""/v1/classify on the wire."""

from typing import Annotated, Self

from pydantic import Field, StrictBool, StrictStr, model_validator

from server.errors import InvalidRequestError
from server.protocol.texts import TextsRequest


class ClassifyRequest(TextsRequest):
    """Body of POST /v1/classify: a named task, or the client's own instructions and labels."""

    task: Annotated[StrictStr, Field(min_length=1)] | None = None
    instructions: Annotated[StrictStr, Field(min_length=1)] | None = None
    labels: (
        Annotated[
            list[Annotated[StrictStr, Field(min_length=1)]], Field(min_length=2, max_length=255)
        ]
        | None
    ) = None
    sentences: StrictBool = False
    explain: StrictBool = False

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if (self.instructions is None) != (self.labels is None):
            missing = "labels" if self.labels is None else "instructions"
            raise InvalidRequestError(
                f"'instructions' and 'labels' describe a task together; '{missing}' is missing.",
                param=missing,
            )
        if self.labels is not None and self.task is not None:
            raise InvalidRequestError(
                "Give either 'task' or 'instructions' with 'labels', not both.", param="task"
            )
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise InvalidRequestError("'labels' must differ from each other.", param="labels")
        return self
