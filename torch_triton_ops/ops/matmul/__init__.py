"""Matrix multiplication: `matmul`, `bmm`, and `linear` with bias and activation fused into the epilogue.

matmul: out[..., m, n] = sum_k a[..., m, k] * b[..., k, n]
bmm:    the same for exactly three dims, without broadcasting
linear: y[..., n] = activation(sum_k x[..., k] * weight[n, k] + bias[n])

| tensor | shape | dtype |
|---|---|---|
| a | (..., M, K); bmm: (B, M, K) | float32, float16, bfloat16 |
| b | (..., K, N), its batch dims broadcast against a's; bmm: (B, K, N) | that of a |
| x | (..., K), one or more dims | float32, float16, bfloat16 |
| weight | (N, K) | that of x |
| bias | (N,) or None | that of x |
| activation | "none", "relu", "gelu" (erf), "gelu_tanh", "silu" | |

Accumulation, bias and activation are in float32; the result is rounded once, to the input's dtype. float32 inputs
follow `torch.set_float32_matmul_precision` and `torch.backends.cuda.matmul`: TF32 only where torch would use it.
Results do not depend on the order in which programs run: split-K adds its partial products in a second kernel.

Three kernels do the work. A product with one row or column streams the matrix through CUDA cores. On compute capability
9.0 and up, operands whose rows are 16-byte aligned are fetched by TMA; anything else (Ampere, odd strides, batches that are
not evenly spaced, the interpreter) takes the portable kernel, which reads any strides.

Raises ValueError for a 1-D operand (bmm: any number of dims but three), sizes that do not match, an unknown activation;
TypeError for dtypes that differ.

Sources: L2-friendly tile order, https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html;
GELU, https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import cdiv, launch, sm_count

from .gemm import _matmul_gemm, _matmul_reduce
from .kernels import _linear_bwd_kernel

LINEAR_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


# --------------------------------------------------------------------------------------------------------------------
# References
# --------------------------------------------------------------------------------------------------------------------


def _matmul_upcast(x: torch.Tensor) -> torch.Tensor:
    """Half precision to float32, for arithmetic; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def matmul_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(_matmul_upcast(a), _matmul_upcast(b)).to(a.dtype).contiguous()


