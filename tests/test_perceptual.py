"LPIPS by hand: equal to the published package, deaf to none of the known bugs, with weights that rank as recorded."
import warnings
from dataclasses import replace
from urllib.error import URLError
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse import perceptual as pc
from latentcourse.lib.checkpoint import check_figures, figure
from latentcourse.lib.files import DataError
from latentcourse.oracle import load_oracle
from latentcourse.toybox import draw, scenes, split_seeds

@pytest.fixture(scope='module')
def own(): return pc.load_perceptual()

@pytest.fixture(scope='module')
def toys(): return draw(scenes(split_seeds('test', 90_000, 8)))

class Two(nn.Module):
    "Two maps whose distance can be worked out by hand; a batch norm that would follow what it sees."
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)
    def features(self, x): return [x, self.norm(self.conv(x)).relu()]

def pictures(n=3, size=16, seed=0): return torch.rand(2, n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1

def small(seed=0):
    torch.manual_seed(seed)
    return pc.Lpips(Two(), [torch.rand(3), torch.rand(4)]).double()

def by_hand(lp, x, y):
    "Zhang et al. (2018), eq. 1, place by place."
    out = torch.zeros(len(x), dtype=torch.float64)
    for w, a, b in zip(lp.weights, lp.net.features(x), lp.net.features(y)):
        for i in range(a.shape[2]):
            for j in range(a.shape[3]):
                u, v = (m[:, :, i, j] / (m[:, :, i, j].square().sum(1, keepdim=True).sqrt() + 1e-10) for m in (a, b))
                out += (w * (u - v)**2).sum(1) / (a.shape[2] * a.shape[3])
    return out

def battery(lp, x, y, want):
    "Raise unless `lp` is LPIPS with frozen parameters and the right range."
    with torch.no_grad(): assert torch.allclose(lp(x, y), want, rtol=1e-9, atol=0), 'value'
    lp.train()
    with torch.no_grad(): assert torch.allclose(lp(x, y), want, rtol=1e-9, atol=0), 'the net follows what it measures'
    z = y.clone().requires_grad_()
    lp(x, z).sum().backward()
    assert z.grad is not None and z.grad.abs().max() > 0 and all(p.grad is None for p in lp.parameters()), 'gradient'
    assert lp(x, x).abs().max() == 0
    with pytest.raises(ValueError, match='from_unit'): lp(x / 2 + .5, y / 2 + .5)

def test_the_definition():
    lp, (x, y) = small(), pictures()
    battery(lp, x, y, by_hand(lp, x, y))

class Unnormalised(pc.Lpips):
    def features(self, x): return [m * (w / m[0, 0].numel()).sqrt()[:, None, None] for m, w in zip(self.net.features(x), self.weights)]
class Unchecked(pc.Lpips):
    def forward(self, x, x_hat, bright=False): return self.distance(self.features(x), self.features(x_hat))
class Following(pc.Lpips):
    def train(self, mode=True): return nn.Module.train(self, mode)
class Detached(pc.Lpips):
    def features(self, x): return [f.detach() for f in super().features(x)]
class SumOfPlaces(pc.Lpips):
    def features(self, x): return [f * f[0, 0].numel()**.5 for f in super().features(x)]
class MeanOfChannels(pc.Lpips):
    def features(self, x): return [f / f.shape[1]**.5 for f in super().features(x)]
class MeanOfLayers(pc.Lpips):
    def distance(self, fx, fy): return super().distance(fx, fy) / len(fx)
class Length(pc.Lpips):
    def distance(self, fx, fy): return super().distance(fx, fy).sqrt()
class Batch(pc.Lpips):
    def distance(self, fx, fy): return super().distance(fx, fy).mean().expand(len(fx[0]))
class ScaledTwice(pc.Lpips):
    def features(self, x): return super().features(2 * x - 1)

@pytest.mark.parametrize('mistake', [Unnormalised, Unchecked, Following, Detached, SumOfPlaces, MeanOfChannels, MeanOfLayers, Length, Batch, ScaledTwice], ids=lambda m: m.__name__)
def test_mistakes_are_noticed(mistake):
    good, (x, y) = small(), pictures()
    with torch.no_grad(): want = by_hand(good, x, y)
    bad = mistake(good.net, good.weights).double()
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)): battery(bad, x, y, want)

# ---- the published package --------------------------------------------------------------------------------------------------------

def package(net):
    lpips = pytest.importorskip('lpips')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.manual_seed(0)
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False).double()

def layers_of(ref): return {k.split('.', 2)[2]: v for k, v in ref.state_dict().items() if k.startswith('net.')}

