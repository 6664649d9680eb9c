"""A checkpoint's own sampling defaults and its end-of-sequence tokens."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass
from transformers import GenerationConfig

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.gguf_file import GGUF, Source
from server.reasons import first_line, first_wrong_field

FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling parameters that a request does not set, and the end-of-sequence tokens."""

    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0)]
    repetition_penalty: Annotated[float, Field(gt=0)]
    eos_token_ids: Annotated[frozenset[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def read_generation_defaults(source: Source) -> GenerationDefaults:
    """Reads generation_config.json, or a GGUF's metadata. Qwen's chat models have two EOS ids.

    An `eos_token_id` that is missing is read from config.json.

    Raises:
        CheckpointError: a file is damaged, or none has an `eos_token_id`.
    """
    if isinstance(source, GGUF):
        place, no_place = "the metadata", "nothing in the metadata"
        config = source.generation_config()
    else:
        place, no_place = FILE, f"neither {FILE} nor config.json"
        config = _read_folder(source)
    eos = config.get("eos_token_id")
    if eos is None:
        raise CheckpointError(f"{source}: {no_place} names an eos_token_id")
    try:
        return GenerationDefaults(
            temperature=config.get("temperature", 1.0) if config.get("do_sample") else 0.0,
            top_p=config.get("top_p", 1.0),
            top_k=config.get("top_k", 0),
            repetition_penalty=config.get("repetition_penalty", 1.0),
            eos_token_ids=eos if isinstance(eos, list) else [eos],  # type: ignore[arg-type]
        )
    except ValidationError as error:
        # The file has another name for one of the fields.
        reason = first_wrong_field(error).replace("eos_token_ids", "eos_token_id")
        raise CheckpointError(f"{source}: {place}: {reason}") from error


def _read_folder(folder: Path) -> dict[str, Any]:
    model_config = _read(folder, "config.json")
    config = _read(folder, FILE) if (folder / FILE).is_file() else model_config
    return {"eos_token_id": model_config.get("eos_token_id"), **config}


def _read(folder: Path, name: str) -> dict[str, Any]:
    """The file's fields; null counts as absent."""
    try:
        config = GenerationConfig.from_pretrained(
            folder, config_file_name=name, local_files_only=True
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {name} is not readable: {first_line(error)}") from error
    return {name: value for name, value in config.to_dict().items() if value is not None}
