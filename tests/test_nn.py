"""The modules of torch_triton_ops.nn against plain torch, and generation with the paged cache against a forward of the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_triton_ops
from torch_triton_ops import nn as tt_nn
from torch_triton_ops.nn import Attention, KVCache, LayerNorm, LlamaBlock, RMSNorm, RotaryEmbedding

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16


def make_block(layer: int = 0) -> LlamaBlock:
    return LlamaBlock(HIDDEN, 96, HEADS, KV_HEADS, layer=layer)


def make_cache(batch: int, max_length: int = 64, **options) -> KVCache:
    return KVCache(2, batch, max_length, KV_HEADS, HEAD_DIM, page=16, **options)


class Model(torch.nn.Module):
    """Blocks and the tables that they share."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotary = RotaryEmbedding(HEAD_DIM)
        self.blocks = torch.nn.ModuleList(make_block(i) for i in range(layers))

    def forward(self, x: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        tables = self.rotary(positions)
        for block in self.blocks:
            x = block(x, *tables, cache)
        return x


def plain(block: LlamaBlock, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """LlamaDecoderLayer as it reads in plain torch."""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    def rotate(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return y * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    attn, mlp = block.self_attn, block.mlp
    y = F.rms_norm(x, (HIDDEN,), block.input_layernorm.weight, block.input_layernorm.eps)
    q, k, v = (heads(project(y)) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
    out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
    x = x + attn.o_proj(out.transpose(1, 2).flatten(2))
    y = F.rms_norm(x, (HIDDEN,), block.post_attention_layernorm.weight, block.post_attention_layernorm.eps)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


def test_block_is_the_plain_block() -> None:
    torch.manual_seed(0)
    block, x = make_block(), torch.randn(2, 13, HIDDEN)
    tables = RotaryEmbedding(HEAD_DIM)(torch.arange(13))
    found, expected = block(x, *tables), plain(block, x, *tables)
    torch.testing.assert_close(found, expected)
    parameters = dict(block.named_parameters())
    upstream = torch.randn_like(expected)
    gradients = (torch.autograd.grad(y, parameters.values(), upstream) for y in (found, expected))
    for name, got, want in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


def test_names_are_those_of_hugging_face() -> None:
    assert list(make_block().state_dict()) == [
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ]


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_norms_load_torch(norm: str) -> None:
    theirs = getattr(torch.nn, norm)(24, eps=1e-5)
    torch.nn.init.uniform_(theirs.weight)
    ours = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[norm](24, eps=1e-5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 24)
    torch.testing.assert_close(ours(x), theirs(x))


def test_gemma_norm_begins_at_zero() -> None:
    norm = RMSNorm(24, weight_offset=1.0)
    assert norm.weight.eq(0).all()
    x = torch.randn(3, 24)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), eps=1e-6))


@pytest.mark.parametrize("steps", [[1] * 20, [3, 8, 1, 8]], ids=["one", "several"])
@torch.no_grad()
def test_decoding_is_the_whole_forward(steps: list[int]) -> None:
    """Token by token, and several at a time as in speculative decoding, over the edges of blocks of 16."""
    model, cache, prompt = Model(), make_cache(2), 14
    total = prompt + sum(steps)
    x = torch.randn(2, total, HIDDEN)
    expected = model(x, torch.arange(total))
    torch.testing.assert_close(model(x[:, :prompt], cache.allocate(prompt), cache), expected[:, :prompt])
    done = prompt
    for more in steps:
        part = slice(done, done + more)
        torch.testing.assert_close(model(x[:, part], cache.allocate(more), cache), expected[:, part])
        done += more
    assert cache.lengths == [total, total]


@torch.no_grad()
def test_prompts_of_different_lengths() -> None:
    """Padded on the right; then the same number of tokens each, some of them taken back."""
    model, cache, prompts = Model(), make_cache(3), [5, 17, 1]
    x = torch.randn(3, 40, HIDDEN)
    expected = model(x, torch.arange(40))
    found = model(x[:, :17], cache.allocate(prompts), cache)
    for b, n in enumerate(prompts):
        torch.testing.assert_close(found[b, :n], expected[b, :n])

    def decode(tokens: int) -> None:
        new = torch.stack([x[b, n : n + tokens] for b, n in enumerate(cache.lengths)])
        wanted = torch.stack([expected[b, n : n + tokens] for b, n in enumerate(cache.lengths)])
        torch.testing.assert_close(model(new, cache.allocate(tokens), cache), wanted)

    decode(4)
    cache.truncate([7, 18, 5])
    decode(2)
    decode(1)
    assert cache.lengths == [10, 21, 8]


@torch.no_grad()
def test_window_and_softcap_reach_both_kernels() -> None:
    attention = Attention(HIDDEN, HEADS, KV_HEADS, window_left=4, softcap=2.0)
    rotary, cache, x = RotaryEmbedding(HEAD_DIM), make_cache(1), torch.randn(1, 12, HIDDEN)
    expected = attention(x, *rotary(torch.arange(12)))
    attention(x[:, :9], *rotary(cache.allocate(9)), cache)
    torch.testing.assert_close(attention(x[:, 9:], *rotary(cache.allocate(3)), cache), expected[:, 9:])


@torch.no_grad()
def test_float8_cache() -> None:
    attention, rotary, x = Attention(HIDDEN, HEADS, KV_HEADS), RotaryEmbedding(HEAD_DIM), torch.randn(1, 12, HIDDEN)
    cache = make_cache(1, dtype=torch.float8_e4m3fn)
    cache.k_scales[0], cache.v_scales[0] = torch.tensor(0.02), torch.full((KV_HEADS,), 0.01)
    expected = attention(x, *rotary(torch.arange(12)))
    attention(x[:, :11], *rotary(cache.allocate(11)), cache)
    found = attention(x[:, 11:], *rotary(cache.allocate(1)), cache)
    assert (
        0 < (found - expected[:, 11:]).norm() / expected[:, 11:].norm() < 0.06
    )  # a float8_e4m3fn has 4 significant bits


def test_compiles_without_a_break() -> None:
    model, x = Model(1), torch.randn(2, 6, HIDDEN)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    positions = torch.arange(6)
    torch.testing.assert_close(compiled(x, positions), model(x, positions))
    with torch.no_grad():
        eager, cache = make_cache(2), make_cache(2)
        for part in (x, x[:, :1], x[:, 1:2]):
            tokens = part.shape[1]
            expected = model(part, eager.allocate(tokens), eager)
            torch.testing.assert_close(compiled(part, cache.allocate(tokens), cache), expected)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    )  # without a cache; a prompt; a token, at any place
    torch._dynamo.reset()


