"""The hidden checks of lesson 6's exercises."""

from types import ModuleType

import torch

from triton_tutorial.exercises import CheckFailed, assert_close, device


def check_ex1(module: ModuleType) -> None:
    for n in (1000, 1, 256, 257):
        x, y, z = (torch.randn(n, device=device(), dtype=torch.float16) for _ in range(3))
        out = module.sub_mul(x, y, z)
        exact = (x.double() - y.double()) * z.double()
        assert_close(out, exact.half(), f"sub_mul of {n} elements: out", rtol=4e-3, atol=4e-3)
        # one rounding of fp16: half of 2^-10 of the value
        bad = ((out.double() - exact).abs() > 2.0**-11 * 1.001 * exact.abs() + 2.0**-24).nonzero()
        if bad.numel():
            i = int(bad[0])
            raise CheckFailed(
                f"sub_mul of {n} elements: out[{i}] is {out[i].item():.6g}, exactly {exact[i].item():.6g}; the nearest fp16"
                f" number is {exact[i].half().item():.6g}, so it was rounded more than once"
            )


def check_ex2(module: ModuleType) -> None:
    for m, n in ((8, 64), (1, 1), (5, 33), (9, 130)):
        x, bias = torch.randn(m, n, device=device()), torch.randn(n, device=device())
        assert_close(module.bias_relu(x, bias), torch.relu(x + bias), f"bias_relu of {m}x{n}: out")


def check_ex3(module: ModuleType) -> None:
    for n, p, seed in ((1000, 0.5, 3), (257, 0.1, 2**20)):
        kept = module.dropout(torch.ones(n, device=device()), p, seed) != 0
        dout = torch.randn(n, device=device())
        dx = module.backward(dout, p, seed)
        if dx.shape != dout.shape:
            raise CheckFailed(f"backward of {n} elements has shape {tuple(dx.shape)}; x has {tuple(dout.shape)}")
        stray = ((dx != 0) & ~kept).nonzero()
        if stray.numel():
            i = int(stray[0])
            raise CheckFailed(
                f"backward of {n} elements, p = {p}: dx[{i}] is {dx[i].item():.6g}, but the forward dropped element {i}:"
                " its gradient is 0"
            )
        if torch.equal(dx[kept], dout[kept]):
            raise CheckFailed(
                f"backward of {n} elements, p = {p}: the right elements, not scaled; the forward divides by 1 - p, and so"
                " must the backward"
            )
        assert_close(dx, torch.where(kept, dout / (1 - p), 0.0), f"backward of {n} elements, p = {p}: dx")
