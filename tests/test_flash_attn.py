"""Which kernels flash_attn runs where, and every config of the Hopper kernels compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from torch_triton_ops import launch, offline, registry
from torch_triton_ops.ops import flash_attn

pytestmark = pytest.mark.skipif(launch.INTERPRET, reason="the interpreter runs the portable kernels alone")


def backward_kernels(Sq=256, Skv=256, D=128, dtype=torch.bfloat16, **options):
    """Names of the backward kernels recorded for sm_90."""
    q = torch.empty(2, 4, Sq, D, device="meta", dtype=dtype, requires_grad=True)
    k = torch.empty(2, 2, Skv, D, device="meta", dtype=dtype, requires_grad=True)

    def run():
        out = torch.ops.tt.flash_attn(q, k, k, **options)
        terms = [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.autograd.grad(out, (q, k, *terms), torch.empty_like(out))

    return [recorded.kernel.__name__ for recorded in offline.record(run, 90)][1:]


def kernels(target=90, Sq=256, Skv=256, D=128, dtype=torch.bfloat16, **options):
    """Names of the forward kernels recorded on a target."""
    q = torch.empty(2, 4, Sq, D, device="meta", dtype=dtype)
    k = torch.empty(2, 2, Skv, D, device="meta", dtype=dtype)
    launches = offline.record(lambda: torch.ops.tt.flash_attn(q, k, k, **options), target)
    return [recorded.kernel.__name__ for recorded in launches]


HOPPER, PORTABLE = ["_flash_attn_fwd_hopper_kernel"], ["_flash_attn_fwd_kernel"]
HOPPER_BACKWARD = [f"_flash_attn_bwd_{part}_kernel" for part in ("prepare", "hopper", "cast")]
PORTABLE_BACKWARD = [f"_flash_attn_bwd_{part}_kernel" for part in ("rows", "dkdv", "dq")]


def test_all_its_files_count_as_its_source():
    """The compile caches and the GPU record's staleness hang on them."""
    files = {file.name for file in registry.spec("flash_attn").module_files()}
    assert files >= {"__init__.py", "triton_kernels.py", "hopper.py", "hopper_bwd.py", "reference.py", "varlen.py"}


@pytest.mark.parametrize("target", [80, 100])
def test_other_gpus_run_the_portable_kernel(target):
    assert kernels(target) == PORTABLE


@pytest.mark.parametrize("D", [40, 64, 80, 96, 128, 192, 256])
def test_hopper_runs_gluon(D):
    assert kernels(D=D) == kernels(D=D, causal=True) == HOPPER
    assert kernels(D=D, dtype=torch.float16, Sq=1, Skv=1000, scale=0.5) == HOPPER


@pytest.mark.parametrize(
    "call",
    [
        {"dtype": torch.float32},
        {"D": 32},
        {"D": 100},
        {"scale": -1.0},
        {"scale": 0.0},
        {"softcap": 5.0},
        {"window_left": 10},
        {"window_right": 10},
        {"Skv": 0},
        {"alibi_slopes": torch.empty(4, device="meta")},
        {"attn_bias": torch.empty(256, 256, device="meta")},
        {"sinks": torch.empty(4, device="meta")},
    ],
    ids=lambda call: ",".join(call),
)
def test_what_gluon_lacks_is_portable(call):
    assert kernels(**call) == PORTABLE


@pytest.mark.parametrize(("D", "Sq"), [(40, 129), (64, 129), (72, 65), (128, 65), (136, 65), (256, 65)])
def test_hopper_backward(D, Sq):
    wanted = [name if D <= 128 else name.replace("hopper", "wide") for name in HOPPER_BACKWARD]
    assert backward_kernels(D=D) == backward_kernels(D=D, causal=True, Sq=Sq, Skv=1) == wanted


@pytest.mark.parametrize(
    "call",
    [{"D": 64, "Sq": 128}, {"D": 256, "Sq": 64}, {"Sq": 64}, {"softcap": 5.0}, {"dtype": torch.float32}],
    ids=str,
)
def test_what_the_hopper_backward_lacks_is_portable(call):
    wanted = list(PORTABLE_BACKWARD)
    if call.get("dtype") == torch.float32:
        wanted.insert(1, "_flash_attn_bwd_dq_kernel")  # delta, as a sum over the keys
    assert backward_kernels(**call) == wanted