@pytest.mark.parametrize('net', pc.SLICES)
def test_equal_to_the_package(net):
    theirs = package(net)
    ours = pc.Lpips(pc.tower(net, layers_of(theirs)), pc.published_weights(net)).double()
    x, y = pictures(2, 64)
    y.requires_grad_()
    d, want = ours(x, y), theirs(x, y).flatten()
    (g,), (g_want,) = torch.autograd.grad(d.sum(), y), torch.autograd.grad(want.sum(), y)
    assert d.shape == (2,) and (d - want).abs().max() <= 1e-6 * want.max() and (g - g_want).abs().max() <= 1e-6 * g_want.abs().max()
    ours.net.mean.fill_(.5); assert (ours(x, y) - want).abs().max() > 1e-6 * want.max()                     # other colours are noticed
    ours = Unnormalised(pc.tower(net, layers_of(theirs)), pc.published_weights(net)).double()
    assert (ours(x, y) - want).abs().max() > 1e-2 * want.max()

def test_where_nothing_fires_nothing_pulls():
    f, g = torch.zeros(1, 4, 2, 2, requires_grad=True), torch.randn(1, 4, 2, 2)
    assert not pc.unit_vectors(f).any() and not torch.autograd.grad((pc.unit_vectors(f) * g).sum(), f)[0].any()
    h = torch.cat([f, torch.ones(1, 4, 2, 2)], 3)                                                           # beside places that do fire
    assert torch.equal(pc.unit_vectors(h)[..., 2:], torch.full((1, 4, 2, 2), .5)) and pc.unit_vectors(f * torch.nan).isnan().all()
    lpips = pytest.importorskip('lpips')
    assert torch.autograd.grad(lpips.normalize_tensor(f).square().sum(), f)[0].isnan().all()                # why ours is written otherwise

def test_published_weights_load_by_the_same_call(monkeypatch):
    "What the hub would send, or would not."
    import torchvision.models._api as api
    theirs = package('squeeze')
    sent = {**{f'features.{k}': v.float() for k, v in layers_of(theirs).items()}, 'classifier.1.weight': torch.zeros(2)}
    monkeypatch.setattr(api, 'load_state_dict_from_url', lambda *a, **k: sent)
    x, y = pictures(2, 64)
    assert torch.allclose(pc.load_perceptual('squeeze')(x.float(), y.float()).double(), theirs(x, y).flatten(), rtol=1e-4)
    for error in (URLError('no route'), RuntimeError('invalid hash value'), TimeoutError('timed out')):
        def fail(*a, **k): raise error
        monkeypatch.setattr(api, 'load_state_dict_from_url', fail)
        with pytest.raises(DataError, match='squeeze backbone could not be fetched.*Connect once.*squeezenet1_1.*needs no network'): pc.load_perceptual('squeeze')
    monkeypatch.setattr(pc, 'find_spec', lambda name: None)
    with pytest.raises(DataError, match='pip install lpips'): pc.published_weights('vgg')

# ---- properties -------------------------------------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([8, 11, 16]))
def test_a_squared_length(seed, size):
    lp, (x, y), (z, _) = small(seed % 7), pictures(2, size, seed), pictures(2, size, seed + 1)
    with torch.no_grad(): xy, yx, yz, xz = lp(x, y), lp(y, x), lp(y, z), lp(x, z)
    assert (xy >= 0).all() and torch.allclose(xy, yx) and (xz.sqrt() <= xy.sqrt() + yz.sqrt() + 1e-12).all()
    with torch.no_grad(): assert torch.allclose(lp.distance(lp.features(x), lp.features(y)), xy)             # a kept target

@settings(max_examples=20, deadline=None)
@given(st.floats(.01, 100))
def test_contrast_of_the_features_does_not_count(k):
    f = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    assert torch.allclose(pc.unit_vectors(k * f), pc.unit_vectors(f), atol=1e-6)

@settings(max_examples=20, deadline=None)
@given(st.floats(0, 2), st.floats(0, 2))
def test_preference_is_finite_and_falls_as_the_damage_shows(near, far):
    a, b = torch.tensor([near, near], dtype=torch.float64), torch.tensor([far, far + .1], dtype=torch.float64).requires_grad_()
    loss = pc.preference_loss(a, b)
    assert loss.isfinite().all() and loss[1] <= loss[0] and torch.autograd.grad(loss.sum(), b)[0].isfinite().all()
    assert abs(pc.preference_loss(torch.zeros(1), torch.zeros(1)).item() - .693147) < 1e-5

def test_half_precision_features_are_compared_in_single():
    f = torch.randn(2, 5, 3, 3)
    assert pc.unit_vectors(f.bfloat16()).dtype == pc.unit_vectors(f.half()).dtype == torch.float32

# ---- what is refused --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('x', [torch.zeros(3, 8, 8), torch.zeros(2, 1, 8, 8), torch.zeros(0, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan), torch.full((1, 3, 8, 8), -torch.inf),
                               torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 3, 8, 8), 128.), torch.rand(2, 3, 8, 8), None, [1.]])
def test_bad_pictures_are_refused(x):
    with pytest.raises((ValueError, TypeError), match='^x '): pc.check_signed(x)

