"""Which kernels flash_attn runs where, and every config of the Hopper kernels compiled."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import types
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
        {"Skv": 0},
        {"alibi_slopes": torch.empty(4, device="meta")},
        {"attn_bias": torch.empty(256, 256, device="meta")},
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
    [{"D": 64, "Sq": 128}, {"D": 256, "Sq": 64}, {"Sq": 64}, {"dtype": torch.float32}],
    ids=str,
)
def test_what_the_hopper_backward_lacks_is_portable(call):
    wanted = list(PORTABLE_BACKWARD)
    if call.get("dtype") == torch.float32:
        wanted.insert(1, "_flash_attn_bwd_dq_kernel")  # delta, as a sum over the keys
    assert backward_kernels(**call) == wanted


def test_hopper_windows_softcap_and_sinks():
    sinks = torch.empty(4, device="meta")
    for call in (
        {"window_left": 10},
        {"window_right": 10, "softcap": 5.0},
        {"window_left": 0, "causal": True, "sinks": sinks, "D": 256},
        {"softcap": 5.0, "sinks": sinks, "D": 64},
    ):
        assert kernels(**call) == HOPPER
        assert [name.replace("wide", "hopper") for name in backward_kernels(**call)] == HOPPER_BACKWARD
    sums = [f"_flash_attn_bwd_{part}_kernel" for part in ("heads", "batches")]
    assert backward_kernels(sinks=sinks.clone().requires_grad_()) == HOPPER_BACKWARD + sums


def test_gradients_of_the_terms_have_kernels_of_their_own():
    terms = {"alibi_slopes": torch.empty(2, 4, device="meta"), "sinks": torch.empty(4, device="meta")}
    assert backward_kernels(**terms) == PORTABLE_BACKWARD  # none where none is asked for
    rows, dkdv, dq = PORTABLE_BACKWARD
    sums = [f"_flash_attn_bwd_{part}_kernel" for part in ("heads", "batches")]
    assert backward_kernels(**terms | {"sinks": torch.empty(4, device="meta", requires_grad=True)}) == [
        rows,
        dkdv,
        dq,
        *sums,
    ]
    # the slopes' needs rows that are exact in half precision too: dq's kernel is their first
    slopes = torch.empty(2, 4, device="meta", requires_grad=True)
    assert backward_kernels(**terms | {"alibi_slopes": slopes}) == [rows, dq, dkdv, dq, *sums]
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
    with pytest.raises(RuntimeError, match=r"flash_attn.*TORCH_TRITON_OPS_ATTENTION=gluon.*scale > 0"):
        kernels(scale=-1.0)
    with pytest.raises(RuntimeError, match="the Hopper kernels cannot run: they have no alibi_slopes and no attn_bias"):
        kernels(attn_bias=torch.empty(1, device="meta"), alibi_slopes=torch.empty(4, device="meta"))
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
            hopper.forward(q, q, q, q, None, 0.1, -1, 0)


# --------------------------------------------------------------------------------------------------------------------
# Which blocks the Hopper kernels visit. Gluon has no interpreter, but its scalar functions are Python.
# --------------------------------------------------------------------------------------------------------------------


def on_ints(function, **names):
    """A Gluon function of integers, as Python."""
    gl = types.SimpleNamespace(minimum=min, maximum=max, program_id=lambda axis: names["pid"])
    code = function.fn
    return types.FunctionType(code.__code__, code.__globals__ | {"gl": gl} | names, code.__name__)


def window_shapes():
    """(Sq, Skv, left, right) with the bounds as the launchers get them."""
    lengths, bounds = (1, 64, 129, 300, 515, 777), (-1, 0, 1, 17, 64, 128, 500)
    for i, (Sq, Skv, left, right) in enumerate(itertools.product(lengths, lengths, bounds, bounds)):
        if i % 13 == 0:  # a sample of them: 13 divides no period
            yield Sq, Skv, *flash_attn._bounds(Sq, Skv, False, left, right)


def visible_keys(i, Sq, Skv, left, right):
    place = i + Skv - Sq
    return max(0, place - left) if left >= 0 else 0, min(Skv, place + right + 1) if right >= 0 else Skv


def test_hopper_forward_visits_what_is_visible_and_masks_its_edges():
    """Every visible key lies in a visited block, unmasked blocks are visible whole, and a consumer's blocks are some of its
    tile's: it takes exactly the steps of the ring that the producer fills."""
    from torch_triton_ops.ops.flash_attn import hopper

    key_blocks = on_ints(hopper._key_blocks)
    for Sq, Skv, left, right in window_shapes():
        first, last = hopper.reach(Sq, Skv, left, right)
        for consumers, block_n in ((3, 128), (2, 128), (2, 64)):
            x = types.SimpleNamespace(
                Sq=Sq,
                Skv=Skv,
                first=first,
                last=last,
                BLOCK_N=block_n,
                HAS_LAST=left >= 0 or right >= 0,
                HAS_FIRST=hopper.is_window(left, right),
            )
            for tile in range(0, Sq, 64 * consumers):
                tile_begin, _, _, tile_end = key_blocks(x, tile, 64 * consumers)
                assert 0 <= tile_begin < tile_end <= launch.cdiv(Skv, block_n)
                for start in range(tile, tile + 64 * consumers, 64):
                    begin, full_begin, full_end, end = key_blocks(x, start, 64)
                    assert tile_begin <= begin <= full_begin <= full_end < end <= tile_end
                    for i in {start, start + 31, start + 63, Sq - 1} & {*range(start, min(start + 64, Sq))}:
                        lo, hi = visible_keys(i, Sq, Skv, left, right)
                        assert lo >= hi or (begin * block_n <= lo and hi <= end * block_n)
                        assert full_begin == full_end or (lo <= full_begin * block_n and full_end * block_n <= hi)


