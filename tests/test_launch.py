"""Prepared launches: what reaches the C function, without a GPU. Kernels themselves run in the other tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_triton_ops import launch as launching
from torch_triton_ops.launch import Plans, Prepared, descriptor, recording


class FakeKernel:
    __name__ = "fake"
    arg_names: tuple[str, ...] = ()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What was compiled (the arguments of Triton's own way) and what was started directly, on a device that is none."""
    calls: dict[str, list[Any]] = {"compiled": [], "direct": []}
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # what a CPU tensor calls its device
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)

    def find(kernel: Any, grid: Any, args: Any, warps: int, stages: int, constexprs: Any, device: int) -> Any:
        calls["compiled"].append((grid, args, warps, stages, constexprs))
        boxes = [a for a in args if isinstance(a, launching.Descriptor)]
        return (
            lambda *given: calls["direct"].append(given),
            ("head",),
            ("tail",),
            [f"meta{i}" for i in range(len(boxes))],
            {},
        )

    def make_parts(value: Any, meta: str, encoded: dict[Any, Any], key: Any) -> list[Any]:
        encoded[key] = [(meta, value.base.data_ptr(), value.shape, value.strides, value.block_shape), "more"]
        return encoded[key]

    monkeypatch.setattr(launching, "_launch_and_find", find)
    monkeypatch.setattr(launching, "_make_parts", make_parts)
    return calls


def test_the_first_call_compiles_and_the_next_start_directly(started: dict[str, list[Any]]) -> None:
    x, y, out = torch.zeros(3, 8)
    prepared = Prepared(FakeKernel(), (5, 2), x, None, y, 3, out, 0.5, num_warps=8, BLOCK=4)
    prepared(x, y, out)
    assert started["compiled"] == [((5, 2), (x, None, y, 3, out, 0.5), 8, 3, {"BLOCK": 4})]
    assert not started["direct"]
    a, b, c = torch.zeros(3, 8)
    prepared(a, b, c)
    pointers = a.data_ptr(), None, b.data_ptr(), 3, c.data_ptr(), 0.5
    assert started["direct"] == [(5, 2, 1, 7, "head", *pointers, "tail")]
    assert len(started["compiled"]) == 1


def test_an_unaligned_pointer_is_another_specialisation(started: dict[str, list[Any]]) -> None:
    x = torch.zeros(9)
    assert x.data_ptr() % 16 == 0
    prepared = Prepared(FakeKernel(), (1,), x)
    for tensor in (x, x[1:], x[4:], x[1:]):
        prepared(tensor)
    assert [args[1][0].data_ptr() for args in started["compiled"]] == [x.data_ptr(), x[1:].data_ptr()]
    assert [given[5] for given in started["direct"]] == [x[4:].data_ptr(), x[1:].data_ptr()]


def test_descriptors_are_encoded_once_for_each_address(started: dict[str, list[Any]]) -> None:
    x, w, out = torch.zeros(4, 8), torch.zeros(8, 6), torch.zeros(4, 6)
    prepared = Prepared(FakeKernel(), (1,), descriptor(x, (2, 8)), descriptor(w.t(), (3, 8)), None, out, 11)
    assert prepared.args == [None, None, None, None, 11], "no tensor is kept alive"
    prepared(x, w, out)
    prepared(x, w, out)  # w, not w.t(): the described view is remembered
    described = ("meta0", x.data_ptr(), (4, 8), (8, 1), (2, 8)), ("meta1", w.data_ptr(), (6, 8), (1, 6), (3, 8))
    values = described[0], "more", described[1], "more", None, out.data_ptr(), 11
    assert started["direct"] == [(1, 1, 1, 7, "head", *values, "tail")]
    other = torch.zeros(4, 8)
    prepared(other, w, out)
    assert started["direct"][1][5] == ("meta0", other.data_ptr(), (4, 8), (8, 1), (2, 8))
    assert len(prepared.encoded) == 3


def test_a_profilers_hook_gets_tritons_own_way(started: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8)
    prepared = Prepared(FakeKernel(), (1,), x)
    prepared(x)
    monkeypatch.setattr(launching._HOOKS[0], "calls", [print])
    prepared(x)
    assert (len(started["compiled"]), len(started["direct"])) == (2, 0)
    monkeypatch.undo()


def test_recorded_as_launch_records() -> None:
    x = torch.empty(4, 8, device="meta")
    with recording(90) as found:
        Prepared(FakeKernel(), (1, 3), descriptor(x, (2, 8)), x, 5, num_stages=4, BLOCK=2)(x, x)
    [made] = found.launches
    assert (made.grid, made.args[1:], made.constexprs) == ((1, 3), (x, 5), {"BLOCK": 2})
    assert (made.args[0].base, made.args[0].shape, made.options) == (x, (4, 8), {"num_warps": 4, "num_stages": 4})


def test_plans_are_bounded_and_not_used_while_launches_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plans, "LIMIT", 2)
    plans = Plans()
    assert plans.find("a") is None
    assert plans.keep("a", 1) == plans.find("a") == 1
    with recording(80):
        assert plans.find("a") is None
        assert plans.keep("b", 2) == 2
    assert plans.find("b") is None
    plans.keep("b", 2)
    plans.keep("c", 3)
    assert dict(plans) == {"c": 3}
