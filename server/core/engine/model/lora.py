"""Computes LoRA beside the base model's matrices, which all sequences share.

Source of the formula: LoRA (arXiv 2106.09685): x (W + B A)^T = x W^T + (x A^T) B^T.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from server.core.engine.model.adapter_weights import LoraWeights
from server.core.engine.model.config import ModelConfig
from server.core.engine.model.layers import Attention, Mlp, folded_heads
from server.core.engine.model.linear import ROWS, padded

# Rows of a step, ascending; a slice if they are consecutive.
Rows = Tensor | slice


class _Part(NamedTuple):
    """The B of one module in the product."""

    ranks: slice  # rows of A
    columns: slice  # of the product that it changes
    b: Tensor  # (columns, ranks)


@dataclass(frozen=True)
class LowRank:
    """The addition to a product with one matrix, which may be several in one.

    a: (R, C_in), of all parts. It takes the input of the matrix in float32, not quantized.
    """

    a: Tensor
    parts: tuple[_Part, ...] = ()

    def add_to_rows(self, y: Tensor, rows: Rows, x: Tensor) -> None:
        """Adds its product with x, (n, C_in), to n rows of y, (N, C_out)."""
        if isinstance(rows, slice):
            self.add_to(y[rows], x)
        elif self.parts:
            # Copied and written back once: index_add_ would take a call for each row and part.
            selected = y[rows]
            self.add_to(selected, x)
            y[rows] = selected

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Adds its product with x, (n, C_in), to y, (n, C_out)."""
        if not self.parts:
            return
        # Padded, so that a row's sums do not depend on the number of rows.
        low = F.linear(padded(x, ROWS), self.a)
        for ranks, columns, b in self.parts:
            y[:, columns] += F.linear(low[:, ranks], b)[: len(x)]


class LoraLayer(NamedTuple):
    """The additions to the products of a layer."""

    qkv: LowRank
    out: LowRank
    gate_up: LowRank
    down: LowRank

    @property
    def changes_mlp(self) -> bool:
        """Whether anything is added in the MLP."""
        return bool(self.gate_up.parts or self.down.parts)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA, layer by layer, folded like the model's matrices."""

    layers: tuple[LoraLayer, ...]


class LoraRows(NamedTuple):
    """Rows of a step, and the layer of a LoRA that is added to them."""

    rows: Rows
    layer: LoraLayer


def fold_lora(
    weights: LoraWeights, c: ModelConfig, layers: Sequence[tuple[Attention, Mlp]]
) -> Lora:
    """Folds the model's factors into a LoRA. layers: the model's matrices."""
    query_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    qkv_columns = {"q_proj": query_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    gate_up_columns = dict.fromkeys(("gate_proj", "up_proj"), c.intermediate_size)

    def fold(i: int, attention: Attention, mlp: Mlp) -> LoraLayer:
        matrices = {
            name: (a, folded_heads(c, name, b) if name in qkv_columns else b)
            for (layer, name), (a, b) in weights.matrices.items()
            if layer == i
        }
        return LoraLayer(
            qkv=_concatenated(matrices, qkv_columns, attention.norm),
            out=_concatenated(matrices, {"o_proj": c.hidden_size}),
            gate_up=_concatenated(matrices, gate_up_columns, mlp.norm),
            down=_concatenated(matrices, {"down_proj": c.hidden_size}),
        )

    return Lora(tuple(fold(i, *layer) for i, layer in enumerate(layers)))


def _concatenated(
    matrices: Mapping[str, tuple[Tensor, Tensor]], num_columns: Mapping[str, int],
    norm: Tensor | None = None,
) -> LowRank:  # fmt: skip
    """num_columns: of each module in the product, in order. norm: (C_in,), folded into all A."""
    all_a, parts = list[Tensor](), list[_Part]()
    rank = column = 0
    for name, num in num_columns.items():
        if name in matrices:
            a, b = matrices[name]
            columns = slice(column, column + num)
            parts.append(_Part(slice(rank, rank + len(a)), columns, b.contiguous()))
            all_a.append(a if norm is None else a * norm)
            rank += len(a)
        column += num
    return LowRank(torch.cat(all_a) if all_a else torch.empty(0, 0), tuple(parts))
