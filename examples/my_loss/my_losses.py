"""Two losses of one's own, each from its value and its derivative: one of elements, one of rows.

log_cosh_loss: log(cosh(scale * d)) / scale**2 with d = input - target; by input tanh(scale * d) / scale, by target the negative.
Near 0 it is d**2 / 2, far from it |d| / scale.

brier_loss: of a row of logits and its label, sum_c (p[c] - [c == label])**2 with p = softmax(logits);
by logits[c] it is 2 * p[c] * (e[c] - sum_k p[k] * e[k]) with e[c] = p[c] - [c == label].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from torch_triton_ops.losses import elementwise_loss, row_loss, softplus

# -- a loss of elements -----------------------------------------------------------------------------------------------


@triton.jit
def log_cosh_value(input, target, scale: tl.constexpr = 1.0):
    x = tl.abs(scale * (input - target))
    # cosh itself would overflow
    return (x + softplus(-2.0 * x) - 0.6931471805599453) / (scale * scale)


@triton.jit
def log_cosh_derivative(input, target, scale: tl.constexpr = 1.0):
    slope = (2.0 * tl.sigmoid(2.0 * scale * (input - target)) - 1.0) / scale  # tanh(scale * d) / scale
    return slope, -slope


elementwise_loss(
    "my::log_cosh_loss",
    log_cosh_value,
    log_cosh_derivative,
    globals(),
    gradients=("input", "target"),
    options=[{"scale": 2.5}],
)


# -- a loss of rows ---------------------------------------------------------------------------------------------------


@triton.jit
def softmax_of_row(logits, column, columns):
    z = tl.where(column < columns, logits, float("-inf"))  # a row is padded with zeros
    e = tl.exp(z - tl.max(z, axis=1, keep_dims=True))
    return e / tl.sum(e, axis=1, keep_dims=True)


@triton.jit
def brier_value(logits, label, column, columns):
    e = softmax_of_row(logits, column, columns) - tl.where(column == label, 1.0, 0.0)
    return tl.sum(e * e, axis=1, keep_dims=True)


@triton.jit
def brier_derivative(logits, label, column, columns):
    p = softmax_of_row(logits, column, columns)
    e = p - tl.where(column == label, 1.0, 0.0)
    return 2.0 * p * (e - tl.sum(p * e, axis=1, keep_dims=True))


def brier_inputs(shape, device, dtype):
    logits = 2 * torch.randn(shape, device=device, dtype=dtype)
    return logits, torch.randint(0, shape[-1], shape[:-1], device=device)


row_loss("my::brier_loss", brier_value, brier_derivative, globals(), per_row=["label"], inputs=brier_inputs)
