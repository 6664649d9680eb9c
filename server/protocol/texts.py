"""Shared by the routes that judge texts: one input or many."""

from typing import Annotated, Any, Self

from pydantic import Discriminator, StrictStr, Tag, model_validator

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


class TextsRequest(RequestBody):
    """Base of the requests about one text or several."""

    input: _Input

    @property
    def texts(self) -> list[str]:
        """The inputs as a list."""
        return [self.input] if isinstance(self.input, str) else self.input

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
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
        """The request's field with the text of an index, for errors."""
        return "input" if isinstance(self.input, str) else f"input[{index}]"
