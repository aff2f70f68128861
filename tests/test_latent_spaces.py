"What makes a space easy to generate in: closed forms against quadrature, solves and draws, and mistakes that are noticed."
import math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.integrate import quad
from latentcourse import latent_spaces as m
from latentcourse.lib.check import agree, z_score
from latentcourse.lib.study import load_study
from latentcourse.samplers import heun, last, times
from latentcourse.unet import affine_floor
from latentcourse.vae import water_filling

double = torch.float64

def some(n=300, d=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, dtype=double, generator=g) @ torch.randn(d, d, dtype=double, generator=g) / 2
    y = torch.arange(n) % classes
    return z + torch.randn(classes, d, dtype=double, generator=g)[y], y

@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 50.))
def test_the_floor_over_all_times_is_a_deviation(lam):
    v = torch.tensor([lam], dtype=double)
    agree(m.mean_floor(v), quad(lambda t: affine_floor(v, torch.tensor([t], dtype=double)).item(), 0, 1, limit=200)[0], atol=1e-5 * max(1., lam))

def test_the_floor_is_what_the_best_field_loses():
    z, y = some(4_000)
    known = m.directions(z, y)
    field, g = m.HeadStart(None, *known), torch.Generator().manual_seed(1)
    eps, t = torch.randn(z.shape, generator=g, dtype=double), (torch.arange(4_000) + .5) / 4_000
    t = t[torch.randperm(4_000, generator=g)]
    xt = t[:, None] * z + (1 - t[:, None]) * eps
    loss = (field(xt.float(), t, y) - (z - eps)).square().mean(1)
    assert abs(z_score(loss, m.mean_floor(known[1]))) < 5

@pytest.mark.parametrize('share', ['variances', 'rank'])
def test_other_counts_of_directions_are_not_effective_dims(share):
    x = torch.randn(200, 8, dtype=double) * torch.logspace(0, -2, 8, dtype=double)
    lam = torch.linalg.eigvalsh(x.T @ x / 200)
    want = (torch.linalg.matrix_norm(x, 'nuc') / torch.linalg.matrix_norm(x))**2
    agree(m.effective_dims(lam), want, atol=1e-6)
    wrong = lam.sum()**2 / lam.square().sum() if share == 'variances' else 8.
    with pytest.raises(AssertionError): agree(wrong, want, atol=.1)

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.floats(.01, 10.))
def test_equal_directions_are_counted(k, scale):
    agree(m.effective_dims(torch.cat([torch.full((k,), scale, dtype=double), torch.zeros(3, dtype=double)])), float(k), atol=1e-6)

def test_a_bit_costs_twice_the_level():
    lam, h = torch.tensor([4., 1., .5, .02], dtype=double), 1e-6
    for level in (.1, .3, .7):
        (r1, d1), (r2, d2) = (water_filling(lam, level + s * h) for s in (-1, 1))
        agree((d2 - d1) / (r1 - r2) * math.log(2), 2 * level * math.log(2), atol=1e-5)

def test_bits_bound_what_is_told():
    means, spread = torch.linspace(-3, 3, 5, dtype=double)[:, None], .1
    told = math.log2(5)                                                      # the posteriors hardly overlap
    bits = m.rate_bits(means, torch.full_like(means, 2 * math.log(spread)))
    assert bits.mean() > told
    q = torch.distributions.Normal(means, spread)
    agree(bits, torch.distributions.kl_divergence(q, torch.distributions.Normal(0., 1.))[:, 0] / math.log(2), atol=1e-9)

def chains(n, side, rho, k=1):
    i = torch.arange(side, dtype=double)
    L = torch.linalg.cholesky(rho ** (i[:, None] - i).abs())
    return torch.einsum('ij,bkjl,ml->bkim', L, torch.randn(n, k, side, side, dtype=double, generator=torch.Generator().manual_seed(0)), L)

@pytest.mark.parametrize('rho', [0., .3, .8])
def test_what_neighbours_foretell_of_chains(rho):
    agree(m.foretold(chains(6_000, 5, rho, 2)), 1 - ((1 - rho**2) / (1 + rho**2))**2, atol=.01)

