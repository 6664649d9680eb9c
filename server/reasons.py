"""Why something cannot be used, in one line, from what a library says of it."""

from pydantic import ValidationError


def first_line(error: BaseException) -> str:
    """What a library says, without the advice that follows."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def first_wrong_field(error: ValidationError) -> str:
    """The first field that does not fit, and why."""
    first = error.errors()[0]
    return f"{first['loc'][0]}: {first['msg']}"
