"Attention and its blocks: torch's own answers to 1e-6 in double precision, what a mask hides, caches, refusals, and the mutations of this field."
import math
import pytest, torch
from einops import rearrange
from hypothesis import given, settings, strategies as st
from torch import nn
import torch.nn.functional as F
from latentcourse import transformer as tr

D = torch.float64
def rand(*shape, seed=0): return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))
def gap(a, b): return (a - b).abs().max().item()

def twin(d=12, heads=3, bias=True, seed=0):
    "Our attention and nn.MultiheadAttention on one set of weights, biases too."
    torch.manual_seed(seed)
    ours, theirs = tr.Attention(d, heads, bias).double(), nn.MultiheadAttention(d, heads, bias=bias, batch_first=True, dtype=D)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.in_proj.weight); theirs.out_proj.weight.copy_(ours.out.weight)
        if bias: theirs.in_proj_bias.copy_(ours.in_proj.bias); theirs.out_proj.bias.copy_(ours.out.bias)
    return ours, theirs

# ---- parity -------------------------------------------------------------------------------------------------------------------------

WAYS = [tr.attention, tr.attention_matmul]

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('n, m', [(1, 1), (5, 5), (3, 7)])
def test_equals_sdpa(way, n, m):
    q, k, v = rand(2, 3, n, 4), rand(2, 3, m, 4, seed=1), rand(2, 3, m, 4, seed=2)
    assert gap(way(q, k, v), F.scaled_dot_product_attention(q, k, v)) < 1e-12
    mask = rand(2, 1, n, m, seed=3) > 0
    mask[..., 0] = True
    assert gap(way(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)) < 1e-12
    if n == m: assert gap(way(q, k, v, tr.causal_mask(n)), F.scaled_dot_product_attention(q, k, v, is_causal=True)) < 1e-12

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('heads', [1, 3, 12])
def test_equals_multihead_attention(heads, bias):
    "Self, cross, masked and padded; outputs, maps and gradients."
    ours, theirs = twin(12, heads, bias)
    x, context = rand(2, 5, 12), rand(2, 7, 12, seed=1)
    pad = tr.padding_mask(torch.tensor([3, 7]), 7)
    cases = [(x, None, None, {}), (x, None, tr.causal_mask(5), dict(attn_mask=~tr.causal_mask(5))), (x, context, None, {}),
             (x, context, pad, dict(key_padding_mask=~pad[:, 0, 0])), (context, None, pad & tr.causal_mask(7), dict(attn_mask=~tr.causal_mask(7), key_padding_mask=~pad[:, 0, 0]))]
    for x, c, mask, said in cases:
        x = x.clone().requires_grad_()
        other = x if c is None else c
        want, maps = theirs(x, other, other, average_attn_weights=False, **said)
        got = ours(x, c, mask)
        assert gap(got, want) < 1e-6 and gap(ours.maps(x, c, mask), maps) < 1e-6
        a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want))
        assert gap(a, b) < 1e-6

