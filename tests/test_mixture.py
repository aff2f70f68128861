"The exact mixture world: what the page cannot say. Bayes in many digits, any dimension, errors, precision, and wrong versions that the checks must catch."
import math
import mpmath as mp
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from latentcourse.diffusion import COSINE, LINEAR, PATHS, VE, VP, Path, convert, like
from latentcourse.mixture import (HILLS, TOWNS, Mixture, component_scales, exact_classifier, exact_field, exact_mean, exact_noise, exact_score, exact_variance, exact_velocity, grid_moments,
                                  ink_world, log_density, log_joint, log_tilted, loss_floor, mixture_samples, pushed, quadrature, responsibilities, target_scales, tilted_samples)

double = torch.float64
TARGETS = {'x': exact_mean, 'eps': exact_noise, 'v': exact_velocity, 'score': exact_score}

def random_world(m, d, classes, seed):
    g = torch.Generator().manual_seed(seed)
    return Mixture(2 * torch.randn(m, d, generator=g, dtype=double), .2 + torch.rand(m, generator=g, dtype=double), torch.rand(m, generator=g, dtype=double).add(.1).div_(1).softmax(0), torch.arange(m) % classes)

def by_torch(gm): return MixtureSameFamily(Categorical(gm.weights), Independent(Normal(gm.mu, gm.std[:, None].expand_as(gm.mu)), 1))

worlds = st.builds(lambda m, d, c, s: random_world(m, d, min(c, m), s), st.integers(1, 7), st.integers(1, 50), st.integers(1, 3), st.integers(0, 10**6))

@settings(max_examples=25, deadline=None)
@given(worlds, st.sampled_from(PATHS), st.floats(.01, .99), st.integers(0, 1000))
def test_every_answer_fits_every_other(gm, path, t, seed):
    "Density, score, Tweedie, conversions, restriction, total probability, Bayes: in any dimension, along any path."
    g = torch.Generator().manual_seed(seed)
    x = mixture_samples(pushed(gm, path, t), 5, None, g)[0]
    tt = torch.full((5,), t, dtype=double)
    scale = 1 + x.abs().max().item()**2 + 1 / pushed(gm, path, t).std.min().item()**2
    near = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * scale)
    near(log_density(gm, path, x, tt), by_torch(pushed(gm, path, t)).log_prob(x))
    xr = x.clone().requires_grad_()
    near(exact_score(gm, path, x, tt), torch.autograd.grad(by_torch(pushed(gm, path, t)).log_prob(xr).sum(), xr)[0])
    a, s = like(path.alpha(tt), x), like(path.sigma(tt), x)
    near(a * exact_mean(gm, path, x, tt) + s * exact_noise(gm, path, x, tt), x)
    for name, f in TARGETS.items(): near(f(gm, path, x, tt), convert(path, exact_noise(gm, path, x, tt), x, tt, 'eps', name)) if path.alpha(tt).min() > .05 else None
    p = exact_classifier(gm, path, x, tt).exp()
    near(p.sum(1), torch.ones(5, dtype=double))
    parts = torch.stack([exact_score(gm, path, x, tt, torch.full((5,), c)) for c in range(gm.classes)], 1)
    near((p[..., None] * parts).sum(1), exact_score(gm, path, x, tt))
    for c in range(gm.classes):
        mine = gm.labels == c
        alone = Mixture(gm.mu[mine], gm.std[mine], gm.weights[mine] / gm.weights[mine].sum(), torch.zeros(int(mine.sum()), dtype=torch.int64))
        for f in (*TARGETS.values(), log_density): near(f(gm, path, x, tt, torch.full((5,), c)), f(alone, path, x, tt))

def in_many_digits(gm, alpha, sigma, x):
    "Responsibilities, score and mean on the line with 60 digits."
    mp.mp.dps = 60
    a, s, x = mp.mpf(alpha), mp.mpf(sigma), mp.mpf(x)
    V = [a**2 * mp.mpf(q)**2 + s**2 for q in gm.std.tolist()]
    mu = [mp.mpf(m) for m in gm.mu[:, 0].tolist()]
    terms = [mp.mpf(w) * mp.exp(-(x - a * m)**2 / (2 * v)) / mp.sqrt(v) for w, m, v in zip(gm.weights.tolist(), mu, V)]
    r = [t / sum(terms) for t in terms]
    return r, -sum(k * (x - a * m) / v for k, m, v in zip(r, mu, V)), sum(k * (s**2 * m + a * mp.mpf(q)**2 * x) / v for k, m, v, q in zip(r, mu, V, gm.std.tolist()))

