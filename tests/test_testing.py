"""check_op itself: a right op passes every check; each kind of broken op fails the check that is there to catch it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from torch_triton_ops import registry, testing
from torch_triton_ops.cases import ErrorSample, Sample
from torch_triton_ops.testing import CHECKS, check_op

LIBRARY = torch.library.Library("tt_test_testing", "DEF")


def samples(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    yield Sample("4x5", (torch.randn(4, 5, device=device, dtype=dtype),))
    yield Sample("7x3", (torch.randn(7, 3, device=device, dtype=dtype),))
    yield Sample("1x1", (torch.randn(1, 1, device=device, dtype=dtype),))
    yield Sample("0x3", (torch.randn(0, 3, device=device, dtype=dtype),))


def double(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).contiguous()


def square(x: torch.Tensor) -> torch.Tensor:
    return (x * x).contiguous()


def empty_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def define(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any] | None = empty_like,
    backward: Callable[..., Any] | None = None,
    schema: str = "(Tensor x) -> Tensor",
    once: bool = True,
) -> Any:
    """An op in this test's namespace. `backward(x, grad)` makes it differentiable; without it a gradient raises."""
    qualname = f"tt_test_testing::{name}"
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(qualname, fake, lib=LIBRARY)
    op = getattr(torch.ops.tt_test_testing, name).default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: torch.Tensor) -> Any:
            if backward is None:
                ctx.set_materialize_grads(False)
            else:
                ctx.save_for_backward(args[0])
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            if backward is None:
                raise NotImplementedError(f"{name} has no gradient")
            return backward(*ctx.saved_tensors, grad)

    if once:
        Function.backward = staticmethod(torch.autograd.function.once_differentiable(Function.backward))  # type: ignore[method-assign]
    LIBRARY.impl(name, lambda *args: Function.apply(*args), "Autograd")
    return op


def failures(op: Any, check: str, reference: Callable[..., Any] = double, **options: Any) -> str:
    """Run one check, which must fail; what it said."""
    options.setdefault("samples", list(samples()))
    report = check_op(op, reference=reference, checks=[check], **options)
    assert report.failures, f"{check} did not catch it:\n{report}"
    assert {r.check for r in report.failures} == {check}
    with pytest.raises(AssertionError, match=check):
        report.raise_if_failed()
    return "\n".join(r.detail for r in report.failures)


RIGHT = define("right", double, backward=lambda x, g: g * 2)
RIGHT_SQUARE = define("right_square", square, backward=lambda x, g: 2 * x * g)
RIGHT_TWICE = define("right_twice", square, backward=lambda x, g: 2 * x * g, once=False)


@pytest.mark.parametrize("reference", [double, None], ids=["reference", "no_reference"])
def test_a_right_op_passes_every_check(reference: Callable[..., Any] | None) -> None:
    wrong = [ErrorSample("no_tensor", (3,), error=RuntimeError, match="right")]
    report = check_op(RIGHT, list(samples()), reference=reference, error_samples=wrong)
    report.raise_if_failed()
    assert {r.check for r in report.results} == set(CHECKS), "a check was skipped in silence"
    assert {r.check for r in report.skipped} >= {"host_sync", "cuda_graph"}
    assert all(r.detail for r in report.skipped), "a skip without a reason"
    assert "no_gradient" in str(report)
    assert "CUDA only" in str(report)


def test_dtypes_and_samples_by_function() -> None:
    report = check_op("tt_test_testing::right_square", samples, reference=square, checks=["values", "gradients"])
    report.raise_if_failed()
    assert {r.sample for r in report.results} >= {"fp32-4x5", "fp16-4x5", "bf16-4x5"}
    report = check_op(RIGHT_SQUARE, list(samples()), reference=square, dtypes=[torch.bfloat16], checks=["values"])
    assert [r.sample for r in report.results] == ["bf16-4x5", "bf16-7x3", "bf16-1x1", "bf16-0x3"]


def test_double_backward_may_be_right() -> None:
    report = check_op(RIGHT_TWICE, list(samples()), reference=square, checks=["double_backward"])
    report.raise_if_failed()
    assert "raises" not in report.results[0].detail


