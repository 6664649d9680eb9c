"""The operations of a layer in 8 bits, with few passes over the rows between the products."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from server.core.engine.model.attention.step import StepAttention
from server.core.engine.model.config import ModelConfig
from server.core.engine.model.kernels import rows
from server.core.engine.model.kernels.compiling import match_threads
from server.core.engine.model.kernels.matrix import (
    Floats,
    KernelMatrix,
    Quantized,
    empty_rows,
    int8_packer,
    measure_num_many,
    pack_int4,
    quantize,
)
from server.core.engine.model.layers import Attention, Mlp
from server.core.engine.model.linear import Factories, Linear
from server.core.engine.model.lora import LoraRows, Rows
from server.core.engine.model.operations import normalised


class KernelOperations:
    """`Operations` on matrices of 8 or 4 bits, in compiled kernels."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        """dtype: "int8" or "int4"."""
        int8 = partial(KernelMatrix, pack=int8_packer(measure_num_many()))
        int4 = partial(KernelMatrix, pack=pack_int4)
        # int8 also where the MLP is int4: attention is small, and rounding the head costs the most.
        self.factories = Factories(attention=int8, mlp=int8 if dtype == "int8" else int4, head=int8)
        self._config = config
        self._epsilon = np.float32(config.hidden_size * config.rms_norm_eps)
        self._head_epsilon = np.float32(config.head_dim * config.rms_norm_eps)
        self._norm_epsilon = torch.tensor(math.sqrt(config.hidden_size * config.rms_norm_eps))
        self._ones = np.ones(config.hidden_size, np.float32)
        self._no_norms = np.empty((config.num_heads + config.num_kv_heads, 0), np.float32)

    def add_attention(
        self, index: int, weights: Attention, hidden: Tensor, attend: StepAttention,
        rotations: Tensor, loras: Sequence[LoraRows] = (),
    ) -> None:  # fmt: skip
        if index == 0:
            match_threads()
        qkv, out = _kernel_matrix(weights.qkv), _kernel_matrix(weights.out)
        norms = self._no_norms if weights.head_norms is None else weights.head_norms.numpy()
        heads = qkv.product(self._normalised(hidden, qkv.factors))
        for lora_rows, lora in loras:
            x = self._normalised_floats(hidden, lora_rows)
            lora.qkv.add_to_rows(torch.from_numpy(heads), lora_rows, x)
        heads = heads.reshape(len(hidden), -1, self._config.head_dim)
        rows.rotate(
            heads, torch.view_as_real(rotations).flatten(1).numpy(), norms, self._head_epsilon
        )
        mixed = attend(index, torch.from_numpy(heads))
        out.add_product(hidden.numpy(), quantize(mixed.numpy()))
        for lora_rows, lora in loras:
            lora.out.add_to_rows(hidden, lora_rows, mixed[lora_rows])

    def add_mlp(self, weights: Mlp, hidden: Tensor, loras: Sequence[LoraRows] = ()) -> None:
        gate_up, down = _kernel_matrix(weights.gate_up), _kernel_matrix(weights.down)
        x = self._normalised(hidden, gate_up.factors)
        sums = gate_up.sums(x)
        gated = gate_up.gated(sums, x)
        loras, inner = [each for each in loras if each.layer.changes_mlp], []
        for lora_rows, lora in loras:
            # Again in float32, as the kernel cannot add to gate and up.
            indices = lora_rows if isinstance(lora_rows, slice) else lora_rows.numpy()
            values = torch.from_numpy(gate_up.values(sums[indices].copy(), x.of(indices)))
            lora.gate_up.add_to(values, self._normalised_floats(hidden, lora_rows))
            gate, up = values.chunk(2, dim=-1)
            inner.append(F.silu(gate) * up)
            gated.replace(indices, quantize(inner[-1].numpy()))
        down.add_product(hidden.numpy(), gated)
        for (lora_rows, lora), floats in zip(loras, inner, strict=True):
            lora.down.add_to_rows(hidden, lora_rows, floats)

    def logits(self, head: Linear, norm: Tensor, hidden: Tensor) -> Tensor:
        return torch.from_numpy(
            _kernel_matrix(head).product(self._normalised(hidden, norm.numpy()))
        )

    def _normalised_floats(self, hidden: Tensor, lora_rows: Rows) -> Tensor:
        """The input of a matrix after a norm, in these rows, not quantized."""
        return normalised(hidden[lora_rows], self._norm_epsilon)

    def _normalised(self, hidden: Tensor, factors: Floats | None) -> Quantized:
        quantized = empty_rows(*hidden.shape)
        factors = self._ones if factors is None else factors
        rows.normalise(hidden.numpy(), factors, self._epsilon, *quantized)
        return quantized


def _kernel_matrix(matrix: Linear) -> KernelMatrix:
    assert isinstance(matrix, KernelMatrix)
    return matrix
