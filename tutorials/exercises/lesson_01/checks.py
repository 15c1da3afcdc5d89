"""The hidden checks of lesson 1's exercises."""

from types import ModuleType

import torch

from triton_tutorial.exercises import CheckFailed, assert_close, device


def check_ex1(module: ModuleType) -> None:
    for n in (128, 1, 127, 129, 1000):
        x, y = torch.randn(n, device=device()), torch.randn(n, device=device())
        # what lies around `out` belongs to somebody else
        around = torch.zeros(n + 256, device=device())
        out = around[128 : 128 + n]
        module.add(x, y, out)
        assert_close(out, x + y, f"add of {n} elements: out")
        strangers = torch.cat([around[:128], around[128 + n :]])
        if strangers.any():
            count = int(strangers.count_nonzero())
            raise CheckFailed(f"add of {n} elements: {count} elements behind the end of out were overwritten")


def check_ex2(module: ModuleType) -> None:
    for n, wanted in ((256, 1), (1, 1), (257, 2), (1000, 4)):
        got = module.programs(n)
        if got != wanted:
            elements, need = ("element needs" if n == 1 else "elements need"), f"{wanted} program{'s' * (wanted > 1)}"
            raise CheckFailed(f"programs({n}) is {got}; {n} {elements} {need} of {module.BLOCK_N}")
    for a, n in ((2.0, 1000), (-0.5, 257), (0.0, 1)):
        x, y = torch.randn(n, device=device()), torch.randn(n, device=device())
        assert_close(module.saxpy(a, x, y), a * x + y, f"saxpy({a}, ...) of {n} elements: out")


def check_ex3(module: ModuleType) -> None:
    for n in (256, 1, 64, 255, 1000):
        x = torch.randn(n, device=device())
        assert_close(module.double(x), 2 * x, f"double of {n} elements: out")
