"""Special functions for kernels, where Triton's own are not exact enough or, for results in half precision, slower than memory.

Knows no op. A GPU computes in registers about 28 instructions in the time in which HBM moves 4 bytes (H200: 4.2 TB/s, 132 SMs of
128 lanes at 1.76 GHz), of which a kernel that only loads and stores takes ten.
"""

import triton
import triton.language as tl

from torch_triton_ops.launch import INTERPRET

INTERPRETED = tl.constexpr(INTERPRET)


@triton.jit
def exp_fp32(x):
    """e^x in fp32, to about one unit in the last place; tl.exp, 2^(x log2(e)) with a rounded product, loses |x| units."""
    # e^x = 2^k e^r with r = x - k ln 2 exact: ln 2 in two parts, of which k times the first has no rounding
    bounded = tl.minimum(tl.maximum(x, -150.0), 130.0)
    k = tl.floor(bounded * 1.4426950408889634 + 0.5)
    r = (bounded - k * 0.693359375) + k * 0.00021219444005469057
    # 2^k in two factors: k = 128 and k = -127 are not normal numbers, their halves are
    half = tl.floor(k * 0.5)
    out = tl.exp2(r * 1.4426950408889634) * tl.exp2(half) * tl.exp2(k - half)
    return tl.where(x != x, x, out)


@triton.jit
def exp2_approx(x):
    """2^x in fp32, to two units in the last place; a subnormal result is 0. One instruction, where tl.exp2 takes four."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal_approx(x):
    """1 / x in fp32, to one unit in the last place; infinity of a subnormal number. One instruction; 1.0 / x takes eight."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def tanh_half(x):
    """tanh of fp32 values for a result in half precision: to 2^-17 of itself."""
    far = 1.0 - 2.0 * reciprocal_approx(
        1.0 + exp2_approx(x * 2.8853900817779268)
    )  # 2 / (1 + e^2x) is right at +-inf too
    s = x * x  # near 0 the difference would cancel: x + x^3 p(x^2), least maximum error on [0, 0.3]
    near = x + x * s * (0.126827327 * s - 0.333154215)
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def normal_cdf_half(x):
    """(Phi(x), exp(-x^2 / 2)) of fp32 values for results in half precision: Phi to 2^-16 of itself from -7 on.

    Phi(-a) = exp(-a^2 / 2) p(1 / (1 + 0.36 a)), the form of Abramowitz and Stegun 7.1.26, p with the least maximum relative
    error on [0, 7]; so the tail does not cancel, as 1 + erf does. Beyond, where fp16 has long become 0, it is 1e-4 at -14.
    """
    a = tl.abs(x)
    r = reciprocal_approx(1.0 + 0.36 * a)
    p = -0.0957063071 * r + 0.245475057
    p = p * r + 0.046010853
    p = p * r + 0.162307356
    p = p * r + 0.141914412
    e = exp2_approx(a * -0.7213475204444817 * a)
    tail = e * (p * r)
    return tl.where(x < 0, tail, 1.0 - tail), e
