"Guidance without a classifier against diffusers' own guider; properties; what is refused; and the historic bugs, which the checks must catch."
import math
from dataclasses import replace
import pytest
import torch
from hypothesis import given, settings, strategies as st
import latentcourse.classifier_guidance as before
from latentcourse.classifier_free_guidance import (DiffusersScale, FORGETFUL, HoSalimansWeight, STUDIES, cfg_field, entropy_within, exact_model, guide, latent_noise, painted)
from latentcourse.classifier_guidance import build_latent_unet, classifier_guided, forget, learn_latent_unet
from latentcourse.diffusion import COSINE, LINEAR, VE, VP, convert
from latentcourse.lib.check import z_score
from latentcourse.mixture import HILLS, TOWNS, exact_classifier, exact_field, exact_velocity, mixture_samples
from latentcourse.samplers import ancestral, counted, ddim, dpm_solver_2m, euler, euler_maruyama, heun, last, times
from latentcourse.unet import UNet

double = torch.float64
def seeded(s=0): return torch.Generator().manual_seed(s)

def some_net(dtype=double):
    "A small U-Net that answers something and knows eight classes."
    torch.manual_seed(0)
    net = UNet(4, (8, 16), 1, 2, 4, 8, classes=8).to(dtype).eval().requires_grad_(False)
    for q in net.parameters(): q.add_(.1 * torch.randn(q.shape, dtype=dtype))
    return net

NET = some_net()
XT, T, Y = torch.randn(8, 4, 8, 8, dtype=double, generator=seeded(1)), torch.linspace(.05, .95, 8, dtype=double), torch.arange(8)
NULL = torch.full_like(Y, 8)
def plainly(model, y, w): return lambda xt, t: (1 - w) * model(xt, t, torch.full_like(y, model.classes)) + w * model(xt, t, y)

# ---- the library ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('scale', [1., 1.5, 3., 7.5])
def test_guide_is_diffusers_guider(scale):
    pytest.importorskip('diffusers')
    try: from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
    except ImportError: pytest.skip('this diffusers has no guiders')
    empty, told = torch.randn(2, 5, 4, 3, dtype=double, generator=seeded())
    theirs = ClassifierFreeGuidance(guidance_scale=scale).forward(told, empty).pred
    torch.testing.assert_close(guide(empty, told, DiffusersScale(scale).to_w()), theirs)
    paper = ClassifierFreeGuidance(guidance_scale=scale, use_original_formulation=True).forward(told, empty).pred
    torch.testing.assert_close(guide(empty, told, HoSalimansWeight(scale).to_w()), paper)

def test_pipelines_switch_off_at_one():
    "What DiffusersScale says of scales of 1 and less, read from the pipelines' source (they need other packages to import)."
    diffusers = pytest.importorskip('diffusers')
    from pathlib import Path
    for name in ('stable_diffusion/pipeline_stable_diffusion.py', 'stable_diffusion_3/pipeline_stable_diffusion_3.py'):
        source = (Path(diffusers.__file__).parent / 'pipelines' / name).read_text(encoding='utf-8')
        assert 'return self._guidance_scale > 1' in source
    assert [DiffusersScale(s).to_w() for s in (0, .5, 1, 1.5, 7)] == [1, 1, 1, 1.5, 7]

# ---- properties -------------------------------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(w=st.floats(-3, 15), a=st.floats(-4, 4), b=st.floats(-4, 4), seed=st.integers(0, 99))
def test_mixing_and_affine_maps_change_places(w, a, b, seed):
    empty, told, x = torch.randn(3, 4, 5, dtype=double, generator=seeded(seed))
    torch.testing.assert_close(guide(a * empty + b * x, a * told + b * x, w), a * guide(empty, told, w) + b * x, atol=1e-9, rtol=1e-9)

@settings(max_examples=5, deadline=None)
@given(ws=st.lists(st.floats(-2, 12), min_size=8, max_size=8))
def test_a_weight_for_each_state(ws):
    got = cfg_field(NET, Y, torch.tensor(ws, dtype=double))(XT, T)
    torch.testing.assert_close(got, torch.cat([cfg_field(NET, Y[i:i + 1], ws[i])(XT[i:i + 1], T[i:i + 1]) for i in range(8)]), atol=1e-9, rtol=1e-9)

@pytest.mark.parametrize('w', [0., .5, 1., 2., 7.5])
def test_batched_is_sequential(w): torch.testing.assert_close(cfg_field(NET, Y, w)(XT, T), plainly(NET, Y, w)(XT, T), atol=1e-12, rtol=1e-12)

