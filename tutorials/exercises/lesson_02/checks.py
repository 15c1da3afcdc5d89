"""The hidden checks of lesson 2's exercises."""

from types import ModuleType

import torch

from triton_tutorial.exercises import CheckFailed, assert_close, device


def check_ex1(module: ModuleType) -> None:
    def matrix(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, device=device())

    cases = {
        "a contiguous (17, 33) matrix": matrix(17, 33),
        "a transposed (33, 17) matrix": matrix(17, 33).t(),
        "a transposed (33, 17) matrix of bfloat16": matrix(17, 33).t().bfloat16(),
        "every second column of a matrix": matrix(20, 18)[:, ::2],
        "every third row of a matrix": matrix(18, 16)[::3],
        "one row, expanded to five": matrix(1, 7).expand(5, 7),
        "a (1, 1) matrix": matrix(1, 1),
    }
    for name, x in cases.items():
        assert_close(module.copy(x), x, f"copy of {name}: out")


def check_ex2(module: ModuleType) -> None:
    for stride, itemsize, first in (
        (1, 4, 0),
        (1, 2, 0),
        (2, 4, 0),
        (8, 4, 0),
        (9, 4, 0),
        (100, 1, 0),
        (0, 4, 0),
        (1, 4, 1),
        (3, 2, 5),
        (1, 8, 3),
    ):
        touched = {(first + lane * stride) * itemsize // 32 for lane in range(32)}
        got = module.sectors(stride, itemsize, first)
        if got != len(touched):
            last = (first + 31 * stride) * itemsize
            raise CheckFailed(
                f"sectors(stride={stride}, itemsize={itemsize}, first={first}) is {got}; 32 lanes from byte {first * itemsize}"
                f" to byte {last} are in {len(touched)} sectors"
            )


def check_ex3(module: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, limit, scale in ((256, 100, 0.5), (1000, 1_000_000, 0.01), (1, 1_000_000, 0.001), (257, 60_000, 0.125)):
        q = torch.randint(-limit, limit, (n,), dtype=torch.int32, generator=generator).to(device())
        want = (q.double() * scale).half()
        assert_close(module.dequantize(q, scale), want, f"dequantize of {n} integers up to {limit}, scale {scale}: out")
