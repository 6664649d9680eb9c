"""The matrices of a layer; constant factors are folded into them as they are read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from server.core.engine.model.config import ModelConfig
from server.core.engine.model.linear import Linear, LinearFactory
from server.core.engine.model.weights import WeightReader


@dataclass(frozen=True)
class Attention:
    """Matrices of a layer's attention."""

    qkv: Linear  # C -> (H + 2 H_kv) D: one product instead of three
    head_norms: Tensor | None  # (H + H_kv, D): of queries and keys, Qwen3
    out: Linear  # H D -> C
    norm: Tensor  # (C,), folded into the columns of qkv


@dataclass(frozen=True)
class Mlp:
    """Matrices of a layer's MLP."""

    gate_up: Linear  # C -> 2 I
    down: Linear  # I -> C
    norm: Tensor  # (C,), folded into the columns of gate_up


def read_attention(
    c: ModelConfig, reader: WeightReader, make: LinearFactory, index: int, sample: Tensor | None
) -> Attention:
    """Reads the attention of layer `index`. sample: inputs of qkv, (N, C), or None."""
    prefix = f"model.layers.{index}."
    query_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    parts = (("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))

    def read(name: str, *shape: int) -> Tensor:
        return reader.read(prefix + name, shape)

    def read_qkv(kind: str, *columns: int) -> Tensor:
        return torch.cat(
            [
                folded_heads(c, p, read(f"self_attn.{p}.{kind}", num_rows, *columns))
                for p, num_rows in parts
            ]
        )

    head_norms = None
    if c.has_qk_norm:
        norms = [
            read(f"self_attn.{p}_norm.weight", c.head_dim)[paired(c.head_dim)]
            * math.sqrt(c.head_dim)
            for p in ("q", "k")
        ]
        norms[0] *= c.head_dim**-0.5
        head_norms = torch.stack([norms[0]] * c.num_heads + [norms[1]] * c.num_kv_heads)
    size = c.hidden_size
    norm = read("input_layernorm.weight", size) * math.sqrt(size)
    return Attention(
        qkv=make(
            [read_qkv("weight", size) * norm],
            read_qkv("bias") if c.has_qkv_bias else None,
            sample,
        ),
        head_norms=head_norms,
        out=make(
            [read("self_attn.o_proj.weight", size, query_rows)],
            read("self_attn.o_proj.bias", size) if c.has_out_bias else None,
        ),
        norm=norm,
    )


def read_mlp(
    c: ModelConfig, reader: WeightReader, make: LinearFactory, index: int, sample: Tensor | None
) -> Mlp:
    """Reads the MLP of layer `index`. sample: inputs of gate_up, (N, C), or None."""
    prefix = f"model.layers.{index}."
    size, inner = c.hidden_size, c.intermediate_size

    def read(name: str, *shape: int) -> Tensor:
        return reader.read(prefix + name, shape)

    norm = read("post_attention_layernorm.weight", size) * math.sqrt(size)
    return Mlp(
        gate_up=make(
            (read(f"mlp.{p}_proj.weight", inner, size) * norm for p in ("gate", "up")),
            sample=sample,
        ),
        down=make([read("mlp.down_proj.weight", size, inner)]),
        norm=norm,
    )


def folded_heads(c: ModelConfig, module: str, rows: Tensor) -> Tensor:
    """Turns rows of q_proj, k_proj or v_proj, (heads D, ...), into rows of qkv.

    Queries without a norm are scaled for attention.
    """
    heads = rows.view(-1, c.head_dim, *rows.shape[1:])
    if module == "q_proj" and not c.has_qk_norm:
        heads = heads * c.head_dim**-0.5
    return (heads if module == "v_proj" else heads[:, paired(c.head_dim)]).flatten(0, 1)


def paired(head_dim: int) -> Tensor:
    """The order of a head's dimensions in which the pairs of RoPE are neighbours: (D,).

    In checkpoints a pair is half a head apart. Queries and keys are reordered alike, so their
    products stay the same.
    """
    half = head_dim // 2
    return torch.arange(head_dim).view(2, half).T.flatten()