def test_batched_is_sequential_in_single_precision():
    net = some_net(torch.float32)
    torch.testing.assert_close(cfg_field(net, Y, 3.)(XT.float(), T.float()), plainly(net, Y, 3.)(XT.float(), T.float()), atol=1e-5, rtol=1e-5)

def test_calls_and_states():
    asked = []
    def model(xt, t, y): asked.append(len(xt)); return NET(xt, t, y)
    model.classes = 8
    for w, want in ((0, [8]), (1, [8]), (0., [8]), (1., [8]), (.5, [16]), (3., [16]), (torch.ones(8, dtype=double), [16])):
        asked.clear(); cfg_field(model, Y, w)(XT, T); assert asked == want, w

@pytest.mark.parametrize('path', [LINEAR, COSINE, VP, VE], ids=lambda p: p.name)
@pytest.mark.parametrize('w', [0., 1., 3.])
def test_every_sampler_goes_the_classifiers_way(path, w):
    "Exact answers here, the gradient of the exact classifier there."
    x, y, ts = torch.randn(60, 2, dtype=double, generator=seeded()) * path.sigma(torch.tensor([.05], dtype=double)), torch.arange(60) % 3, times(8, .05, .95)
    ours = cfg_field(exact_model(TOWNS, path), y, w)
    theirs = classifier_guided(exact_field(TOWNS, path), lambda x, t: exact_classifier(TOWNS, path, x, t), path, y, w)
    for sampler in (euler, heun, lambda f, x, ts: ddim(f, x, ts, path), lambda f, x, ts: dpm_solver_2m(f, x, ts, path), lambda f, x, ts: ancestral(f, x, ts, path, seeded()), lambda f, x, ts: euler_maruyama(f, x, ts, path, None, seeded())):
        torch.testing.assert_close(last(sampler(ours, x, ts)), last(sampler(theirs, x, ts)), atol=1e-7, rtol=1e-7)

def test_exact_model_with_mixed_conditions():
    x, t, y = torch.randn(9, 2, dtype=double, generator=seeded()), torch.linspace(.1, .9, 9, dtype=double), torch.tensor([0, 3, 1, 3, 2, 0, 3, 3, 1])
    want = torch.cat([exact_velocity(TOWNS, LINEAR, x[i:i + 1], t[i:i + 1], None if y[i] == 3 else y[i:i + 1]) for i in range(9)])
    torch.testing.assert_close(exact_model(TOWNS, LINEAR)(x, t, y), want)
    torch.testing.assert_close(exact_model(TOWNS, LINEAR)(x, t, torch.full_like(y, 3)), exact_velocity(TOWNS, LINEAR, x, t))

def test_another_class_in_the_place_of_silence():
    torch.testing.assert_close(cfg_field(NET, Y, 2., y_null=3)(XT, T), 2 * NET(XT, T, Y) - NET(XT, T, torch.full_like(Y, 3)), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(cfg_field(NET, Y, 2., y_null=Y.flip(0))(XT, T), 2 * NET(XT, T, Y) - NET(XT, T, Y.flip(0)), atol=1e-12, rtol=1e-12)

def test_painted_in_parts_is_painted_at_once():
    y, start, w = torch.arange(70) % 8, torch.randn(70, 4, 8, 8, dtype=double, generator=seeded()), torch.linspace(0, 4, 70, dtype=double)
    torch.testing.assert_close(painted(NET, y, w, start, 2), last(heun(cfg_field(NET, y, w), start, times(2))), atol=1e-9, rtol=1e-9)
    assert torch.equal(latent_noise(3, 5), latent_noise(3, 5)) and not torch.equal(latent_noise(3, 5), latent_noise(3, 6))

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), k=st.integers(2, 9))
def test_entropy(seed, k):
    from scipy.stats import entropy
    g = seeded(seed)
    y, a = torch.arange(40) % 4, torch.randint(k, (40,), generator=g)
    want = sum(entropy(torch.bincount(a[y == c], minlength=k).double().numpy(), base=2) for c in range(4)) / 4
    assert entropy_within(a, y, k) == pytest.approx(want) and 0 <= entropy_within(a, y, k) <= math.log2(k) + 1e-9
    assert entropy_within(y, y, k) == 0

def test_studies():
    assert set(STUDIES) == {'p-uncond', 'guidance-weight'} and all(len(s.seeds) == 3 for s in STUDIES.values())

# ---- what is refused --------------------------------------------------------------------------------------------------------------

