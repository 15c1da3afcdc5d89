"""The hidden checks of lesson 5's exercises."""

from types import ModuleType

import torch

from triton_tutorial.exercises import CheckFailed, assert_close, device


def check_ex1(module: ModuleType) -> None:
    for m, n in ((3, 64), (1, 1), (4, 33)):
        x = torch.randn(m, n, device=device())
        assert_close(module.logsumexp(x), torch.logsumexp(x.double(), 1).float(), f"logsumexp of {m} rows of {n}: out")
    for gap in (5, 200, -200):  # exp(200) is infinite in fp32
        x = torch.randn(2, 64, device=device())
        x[:, 32:] += gap
        want = torch.logsumexp(x.double(), 1).float()
        assert_close(module.logsumexp(x), want, f"logsumexp of rows whose halves differ by {abs(gap)}: out")


def check_ex2(module: ModuleType) -> None:
    for shape in ((3, 64), (1, 1), (4, 33)):
        x = torch.randn(shape, device=device())
        assert_close(module.log_softmax(x), torch.log_softmax(x, 1), f"log_softmax of {shape[0]} rows of {shape[1]}: y")
    x = torch.randn(2, 40, device=device())
    x[:, 7] -= 200
    what = "log_softmax of rows with an element far below the rest: y"
    assert_close(module.log_softmax(x), torch.log_softmax(x, 1), what)
    x = torch.randn(2, 40, device=device()).half()
    assert_close(module.log_softmax(x), torch.log_softmax(x.double(), 1).half(), "log_softmax of float16 rows: y")


def check_ex3(module: ModuleType) -> None:
    cases = [
        (32, 4, 0, 16, "warps and programs", "64 warps hold 16 programs of 4"),
        (16, 1, 0, 32, "warps and programs", "no more than 32 programs fit, however small"),
        (
            158,
            4,
            16,
            3,
            "registers",
            "a warp takes 158 * 32 = 5056 registers, rounded up to 5120, and 65536 hold 12 warps",
        ),
        (
            33,
            8,
            0,
            6,
            "registers",
            "a warp takes 33 * 32 = 1056 registers, rounded up to 1280, and 65536 hold 51 warps",
        ),
        (48, 16, 131136, 1, "shared memory", "131136 + 1024 bytes of 233472 fit once"),
        (32, 8, 48 * 1024, 4, "shared memory", "49152 + 1024 bytes of 233472 fit four times"),
    ]
    for registers, warps, shared, wanted, limit, why in cases:
        call = f"({registers}, {warps}, {shared})"
        got = module.programs_per_sm(registers, warps, shared)
        if got != wanted:
            raise CheckFailed(f"programs_per_sm{call} is {got}; expected {wanted}: {why}")
        found = module.limited_by(registers, warps, shared)
        if found != limit:
            raise CheckFailed(f"limited_by{call} is {found!r}; expected {limit!r}: {why}")
