"""/v1/classify on the wire."""

from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, StrictStr, Tag, model_validator

from server.errors import InvalidRequestError
from server.protocol.base import FIRST_ERROR, RequestBody, branch

MAX_INPUTS = 256


def _form(value: Any) -> str | None:
    if isinstance(value, str):
        return branch("text")
    return branch("texts") if isinstance(value, list) else None


_Input = Annotated[
    Annotated[StrictStr, Tag(branch("text"))]
    | Annotated[list[StrictStr], FIRST_ERROR, Tag(branch("texts"))],
    Discriminator(
        _form,
        custom_error_type="type",
        custom_error_message="must be a text or a list of texts",
    ),
]


class ClassifyRequest(RequestBody):
    """Body of POST /v1/classify: a named task, or instructions and labels of one's own."""

    input: _Input
    task: Annotated[StrictStr, Field(min_length=1)] | None = None
    instructions: Annotated[StrictStr, Field(min_length=1)] | None = None
    labels: (
        Annotated[
            list[Annotated[StrictStr, Field(min_length=1)]], Field(min_length=2, max_length=255)
        ]
        | None
    ) = None

    @property
    def texts(self) -> list[str]:
        """The inputs as a list."""
        return [self.input] if isinstance(self.input, str) else self.input

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
        if not self.texts or len(self.texts) > MAX_INPUTS:
            raise InvalidRequestError(
                f"'input' must hold 1 to {MAX_INPUTS} texts, not {len(self.texts)}; "
                "send more in several requests.",
                param="input",
            )
        for i, text in enumerate(self.texts):
            if not text.strip():
                raise InvalidRequestError(f"'{self.param(i)}' is empty.", param=self.param(i))
        return self

    def param(self, index: int) -> str:
        """What a text is called in errors."""
        return "input" if isinstance(self.input, str) else f"input[{index}]"
