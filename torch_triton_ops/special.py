"""Special functions for kernels, where Triton's own are not exact enough. Knows no op."""

import triton
import triton.language as tl


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
