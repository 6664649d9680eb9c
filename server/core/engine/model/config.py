"""The shape of a checkpoint, read from its config.json by transformers, or from a GGUF."""

from typing import Annotated

from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass
from transformers import AutoConfig, PretrainedConfig

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.gguf_file import GGUF, Source
from server.core.engine.model.weights.packing import read_packing
from server.reasons import first_line, first_wrong_field

ARCHITECTURES = ("qwen2", "qwen3")

Count = Annotated[int, Field(gt=0)]
Size = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class ModelConfig:
    """Numbers of a dense Qwen2 or Qwen3; Qwen1.5 and Qwen2.5 are Qwen2 by architecture."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    rms_norm_eps: Size
    rope_theta: Size
    max_position_embeddings: Count
    is_tied: bool
    has_qk_norm: bool  # Qwen3 normalises queries and keys per head
    has_qkv_bias: bool
    has_out_bias: bool

    @property
    def num_parameters(self) -> int:
        """Approximate number of weights, embeddings counted once."""
        attention = self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads) * 2
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.vocab_size * self.hidden_size + self.num_layers * (attention + mlp)


def read_model_config(source: Source) -> ModelConfig:
    """Reads the configuration.

    Raises:
        CheckpointError: it is damaged, or this server does not support the model.
    """
    place = "the metadata" if isinstance(source, GGUF) else "config.json"
    try:
        config = _read_config(source)
        _check_kind(source, config)
        return _to_model_config(config)
    except ValidationError as error:
        raise CheckpointError(f"{source}: {place}: {first_wrong_field(error)}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            StrictDataclassError) as error:  # fmt: skip
        raise CheckpointError(f"{source}: {place} is not readable: {first_line(error)}") from error


def _read_config(source: Source) -> PretrainedConfig:
    config: PretrainedConfig
    if isinstance(source, GGUF):
        _check_architecture(source, source.architecture)
        config = AutoConfig.for_model(**source.config())
        return config
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} is not a checkpoint: config.json is missing")
    read_packing(source)  # only to refuse unsupported packings
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    return config


def _check_architecture(source: Source, name: str) -> None:
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{source} holds a {name!r} model; this server runs dense "
            "Qwen1.5, Qwen2, Qwen2.5 and Qwen3 checkpoints"
        )


def _check_kind(source: Source, config: PretrainedConfig) -> None:
    _check_architecture(source, config.model_type)
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{source}: RoPE scaling {rope['rope_type']!r} is not supported")
    if set(config.layer_types) != {"full_attention"}:
        raise CheckpointError(f"{source}: sliding-window attention is not supported")
    if config.hidden_act != "silu":
        raise CheckpointError(f"{source}: activation {config.hidden_act!r} is not supported")


def _to_model_config(config: PretrainedConfig) -> ModelConfig:
    rope, is_qwen3 = config.rope_parameters, config.model_type == "qwen3"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.num_attention_heads % config.num_key_value_heads or head_dim % 2:
        raise ValueError(
            "num_attention_heads is not a multiple of num_key_value_heads, or head_dim is odd"
        )
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        max_position_embeddings=config.max_position_embeddings,
        is_tied=config.tie_word_embeddings,
        has_qk_norm=is_qwen3,
        has_qkv_bias=config.attention_bias if is_qwen3 else True,
        has_out_bias=config.attention_bias if is_qwen3 else False,
    )