def run_ptx(asm, values):
    """The registers after the PTX of `_hide_asm`, which is integer arithmetic, comparisons and one branch to its end."""
    bits = lambda x, at, size: (x >> at) & ((1 << size) - 1)
    operations = {
        "mov": lambda a: a,
        "add": int.__add__,
        "sub": int.__sub__,
        "mad.lo": lambda a, b, c: a * b + c,
        "and": int.__and__,
        "shl": int.__lshift__,
        "bfe.u32": bits,
        "bfe.s32": lambda x, at, size: (bits(x, at, size) ^ 1 << size - 1) - (1 << size - 1),
        "le": int.__le__,
        "lt": int.__lt__,
        "ge": int.__ge__,
        "eq": int.__eq__,
        "ge.and": lambda a, b, p: a >= b and p,
        "selp": lambda a, b, p: a if p else b,
    }
    for line in asm[asm.index("{") + 1 : asm.index("DONE: }")].split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in (".reg", ""):
            continue
        if name == "@p":
            if values["p"]:
                break
            continue
        to, *operands = rest.replace(" ", "").split(",")
        numbers = [values[x] if x in values else 0 if x.startswith("0f") else int(x) for x in operands]
        name = name if name.startswith("bfe") else name.removeprefix("setp.").rpartition(".")[0]
        values[to] = operations[name](*numbers)
    return values


def test_hopper_backward_visits_what_is_visible_and_hides_the_rest():
    from torch_triton_ops.ops.flash_attn import hopper, hopper_bwd

    kinds = {"FULL": 0, "CAUSAL": 1, "WINDOW": 2}
    for n, (Sq, Skv, left, right) in enumerate(window_shapes()):
        mask = 2 if hopper.is_window(left, right) else 1 if right == 0 else 0
        for block_m, block_n in ((128, 128), (64, 128), (64, 64)):
            query_blocks, key_blocks = launch.cdiv(Sq, block_m), launch.cdiv(Skv, block_n)
            if query_blocks < 2:
                continue
            x = types.SimpleNamespace(
                Skv=Skv,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                SECTION=4,
                MASK=mask,
                H=1,
                BH=1,
                query_blocks=query_blocks,
                key_blocks=key_blocks,
            )
            x.first_key, x.last_key = hopper.reach(Sq, Skv, left, right)
            for pid in range(key_blocks):
                _, _, start_n, first, steps = on_ints(hopper_bwd.place, pid=pid, **kinds)(x)
                assert first >= 0
                assert steps >= 2
                assert first + steps <= query_blocks
                for i in range(0, Sq, 7):
                    lo, hi = visible_keys(i, Sq, Skv, left, right)
                    if max(lo, start_n) < min(hi, start_n + block_n):
                        assert first * block_m <= i < (first + steps) * block_m
                if mask == 0 or (n + pid) % 5:
                    continue
                start_m, thread = (first + n % steps) * block_m, n * 37 % 128
                registers = 64 * block_m // 128
                asm = hopper_bwd._hide_asm(mask, registers, block_m)
                edge = on_ints(hopper_bwd.edge_of, **kinds)(x, start_m, start_n)
                start = {f"${i}": 1 for i in range(registers)} | {f"${2 * registers}": edge, "%tid.x": thread}
                after = run_ptx(asm, start)
                for i in range(registers):
                    key = start_n + thread // 32 * 16 + thread % 32 // 4 + (8 if i & 2 else 0)
                    query = start_m + i // 4 * 8 + thread % 4 * 2 + i % 2
                    if query < Sq and (key < Skv or mask == 2):
                        lo, hi = visible_keys(query, Sq, Skv, left, right)
                        assert after[f"${i}"] == (lo <= key < hi)
