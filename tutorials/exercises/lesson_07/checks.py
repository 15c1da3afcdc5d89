"""The hidden checks of lesson 7's exercises."""

from types import ModuleType

import torch

from triton_tutorial.exercises import CheckFailed, assert_close, device

D = 16


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, D, device=device())


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in fp64; hidden: (queries, keys). Rows that see nothing get out = 0 and lse = -inf."""
    s = (q.double() @ k.double().T * D**-0.5).masked_fill(hidden, -torch.inf)
    return torch.softmax(s, 1).nan_to_num() @ v.double(), torch.logsumexp(s, 1)


def check_ex1(module: ModuleType) -> None:
    cases = [
        ("merge of 40 queries", 40, 1.0, 0),
        ("merge of 1 query", 1, 1.0, 0),
        ("merge where some queries saw nothing in the second half", 40, 1.0, 5),
        ("merge where the scores are near 200", 33, 0.0, 0),
    ]
    for what, n, spread, blind in cases:
        q, k, v = rows(n), rows(48), rows(48)
        hidden = torch.zeros(n, 48, dtype=torch.bool, device=device())
        hidden[:blind, 24:] = True
        if not spread:  # equal queries along one axis: scores of 200 and a little
            q = torch.nn.functional.one_hot(torch.zeros(n, dtype=torch.long, device=device()), D).float()
            k[:, 0] = 800 + k[:, 0]
        halves = [attend(q, k[half], v[half], hidden[:, half]) for half in (slice(0, 24), slice(24, 48))]
        out, lse = module.merge_halves(*(x.float() for half in halves for x in half))
        wanted = attend(q, k, v, hidden)
        # lse near 200 is rounded to 1.5e-5 before the merge sees it
        assert_close(out, wanted[0].float(), f"{what}: out", rtol=1e-4, atol=1e-4)
        assert_close(lse, wanted[1].float(), f"{what}: lse", rtol=1e-5, atol=1e-5)


def check_ex2(module: ModuleType) -> None:
    def wanted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        place = torch.arange(q.shape[0], device=device())
        hidden = (place[None, :] > place[:, None]) | (place[None, :] <= place[:, None] - window)
        return attend(q, k, v, hidden)[0].float()

    for n, window in ((96, 20), (70, 1), (70, 64), (33, 1000), (1, 5)):
        q, k, v = rows(n), rows(n), rows(n)
        what = f"window of {window} keys, {n} queries: out"
        assert_close(module.windowed(q, k, v, window), wanted(q, k, v, window), what, rtol=1e-4, atol=1e-5)
    q, k, v = rows(128), rows(128), rows(128)
    expected = wanted(q, k, v, 16)[96:]
    k[:64], v[:64] = torch.nan, torch.nan
    found = module.windowed(q, k, v, 16)[96:]
    if found.isnan().any():
        raise CheckFailed(
            "window of 16 keys, 128 queries: queries 96 to 127 see keys 81 to 127, and the program that computes them read"
            " keys before 64: its loop begins too early"
        )
    assert_close(found, expected, "window of 16 keys: out of queries 96 to 127", rtol=1e-4, atol=1e-5)


def check_ex3(module: ModuleType) -> None:
    for n in (64, 33, 1):
        leaf, k, v, dout = rows(n).requires_grad_(), rows(n), rows(n), rows(n)
        hidden = torch.zeros(n, n, dtype=torch.bool, device=device())
        out, lse = attend(leaf, k, v, hidden)
        (wanted,) = torch.autograd.grad(out, leaf, dout.double())
        q, lse, delta = leaf.detach(), lse.detach().float(), (dout * out.detach()).sum(1).float()
        found = module.gradient_of_q(q, k, v, dout, lse, delta)
        factor = D**0.5
        if n > 1 and torch.allclose(found, wanted * factor, rtol=1e-3, atol=1e-4):
            raise CheckFailed(
                f"dq of {n} queries is {factor:.0f} times as large as it should be: s = SCALE * q @ k^T, so what comes back"
                f" through s passes that factor, 1 / {factor:.0f} here, too"
            )
        assert_close(found, wanted, f"dq of {n} queries: dq", rtol=1e-3, atol=1e-5)