def test_custom_op_of_torch_library() -> None:
    @torch.library.custom_op("tt_test_custom::double", mutates_args=())
    def custom(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous() * 2

    custom.register_fake(lambda x: x.new_empty(x.shape))
    custom.register_autograd(lambda ctx, g: g * 2)
    check_op(custom, list(samples()), reference=double).raise_if_failed()


def test_declared_mutation_is_compared() -> None:
    def add_(x: torch.Tensor, y: torch.Tensor) -> None:
        x.add_(y)

    calls = [Sample("4x5", (torch.randn(4, 5), torch.randn(4, 5)))]
    op = define("add_", add_, lambda x, y: None, schema="(Tensor(a!) x, Tensor y) -> ()")
    checks = ["values", "schema", "fake", "guard", "repeat", "strides"]
    check_op(op, calls, reference=add_, differentiable=(), checks=checks).raise_if_failed()
    twice = define(
        "add_twice_", lambda x, y: add_(x, 2 * y), lambda x, y: None, schema="(Tensor(a!) x, Tensor y) -> ()"
    )
    found = failures(twice, "values", add_, samples=calls, differentiable=())
    assert found.startswith("x[0, 0] is")


def test_wrong_values_name_the_first_bad_element() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        out = double(x)
        if x.shape == (4, 5):
            out[2, 3] += 0.5
        return out

    found = failures(define("wrong_values", kernel), "values")
    assert found.startswith("output 0[2, 3] is ")
    assert "expected" in found
    assert "+-" in found


def test_error_a_little_above_torchs_own() -> None:
    reference = torch.ops.aten.logsumexp.default
    calls = [Sample("64x1000", (torch.randn(64, 1000), [-1]))]
    schema = "(Tensor x, int[] dim) -> Tensor"
    good = define("lse", lambda x, dim: torch.logsumexp(x, dim), None, schema=schema)
    check_op(good, calls, reference=reference, differentiable=(), checks=["values"]).raise_if_failed()
    coarse = define("lse_half", lambda x, dim: torch.logsumexp(x, dim).bfloat16().to(x.dtype), None, schema=schema)
    failures(coarse, "values", reference, samples=calls, differentiable=())


def test_nan() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x == x.max(), torch.nan, double(x)) if x.numel() else double(x)

    assert " is nan, expected" in failures(define("nan", kernel), "values")


def test_missing_infinity() -> None:
    calls = [Sample("inf", (torch.tensor([1.0, torch.inf, -torch.inf, torch.nan]),))]
    check_op(RIGHT, calls, reference=double, checks=["values", "gradients", "guard"]).raise_if_failed()
    clamped = define("clamped", lambda x: double(x).clamp(-3e38, 3e38))
    assert "output 0[1]" in failures(clamped, "values", samples=calls)


def test_wrong_fake_stride() -> None:
    op = define("fake_stride", double, lambda x: torch.empty_like(x.mT).mT)
    assert "the fake's strides are (1, 4), the op's (5, 1)" in failures(op, "fake")
    assert "stride" in failures(op, "opcheck").lower()


def test_fake_that_follows_the_strides_of_the_input() -> None:
    op = define("fake_like", double, torch.empty_like)
    assert "transposed" in failures(op, "fake")


def test_wrong_fake_dtype_and_shape() -> None:
    assert "dtype is torch.float64" in failures(
        define("fake_dtype", double, lambda x: x.new_empty(x.shape).double()), "fake"
    )
    assert "shape" in failures(define("fake_shape", double, lambda x: x.new_empty(x.shape[:1])), "fake")


def test_undeclared_mutation() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        out = double(x)
        x.zero_()
        return out

    op = define("mutates", kernel)
    assert "argument 'x' was changed, which the schema does not declare" in failures(op, "schema")
    failures(op, "opcheck")


def test_returned_alias() -> None:
    op = define("alias", lambda x: x.view(x.shape), lambda x: x.new_empty(x.shape))
    assert "output 0 shares memory with argument 'x'" in failures(op, "schema", lambda x: x.clone())


def test_backward_that_overwrites_the_upstream_gradient() -> None:
    op = define("mutating_backward", double, backward=lambda x, g: g.mul_(2))
    assert "upstream gradient was changed" in failures(op, "schema")


def _with_bounds(write: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], torch.Tensor]:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape)
        out.copy_(x * 2)
        write(out)
        return out

    return kernel


def test_out_of_bounds_write() -> None:
    def past_the_end(out: torch.Tensor) -> None:
        room = out.untyped_storage().nbytes() // 4 - out.storage_offset()
        if room > out.numel():  # only a guarded allocation has memory there
            out.as_strided((out.numel() + 1,), (1,))[-1] = 7.0

    def before_the_start(out: torch.Tensor) -> None:
        if out.storage_offset() >= 2:
            out.as_strided((1,), (1,), out.storage_offset() - 2).fill_(7.0)

    found = failures(define("past_the_end", _with_bounds(past_the_end)), "guard")
    assert "out-of-bounds write: element 20 of new_empty of torch.float32 (4, 5), which has 20, was set to 7.0" in found
    found = failures(define("before_the_start", _with_bounds(before_the_start)), "guard")
    assert "element -2 of" in found


def test_unwritten_elements() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        if x.numel() > 1:
            out.view(-1)[:-1] = 2 * x.reshape(-1)[:-1]
        else:
            out.copy_(2 * x)
        return out

    op = define("unwritten", kernel)
    found = failures(op, "guard")
    assert "output 0[3, 4] is nan" in found
    assert "never written" in found
    assert "never written" in failures(op, "guard", reference=None)


