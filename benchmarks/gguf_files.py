"""Writes a checkpoint as GGUF: in BF16, or quantized by llama.cpp itself."""

import json
from pathlib import Path

import gguf
import llama_cpp
import torch
from safetensors import safe_open
from transformers import Qwen2Config

from benchmarks.engines.llama import IGNORE_LOG

FILE_TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def gguf_file(checkpoint: Path, folder: Path, kind: str) -> Path:
    """The checkpoint as a GGUF of `kind` ("bf16", "q8_0" or "q4_0") in `folder`.

    Written unless it exists.
    """
    path = folder / f"{kind}.gguf"
    if path.exists():
        return path
    llama_cpp.llama_log_set(IGNORE_LOG, None)
    unfinished = path.with_suffix(".part")
    if kind == "bf16":
        _write_bf16(checkpoint, unfinished)
    else:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = FILE_TYPES[kind]
        source = gguf_file(checkpoint, folder, "bf16")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), params):
            raise RuntimeError(f"llama.cpp could not quantize {source} to {kind}")
    return unfinished.rename(path)


def _write_bf16(checkpoint: Path, path: Path) -> None:
    config = Qwen2Config.from_pretrained(checkpoint)
    num_kv_heads, rope = config.num_key_value_heads, config.rope_parameters
    assert num_kv_heads is not None and rope is not None
    theta = rope["rope_theta"]
    assert theta is not None
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokenizer(writer, checkpoint, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    with safe_open(checkpoint / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_tensor(name)
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert target is not None, name
            if tensor.ndim == 1:
                writer.add_tensor(target, tensor.float().numpy())
            else:
                writer.add_tensor(
                    target,
                    tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy(),
                    raw_dtype=gguf.GGMLQuantizationType.BF16,
                )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, vocab_size: int) -> None:
    """Adds the vocabulary. The engines get token ids, so only its size matters."""
    model = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = [f"[unused{i}]" for i in range(vocab_size)]
    for token, token_id in model["vocab"].items():
        tokens[token_id] = token
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab_size)
