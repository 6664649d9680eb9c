"""Products of a few rows with 64 columns, by the processor's instructions for dot products.

Both instructions take groups of 32 bits: four 8-bit integers (AVX512-VNNI), or two bfloat16 numbers
(AVX512-BF16). They multiply sixteen groups with sixteen others and add the products of each pair of
groups to one of sixteen 32-bit sums. numba does not generate them by itself.

A matrix is stored in tiles of 64 columns: group by group along its rows, and in each group one
column after the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 64
# Maximum rows in one call: their sums, the columns and a group of a row fill the 32 registers.
MAX_ROWS = 6

_VECTORS = TILE // 16
_BYTE, _WORD, _INT = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_WORDS, _FLOATS = ir.VectorType(_WORD, 16), ir.VectorType(ir.FloatType(), 16)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class _Instruction(NamedTuple):
    name: str  # LLVM's, see llvm/include/llvm/IR/IntrinsicsX86.td
    sums: ir.VectorType
    factors: ir.VectorType

    def declared(self, module: ir.Module) -> ir.Function:
        """A function of sums and two factors that returns sums."""
        kind = ir.FunctionType(self.sums, [self.sums, self.factors, self.factors])
        return cgutils.get_or_insert_function(module, kind, self.name)


INT8 = _Instruction("llvm.x86.avx512.vpdpbusd.512", _WORDS, ir.VectorType(_BYTE, 64))
BFLOAT16 = _Instruction("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, ir.VectorType(_BFloat(), 32))


def _dots(instruction: _Instruction, *, is_added: bool) -> Callable[..., None]:
    """A function for numba: (num_rows, rows, row_bytes, tile, num_groups, sums, sum_bytes) -> None.

    All but num_rows and num_groups are addresses and distances in bytes. rows: num_rows rows, 1 to
    MAX_ROWS, of num_groups groups. sums: num_rows rows of 64 sums, overwritten or added to.
    """

    @intrinsic
    def dots(typing_context, num_rows, rows, row_bytes, tile, num_groups, sums, sum_bytes):
        def generate(context, builder, signature, arguments):
            num_rows, *others = arguments
            for number in range(1, MAX_ROWS + 1):
                is_number = builder.icmp_signed("==", num_rows, _INT(number))
                with builder.if_then(is_number):
                    _generate(builder, instruction, number, is_added, *others)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return dots


def _generate(
    b: ir.IRBuilder, instruction: _Instruction, num_rows: int, is_added: bool,
    rows: Any, row_bytes: Any, tile: Any, num_groups: Any, sums: Any, sum_bytes: Any,
) -> None:  # fmt: skip
    multiply = instruction.declared(b.module)
    places = [
        at(b, b.add(sums, times(b, sum_bytes, row)), 64 * j, instruction.sums)
        for row in range(num_rows)
        for j in range(_VECTORS)
    ]
    # LLVM keeps these in registers.
    totals = []
    for place in places:
        begin = b.load(place, align=4) if is_added else instruction.sums(None)
        totals.append(cgutils.alloca_once_value(b, begin))
    with cgutils.for_range(b, num_groups) as loop:
        begin = b.add(tile, times(b, loop.index, 4 * TILE))
        columns = [
            b.load(at(b, begin, 64 * j, instruction.factors), align=4) for j in range(_VECTORS)
        ]
        for row in range(num_rows):
            address = b.add(rows, times(b, row_bytes, row))
            group = splat_word(b, b.add(address, times(b, loop.index, 4)), 0)
            factors = b.bitcast(group, instruction.factors)
            for j in range(_VECTORS):
                total = totals[row * _VECTORS + j]
                b.store(b.call(multiply, [b.load(total), factors, columns[j]]), total)
    for place, total in zip(places, totals, strict=True):
        b.store(b.load(total), place, align=4)


def at(b: ir.IRBuilder, address: Any, offset: int, kind: ir.Type) -> Any:
    """A pointer to a value of type `kind`, `offset` bytes after an address."""
    return b.inttoptr(b.add(address, _INT(offset)), kind.as_pointer())


def times(b: ir.IRBuilder, value: Any, factor: int) -> Any:
    """A 64-bit product."""
    return b.mul(value, _INT(factor))


def splat_word(b: ir.IRBuilder, address: Any, offset: int) -> Any:
    """A vector of sixteen times the 32 bits `offset` bytes after an address."""
    word = b.load(at(b, address, offset, _WORD), align=4)
    lanes = b.insert_element(_WORDS(ir.Undefined), word, _WORD(0))
    return b.shuffle_vector(lanes, _WORDS(ir.Undefined), _WORDS([0] * 16))


# Sums in int32, of rows in uint8 and columns in int8.
int8_dots = _dots(INT8, is_added=False)
# Sums in float32, of bfloat16.
bfloat16_dots = _dots(BFLOAT16, is_added=False)
add_bfloat16_dots = _dots(BFLOAT16, is_added=True)
