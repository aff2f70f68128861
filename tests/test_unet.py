"The network that paints: its forward pass by hand, what it is told, its loss, its floors, the field that copies, its training, its shipped weights, and its refusals."
import math
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse import unet as un
from latentcourse.diffusion import LINEAR
from latentcourse.lib import train as tr
from latentcourse.lib.check import agree, z_score
from latentcourse.lib.checkpoint import check_figures, figure
from latentcourse.samplers import euler, last, times
from latentcourse.toybox import COLOURS, HELD_OUT, TOYS, draw, scenes, split_seeds

double = torch.float64

@pytest.fixture(scope='module', params=['unet', 'digits'])
def shipped(request): return request.param, *un.load_unet(request.param)

def awake(model): # zeros hide mistakes
    torch.manual_seed(0)
    for q in model.parameters(): nn.init.normal_(q, std=.2)
    return model

def small(**how): return awake(un.UNet(**(dict(channels=2, widths=(8, 16), depth=2, patch=2, heads=2, d=12) | how)).to(double))

def pair(b=3, side=8): return torch.randn(b, 2, side, side, dtype=double), torch.rand(b, dtype=double)

# ---- the network -----------------------------------------------------------------------------------------------------------------------

def by_hand(net, xt, t, y=None, mutate=None):
    "The forward pass again, from the state alone and torch's functions; `mutate` names a mistake."
    P, depth = net.state_dict(), len(net.down[0])
    conv = lambda h, k, stride=1, pad=1: F.conv2d(h, P[k + '.weight'], P[k + '.bias'], stride, pad)
    lin = lambda h, k: h @ P[k + '.weight'].T + P[k + '.bias']
    norm = lambda h, k=None: F.group_norm(h, 8, *((P[k + '.weight'], P[k + '.bias']) if k else ()))
    w = 100. ** (torch.arange(32, dtype=double) / 31)
    e = lin(F.silu(lin(torch.cat([torch.cos(t[:, None] * w), torch.sin(t[:, None] * w)], 1), 'time.0')), 'time.2')
    if net.label is not None: e = e + P['label.weight'][torch.full((len(t),), net.classes if mutate != 'null is class 0' else 0) if y is None else y]
    e = F.silu(e)
    def block(h, k):
        a, b = lin(e, k + '.tell').chunk(2, 1)
        if mutate == 'scale without one': a = a - 1
        g = norm(conv(F.silu(norm(h, k + '.norm1')), k + '.conv1')) * (1 + a)[:, :, None, None] + b[:, :, None, None]
        return (conv(h, k + '.skip', pad=0) if k + '.skip.weight' in P else h) + conv(F.silu(g), k + '.conv2')
    def look(h, k):
        b, c, i, j = h.shape
        q, kk, v = lin(norm(h, k + '.norm').flatten(2).mT, k + '.attention.in_proj').reshape(b, i * j, 3, 2, c // 2).unbind(2)
        s = torch.einsum('bngd,bmgd->bgnm', q, kk) / math.sqrt(c // 2)
        out = lin(torch.einsum('bgnm,bmgd->bngd', s.softmax(-1), v).reshape(b, i * j, c), k + '.attention.out')
        return h + out.mT.reshape(b, c, i, j)
    h, kept, levels = conv(F.pixel_unshuffle(xt, net.patch), 'stem'), [], len(net.down)
    for n in range(levels):
        if n: h = conv(h, f'shrink.{n - 1}', 2)
        for m in range(depth): h = block(h, f'down.{n}.{m}'); kept.append(h)
    h = block(look(block(h, 'middle.0'), 'middle.1'), 'middle.2')
    if mutate == 'bridges in another order': kept = [kept[n * depth + m] for n in range(levels) for m in reversed(range(depth))]
    for n in range(levels):
        if n: h = conv(h, f'grow.{n - 1}').repeat_interleave(2, 2).repeat_interleave(2, 3)
        for m in range(depth):
            beside = kept.pop()
            h = block(torch.cat([h, beside if mutate != 'no bridges' else 0 * beside], 1), f'up.{n}.{m}')
    return F.pixel_shuffle(conv(F.silu(norm(h, 'norm')), 'out'), net.patch)

@pytest.mark.parametrize('how', [{}, dict(depth=1, widths=(8, 16, 24)), dict(patch=1, classes=4), dict(widths=(16,), classes=1)])
def test_forward_by_hand(how):
    net, (xt, t) = small(**how), pair()
    with torch.no_grad():
        agree(net(xt, t), by_hand(net, xt, t), atol=1e-9)
        if net.label is not None: agree(net(xt, t, torch.zeros(3, dtype=torch.int64)), by_hand(net, xt, t, torch.zeros(3, dtype=torch.int64)), atol=1e-9)

@pytest.mark.parametrize('mistake', ['null is class 0', 'scale without one', 'bridges in another order', 'no bridges'])
def test_mistakes_are_caught(mistake):
    net, (xt, t) = small(classes=3), pair()
    with torch.no_grad(), pytest.raises(AssertionError): agree(net(xt, t), by_hand(net, xt, t, mutate=mistake), atol=1e-3)

def test_a_new_network_says_nothing_and_blocks_add_nothing():
    net, (xt, t) = un.UNet(2, (8, 16), classes=2, heads=2).to(double), pair()
    assert torch.equal(net(xt, t), torch.zeros_like(xt))
    h, e = torch.randn(2, 8, 4, 4, dtype=double), torch.randn(2, 12, dtype=double)
    assert torch.equal(un.TimedBlock(8, 8, 12).to(double)(h, e), h) and torch.equal(un.LookAround(8, 2).to(double)(h), h)
    wider = un.TimedBlock(8, 16, 12).to(double)
    assert torch.equal(wider(h, e), wider.skip(h))

def test_gradients_reach_every_parameter():
    net, (xt, t) = small(classes=3), pair(5)
    net(xt, t, torch.tensor([0, 1, 2, 3, 3])).square().sum().backward()
    still = [k for k, q in net.named_parameters() if q.grad is None or not q.grad.abs().sum() > 0]
    assert not still, still

def test_time_and_class_are_used_and_none_has_its_own_row():
    net, (xt, t) = small(classes=3), pair()
    t.requires_grad_()
    assert (torch.autograd.grad(net(xt, t).square().sum(), t)[0].abs() > 1e-6).all()
    with torch.no_grad():
        each = [net(xt, t, torch.full((3,), k)) for k in range(4)]
        assert torch.equal(each[3], net(xt, t))
        assert min((a - b).abs().max().item() for i, a in enumerate(each) for b in each[:i]) > 1e-4
    net(xt, t).square().sum().backward()                               # silence teaches its own row, and no other
    moved = net.label.weight.grad.abs().sum(1)
    assert moved[3] > 0 and not moved[:3].any()

def test_pictures_do_not_see_each_other():
    net, (xt, t) = small(classes=2), pair(4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        agree(net(xt[order], t[order]), net(xt, t)[order], atol=1e-10)
        agree(net(xt[:1], t[:1]), net(xt, t)[:1], atol=1e-10)
        net.train(); agree(net(xt, t), net.eval()(xt, t), atol=0.)      # nothing that training switches

def test_looking_around_knows_no_places():
    look, h, order = awake(un.LookAround(16, 2).to(double)), torch.randn(2, 16, 3, 3, dtype=double), torch.randperm(9)
    shuffle = lambda v: v.flatten(2)[:, :, order].reshape(v.shape)
    with torch.no_grad(): agree(look(shuffle(h)), shuffle(look(h)), atol=1e-10)

def test_other_sizes_and_half_precision():
    net = small().float()
    with torch.no_grad():
        assert net(torch.randn(2, 2, 16, 8), torch.rand(2)).shape == (2, 2, 16, 8)
        with torch.autocast('cpu', torch.bfloat16): assert net(torch.randn(2, 2, 8, 8), torch.rand(2)).dtype == torch.float32

# ---- the loss and its floors ----------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.sampled_from([(3,), (1, 4, 4), (3, 2, 5)]), st.integers(0, 99))
def test_loss_is_one_number_a_sample(b, shape, seed):
    g = torch.Generator().manual_seed(seed)
    x, eps, t = (torch.randn(b, *s, generator=g, dtype=double) for s in (shape, shape, ()))
    t = t.sigmoid()
    field = lambda xt, t: xt.sin() * (1 + t.reshape(-1, *[1] * len(shape)))
    got = un.velocity_loss(field, x, t, eps)
    want = [sum((math.sin(s * p + (1 - s) * q) * (1 + s) - (p - q))**2 for p, q in zip(u.flatten().tolist(), v.flatten().tolist())) / u.numel() for u, v, s in zip(x, eps, t.tolist())]
    assert got.shape == (b,) and agree(got, torch.tensor(want, dtype=double), atol=1e-10) < 1e-10
    for wrong in (un.velocity_loss(field, x, t, -eps), un.velocity_loss(field, x, 1 - t, eps)):
        with pytest.raises(AssertionError): agree(wrong, want, atol=1e-6)

def test_times_leave_no_gap():
    torch.manual_seed(0)
    draws = torch.stack([un.spread_times(16) for _ in range(400)])
    assert torch.equal((draws * 16).long(), torch.arange(16).expand(400, 16)) and (draws < 1).all()
    within = (draws * 16) % 1
    assert abs(z_score(within.flatten(), .5)) < 4 and abs(z_score((within**2).flatten(), 1 / 3)) < 4

@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(.01, 4), min_size=1, max_size=5), st.floats(0, .99), st.floats(-3, 3))
def test_no_slope_beats_the_affine_floor(variances, t, slope):
    lam = torch.tensor(variances, dtype=double)
    loss = ((lam + 1) - 2 * slope * (t * lam - (1 - t)) + slope**2 * (t**2 * lam + (1 - t)**2)).mean()
    floor = un.affine_floor(lam, torch.tensor([t], dtype=double))[0]
    assert floor <= loss + 1e-12
    agree(un.affine_floor(lam, torch.tensor([0., 1.], dtype=double)), torch.stack([lam.mean(), torch.ones((), dtype=double)]), atol=1e-12)

def test_affine_floor_is_what_least_squares_leaves():
    torch.manual_seed(1)
    x = torch.randn(20_000, 4, dtype=double).exp() @ torch.randn(4, 4, dtype=double)     # not Gaussian
    eps, t = torch.randn_like(x), .6
    xt, v = t * x + (1 - t) * eps, x - eps
    A = torch.cat([xt, torch.ones(len(x), 1, dtype=double)], 1)
    left = (v - A @ torch.linalg.lstsq(A, v).solution).square().mean()
    agree(un.affine_floor(un.principal_variances(x), torch.tensor([t], dtype=double))[0] / left, 1., atol=.02)

# ---- the field that copies ---------------------------------------------------------------------------------------------------------------

def log_density(xt, t, data, path=LINEAR): # `b`, of the noisy training set
    a, s = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
    return torch.distributions.Normal(a * data.flatten(1), s).log_prob(xt.flatten(1)[:, None]).sum(2).logsumexp(1) - math.log(len(data))

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99))
def test_copying_field_is_that_of_the_density(n, seed):
    g = torch.Generator().manual_seed(seed)
    data, xt = torch.randn(n, 1, 2, 2, generator=g, dtype=double), torch.randn(4, 1, 2, 2, generator=g, dtype=double).requires_grad_()
    t = .05 + .9 * torch.rand(4, generator=g, dtype=double)
    score = torch.autograd.grad(log_density(xt, t, data).sum(), xt)[0]
    T = t[:, None, None, None]
    agree(un.memory_field(data)(xt, t).detach(), (xt + (1 - T) * score).detach() / T, atol=1e-8)
    w = un.memory_weights(xt.detach(), t, data)
    agree(w.sum(1), torch.ones(4, dtype=double), atol=1e-12)
    if n == 1: agree(un.memory_field(data)(xt, t).detach(), ((data - xt) / (1 - T)).detach(), atol=1e-9)
    if n > 2:                                                          # sigma for its square is another field
        flat, known, s = xt.detach().flatten(1), data.flatten(1), t[:, None]
        wrong = ((s * (flat @ known.T) - s**2 * known.square().sum(1) / 2) / (1 - s)).softmax(1)
        with pytest.raises(AssertionError): agree(wrong, w, atol=1e-6)