@pytest.mark.parametrize('t', [1e-9, .01, .5, .99, 1 - 1e-9])
@pytest.mark.parametrize('x', [-40., -2.1, 0., .3, 1.29, 60., 1e4])
def test_in_many_digits(t, x):
    tt = torch.tensor([t], dtype=double)
    r, score, mean = in_many_digits(HILLS, tt.item(), (1 - tt).item(), x)
    xt = torch.tensor([[x]], dtype=double)
    for got, want in zip(responsibilities(HILLS, LINEAR, xt, tt)[0].tolist(), r): assert abs(got - float(want)) < 1e-9 + 1e-15 * x**2      # the square of the distance is rounded
    for f, want in ((exact_score, score), (exact_mean, mean)): assert abs(f(HILLS, LINEAR, xt, tt).item() - float(want)) <= (1e-9 + 1e-15 * x**2) * (1 + abs(x)) * (1 + abs(float(want)))

def test_the_ends_and_far_away_are_finite():
    far = torch.tensor([[0., 0.], [1e3, -1e3], [1e8, 1e8], [-1e12, 0.]], dtype=double)
    for path in (LINEAR, COSINE):
        for t in (0., 1e-300, 1e-15, .5, 1 - 1e-15, 1.):
            for f in (*TARGETS.values(), log_density, log_joint, responsibilities, exact_classifier): assert f(TOWNS, path, far, t).isfinite().all(), (f.__name__, path.name, t)
    for t in (0., 1.): assert exact_mean(TOWNS, VP, far, t).isfinite().all() and exact_score(TOWNS, VE, far, t).isfinite().all()
    with pytest.raises(ValueError, match='infinite'): exact_velocity(TOWNS, VP, far, 1.)

def test_single_precision_follows_double():
    gm, x = TOWNS.to(torch.zeros(1)), torch.randn(64, 2)
    assert gm.mu.dtype == torch.float32
    for f in TARGETS.values(): torch.testing.assert_close(f(gm, LINEAR, x, .4), f(TOWNS, LINEAR, x.double(), .4).float(), rtol=1e-4, atol=1e-4)

def test_a_time_for_each_point_or_one_for_all():
    x, t = torch.randn(6, 2, dtype=double), torch.linspace(.1, .9, 6, dtype=double)
    each = torch.cat([exact_velocity(TOWNS, COSINE, x[i:i + 1], t[i]) for i in range(6)])
    torch.testing.assert_close(exact_velocity(TOWNS, COSINE, x, t), each)
    torch.testing.assert_close(exact_field(TOWNS, COSINE, 1)(x, t), exact_velocity(TOWNS, COSINE, x, t, torch.ones(6, dtype=torch.int64)))
    torch.testing.assert_close(exact_velocity(TOWNS, COSINE, x, torch.tensor(.3, dtype=double)), exact_velocity(TOWNS, COSINE, x, torch.full((6,), .3, dtype=double)))

def test_a_finite_data_set_is_a_mixture():
    gm = Mixture(torch.tensor([[0.], [1.]], dtype=double), 0.)
    assert exact_mean(gm, LINEAR, torch.tensor([[.96]], dtype=double), .99).item() == pytest.approx(1., abs=1e-6)
    with pytest.raises(ValueError, match='deviation 0'): exact_score(gm, LINEAR, torch.zeros(1, 1, dtype=double), 1.)

# ---- the loss floor ---------------------------------------------------------------------------------------------------------------

def floor_on_grid(gm, path, t, target):
    "Floor on the line, from the definition: E T^2 - E (E[T | xt])^2, with x and eps summed over a grid of their own."
    points, cell = quadrature(gm, 1501)
    px = (by_torch(gm).log_prob(points) + cell).exp()
    a, s = (f(torch.tensor([t], dtype=double)).item() for f in (path.alpha, path.sigma))
    law, out = pushed(gm, path, t), quadrature(pushed(gm, path, t), 1501)
    eps = (out[0].T - a * points) / s                                                     # `x xt`
    joint = px[:, None] * Normal(0., 1.).log_prob(eps).exp() / s * out[1].exp()
    A, B = (c.item() for c in target_scales(path, torch.tensor([t], dtype=double), target))
    T = A * points + B * eps
    return ((joint * T**2).sum() - ((joint * T).sum(0)**2 / joint.sum(0).clamp(min=1e-300)).sum()).item()

