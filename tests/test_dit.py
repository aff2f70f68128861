"The diffusion transformer: against diffusers, torch and formulas; what is silent at first and who wakes when; orthogonal steps; a training that is killed; and mistakes that are noticed."
import json, math, os, random, subprocess, sys
from functools import partial
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse import dit as d
from latentcourse.lib.check import agree
from latentcourse.lib.checkpoint import check_figures, figure, load, save
from latentcourse.lib.state import pack, unpack
from latentcourse.text import encode
from latentcourse.toybox import LARGE, scenes, split_seeds
from latentcourse.transformer import Attention, rotate
from latentcourse.unet import velocity_loss

double = torch.float64
def some(seed, *shape): return torch.randn(*shape, dtype=double, generator=torch.Generator().manual_seed(seed))
def loud(m, seed=0, std=.3):
    torch.manual_seed(seed)
    for q in m.parameters(): nn.init.normal_(q, std=std)
    return m.requires_grad_(False)
def caught(f, *a, **k):
    with pytest.raises(AssertionError): agree(*f(*a, **k), atol=1e-6)

# ---- when ------------------------------------------------------------------------------------------------------------------------------

def circles(t, width=128, low=.5, high=16.):
    turns = torch.tensor([low * (high / low)**(i / (width // 2 - 1)) for i in range(width // 2)], dtype=double)
    z = torch.polar(torch.ones(len(t), width // 2, dtype=double), 2 * math.pi * t[:, None] * turns)
    return torch.cat([z.real, z.imag], 1) / math.sqrt(width / 2)

@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.floats(.1, 2), st.floats(3, 60), st.integers(0, 99))
def test_waves_are_circles_and_have_length_one(half, low, high, seed):
    t = torch.rand(5, dtype=double, generator=torch.Generator().manual_seed(seed))
    e = d.unit_waves(t, 2 * half, low, high)
    agree(e, circles(t, 2 * half, low, high), atol=1e-9)
    agree(e.norm(dim=1), torch.ones(5), atol=1e-12)
    agree(d.unit_waves(t + .25, 2 * half, low, high) @ d.unit_waves(t[:1] + .25, 2 * half, low, high).T, e @ e[:1].T, atol=1e-9)     # only distances count

@pytest.mark.parametrize('wrong', ['1/sqrt(d)', 'even ladder', 'sines first', 'no 2 pi'])
def test_mistakes_in_the_waves_are_noticed(wrong):
    t = torch.rand(5, dtype=double)
    e = d.unit_waves(t)
    turns = torch.linspace(.5, 16, 64, dtype=double) if wrong == 'even ladder' else torch.tensor([.5 * 32**(i / 63) for i in range(64)], dtype=double)
    a = t[:, None] * turns * (1 if wrong == 'no 2 pi' else 2 * math.pi)
    parts = [a.sin(), a.cos()] if wrong == 'sines first' else [a.cos(), a.sin()]
    caught(lambda: (e, torch.cat(parts, 1) / math.sqrt(128 if wrong == '1/sqrt(d)' else 64)))

@pytest.mark.parametrize('shift', [0, 1])
def test_published_clock(shift):
    embeddings = pytest.importorskip('diffusers.models.embeddings')
    i = torch.arange(1_000)
    agree(d.step_waves(i.double() / 1_000, 256, shift), embeddings.get_timestep_embedding(i, 256, flip_sin_to_cos=True, downscale_freq_shift=shift), atol=2e-4)     # theirs is in single precision
    early = torch.arange(8)
    agree(d.step_waves(early.double() / 1_000, 256, shift), embeddings.get_timestep_embedding(early, 256, flip_sin_to_cos=True, downscale_freq_shift=shift), atol=2e-6)

def test_first_layer_makes_numbers_of_variance_one():
    torch.manual_seed(0)
    h = d.timed(128, 4_096)[0](d.unit_waves(torch.rand(50)))
    assert abs(h.var() - 1) < .02 and nn.Linear(128, 4_096)(d.unit_waves(torch.rand(50))).var() < .02

# ---- where -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('side, width', [(4, 16), (8, 160), (16, 48)])
def test_published_places(side, width):
    embeddings = pytest.importorskip('diffusers.models.embeddings')
    agree(d.grid_waves(side, side, width), embeddings.get_2d_sincos_pos_embed(width, side, base_size=side), atol=1e-6)

def test_places_of_a_rectangle():
    got = d.grid_waves(3, 5, 8).double().reshape(3, 5, 8)
    for r in range(3):
        for u in range(5): agree(got[r, u], torch.tensor([math.sin(u), math.sin(u / 100), math.cos(u), math.cos(u / 100), math.sin(r), math.sin(r / 100), math.cos(r), math.cos(r / 100)], dtype=double), atol=1e-6)

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_turned_places_say_their_offset_alone(rows, columns, quarter, seed):
    width = 4 * quarter
    q, k = some(seed, 2, width)
    turn = d.grid_turn(rows, columns, width).double()
    got = rotate(q.expand(rows * columns, width), turn) @ rotate(k.expand(rows * columns, width), turn).T
    theta = [100.**(-2 * j / (width // 2)) for j in range(quarter)]
    def logit(dr, du):
        out = 0.
        for j in range(width // 2):
            a, b, angle = complex(*q[2 * j:2 * j + 2].tolist()), complex(*k[2 * j:2 * j + 2].tolist()), theta[j % quarter] * (dr if j < quarter else du)
            out += (a * b.conjugate() * complex(math.cos(angle), math.sin(angle))).real
        return out
    want = [[logit(i // columns - j // columns, i % columns - j % columns) for j in range(rows * columns)] for i in range(rows * columns)]
    agree(got, torch.tensor(want, dtype=double), atol=1e-5)

@pytest.mark.parametrize('f', [lambda: d.unit_waves(torch.rand(3), 5), lambda: d.unit_waves(torch.rand(3, 1)), lambda: d.unit_waves(torch.rand(3), 2), lambda: d.step_waves(torch.rand(3), 7), lambda: d.grid_turn(2, 2, 6), lambda: d.grid_waves(2, 2, 6),
                               lambda: d.DiT(size=16, patch=3), lambda: d.orthogonalised(torch.randn(3)), lambda: d.text_field(d.DiT(d=16, depth=1), []), lambda: d.text_field(d.DiT(d=16, depth=1), 'a mug'), lambda: d.text_field(d.DiT(d=16, depth=1), ['a mug'], negative=['', ''])])
def test_what_makes_no_sense_is_refused(f):
    with pytest.raises(ValueError, match='expected'): f()

# ---- a block ---------------------------------------------------------------------------------------------------------------------------

def test_adaptive_norm_is_a_norm_with_told_weights():
    x, (a, s) = some(0, 4, 7, 12), some(1, 2, 4, 12)
    want = torch.stack([F.layer_norm(x[i], (12,), 1 + s[i], a[i], 1e-6) for i in range(4)])
    agree(d.modulate(d.plain_norm(12)(x), a, s), want, atol=1e-12)
    caught(lambda: (d.modulate(d.plain_norm(12)(x), s, a), want))                                  # exchanged
    caught(lambda: (d.modulate(d.plain_norm(12)(x), a, s - 1), want))                              # the 1 left out
    caught(lambda: (d.modulate(d.plain_norm(12)(x), a, 1.01 * s), want))

def peer(attention):
    p = nn.MultiheadAttention(attention.d, attention.heads, batch_first=True).double()
    p.load_state_dict({'in_proj_weight': attention.in_proj.weight, 'in_proj_bias': attention.in_proj.bias, 'out_proj.weight': attention.out.weight, 'out_proj.bias': attention.out.bias})
    return lambda q, kv, pad=None: p(q, kv, kv, key_padding_mask=pad)[0].detach()

def by_torch(block, x, e, words, heard, six=None):
    a, b, c, f, g, h = six if six is not None else (v[:, None] for v in block.modulation.make(F.silu(e)).chunk(6, 1))
    norm = lambda y: F.layer_norm(y, y.shape[-1:], eps=1e-6)
    m = norm(x) * (1 + b) + a
    x = x + c * peer(block.own)(m, m)
    x = x + peer(block.cross)(block.cross_norm(x), block.words(words), ~heard)
    return x + h * block.feed(norm(x) * (1 + g) + f)

@pytest.fixture(scope='module')
def scene():
    return some(2, 3, 12, 16), some(3, 3, 16), some(4, 3, 5, 10), torch.arange(5) < torch.tensor([[5], [3], [1]])

@pytest.mark.parametrize('shared', [False, True])
def test_block_is_made_of_torchs_attention(scene, shared):
    x, e, words, heard = scene
    block = loud(d.DiTBlock(16, 4, cross=10, shared=shared).double())
    six = some(5, 6, 3, 16)
    want = by_torch(block, x, e, words, heard, [(block.table[i] + six[i])[:, None] for i in range(6)] if shared else None)
    agree(block(x, six if shared else e, words, heard[:, None, None]), want, atol=1e-9)

MISTAKES = ['gate left out', 'gates exchanged', 'no mask', 'one head', 'words look at themselves', 'norm of another eps', 'relu', 'no 1 +']

@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_in_a_block_are_noticed(scene, mistake, monkeypatch):
    x, e, words, heard = scene
    block = loud(d.DiTBlock(16, 4, cross=10).double())
    want, seen = by_torch(block, x, e, words, heard), heard[:, None, None]
    if mistake == 'gate left out': monkeypatch.setattr(d, 'gated', lambda x, g, y: x + y)
    elif mistake == 'gates exchanged': block.modulation.make.weight.data = block.modulation.make.weight.reshape(6, 16, 16)[[0, 1, 5, 3, 4, 2]].reshape(96, 16)
    elif mistake == 'no mask': seen = None
    elif mistake == 'one head': block.own.heads = 1
    elif mistake == 'words look at themselves': monkeypatch.setattr(block.cross, 'forward', lambda x, context, mask: Attention.forward(block.cross, x))
    elif mistake == 'norm of another eps': block.norms[0].eps = 1e-2
    elif mistake == 'relu': block.feed.act = nn.ReLU()
    else: monkeypatch.setattr(d, 'modulate', lambda x, a, s: x * s[:, None] + a[:, None])
    caught(lambda: (block(x, e, words, seen), want))

def test_blocks_want_their_words(scene):
    x, e, words, heard = scene
    with pytest.raises(ValueError, match='expected a context'): d.DiTBlock(16, 4, cross=10).double()(x, e)
    with pytest.raises(ValueError, match='no entrance'): d.DiTBlock(16, 4).double()(x, e, words)

def test_near_sees_its_neighbours_and_no_words():
    near = loud(d.Near(3).double())
    x = some(6, 1, 20, 3)
    changed = x.clone(); changed[0, 6] += 1                                                         # row 1, column 1 of 4 x 5
    moved = (near(changed, 4) - near(x, 4)).abs().amax((0, 2)).reshape(4, 5) > 1e-12
    assert moved.tolist() == [[r <= 2 and u <= 2 for u in range(5)] for r in range(4)]
    weight = near.conv.weight[:, 0].flip(1, 2)                                                      # the other way to say it: a response to a point
    agree((near(changed, 4) - near(x, 4)).reshape(4, 5, 3)[:3, :3], weight.permute(1, 2, 0) + torch.eye(9)[4].reshape(3, 3, 1), atol=1e-9)
    block = loud(d.DiTBlock(16, 4, near=True).double())
    y, e = some(7, 2, 15, 16), some(8, 2, 16)
    block.own.out.weight.zero_(); block.own.out.bias.zero_(); block.feed.down.weight.zero_(); block.feed.down.bias.zero_()
    assert torch.equal(block(y, e, rows=3, places=12)[:, 12:], y[:, 12:])
    agree(block(y, e, rows=3, places=12)[:, :12], block.near(y[:, :12], 3), atol=1e-12)

# ---- the network -----------------------------------------------------------------------------------------------------------------------

def words_for(net, b=2):
    tokens, heard, pooled = encode(d.the_text(), ['a red ball to the left of a blue car', 'a mug'][:b])
    return tuple(v.to(net.embed.weight.dtype) if v.is_floating_point() else v for v in (tokens, heard, pooled))

@pytest.mark.parametrize('options', [{}, {'shared': True, 'near': True}, {'rope': True, 'qk_norm': True}], ids=str)
def test_a_new_network_says_nothing_and_its_blocks_pass_everything_on(options):
    torch.manual_seed(1)
    net = d.DiT(d=32, depth=3, **options)
    x, said = torch.randn(2, 4, 16, 16), words_for(net)
    assert not net(x, torch.rand(2), *said).any()
    seen, h = [], net.embed(d.patchify(x, 2)) + net.places
    net.exit.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    net(x, torch.rand(2), *said)
    assert torch.equal(seen[0], h)

def test_without_places_it_cannot_tell_confetti():
    net, order = loud(d.DiT(d=32, depth=2).double()), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    mix = lambda z: d.unpatchify(d.patchify(z, 2)[:, order], 2)
    x, said, t = some(9, 2, 4, 16, 16), words_for(net), torch.rand(2, dtype=double)
    gap = lambda net: (net(mix(x), t, *said) - mix(net(x, t, *said))).abs().max().item()
    assert gap(net) > 1e-3
    net.places.zero_()
    assert gap(net) < 1e-9
    turned = loud(d.DiT(d=32, depth=2, rope=True).double()); turned.places.zero_()
    assert gap(turned) > 1e-3

def test_words_are_silent_at_first_and_heard_by_both_entrances():
    net = loud(d.DiT(d=32, depth=2).double())
    x, t, (tokens, heard, pooled) = some(10, 2, 4, 16, 16), torch.rand(2, dtype=double), words_for(net)
    says = lambda tokens, pooled: net(x, t, tokens, heard, pooled)
    assert (says(tokens, pooled) - says(tokens.flip(2), pooled)).abs().max() > 1e-4 and (says(tokens, pooled) - says(tokens, pooled.flip(1))).abs().max() > 1e-4
    agree(says(tokens, pooled), says(torch.where(heard[..., None], tokens, 99.), pooled), atol=1e-9)
    for b in net.blocks:
        for q in b.cross.out.parameters(): q.zero_()
    assert torch.equal(says(tokens, pooled), says(tokens.flip(2), pooled))

@pytest.mark.parametrize('shared', [False, True])
def test_who_wakes_when(shared):
    torch.manual_seed(0)
    net = d.DiT(d=16, depth=2, heads=2, near=True, shared=shared).double()
    x, t, said = some(11, 2, 4, 16, 16), torch.tensor([.2, .7], dtype=double), words_for(net)
    opt, awake = torch.optim.SGD(net.parameters(), .1), []
    for k in range(3):
        opt.zero_grad(); velocity_loss(lambda xt, s: net(xt, s, *said), x, t, some(20 + k, 2, 4, 16, 16)).mean().backward()
        awake.append({n for n, q in net.named_parameters() if q.grad is not None and q.grad.any()})
        opt.step()
    assert awake[0] == {'exit.out.weight', 'exit.out.bias'}
    free = {n for n, _ in net.named_parameters() if n.startswith(('embed', 'places', 'exit', 'shared')) or any(s in n for s in ('modulation', 'table', 'near', 'cross.out'))}
    assert awake[1] == free
    rest = {n for n, _ in net.named_parameters()} - awake[2]
    assert all(n.endswith('in_proj.bias') for n in rest), rest                                      # a bias of keys alone never counts; the row holds queries and values too

def test_classes_are_forgotten_in_training_alone():
    torch.manual_seed(0)
    net = loud(d.DiT(d=16, depth=1, heads=2, words=0, pooled=0, cross=False, classes=5, drop=.3).double())
    t, y = torch.full((2_000,), .4, dtype=double), torch.full((2_000,), 2)
    net.eval()
    told, silent = net.known(t[:1], y=y[:1]), net.known(t[:1])
    agree(silent, net.known(t[:1], y=torch.tensor([5])), atol=0)
    assert (told - silent).abs().max() > 1e-3
    agree(net.known(t, y=y), told.expand(2_000, -1), atol=1e-9)
    lost = (net.train().known(t, y=y) - silent).abs().amax(1) < 1e-9
    assert abs(lost.double().mean() - .3) < 5 * math.sqrt(.21 / 2_000)

@pytest.mark.parametrize('f, says', [(lambda net: net(torch.randn(2, 3, 16, 16), torch.rand(2)), r'\(b, 4, 16, 16\)'), (lambda net: net(torch.randn(2, 4, 8, 32), torch.rand(2)), r'\(b, 4, 16, 16\)'),
                                     (lambda net: net(torch.randn(2, 4, 16, 16), torch.rand(2)), 'expected pooled'), (lambda net: net(torch.randn(2, 4, 16, 16), torch.rand(2), pooled=torch.randn(2, 128)), 'expected a context')])
def test_networks_say_what_is_missing(f, says):
    with pytest.raises(ValueError, match=says): f(d.DiT(d=16, depth=1))

# ---- the published network -------------------------------------------------------------------------------------------------------------

class OurWaves(nn.Module):
    def forward(self, step): return d.step_waves(step.double() / 1_000, 256)                        # theirs computes in single precision

def published(seed=0, ours=True, **changed):
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(seed)
    model = diffusers.DiTTransformer2DModel(**(dict(num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10) | changed)).double().eval()
    for b in model.transformer_blocks:
        b.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        if ours: b.norm1.emb.time_proj = OurWaves()
    return model.requires_grad_(False)

def asked(model, seed=0):
    c = model.config
    return some(seed, 3, c.in_channels, c.sample_size, c.sample_size), torch.tensor([0, 500, 999]), torch.tensor([0, c.num_embeds_ada_norm, 3])

@pytest.mark.parametrize('changed', [{}, dict(patch_size=4, in_channels=3, out_channels=3), dict(num_attention_heads=1, attention_head_dim=24, num_layers=3), dict(norm_eps=1e-2, num_embeds_ada_norm=4)], ids=str)
def test_it_is_the_published_network(changed):
    theirs = published(3, **changed)
    ours, (x, step, y) = d.dit_from_diffusers(theirs), asked(theirs)
    want = theirs(x, step, y).sample
    assert want.std() > .05
    agree(ours(x, step.double() / 1_000, y=y), want, atol=1e-9)
    again = published(4, **changed)
    again.load_state_dict(d.diffusers_state(ours))
    agree(again(x, step, y).sample, want, atol=0)

def test_gradients_are_those_of_the_published_network():
    theirs = published(5).requires_grad_(True)
    ours, (x, step, y) = d.dit_from_diffusers(theirs), asked(theirs)
    ours(x, step.double() / 1_000, y=y).square().mean().backward(); theirs(x, step, y).sample.square().mean().backward()
    with torch.no_grad():
        for q in ours.parameters(): q.copy_(torch.zeros_like(q) if q.grad is None else q.grad)     # so that the translation translates gradients
    got, grads = d.diffusers_state(ours), {n: q.grad for n, q in theirs.named_parameters() if q.grad is not None}
    for k in (k for k in got if '.norm1.emb.' not in k): agree(got[k], grads[k], atol=1e-9)
    for k in {k.split('.norm1.emb.')[1] for k in got if '.norm1.emb.' in k}:                        # one embedding here, a copy in each block there
        agree(got[f'transformer_blocks.0.norm1.emb.{k}'], sum(g for n, g in grads.items() if n.endswith(f'.norm1.emb.{k}')), atol=1e-9)

def test_single_precision_with_their_own_waves():
    theirs = published(6, ours=False).float()
    x, step, y = asked(theirs)
    agree(d.dit_from_diffusers(theirs)(x.float(), step / 1_000, y=y), theirs(x.float(), step, y).sample, atol=2e-4)

def test_gelu_of_the_published_network_spares_its_argument_only_where_gradients_are_asked_for():
    x = some(7, 6, 9)
    want = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + .044715 * x**3)))
    asked, given = x.clone().requires_grad_(), x.clone()
    y = d.TanhGELU()(asked)
    agree(y.detach(), want, atol=1e-12), agree(asked.detach(), x, atol=0)
    with torch.no_grad(): over = d.TanhGELU()(given)
    agree(over, want, atol=1e-12), agree(given, want, atol=1e-12)
    slope = (d.TanhGELU()(x + 1e-6) - d.TanhGELU()(x - 1e-6)) / 2e-6
    agree(torch.autograd.grad(y.sum(), asked)[0], slope, atol=1e-8)
    caught(lambda: (F.gelu(x), want))                                                              # the exact one

@pytest.mark.parametrize('mistake', ['exact GELU', 'unit waves', 'no places', 'shift and scale exchanged', 'keys for queries', 'other patch order', 'the other clock', 'other eps', 'places of rows first', 'null class forgotten'])
def test_mistakes_in_the_published_network_are_noticed(mistake):
    theirs = published(7, norm_eps=1e-3)
    ours, (x, step, y) = d.dit_from_diffusers(theirs), asked(theirs)
    want, t = theirs(x, step, y).sample, step.double() / 1_000
    agree(ours(x, t, y=y), want, atol=1e-9)
    if mistake == 'exact GELU':
        for b in ours.blocks: b.feed.act = nn.GELU()
    elif mistake == 'unit waves': ours.clock = d.unit_waves
    elif mistake == 'no places': ours.places.data.zero_()
    elif mistake == 'shift and scale exchanged': w = ours.blocks[1].modulation.make.weight; w.data = w.reshape(6, 32, 32)[[1, 0, 2, 3, 4, 5]].reshape(192, 32)
    elif mistake == 'keys for queries': w = ours.blocks[0].own.in_proj.weight; w.data = w.reshape(3, 32, 32)[[1, 0, 2]].reshape(96, 32)
    elif mistake == 'other patch order': w = ours.exit.out.weight; w.data = w.reshape(2, 2, 8, 32).permute(2, 0, 1, 3).reshape(32, 32)
    elif mistake == 'the other clock': ours.clock = lambda t, k: d.step_waves(t, k, 0)
    elif mistake == 'other eps': ours.blocks[0].norms[1].eps = 1e-6
    elif mistake == 'places of rows first': ours.places.data = ours.places.reshape(16, 2, 16).flip(1).reshape(16, 32)
    else: y = y.clamp(max=9)
    caught(lambda: (ours(x, t, y=y), want))

def test_what_is_not_the_published_network_is_refused():
    with pytest.raises(TypeError, match='expected a DiTTransformer2DModel'): d.dit_from_diffusers(nn.Linear(2, 2))
    with pytest.raises(TypeError, match='tanh GELU'): d.dit_from_diffusers(published(activation_fn='gelu'))
    other = published(ours=False)
    with torch.no_grad(): next(other.transformer_blocks[1].norm1.emb.parameters()).add_(1)
    with pytest.raises(ValueError, match='one embedding for all'): d.dit_from_diffusers(other)
    for net in (d.DiT(d=16, depth=1, heads=2), d.DiT(d=16, depth=1, heads=2, words=0, pooled=0, cross=False, classes=3, shared=True)):
        with pytest.raises(TypeError, match='diffusers has no other'): d.diffusers_state(net)

def test_published_sizes():
    def count(width, depth, heads):
        with torch.device('meta'): return sum(q.numel() for q in d.DiT(32, d=width, depth=depth, heads=heads, words=0, pooled=0, cross=False, classes=1_000, waves=256, answers=8).parameters())
    assert [round(count(*s) / 1e6) for s in ((384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16))] == [33, 131, 458, 675]      # S, B, L, XL with patches of 2; published: 33, 130, 458, 675

# ---- queries and keys of length one ----------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.sampled_from([1, 2, 4]), st.floats(.5, 50))
def test_normed_logits_do_not_grow(seed, heads, gain):
    look = loud(Attention(16, heads, qk_norm=True).double(), seed, 1.)
    x, turn = some(seed, 2, 12, 16), d.grid_turn(3, 4, 16 // heads).double()
    maps = look.maps(x, turn=turn)
    q, k, _ = look.qkv(x, turn=turn)
    logits = q @ k.mT / math.sqrt(16 / heads)
    assert logits.abs().max() <= math.sqrt(16 / heads) * look.q_norm.weight.abs().max() * look.k_norm.weight.abs().max() + 1e-9
    agree(maps, logits.softmax(-1), atol=1e-9)
    look.in_proj.weight.mul_(gain); look.in_proj.bias.mul_(gain)
    agree(look.maps(x, turn=turn), maps, atol=1e-4)

# ---- orthogonal steps ------------------------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 99))
def test_orthogonalised_acts_on_singular_values_alone(m, n, seed):
    G = some(seed, m, n)
    U, s, Vt = torch.linalg.svd(G, full_matrices=False)
    s = s / s.norm()
    for _ in range(5): s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    agree(d.orthogonalised(G), U @ s.diag() @ Vt, atol=1e-7)
    agree(d.orthogonalised(2.5 * G), d.orthogonalised(G), atol=1e-7)

@pytest.mark.parametrize('abc', [(3.4445 * 1.01, -4.7750, 2.0315), (3.4445, -4.7750 * 1.01, 2.0315), (3.4445, 4.7750, 2.0315), (3.4445, -4.7750, 2.0315 * 1.01)])
def test_other_coefficients_are_noticed(abc):
    G = some(0, 8, 12)
    caught(lambda: (d.orthogonalised(G, abc=abc), d.orthogonalised(G)))

def test_uvt_is_the_steepest_step():
    G = some(1, 6, 9)
    U, s, Vt = torch.linalg.svd(G, full_matrices=False)
    best = -(G * (U @ Vt)).sum()
    agree(best, -torch.linalg.matrix_norm(G, 'nuc'), atol=1e-9)
    for seed in range(200):
        D = -(U @ Vt) + .2 * some(seed, 6, 9)
        assert (G * D).sum() / torch.linalg.matrix_norm(D, 2) > best

def small_net(): torch.manual_seed(0); return d.DiT(d=16, depth=1, heads=2, shared=True, near=True)

def test_parameters_are_shared_out():
    for net in (small_net(), d.DiT(d=16, depth=1, heads=2)):
        matrices, rest = d.inner_matrices(net)
        names = {id(q): n for n, q in net.named_parameters()}
        assert sorted(map(id, [*matrices, *rest])) == sorted(names) and all(q.ndim == 2 for q in matrices)
        assert {names[id(q)] for q in matrices} == {f'blocks.0.{n}.weight' for n in ('own.in_proj', 'own.out', 'feed.up', 'feed.down', 'words', 'cross.in_proj', 'cross.out')}

def stepped(opts, net, steps, first=0):
    for k in range(first, first + steps):
        for i, q in enumerate(net.parameters()): q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1_000 * k + i)).to(q)
        for o in opts: o.step()

def by_singular_values(G):
    "Five rounds of the polynomial on the singular values themselves."
    U, s, Vt = torch.linalg.svd(G, full_matrices=False)
    s = s / s.norm()
    for _ in range(5): s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ Vt

def test_muon_takes_the_step_of_its_equation():
    net = small_net().double()
    matrices, _ = d.inner_matrices(net)
    opt, W, M = d.Muon(matrices, 3e-3, .1), [q.detach().clone() for q in matrices], [0.] * len(matrices)
    assert len({q.shape for q in W}) < len(W)                                   # some are stacked
    for k in range(4):
        stepped([opt], net, 1, k)
        for i, q in enumerate(matrices):
            M[i] = .95 * M[i] + .05 * q.grad
            W[i] = (1 - 3e-4) * W[i] - .2 * 3e-3 * max(q.shape)**.5 * by_singular_values(.95 * M[i] + .05 * q.grad)
    for q, w in zip(matrices, W): torch.testing.assert_close(q.detach(), w, rtol=0, atol=1e-10)

@pytest.mark.parametrize('wrong', [dict(longer=1.01), dict(momentum=.9), dict(decay=.2)])
def test_a_wrong_muon_is_caught(wrong):
    net = small_net().double()
    q = d.inner_matrices(net)[0][0]
    opt, w, m = d.Muon([q], 3e-3, wrong.get('decay', .1)), q.detach().clone(), 0.
    opt.param_groups[0]['momentum'] = wrong.get('momentum', .95)
    for k in range(2):
        stepped([opt], net, 1, k)
        m = .95 * m + .05 * q.grad
        w = (1 - 3e-4) * w - wrong.get('longer', 1.) * .2 * 3e-3 * max(q.shape)**.5 * by_singular_values(.95 * m + .05 * q.grad)
    assert (q.detach() - w).abs().max() > 1e-7

def test_one_optimizer_is_two():
    a, b, start = small_net(), small_net(), small_net()
    opt = d.MuonAdamW(*d.inner_matrices(a), 3e-3, .1)
    m, r = d.inner_matrices(b)
    two = torch.optim.Muon(m, 3e-3, .1, adjust_lr_fn='match_rms_adamw'), torch.optim.AdamW(r, 3e-3, (.9, .99), weight_decay=0.)
    rates = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)) for o in (opt, *two)]
    for k in range(4):
        stepped([opt], a, 1, k); stepped(two, b, 1, k)
        for rate in rates: rate.step()
    ours = set(map(id, d.inner_matrices(a)[0]))
    for p, q, s in zip(a.parameters(), b.parameters(), start.parameters()):
        way, theirs = (p - s).flatten(), (q - s).flatten()                      # torch multiplies matrices in bf16; the rest is the same method
        if id(p) in ours: assert F.cosine_similarity(way, theirs, 0) > .999 and abs(way.norm() / theirs.norm() - 1) < .01
        else: torch.testing.assert_close(way, theirs, rtol=1e-4, atol=1e-7)
    opt.zero_grad()
    assert all(q.grad is None for q in a.parameters()) and len(opt.state) == len(list(a.parameters()))

def test_the_state_of_the_optimizer_survives_a_file(tmp_path):
    straight, first = small_net(), small_net()
    opt = d.MuonAdamW(*d.inner_matrices(straight), 3e-3)
    stepped([opt], straight, 5)
    opt = d.MuonAdamW(*d.inner_matrices(first), 3e-3)
    stepped([opt], first, 2)
    tensors = {}
    state = pack({'opt': opt.state_dict(), 'model': first.state_dict()}, tensors)
    save(tmp_path / 's.safetensors', tensors, {'state': state})
    tensors, meta = load(tmp_path / 's.safetensors')
    state, again = unpack(meta['state'], tensors), small_net()
    opt = d.MuonAdamW(*d.inner_matrices(again), 3e-3)
    again.load_state_dict(state['model']); opt.load_state_dict(state['opt'])
    stepped([opt], again, 3, 2)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), again.parameters()))
    forgot = small_net(); forgot.load_state_dict(state['model'])
    stepped([d.MuonAdamW(*d.inner_matrices(forgot), 3e-3)], forgot, 3, 2)
    assert not all(torch.equal(p, q) for p, q in zip(straight.parameters(), forgot.parameters()))

# ---- the recipe ------------------------------------------------------------------------------------------------------------------------

TINY = d.DitCfg(d=32, depth=1, heads=2, scenes=64, steps=6, batch=8)

@pytest.fixture(scope='module')
def data(): return d.large_latents(64)

def test_what_is_told_is_what_was_cached(data):
    from latentcourse.captions import captions
    from latentcourse.text import MANNERS
    seeds = split_seeds('train', 0, 6)
    labels = scenes(seeds, LARGE).labels
    assert torch.equal(data['labels'][:6].long(), labels)
    for seed in range(4):
        torch.manual_seed(seed); j = torch.multinomial(torch.tensor(d.SAID), 1).item()
        want = encode(d.the_text(), captions(labels, seeds, *MANNERS[j]))
        torch.manual_seed(seed); sequence, heard, pooled = d.retold(data['ids'][:6], data['lengths'][:6], 0.)
        n = want[1].shape[1]                                                    # `retold` pads to a multiple of 32
        agree(pooled, want[2], atol=1e-4); agree((sequence * heard[..., None])[:, :n], want[0], atol=1e-4)
        assert torch.equal(heard[:, :n], want[1]) and not heard[:, n:].any() and heard.shape[1] % 32 == 0

def test_silence_is_the_empty_caption(data):
    silent = encode(d.the_text(), [''])
    torch.manual_seed(0); sequence, heard, pooled = d.retold(data['ids'][:40], data['lengths'][:40], .5)
    lost = (pooled - silent[2]).abs().amax(1) < 1e-4
    assert 8 < lost.sum() < 32 and (heard[lost].sum(1) == 2).all() and (heard[~lost].sum(1) > 2).all()

def test_manners_are_told_as_often_as_said(data):
    said = []
    for seed in range(300): torch.manual_seed(seed); said.append(torch.multinomial(torch.tensor(d.SAID), 1).item())
    assert sum(d.SAID) == pytest.approx(1) and abs(said.count(0) / 300 - .5) < 5 * math.sqrt(.25 / 300)

@pytest.mark.parametrize('changed', [dict(), dict(muon=False, times='logit-normal'), dict(rope=True, qk_norm=True, shared=False, near=False)], ids=str)
def test_training_repeats_itself(data, changed):
    cfg, ends = d.replace(TINY, **changed), []
    for _ in range(2):
        net = d.build_dit(cfg)
        log = list(d.learn_dit(net, cfg, data, progress=False))
        ends.append((log[-1].loss, {k: v.clone() for k, v in net.state_dict().items()}))
    assert len(log) == 6 and ends[0][0] == ends[1][0] and all(torch.equal(v, ends[1][1][k]) for k, v in ends[0][1].items())
    assert (net.std - data['z'].float().std((0, 2, 3))).abs().max() < 1e-4

def test_noise_does_not_depend_on_how_latents_lie_in_memory(data):
    losses = []
    for z in (data['z'].contiguous(), data['z'].contiguous(memory_format=torch.channels_last)): losses.append(next(d.learn_dit(d.build_dit(TINY), TINY, {**data, 'z': z}, progress=False)).loss)
    assert losses[0] == losses[1]

def test_times_have_names(data):
    with pytest.raises(ValueError, match='even or logit-normal'): next(d.learn_dit(d.build_dit(TINY), d.replace(TINY, times='late'), data, progress=False))

def test_guided_field_is_two_calls_of_the_network(data):
    net = loud(d.DiT(d=32, depth=1, heads=2), 0, .15).eval()
    x, t, texts = torch.randn(2, 4, 16, 16), torch.tensor([.2, .8]), ['a red ball', 'a blue car']
    said = [net(x, t, *encode(d.the_text(), v)) for v in (texts, ['', ''], ['a mug', 'a star'])]
    size = max(v.abs().max().item() for v in said)
    for w, negative, want in ((1, '', said[0]), (0, '', said[1]), (3., '', said[1] + 3 * (said[0] - said[1])), (2., ['a mug', 'a star'], said[2] + 2 * (said[0] - said[2]))):
        agree(d.text_field(net, texts, w, negative)(x, t), want, atol=.1 * size)                     # in bfloat16, where that helps
    assert (d.text_field(net, texts, 3.)(x, t) - (said[0] + 3 * (said[1] - said[0]))).abs().max() > .2 * size                 # from the words to silence
    with pytest.raises(ValueError, match='as many'): d.text_field(net, texts, negative=['a mug'] * 3)

def test_dreams_do_not_depend_on_their_batch(data):
    net = loud(d.DiT(d=32, depth=1, heads=2), 0, .15).eval()
    texts = ['a red ball', 'a blue car', 'a big mug on grass']
    whole, parts = d.dream(net, texts, steps=3, seed=4), d.dream(net, texts, steps=3, seed=4, batch=2)
    agree(whole, parts, atol=.1 * whole.abs().max().item())
    assert d.pictures_of(whole).shape == (3, 3, 64, 64)

def test_wishes_count_what_was_asked_for():
    texts, want = d.wishes(40, omit=.5)
    assert len(texts) == 40 and (want == -1).any()
    full = d.wishes(40)[1]
    assert torch.equal(full, scenes(split_seeds('test', 0, 40)).labels) and (want[want >= 0] == full[want >= 0]).all()
    right = d.fulfilled(full, full)
    assert all(v.all() for v in right.values()) and len(right['one toy, its colour']) + len(right['two toys, each its colour']) == 40
    wrong = full.clone(); wrong[:, 7] = (wrong[:, 7] + 1) % 9
    seen = d.fulfilled(wrong, full)
    assert not seen['two toys, each its colour'].any() and seen['one toy, its colour'].all() and seen['toy'].all() and torch.equal(seen['all toys, all colours'], full[:, 6] < 0)

def test_examination_and_survey_speak_of_every_scene(data):
    net = d.build_dit(TINY).eval().requires_grad_(False)
    found = d.examine_dit(net, 8, large=True)
    assert len(found) == 6 and all(v.shape == (8,) for v in found.values())
    agree(found['loss at 0.5, told'], found['loss at 0.5, not told'], atol=1e-6)                    # it says nothing yet, whatever it is told
    assert len(d.survey_prompts(net, 4, large=True, steps=1)['toy']) == 4

# ---- killed ----------------------------------------------------------------------------------------------------------------------------

def child(out):
    "A short training with all that has a state."
    cfg = d.replace(TINY, steps=12)
    for _ in d.learn_dit(d.build_dit(cfg), cfg, out=out, resume=True, progress=False, every=3): pass

def kill_runs(folder, kills, seed):
    "Run once to the end, then kill runs at random and let others finish them; one JSON line a kill."
    from kill_child import differing, end, fork, kill_at
    from latentcourse import latent_flow
    import time
    torch.set_num_threads(1)
    codec = d.load_codec(); d.the_text()                                                            # once, for all children
    latent_flow.load_codec, latent_flow.cached = lambda: codec, partial(latent_flow.cached, shard=16)
    rng, start = random.Random(seed), time.monotonic()
    assert end(fork(folder / 'straight', child)) == 0
    life = time.monotonic() - start
    for i in range(kills):
        out = folder / f'run{i}'
        while not kill_at(fork(out, child), life * rng.uniform(*((0, .5), (.4, .9))[i % 2]), out, False):
            for f in sorted(out.rglob('*'), reverse=True): f.rmdir() if f.is_dir() else f.unlink()  # it was already over
        left = {p.name for p in out.rglob('*') if p.is_file()} if out.exists() else set()
        code = end(fork(out, child))
        rows = [load(p)[0] for f in (folder / 'straight', out) for p in sorted(f.glob('latents/large/rows-*.safetensors'))]
        same = len(rows) == 8 and all(torch.equal(a[k], b[k]) for a, b in zip(rows[:4], rows[4:]) for k in a)
        print(json.dumps({'shards': sum(n.startswith('rows-') and n.endswith('.safetensors') for n in left), 'state': 'state.safetensors' in left, 'code': code, 'latents': same,
                          'differing': differing(*(f / 'state.safetensors' for f in (folder / 'straight', out))) if code == 0 else None}), flush=True)
    print('DONE', flush=True)

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='the kill test forks, which Windows cannot')
@pytest.mark.parametrize('kills', [2, pytest.param(30, marks=pytest.mark.proof)])
def test_killed_among_latents_or_steps_it_ends_in_the_same_bits(tmp_path, kills):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'OBJC_DISABLE_INITIALIZE_FORK_SAFETY': 'YES'}
    done = subprocess.run([sys.executable, __file__, str(tmp_path), str(kills), '0'], env=env, capture_output=True, text=True, timeout=300 + 60 * kills)
    found = [json.loads(line) for line in done.stdout.split('\n') if line.startswith('{')]
    assert done.returncode == 0 and 'DONE' in done.stdout and len(found) == kills, done.stdout[-1000:] + done.stderr[-3000:]
    print(found)
    assert not [f for f in found if f['code'] or f['differing'] or not f['latents']]
    if kills > 2: assert any(f['state'] for f in found) and any(f['shards'] < 4 for f in found)

