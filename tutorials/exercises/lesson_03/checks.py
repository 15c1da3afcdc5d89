"""The hidden checks of lesson 3's exercises."""

from types import ModuleType

import torch

from triton_tutorial.exercises import CheckFailed, assert_close, device


def check_ex1(module: ModuleType) -> None:
    for n, slope in ((256, 0.1), (1, 0.1), (257, 0.0), (1000, 2.0)):
        x = torch.randn(n, device=device())
        expected = torch.nn.functional.leaky_relu(x, slope)
        assert_close(module.leaky_relu(x, slope), expected, f"leaky_relu(..., {slope}) of {n} elements: out")
    x = torch.tensor([float("nan"), -1.0, 0.0], device=device())
    expected = torch.nn.functional.leaky_relu(x, 0.5)
    assert_close(module.leaky_relu(x, 0.5), expected, "leaky_relu of [nan, -1, 0]: out")


def check_ex2(module: ModuleType) -> None:
    for m, n in ((8, 32), (1, 1), (9, 33), (3, 100), (40, 2)):
        x, c = torch.randn(m, n, device=device()), torch.randn(m, 1, device=device())
        assert_close(module.add_column(x, c), x + c, f"add_column of {m} x {n}: out")


def check_ex3(module: ModuleType) -> None:
    for m, n in ((3, 64), (2, 1), (2, 65), (4, 200)):
        x = torch.randn(m, n, device=device())
        assert_close(module.row_minimum(x), x.amin(-1), f"row_minimum of {m} x {n}: out")
        x = x.abs() + 1
        assert_close(module.row_minimum(x), x.amin(-1), f"row_minimum of {m} x {n}, all positive: out")


def check_ex4(module: ModuleType) -> None:
    for kind, x in (
        ("a contiguous", torch.randn(5, 17, device=device())),
        ("a sliced", torch.randn(5, 40, device=device())[:, :33]),
        ("a transposed", torch.randn(9, 6, device=device()).t()),
        ("an empty", torch.randn(0, 4, device=device())),
    ):
        scale = torch.randn(x.shape[0], device=device())
        assert_close(module.scale_rows(x, scale), x * scale[:, None], f"scale_rows of {kind} matrix: out")


def check_ex5(module: ModuleType) -> None:
    for n in (1, 257):
        x, y = torch.randn(n, device=device()), torch.randn(n, device=device())
        assert_close(module.add(x, y), x + y, f"add of {n} elements: out")
    x = torch.randn(2, 3, device=device())
    wrong = [
        (x[:1], x, ValueError, ("(2, 3)", "(1, 3)")),
        (x, x.new_ones(3, 2), ValueError, ("(3, 2)", "(2, 3)")),
        (x, x.half(), TypeError, ("float16", "float32")),
    ]
    for a, b, error, words in wrong:
        call = f"add of x {tuple(a.shape)}, {a.dtype} and y {tuple(b.shape)}, {b.dtype}"
        try:
            module.add(a, b)
        except error as raised:
            missing = [word for word in ("add", "y", *words) if word not in str(raised)]
            if missing:
                raise CheckFailed(f"{call}: the message {str(raised)!r} does not say {', '.join(missing)}") from None
        except Exception as raised:
            kind = type(raised).__name__
            raise CheckFailed(f"{call}: raised {kind}: {raised}; expected {error.__name__}") from None
        else:
            given = (
                f"y {tuple(b.shape)} and x {tuple(a.shape)}" if error is ValueError else f"y {b.dtype} and x {a.dtype}"
            )
            raise CheckFailed(f"add accepted {given}; expected {error.__name__}")