FOREIGN = [HoSalimansWeight(2.), DiffusersScale(3.)]

@pytest.mark.parametrize('w', FOREIGN, ids=lambda w: type(w).__name__)
def test_a_foreign_weight_is_good_for_nothing_but_converting(w):
    a, b = torch.randn(2, 8, 3)
    for f in (lambda: guide(a, b, w), lambda: cfg_field(NET, Y, w), lambda: w + 1, lambda: 1 - w, lambda: w * a, lambda: a * w, lambda: w == 2., lambda: w > 1, lambda: float(w), lambda: bool(w), lambda: torch.add(a, w), lambda: w + w, lambda: HoSalimansWeight(w), lambda: DiffusersScale(w),
              lambda: classifier_guided(lambda x, t: x, lambda x, t: x, LINEAR, Y, w)(XT, T)):
        with pytest.raises(TypeError): f()
    with pytest.raises(TypeError, match='to_w'): guide(a, b, w)
    with pytest.raises(AttributeError): setattr(w, 's' if isinstance(w, HoSalimansWeight) else 'guidance_scale', 1.)

@pytest.mark.parametrize('call, error, says', [
    (lambda: guide(torch.zeros(2, 3), torch.zeros(2, 4), 1.), ValueError, 'same'), (lambda: guide(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3)), ValueError, 'one for each of 2'), (lambda: guide(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(())), ValueError, 'expected a number'),
    (lambda: HoSalimansWeight(-1.5), ValueError, '-1.0 or more'), (lambda: HoSalimansWeight(math.nan), ValueError, 'finite'), (lambda: HoSalimansWeight(math.inf), ValueError, 'finite'), (lambda: HoSalimansWeight('2'), TypeError, 'not str'), (lambda: HoSalimansWeight(True), TypeError, 'not bool'),
    (lambda: DiffusersScale(-1.), ValueError, '0.0 or more'), (lambda: DiffusersScale(torch.tensor(3.)), TypeError, 'not Tensor'), (lambda: cfg_field(NET, Y[:3], 3.)(XT, T), ValueError, 'one int64 class'), (lambda: cfg_field(NET, Y[:3], 1.)(XT, T), ValueError, 'one int64 class')])
def test_errors_say_what_was_wrong(call, error, says):
    with pytest.raises(error, match=says): call()

# ---- the historic bugs, one by one ------------------------------------------------------------------------------------------------

def some_channels(model, y, w, k=3):
    "The famous transformer's: guidance in the first three channels of four."
    def field(xt, t):
        right, told = cfg_field(model, y, w)(xt, t), model(xt, t, y)
        return torch.cat([right[:, :k], told[:, k:]], 1)
    return field

def one_more(model, y, w): return cfg_field(model, y, 1 + w)

def swapped_halves(model, y, w):
    null = torch.full_like(y, model.classes)
    def field(xt, t):
        told, empty = model(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([null, y])).chunk(2)
        return guide(empty, told, w)
    return field

def interleaved(model, y, w):
    "repeat_interleave where repeat belongs: states and conditions no longer belong together."
    null = torch.full_like(y, model.classes)
    def field(xt, t):
        empty, told = model(xt.repeat_interleave(2, 0), t.repeat_interleave(2), torch.cat([null, y])).chunk(2)
        return guide(empty, told, w)
    return field

def silence_is_class_zero(model, y, w): return cfg_field(model, y, w, y_null=0)

def other_times(model, y, w):
    return lambda xt, t: guide(model(xt, t, torch.full_like(y, model.classes)), model(xt, (t + .02).clamp(max=1), y), w)

def other_noise(model, y, w):
    return lambda xt, t: guide(model(xt + .02 * torch.randn(xt.shape, dtype=xt.dtype, generator=seeded()), t, torch.full_like(y, model.classes)), model(xt, t, y), w)

def weights_of_two(model, y, w): return lambda xt, t: model(xt, t, torch.full_like(y, model.classes)) + w * model(xt, t, y)

WRONG = [one_more, swapped_halves, interleaved, silence_is_class_zero, other_times, other_noise, weights_of_two]

def checked_on_the_network(build, w=3.): torch.testing.assert_close(build(NET, Y, w)(XT, T), plainly(NET, Y, w)(XT, T), atol=1e-9, rtol=1e-9)
def checked_in_the_exact_world(build, w=3.):
    x, t, y = torch.randn(60, 2, dtype=double, generator=seeded()), torch.linspace(.1, .9, 60, dtype=double), 1 + torch.arange(60) % 2
    theirs = classifier_guided(exact_field(TOWNS, LINEAR), lambda x, t: exact_classifier(TOWNS, LINEAR, x, t), LINEAR, y, w)
    torch.testing.assert_close(build(exact_model(TOWNS, LINEAR), y, w)(x, t), theirs(x, t), atol=1e-8, rtol=1e-8)

