"""float8 values in kernels, as the uint8 codes that tensors hold: sm_80 has no pointer to float8_e4m3fn. Knows no op.

MANTISSA: the format's mantissa bits, 3 for float8_e4m3fn, 2 for float8_e5m2. NATIVE: the GPU converts by instruction (sm_89 on).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MANTISSA = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


@triton.jit
def decode_fp8(bits, dtype: tl.constexpr, MANTISSA: tl.constexpr, NATIVE: tl.constexpr):
    """Codes to `dtype`, exactly: float16 and bfloat16 hold every float8."""
    if NATIVE and MANTISSA == 3:
        return bits.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif NATIVE:
        return bits.to(tl.float8e5, bitcast=True).to(dtype)
    elif MANTISSA == 2:  # the upper half of an fp16
        return (bits.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(dtype)
    else:
        # In an fp16's fields the exponent's bias is 15 where 7 was meant: 2**8 too small, subnormal values too.
        half = ((bits & 0x80).to(tl.uint16) << 8) | ((bits & 0x7F).to(tl.uint16) << 7)
        x = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), x).to(dtype)


# Two int16 in a register, each of two codes: the lower codes as a pair of fp16, then the upper ones. For Triton the codes of a
# tile of 8-bit operands would have to be fetched one by one: shared memory is transposed by units of 16 bits.
_E4M3_PAIRS = tl.constexpr("""
{
    .reg .b16 first, second;
    .reg .b32 a, b;
    mov.b32 {first, second}, $2;
    cvt.rn.f16x2.e4m3x2 a, first;
    cvt.rn.f16x2.e4m3x2 b, second;
    prmt.b32 $0, a, b, 0x5410;
    prmt.b32 $1, a, b, 0x7632;
}
""")
_E5M2_PAIRS = tl.constexpr("""
    prmt.b32 $0, $2, 0, 0x2404;
    and.b32 $1, $2, 0xff00ff00;
""")


@triton.jit
def decode_fp8_pairs(codes, dtype: tl.constexpr, MANTISSA: tl.constexpr, NATIVE: tl.constexpr):
    """int16, each of two codes, to `dtype`: those of the lower bytes, those of the upper ones."""
    if NATIVE and dtype == tl.float16:
        ASM: tl.constexpr = _E4M3_PAIRS if MANTISSA == 3 else _E5M2_PAIRS
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        lower, upper = (codes & 0xFF).to(tl.uint8), ((codes >> 8) & 0xFF).to(tl.uint8)
        return decode_fp8(lower, dtype, MANTISSA, NATIVE), decode_fp8(upper, dtype, MANTISSA, NATIVE)


@triton.jit
def encode_fp8(x, MANTISSA: tl.constexpr, NATIVE: tl.constexpr, SATURATE: tl.constexpr = True):
    """fp32 to codes: nearest, ties to even; beyond the largest finite value that value, also from infinity; NaN stays.

    SATURATE=False: float8_e5m2 becomes infinity there; float8_e4m3fn has none.
    """
    if NATIVE and MANTISSA == 3:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif NATIVE:
        # The instruction saturates, at 57344; infinity, the next code, begins at the middle between that and 65536.
        bits = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
        return bits if SATURATE else bits + (tl.abs(x) >= 61440.0).to(tl.uint8)
    else:
        # Per format: bits that go, fp32 exponent of the smallest normal value, exponent bias to take off (in the code's bits),
        # the fp32 whose unit is the smallest subnormal code, the code of the largest result.
        DROP: tl.constexpr = 20 if MANTISSA == 3 else 21
        NORMAL: tl.constexpr = 121 if MANTISSA == 3 else 113
        BIAS: tl.constexpr = (120 << 3) if MANTISSA == 3 else (112 << 2)
        UNIT: tl.constexpr = 16384.0 if MANTISSA == 3 else 128.0
        LARGEST: tl.constexpr = 0x7E if MANTISSA == 3 else (0x7B if SATURATE else 0x7C)
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # half a unit less one, and one more if the last bit that stays is odd: a tie goes to the even neighbour
        normal = ((size + ((1 << (DROP - 1)) - 1) + ((size >> DROP) & 1)) >> DROP) - BIAS
        # an addition in fp32 rounds a small value to the unit of subnormals
        rounded = size.to(tl.float32, bitcast=True) + UNIT
        small = rounded.to(tl.int32, bitcast=True) & 0xFF
        code = tl.minimum(tl.where(size < (NORMAL << 23), small, normal), LARGEST)
        code = tl.where(size > 0x7F800000, 0x7F, code)  # NaN
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
