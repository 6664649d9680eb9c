"""What a layer computes, by PyTorch: for any type of weights, on any processor."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.core.engine.model.attention.step import StepAttention
from server.core.engine.model.config import ModelConfig
from server.core.engine.model.layers import Attention, Mlp
from server.core.engine.model.linear import Factories, Linear, LinearFactory


class Operations(Protocol):
    """Computes the parts of a layer with the matrices that it makes, and changes `hidden`."""

    factories: Factories

    def add_attention(
        self, index: int, weights: Attention, hidden: Tensor, attend: StepAttention,
        rotations: Tensor,
    ) -> None:  # fmt: skip
        """Adds the attention of layer `index` to hidden, (N, C).

        rotations: unit complex numbers that turn each token's pairs, (N, D / 2).
        """

    def add_mlp(self, weights: Mlp, hidden: Tensor) -> None:
        """Adds the MLP's result to hidden, (N, C)."""

    def logits(self, head: Linear, norm: Tensor, hidden: Tensor) -> Tensor:
        """(N, C) -> (N, V), in float32. norm: (C,), the last norm's weights times sqrt(C)."""


class TorchOperations:
    """The operations, each a few calls of PyTorch."""

    def __init__(self, config: ModelConfig, make: LinearFactory) -> None:
        self.factories = Factories(make, make, make)
        self._config = config
        self._epsilons = {
            size: torch.tensor(math.sqrt(size * config.rms_norm_eps))
            for size in (config.hidden_size, config.head_dim)
        }

    def add_attention(
        self, index: int, weights: Attention, hidden: Tensor, attend: StepAttention,
        rotations: Tensor,
    ) -> None:  # fmt: skip
        c = self._config
        heads = weights.qkv(self._normalised(hidden)).view(len(hidden), -1, c.head_dim)
        if weights.head_norms is not None:
            rotated = heads[:, : len(weights.head_norms)]
            rotated.copy_(self._normalised(rotated) * weights.head_norms)
        # RoPE turns pairs of numbers, which is a product of complex ones.
        pairs = torch.view_as_complex(heads.view(*heads.shape[:2], -1, 2))
        pairs[:, : c.num_heads + c.num_kv_heads].mul_(rotations[:, None])
        weights.out.add_to(hidden, attend(index, heads))

    def add_mlp(self, weights: Mlp, hidden: Tensor) -> None:
        gate, up = weights.gate_up(self._normalised(hidden)).chunk(2, dim=-1)
        weights.down.add_to(hidden, F.silu(gate, inplace=True).mul_(up))

    def logits(self, head: Linear, norm: Tensor, hidden: Tensor) -> Tensor:
        return head(self._normalised(hidden) * norm)

    def _normalised(self, x: Tensor) -> Tensor:
        """x over the norm of its last dimension; sqrt(C) times this is RMSNorm's x / rms.

        The square root is in the weights. hypot adds epsilon under the root, in one kernel.
        """
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / norms.hypot(self._epsilons[x.shape[-1]])
