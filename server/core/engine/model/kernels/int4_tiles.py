"""Tiles of a matrix in 4 bits: their layout in memory, and the instructions that read them.

A weight is scale * integer + base, where the integer has 4 bits, and scale and base are integers,
the same for a group of 32 weights of a column. A weight fits 8 bits: a tile can be expanded to
8-bit integers, and a sum of products is the same integer either way.

A tile has 64 columns. It is stored group by group: 4 times 256 bytes of integers, then 64 scales
and 64 bases. A byte holds in its lower half an integer of the first 16 weights of the group, and in
its upper half one of the last 16; bytes are in the order of `dots`.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from server.core.engine.model.kernels.dots import INT8, MAX_ROWS, TILE, at, splat_word, times

GROUP = 32
GROUP_BYTES = GROUP * TILE // 2 + 2 * TILE
_VECTORS = TILE // 16
_BYTE, _WORD, _INT = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_BYTES, _WORDS = ir.VectorType(_BYTE, 64), ir.VectorType(_WORD, 16)
_FEW_BYTES = ir.VectorType(_BYTE, 16)
_WORDS_OF_GROUP = GROUP // 4  # of 32 bits, each four integers of a row
_BASES = GROUP * TILE // 2 + TILE  # their offset in a group, in bytes

_intrinsic: Any = intrinsic  # numba's types count its first argument


@_intrinsic
def expand(typing_context, tile, num_groups, expanded):
    """(tile, num_groups, expanded) -> None: expands a tile to 8 bits, in the layout of `dots`.

    tile, expanded: addresses.
    """

    def generate(context, b, signature, arguments):
        tile, num_groups, expanded = arguments
        with cgutils.for_range(b, num_groups) as loop:
            group = b.add(tile, times(b, loop.index, GROUP_BYTES))
            target = b.add(expanded, times(b, loop.index, GROUP * TILE))
            for j in range(_VECTORS):
                scales, bases = (
                    b.bitcast(b.mul(x, _WORDS([0x01010101] * 16)), _BYTES)
                    for x in (_scales(b, group, j), b.and_(_bases(b, group, j), _mask(0xFF)))
                )
                for i in range(_WORDS_OF_GROUP // 2):
                    for half, integers in enumerate(_halves(b, group, i, j)):
                        values = b.add(b.mul(b.bitcast(integers, _BYTES), scales), bases)
                        row = i + half * _WORDS_OF_GROUP // 2
                        b.store(values, at(b, target, 4 * TILE * row + 64 * j, _BYTES), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@_intrinsic
def direct_dots(
    typing_context, num_rows, rows, row_bytes, group_sums, sum_bytes, tile, num_groups, sums
):
    """Sums in int32 of 1 to MAX_ROWS rows in uint8, (num_rows, 64), without expanding the tile.

    group_sums: of each row's groups, int32. All but num_rows and num_groups are addresses and
    distances in bytes.
    """

    def generate(context, builder, signature, arguments):
        num_rows, *others = arguments
        for number in range(1, MAX_ROWS + 1):
            with builder.if_then(builder.icmp_signed("==", num_rows, _INT(number))):
                _generate_dots(builder, number, *others)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), generate


def _generate_dots(
    b: ir.IRBuilder, num_rows: int, rows: Any, row_bytes: Any, group_sums: Any, sum_bytes: Any,
    tile: Any, num_groups: Any, sums: Any,
) -> None:  # fmt: skip
    multiply = INT8.declared(b.module)
    totals = [cgutils.alloca_once_value(b, _WORDS(None)) for _ in range(num_rows * _VECTORS)]
    with cgutils.for_range(b, num_groups) as loop:
        group = b.add(tile, times(b, loop.index, GROUP_BYTES))
        begin = times(b, loop.index, GROUP)
        products = [_WORDS(None)] * len(totals)
        for i in range(_WORDS_OF_GROUP // 2):
            for j in range(_VECTORS):
                for half, integers in enumerate(_halves(b, group, i, j)):
                    columns = b.bitcast(integers, INT8.factors)
                    place = 4 * (i + half * _WORDS_OF_GROUP // 2)
                    for row in range(num_rows):
                        address = b.add(b.add(rows, times(b, row_bytes, row)), begin)
                        factors = b.bitcast(splat_word(b, address, place), INT8.factors)
                        k = row * _VECTORS + j
                        products[k] = b.call(multiply, [products[k], factors, columns])
        for j in range(_VECTORS):
            scales, bases = _scales(b, group, j), _bases(b, group, j)
            for row in range(num_rows):
                address = b.add(group_sums, times(b, sum_bytes, row))
                group_sum = splat_word(b, b.add(address, times(b, loop.index, 4)), 0)
                k = row * _VECTORS + j
                value = b.add(b.mul(products[k], scales), b.mul(group_sum, bases))
                b.store(b.add(b.load(totals[k]), value), totals[k])
    for k, total in enumerate(totals):
        b.store(b.load(total), at(b, sums, 64 * k, _WORDS), align=4)


def _halves(b: ir.IRBuilder, group: Any, i: int, j: int) -> tuple[Any, Any]:
    """The lower and the upper halves of 64 bytes, each as 64 bytes."""
    both = b.load(at(b, group, 4 * TILE * i + 64 * j, _WORDS), align=4)
    mask = _mask(0x0F0F0F0F)
    return b.and_(both, mask), b.and_(b.lshr(both, _mask(4)), mask)


def _scales(b: ir.IRBuilder, group: Any, j: int) -> Any:
    return b.zext(b.load(at(b, group, _BASES - TILE + 16 * j, _FEW_BYTES), align=4), _WORDS)


def _bases(b: ir.IRBuilder, group: Any, j: int) -> Any:
    return b.sext(b.load(at(b, group, _BASES + 16 * j, _FEW_BYTES), align=4), _WORDS)


def _mask(word: int) -> Any:
    return _WORDS([word] * 16)
