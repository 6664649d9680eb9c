"""The forward pass of a dense Qwen2 or Qwen3, over sequences of different lengths at once.

The new tokens of all sequences are the rows of one (N, C) matrix, so every linear layer runs once
per step. The scales of norms and attention, and the order of RoPE's pairs, are folded into the
weights as they are read.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from server.core.engine.gguf_file import Source
from server.core.engine.model.adapter_weights import LoraWeights, SoftPrefix, SoftPrompt
from server.core.engine.model.attention.segment import Segment, step_order
from server.core.engine.model.attention.step import StepAttention
from server.core.engine.model.backend import Backend, choose_backend
from server.core.engine.model.config import ModelConfig
from server.core.engine.model.kv_cache import KVCache, KVPrefix
from server.core.engine.model.kv_memory import KVMemory
from server.core.engine.model.layers import Attention, Mlp, paired, read_attention, read_mlp
from server.core.engine.model.linear import QUANTIZED_DTYPES, FloatLinear
from server.core.engine.model.lora import Lora, LoraRows, Rows, fold_lora
from server.core.engine.model.weights import Lookup, WeightReader, open_weights
from server.core.engine.runner import StepInterruptedError

# Random tokens that run through each layer while a quantized model is read, to measure which
# columns are large. That hardly depends on the text, so no tokenizer is needed.
_NUM_SAMPLE_TOKENS = 64


class QwenModel:
    """Weights and forward pass. All state between calls is in the KV caches."""

    def __init__(
        self,
        config: ModelConfig,
        reader: WeightReader,
        backend: Backend,
        sample_ids: Sequence[int] = (),
    ) -> None:
        """sample_ids: tokens that run through each layer as it is read.

        Each norm's output for them is the sample of the matrix after it.
        """
        self.config = config
        self._operations, self._attention, self.is_row_exact = backend
        c, make = config, self._operations.factories
        # Source of the formula: RoFormer (arXiv 2104.09864).
        exponents = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        self._inverse_frequencies = 1.0 / c.rope_theta**exponents
        # The largest matrix first, as quantizing it briefly takes twice its size. So it gets no
        # sample.
        embeddings = "model.embed_tokens.weight"
        head = embeddings if c.is_tied else "lm_head.weight"
        self._head = make.head(reader.blocks(head, (c.vocab_size, c.hidden_size)))
        if c.is_tied and isinstance(self._head, FloatLinear):
            self._embeddings: Lookup = partial(F.embedding, weight=self._head.weight)
        else:
            # Stay in the file, as they are stored there: a step needs few of their rows.
            self._embeddings = reader.lookup(embeddings, (c.vocab_size, c.hidden_size))
        sample = _Sample(self, self._embedded(sample_ids)) if sample_ids else None
        # disable=None: shown on a terminal only, not in a log.
        indices = tqdm(range(c.num_layers), "loading", unit=" layers", leave=False, disable=None)
        self._layers = list[tuple[Attention, Mlp]]()
        for i in indices:
            attention = read_attention(
                c, reader, make.attention, i, sample.normalised() if sample else None
            )
            if sample:
                sample.add_attention(i, attention)
            mlp = read_mlp(c, reader, make.mlp, i, sample.normalised() if sample else None)
            if sample:
                sample.add_mlp(mlp)
            self._layers.append((attention, mlp))
        self._norm = reader.read("model.norm.weight", (c.hidden_size,)) * math.sqrt(c.hidden_size)

    def new_memory(self, max_tokens: int, max_context: int) -> KVMemory:
        """Memory for the KV caches of running sequences."""
        c = self.config
        return KVMemory(
            c.num_layers, c.num_kv_heads, c.head_dim, self._attention.layout,
            max_tokens=max_tokens, max_context=max_context,
        )  # fmt: skip

    def forward(
        self, segments: Sequence[Segment], should_stop: Callable[[], bool] = lambda: False
    ) -> list[list[Tensor]]:
        """Computes the segments and appends them to their caches, which have room.

        Returns the hidden states of each segment after each of its layers: (T, C).

        Raises:
            StepInterruptedError: `should_stop`, called before each layer, returned True. No cache
                is longer than before.
        """
        order = step_order(segments)
        ordered = [segments[i] for i in order]
        attend = StepAttention(self._attention, ordered)
        states: list[list[Tensor]] = [[] for _ in segments]
        # Layers after which states are returned or segments leave; in most steps only the last.
        stops = {layer for s in segments for layer in s.layers or (self.config.num_layers,)}
        rotations = self._rotations([p for s in ordered for p in s.positions])
        hidden = self._embedded([i for s in ordered for i in s.token_ids])
        rows_by_lora = _rows_by_lora(ordered, len(hidden))
        for i, (attention, mlp) in enumerate(self._layers):
            if should_stop():
                raise StepInterruptedError
            loras = [LoraRows(rows, lora.layers[i]) for lora, rows in rows_by_lora.items()]
            self._operations.add_attention(i, attention, hidden, attend, rotations, loras)
            self._operations.add_mlp(mlp, hidden, loras)
            if i + 1 not in stops:
                continue
            num_staying = self._collect(i + 1, hidden, ordered, [states[j] for j in order])
            hidden, rotations = hidden[:num_staying], rotations[:num_staying]
            rows_by_lora = _rows_by_lora(ordered, num_staying)
            if not num_staying:
                break
        for segment in segments:
            segment.cache.length += segment.num_kept
        return states

    def _collect(
        self, layer: int, hidden: Tensor, segments: Sequence[Segment], states: list[list[Tensor]]
    ) -> int:
        """Appends the hidden states that segments want of this layer to `states`.

        Returns how many rows stay in the forward pass: the first ones.
        """
        begin = num_staying = 0
        for segment, collected in zip(segments, states, strict=True):
            if begin == len(hidden):
                break  # this segment and all later ones have left before
            rows = slice(begin, begin := begin + len(segment.token_ids))
            is_leaving = segment.depth <= layer or layer == self.config.num_layers
            if not is_leaving:
                num_staying = begin
            if is_leaving or (segment.layers and layer in segment.layers):
                # Rows that stay are copied: the next layer changes them in place.
                collected.append(hidden[rows] if is_leaving else hidden[rows].clone())
        return num_staying

    def fold_lora(self, weights: LoraWeights) -> Lora:
        """The LoRA in the form that segments use."""
        return fold_lora(weights, self.config, self._layers)

    def virtual_prefix(self, weights: SoftPrompt | SoftPrefix) -> KVPrefix:
        """Keys and values of an adapter's virtual tokens, which its sequences begin with."""
        if isinstance(weights, SoftPrompt):
            virtual = _Sample(self, weights.embeddings.clone())
            for i, (attention, mlp) in enumerate(self._layers):
                virtual.add_attention(i, attention)
                virtual.add_mlp(mlp)
            return virtual.prefix
        layout, keys = self._attention.layout, weights.keys[..., paired(self.config.head_dim)]
        blocks = layout.laid_out(keys.to(layout.dtype), weights.values.to(layout.dtype))
        return KVPrefix(*blocks, keys.shape[2], layout)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, C) -> (N, V), in float32."""
        return self._operations.logits(self._head, self._norm, hidden)

    def _embedded(self, token_ids: Sequence[int]) -> Tensor:
        """(N,) -> (N, C)."""
        return self._embeddings(torch.tensor(token_ids)).float()

    def _rotations(self, positions: Sequence[int]) -> Tensor:
        """RoPE's unit complex numbers, one for each position and pair: (N, D / 2)."""
        angles = torch.tensor(positions, dtype=torch.float32)[:, None] * self._inverse_frequencies
        return torch.polar(torch.ones_like(angles), angles)


