"""The hidden checks of lesson 4's exercises."""

from types import ModuleType

import torch

from triton_tutorial.exercises import assert_close, device

SIZES = ((32, 32, 64), (1, 1, 1), (33, 20, 70), (5, 65, 31))


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device(), dtype=torch.float16)


def check_ex1(module: ModuleType) -> None:
    for M, N, K in SIZES:
        a, b = rand(M, K), rand(K, N)
        assert_close(module.matmul(a, b), a.double() @ b.double(), f"matmul of ({M}, {K}) by ({K}, {N}): out")
    a, b = rand(70, 40).t(), rand(24, 70).t()
    assert_close(module.matmul(a, b), a.double() @ b.double(), "matmul of two transposed matrices, K = 70: out")


def check_ex2(module: ModuleType) -> None:
    for M, N, K in SIZES:
        x, weight = rand(M, K), rand(N, K)
        what = f"linear of x ({M}, {K}) and weight ({N}, {K}): out"
        assert_close(module.linear(x, weight), x.double() @ weight.double().t(), what)


def check_ex3(module: ModuleType) -> None:
    for M, N, K in SIZES:
        x, weight, bias = rand(M, K), rand(N, K), rand(N) * 4
        expected = torch.relu(x.double() @ weight.double().t() + bias.double())
        what = f"linear_relu of x ({M}, {K}) and weight ({N}, {K}): out"
        assert_close(module.linear_relu(x, weight, bias), expected, what)