def test_what_the_guard_lets_pass(own, toys):
    sky = torch.full((1, 3, 64, 64), .9)
    assert own(sky, sky, bright=True).item() == 0
    with pytest.raises(ValueError, match='bright=True'): own(sky, sky)
    assert own(toys, 1.5 * toys + .2).isfinite().all() and own(toys, torch.zeros_like(toys)).isfinite().all() # a reconstruction may stray
    assert torch.allclose(pc.from_unit(toys / 2 + .5), toys, atol=1e-6)
    for bad in (toys, (toys + 1) * 128, toys * torch.nan):
        with pytest.raises(ValueError, match='expected pictures in'): pc.from_unit(bad)

def test_bad_parts_are_refused(toys):
    with pytest.raises(ValueError, match='>= 0'): pc.Lpips(Two(), [torch.ones(3), -torch.ones(4)])
    with pytest.raises(ValueError, match='>= 0'): pc.Lpips(Two(), [])
    with pytest.raises(ValueError, match='>= 0'): pc.Lpips(Two(), [torch.tensor([1., torch.nan, 1.])])
    with pytest.raises(ValueError, match='channels'): pc.Lpips(Two(), [torch.ones(3)])(toys, toys)
    with pytest.raises(ValueError, match='same'): pc.Lpips(Two(), [torch.ones(3), torch.ones(4)])(toys, toys[:2])
    for call in (pc.load_perceptual, pc.backbone_file, pc.published_weights, pc.fetch_backbone):
        with pytest.raises(ValueError, match="'resnet'.*vgg"): call('resnet')
    with pytest.raises(ValueError, match='resnet'): pc.tower('resnet', {})
    with pytest.raises(ValueError, match='trains perceptual'): pc.train_perceptual('teacher', pc.PERCEPTUAL['CPU'])

# ---- the course's own -------------------------------------------------------------------------------------------------------------

def test_shipped_figures_hold():
    model, facts = pc.load_weights()
    net = load_oracle('teacher')[0]
    again = {}
    for name, kinds in (('seen', {}), ('new damages', {'far': pc.NEW_FAR}), ('new changes', {'near': pc.NEW_NEAR})):
        near, far, _ = pc.gaps_of(net, 192, split='valid', start=60_000, **kinds)
        with torch.no_grad(): again[name] = figure((model(near) < model(far)).double())
    assert check_figures('perceptual', facts['evaluation'], again) < 5
    assert facts['evaluation']['seen']['mean'] > .78 and facts['evaluation']['seen']['n'] >= 1000

def test_unrelated_scenes_are_one_apart(own):
    x = draw(scenes(split_seeds('test', 95_000, 96)))
    with torch.no_grad(): d = own(x, x.roll(1, 0))
    assert abs(d.mean().item() - 1) < .15 and all((w > 0).all() for w in own.weights)

def test_triplets_repeat_themselves_and_keep_the_scene(toys):
    for near, far in ((pc.NEAR, pc.FAR), (pc.NEW_NEAR, pc.NEW_FAR)):
        a, b = (next(pc.triplets(24, near, far, 'valid', 500)) for _ in range(2))
        assert all(torch.equal(p, q) for p, q in zip(a, b))
        for p in a[:3]: assert p.shape == (24, 3, 64, 64) and p.min() >= -1.001 and p.max() <= 1.001
        for p, least in ((a[1], .7), (a[2], .95)): assert ((p - a[0]).square().mean((1, 2, 3)) > 0).float().mean() >= least # a plain toy has no stripes to begin elsewhere
    assert not set(pc.NEAR) & set(pc.NEW_NEAR) and not set(pc.FAR) & set(pc.NEW_FAR)

def test_weights_share_the_damage():
    m = pc.ChannelWeights((3, 5), floor=.25)
    m.damage, m.v.data = torch.rand(8) + .1, torch.tensor([0., 1, 2, 0, 0, 0, 0, 3])
    w = m.weights()
    assert all(torch.isclose((a * d).sum(), torch.tensor(.5)) for a, d in zip(w, m.damage.split((3, 5)))) and all((a > 0).all() for a in w)
    assert torch.allclose(m(torch.eye(8)), torch.cat(w))

def test_training_repeats_itself_and_resumes(tmp_path, monkeypatch):
    gaps = pc.gaps_of
    monkeypatch.setattr(pc, 'gaps_of', lambda net, n, *a, **k: gaps(net, min(n, 32), *a, **k))
    cfg = replace(pc.PERCEPTUAL['CPU'], triplets=32, batch=16, steps=8)
    a, facts = pc.train_perceptual('perceptual', cfg, out=tmp_path, progress=False)
    for b in (pc.train_perceptual('perceptual', cfg, progress=False)[0], pc.train_perceptual('perceptual', cfg, out=tmp_path, resume=True, progress=False)[0]):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert set(facts) >= {'minutes', 'log', 'evaluation'} and set(facts['evaluation']) == {'seen', 'new damages', 'new changes'}
