"""What the elementwise ops share: broadcasting, type promotion, addressing, the gradient of a broadcast, samples.

An op's kernel keeps its loads, its formula and its store. It is started by `run`, whose arguments are

    inputs, outputs, scalars, B, M, N, four strides of each input, BLOCK_M, BLOCK_N

The inputs, broadcast to the outputs' shape, are seen as (A, B, M, N) after neighbouring dimensions that lie evenly in
every input were merged: contiguous inputs of the outputs' shape become one row, (1, 1, 1, numel). A program computes one
tile of (BLOCK_M, BLOCK_N) elements; `tile` says which. Nothing is copied: a broadcast dimension has stride 0 and is read
again, from the cache. Only where more than four dimensions are left are the inputs made contiguous.

Outputs are contiguous. Offsets are 64 bits wide where they must be: the start of a tile; within one they are constants.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from torch_triton_ops.cases import BenchCase, Cost, ErrorSample, Sample
from torch_triton_ops.errors import bad_argument
from torch_triton_ops.launch import cdiv, launch, next_power_of_2

# --------------------------------------------------------------------------------------------------------------------
# In the kernels
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def tile(B, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile of (A, B, M, N): a, b (scalars), m (BLOCK_M, 1), n (1, BLOCK_N), and of a contiguous tensor the
    offsets and the mask, both (BLOCK_M, BLOCK_N)."""
    pid = tl.program_id(0)
    # not tl.cdiv, whose sum passes 2**31 for the last N below it
    tiles_m, tiles_n = (M - 1) // BLOCK_M + 1, (N - 1) // BLOCK_N + 1
    row_of_tiles = pid // tiles_n
    outer = row_of_tiles // tiles_m
    # int64 from here on: a tensor may have more than 2**31 elements
    m = tl.cast(row_of_tiles % tiles_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.cast(pid % tiles_n, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    a, b = tl.cast(outer // B, tl.int64), tl.cast(outer % B, tl.int64)
    offs = (tl.cast(outer, tl.int64) * M + m) * N + n
    return a, b, m, n, offs, (m < M) & (n < N)


@triton.jit
def upcast(x, out_ptr):
    """x in the dtype of arithmetic for a result stored at out_ptr: fp32 for half precision, else the result's own."""
    if out_ptr.dtype.element_ty.is_floating() and out_ptr.dtype.element_ty.primitive_bitwidth < 32:
        return x.to(tl.float32)
    else:
        return x.to(out_ptr.dtype.element_ty)


# --------------------------------------------------------------------------------------------------------------------
# Launching
# --------------------------------------------------------------------------------------------------------------------

_TILE = 1024  # elements of a program: 16 bytes of a half-precision input for each of 128 threads
_FLAT = {count: (0, 0, 0, 1) * count for count in (1, 2, 3, 4)}  # strides of contiguous inputs

_Layout = tuple[Sequence[int], tuple[int, ...]]  # shape, strides


def run(
    kernel: Any,
    inputs: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor | None],
    *scalars: int,
    **constexprs: Any,
) -> None:
    """Start `kernel` on inputs that broadcast to the shape of the outputs; see the module's docstring.

    An input that is None has strides 0; an output that is not wanted is None.
    """
    out = outputs[0] if outputs[0] is not None else outputs[1]
    assert out is not None
    shape = out.shape
    for t in inputs:
        if t is not None and (t.shape != shape or not t.is_contiguous()):
            break
    else:  # all alike: one long row
        N = out.numel()
        sizes_and_strides = (1, 1, N, *_FLAT[len(inputs)])
        grid, config = (cdiv(N, _TILE),), {"BLOCK_M": 1, "BLOCK_N": _TILE, "num_warps": 4}
        launch(kernel, grid, *inputs, *outputs, *scalars, *sizes_and_strides, **config, **constexprs)
        return
    layouts = tuple([None if t is None else (t.shape, t.stride()) for t in inputs])
    try:
        found = _plan(shape, layouts)
    except TypeError:  # traced sizes have no hash
        found = _plan.__wrapped__(shape, layouts)
    if found is None:
        copies = [None if t is None else t.expand(shape).contiguous() for t in inputs]
        run(kernel, copies, outputs, *scalars, **constexprs)
        return
    grid, sizes_and_strides, config = found
    launch(kernel, grid, *inputs, *outputs, *scalars, *sizes_and_strides, **config, **constexprs)


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: Sequence[int], layouts: tuple[_Layout | None, ...]
) -> tuple[tuple[int], tuple[int, ...], dict[str, int]] | None:
    """Grid; B, M, N and the inputs' strides; the tile. None where more than four dimensions are left."""
    dims = collapse(shape, [_broadcast_strides(layout, shape) for layout in layouts])
    if len(dims) > 4:
        return None
    dims = [(1, (0,) * len(layouts))] * (4 - len(dims)) + dims
    (A, _), (B, _), (M, along_m), (N, along_n) = dims
    if any(m == 1 and n > 1 for m, n in zip(along_m, along_n, strict=True)):
        # transposed: a square tile, so that reads along M and writes along N both fill whole 32-byte sectors
        config = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4}
    else:
        BLOCK_N = _TILE if N > _TILE // 2 else max(16, next_power_of_2(N))
        config = {"BLOCK_M": 1 if M == 1 else _TILE // BLOCK_N, "BLOCK_N": BLOCK_N, "num_warps": 4}
    grid = (A * B * cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),)
    return grid, (B, M, N, *(along[i] for i in range(len(layouts)) for _, along in dims)), config


