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


@triton.jit
def encode_fp8(x, MANTISSA: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 to codes: nearest, ties to even; beyond the largest finite value that value, also from infinity; NaN stays."""
    if NATIVE and MANTISSA == 3:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif NATIVE:
        return x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        # Per format: bits that go, fp32 exponent of the smallest normal value, exponent bias to take off (in the code's bits),
        # the fp32 whose unit is the smallest subnormal code, the code of the largest finite value.
        DROP: tl.constexpr = 20 if MANTISSA == 3 else 21
        NORMAL: tl.constexpr = 121 if MANTISSA == 3 else 113
        BIAS: tl.constexpr = (120 << 3) if MANTISSA == 3 else (112 << 2)
        UNIT: tl.constexpr = 16384.0 if MANTISSA == 3 else 128.0
        LARGEST: tl.constexpr = 0x7E if MANTISSA == 3 else 0x7B
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