def test_patched_allocations_are_put_back() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("broken")

    functions = [getattr(torch, name) for name in testing._Guard.FUNCTIONS]
    methods = [vars(torch.Tensor).get(name) for name in testing._Guard.METHODS]
    assert "KeyError" in failures(define("raises", kernel), "guard")
    assert functions == [getattr(torch, name) for name in testing._Guard.FUNCTIONS]
    assert methods == [vars(torch.Tensor).get(name) for name in testing._Guard.METHODS]


def test_wrong_gradient() -> None:
    op = define("wrong_gradient", square, backward=lambda x, g: 3 * x * g)
    assert "gradient of x[0, 0] is" in failures(op, "gradients", square)
    assert "Jacobian mismatch" in failures(op, "gradcheck", square)


def test_gradient_wrong_for_expanded_upstream() -> None:
    def backward(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return 2 * x * (g if g.is_contiguous() else g.flatten()[:1] * 1.5)

    assert "expanded upstream gradient" in failures(define("expanded", square, backward=backward), "gradients", square)


def test_gradient_that_reads_a_transposed_upstream_as_contiguous() -> None:
    def backward(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        reads = g.ndim == 2 and g.stride(0) == 1 and g.shape[0] > 1
        return 2 * x * (g.mT.reshape(g.shape) if reads else g)

    found = failures(define("flat_upstream", square, backward=backward), "gradients", square)
    assert "transposed upstream gradient" in found


def test_gradient_only_right_if_every_input_needs_one() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, y)
            with torch._C._AutoDispatchBelowAutograd():
                return torch.ops.tt_test_testing.product(x, y)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            x, y = ctx.saved_tensors
            return g * (y if ctx.needs_input_grad[1] else x), g * x

    LIBRARY.define("product(Tensor x, Tensor y) -> Tensor")
    LIBRARY.impl("product", lambda x, y: (x * y).contiguous(), "CompositeExplicitAutograd")
    LIBRARY.impl("product", lambda x, y: Product.apply(x, y), "Autograd")
    calls = [Sample("4x5", (torch.randn(4, 5), torch.randn(4, 5)))]
    found = failures("tt_test_testing::product", "gradients", lambda x, y: x * y, samples=calls)
    assert "only x requires a gradient" in found


def test_gradient_cut_silently() -> None:
    LIBRARY.define("cut(Tensor x) -> Tensor")
    LIBRARY.impl("cut", double, "CompositeExplicitAutograd")

    def below(x: torch.Tensor) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.tt_test_testing.cut(x)

    LIBRARY.impl("cut", below, "Autograd")
    assert "cut silently" in failures("tt_test_testing::cut", "gradients")
    assert "cut silently" in failures("tt_test_testing::cut", "no_gradient", differentiable=())


def test_strides_ignored() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        flat = x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,))
        return (flat * 2).reshape(x.shape)  # right only for contiguous memory

    op = define("ignores_strides", kernel)
    found = failures(op, "strides")
    assert "transposed: output 0[0, 1] is" in found
    assert "transposed" in failures(op, "strides", reference=None)


def test_strides_refused_by_name_are_no_failure() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        if not x.is_contiguous():
            raise ValueError("tt_test_testing::refuses: argument 'x' is not contiguous; allowed: contiguous")
        return double(x)

    report = check_op(
        define("refuses", kernel), list(samples()), reference=double, differentiable=(), checks=["strides"]
    )
    report.raise_if_failed()
    assert "refused" in report.results[0].detail


def test_nondeterministic_result() -> None:
    op = define("nondeterministic", lambda x: double(x) + torch.rand(()) * 1e-6)
    assert "elements differ" in failures(op, "repeat", differentiable=())
    op = define("nondeterministic_gradient", double, backward=lambda x, g: g * 2 + torch.rand(()) * 1e-6)
    assert "gradient of x[0, 0]" in failures(op, "repeat")


def test_internal_op_silently_differentiable() -> None:
    LIBRARY.define("square_bwd(Tensor x, Tensor g) -> Tensor")
    LIBRARY.impl("square_bwd", lambda x, g: 2 * x * g, "CompositeExplicitAutograd")
    op = define("leaky", square, backward=torch.ops.tt_test_testing.square_bwd)
    found = failures(op, "no_gradient", square)
    assert "internal op tt_test_testing.square_bwd.default" in found
    assert "silently" in found


def test_internal_op_with_a_wrong_fake() -> None:
    LIBRARY.define("triple_bwd(Tensor x, Tensor g) -> Tensor")
    LIBRARY.impl("triple_bwd", lambda x, g: 3 * g, "CompositeExplicitAutograd")
    torch.library.register_fake("tt_test_testing::triple_bwd", lambda x, g: g.new_empty(g.shape[:1]), lib=LIBRARY)
    op = define("triple", lambda x: (3 * x).contiguous(), backward=torch.ops.tt_test_testing.triple_bwd)
    assert "internal op tt_test_testing.triple_bwd" in failures(op, "fake", lambda x: 3 * x)


