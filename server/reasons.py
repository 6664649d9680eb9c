"""Reasons in one line, from the errors that libraries raise."""

from pydantic import ValidationError


def first_line(error: BaseException) -> str:
    """The first line of the error's message, without the advice that follows."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def first_wrong_field(error: ValidationError) -> str:
    """The first invalid field, and why it is invalid."""
    first = error.errors()[0]
    return f"{first['loc'][0]}: {first['msg']}"