def _linear_activate_reference(z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "silu":
        return F.silu(z)
    return z


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    return linear_fwd_reference(x, weight, bias, activation)[0]


def linear_fwd_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    z = F.linear(_matmul_upcast(x), _matmul_upcast(weight), None if bias is None else _matmul_upcast(bias))
    # As activation(F.linear(...)) in torch, the pre-activation is rounded to x's dtype; the kernel's is not.
    z = z.to(x.dtype).contiguous()
    if activation == "none":
        return z, x.new_empty(0)
    y = _linear_activate_reference(_matmul_upcast(z), activation).to(x.dtype)
    return y, z if _linear_keeps_z(activation) else x.new_empty(0)


def _linear_activate_grad_reference(dy: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, z)
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear_bwd_reference(
    dy: torch.Tensor, z: torch.Tensor | None, activation: str, needs_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dz = _matmul_upcast(dy)
    if activation != "none":
        dz = _linear_activate_grad_reference(dz, _matmul_upcast(z), activation)
    rows = dz.reshape(math.prod(dz.shape[:-1]), dz.shape[-1])
    return (
        dz.to(dy.dtype).contiguous() if activation != "none" else dy.new_empty(0),
        rows.sum(0).to(dy.dtype) if needs_dbias else dy.new_empty(0),
    )


def bmm_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return matmul_reference(a, b)


# --------------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------------


def _matmul_batches(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands as (B1, B2, rows, columns), batch dims broadcast: views unless that takes more than two strides."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
    dims: list[tuple[int, int, int]] = []  # (size, stride in a, stride in b), neighbours merged where both allow it
    for dim in zip(batch, a.stride(), b.stride()):  # noqa: B905 (the strides are longer)
        size, sa, sb = dim
        if size == 1:
            continue
        if dims and dims[-1][1:] == (size * sa, size * sb):
            dims[-1] = (dims[-1][0] * size, sa, sb)
        else:
            dims.append(dim)
    if len(dims) > 2:
        count = math.prod(batch)
        return a.reshape(1, count, *a.shape[-2:]), b.reshape(1, count, *b.shape[-2:])
    dims = [(1, 0, 0)] * (2 - len(dims)) + dims
    sizes, strides_a, strides_b = zip(*dims, strict=True)
    return (
        a.as_strided((*sizes, *a.shape[-2:]), (*strides_a, *a.stride()[-2:])),
        b.as_strided((*sizes, *b.shape[-2:]), (*strides_b, *b.stride()[-2:])),
    )


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = matmul_fake(a, b)
    if out.numel() == 0:
        return out
    if b.dim() == 2 or math.prod(b.shape[:-2]) == 1:
        # One matrix b: a's leading dims are the rows of one product (a view, or a copy, which costs less than it).
        _matmul_gemm(_matmul_rows(a), b.t() if b.dim() == 2 else b.reshape(b.shape[-2:]).t(), out)
    else:
        a, b = _matmul_batches(a, b)
        _matmul_gemm(a, b.mT, out)
    return out


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = bmm_fake(a, b)
    if out.numel() > 0:
        _matmul_gemm(a[None], b.mT[None], out)
    return out


def _matmul_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., K) as (rows, K)."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    y = linear_fake(x, weight, bias, activation)
    _linear_gemm(x, weight, bias, activation, y, None)
    return y


def linear_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    y, z = linear_fwd_fake(x, weight, bias, activation)
    _linear_gemm(x, weight, bias, activation, y, z if _linear_keeps_z(activation) else None)
    return y, z


def _linear_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    y: torch.Tensor,
    z: torch.Tensor | None,
) -> None:
    bias = None if bias is None else bias.contiguous()
    _matmul_gemm(_matmul_rows(x), weight, y, bias, activation, z)


def linear_bwd(
    dy: torch.Tensor, z: torch.Tensor | None, activation: str, needs_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dz, dbias = linear_bwd_fake(dy, z, activation, needs_dbias)
    N = dy.shape[-1]
    M = math.prod(dy.shape[:-1])
    if N == 0:
        return dz, dbias
    dy = dy.reshape(M, N)
    z = None if z is None else z.contiguous()
    block_m, block_n = 16, 128
    columns = cdiv(N, block_n)
    # Each program walks down its rows and keeps their column sums. Eight programs an SM keep enough loads in flight.
    rows = cdiv(cdiv(M, block_m), max(1, 8 * sm_count(dy.device) // columns)) * block_m
    parts = cdiv(M, rows) if M else 0
    partial = dy.new_empty((parts, N), dtype=torch.float32) if needs_dbias else None
    launch(
        _linear_bwd_kernel,
        (parts, columns),
        dy,
        z,
        dz if activation != "none" else None,
        partial,
        M,
        N,
        rows,
        *dy.stride(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        ACTIVATION=activation,
        NEEDS_DBIAS=needs_dbias,
        num_warps=4,
    )
    if needs_dbias:
        epilogue = {"HAS_BIAS": False, "ACTIVATION": "none", "STORE_Z": False}
        _matmul_reduce(partial, dbias, parts, N, None, None, epilogue)
    return dz, dbias


# --------------------------------------------------------------------------------------------------------------------
# Fakes
# --------------------------------------------------------------------------------------------------------------------


def matmul_fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    batch = a.shape[:-2]
    if b.dim() > 2:  # broadcast_shapes takes longer than a launch
        batch = torch.broadcast_shapes(batch, b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]))


def bmm_fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]))


def linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_fwd_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if _linear_keeps_z(activation) else (0,))