def test_double_backward_silently_zero() -> None:
    op = define("zero_second", square, backward=lambda x, g: (2 * x * g).detach(), once=False)
    assert "second derivative by x[0, 0] is 0.0" in failures(op, "double_backward", square)


def test_wrong_forward_mode() -> None:
    LIBRARY.define("half_tangent(Tensor x) -> Tensor")
    LIBRARY.impl("half_tangent", lambda x: x.contiguous() + x.detach(), "CompositeImplicitAutograd")
    assert "tangent of output 0[0, 0] is" in failures("tt_test_testing::half_tangent", "forward_mode")


def test_compiled_result_differs_from_eager() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return double(x) * (3 if torch.compiler.is_compiling() else 1)

    LIBRARY.define("compiled(Tensor x) -> Tensor")
    LIBRARY.impl("compiled", kernel, "CompositeImplicitAutograd")
    assert "aot_eager, static" in failures("tt_test_testing::compiled", "compile")


def test_no_fake_at_all() -> None:
    LIBRARY.define("no_fake(Tensor x) -> Tensor")
    LIBRARY.impl("no_fake", double, "CPU")
    options: dict[str, Any] = {"samples": list(samples()), "differentiable": ()}
    for check in ("fake", "opcheck", "compile"):
        assert "no_fake" in failures("tt_test_testing::no_fake", check, **options)


def test_errors_that_do_not_come_or_say_the_wrong_thing() -> None:
    wrong = [
        ErrorSample("accepted", (torch.randn(3),)),
        ErrorSample("other_type", (3,), error=KeyError),
        ErrorSample("other_words", (3,), error=RuntimeError, match="no such words"),
    ]
    found = failures(RIGHT, "errors", error_samples=wrong)
    assert "raises nothing, expected ValueError" in found
    assert "expected KeyError" in found
    assert "must match 'no such words'" in found


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="unknown check 'speed'"):
        check_op(RIGHT, list(samples()), checks=["speed"])
    with pytest.raises(ValueError, match="needs samples"):
        check_op(RIGHT)
    with pytest.raises(ValueError, match=r"no op 'tt_test_testing::missing'"):
        check_op("tt_test_testing::missing", list(samples()))
    with pytest.raises(ValueError, match=r"no torch.library op"):
        check_op(double, list(samples()))
    report = check_op(RIGHT, [], reference=double, checks=["values"])
    assert not report.passed, "nothing was checked, so nothing is proved"


def test_a_run_that_was_cut_off_goes_on(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--op", "vector_add", "--device", "cpu", "--check", "schema", "--jobs", "2", "--resume", str(tmp_path)]
    assert testing.main(command) == 0
    kept = sorted(tmp_path.iterdir())
    assert [f.name.split("-")[:3] for f in kept] == [["vector_add", d, "0"] for d in ("bfloat16", "float16", "float32")]
    kept[0].write_text(json.dumps([1.0, ["schema", "bf16-planted", False, "taken over"]]))
    kept[2].unlink()
    assert testing.main(command) == 1
    assert "schema [bf16-planted]: taken over" in capsys.readouterr().out  # what was found is not run again,
    assert kept[2].is_file()  # and what was not is
    with pytest.raises(SystemExit):
        testing.main(command[:-4] + command[-2:])
    assert "give --jobs 2 or more" in capsys.readouterr().err


def test_record_and_status(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record.json"
    only = [registry.spec("vector_add")]
    monkeypatch.setattr(registry, "specs", lambda *_: only)
    command = ["--op", "vector_add", "--device", "cpu", "--record", str(record)]
    with pytest.raises(SystemExit):
        testing.main([*command, "--check", "values"])
    assert testing.main(["--status", str(record)]) == 0
    assert capsys.readouterr().out == "vector_add: never ran on a GPU\n"
    assert testing.main(command) == 0
    entries = json.loads(record.read_text())
    entry = entries["vector_add"]
    assert entry["passed"] is True
    assert entry["failures"] == []
    assert entry["source_hash"] == registry.source_hash(only[0])
    assert set(entry) >= {"gpu", "torch", "triton", "python", "date", "checks", "samples"}
    assert testing.stale(entries) == ["vector_add: never ran on a GPU"]
    entry["gpu"] = "some GPU"
    record.write_text(json.dumps(entries))
    capsys.readouterr()
    assert testing.main(["--status", str(record)]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(registry, "source_hash", lambda spec: "another")
    testing.main(["--status", str(record)])
    assert capsys.readouterr().out.startswith("vector_add: changed since it passed")