def _broadcast_strides(layout: _Layout | None, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor expanded to `shape`; the kernel gets the tensor itself, so that a compiled graph has no other."""
    if layout is None:
        return (0,) * len(shape)
    own = [0 if size == 1 else stride for size, stride in zip(*layout, strict=True)]
    return (*(0,) * (len(shape) - len(own)), *own)


def collapse(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, ...]]]:
    """The fewest (size, stride of each tensor) that address the same elements in the same order, outermost first.

    Sizes of 1 vanish; a dimension joins the next one where every tensor steps over it evenly.

    >>> collapse((4, 3, 5), [(15, 5, 1), (0, 0, 1)])
    [(12, (5, 0)), (5, (1, 1))]
    """
    dims: list[tuple[int, tuple[int, ...]]] = []
    for d in reversed(range(len(shape))):
        size, along = shape[d], tuple(s[d] for s in strides)
        if size == 1:
            continue
        if dims and all(outer == inner * dims[0][0] for outer, inner in zip(along, dims[0][1], strict=True)):
            dims[0] = (size * dims[0][0], dims[0][1])
        else:
            dims.insert(0, (size, along))
    return dims


# --------------------------------------------------------------------------------------------------------------------
# Broadcasting and promotion
# --------------------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.float64)


def broadcast_shape(x: torch.Tensor, y: torch.Tensor) -> Sequence[int]:
    """Shape of the result of x and y; `torch.broadcast_shapes` in a tenth of its time. Raises ValueError where they do not
    broadcast."""
    if x.shape == y.shape:
        return x.shape
    longer, shorter = (x.shape, y.shape) if x.ndim >= y.ndim else (y.shape, x.shape)
    first = len(longer) - len(shorter)
    shape = list(longer)
    for d, size in enumerate(shorter, first):
        if shape[d] == 1:
            shape[d] = size
        elif size != 1 and size != shape[d]:
            raise ValueError(f"shapes {tuple(x.shape)} and {tuple(y.shape)} do not broadcast")
    return shape


def result_dtype(x: torch.Tensor, y: torch.Tensor) -> torch.dtype:
    """What `torch.result_type` says of two tensors, for real and traced ones: a tensor without dimensions decides only if
    it is floating-point and the other is not."""
    if x.dtype == y.dtype:
        return x.dtype
    if (x.ndim == 0) != (y.ndim == 0):
        scalar, tensor = (x, y) if x.ndim == 0 else (y, x)
        if tensor.dtype.is_floating_point or not scalar.dtype.is_floating_point:
            return tensor.dtype
    return torch.promote_types(x.dtype, y.dtype)


def empty_result(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor for the result of x and y."""
    if x.shape == y.shape and x.dtype == y.dtype:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty(broadcast_shape(x, y), dtype=result_dtype(x, y))


def check_binary(op: str, x: torch.Tensor, y: torch.Tensor, name: str = "y") -> None:
    """Raise ValueError if the shapes do not broadcast, TypeError for a dtype of y that the kernels do not know."""
    if y.dtype not in _DTYPES:
        bad_argument(op, name, f"of dtype {y.dtype}", "float32, float16, bfloat16, int32, int64", TypeError)
    check_broadcast(op, x, y, name)


def check_broadcast(op: str, x: torch.Tensor, y: torch.Tensor, name: str) -> None:
    """Raise ValueError if the shapes do not broadcast."""
    try:
        broadcast_shape(x, y)
    except ValueError:
        bad_argument(
            op, name, f"of shape {tuple(y.shape)}", f"a shape that broadcasts with {tuple(x.shape)}, that of x"
        )


def save_kinds(ctx: Any, *tensors: torch.Tensor) -> None:
    """Keep for `reduce_gradients` what the gradients of `tensors` look like."""
    ctx.kinds = [(t.shape, t.dtype) for t in tensors]


def reduce_gradients(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients as the inputs are: summed over the dimensions that were broadcast, in the inputs' dtype; None where none
    is needed."""
    found: list[torch.Tensor | None] = []
    for gradient, needed, (shape, dtype) in zip(gradients, ctx.needs, ctx.kinds, strict=True):
        if needed and gradient.shape != shape:
            gradient = gradient.sum_to_size(shape)
        found.append(gradient.to(dtype) if needed else None)
    return tuple(found)


def wanted(out: torch.Tensor, needed: bool) -> torch.Tensor:
    """A tensor for a gradient of the shape and dtype of `out`; an empty one if it is not needed."""
    return out.new_empty(out.shape if needed else (0,))


# --------------------------------------------------------------------------------------------------------------------
# Samples and cost
# --------------------------------------------------------------------------------------------------------------------


_THOROUGH = (torch.float32, torch.float64)  # the dtypes whose samples include what does not depend on the dtype


def random(
    shape: Sequence[int], device: torch.device | str, dtype: torch.dtype, away_from_zero: bool = False
) -> torch.Tensor:
    """Normal numbers, or integers from -9 to 9; `away_from_zero`: of magnitude 1/2 or more, as a divisor should be."""
    if not dtype.is_floating_point:
        x = torch.randint(1 if away_from_zero else -9, 10, tuple(shape), device=device, dtype=dtype)
        return x * (1 - 2 * torch.randint(0, 2, tuple(shape), device=device, dtype=dtype)) if away_from_zero else x
    x = torch.randn(tuple(shape), device=device, dtype=dtype)
    return x + 0.5 * torch.where(x < 0, -1.0, 1.0).to(dtype) if away_from_zero else x


def special(device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, infinities, NaN, the largest numbers and where exponentials overflow and underflow; (17,)."""
    big = torch.finfo(dtype).max
    values = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), big, -big]
    values += [0.625, 0.0001, -0.0001, 12.0, -12.0, 88.5, -87.0, -104.0]
    return torch.tensor(values, device=device, dtype=dtype)


