"""The operations of a layer in PyTorch: for any type of weights, on any processor."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.core.engine.model.attention.step import StepAttention
from server.core.engine.model.config import ModelConfig
from server.core.engine.model.layers import Attention, Mlp
from server.core.engine.model.linear import Factories, Linear, LinearFactory
from server.core.engine.model.lora import LoraRows


class Operations(Protocol):
    """Computes the parts of a layer in place, with matrices from its factories."""

    factories: Factories

    def add_attention(
        self, index: int, weights: Attention, hidden: Tensor, attend: StepAttention,
        rotations: Tensor, loras: Sequence[LoraRows] = (),
    ) -> None:  # fmt: skip
        """Adds the attention of layer `index` to hidden, (N, C).

        rotations: RoPE's unit complex numbers for each token, (N, D / 2).
        loras: of this layer, each for rows of its own; other rows do not change.
        """

    def add_mlp(self, weights: Mlp, hidden: Tensor, loras: Sequence[LoraRows] = ()) -> None:
        """Adds the MLP's result to hidden, (N, C). loras: see `add_attention`."""

    def logits(self, head: Linear, norm: Tensor, hidden: Tensor) -> Tensor:
        """(N, C) -> (N, V), in float32. norm: (C,), the last norm's weights times sqrt(C)."""


class TorchOperations:
    """`Operations` by a few calls of PyTorch each."""

    def __init__(self, config: ModelConfig, make: LinearFactory) -> None:
        self.factories = Factories(make, make, make)
        self._config = config
        self._epsilons = {
            size: torch.tensor(math.sqrt(size * config.rms_norm_eps))
            for size in (config.hidden_size, config.head_dim)
        }

    def add_attention(
        self, index: int, weights: Attention, hidden: Tensor, attend: StepAttention,
        rotations: Tensor, loras: Sequence[LoraRows] = (),
    ) -> None:  # fmt: skip
        c = self._config
        x = self._normalised(hidden)
        qkv = weights.qkv(x)
        for rows, lora in loras:
            lora.qkv.add_to_rows(qkv, rows, x[rows])
        heads = qkv.view(len(hidden), -1, c.head_dim)
        if weights.head_norms is not None:
            rotated = heads[:, : len(weights.head_norms)]
            rotated.copy_(self._normalised(rotated) * weights.head_norms)
        # RoPE rotates pairs of numbers, which is a product of complex numbers.
        pairs = torch.view_as_complex(heads.view(*heads.shape[:2], -1, 2))
        pairs[:, : c.num_heads + c.num_kv_heads].mul_(rotations[:, None])
        mixed = attend(index, heads)
        weights.out.add_to(hidden, mixed)
        for rows, lora in loras:
            lora.out.add_to_rows(hidden, rows, mixed[rows])

    def add_mlp(self, weights: Mlp, hidden: Tensor, loras: Sequence[LoraRows] = ()) -> None:
        x = self._normalised(hidden)
        gate_up = weights.gate_up(x)
        for rows, lora in loras:
            lora.gate_up.add_to_rows(gate_up, rows, x[rows])
        gate, up = gate_up.chunk(2, dim=-1)
        inner = F.silu(gate, inplace=True).mul_(up)
        weights.down.add_to(hidden, inner)
        for rows, lora in loras:
            lora.down.add_to_rows(hidden, rows, inner[rows])

    def logits(self, head: Linear, norm: Tensor, hidden: Tensor) -> Tensor:
        return head(self._normalised(hidden) * norm)

    def _normalised(self, x: Tensor) -> Tensor:
        return normalised(x, self._epsilons[x.shape[-1]])


def normalised(x: Tensor, epsilon: Tensor) -> Tensor:
    """x over the norm of its last dimension; sqrt(C) times this is RMSNorm's x / rms.

    sqrt(C) is folded into the weights. hypot adds epsilon under the root, in one kernel.
    epsilon: the root of C times RMSNorm's epsilon.
    """
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norms.hypot(epsilon)