@pytest.mark.parametrize('target', ['x', 'eps', 'v', 'score'])
@pytest.mark.parametrize('path', [LINEAR, COSINE, VP], ids=lambda p: p.name)
def test_floor_against_its_definition(path, target):
    for t in (.3, .7):
        points, cell = quadrature(pushed(HILLS, path, t))
        got = (log_density(HILLS, path, points, t) + cell).exp() @ exact_variance(HILLS, path, points, torch.full((len(points),), t, dtype=double), target)
        assert got.item() == pytest.approx(floor_on_grid(HILLS, path, t, target), rel=1e-6)

def test_floor_at_the_ends():
    ends = torch.tensor([0., 1.], dtype=double)
    g = torch.Generator().manual_seed(0)
    spread = (TOWNS.weights @ (TOWNS.mu.square().sum(1) + 2 * TOWNS.std**2)).item()
    floor, error = loss_floor(TOWNS, LINEAR, ends, 'v', 4000, g)
    assert abs(floor[0].item() - spread) < 1e-9 + 5 * error[0].item() and floor[1].item() == pytest.approx(2.) # the data's variance; d
    assert max(loss_floor(TOWNS, LINEAR, ends, 'x', 100)[0][1], loss_floor(TOWNS, LINEAR, ends, 'eps', 100)[0][0]) < 1e-25
    with pytest.raises(ValueError, match='infinite'): loss_floor(TOWNS, LINEAR, ends, 'score', 10)

def test_a_worse_answer_costs_its_distance():
    "No answer comes below the floor in expectation; a wrong one loses exactly its excess."
    g = torch.Generator().manual_seed(1)
    n = 200_000
    x, eps, t = mixture_samples(TOWNS, n, None, g)[0], torch.randn(n, 2, dtype=double, generator=g), torch.rand(n, dtype=double, generator=g)
    xt = LINEAR.xt(x, eps, t)
    best, target, floor = exact_velocity(TOWNS, LINEAR, xt, t), LINEAR.v(x, eps, t), exact_variance(TOWNS, LINEAR, xt, t)
    for wrong in (best, .9 * best, best + torch.tensor([.1, 0.]), exact_velocity(TOWNS, LINEAR, xt, t, torch.zeros(n, dtype=torch.int64))):
        rest = (wrong - target).square().sum(1) - floor - (wrong - best).square().sum(1)
        assert abs(rest.mean() / (rest.std() / n**.5)) < 5

# ---- wrong versions ---------------------------------------------------------------------------------------------------------------

def wrong_scales(kind):
    def f(gm, path, xt, t):
        alpha, sigma, var = component_scales(gm, path, xt, t)
        return {'sigma for sigma^2': (alpha, sigma, (alpha * gm.std)**2 + sigma), 'alpha forgotten': (alpha, sigma, gm.std**2 + sigma**2),
                'time flipped': component_scales(gm, path, xt, 1 - torch.as_tensor(t, dtype=xt.dtype))}[kind]
    return f

@pytest.mark.parametrize('kind', ['sigma for sigma^2', 'alpha forgotten', 'time flipped'])
def test_wrong_scales_are_noticed(kind, monkeypatch):
    x, want = torch.randn(20, 2, dtype=double), by_torch(pushed(TOWNS, LINEAR, .3))
    monkeypatch.setattr('latentcourse.mixture.component_scales', wrong_scales(kind))
    xr = x.clone().requires_grad_()
    assert (exact_score(TOWNS, LINEAR, x, .3) - torch.autograd.grad(want.log_prob(xr).sum(), xr)[0]).abs().max() > .01
    assert (log_density(TOWNS, LINEAR, x, .3) - want.log_prob(x)).abs().max() > .01

# ---- the tilted law ---------------------------------------------------------------------------------------------------------------