def linear_bwd_fake(
    dy: torch.Tensor, z: torch.Tensor | None, activation: str, needs_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dz = dy.new_empty(dy.shape if activation != "none" else (0,))
    return dz, dy.new_empty((dy.shape[-1],) if needs_dbias else (0,))


# --------------------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------------------


def matmul_check(a: torch.Tensor, b: torch.Tensor) -> None:
    for name, t in (("a", a), ("b", b)):
        if t.dim() < 2:
            hint = "two or more dims (for a vector: unsqueeze it to a matrix of one row or column, squeeze the result)"
            bad_argument("matmul", name, f"of shape {tuple(t.shape)}", hint)
    if a.dtype != b.dtype:
        bad_argument("matmul", "b", f"of dtype {b.dtype}", f"the dtype of a, {a.dtype}", TypeError)
    if a.shape[-1] != b.shape[-2]:
        allowed = f"(..., K, N) with K = {a.shape[-1]}, the last size of a, {tuple(a.shape)}"
        bad_argument("matmul", "b", f"of shape {tuple(b.shape)}", allowed)
    for size_a, size_b in zip(reversed(a.shape[:-2]), reversed(b.shape[:-2]), strict=False):
        if size_a != size_b and size_a != 1 and size_b != 1:
            allowed = f"batch dims that broadcast against those of a, {tuple(a.shape)}"
            bad_argument("matmul", "b", f"of shape {tuple(b.shape)}", allowed)


def bmm_check(a: torch.Tensor, b: torch.Tensor) -> None:
    for name, t in (("a", a), ("b", b)):
        if t.dim() != 3:
            bad_argument("bmm", name, f"of shape {tuple(t.shape)}", "three dims (tt::matmul takes two or more)")
    if a.dtype != b.dtype:
        bad_argument("bmm", "b", f"of dtype {b.dtype}", f"the dtype of a, {a.dtype}", TypeError)
    if a.shape[0] != b.shape[0]:
        allowed = f"the batch size of a, {a.shape[0]} (tt::matmul broadcasts)"
        bad_argument("bmm", "b", f"of batch size {b.shape[0]}", allowed)
    if a.shape[2] != b.shape[1]:
        allowed = f"(B, K, N) with K = {a.shape[2]}, the last size of a, {tuple(a.shape)}"
        bad_argument("bmm", "b", f"of shape {tuple(b.shape)}", allowed)


def linear_check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> None:
    if x.dim() == 0:
        bad_argument("linear", "x", "of no dims", "(..., K)")
    if weight.dim() != 2:
        bad_argument("linear", "weight", f"of shape {tuple(weight.shape)}", "two dims, (N, K)")
    if x.dtype != weight.dtype:
        bad_argument("linear", "weight", f"of dtype {weight.dtype}", f"the dtype of x, {x.dtype}", TypeError)
    if x.shape[-1] != weight.shape[1]:
        allowed = f"(N, K) with K = {x.shape[-1]}, the last size of x, {tuple(x.shape)}"
        bad_argument("linear", "weight", f"of shape {tuple(weight.shape)}", allowed)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            bad_argument(
                "linear", "bias", f"of shape {tuple(bias.shape)}", f"({weight.shape[0]},), a value per row of weight"
            )
        if bias.dtype != x.dtype:
            bad_argument("linear", "bias", f"of dtype {bias.dtype}", f"the dtype of x, {x.dtype}", TypeError)
    if activation not in LINEAR_ACTIVATIONS:
        bad_argument("linear", "activation", repr(activation), ", ".join(map(repr, LINEAR_ACTIVATIONS)))


# --------------------------------------------------------------------------------------------------------------------
# Gradients: products again, through the public op, so every layout takes its fast path
# --------------------------------------------------------------------------------------------------------------------


def matmul_forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    ctx.shapes = a.shape, b.shape
    ctx.save_for_backward(a if ctx.needs[1] else None, b if ctx.needs[0] else None)
    return torch.ops.tt.matmul(a, b)


def matmul_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    a, b = ctx.saved_tensors
    shape_a, shape_b = ctx.shapes
    da = _matmul_summed(dout, b.mT, shape_a) if ctx.needs[0] else None
    db = _matmul_summed(a.mT, dout, shape_b) if ctx.needs[1] else None
    return da, db


def _matmul_summed(left: torch.Tensor, right: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """left @ right, summed over the batch dims that `shape` lacks or has with size one.

    Those dims join the inner one, so that the sum is part of the product: accumulated in float32, rounded once.
    """
    rank = max(left.dim(), right.dim()) - 2
    left = left.reshape((1,) * (rank + 2 - left.dim()) + tuple(left.shape))
    right = right.reshape((1,) * (rank + 2 - right.dim()) + tuple(right.shape))
    batch = (1,) * (rank + 2 - len(shape)) + tuple(shape[:-2])
    # a dim to sum over has its full size in both: the operand that lacks it is the one whose gradient this is
    summed = [i for i in range(rank) if batch[i] == 1 and (left.shape[i] != 1 or right.shape[i] != 1)]
    if summed:
        kept = [i for i in range(rank) if i not in summed]
        inner = left.shape[-1] * math.prod(left.shape[i] for i in summed)
        sizes_left, sizes_right = ([t.shape[i] for i in kept] for t in (left, right))
        left = left.permute(*kept, rank, *summed, rank + 1).reshape(*sizes_left, left.shape[-2], inner)
        right = right.permute(*kept, *summed, rank, rank + 1).reshape(*sizes_right, inner, right.shape[-1])
    return torch.ops.tt.matmul(left, right).reshape(shape)


def bmm_forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    ctx.save_for_backward(a if ctx.needs[1] else None, b if ctx.needs[0] else None)
    return torch.ops.tt.bmm(a, b)


def bmm_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    a, b = ctx.saved_tensors
    da = torch.ops.tt.bmm(dout, b.mT) if ctx.needs[0] else None
    db = torch.ops.tt.bmm(a.mT, dout) if ctx.needs[1] else None
    return da, db


def _linear_keeps_z(activation: str) -> bool:
    """Whether the gradient needs the pre-activation: recomputing it costs a product. For relu the output will do."""
    return activation in ("gelu", "gelu_tanh", "silu")


def linear_forward(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    ctx.activation = activation
    ctx.shape_x = x.shape
    y, z = torch.ops.tt.linear_fwd(x, weight, bias, activation)
    kept = None if activation == "none" else z if _linear_keeps_z(activation) else y
    ctx.save_for_backward(x if ctx.needs[1] else None, weight if ctx.needs[0] else None, kept)
    return y


def linear_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, z = ctx.saved_tensors
    dz, dbias = dy, None
    if ctx.activation != "none" or ctx.needs[2]:
        found, dbias = torch.ops.tt.linear_bwd(dy, z, ctx.activation, ctx.needs[2])
        dz = found if ctx.activation != "none" else dy
    N = dz.shape[-1]
    rows = dz.reshape(math.prod(dz.shape[:-1]), N)
    dx = torch.ops.tt.matmul(rows, weight).reshape(ctx.shape_x) if ctx.needs[0] else None
    dweight = torch.ops.tt.matmul(rows.t(), x.reshape(rows.shape[0], x.shape[-1])) if ctx.needs[1] else None
    return dx, dweight, dbias


# --------------------------------------------------------------------------------------------------------------------
# Samples, benchmark cases, cost
# --------------------------------------------------------------------------------------------------------------------


def matmul_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for M, K, N in [(1, 1, 1), (33, 65, 17), (128, 64, 96), (1, 256, 72), (200, 136, 3)]:
        yield Sample(f"M{M}_K{K}_N{N}", (rand(M, K), rand(K, N)))
    yield Sample("split_k", (rand(8, 4096), rand(4096, 24)), slow_in_interpreter=True)
    yield Sample("row_vector", (rand(1, 1100), rand(9, 1100).t()))
    yield Sample("column_vector", (rand(7, 2048), rand(2048, 1)), slow_in_interpreter=True)
    yield Sample("column_vector_split_k", (rand(2, 8200), rand(8200, 1)))
    yield Sample("split_k_ragged", (rand(5, 4100), rand(4100, 7)))
    yield Sample("several_tiles", (rand(300, 80), rand(80, 264)), slow_in_interpreter=True)
    for M, K, N in [(0, 5, 4), (4, 0, 5), (4, 5, 0), (0, 0, 0)]:
        yield Sample(f"empty_M{M}_K{K}_N{N}", (rand(M, K), rand(K, N)))
    yield Sample("a_transposed", (rand(64, 40).t(), rand(64, 48)))
    yield Sample("b_transposed", (rand(40, 64), rand(48, 64).t()))
    yield Sample("both_transposed", (rand(64, 40).t(), rand(48, 64).t()))
    yield Sample("sliced", (rand(40, 99)[:, 2:66], rand(64, 150)[:, ::3]))
    yield Sample("misaligned", (rand(16 * 32 + 1)[1:].view(16, 32), rand(32 * 24 + 3)[3:].view(32, 24)))
    yield Sample("expanded", (rand(1, 32).expand(20, 32), rand(32, 1).expand(32, 24)))
    yield Sample("batched", (rand(3, 17, 33), rand(3, 33, 9)))
    yield Sample("batched_heads", (rand(2, 19, 3, 16).transpose(1, 2), rand(2, 11, 3, 16).transpose(1, 2).mT))
    yield Sample("batch_of_a", (rand(2, 3, 5, 16), rand(16, 7)))
    yield Sample("batch_of_b", (rand(5, 16), rand(3, 16, 3)))
    yield Sample("broadcast", (rand(2, 1, 5, 8), rand(3, 8, 3)))
    yield Sample("broadcast_both", (rand(2, 1, 3, 1, 2, 8), rand(2, 1, 4, 8, 2)))
    yield Sample("size_one_batches", (rand(1, 5, 8), rand(1, 1, 8, 7)))
    yield Sample("empty_batch", (rand(0, 5, 8), rand(8, 7)))
    yield Sample("empty_batch_K0", (rand(2, 5, 0), rand(2, 0, 7)))


def matmul_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    a = torch.randn(4, 5, device=device)
    yield ErrorSample("inner_sizes", (a, a), match=r"matmul.*'b'.*\(4, 5\).*K = 5")
    yield ErrorSample("dtypes_differ", (a, a.t().half()), error=TypeError, match="matmul.*'b'.*float16.*float32")
    yield ErrorSample("a_1d", (a[0], a.t()), match=r"matmul.*'a'.*\(5,\).*two or more dims.*unsqueeze")
    yield ErrorSample("b_1d", (a, a[0]), match=r"matmul.*'b'.*\(5,\).*two or more dims.*unsqueeze")
    b = a.t().expand(3, 5, 4)
    yield ErrorSample("batches", (a.expand(2, 4, 5), b), match=r"matmul.*'b'.*\(3, 5, 4\).*broadcast.*\(2, 4, 5\)")


def matmul_bench_cases() -> Iterator[BenchCase]:
    def make(n: int, device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(torch.randn(n, n, device=device, dtype=dtype) for _ in range(2)), {}

    yield BenchCase("8192x8192x8192", lambda d, t: make(8192, d, t), passes=("fwd",))
    yield BenchCase("4096x4096x4096", lambda d, t: make(4096, d, t))


def matmul_cost(a: torch.Tensor, b: torch.Tensor) -> Cost:
    size = a.element_size()
    out = math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])) * a.shape[-2] * b.shape[-1]
    flops = 2 * out * a.shape[-1]
    operands = (a.numel() + b.numel()) * size
    # backward: two products of the same size; dout and both operands in, both gradients out
    return Cost(flops, operands + out * size, 2 * flops, 2 * operands + out * size)


def bmm_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for B, M, K, N in [(1, 1, 1, 1), (3, 17, 33, 9), (2, 70, 128, 72)]:
        yield Sample(f"B{B}_M{M}_K{K}_N{N}", (rand(B, M, K), rand(B, K, N)))
    for B, M, K, N in [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)]:
        yield Sample(f"empty_B{B}_M{M}_K{K}_N{N}", (rand(B, M, K), rand(B, K, N)))
    yield Sample("transposed", (rand(2, 16, 24).mT, rand(2, 40, 16).mT))
    yield Sample("batch_last", (rand(9, 16, 3).permute(2, 0, 1), rand(16, 8, 3).permute(2, 0, 1)))
    yield Sample("expanded", (rand(1, 9, 16).expand(3, 9, 16), rand(16, 1).expand(3, 16, 8)))
    yield Sample("sliced", (rand(3, 20, 40)[:, 1:18, 3:36], rand(6, 33, 24)[::2, :, ::3]))
    yield Sample("long_K", (rand(2, 3, 4096), rand(2, 4096, 5)))


