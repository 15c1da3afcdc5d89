# %% [markdown]
# # Notebook 7. Custom loss functions and backpropagation in Triton
#
# PyTorch differentiates any loss that you write with its operators, and pays for it: each operator reads and writes whole
# tensors, and what the backward needs is kept. A loss in Triton reads its inputs once, writes a number, and its gradient is a
# second kernel that reads the inputs again. This notebook goes there in four steps:
#
# 1. a loss and its derivative on paper, and the kernels by hand, in a `torch.autograd.Function`;
# 2. the same loss as a *registered op* from two functions and one YAML entry, with `torch.compile`, fakes, autograd and checks;
# 3. a mistake in a derivative, and what finds it;
# 4. a loss over rows: a classifier's, with a softmax in it.
#
# Everything runs on a CPU. There kernels that you launch yourself run in Triton's interpreter, and registered ops run their
# plain PyTorch reference. Speeds are measured on a GPU alone: they stand, with machine and versions, in the records under
# `bench/results/`, and none is shown here.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import triton
import triton.language as tl

from torch_triton_ops import load_registry
from torch_triton_ops.testing import check_op
from triton_tutorial import interpreted

interpreted.install()  # kernels launched with CPU tensors run in Triton's interpreter
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)

# %% [markdown]
# ## 1. By hand
#
# The **Cauchy loss** forgives outliers: near zero it is the square's half, far away it grows like a logarithm. With
# $d = \text{input} - \text{target}$ and a scale $c$
#
# $$\ell(d) = \frac{c^2}{2} \log\!\left(1 + \frac{d^2}{c^2}\right) \qquad
#   \frac{\partial \ell}{\partial\, \text{input}} = \frac{d}{1 + d^2 / c^2}$$
#
# **Backpropagation is one product.** If $L$ is what is trained, autograd hands the backward $g = \partial L / \partial \ell$ and
# wants $g \cdot \partial \ell / \partial\, \text{input}$. For the mean over $N$ elements that is $g / N$ times the derivative.
# Nothing but the inputs is kept between the two passes: reading two numbers again costs less than storing a third.