@pytest.mark.parametrize('norm_first', [True, False])
@pytest.mark.parametrize('activation', ['relu', 'gelu'])
@pytest.mark.parametrize('kind', [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_equals_torch_layers(kind, norm_first, activation):
    "Training mode without dropout, so that no fused inference path stands in; masks and padding; weights moved off their initial ones and zeros."
    torch.manual_seed(0)
    layer = kind(12, 3, 20, dropout=0., activation=activation, batch_first=True, norm_first=norm_first, dtype=D)
    with torch.no_grad():
        for p in layer.parameters(): p.add_(.2 * torch.randn_like(p))
    block = tr.block_from(layer)
    x, context, mine = rand(2, 5, 12), rand(2, 7, 12, seed=1), tr.padding_mask(torch.tensor([4, 5]), 5)
    far = tr.padding_mask(torch.tensor([3, 7]), 7)
    if kind is nn.TransformerEncoderLayer:
        assert gap(block(x), layer(x)) < 1e-6
        want = layer(x, src_mask=~tr.causal_mask(5), src_key_padding_mask=~mine[:, 0, 0])
        assert gap(block(x, mask=tr.causal_mask(5) & mine), want) < 1e-6
    else:
        assert gap(block(x, context), layer(x, context)) < 1e-6
        want = layer(x, context, tgt_mask=~tr.causal_mask(5), tgt_key_padding_mask=~mine[:, 0, 0], memory_key_padding_mask=~far[:, 0, 0])
        assert gap(block(x, context, tr.causal_mask(5) & mine, far), want) < 1e-6
    assert block.pre == norm_first and sum(p.numel() for p in block.parameters()) == sum(p.numel() for p in layer.parameters())

def test_tower_equals_torch_stacks():
    torch.manual_seed(0)
    for norm_first in (True, False):
        layer = nn.TransformerEncoderLayer(12, 3, 20, 0., 'gelu', batch_first=True, norm_first=norm_first, dtype=D)
        stack = nn.TransformerEncoder(layer, 3, nn.LayerNorm(12, dtype=D) if norm_first else None, enable_nested_tensor=False)
        for l in stack.layers:
            for p in l.parameters(): nn.init.normal_(p, std=.3)
        tower = tr.Transformer(3, 12, 3, 20, 'pre' if norm_first else 'post').double()
        for b, l in zip(tower.blocks, stack.layers): b.load_state_dict(tr.block_from(l).state_dict())
        assert gap(tower(rand(2, 5, 12)), stack(rand(2, 5, 12))) < 1e-6

# ---- what a mask hides, what a cache keeps ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('norm', ['pre', 'post'])
def test_nobody_sees_the_future_or_the_padding(norm):
    torch.manual_seed(0)
    tower = tr.Transformer(2, 12, 3, norm=norm).double()
    x = rand(1, 6, 12).requires_grad_()
    y = tower(x, mask=tr.causal_mask(6))
    for i in range(6):
        g = torch.autograd.grad(y[0, i].sum() + y[0, i].square().sum(), x, retain_graph=True)[0][0].abs().sum(-1)
        assert (g[i + 1:] == 0).all() and (g[:i + 1] > 0).all()
    alone = tower.blocks[0].own                                                             # without the sum, a token that may not see itself shows
    maps = alone.maps(x, mask=tr.causal_mask(6))[0]
    assert all((maps[:, i, j] > 0).all() == (j <= i) for i in range(6) for j in range(6))
    z = rand(1, 9, 12)
    short, padded = tower(z[:, :5]), tower(z, mask=tr.padding_mask(torch.tensor([5]), 9))
    assert gap(short, padded[:, :5]) < 1e-12

def moved(f, n=6, d=12):
    "How far output i moves when token j is replaced, `n n`: sees what a derivative cannot."
    x = rand(1, n, d)
    other = x.repeat(n, 1, 1)
    other[range(n), range(n)] = rand(n, d, seed=1)
    return (f(other) - f(x)).norm(dim=-1).T

@pytest.mark.parametrize('norm', ['pre', 'post'])
def test_a_replaced_token_moves_nothing_before_it(norm):
    torch.manual_seed(0)
    tower = tr.Transformer(2, 12, 3, norm=norm).double()
    with torch.no_grad():
        honest = moved(lambda x: tower(x, mask=tr.causal_mask(6), turn=tr.rotary(6, 4, dtype=D)))
        assert honest.triu(1).max() < 1e-12 and (honest.tril() + torch.ones(6, 6).triu(1) > 0).all()
    sly = lambda x: tower(x, mask=tr.causal_mask(6)) + x.roll(-1, 1).detach()
    J = torch.autograd.functional.jacobian(lambda x: sly(x)[0], rand(1, 6, 12))[:, :, 0].square().sum((1, 3))
    assert J.triu(1).max() == 0 < .1 < moved(sly).triu(1).max()

def test_a_causal_tower_without_places_knows_some_order():
    "One block cannot tell an exchange of two earlier tokens, two can: equivariance is a matter of no mask."
    torch.manual_seed(0)
    x, swap, mask = rand(1, 5, 12), [1, 0, 2, 3, 4], tr.causal_mask(5)
    one, two = (gap(t(x, mask=mask)[:, -1], t(x[:, swap], mask=mask)[:, -1]) for t in (tr.Transformer(n, 12, 3).double() for n in (1, 2)))
    assert one < 1e-12 < 1e-4 < two

def test_scores_of_a_fresh_layer_do_not_grow_with_the_width():
    torch.manual_seed(0)
    for d in (16, 64, 256):
        q, k, _ = tr.Attention(d, 4).qkv(F.layer_norm(torch.randn(32, 16, d), (d,)))
        assert .09 < (torch.einsum('bgnd,bgmd->bgnm', q, k) / math.sqrt(d // 4)).var() < .14

def test_a_query_with_nothing_to_look_at_brings_back_nothing():
    q, mask = rand(1, 1, 3, 4).requires_grad_(), torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    for way in WAYS:
        out = way(q, q, q, mask)
        assert out.isfinite().all() and (out[0, 0, 1] == 0).all()
        assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()

@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('chunks', [(1,) * 7, (3, 4), (2, 1, 4)])
def test_cache_changes_nothing(turned, chunks):
    torch.manual_seed(0)
    tower, x, context = tr.Transformer(2, 12, 3, cross=True).double(), rand(2, 7, 12), rand(2, 4, 12, seed=1)
    turn = tr.rotary(7, 4, dtype=D) if turned else None
    far = tr.padding_mask(torch.tensor([2, 4]), 4)
    whole = tower(x, context, tr.causal_mask(7), far, turn=turn)
    cache, at, parts = {}, 0, []
    for n in chunks:
        parts.append(tower(x[:, at:at + n], context, tr.causal_mask(at + n)[-n:], far, cache, turn if turn is None else turn[at:at + n]))
        at += n
    assert gap(torch.cat(parts, 1), whole) < 1e-12
    assert len(cache) == 4 and {k.shape[2] for k, _ in cache.values()} == {7, 4}          # own tokens grow, the context is read once
    pick = torch.tensor([1, 1, 0])                                                          # a beam search reorders its rows
    picked = {m: (k[pick], v[pick]) for m, (k, v) in cache.items()}
    assert all(k.shape[0] == 3 for k, _ in picked.values())

# ---- places -------------------------------------------------------------------------------------------------------------------------

def test_sinusoids_are_those_of_the_paper():
    for n, d in ((1, 2), (9, 6), (50, 32)):
        want = torch.tensor([[(math.sin if i % 2 == 0 else math.cos)(p / 10_000 ** (2 * (i // 2) / d)) for i in range(d)] for p in range(n)], dtype=D)
        assert gap(tr.sinusoidal(n, d, dtype=D), want) < 1e-12

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(-500, 500), st.integers(1, 8).map(lambda i: 2 * i))
def test_rotary_products_depend_on_the_offset(m, n, by, d):
    q, k = rand(1, d), rand(1, d, seed=1)
    at = lambda x, p: tr.rotate(x, tr.rotary(torch.tensor([p]), d, dtype=D))
    assert abs((at(q, m) * at(k, n)).sum() - (at(q, m + by) * at(k, n + by)).sum()) < 1e-9
    assert abs(at(q, m).norm() - q.norm()) < 1e-12 and gap(at(at(q, m), n), at(q, m + n)) < 1e-9

def test_rotary_is_complex_multiplication():
    x, turn = rand(2, 3, 5, 8), tr.rotary(5, 8, dtype=D)
    z = torch.view_as_complex(rearrange(x, 'b g n (f two) -> b g n f two', two=2).contiguous()) * torch.polar(torch.ones_like(turn), turn)
    assert gap(tr.rotate(x, turn), rearrange(torch.view_as_real(z), 'b g n f two -> b g n (f two)')) < 1e-12

@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)))
def test_without_places_the_order_does_not_matter(order):
    torch.manual_seed(0)
    tower, x, order = tr.Transformer(2, 8, 2).double(), rand(1, 6, 8), list(order)
    assert gap(tower(x[:, order]), tower(x)[:, order]) < 1e-12
    if order != sorted(order):
        p = tr.sinusoidal(6, 8, dtype=D)
        assert gap(tower(x[:, order] + p), tower(x + p)[:, order]) > 1e-3
        turn = tr.rotary(6, 4, dtype=D)
        assert gap(tower(x[:, order], turn=turn), tower(x, turn=turn)[:, order]) > 1e-4

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.booleans(), st.sampled_from(['pre', 'post']))
def test_parameter_formula(depth, heads, width, hidden, cross, norm):
    tower = tr.Transformer(depth, heads * width, heads, hidden, norm, cross)
    assert tr.transformer_parameters(depth, heads * width, hidden, cross, norm) == sum(p.numel() for p in tower.parameters())

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_precision_and_device_are_those_of_the_input(dtype):
    x = torch.randn(2, 5, 8, dtype=dtype)
    block = tr.Block(8, 2).to(dtype)
    y = block(x, mask=tr.causal_mask(5), turn=tr.rotary(5, 4))
    assert y.dtype == dtype and y.isfinite().all()
    exact = block.double()(x.double(), mask=tr.causal_mask(5), turn=tr.rotary(5, 4))
    assert gap(y.double(), exact) < (.1 if dtype == torch.bfloat16 else 1e-5)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    tower, x = tr.Transformer(2, 16, 4).cuda(), torch.randn(2, 6, 16).cuda()
    lengths = torch.tensor([4, 6]).cuda()
    y = tower(x, mask=tr.causal_mask(6, x.device) & tr.padding_mask(lengths, 6), turn=tr.rotary(torch.arange(6).cuda(), 4))
    assert y.is_cuda and gap(y.cpu(), tower.cpu()(x.cpu(), mask=tr.causal_mask(6) & tr.padding_mask(lengths.cpu(), 6), turn=tr.rotary(6, 4))) < 1e-4

# ---- refusals -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('call, error', [
    (lambda: tr.attention(rand(3, 4), rand(3, 4), rand(3, 4)), ValueError),
    (lambda: tr.attention(rand(1, 1, 3, 4), rand(1, 1, 3, 5), rand(1, 1, 3, 5)), ValueError),
    (lambda: tr.attention(rand(1, 1, 3, 4), rand(1, 1, 3, 4), rand(1, 1, 2, 4)), ValueError),
    (lambda: tr.attention(rand(1, 2, 3, 4), rand(1, 1, 3, 4), rand(1, 1, 3, 4)), ValueError),
    (lambda: tr.attention(rand(1, 1, 0, 4), rand(1, 1, 3, 4), rand(1, 1, 3, 4)), ValueError),
    (lambda: tr.attention(*[torch.ones(1, 1, 3, 4, dtype=torch.int64)] * 3), TypeError),
    (lambda: tr.attention(*[rand(1, 1, 3, 4)] * 3, mask=torch.zeros(3, 3)), TypeError),
    (lambda: tr.attention(*[rand(1, 1, 3, 4)] * 3, mask=tr.causal_mask(4)), ValueError),
    (lambda: tr.attention(*[rand(1, 1, 3, 4)] * 3, mask=torch.ones(1, 1, 1, 3, 3, dtype=torch.bool)), ValueError),
    (lambda: tr.attention_weights(rand(1, 1, 3, 4), rand(1, 1, 3, 5)), ValueError),
    (lambda: tr.causal_mask(0), ValueError), (lambda: tr.causal_mask(2.), ValueError),
    (lambda: tr.padding_mask(torch.tensor([0, 2]), 3), ValueError), (lambda: tr.padding_mask(torch.tensor([4]), 3), ValueError),
    (lambda: tr.padding_mask(torch.tensor([1.5]), 3), ValueError), (lambda: tr.padding_mask(torch.tensor([], dtype=torch.int64), 3), ValueError),
    (lambda: tr.frequencies(3), ValueError), (lambda: tr.frequencies(0), ValueError), (lambda: tr.frequencies(4, math.nan), ValueError), (lambda: tr.frequencies(4, .5), ValueError),
    (lambda: tr.sinusoidal(0, 4), ValueError), (lambda: tr.sinusoidal(4, 5), ValueError), (lambda: tr.rotary(torch.tensor([math.nan]), 4), ValueError), (lambda: tr.rotary(torch.zeros(2, 2), 4), ValueError),
    (lambda: tr.rotate(rand(5, 8), tr.rotary(5, 4)), ValueError), (lambda: tr.rotate(rand(5, 8), tr.rotary(4, 8)), ValueError),
    (lambda: tr.Attention(10, 3), ValueError), (lambda: tr.Attention(8, 0), ValueError), (lambda: tr.Attention(8, 2)(torch.zeros(2, 3, 7)), ValueError),
    (lambda: tr.Attention(8, 2)(torch.zeros(3, 8)), ValueError), (lambda: tr.Attention(8, 2)(torch.zeros(2, 3, 8), torch.zeros(2, 3, 9)), ValueError),
    (lambda: tr.Attention(8, 2)(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), turn=tr.rotary(3, 4)), ValueError),
    (lambda: tr.Attention(8, 2)(torch.zeros(2, 3, 8), torch.zeros(1, 3, 8)), ValueError),
    (lambda: tr.Block(8, 2, norm='both'), ValueError), (lambda: tr.Block(8, 2)(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)), ValueError),
    (lambda: tr.Block(8, 2, cross=True)(torch.zeros(1, 3, 8)), ValueError), (lambda: tr.Transformer(0, 8, 2), ValueError),
    (lambda: tr.block_from(nn.Linear(2, 2)), TypeError), (lambda: tr.block_from(nn.TransformerEncoderLayer(8, 2, activation=torch.tanh)), ValueError),
    (lambda: tr.transformer_parameters(0, 8), ValueError)])
def test_refusals(call, error):
    with pytest.raises(error, match='expected|cannot|needs|belongs'): call()

# ---- mutations (N9): each historic bug, re-injected, is seen by one of the parity checks above ---------------------------------------

def unscaled(q, k, mask=None):
    s = torch.einsum('bgnd,bgmd->bgnm', q, k)
    return (s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-1)
def over_queries(q, k, mask=None):
    s = torch.einsum('bgnd,bgmd->bgnm', q, k) / math.sqrt(q.shape[-1])
    return (s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-2).nan_to_num()

@pytest.mark.parametrize('wrong', [unscaled, over_queries])
def test_wrong_weights_are_caught(wrong, monkeypatch):
    "Missing 1/sqrt(d); softmax over the wrong axis."
    monkeypatch.setattr(tr, 'attention_weights', wrong)
    with pytest.raises(AssertionError): test_equals_sdpa(tr.attention_matmul, 5, 5)
    with pytest.raises(AssertionError): test_equals_multihead_attention(3, True)

def test_self_attention_passed_off_as_cross_attention_is_caught(monkeypatch):
    true = tr.Attention.qkv
    monkeypatch.setattr(tr.Attention, 'qkv', lambda self, x, context=None, cache=None, turn=None: true(self, x, None, cache, turn))
    with pytest.raises((AssertionError, ValueError, RuntimeError)): test_equals_multihead_attention(3, True)
    x, context = rand(2, 5, 12), rand(2, 5, 12, seed=1)                                     # of one length, so that no shape gives it away
    ours, theirs = twin()
    assert gap(ours(x, context), theirs(x, context, context)[0]) > 1e-2
    with pytest.raises(AssertionError): test_equals_torch_layers(nn.TransformerDecoderLayer, True, 'relu')

def test_one_head_passed_off_as_several_is_caught(monkeypatch):
    true = tr.Attention.__init__
    monkeypatch.setattr(tr.Attention, '__init__', lambda self, d, heads, bias=True: true(self, d, 1, bias))
    with pytest.raises((AssertionError, RuntimeError)): test_equals_multihead_attention(3, True)
    with pytest.raises(AssertionError): test_equals_torch_layers(nn.TransformerEncoderLayer, True, 'relu')

@pytest.mark.parametrize('by', [1, -1])
def test_a_mask_off_by_one_is_caught(by, monkeypatch):
    monkeypatch.setattr(tr, 'causal_mask', lambda n, device=None: torch.ones(n, n, dtype=torch.bool).tril(by))
    with pytest.raises((AssertionError, ValueError, RuntimeError)): test_nobody_sees_the_future_or_the_padding('pre')
    with pytest.raises(AssertionError): test_equals_sdpa(tr.attention, 5, 5)

def test_a_padding_mask_off_by_one_is_caught(monkeypatch):
    true = tr.padding_mask
    monkeypatch.setattr(tr, 'padding_mask', lambda lengths, n: true((lengths + 1).clamp(max=n), n))
    with pytest.raises(AssertionError): test_nobody_sees_the_future_or_the_padding('pre')

def test_dropped_places_are_caught(monkeypatch):
    monkeypatch.setattr(tr, 'rotate', lambda x, turn: x)
    with pytest.raises(AssertionError): test_rotary_is_complex_multiplication()
    monkeypatch.undo()
    monkeypatch.setattr(tr, 'sinusoidal', lambda n, d, base=1e4, dtype=torch.float32: torch.zeros(n, d, dtype=dtype))
    with pytest.raises(AssertionError): test_sinusoids_are_those_of_the_paper()

def test_norms_exchanged_are_caught(monkeypatch):
    monkeypatch.setattr(tr.Block, 'step', lambda self, x, norm, f: norm(x + f(x)) if self.pre else x + f(norm(x)))
    for first in (True, False):
        with pytest.raises(AssertionError): test_equals_torch_layers(nn.TransformerEncoderLayer, first, 'gelu')
