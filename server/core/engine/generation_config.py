"""A checkpoint's own sampling defaults and its end-of-sequence tokens."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass
from transformers import GenerationConfig

from server.core.engine.checkpoint import CheckpointError, first_wrong_field
from server.errors import first_line

T = TypeVar("T")

FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """What applies where a request says nothing."""

    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0)]
    repetition_penalty: Annotated[float, Field(gt=0)]
    eos_token_ids: Annotated[frozenset[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Reads generation_config.json; all its EOS ids count, Qwen's chat models list two.

    What it does not say of the end of a reply, config.json does.

    Raises:
        CheckpointError: it is damaged, or neither says how a reply ends.
    """
    in_general = _read(folder, "config.json")
    config = _read(folder, FILE) if (folder / FILE).is_file() else in_general
    eos = or_default(config.eos_token_id, in_general.eos_token_id)
    if eos is None:
        raise CheckpointError(f"{folder}: neither {FILE} nor config.json names an eos_token_id")
    try:
        return GenerationDefaults(
            temperature=or_default(config.temperature, 1.0)
            if or_default(config.do_sample, False)
            else 0.0,
            top_p=or_default(config.top_p, 1.0),
            top_k=or_default(config.top_k, 0),
            repetition_penalty=or_default(config.repetition_penalty, 1.0),
            eos_token_ids=eos if isinstance(eos, list) else [eos],  # type: ignore[arg-type]
        )
    except ValidationError as error:
        # The file knows one of the fields by another name.
        reason = first_wrong_field(error).replace("eos_token_ids", "eos_token_id")
        raise CheckpointError(f"{folder}: {FILE}: {reason}") from error


def _read(folder: Path, name: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(
            folder, config_file_name=name, local_files_only=True
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {name} is not readable: {first_line(error)}") from error


def or_default(value: T | None, default: T) -> T:
    """`value`, or `default` where it is None; 0 and False are values."""
    return default if value is None else value
