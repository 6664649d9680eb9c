"""The forward of a dense Qwen2 or Qwen3, over sequences of different lengths at once.

All new tokens of all sequences lie behind one another in one (N, C) matrix, so every linear
layer runs once per step; only attention looks at sequences one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from server.core.model.config import ModelConfig
from server.core.model.kv_cache import KVCache
from server.core.model.weights import WeightReader


@dataclass(frozen=True)
class Segment:
    """New tokens of one sequence.

    positions: of each token in its sequence, T of them.
    mask: (T, cache.length + T), True where a token may look; None means causal.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    cache: KVCache
    mask: Tensor | None = None


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor  # (C,)
    qkv: Tensor  # ((H + 2 H_kv) D, C): one product instead of three
    qkv_bias: Tensor | None
    query_norm: Tensor | None  # (D,), Qwen3
    key_norm: Tensor | None
    out: Tensor  # (C, H D)
    out_bias: Tensor | None  # only Qwen3 with attention_bias has one
    post_norm: Tensor
    gate_up: Tensor  # (2 I, C)
    down: Tensor  # (C, I)


class QwenModel:
    """Weights and forward pass. Holds no state between calls; that is in the KV caches."""

    def __init__(self, config: ModelConfig, reader: WeightReader) -> None:
        self.config = config
        c = config
        vocabulary = (c.vocab_size, c.hidden_size)
        self._embeddings = reader.read("model.embed_tokens.weight", vocabulary)
        self._layers = [_read_layer(c, reader, i) for i in range(c.num_layers)]
        self._norm = reader.read("model.norm.weight", (c.hidden_size,))
        self._head = self._embeddings if c.is_tied else reader.read("lm_head.weight", vocabulary)
        # Source of the formula: RoFormer (arXiv 2104.09864), the half-split form of Llama.
        exponents = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        self._inverse_frequencies = 1.0 / c.rope_theta**exponents

    @property
    def dtype(self) -> torch.dtype:
        return self._embeddings.dtype

    def new_cache(self) -> KVCache:
        """An empty KV cache for one sequence."""
        c = self.config
        return KVCache(c.num_layers, c.num_kv_heads, c.head_dim, self.dtype)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Computes the segments and appends them to their caches.

        Returns the final hidden states, segment behind segment: (N, C).
        """
        ids = torch.tensor([i for s in segments for i in s.token_ids])
        positions = torch.tensor([p for s in segments for p in s.positions])
        cos, sin = self._rotations(positions)
        masks = [_mask(s) for s in segments]
        for segment in segments:
            segment.cache.reserve(len(segment.token_ids))
        hidden = F.embedding(ids, self._embeddings)
        for i, layer in enumerate(self._layers):
            normed = self._rms_norm(hidden, layer.input_norm)
            hidden = hidden + self._attend(i, layer, normed, segments, masks, cos, sin)
            normed = self._rms_norm(hidden, layer.post_norm)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        for segment in segments:
            segment.cache.length += len(segment.token_ids)
        return self._rms_norm(hidden, self._norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, C) -> (N, V), in float32."""
        return F.linear(hidden, self._head).float()

    def _attend(
        self, index: int, layer: _Layer, normed: Tensor, segments: Sequence[Segment],
        masks: Sequence[Tensor | None], cos: Tensor, sin: Tensor,
    ) -> Tensor:  # fmt: skip
        c = self.config
        num_heads = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(len(normed), -1, c.head_dim)
        queries, keys, values = torch.split(qkv, num_heads, dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries = self._rms_norm(queries, layer.query_norm)
            keys = self._rms_norm(keys, layer.key_norm)
        queries, keys = _rotate(queries, cos, sin), _rotate(keys, cos, sin)
        mixed, begin = [], 0
        for segment, mask in zip(segments, masks, strict=True):
            rows = slice(begin, begin + len(segment.token_ids))
            begin = rows.stop
            all_keys, all_values = segment.cache.write(
                index, keys[rows].transpose(0, 1), values[rows].transpose(0, 1)
            )
            attended = F.scaled_dot_product_attention(
                queries[rows].transpose(0, 1)[None],
                all_keys[None],
                all_values[None],
                attn_mask=mask,
                enable_gqa=c.num_heads != c.num_kv_heads,
            )
            mixed.append(attended[0].transpose(0, 1).flatten(1))
        return F.linear(torch.cat(mixed), layer.out, layer.out_bias)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines: (N, 1, D) each."""
        angles = positions[:, None].float() * self._inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def load_qwen(folder: Path, config: ModelConfig, dtype: torch.dtype) -> QwenModel:
    """Reads the checkpoint in `folder`.

    Raises:
        CheckpointError: the weights do not fit the configuration, or cannot be read.
    """
    with WeightReader(folder, dtype) as reader:
        return QwenModel(config, reader)


def _read_layer(c: ModelConfig, reader: WeightReader, index: int) -> _Layer:
    prefix = f"model.layers.{index}."
    query_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    parts = (("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))

    def read(name: str, *shape: int) -> Tensor:
        return reader.read(prefix + name, shape)

    def read_qkv(kind: str, *columns: int) -> Tensor:
        return torch.cat([read(f"self_attn.{p}.{kind}", rows, *columns) for p, rows in parts])

    return _Layer(
        input_norm=read("input_layernorm.weight", c.hidden_size),
        qkv=read_qkv("weight", c.hidden_size),
        qkv_bias=read_qkv("bias") if c.has_qkv_bias else None,
        query_norm=read("self_attn.q_norm.weight", c.head_dim) if c.has_qk_norm else None,
        key_norm=read("self_attn.k_norm.weight", c.head_dim) if c.has_qk_norm else None,
        out=read("self_attn.o_proj.weight", c.hidden_size, query_rows),
        out_bias=read("self_attn.o_proj.bias", c.hidden_size) if c.has_out_bias else None,
        post_norm=read("post_attention_layernorm.weight", c.hidden_size),
        gate_up=torch.cat(
            [
                read(f"mlp.{p}_proj.weight", c.intermediate_size, c.hidden_size)
                for p in ("gate", "up")
            ]
        ),
        down=read("mlp.down_proj.weight", c.hidden_size, c.intermediate_size),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (N, H, D)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _mask(segment: Segment) -> Tensor | None:
    """The segment's own mask, or a causal one; None where every token may look everywhere."""
    if segment.mask is not None:
        return segment.mask
    num_new, num_cached = len(segment.token_ids), segment.cache.length
    if num_new == 1:
        return None
    return torch.ones(num_new, num_cached + num_new, dtype=torch.bool).tril(num_cached)