def test_the_checks_pass_what_is_right(): checked_on_the_network(cfg_field), checked_in_the_exact_world(cfg_field)

@pytest.mark.parametrize('wrong', [some_channels, *WRONG], ids=lambda f: f.__name__)
def test_a_wrong_field_is_caught_on_the_network(wrong):
    with pytest.raises(AssertionError): checked_on_the_network(wrong)

@pytest.mark.parametrize('wrong', WRONG, ids=lambda f: f.__name__)
def test_a_wrong_field_is_caught_in_the_exact_world(wrong):
    with pytest.raises(AssertionError): checked_in_the_exact_world(wrong)

def test_a_single_wrong_channel_is_caught():
    for k in range(4):
        def build(model, y, w):
            def field(xt, t):
                v, told = cfg_field(model, y, w)(xt, t).clone(), model(xt, t, y)
                v[:, k] = told[:, k]
                return v
            return field
        with pytest.raises(AssertionError): checked_on_the_network(build)

def test_to_clip_one_of_the_two_is_not_to_clip_the_guided():
    "Clipping is not affine: the guided guess of the data clipped once, and both guesses clipped before they are mixed, are different pictures."
    x, t, y = 2 * torch.randn(200, 2, dtype=double, generator=seeded()), torch.linspace(.2, .9, 200, dtype=double), torch.arange(200) % 3
    data = lambda c: convert(LINEAR, exact_model(TOWNS, LINEAR)(x, t, c), x, t, 'v', 'x')
    empty, told = data(torch.full_like(y, 3)), data(y)
    after, first = guide(empty, told, 3.).clamp(-1, 1), guide(empty.clamp(-1, 1), told.clamp(-1, 1), 3.)
    only_one = guide(empty, told.clamp(-1, 1), 3.)
    for wrong in (first, only_one):
        with pytest.raises(AssertionError): torch.testing.assert_close(wrong, after)
        assert wrong.abs().max() > 1                                            # and it does not even stay in the range

@pytest.mark.parametrize('drop, null, trained', [(.3, 8, True), (0., 8, False), (.3, 0, False)], ids=['as it should be', 'never forgotten', 'forgotten into class 0'])
def test_a_null_condition_that_was_never_trained_is_caught(drop, null, trained, monkeypatch):
    cfg = replace(FORGETFUL, widths=(8, 8), d=8, scenes=64, steps=8, batch=16, drop=drop, decay=0.)
    monkeypatch.setattr(before, 'training_latents', lambda n, first: (torch.randn(64, 4, 8, 8, generator=seeded()), torch.arange(64) % 8))
    monkeypatch.setattr(before, 'forget', lambda y, p, _: forget(y, p, null))
    model = build_latent_unet(cfg)
    first = model.label.weight.detach().clone()
    for _ in learn_latent_unet(model, cfg, progress=False): pass
    moved = (model.label.weight - first).abs().amax(1) > 0
    assert moved[:8].all() and bool(moved[8]) == trained

@pytest.mark.parametrize('null, fine', [(2, True), (0, False)], ids=['an index of its own', 'the index of class 0'])
def test_regression_finds_both_answers_only_if_silence_has_its_own_index(null, fine):
    torch.manual_seed(0)
    x, k = mixture_samples(HILLS, 200_000)
    eps, t, y = torch.randn_like(x), torch.full((len(x),), .6, dtype=double), HILLS.labels[k]
    xt, told = LINEAR.xt(x, eps, t), forget(y, .2, null)
    off = LINEAR.v(x, eps, t) - exact_model(HILLS, LINEAR)(xt, t, told)
    side = xt[:, 0] > 0
    worst = max(abs(z_score(off[(told == c) & s, 0], 0.)) for c in told.unique() for s in (side, ~side))
    assert (worst < 5) == fine, worst

def test_a_class_for_each_state():
    from latentcourse.classifier_guidance import LATENT
    net = build_latent_unet(LATENT['WEAK']).eval()
    with pytest.raises(ValueError, match='one int64 class for each of 4 states'): cfg_field(net, torch.arange(3), 3.)(torch.randn(4, 4, 16, 16), torch.rand(4))