def test_nothing_has_a_lower_training_loss():
    torch.manual_seed(0)
    data = torch.randn(5, 3, dtype=double)
    x, t = data[torch.randint(5, (40_000,))], torch.rand(40_000, dtype=double) * .95
    eps, best = torch.randn_like(x), un.memory_field(data)
    base = un.velocity_loss(best, x, t, eps)
    for bump in (lambda xt, t: .2 * torch.ones_like(xt), lambda xt, t: -.1 * xt, lambda xt, t: .1 * (t[:, None] + xt).sin()):
        more = un.velocity_loss(lambda xt, t: best(xt, t) + bump(xt, t), x, t, eps) - base
        xt = LINEAR.xt(x, eps, t)
        assert z_score(more, 0.) > 4 and abs(z_score(more - bump(xt, t).square().mean(1), 0.)) < 4    # exactly the square of the bump

def test_its_samples_are_copies_and_it_stays_finite():
    torch.manual_seed(0)
    data = un.digit_parts()['train'][0][:50]
    made = last(euler(un.memory_field(data), torch.randn(40, 1, 8, 8), times(40)))
    assert un.nearest(made, data)[0].max() < 1e-3 and len(un.nearest(made, data)[1].unique()) > 10
    assert un.memory_field(data)(torch.randn(3, 1, 8, 8) * 5, torch.full((3,), .9999)).isfinite().all()
    assert un.copied(made, data).all() and not un.copied(un.digit_parts()['test'][0][:40], data).any()

