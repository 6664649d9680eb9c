"""A checkpoint's own sampling defaults and its end-of-sequence tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import GenerationConfig

from server.core.checkpoint import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class GenerationDefaults:
    """What applies where a request says nothing."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    eos_token_ids: frozenset[int]


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Reads generation_config.json; all its EOS ids count, Qwen's chat models list two.

    Raises:
        CheckpointError: neither it nor config.json says how a reply ends.
    """
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", local_files_only=True
        )
    eos = config.eos_token_id
    if eos is None:
        raise CheckpointError(f"{folder}: generation_config.json names no eos_token_id")
    return GenerationDefaults(
        temperature=or_default(config.temperature, 1.0)
        if or_default(config.do_sample, False)
        else 0.0,
        top_p=or_default(config.top_p, 1.0),
        top_k=or_default(config.top_k, 0),
        repetition_penalty=or_default(config.repetition_penalty, 1.0),
        eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos),
    )


def or_default(value: T | None, default: T) -> T:
    """`value`, or `default` where it is None; 0 and False are values."""
    return default if value is None else value