def test_constant_fields_are_foretold_and_means_do_not_help():
    flat = torch.randn(50, 2, 1, 1).expand(50, 2, 4, 4)
    agree(m.foretold(flat), 1., atol=1e-6)
    noise = torch.randn(3_000, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    agree(m.foretold(noise + 100), m.foretold(noise), atol=1e-4)

@pytest.mark.parametrize('t', [.05, .5, .95])
def test_the_head_start_is_the_conditional_mean(t):
    z, y = some()
    mean, lam, along = m.directions(z, y)
    cov, one = along @ lam.diag() @ along.T, torch.eye(6, dtype=double)
    xt = torch.randn(30, 6, dtype=double)
    want = mean[y[:30]] + torch.linalg.solve(t**2 * cov + (1 - t)**2 * one, (xt - t * mean[y[:30]]).T).T @ (t * cov - (1 - t) * one)
    agree(m.HeadStart(None, mean, lam, along)(xt.float(), torch.full((30,), t), y[:30]), want, atol=2e-4 / (1 - t))

@pytest.mark.parametrize('mistake', ['another class', 'signs', 'variance of the data'])
def test_mistakes_in_the_head_start_are_noticed(mistake):
    z, y = some()
    mean, lam, along = m.directions(z, y)
    xt, t = torch.randn(30, 6), torch.full((30,), .5)
    want = m.HeadStart(None, mean, lam, along)(xt, t, y[:30])
    if mistake == 'another class': got = m.HeadStart(None, mean, lam, along)(xt, t, (y[:30] + 1) % 3)
    elif mistake == 'signs': got = -want
    else: got = m.HeadStart(None, mean, lam.sqrt(), along)(xt, t, y[:30])
    with pytest.raises(AssertionError): agree(got, want, atol=1e-2)

def test_a_new_network_changes_nothing_and_a_silent_direction_stays_silent():
    z, y = torch.randn(400, 2, 8, 8), torch.arange(400) % 8
    z[:, 1] *= 1e-3
    known = m.directions(z, y)
    net, t = m.HeadStart(m.Surplus(c=100, width=16), *known), torch.full((10,), .5)
    before = m.HeadStart(None, *known)(z[:10], t, y[:10])
    agree(net(z[:10], t, y[:10]), before, atol=1e-6)
    torch.nn.init.normal_(net.net.leave.weight)
    moved = ((net(z[:10], t, y[:10]) - before).flatten(1) @ known[2].float()).square().mean(0)
    assert moved[:64].mean() > 1e3 * moved[64:].mean() and moved[100:].max() < 1e-6

def test_the_affine_field_paints_gaussian_draws():
    z, y = some()
    known, want = m.directions(z, y), torch.full((20_000,), 2)
    walked = last(heun(lambda xt, t: m.HeadStart(None, *known)(xt, t, want[:len(xt)]), torch.randn(20_000, 6, generator=torch.Generator().manual_seed(0)), times(60)))
    drawn = m.gaussian_like(z, y, want, 1)
    agree(torch.cov(walked.double().T), torch.cov(drawn.T), atol=.06 * torch.cov(drawn.T).diagonal().max().item())
    agree(walked.mean(0), drawn.mean(0), atol=.05)

def test_alignment_is_a_cosine():
    a, f = torch.randn(2, 4, 6, 3, 3)
    agree(m.misalignment(a, f), 1 - F.cosine_similarity(a, f, dim=1).mean((1, 2)), atol=1e-6)
    agree(m.misalignment(a, 5 * a), torch.zeros(4), atol=1e-6)
    flat = 1 - F.cosine_similarity(a.flatten(1), f.flatten(1))                # one cosine of whole maps is something else
    with pytest.raises(AssertionError): agree(m.misalignment(a, f), flat, atol=1e-4)

def test_one_scale_keeps_quiet_channels_quiet():
    z = torch.randn(40, 3, 8, 8) * torch.tensor([3., 1., .01])[:, None, None] + 2
    mean, std = m.one_scale(z)
    assert (std == std[0]).all()
    x = m.normalised(z, mean, std)
    agree(x.square().mean(), 1., atol=1e-4), agree(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert x[:, 2].std() < .02

def test_errors_by_direction_add_up_to_the_loss():
    z, y = torch.randn(2_000, 1, 2, 2) * torch.tensor([2., 1., .5, .1]).reshape(1, 1, 2, 2), torch.arange(2_000) % 2
    known = m.directions(z, y)
    error, floor = m.errors_by_direction(lambda xt, t: m.HeadStart(None, *known)(xt, t, y), known, z)
    agree(error / floor, torch.ones(4), atol=.08)
    silent, _ = m.errors_by_direction(lambda xt, t: torch.zeros_like(xt), known, z)
    agree(silent.mean(), z.square().mean() + 1, atol=.05)

def test_a_linear_reader_reads_what_is_linear():
    y = torch.arange(400) % 8
    z = torch.cat([torch.randn(400, 1, 4, 4), 4. * F.one_hot(y, 8).float().reshape(400, 1, 2, 4).repeat(1, 1, 2, 1)], 1)
    assert (m.toys_read(z[:300], y[:300], z[300:]) == y[300:]).double().mean() > .95
    assert (m.toys_read(z[:300, :1], y[:300], z[300:, :1]) == y[300:]).double().mean() < .4

def test_a_network_moves_every_direction_by_half_pi_at_most():
    lam = torch.tensor([9., 1., .04, 1e-3], dtype=double)
    class Always(torch.nn.Module):
        c = 4
        def forward(self, x, t, y): return torch.ones_like(x)
    known, eps = (torch.zeros(1, 4, dtype=double), lam, torch.eye(4, dtype=double)), torch.zeros(1, 4)
    def end(ts): return last(heun(lambda xt, t: m.HeadStart(Always(), *known)(xt, t, torch.zeros(1, dtype=torch.int64)), eps, ts))[0].double() / lam.sqrt()
    agree(end(1 - (1 - times(500))**2), math.pi / 2, atol=2e-3)
    with pytest.raises(AssertionError): agree(end(times(10)), math.pi / 2, atol=.1)       # a coarse last step spoils the faintest
    agree(end(m.FINE)[:3], math.pi / 2, atol=.03)

def test_alignment_is_learned_and_only_where_it_is_asked_for():
    codec, log = m.trial_codec(m.TrialCfg(k=4, codec_steps=40, scenes=64, align=.5))
    start, end = (sum(r.apart for r in part) / 5 for part in (log[:5], log[-5:]))
    assert end < start - .1 and codec.told.bias is None
    plain, log = m.trial_codec(m.TrialCfg(k=4, codec_steps=4, scenes=64))
    assert plain.told is None and all(r.apart == 0 for r in log) and plain.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 8, 8)

def test_parts_of_new_scenes_have_none_in_common():
    parts = [m.unseen(i, 6) for i in range(3)]
    for i in range(3):
        for j in range(i): assert (parts[i][0][:, None] - parts[j][0]).abs().flatten(2).amax(2).min() > 0
        assert parts[i][2].shape == (6, 128) and len(parts[i][1]) == 6

def test_what_is_linear_is_followed():
    z, A = torch.randn(80, 3, 4, 4), torch.randn(7, 3)
    seen = F.conv2d(z, A[:, :, None, None])
    agree(m.followed(z[:40], seen[:40], z[40:]), seen[40:], atol=1e-4)
    assert m.misalignment(m.followed(z[:40], seen[:40], z[40:]), seen[40:]).max() < 1e-5
    shuffled = m.followed(z[:40], seen[torch.randperm(40)], z[40:])
    assert m.misalignment(shuffled, seen[40:]).mean() > .5

def test_one_channel_scales_all_alike():
    class Plain:                                                             # latents are 3 channels of the picture, one faint
        k = 3
        def encode(self, x): return x * torch.tensor([1., 1., .01])[:, None, None]
        def decode(self, z): return z / torch.tensor([1., 1., .01])[:, None, None]
    x = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = Plain()
    scale = m.one_scale(codec.encode(x))
    tall = m.one_channel(codec, scale)
    assert tall.encode(x).shape == (20, 1, 24, 8)
    agree(tall.decode(tall.encode(x)), x, atol=1e-4)
    assert m.tolerance(tall, x) < m.tolerance(codec, x) - 5                  # an error as large in the faint channel does more harm

def test_learned_is_paired_and_nothing_before_training(monkeypatch):
    monkeypatch.setattr(m, 'trial_flow', lambda z, y, cfg, known: m.HeadStart(m.Surplus(), *known).eval())
    s = m.trial(m.TrialCfg(k=2, codec_steps=2, scenes=128), 16)
    facts = m.space_facts(s)
    agree(facts['learned'], 0., atol=1e-6)
    assert set(s.pictures) == {'fresh', 'rebuilt', 'Gaussian', 'painted'} and all(x.shape == (16, 3, 32, 32) for x in s.pictures.values())
    assert 'misaligned, its own map' not in facts and 0 < facts['misaligned'] < 2

def test_strips_are_kept_as_one_picture(tmp_path):
    from PIL import Image
    strips = [torch.linspace(-1, 1, 16)[:, None, None, None].expand(16, 3, 32, 32), torch.zeros(16, 3, 32, 32)]
    file = m.space_sheet(strips, tmp_path / 'sheet.png')
    with Image.open(file) as sheet: assert sheet.size == (512, 64) and sheet.convert('RGB').getpixel((511, 0)) == (255, 255, 255)

@pytest.mark.parametrize('call, says', [
    (lambda: m.mean_floor(torch.tensor([-1.])), 'none below 0'), (lambda: m.mean_floor(torch.ones(2, 2)), 'a row'),
    (lambda: m.effective_dims(torch.zeros(3)), 'some above'), (lambda: m.foretold(torch.randn(3, 1, 2, 5)), 'three places'),
    (lambda: m.misalignment(torch.ones(1, 2, 3, 3), torch.ones(1, 3, 3, 3)), 'expected the same'), (lambda: m.one_scale(torch.zeros(3, 1, 2, 2)), 'nothing to scale')])
def test_errors_say_what_was_wrong(call, says):
    with pytest.raises(ValueError, match=says): call()

def test_the_study_is_recorded_with_this_code():
    table = load_study(m.LATENT_SPACES)
    assert all(len(r['seeds']) >= 3 for r in table.rows())
