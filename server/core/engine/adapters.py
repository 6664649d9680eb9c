"""Reads the configuration of adapters that peft has saved in folders. Knows no tensors."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from server.core.engine.checkpoint import CheckpointError
from server.reasons import first_line, first_wrong_field

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
# Modules of a layer that a LoRA may change.
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")


def _checked_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


Count = Annotated[int, Field(gt=0)]
Scale = Annotated[float, Field(allow_inf_nan=False)]
Pattern = Annotated[str, AfterValidator(_checked_pattern)]
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Adapter:
    """An adapter that sequences may use beside the base model.

    num_virtual_tokens: positions before a sequence's first token that the adapter fills.
    digest: SHA-256 of its files, in hexadecimal.
    """

    name: str
    num_virtual_tokens: int = 0
    digest: str = ""


# The base model without an adapter.
BASE = Adapter("")
# By name, if no adapter is loaded.
ONLY_BASE: Mapping[str, Adapter] = {BASE.name: BASE}


class AdapterConfig(BaseModel):
    """Fields of every kind of adapter. An unknown field is accepted if its value is falsy."""

    model_config = ConfigDict(frozen=True, extra="allow")

    base_model_name_or_path: str | None = None  # named in errors only: shapes decide

    # Fields without effect on what a trained adapter computes.
    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode",
            "revision",
        }
    )  # fmt: skip

    @property
    def unsupported(self) -> str | None:
        """The first unsupported field, or None."""
        extra = self.__pydantic_extra__ or {}
        return next((name for name in sorted(extra.keys() - self.harmless) if extra[name]), None)


class LoraConfig(AdapterConfig):
    """LoRA, also rank-stabilized. Patterns are regular expressions for module paths."""

    harmless = AdapterConfig.harmless | {
        "lora_dropout", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config",
    }  # fmt: skip

    r: Count
    lora_alpha: Scale
    target_modules: Pattern | list[str]
    layers_to_transform: list[int] | int | None = None
    use_rslora: bool = False
    rank_pattern: dict[Pattern, Count] = {}
    alpha_pattern: dict[Pattern, Scale] = {}
    bias: str = "none"
    init_lora_weights: bool | str = True

    @property
    def unsupported(self) -> str | None:
        if self.bias != "none":
            return "bias"
        # Other initializations also change the base model's weights, which this server does not.
        if self.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
            return "init_lora_weights"
        return super().unsupported

    def modules(self, num_layers: int) -> Iterator[tuple[int, str]]:
        """Layer and name of each module that the adapter changes."""
        layers = self.layers_to_transform
        listed = [layers] if isinstance(layers, int) else layers
        for layer in range(num_layers) if listed is None else listed:
            for name in ATTENTION_TARGETS + MLP_TARGETS:
                if self._is_target(module_path(layer, name)):
                    yield layer, name

    def unknown_target(self, num_layers: int) -> str | None:
        """The first target that matches no matrix of the model's layers, or None."""
        if isinstance(self.target_modules, str):
            return None if any(self.modules(num_layers)) else self.target_modules
        paths = [
            module_path(layer, name)
            for layer in range(num_layers)
            for name in ATTENTION_TARGETS + MLP_TARGETS
        ]
        return next(
            (t for t in self.target_modules if not any(_ends_with(p, t) for p in paths)), None
        )

    def rank(self, module: str) -> int:
        """The rank R of a module's matrices."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """The factor of the product of a module's matrices."""
        rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _is_target(self, module: str) -> bool:
        targets = self.target_modules
        if isinstance(targets, str):
            return targets == "all-linear" or re.fullmatch(targets, module) is not None
        return any(_ends_with(module, target) for target in targets)


class PromptConfig(AdapterConfig):
    """Embeddings of virtual tokens, as prompt tuning and p-tuning save them."""

    harmless = AdapterConfig.harmless | {
        "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
        "tokenizer_kwargs", "encoder_reparameterization_type", "encoder_hidden_size",
        "encoder_num_layers", "encoder_dropout",
    }  # fmt: skip

    num_virtual_tokens: Count


class PrefixConfig(PromptConfig):
    """Keys and values of virtual tokens, saved after the projection, if there is one."""

    harmless = PromptConfig.harmless | {"prefix_projection", "init_weights"}


# By peft_type.
_KINDS: Mapping[str, type[AdapterConfig]] = {
    "LORA": LoraConfig,
    "PROMPT_TUNING": PromptConfig,
    "P_TUNING": PromptConfig,
    "PREFIX_TUNING": PrefixConfig,
}


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads the configuration of the adapter in the folder.

    Raises:
        CheckpointError: there is no adapter, or this server does not support it.
    """
    _check_files(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = config["peft_type"]
        if kind not in _KINDS:
            raise CheckpointError(
                f"{folder} holds an adapter of type {kind!r}; this server runs {', '.join(_KINDS)}"
            )
        parsed = _KINDS[kind].model_validate(config)
    except ValidationError as error:
        raise CheckpointError(f"{folder}: {CONFIG_FILE}: {first_wrong_field(error)}") from error
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} is not readable: {first_line(error)}"
        ) from error
    if name := parsed.unsupported:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE}: {name} {config[name]!r} is not supported; train the "
            "adapter without it, or merge it into the model with peft"
        )
    return parsed


def module_path(layer: int, name: str) -> str:
    """The path of a module, as in patterns and in names of tensors."""
    part = "self_attn" if name in ATTENTION_TARGETS else "mlp"
    return f"model.layers.{layer}.{part}.{name}"


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder} with an adapter")
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} holds no adapter of peft: {CONFIG_FILE} is missing")
    if (folder / WEIGHTS_FILE).is_file():
        return
    if (folder / _PICKLE_FILE).is_file():
        raise CheckpointError(
            f"{folder}: {_PICKLE_FILE} is a pickle, which could run code, and is not read; if you "
            f"trust it, load it with peft and save it again, which writes {WEIGHTS_FILE}"
        )
    raise CheckpointError(f"{folder}: the adapter has no weights: {WEIGHTS_FILE} is missing")


def _ends_with(module: str, target: str) -> bool:
    return f".{module}".endswith(f".{target}")


def _by_pattern(patterns: Mapping[str, N], module: str, default: N) -> N:
    """The value of the first pattern that matches the end of the module's path, as in peft."""
    matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next((patterns[key] for key in matching), default)
