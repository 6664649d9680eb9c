"""Writes a checkpoint folder as a small GGUF file, with the matrices in any type."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from training.weights import read_weights

# Offsets of the float16 scales in a block, for types that gguf cannot quantize to.
SCALES_AT = {
    Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,), Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,),
}  # fmt: skip
SCALE = 2e-4


def write_gguf(
    path: Path, folder: Path, kind: Kind = Kind.F32,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    without: tuple[str, ...] = (), byte_order: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> dict[str, Tensor]:  # fmt: skip
    """Writes the checkpoint in `folder`, with its tokenizer if it has one.

    change: adds to what is written. without: keys and tensors to leave out.

    Returns the weights that the file then has, by transformers' names.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch, endianess=byte_order)
    _add_config(writer, config)
    if (folder / "tokenizer.json").exists():
        _add_tokenizer(writer, folder, config)
    weights = {}
    names = gguf.get_tensor_name_map(
        next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch),
        config["num_hidden_layers"],
    )
    for name, tensor in read_weights(folder).items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name
        data, stored_as = tensor.float().numpy(), Kind.F32
        if tensor.ndim == 2:
            data, stored_as = quantized(data, kind), kind
        weights[name] = torch.from_numpy(gguf.quants.dequantize(data, stored_as).copy())
        if gguf_name not in without:
            writer.add_tensor(gguf_name, data, raw_dtype=stored_as)
    change(writer)
    for key in without:
        writer.kv_data[0].pop(key, None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def quantized(rows: NDArray[np.float32], kind: Kind) -> NDArray[Any]:
    """The rows in `kind`; if gguf cannot quantize to it, random rows of the same size."""
    if kind not in SCALES_AT:
        data: NDArray[Any] = gguf.quants.quantize(rows, kind)
        return data
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(rows.size)
    blocks = generator.integers(0, 256, (rows.size // block_size, block_bytes), np.uint8)
    for begin in SCALES_AT[kind]:
        scales = SCALE * generator.uniform(0.5, 1, len(blocks))
        blocks[:, begin : begin + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(len(rows), -1)


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    special = {t["id"]: t["special"] for t in tokenizer["added_tokens"]}
    texts = {token_id: text for text, token_id in ids.items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(config["vocab_size"])]
    kinds = [
        gguf.TokenType.NORMAL if i in texts else gguf.TokenType.UNUSED for i in range(len(tokens))
    ]
    for token_id, is_special in special.items():
        kinds[token_id] = gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))
