"""Vectors of bytes for functions that numba compiles: codes of a block, and their way to rounded values.

LLVM's own vectors are used since it unrolls short loops before it makes vectors of them: such loops took up to six
times as long. It splits vectors that are wider than those of a processor. No fast arithmetic is asked for, so products
and sums are rounded one by one.

Addresses are int64. Outputs are pointers to float32, or to the bits of bfloat16.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import PrimitiveModel
from numba.extending import intrinsic, register_model

_BIT, _BYTE, _SHORT, _WORD, _FLOAT = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


class Lanes(types.Type):
    """numba's type of a vector of int8."""

    def __init__(self, count: int) -> None:
        super().__init__(name=f"Lanes({count})")
        self.count = count


@register_model(Lanes)
class _LanesModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, ir.VectorType(_BYTE, kind.count))


def _splat(builder: Any, value: Any, count: int) -> Any:
    """Return a vector of one value."""
    vector = ir.VectorType(value.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_WORD, count), [0] * count))


def _constant(item: Any, values: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(item, len(values)), list(values))


def _byte(builder: Any, value: Any) -> Any:
    return value if value.type == _BYTE else builder.trunc(value, _BYTE)


def _address(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


# --- bytes of blocks -----------------------------------------------------------------------------------------------


def _codes(count: int) -> Any:
    @intrinsic
    def codes_at(_context: Any, _where: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
            return builder.load(_address(builder, args[0], ir.VectorType(_BYTE, count)), align=1)

        return Lanes(count)(types.int64), generate

    return codes_at


# Return bytes from an address on.
codes_8, codes_16, codes_32 = (_codes(count) for count in (8, 16, 32))


def _loaded(kind: Any, item: Any) -> Any:
    @intrinsic
    def load(_context: Any, _where: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
            return builder.load(_address(builder, args[0], item), align=1)

        return kind(types.int64), generate

    return load


# Return the integer at an address.
byte_at, signed_byte_at = _loaded(types.uint8, _BYTE), _loaded(types.int8, _BYTE)
short_at, word_at = _loaded(types.uint16, _SHORT), _loaded(types.uint32, _WORD)


@intrinsic
def as_float(_context: Any, _word: Any) -> Any:
    """Return the float32 value with the bits of a uint32."""
    return types.float32(types.uint32), lambda _, builder, __, args: builder.bitcast(args[0], _FLOAT)


# --- codes ---------------------------------------------------------------------------------------------------------


@intrinsic
def field(_context: Any, codes: Any, shift: Any, mask: Any) -> Any:
    """Return (codes >> shift) & mask."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        shifts, masks = (_splat(builder, _byte(builder, each), codes.count) for each in args[1:])
        return builder.and_(builder.lshr(args[0], shifts), masks)

    return codes(codes, shift, mask), generate


@intrinsic
def with_high(_context: Any, codes: Any, high: Any, shift: Any) -> Any:
    """Return codes | (high << shift)."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.or_(args[0], builder.shl(args[1], _splat(builder, _byte(builder, args[2]), codes.count)))

    return codes(codes, high, shift), generate


@intrinsic
def less(_context: Any, codes: Any, middle: Any) -> Any:
    """Return codes - middle."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.sub(args[0], _splat(builder, _byte(builder, args[1]), codes.count))

    return codes(codes, middle), generate


def _bits(count: int, item: Any) -> Any:
    @intrinsic
    def bits_of(_context: Any, word: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
            bits = builder.bitcast(builder.trunc(args[0], item) if count < 32 else args[0], ir.VectorType(_BIT, count))
            return builder.zext(bits, ir.VectorType(_BYTE, count))

        return Lanes(count)(types.uint32), generate

    return bits_of


# Return the bits of a uint32 from the lowest on.
bits_16, bits_32 = _bits(16, _SHORT), _bits(32, _WORD)


@intrinsic
def both_halves(_context: Any, codes: Any) -> Any:
    """Return the low halves of eight bytes, and then their high halves."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        low = builder.and_(args[0], _constant(_BYTE, [15] * 8))
        high = builder.lshr(args[0], _constant(_BYTE, [4] * 8))
        return builder.shuffle_vector(low, high, _constant(_WORD, range(16)))

    return Lanes(16)(codes), generate


@intrinsic
def entries(_context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    """Return the 32 bytes of eight words."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        words = ir.Constant(ir.VectorType(_WORD, 8), ir.Undefined)
        for at, word in enumerate(args):
            words = builder.insert_element(words, word, ir.Constant(_WORD, at))
        return builder.bitcast(words, ir.VectorType(_BYTE, 32))

    return Lanes(32)(*[types.int32] * 8), generate


@intrinsic
def negated(_context: Any, codes: Any, signs: Any) -> Any:
    """Return codes, and -codes where the bit of `signs`, uint32, is set."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        minus = builder.bitcast(args[1], ir.VectorType(_BIT, 32))
        return builder.select(minus, builder.neg(args[0]), args[0])

    return codes(codes, types.uint32), generate


def lookup(values: Sequence[int]) -> Any:
    """Return a function that replaces codes below 16 by small integers.

    Args:
        values: 16 integers of 8 bits.
    """

    @intrinsic
    def looked_up(_context: Any, codes: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
            count = codes.count
            found = [_constant(_BYTE, [value & 255] * count) for value in values]
            for bit in range(4):  # processors have instructions for tables, but LLVM has no common name for them
                mask = builder.and_(args[0], _constant(_BYTE, [1 << bit] * count))
                is_set = builder.icmp_unsigned("!=", mask, _constant(_BYTE, [0] * count))
                found = [builder.select(is_set, *reversed(found[at : at + 2])) for at in range(0, len(found), 2)]
            return found[0]

        return codes(codes), generate

    return looked_up


# --- values --------------------------------------------------------------------------------------------------------


def _stored(make: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any, Any], Any]:
    """Return a code generator that stores what `make` returns, a float vector, from element `at` of `out` on."""

    def generate(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, at, codes, *scales = args
        count = codes.type.count
        wide = builder.sitofp(builder.sext(codes, ir.VectorType(_WORD, count)), ir.VectorType(_FLOAT, count))
        values = make(builder, wide, [_splat(builder, scale, count) for scale in scales])
        if signature.args[0].dtype == types.uint16:
            values = _nearest_bfloat16(builder, values)
        target = builder.bitcast(builder.gep(out, [at]), values.type.as_pointer())
        builder.store(values, target, align=1)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return generate


def _nearest_bfloat16(builder: Any, values: Any) -> Any:
    """Return the bits of float32 values, rounded to bfloat16 with ties to even."""
    count = values.type.count
    words = builder.bitcast(values, ir.VectorType(_WORD, count))
    sixteen = _constant(_WORD, [16] * count)
    is_odd = builder.and_(builder.lshr(words, sixteen), _constant(_WORD, [1] * count))
    up = builder.add(builder.add(words, is_odd), _constant(_WORD, [0x7FFF] * count))
    is_nan = builder.fcmp_unordered("uno", values, values)
    rounded = builder.select(is_nan, _constant(_WORD, [0x7FC00000] * count), up)
    return builder.trunc(builder.lshr(rounded, sixteen), ir.VectorType(_SHORT, count))


@intrinsic
def put(_context: Any, out: Any, at: Any, codes: Any, scale: Any) -> Any:
    """Store codes * scale."""
    generate = _stored(lambda builder, wide, scales: builder.fmul(wide, scales[0]))
    return types.none(out, types.int64, codes, types.float32), generate


@intrinsic
def put_plus(_context: Any, out: Any, at: Any, codes: Any, scale: Any, least: Any) -> Any:
    """Store codes * scale + least."""
    generate = _stored(lambda builder, wide, scales: builder.fadd(builder.fmul(wide, scales[0]), scales[1]))
    return types.none(out, types.int64, codes, types.float32, types.float32), generate


@intrinsic
def put_minus(_context: Any, out: Any, at: Any, codes: Any, scale: Any, offset: Any) -> Any:
    """Store codes * scale - offset."""
    generate = _stored(lambda builder, wide, scales: builder.fsub(builder.fmul(wide, scales[0]), scales[1]))
    return types.none(out, types.int64, codes, types.float32, types.float32), generate
