"""Paged decoding beyond the conformance suite: what is never read, many splits, float8 codes, plans, compiled graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import torch_triton_ops  # noqa: F401 - registers the ops
from torch_triton_ops import offline
from torch_triton_ops.ops import paged_decode_attn as decode

ROOT = Path(__file__).resolve().parents[1]

# In the interpreter, on CPU tensors.
KERNELS = """
import torch
from torch_triton_ops.ops import kv_cache_write as write, paged_decode_attn as decode

def check(args, options):
    found = torch.ops.tt.paged_decode_attn(*args, **options)
    assert torch.allclose(found, decode.paged_decode_attn_reference(*args, **options), rtol=1e-5, atol=1e-5)

# Splits of a tile each: so many that several programs merge a row; fewer; a sequence of none.
decode._MIN_KEYS, decode._TILE_BYTES, decode._PROGRAMS_PER_SM = 16, 1, 200
check(decode._call("cpu", torch.float32, [16 * 33 + 3, 0], (1, 1), 48, 16), {})
check(decode._call("cpu", torch.float32, [103, 16], (2, 1), 16, 16), {"window_left": 50, "softcap": 3.0})

# What lies past a length is never read, nor are the table's entries there.
q, k_cache, v_cache, table, lengths = decode._call("cpu", torch.float32, [21, 3], (2, 1), 16, 16, spare=2)
used = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
for b, n in enumerate([21, 3]):
    for j in range(n):
        used[table[b, j // 16], j % 16] = True
k_cache[~used] = v_cache[~used] = float("nan")
table[1, 1:] = 2**30
check((q, k_cache, v_cache, table, lengths), {})

# Every float16 value to float8 and back: nearest even, saturated, NaN kept.
codes = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).reshape(1, 256, 256)
write._TILE = codes.numel()
for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
    largest = torch.finfo(dtype).max
    want = codes.float().clamp(-largest, largest).to(dtype)
    cache = torch.zeros(1, 16, 256, 256, dtype=dtype)
    one = torch.ones(())
    torch.ops.tt.kv_cache_write(codes, codes, cache, cache.clone(), torch.zeros(1, dtype=torch.int32), k_scale=one, v_scale=one)
    found, want = cache[0, :1].float(), want.float()
    same = (found == want) | (found.isnan() & want.isnan())
    assert same.all(), (dtype, codes[~same][:5], found[~same][:5], want[~same][:5])
print("ok")
"""


def test_kernels_in_the_interpreter(interpreted) -> None:
    assert interpreted("-c", KERNELS) == "ok"


def call(B: int, pages: int, heads: tuple[int, int] = (32, 8), page: int = 64) -> tuple[torch.Tensor, ...]:
    """Meta tensors of head size 128."""
    dtype, (Hq, Hkv) = torch.bfloat16, heads
    q, cache = (torch.empty(*s, 128, device="meta", dtype=dtype) for s in ((B, Hq), (B * pages, page, Hkv)))
    table, lengths = (torch.empty(*s, device="meta", dtype=torch.int32) for s in ((B, pages), (B,)))
    return q, cache, cache, table, lengths


@pytest.mark.parametrize(
    ("B", "pages", "splits"),
    [
        (1, 1024, range(16, 129)),
        (1, 4, range(1, 2)),
        (4, 64, range(4, 17)),
        (256, 64, range(1, 2)),
        (64, 2048, range(8, 9)),  # heads enough, but one sequence may be long
    ],
)
def test_splits_fill_the_gpu(B: int, pages: int, splits: range) -> None:
    """By the table's room alone: the lengths of meta tensors cannot be read."""
    launches = offline.record(lambda: torch.ops.tt.paged_decode_attn(*call(B, pages)), 90)
    heads, found, sequences = launches[0].grid
    assert (heads, sequences) == (8, B)
    assert found in splits
    assert len(launches) == (1 if found == 1 else 2)


def test_query_heads_of_a_group_share_one_program() -> None:
    for heads, tiles in (((32, 8), 8), ((64, 1), 1), ((128, 1), 2)):  # 64 rows a tile
        launch = offline.record(lambda heads=heads: torch.ops.tt.paged_decode_attn(*call(1, 64, heads)), 90)[0]
        assert launch.grid[0] == tiles


def test_write_and_read_in_one_compiled_graph() -> None:
    """The write is functionalised and put back; the read behind it sees what was written."""

    def step(q, k, v, k_cache, v_cache, slots, table, lengths):
        torch.ops.tt.kv_cache_write(k, v, k_cache, v_cache, slots)
        return torch.ops.tt.paged_decode_attn(q, k_cache, v_cache, table, lengths)

    q, k_cache, v_cache, table, lengths = decode._call("cpu", torch.float32, [21, 3], (2, 1), 16, 16)
    k, v = torch.randn(2, 2, 1, 16)
    slots = table.gather(1, (lengths[:, None] - 1).long() // 16)[:, 0].long() * 16 + (lengths - 1) % 16
    caches = k_cache.clone(), v_cache.clone()
    expected = step(q, k, v, *caches, slots, table, lengths)
    torch._dynamo.reset()
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(q, k, v, k_cache, v_cache, slots, table, lengths)
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close((k_cache, v_cache), caches, rtol=0, atol=0)
    assert torch.equal(k_cache.flatten(0, 1)[slots], k)


def test_cost_counts_what_is_visible() -> None:
    q, k_cache, v_cache, table, lengths = decode._call("cpu", torch.float32, [21, 3, 0], (4, 2), 16, 16, tokens=4)
    with FlopCounterMode(display=False) as counter:
        torch.ops.tt.paged_decode_attn(q, k_cache, v_cache, table, lengths)
    visible = (18 + 19 + 20 + 21) + (1 + 2 + 3)
    assert counter.get_total_flops() == 4 * 4 * 16 * visible
    cost = decode.paged_decode_attn_cost(q, k_cache, v_cache, table, lengths, window_left=5)
    assert cost.flops == 4 * 4 * 16 * (4 * 6 + 6)
    assert cost.bytes == 2 * (9 + 3) * 2 * 16 * 4 + 3 * 4 + 3 * 4 + 2 * q.numel() * 4


def test_a_gradient_that_saved_the_cache_fails_when_it_is_written_over() -> None:
    k_cache, v_cache = torch.zeros(2, 2, 16, 2, 16)
    weight = torch.ones(16, requires_grad=True)
    loss = (k_cache * weight).sum()
    torch.ops.tt.kv_cache_write(*torch.randn(2, 3, 2, 16), k_cache, v_cache, torch.arange(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