def bmm_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    a, b = torch.randn(2, 4, 5, device=device), torch.randn(2, 5, 3, device=device)
    yield ErrorSample("a_2d", (a[0], b), match=r"bmm.*'a'.*\(4, 5\).*three dims.*matmul")
    yield ErrorSample("b_4d", (a, b[None]), match=r"bmm.*'b'.*\(1, 2, 5, 3\).*three dims")
    yield ErrorSample("batches", (a, b[:1]), match=r"bmm.*'b'.*batch size 1.*batch size of a, 2.*broadcasts")
    yield ErrorSample("inner_sizes", (a, b.mT), match=r"bmm.*'b'.*\(2, 3, 5\).*K = 5")
    yield ErrorSample("dtypes_differ", (a, b.half()), error=TypeError, match="bmm.*'b'.*float16.*float32")


def bmm_bench_cases() -> Iterator[BenchCase]:
    def case(B: int, M: int, N: int, K: int, passes: tuple[str, ...]) -> BenchCase:
        def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            a, b = torch.randn(B, M, K, device=device, dtype=dtype), torch.randn(B, K, N, device=device, dtype=dtype)
            return (a, b), {}

        return BenchCase(f"{B}x{M}x{N}x{K}", make, passes=passes)

    yield case(32, 2048, 2048, 128, ("fwd", "fwdbwd"))
    yield case(16, 2048, 2048, 2048, ("fwd",))


