"""LoRA beside the base model's matrices, which sequences with and without it share.

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

# Rows of a step, rising; a slice where they are neighbours.
Rows = Tensor | slice


class _Part(NamedTuple):
    """One B: which rows of A it follows, and which columns of the product it changes."""

    ranks: slice
    columns: slice
    b: Tensor  # (columns, ranks)


@dataclass(frozen=True)
class LowRank:
    """What is added to a product with one matrix, which may be several in one.

    a: (R, C_in), of all parts. It takes the input of the matrix in float32, not quantized.
    """

    a: Tensor
    parts: tuple[_Part, ...] = ()

    def add_to_rows(self, y: Tensor, rows: Rows, x: Tensor) -> None:
        """Adds its product with x, (n, C_in), to n rows of y, (N, C_out)."""
        if isinstance(rows, slice):
            self.add_to(y[rows], x)
        elif self.parts:
            # Once there and back: index_add_ would take a call for each row and part.
            chosen = y[rows]
            self.add_to(chosen, x)
            y[rows] = chosen

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Adds its product with x, (n, C_in), to y, (n, C_out)."""
        if not self.parts:
            return
        # A row's sums then do not depend on how many others there are.
        low = F.linear(padded(x, ROWS), self.a)
        for ranks, columns, b in self.parts:
            y[:, columns] += F.linear(low[:, ranks], b)[: len(x)]


class LoraLayer(NamedTuple):
    """What is added to the products of a layer."""

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
    """A LoRA, layer by layer, with what is folded into the model's matrices folded in, too."""

    layers: tuple[LoraLayer, ...]


class LoraRows(NamedTuple):
    """Rows of a step, and what a LoRA adds to them in a layer."""

    rows: Rows
    layer: LoraLayer


def fold_lora(
    weights: LoraWeights, c: ModelConfig, layers: Sequence[tuple[Attention, Mlp]]
) -> Lora:
    """layers: the matrices beside which the LoRA is computed."""
    query_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    of_qkv = {"q_proj": query_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    of_gate_up = dict.fromkeys(("gate_proj", "up_proj"), c.intermediate_size)

    def fold(i: int, attention: Attention, mlp: Mlp) -> LoraLayer:
        of_layer = {
            name: (a, folded_heads(c, name, b) if name in of_qkv else b)
            for (layer, name), (a, b) in weights.matrices.items()
            if layer == i
        }
        return LoraLayer(
            qkv=_side_by_side(of_layer, of_qkv, attention.norm),
            out=_side_by_side(of_layer, {"o_proj": c.hidden_size}),
            gate_up=_side_by_side(of_layer, of_gate_up, mlp.norm),
            down=_side_by_side(of_layer, {"down_proj": c.hidden_size}),
        )

    return Lora(tuple(fold(i, *layer) for i, layer in enumerate(layers)))


def _side_by_side(
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