def test_gradients_of_the_terms_have_kernels_of_their_own():
    terms = {"alibi_slopes": torch.empty(2, 4, device="meta"), "sinks": torch.empty(4, device="meta")}
    assert backward_kernels(**terms) == PORTABLE_BACKWARD  # none where none is asked for
    sums = [f"_flash_attn_bwd_{part}_kernel" for part in ("heads", "batches")]
    for name, term in terms.items():
        assert backward_kernels(**terms | {name: term.requires_grad_()})[3:] == sums
        term.requires_grad_(False)
    bias = torch.empty(256, device="meta", requires_grad=True)
    assert backward_kernels(attn_bias=bias)[3:] == ["_flash_attn_bwd_dbias_kernel"]


def test_packed_sequences_run_the_same_kernels_and_need_no_lengths():
    """On tensors without values; max_seqlen may be a SymInt (opcheck and torch.compile prove that)."""
    q = torch.empty(300, 4, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    cu_seqlens = torch.empty(5, device="meta", dtype=torch.int32)

    def run():
        out = torch.ops.tt.flash_attn_varlen(q, q, q, cu_seqlens, cu_seqlens, 128, 128, causal=True)
        torch.autograd.grad(out, q, torch.empty_like(out))

    recorded = offline.record(run, 90)
    assert [launch.kernel.__name__ for launch in recorded] == PORTABLE + PORTABLE_BACKWARD
    blocks = 128 // recorded[0].constexprs["BLOCK_M"]  # of the longest
    assert recorded[0].grid == (blocks * 4 * 4,)  # for each sequence and head


def test_deterministic_algorithms_take_the_portable_backward():
    """The Hopper backward sums dq in no fixed order."""
    torch.use_deterministic_algorithms(True)
    try:
        assert backward_kernels() == PORTABLE_BACKWARD
        assert kernels() == HOPPER
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_window_that_hides_nothing_is_none():
    assert kernels(window_left=255, window_right=255) == HOPPER
    assert kernels(window_right=0) == kernels(causal=True, window_right=9) == HOPPER  # causal by another name


def test_setting(monkeypatch):
    monkeypatch.setattr(flash_attn, "_setting", "triton")
    assert kernels() == PORTABLE
    monkeypatch.setattr(flash_attn, "_setting", "gluon")
    assert kernels() == HOPPER
    with pytest.raises(RuntimeError, match=r"flash_attn.*TORCH_TRITON_OPS_ATTENTION=gluon.*softcap"):
        kernels(softcap=1.0)
    with pytest.raises(RuntimeError, match="the Hopper kernels cannot run: they have no attn_bias and no sinks"):
        kernels(attn_bias=torch.empty(1, device="meta"), sinks=torch.empty(4, device="meta"))
    with pytest.raises(RuntimeError, match=r"flash_attn.*compute capability 9\.0"):
        kernels(80)


def test_wrong_setting_is_named():
    code = "import torch, torch_triton_ops; torch.ops.tt.flash_attn(*torch.ones(3, 1, 1, 1, 16))"
    environment = os.environ | {"TORCH_TRITON_OPS_ATTENTION": "cudnn"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "TORCH_TRITON_OPS_ATTENTION is 'cudnn'; allowed: auto, triton, gluon" in done.stderr


def test_untested_triton_runs_portable_and_says_so_once(monkeypatch):
    monkeypatch.setattr(flash_attn, "gluon_ready", lambda device: False)
    flash_attn._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert kernels() == kernels() == PORTABLE
        assert kernels(80) == PORTABLE
    assert len(said) == 1
    assert "tested with triton 3.6 and 3.7" in str(said[0].message)
    monkeypatch.setattr(flash_attn, "_setting", "gluon")
    with pytest.raises(RuntimeError, match=r"tested with triton 3\.6 and 3\.7"):
        kernels()


@pytest.mark.parametrize("D", [64, 128, 256])
def test_portable_kernels_compile_for_hopper_too(D, monkeypatch):
    """They run there where the setting asks for them, and with a triton that the Hopper kernels are not tested with."""
    monkeypatch.setattr(flash_attn, "_setting", "triton")
    q = torch.empty(1, 2, 300, D, device="meta", dtype=torch.bfloat16, requires_grad=True)

    def run():
        out = torch.ops.tt.flash_attn(q, q, q, causal=True)
        torch.autograd.grad(out, q, torch.empty_like(out))

    for recorded in offline.record(run, 90):
        assert not offline.compile_launch(recorded, 90).faults()


def test_torch_compile_keeps_the_hopper_kernel_as_one_node():
    """A Gluon kernel cannot be inlined: the launcher says so before it touches anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from torch_triton_ops.ops.flash_attn import hopper

    with FakeTensorMode():
        q = torch.empty(1, 2, 64, 64, dtype=torch.bfloat16)
        with pytest.raises(launch.NotInlinable, match="hopper"):
            hopper.forward(q, q, q, q, None, 0.1, True)
