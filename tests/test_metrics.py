"Measures against other routes, their invariances, and what they refuse."
import math
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from latentcourse.lib import metrics as m
from latentcourse.lib.check import z_score

settings.register_profile('quick', deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('quick')

def rand(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
sides = st.integers(1, 20)

@given(st.integers(1, 4), st.sampled_from([1, 3]), sides, sides, st.floats(1e-3, 1), st.integers(0, 9))
def test_psnr_by_hand(b, c, h, w, a, seed):
    x = rand(b, c, h, w, seed=seed); y = (x + a * rand(b, c, h, w, seed=seed + 50)).clamp(-1, 1)
    want = 10 * np.log10(4 / ((x.double() - y.double()).numpy()**2).mean((1, 2, 3)))
    assert np.allclose(m.psnr(x, y), want, atol=1e-3)

def test_equal_pictures():
    x = rand(3, 3, 16, 16)
    assert m.psnr(x, x).isinf().all() and torch.allclose(m.ssim(x, x), torch.ones(3))

@given(st.integers(11, 24), st.integers(11, 24), st.integers(0, 99))
def test_ssim_is_symmetric_and_blind_to_mirrors_and_order(h, w, seed):
    x, y = rand(3, 3, h, w, seed=seed), rand(3, 3, h, w, seed=seed + 100)
    s = m.ssim(x, y)
    for t in (m.ssim(y, x), m.ssim(x.flip(2), y.flip(2)), m.ssim(x.mT, y.mT), m.ssim(x.flip(0), y.flip(0)).flip(0)): assert torch.allclose(s, t, atol=1e-5)
    assert (s.abs() <= 1).all()

def test_ssim_of_one_window_is_the_formula():
    x, y = rand(1, 1, 11, 11).double(), rand(1, 1, 11, 11, seed=1).double()
    g = torch.exp(-(torch.arange(11.) - 5)**2 / 4.5).double(); g = torch.outer(g, g); g /= g.sum()
    e = lambda v: (g * v[0, 0]).sum()
    cov = lambda p, q: e(p * q) - e(p) * e(q)
    want = (2 * e(x) * e(y) + .02**2) * (2 * cov(x, y) + .06**2) / ((e(x)**2 + e(y)**2 + .02**2) * (cov(x, x) + cov(y, y) + .06**2))
    assert abs(m.ssim(x, y).item() - want.item()) < 1e-4

# ---- sets -------------------------------------------------------------------------------------------------------------------------

@given(st.integers(1, 6), st.integers(0, 99))
def test_frechet_against_scipy(d, seed):
    from scipy.linalg import sqrtm
    a, b = randn(60, d, seed=seed) @ randn(d, d, seed=seed + 1), randn(50, d, seed=seed + 2) + 1
    s1, s2 = (np.atleast_2d(np.cov(v.double().numpy().T)) for v in (a, b))
    want = ((a.mean(0) - b.mean(0))**2).sum().item() + np.trace(s1 + s2 - 2 * np.atleast_2d(sqrtm(s1 @ s2)).real)
    assert abs(m.frechet_distance(a, b) - want) < 1e-3 * (1 + want)

def test_frechet_of_a_shift_is_its_square():
    a = randn(400, 5)
    assert m.frechet_distance(a, a) < 1e-5 and abs(m.frechet_distance(a, a + torch.tensor([3., 0, 0, 4, 0])) - 25) < 1e-3

def test_kernel_distance_is_unbiased_and_sees_a_shift():
    a, b = randn(6000, 4), randn(6000, 4, seed=1)
    assert abs(z_score(m.kernel_distance(a, b, blocks=100)[2], 0.)) < 5 < z_score(m.kernel_distance(a, b + .2, blocks=100)[2], 0.)
    mean, se, vals = m.kernel_distance(a, b, blocks=20)
    assert len(vals) == 20 and abs(mean - vals.mean().item()) < 1e-12 and abs(se - vals.std().item() / 20**.5) < 1e-12

@given(st.integers(5, 30), st.integers(1, 4), st.integers(0, 99))
def test_manifold_by_brute_force(n, k, seed):
    of, x = randn(n, 3, seed=seed).double(), randn(12, 3, seed=seed + 1).double() * 2
    reach = [sorted((c - o).norm().item() for o in of)[k] for c in of]
    assert m.within(x, of, k).tolist() == [any((p - c).norm().item() <= r for c, r in zip(of, reach)) for p in x]

def test_precision_and_recall_swap():
    a, b = randn(100, 3), randn(80, 3, seed=1) * .5
    assert m.precision_recall(a, b) == m.precision_recall(b, a)[::-1] and m.precision_recall(a, a) == (1., 1.)
    assert m.precision_recall(a, b + 100) == (0., 0.)

def test_pictures_through_a_network():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(48, 4)); net.train()
    x, y = rand(40, 3, 4, 4), rand(40, 3, 4, 4, seed=1)
    f = m.features_of(x, net, batch=7)
    assert net.training and torch.equal(f, m.features_of(x, net, batch=40)) and not f.requires_grad   # evaluated without dropout, mode given back
    assert m.frechet_distance(x, y, net) == m.frechet_distance(f, m.features_of(y, net))

# ---- spectrum ---------------------------------------------------------------------------------------------------------------------

@given(st.integers(1, 3), st.sampled_from([1, 3]), sides, sides, st.integers(0, 99))
def test_parseval(b, c, h, w, seed):
    x = rand(b, c, h, w, seed=seed)
    assert torch.allclose(m.power_spectrum(x).sum((1, 2)), x.square().mean((1, 2, 3)), rtol=1e-4)

@given(st.integers(1, 12), st.booleans())
def test_a_grating_lies_on_its_ring(cycles, down):
    x = .9 * (2 * math.pi * cycles * torch.arange(32) / 32).sin().expand(1, 1, 32, 32)
    freq, power = m.radial_spectrum(x.mT if down else x)
    assert freq[power.argmax()] == cycles / 32
    assert torch.allclose(m.high_frequency_energy(x), torch.tensor(.405 if cycles / 32 > .25 else 0.), atol=1e-5)

def test_blur_and_identity():
    x = rand(4, 3, 32, 32)
    assert abs(m.high_frequency_ratio(x, x) - 1) < 1e-6 and m.high_frequency_ratio(x, (x + x.roll(1, -1)) / 2) < .7
    assert m.radial_spectrum(rand(2, 3, 20, 33), window=True)[1].shape == (2, 10)

# ---- answers ----------------------------------------------------------------------------------------------------------------------

@given(st.integers(1, 10_000), st.data())
def test_wilson(n, draw):
    hits = draw.draw(st.integers(0, n))
    lo, hi = m.wilson(hits, n)
    assert 0 <= lo <= hits / n + 1e-9 and hits / n <= hi + 1e-9 and hi <= 1 and lo < hi
    other = m.wilson(n - hits, n)
    assert abs(lo - (1 - other[1])) < 1e-9                                                     # failures are successes of the other side

@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
def test_attribute_accuracy_counts(b, k, seed):
    g = torch.Generator().manual_seed(seed)
    want, pred = torch.randint(-1, 3, (b, k), generator=g), torch.randint(0, 3, (b, k), generator=g)
    got = m.attribute_accuracy(pred, want, tuple('abcd'[:k]))
    for i, name in enumerate('abcd'[:k]):
        pairs = [(p, w) for p, w in zip(pred[:, i].tolist(), want[:, i].tolist()) if w >= 0]
        assert got[name]['n'] == len(pairs) and (not pairs and got[name]['accuracy'] is None or abs(got[name]['accuracy'] - sum(p == w for p, w in pairs) / len(pairs)) < 1e-12)

def test_confusion_and_calibration():
    want, pred = torch.tensor([0, 0, 1, 2, -1]), torch.tensor([0, 1, 1, 0, 2])
    assert m.confusion(pred, want, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert abs(m.calibration_error(torch.tensor([[.8, .2]] * 10), torch.tensor([0] * 6 + [1] * 4)) - .2) < 1e-6

X, A, W = rand(3, 3, 16, 16), randn(20, 4), torch.zeros(5, 2, dtype=torch.long)
NAN = X.clone(); NAN[0, 0, 0, 0] = torch.nan
PAIR = (m.psnr, m.ssim, m.high_frequency_ratio)
BAD_PAIRS = [(X, X[:2]), (X, X[..., :8]), (X.numpy(), X), (X, None), (X.long(), X), (X * 200, X), (NAN, X), (X, NAN), (X[0], X[0]), (X[:0], X[:0]), (X, X / 0)]

@pytest.mark.parametrize('f', PAIR, ids=lambda f: f.__name__)
@pytest.mark.parametrize('i', range(len(BAD_PAIRS)))
def test_bad_pairs(f, i):
    with pytest.raises((ValueError, TypeError), match='expected'): f(*BAD_PAIRS[i])

SETS = (m.frechet_distance, m.kernel_distance, m.precision_recall)
BAD_SETS = [(A, A[:, :2]), (A[:1], A), (A[:0], A), (A[:, :0], A), (A.long(), A), (A, A / 0), (A[0], A), (X, X), (A.numpy(), A), (None, A), (A, A * torch.nan)]

@pytest.mark.parametrize('f', SETS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('i', range(len(BAD_SETS)))
def test_bad_sets(f, i):
    with pytest.raises((ValueError, TypeError)): f(*BAD_SETS[i])

@pytest.mark.parametrize('call', [
    lambda: m.ssim(X[..., :10], X[..., :10]), lambda: m.kernel_distance(A, A, blocks=1), lambda: m.kernel_distance(A, A, blocks=11), lambda: m.precision_recall(A, A, k=0), lambda: m.precision_recall(A, A, k=20),
    lambda: m.power_spectrum(NAN), lambda: m.radial_spectrum(X[..., :1, :1]), lambda: m.high_frequency_energy(X, .5), lambda: m.high_frequency_energy(X, -1), lambda: m.high_frequency_ratio(0 * X, X),
    lambda: m.wilson(1, 0), lambda: m.wilson(-1, 3), lambda: m.wilson(4, 3), lambda: m.attribute_accuracy(W, W[:2], 'ab'), lambda: m.attribute_accuracy(W, W, 'abc'), lambda: m.attribute_accuracy(W.float(), W, 'ab'),
    lambda: m.attribute_accuracy(W.tolist(), W, 'ab'), lambda: m.confusion(W[:, 0], W[:2, 0], 3), lambda: m.confusion(W[:, 0] + 3, W[:, 0], 3), lambda: m.confusion(W[:, 0], W[:, 0] - 1, 3), lambda: m.confusion(A[:, 0], A[:, 0], 3),
    lambda: m.calibration_error(A, W[:, 0]), lambda: m.calibration_error(randn(5, 3), W[:, 0]), lambda: m.calibration_error(randn(5, 3).softmax(1), W[:, 0] + 3), lambda: m.calibration_error(randn(5, 3).softmax(1), A[:5, 0]),
    lambda: m.calibration_error(torch.full((5, 3), torch.nan), W[:, 0]), lambda: m.features_of(X, lambda x: x), lambda: m.features_of(A, nn.Identity())])
def test_refusals(call):
    with pytest.raises((ValueError, TypeError)): call()