def _rows_by_lora(segments: Sequence[Segment], num_rows: int) -> dict[Lora, Rows]:
    """The rows of each LoRA among the first `num_rows` of a step."""
    rows = defaultdict[Lora, list[int]](list)
    begin = 0
    for segment in segments:
        end = begin + len(segment.token_ids)
        if segment.lora is not None:
            rows[segment.lora] += range(begin, min(end, num_rows))
        begin = end
    return {lora: _as_rows(indices) for lora, indices in rows.items() if indices}


def _as_rows(rows: list[int]) -> Rows:
    """rows: ascending."""
    are_consecutive = rows[-1] - rows[0] == len(rows) - 1
    return slice(rows[0], rows[-1] + 1) if are_consecutive else torch.tensor(rows)


class _Sample:
    """Rows that run through a model layer by layer, even while its layers are read."""

    def __init__(self, model: QwenModel, hidden: Tensor) -> None:
        """hidden: embeddings, (N, C), changed in place."""
        num = len(hidden)
        self._cache = KVCache()
        is_reserved = model.new_memory(num, num).reserve(self._cache, num)
        assert is_reserved
        segment = Segment([0] * num, range(num), self._cache)
        self._operations = model._operations
        self._norm_eps = model.config.rms_norm_eps
        self._attend = StepAttention(model._attention, [segment])
        self._rotations = model._rotations(segment.positions)
        self._hidden = hidden

    @property
    def prefix(self) -> KVPrefix:
        """A copy of the rows' keys and values in all layers."""
        pool = self._cache.pool
        assert pool is not None
        return pool.view(self._cache.slot, len(self._hidden)).clone()

    def normalised(self) -> Tensor:
        """The input of the matrix after the next norm: (N, C)."""
        size = self._hidden.shape[1]
        return F.rms_norm(self._hidden, (size,), eps=self._norm_eps) / math.sqrt(size)

    def add_attention(self, index: int, weights: Attention) -> None:
        self._operations.add_attention(index, weights, self._hidden, self._attend, self._rotations)

    def add_mlp(self, weights: Mlp) -> None:
        self._operations.add_mlp(weights, self._hidden)


def load_qwen(source: Source, config: ModelConfig, dtype: str) -> QwenModel:
    """Reads the checkpoint; dtype: "float32", "bfloat16", "int8" or "int4".

    Raises:
        CheckpointError: the weights do not fit the configuration, or cannot be read.
    """
    sample_ids: list[int] = []
    if dtype in QUANTIZED_DTYPES:
        num_tokens = min(_NUM_SAMPLE_TOKENS, config.max_position_embeddings)
        sample_ids = random.Random(0).choices(range(config.vocab_size), k=num_tokens)
    return QwenModel(config, open_weights(source), choose_backend(config, dtype), sample_ids)