def test_tilted_law_in_many_dimensions():
    "For two equal round classes p(x) p(y | x)^w depends on one direction only: the others keep the component's variance."
    d, gm = 20, Mixture(torch.stack([torch.ones(20), -torch.ones(20)]).double() / 20**.5, .8)
    flat = Mixture(torch.tensor([[1.], [-1.]], dtype=double), .8)
    for w in (0., .5, 1., 4.):
        x = tilted_samples(gm, 20_000, 0, w, torch.Generator().manual_seed(3))
        points, _ = quadrature(flat)
        mean, cov = grid_moments(log_tilted(flat, LINEAR, points, 1., 0, w), points)
        along = x.sum(1) / d**.5
        assert abs(along.mean() - mean[0]) < 5 * along.std() / len(x)**.5
        assert abs(((along - mean[0])**2).mean() - cov[0, 0]) < 5 * ((along - mean[0])**2).std() / len(x)**.5
        across = (x[:, 0] - x[:, 1]) / 2**.5
        assert abs(across.var() - .64) < 5 * (across**2).std() / len(x)**.5

def test_gradient_of_the_tilted_law_is_the_guided_score():
    x = torch.randn(10, 2, dtype=double).requires_grad_()
    for w in (0., 1., 3.):
        got = torch.autograd.grad(log_tilted(TOWNS, COSINE, x, .6, 2, w).sum(), x)[0]
        y = torch.full((10,), 2)
        torch.testing.assert_close(got, (1 - w) * exact_score(TOWNS, COSINE, x.detach(), .6) + w * exact_score(TOWNS, COSINE, x.detach(), .6, y))

# ---- errors -----------------------------------------------------------------------------------------------------------------------

x = torch.zeros(3, 2, dtype=double)
@pytest.mark.parametrize('call, says', [
    (lambda: Mixture(torch.zeros(2), 1.), 'means'), (lambda: Mixture(torch.zeros(2, 2), [.1, .2, .3]), '2 means need 2'), (lambda: Mixture(torch.zeros(2, 2), -1.), '0 or more'),
    (lambda: Mixture(torch.zeros(2, 2), 1., [.5, .6]), 'sum to 1'), (lambda: Mixture(torch.zeros(2, 2), 1., [1., 0.]), 'positive'), (lambda: Mixture(torch.zeros(2, 2), 1., None, [0, 2]), 'none left out'),
    (lambda: Mixture(torch.tensor([[math.nan]]), 1.), 'finite'), (lambda: exact_score(TOWNS, LINEAR, x.float(), .5), 'gm.to'), (lambda: exact_score(TOWNS, LINEAR, x[:, :1], .5), r'\(b, 2\)'),
    (lambda: exact_score(TOWNS, LINEAR, x, 1.5), r'\[0, 1\]'), (lambda: exact_score(TOWNS, LINEAR, x, math.nan), r'\[0, 1\]'), (lambda: exact_score(TOWNS, LINEAR, x, torch.zeros(2, dtype=double)), '3 times'),
    (lambda: exact_score(TOWNS, LINEAR, x * math.nan, .5), 'NaN'), (lambda: exact_score(TOWNS, LINEAR, x, .5, torch.zeros(3)), 'int64'), (lambda: exact_score(TOWNS, LINEAR, x, .5, torch.tensor([0, 1, 3])), 'classes 0 to 2'),
    (lambda: mixture_samples(TOWNS, 4, torch.zeros(3, dtype=torch.int64)), 'expected 4'), (lambda: log_tilted(TOWNS, LINEAR, x, 1., 3, 1.), 'classes 0 to 2'), (lambda: tilted_samples(TOWNS, 3, 0, -1.), '0 or more'),
    (lambda: quadrature(Mixture(torch.zeros(1, 3), 1.)), '3 dimensions'), (lambda: quadrature(Mixture(torch.tensor([[0.], [9.]]), [1e-4, 1.])), 'raise n'), (lambda: exact_variance(TOWNS, LINEAR, x, .5, 'u'), 'target is'), (lambda: ink_world('cat'), 'unknown toy')])
def test_errors_say_what_was_wrong(call, says):
    with pytest.raises(ValueError, match=says): call()

def test_ink_worlds_are_normalised():
    gm = ink_world(('bear', 'star'), 24)
    assert gm.classes == 2 and gm.weights.sum().item() == pytest.approx(1.) and gm.weights[gm.labels == 0].sum().item() == pytest.approx(.5)