def test_resumed_in_the_middle_it_goes_on_from_there(tmp_path):
    cfg = d.replace(TINY, steps=8)
    straight, (stopped, again) = d.build_dit(cfg), (d.build_dit(cfg) for _ in range(2))
    data = d.large_latents(64)
    whole = list(d.learn_dit(straight, cfg, data, progress=False))
    for r in d.learn_dit(stopped, cfg, data, out=tmp_path, every=2, progress=False):
        if r.i == 4: break
    rest = list(d.learn_dit(again, cfg, data, out=tmp_path, resume=True, progress=False))
    assert [hasattr(r, 'replayed') for r in rest] == [True] * 4 + [False] * 4 and [r.loss for r in rest] == [r.loss for r in whole]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in straight.state_dict().items())
    with pytest.raises(ValueError, match='resume=True'): list(d.learn_dit(d.build_dit(cfg), cfg, data, out=tmp_path, progress=False))

# ---- what is shipped -------------------------------------------------------------------------------------------------------------------

def test_shipped_network_is_the_one_that_was_examined():
    model, facts = d.load_dit()
    check_figures('dit', facts['evaluation'], {k: figure(v.double()) for k, v in d.examine_dit(model, 100, start=30_000, seed=3, large=True).items()})
    assert facts['evaluation']['loss at 0.1, told']['mean'] < facts['evaluation']['loss at 0.1, not told']['mean']

def test_shipped_network_paints_what_it_is_told():
    model, facts = d.load_dit()
    seen = d.survey_prompts(model, 32, first=40_000, large=True, steps=8, reader='judge', seed=2)
    check_figures('dit', facts['judged'], {k: figure(seen[k].double()) for k in ('toy', 'colour', 'background', 'layout')})

if __name__ == '__main__': kill_runs(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