def bmm_cost(a: torch.Tensor, b: torch.Tensor) -> Cost:
    return matmul_cost(a, b)


def linear_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for activation in LINEAR_ACTIVATIONS:
        yield Sample(f"M33_N40_K65_{activation}", (rand(33, 65), rand(40, 65), rand(40), activation))
        yield Sample(f"M64_N48_K64_{activation}", (rand(64, 64), rand(48, 64), None, activation))
    yield Sample("no_bias", (rand(17, 64), rand(24, 64)))
    yield Sample("M1_N1_K1", (rand(1, 1), rand(1, 1), rand(1)))
    yield Sample("vector_x", (rand(40), rand(24, 40), rand(24), "silu"))
    yield Sample("leading_dims", (rand(2, 3, 5, 32), rand(16, 32), rand(16), "gelu"))
    yield Sample("x_transposed", (rand(2, 32, 9).mT, rand(16, 32), rand(16)))
    yield Sample("weight_transposed", (rand(9, 32), rand(32, 16).t(), rand(16), "relu"))
    yield Sample("misaligned", (rand(9 * 32 + 1)[1:].view(9, 32), rand(16, 33)[:, 1:], rand(17)[1:], "relu"))
    yield Sample("expanded", (rand(1, 32).expand(9, 32), rand(16, 32), rand(1).expand(16)))
    yield Sample("split_k", (rand(4, 4096), rand(24, 4096), rand(24), "gelu_tanh"))
    yield Sample("tall", (rand(700, 16), rand(24, 16), rand(24), "silu"), slow_in_interpreter=True)
    yield Sample("empty_M", (rand(0, 16), rand(8, 16), rand(8), "silu"))
    yield Sample("empty_N", (rand(4, 16), rand(0, 16), rand(0)))
    yield Sample("empty_K", (rand(4, 0), rand(8, 0), rand(8), "gelu"))
    yield Sample("empty_K_no_bias", (rand(4, 0), rand(8, 0)))