def test_blocks_are_given_and_taken_back() -> None:
    cache = make_cache(3, max_length=48, blocks=6)
    cache.allocate([16, 17, 1])
    assert cache.free_blocks == 2
    places = cache.allocate(1), cache.slots
    assert cache.free_blocks == 1  # the first has begun a block
    assert cache.lengths == [17, 18, 2]
    assert [t.data_ptr() for t in (cache.allocate(1), cache.slots)] == [t.data_ptr() for t in places]
    assert len(set(cache.slots.tolist())) == 3
    cache.reset([1])
    assert cache.lengths == [18, 0, 3]
    assert cache.seq_lens.tolist() == [18, 0, 3]
    assert cache.free_blocks == 3
    cache.reset()
    assert cache.free_blocks == 6
    cache.allocate(32)  # all blocks again, each once
    assert sorted(cache.block_table[:, :2].flatten().tolist()) == list(range(6))


def test_errors() -> None:
    cache = make_cache(2, max_length=40, blocks=3)
    with pytest.raises(ValueError, match="page is 8; allowed: 16 to 256"):
        KVCache(1, 1, 8, 1, 16, page=8)
    with pytest.raises(ValueError, match="batch is 0"):
        KVCache(1, 0, 8, 1, 16)
    with pytest.raises(RuntimeError, match="sequence 1 would have 41 tokens; max_length is 40"):
        cache.allocate([1, 41])
    with pytest.raises(RuntimeError, match="4 more blocks of 16 tokens are needed and 3 of 3 are free"):
        cache.allocate(20)
    assert (cache.lengths, cache.free_blocks) == ([0, 0], 3)
    with pytest.raises(ValueError, match=r"tokens is \[1\]"):
        cache.allocate([1])
    cache.allocate(2)
    with pytest.raises(
        ValueError, match=r"tokens is 9 with sequences of lengths \[2, 2\]; allowed: one number up to 8"
    ):
        cache.allocate(9)
    with pytest.raises(ValueError, match=r"tokens is \[1, 2\]"):
        cache.allocate([1, 2])
    with pytest.raises(ValueError, match=r"lengths is \[3, 1\]; allowed: 0 up to each of \[2, 2\]"):
        cache.truncate([3, 1])
    with pytest.raises(ValueError, match="kv_heads is 3; allowed: a number that divides heads, 4"):
        Attention(HIDDEN, 4, 3)
    with pytest.raises(ValueError, match="heads is 5; allowed: a divisor of hidden_size, 64"):
        Attention(HIDDEN, 5)
    with pytest.raises(ValueError, match="head_dim is 5"):
        RotaryEmbedding(5)
    with pytest.raises(NotImplementedError, match=r"kv_cache_write.*requires a gradient"):
        make_block()(torch.randn(2, 1, HIDDEN), *RotaryEmbedding(HEAD_DIM)(cache.allocate(1)), cache)


def test_losses_are_their_ops() -> None:
    losses = [
        c for c in vars(tt_nn).values() if isinstance(c, type) and issubclass(c, tt_nn._Loss) and c is not tt_nn._Loss
    ]
    assert {c.op for c in losses} == {
        s.name for s in torch_triton_ops.specs() if s.name.endswith(("_loss", "_div", "cross_entropy"))
    }
    chosen, rejected = torch.randn(2, 5)
    loss = tt_nn.BradleyTerryLoss(reduction="sum")
    assert loss(chosen, rejected).item() == torch.ops.tt.bradley_terry_loss(chosen, rejected, reduction="sum").item()
    assert repr(loss) == "BradleyTerryLoss(center_coefficient=0.0, reduction='sum')"
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))
    expected = torch.ops.tt.cross_entropy(logits, target, weight=torch.ones(7), label_smoothing=0.1)
    assert tt_nn.CrossEntropyLoss(label_smoothing=0.1)(logits, target, weight=torch.ones(7)).item() == expected.item()
    with pytest.raises(TypeError, match="DPOLoss: no option 'betta'; allowed: beta, label_smoothing, loss_type"):
        tt_nn.DPOLoss(betta=0.2)