# %%
@triton.jit
def cauchy_fwd_kernel(input_ptr, target_ptr, partial_ptr, N, C: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    d = tl.load(input_ptr + offs, mask=mask, other=0.0) - tl.load(target_ptr + offs, mask=mask, other=0.0)
    # d is 0 where the mask is false, and so is the loss: the padding adds nothing
    loss = 0.5 * C * C * tl.log(1.0 + d * d / (C * C))
    tl.store(partial_ptr + tl.program_id(0), tl.sum(loss, axis=0))


@triton.jit
def cauchy_bwd_kernel(dloss_ptr, input_ptr, target_ptr, dinput_ptr, N, C: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    d = tl.load(input_ptr + offs, mask=mask, other=0.0) - tl.load(target_ptr + offs, mask=mask, other=0.0)
    dloss = tl.load(dloss_ptr) / N
    tl.store(dinput_ptr + offs, dloss * d / (1.0 + d * d / (C * C)), mask=mask)


class Cauchy(torch.autograd.Function):
    BLOCK = 256

    @staticmethod
    def forward(ctx, input, target, c):
        ctx.save_for_backward(input, target)
        ctx.c, n = c, input.numel()
        partial = input.new_empty(triton.cdiv(n, Cauchy.BLOCK))
        cauchy_fwd_kernel[(partial.numel(),)](input, target, partial, n, C=c, BLOCK=Cauchy.BLOCK)
        return partial.sum() / n  # programs add up in a fixed order: the same loss every time

    @staticmethod
    def backward(ctx, dloss):
        input, target = ctx.saved_tensors
        dinput, n = torch.empty_like(input), input.numel()
        cauchy_bwd_kernel[(triton.cdiv(n, Cauchy.BLOCK),)](dloss, input, target, dinput, n, C=ctx.c, BLOCK=Cauchy.BLOCK)
        return dinput, None, None


def cauchy_torch(input: torch.Tensor, target: torch.Tensor, c: float) -> torch.Tensor:
    return (0.5 * c * c * torch.log1p(((input - target) / c) ** 2)).mean()


x = (3 * torch.randn(1000, device=device)).requires_grad_()
y = torch.randn(1000, device=device)
loss, plain = Cauchy.apply(x, y, 1.5), cauchy_torch(x, y, 1.5)
(gradient,), (plain_gradient,) = torch.autograd.grad(loss, x), torch.autograd.grad(plain, x)
torch.testing.assert_close(loss, plain)
torch.testing.assert_close(gradient, plain_gradient)
print(
    f"loss {loss.item():.6f}, torch {plain.item():.6f}; largest gradient error {(gradient - plain_gradient).abs().max():.1e}"
)

# %% [markdown]
# It works, for contiguous float32 tensors of one shape, in eager mode. Missing: strides, other dtypes, empty inputs,
# `reduction="none"`, offsets beyond 2^31, a fake for `torch.compile`, and tests for it all. None of that has to do with the
# loss.
#
# ## 2. As an op: two functions and an entry
#
# `torch_triton_ops.losses.elementwise_loss` makes the rest out of the value and the derivative. They are plain
# `@triton.jit` functions of blocks; the op's file holds them, and the registry file declares the op. What you see here
# is all there is to write.

# %%
folder = Path(tempfile.mkdtemp())

(folder / "cauchy_loss.py").write_text(
    '''"""The Cauchy loss: c^2 / 2 * log(1 + (d / c)^2), d = input - target. Quadratic near, logarithmic far."""

import triton
import triton.language as tl

from torch_triton_ops.losses import elementwise_loss


@triton.jit
def value(input, target, c: tl.constexpr = 1.0):
    d = (input - target) / c
    return 0.5 * c * c * tl.log(1.0 + d * d)


@triton.jit
def derivative(input, target, c: tl.constexpr = 1.0):  # by input; the upstream gradient comes by itself
    d = input - target
    return d / (1.0 + (d / c) * (d / c))


def _check(bad, c, **_):
    if not c > 0.0:
        bad("c", c, "a number above 0")


LOSS = elementwise_loss("my::cauchy_loss", value, derivative, globals(), check=_check, options=[{"c": 0.3}])
'''
)

(folder / "my_losses.yaml").write_text(
    """
- op: my::cauchy_loss(Tensor input, Tensor target, *, float c=1.0, str reduction="mean") -> Tensor
  summary: Quadratic for small errors, logarithmic for large ones.
  module: cauchy_loss
  backward: my::cauchy_loss_bwd(Tensor dloss, Tensor input, Tensor target, float c, str reduction) -> Tensor
  visibility: triton
  differentiable: [input]
  dtypes: [float32, float16, bfloat16]
"""
)

(spec,) = load_registry(folder / "my_losses.yaml")
x.grad = None
loss = torch.ops.my.cauchy_loss(x, y, c=1.5)
torch.testing.assert_close(torch.autograd.grad(loss, x)[0], plain_gradient)
print(torch.ops.my.cauchy_loss.default._schema)

# %% [markdown]
# ### In `torch.compile`
#
# The op has a fake, so the compiler knows shapes without running it, and no graph break. On a GPU Inductor puts the kernels
# themselves into its code. (`aot_eager` here, which needs no C++ compiler.)


# %%
def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.ops.my.cauchy_loss(torch.tanh(x) * 3, y, c=0.5)


compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
for n in (10, 1000):
    a, b = (f(x[:n], y[:n]) for f in (compiled, model))
    torch.testing.assert_close(torch.autograd.grad(a, x)[0], torch.autograd.grad(b, x)[0])
print("compiled, static and dynamic shapes, gradients equal")

# %% [markdown]
# ### The conformance suite
#
# `check_op` runs what the package's own ops must pass: schema, fakes, values against fp64 within a derived error budget,
# gradients by finite differences, strides, misalignment, autograd's registration, errors by name. A part of it:

# %%
report = check_op("my::cauchy_loss", dtypes=[torch.float32], checks=["values", "gradients", "gradcheck", "errors"])
print(report)
assert report.passed
try:
    torch.ops.my.cauchy_loss(x, y, c=-1.0)
except ValueError as error:
    print(error)

# %% [markdown]
# ### The kernels
#
# On the CPU all of this ran the reference, which is your two functions on torch tensors. The kernels are generated, as
# source that can be read. A process with `TRITON_INTERPRET=1` runs them on the CPU:

# %%
import cauchy_loss  # noqa: E402  (load_registry made it importable)

print(cauchy_loss.LOSS.forward_kernel.src)

# %%
script = f"""
import sys, torch
from torch_triton_ops import load_registry
load_registry({str(folder / "my_losses.yaml")!r})
torch.manual_seed(0)
x = (3 * torch.randn(3000)).requires_grad_()
y = torch.randn(3000)
loss = torch.ops.my.cauchy_loss(x, y, c=1.5)
loss.backward()
d = (x.detach() - y).double()
torch.testing.assert_close(loss.double(), (1.125 * torch.log1p((d / 1.5) ** 2)).mean(), rtol=1e-6, atol=0)
torch.testing.assert_close(x.grad.double(), d / (1 + (d / 1.5) ** 2) / 3000, rtol=1e-5, atol=1e-12)
print("interpreted kernels agree with fp64: loss", loss.item())
"""
done = subprocess.run(
    [sys.executable, "-c", script],
    env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    capture_output=True,
    text=True,
)
print(done.stdout or done.stderr)
assert done.returncode == 0

# %% [markdown]
# ### What it is for
#
# A line through points of which every fifth is wrong. The square follows the wrong ones, the Cauchy loss does not.

# %%
t = torch.linspace(-1, 1, 100, device=device)
points = 0.8 * t - 0.2 + 0.05 * torch.randn(100, device=device)
points[::5] += 2.5 * torch.rand(20, device=device) + 0.5


def fit(loss_of) -> torch.Tensor:
    line = torch.zeros(2, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([line], lr=0.05)
    for _ in range(200):
        loss_of(line[0] * t + line[1], points).backward()
        optimizer.step()
        optimizer.zero_grad()
    return line.detach()


lines = {
    "square": fit(torch.nn.functional.mse_loss),
    "Cauchy, c = 0.1": fit(lambda a, b: torch.ops.my.cauchy_loss(a, b, c=0.1)),
}
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
axis.plot(t.cpu(), points.cpu(), ".", color="#66727f")
for (name, (slope, offset)), colour in zip(lines.items(), ("#0072b2", "#d1495b"), strict=True):
    axis.plot(t.cpu(), (slope * t + offset).cpu(), color=colour, label=f"{name}: {slope:.2f} t {offset:+.2f}")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()
assert (lines["Cauchy, c = 0.1"] - torch.tensor([0.8, -0.2], device=device)).abs().max() < 0.1

# %% [markdown]
# ## 3. A wrong derivative
#
# The most common mistake: a factor that was lost. The loss still falls, only worse, and no exception is raised. Finite
# differences find it, without a reference: for a small $h$, $(\ell(x + h) - \ell(x - h)) / 2h$ must be the derivative.

# %%
wrong = (
    (folder / "cauchy_loss.py").read_text().replace("return d / (1.0 + (d / c) * (d / c))", "return d / (1.0 + d * d)")
)
(folder / "wrong_loss.py").write_text(wrong.replace("my::cauchy_loss", "my::wrong_loss"))
(folder / "wrong.yaml").write_text((folder / "my_losses.yaml").read_text().replace("cauchy_loss", "wrong_loss"))
load_registry(folder / "wrong.yaml")
report = check_op("my::wrong_loss", dtypes=[torch.float32], checks=["gradcheck"])
assert not report.passed
print(str(report)[:900])

# %% [markdown]
# ## 4. A loss over rows
#
# A classifier's loss needs its whole row: a softmax. `row_loss` hands your functions blocks of rows `(BLOCK_M, BLOCK_N)`; `value`
# reduces along axis 1. Rows are padded to a power of two, so what is beyond `columns` must be left out by hand. As an
# example the **Poly-1 loss** (https://arxiv.org/abs/2204.12511), cross entropy with one term more:
#
# $$\ell = -\sum_j t_j \log p_j + \varepsilon \Big(1 - \sum_j t_j p_j\Big), \qquad p = \mathrm{softmax}(z), \quad \sum_j t_j = 1$$
#
# Its derivative, with $s = \sum_j t_j p_j$ and $\partial p_j / \partial z_k = p_j (\delta_{jk} - p_k)$:
#
# $$\frac{\partial \ell}{\partial z_k} = p_k - t_k - \varepsilon\, p_k (t_k - s)$$

# %%
(folder / "poly_loss.py").write_text(
    '''"""Poly-1: cross entropy + epsilon * (1 - the target's probability). https://arxiv.org/abs/2204.12511, section 4."""

import torch
import triton
import triton.language as tl

from torch_triton_ops.losses import row_loss


@triton.jit
def _shifted(logits, column, columns):
    """Logits minus the row's largest: no exponential overflows. What is beyond the row gets no probability."""
    z = tl.where(column < columns, logits, -float("inf"))
    return z - tl.max(z, axis=1, keep_dims=True)


@triton.jit
def value(logits, target, column, columns, epsilon: tl.constexpr = 1.0):
    z = _shifted(logits, column, columns)
    e = tl.exp(z)
    total = tl.sum(e, axis=1, keep_dims=True)
    inside = column < columns
    log_p = tl.where(inside, z, 0.0) - tl.log(total)
    ce = -tl.sum(tl.where(inside, target * log_p, 0.0), axis=1, keep_dims=True)
    return ce + epsilon * (1.0 - tl.sum(target * e / total, axis=1, keep_dims=True))


@triton.jit
def derivative(logits, target, column, columns, epsilon: tl.constexpr = 1.0):
    e = tl.exp(_shifted(logits, column, columns))
    p = e / tl.sum(e, axis=1, keep_dims=True)
    s = tl.sum(target * p, axis=1, keep_dims=True)
    return p - target - epsilon * p * (target - s)


def _inputs(shape, device, dtype):
    logits = torch.randn(shape, device=device, dtype=dtype)
    return logits, torch.softmax(torch.randn(shape, device=device), dim=-1).to(dtype)


def _reference(logits, target, epsilon):
    log_p = torch.log_softmax(logits, dim=-1)
    return -(target * log_p).sum(-1) + epsilon * (1 - (target * log_p.exp()).sum(-1))


row_loss(
    "my::poly_loss", value, derivative, globals(), inputs=_inputs, reference=_reference, options=[{"epsilon": -0.5}]
)
'''
)
(folder / "poly.yaml").write_text(
    """
- op: my::poly_loss(Tensor logits, Tensor target, *, float epsilon=1.0, str reduction="mean") -> Tensor
  summary: Cross entropy against probabilities, plus epsilon times one minus the target's probability.
  module: poly_loss
  backward: my::poly_loss_bwd(Tensor dloss, Tensor logits, Tensor target, float epsilon, str reduction) -> Tensor
  visibility: triton
  differentiable: [logits]
  dtypes: [float32, float16, bfloat16]
  source: https://arxiv.org/abs/2204.12511
"""
)
load_registry(folder / "poly.yaml")
report = check_op("my::poly_loss", dtypes=[torch.float32], checks=["values", "gradients", "gradcheck"])
print(report)
assert report.passed

# %% [markdown]
# And it trains. Two spirals that a small network must tell apart, with plain cross entropy and with Poly-1:


# %%
def spirals(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    angle = torch.linspace(0.5, 9, n)
    arm = torch.stack((angle * angle.cos(), angle * angle.sin()), dim=1) / 9
    both = torch.cat((arm, -arm)) + 0.02 * torch.randn(2 * n, 2, generator=generator)
    return both.to(device), torch.nn.functional.one_hot(torch.arange(2).repeat_interleave(n), 2).float().to(device)


inputs, classes = spirals()
losses = {
    "cross entropy": torch.nn.functional.cross_entropy,
    "Poly-1, epsilon = 2": lambda z, t: torch.ops.my.poly_loss(z, t, epsilon=2.0),
}
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for (name, loss_of), colour in zip(losses.items(), ("#0072b2", "#d1495b"), strict=True):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2)
    ).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    right = []
    for _ in range(250):
        logits = network(inputs)
        loss_of(logits, classes).backward()
        optimizer.step()
        optimizer.zero_grad()
        right.append((logits.argmax(1) == classes.argmax(1)).float().mean().item())
    axis.plot(right, color=colour, label=name)
    print(f"{name}: {right[-1]:.0%} right after {len(right)} steps")
    assert right[-1] > 0.9
axis.set_xlabel("step")
axis.set_ylabel("share of points told apart")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## What to remember
#
# - Write the derivative for one element or row, without the upstream gradient. The product with it, the mean's $1/N$,
#   dtypes, strides and reductions are the same for every loss and come from the package.
# - Keep inputs for the backward, not intermediate results: memory is slow, arithmetic is not.
# - Shapes of the mathematics matter: `log1p`-like terms, a softmax's largest logit, `where` around what may overflow.
#   `torch_triton_ops.losses` has `softplus` and `log_sigmoid` that are right to the last bits.
# - A derivative is proved by finite differences in fp64, a kernel against the reference in fp64: `check_op` does both, and
#   on a GPU it runs the kernels themselves.
#
# ## Try
#
# 1. The Charbonnier loss, $\sqrt{d^2 + \epsilon^2}$: two functions and an entry.
# 2. Give `cauchy_loss` a gradient for `target` too: `gradients=("input", "target")`, two results of `derivative`, and
#    `bool[2] needs` as the last argument of the gradient op in the registry file.
# 3. Label noise: flip a tenth of the spirals' labels and compare the two losses again.