def linear_error_samples(device: torch.device | str) -> Iterator[ErrorSample]:
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((4, 5), (3, 5), (3,)))
    yield ErrorSample("inner_sizes", (x, weight.t()), match=r"linear.*'weight'.*\(5, 3\).*K = 5")
    yield ErrorSample("weight_1d", (x, weight[0]), match=r"linear.*'weight'.*\(5,\).*\(N, K\)")
    yield ErrorSample("x_0d", (x[0, 0], weight), match=r"linear.*'x'.*no dims")
    yield ErrorSample("weight_dtype", (x, weight.half()), error=TypeError, match="linear.*'weight'.*float16.*float32")
    yield ErrorSample("bias_dtype", (x, weight, bias.half()), error=TypeError, match="linear.*'bias'.*float16.*float32")
    yield ErrorSample("bias_shape", (x, weight, x[0]), match=r"linear.*'bias'.*\(5,\).*\(3,\)")
    yield ErrorSample(
        "activation", (x, weight, bias, "swish"), match="linear.*'activation'.*swish.*'gelu_tanh', 'silu'"
    )


def linear_bench_cases() -> Iterator[BenchCase]:
    def case(M: int, N: int, K: int, activation: str = "none", passes: tuple[str, ...] = ("fwd",)) -> BenchCase:
        def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x, weight = torch.randn(M, K, device=device, dtype=dtype), torch.randn(N, K, device=device, dtype=dtype)
            if activation == "none":
                return (x, weight), {}
            return (x, weight, torch.randn(N, device=device, dtype=dtype), activation), {}

        return BenchCase(f"{M}x{N}x{K}" + ("" if activation == "none" else f"_bias_{activation}"), make, passes=passes)

    yield case(8192, 8192, 8192)
    yield case(4096, 4096, 4096, passes=("fwd", "fwdbwd"))
    yield case(8192, 14336, 4096, passes=("fwd", "fwdbwd"))
    yield case(8192, 4096, 14336)
    yield case(16, 14336, 4096)
    yield case(1, 14336, 4096)
    yield case(8192, 14336, 4096, "gelu_tanh", passes=("fwd", "fwdbwd"))


def linear_cost(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> Cost:
    size = x.element_size()
    M, N = math.prod(x.shape[:-1]), weight.shape[0]
    flops = 2 * M * N * weight.shape[1]
    operands = (x.numel() + weight.numel() + (0 if bias is None else N)) * size
    kept = 0 if activation == "none" else M * N * size  # the backward reads z, or relu's output
    return Cost(flops, operands + M * N * size, 2 * flops, 2 * operands + M * N * size + kept)