def unary_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Odd, 0-dim, empty, transposed, expanded and large values. Nothing at 0, where relu has no derivative."""

    def t(*shape: int) -> torch.Tensor:
        return random(shape, device, dtype)

    yield Sample("33x65", (t(33, 65),))
    if dtype.is_floating_point:
        yield Sample("transposed", (t(9, 35).t(),))
        yield Sample("large_values", (t(257) * 20,))
    if dtype in _THOROUGH:
        yield Sample("scalar", (t(),))
        yield Sample("empty", (t(1, 0),))
        yield Sample("expanded", (t(7, 1, 5).expand(7, 4, 5),))


def unary_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Special values."""
    if dtype.is_floating_point:
        yield Sample("special", (special(device, dtype),))


def binary_samples(device: torch.device | str, dtype: torch.dtype, away_from_zero: bool = False) -> Iterator[Sample]:
    """Odd, broadcast, promoted; for floating-point also 0-dim, empty, strided, and five dimensions that do not merge."""

    def pair(x: Sequence[int], y: Sequence[int], y_dtype: torch.dtype = dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return random(x, device, dtype), random(y, device, y_dtype, away_from_zero)

    yield Sample("33x65", pair((33, 65), (33, 65)))
    yield Sample("broadcast", pair((3, 1, 65), (7, 1)))
    other = {torch.float32: torch.int64, torch.int32: torch.int64}.get(dtype, torch.float32)
    if dtype != torch.float64:
        yield Sample("promoted", pair((5, 33), (33,), other))
    if dtype.is_floating_point:
        x, y = pair((9, 35), (35, 18))
        yield Sample("strided", (x.t(), y[:, ::2]))
    if dtype in _THOROUGH:
        yield Sample("scalar_y", pair((5,), ()))
        yield Sample("scalars", pair((), ()))
        yield Sample("empty", pair((0, 3), (3,)))
        x, y = pair((2, 3, 2, 3, 2), (3, 1, 3, 1))
        yield Sample("five_dims", (x.permute(4, 1, 2, 3, 0), y))


def binary_gpu_samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every pair of special values."""
    if dtype.is_floating_point:
        x = special(device, dtype)
        yield Sample("special", (x[:, None].expand(17, 17).contiguous(), x.expand(17, 17).contiguous()))


def binary_error_samples(op: str, device: torch.device | str) -> Iterator[ErrorSample]:
    """Shapes that do not broadcast, dtypes that are not known."""
    x = torch.randn(4, 5, device=device)
    yield ErrorSample("shapes", (x, x[:, :2]), match=rf"{op}.*'y'.*\(4, 2\).*\(4, 5\)")
    yield ErrorSample("dtype_x", (x > 0, x), error=TypeError, match=f"{op}.*'x'.*bool.*float32")
    yield ErrorSample("dtype_y", (x, x > 0), error=TypeError, match=f"{op}.*'y'.*bool.*float32")


def unary_error_samples(op: str, device: torch.device | str) -> Iterator[ErrorSample]:
    """A dtype that is not known."""
    yield ErrorSample(
        "dtype", (torch.ones(3, device=device, dtype=torch.bool),), error=TypeError, match=f"{op}.*'x'.*bool.*float32"
    )


def bench_case(
    *shapes: Sequence[int], id: str = "8192x8192", passes: tuple[str, ...] = ("fwd", "fwdbwd"), **options: Any
) -> BenchCase:
    """A case of normal tensors of these shapes in bf16, and options of the op."""

    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(torch.randn(tuple(shape), device=device, dtype=dtype) for shape in shapes), options

    return BenchCase(id, make, passes=passes)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def unary_cost(x: torch.Tensor, flops: int = 1) -> Cost:
    """One read, one write; backward two reads, one write. `flops` an element."""
    return Cost(flops * x.numel(), 2 * _bytes(x), 2 * flops * x.numel(), 3 * _bytes(x))


def binary_cost(x: torch.Tensor | None, y: torch.Tensor | None, saved: bool = True) -> Cost:
    """Each input read once, the result written once; backward: the upstream gradient and, if `saved`, the inputs read, a
    gradient of each input written. An input that is None, as in a call of an internal op, takes part in nothing."""
    given = [t for t in (x, y) if t is not None]
    result = (
        given[0] if len(given) == 1 else torch.empty(broadcast_shape(*given), dtype=result_dtype(*given), device="meta")
    )
    n, inputs, size = result.numel(), _bytes(*given), _bytes(result)
    return Cost(n, inputs + size, 2 * n, size + inputs * (2 if saved else 1))
