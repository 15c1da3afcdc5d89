"""The hidden checks of lesson 8's exercises."""

from types import ModuleType

import torch

from triton_tutorial.exercises import CheckFailed, assert_close, device


def check_ex1(module: ModuleType) -> None:
    for m, n, programs in ((7, 33, 3), (4, 64, 4), (1, 1, 2), (9, 16, 1)):
        dy, xhat = (torch.randn(m, n, device=device()) for _ in range(2))
        got = module.weight_gradient(dy, xhat, programs)
        last = sum(dy[row] * xhat[row] for row in range(max(m - programs, 0), m))
        if m > programs and got.shape == last.shape and torch.allclose(got, last, atol=1e-5):
            raise CheckFailed(
                f"{m} rows, {programs} programs: the sum holds only one row of each program, its last row: dweight is overwritten"
                " in the loop where it should be added to"
            )
        assert_close(got, (dy * xhat).sum(0), f"weight_gradient of {m} rows of {n} by {programs} programs: dweight")
    dy, xhat = (torch.randn(6, 40, device=device()).half() for _ in range(2))
    exact = (dy.double() * xhat.double()).sum(0)
    assert_close(module.weight_gradient(dy, xhat, 2), exact.float(), "weight_gradient of float16 rows: dweight")


def check_ex2(module: ModuleType) -> None:
    for m, d in ((3, 16), (1, 2), (4, 34)):
        x = torch.randn(m, d, device=device(), requires_grad=True)
        angles = torch.randn(m, d // 2, device=device())
        cos, sin = angles.cos(), angles.sin()
        x1, x2 = x[:, 0::2], x[:, 1::2]
        out = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(1)
        dout = torch.randn_like(out)
        (want,) = torch.autograd.grad(out, x, dout)
        got = module.backward(dout, cos, sin)
        forward = module.rope(dout, cos, sin)
        if got.shape == forward.shape and torch.equal(got, forward):
            raise CheckFailed(
                f"backward of {m} rows of {d}: dout was turned forward, by rope's own angle; the gradient goes the other way:"
                " backward(rope(x)) must be x"
            )
        assert_close(got, want, f"backward of {m} rows of {d}: dx")


def check_ex3(module: ModuleType) -> None:
    for m, v, ignored in ((4, 33, ()), (5, 64, (1, 3)), (3, 1, (0,)), (6, 100, (0, 5))):
        logits = torch.randn(m, v, device=device(), requires_grad=True)
        target = torch.randint(0, v, (m,), device=device())
        for row in ignored:
            target[row] = -100
        (want,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits)
        got = module.gradient(logits.detach(), target)
        case = f"gradient of {m}x{v} logits, of which {m - len(ignored)} rows count"
        for row in ignored:
            if got.shape == want.shape and bool(got[row].any()):
                i = int(got[row].nonzero()[0])
                raise CheckFailed(
                    f"{case}: dlogits[{row}, {i}] is {got[row, i].item():.6g}, but row {row} does not count (its target is -100):"
                    " its gradient is 0"
                )
        if v > 1 and ignored and torch.allclose(got * m, want * (m - len(ignored)), atol=1e-6):
            raise CheckFailed(f"{case}: divided by all {m} rows; the mean is over the {m - len(ignored)} that count")
        assert_close(got, want, f"{case}: dlogits")