def test_nearest_by_brute_force_and_exact_where_it_is_zero():
    torch.manual_seed(0)
    x, data = torch.randn(7, 2, 3, 3) + 100, torch.randn(11, 2, 3, 3) + 100
    x[3] = data[8]
    d, which = un.nearest(x, data, batch=3)
    want = (x[:, None].double() - data[None].double()).square().flatten(2).mean(2).sqrt()
    assert d[3] == 0 and which[3] == 8
    agree(d, want.gather(1, which[:, None])[:, 0], atol=1e-5)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_total_variation(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    tv = un.total_variation(a, b, 5)
    assert 0 <= tv <= 1 and abs(tv - un.total_variation(b, a, 5)) < 1e-12 and un.total_variation(a, a.flip(0), 5) == 0
    assert (abs(tv - 1) < 1e-12) == (not set(a.tolist()) & set(b.tolist()))
    events = [sum((a == k).double().mean().item() - (b == k).double().mean().item() for k in range(5) if m >> k & 1) for m in range(32)]
    assert abs(tv - max(events)) < 1e-12                               # the largest difference that any question can make

# ---- data and training -------------------------------------------------------------------------------------------------------------------

def test_digits_are_shared_out_once():
    parts = un.digit_parts()
    assert [len(parts[k][0]) for k in ('train', 'valid', 'test')] == [1_200, 200, 397]
    everything = torch.cat([v[0] for v in parts.values()])
    assert len(everything.flatten(1).unique(dim=0)) == 1_797           # no picture is on both sides

def test_stream_is_the_scenes_in_order_and_keeps_what_is_held_out():
    seeds = un.UnetCfg.first + torch.arange(250, 270)                  # across the border of two blocks
    agree(un.centred_stream(seeds), draw(un.centred(seeds), 32), atol=1e-5)
    labels = un.centred(un.UnetCfg.first + torch.arange(3_000)).labels
    assert (labels[:, 0] == 0).all() and (labels[:, 5] == 1).all() and (labels[:, 6] == -1).all()
    hidden = torch.tensor([COLOURS.index(HELD_OUT[t]) for t in TOYS])
    assert not (labels[:, 3] == hidden[labels[:, 2]]).any()
    assert un.UnetCfg.first % 256 == 0 and un.UNET['SHIPPED'].first + un.UNET['SHIPPED'].steps * un.UNET['SHIPPED'].batch * 2 < split_seeds('valid', 0, 1)[0]

TINY = replace(un.DIGITS['CPU'], widths=(8, 16), d=16, heads=2, steps=4, again=3, batch=8)

@pytest.mark.parametrize('stop, kept', [(3, 2), (7, 6)])                # in the first cycle, and in the second
def test_stopped_and_resumed_ends_in_the_same_bits(tmp_path, monkeypatch, stop, kept):
    monkeypatch.setattr(un, 'fit', lambda *a, **k: tr.fit(*a, every=2, every_s=None, **k))
    whole = un.build_unet(TINY)
    log = list(un.learn_unet(whole, TINY, out=tmp_path / 'a', progress=False))
    part = un.build_unet(TINY)
    run = un.learn_unet(part, TINY, out=tmp_path / 'b', progress=False)
    for _ in range(stop): next(run)
    run.close()
    again = un.build_unet(TINY)
    torch.manual_seed(99)                                              # the state of the generators comes from the file
    rest = list(un.learn_unet(again, TINY, out=tmp_path / 'b', resume=True, progress=False))
    assert [r.loss for r in rest] == [r.loss for r in log] and sum(hasattr(r, 'replayed') for r in rest) == kept and [r.i for r in rest] == [0, 1, 2, 3, 0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match='lr'): list(un.learn_unet(again, replace(TINY, lr=1e-4), out=tmp_path / 'b', resume=True, progress=False))

def test_the_average_is_what_remains():
    model, mean = un.build_unet(TINY), None
    for k, _ in enumerate(un.learn_unet(model, TINY, steps=6, progress=False)):
        now = {n: q.detach().clone() for n, q in model.named_parameters()}
        d = min(TINY.ema, (1 + k) / (10 + k))
        mean = now if mean is None else {n: d * mean[n] + (1 - d) * now[n] for n in now}   # the first average is the first weights
    agree(torch.cat([q.detach().flatten() for q in model.parameters()]), torch.cat([q.flatten() for q in mean.values()]), atol=1e-6)
    assert any((now[n] - q).abs().max() > 1e-6 for n, q in model.named_parameters())

def test_training_reports_what_it_did(tmp_path):
    model, facts = un.train_unet('digits', TINY, out=tmp_path, progress=False)
    assert set(facts['evaluation']) == {'loss at 0.1', 'loss at 0.5', 'loss at 0.9'} and len(facts['log']['loss']) == 7 and not model.training
    assert un.unet_probe(model).shape == (2, 1, 8, 8)

# ---- what is shipped -----------------------------------------------------------------------------------------------------------------------

def test_shipped_weights_are_those_that_were_examined(shipped):
    name, model, facts = shipped
    cfg = (un.UNET if name == 'unet' else un.DIGITS)['SHIPPED']
    from pathlib import Path
    import latentcourse
    file = Path(latentcourse.__file__).parent / 'checkpoints' / f'{name}.safetensors'
    if not file.exists(): pytest.skip(f'{name} is not shipped')
    assert file.stat().st_size <= (4.1e6 if name == 'unet' else 1.05e6) and facts['config']['steps'] == cfg.steps
    live = un.examine_unet(model, cfg.data, 80, start=100 if name == 'digits' else 30_000, seed=3)
    assert check_figures(name, facts['evaluation'], {k: figure(v.double()) for k, v in live.items()}) <= 5

def test_shipped_network_beats_the_affine_field(shipped):
    name, model, _ = shipped
    x = un.some_data('toys' if name == 'unet' else 'digits', 60, 200)
    t = torch.tensor([.8])
    loss = un.losses_at(model, x, t).mean().item()
    floor = un.affine_floor(un.principal_variances(un.digit_parts()['train'][0]), t.double()).item() if name == 'digits' else x.var(0).mean().item() / (.64 * x.var(0).mean().item() + .04)
    assert loss < .85 * floor

# ---- refusals -------------------------------------------------------------------------------------------------------------------------------

def test_refusals():
    net, (xt, t) = small(), pair()
    for bad, what in (((xt[:, :1], t), 'expected'), ((xt[..., :6], t), 'divides'), ((xt, t[:2]), 'one time'), ((xt, t, torch.zeros(3, dtype=torch.int64)), 'no classes')):
        with pytest.raises(ValueError, match=what): net(*bad)
    with pytest.raises(ValueError, match='int64'): small(classes=2)(xt, t, torch.zeros(3))
    for how in (dict(widths=()), dict(widths=(12,)), dict(patch=0), dict(classes=-1)):
        with pytest.raises(ValueError, match='expected'): un.UNet(**how)
    x = torch.randn(2, 3)
    for call in (lambda: un.velocity_loss(lambda xt, t: xt, x, torch.rand(3), x), lambda: un.velocity_loss(lambda xt, t: xt, x, torch.rand(2), x[:, :2]), lambda: un.time_features(torch.rand(3), 5),
                 lambda: un.affine_floor(torch.tensor([-1.]), torch.rand(1)), lambda: un.memory_weights(x, torch.rand(2), torch.randn(4, 2)), lambda: un.nearest(x, x[:0]),
                 lambda: un.total_variation(torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 3), lambda: un.copied(x, x[:1]), lambda: un.build_unet(replace(TINY, data='cats')),
                 lambda: un.train_unet('unet', TINY), lambda: un.load_unet('cats')):
        with pytest.raises(ValueError, match='expected'): call()
