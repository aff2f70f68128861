"Guidance by a classifier against closed forms, against diffusers, and against itself with the historic bugs put back; the generator, the classifiers and their training."
import math
from dataclasses import replace
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.distributions import Normal
import latentcourse
from latentcourse import classifier_guidance as cg
from latentcourse.diffusion import COSINE, LINEAR, PATHS, VP, convert, forward_sde, like
from latentcourse.lib.check import agree, z_score
from latentcourse.lib.checkpoint import check_figures, figure
from latentcourse.mixture import HILLS, TOWNS, Mixture, exact_classifier, exact_field, exact_mean, exact_noise, exact_score, exact_velocity, mixture_samples, pushed
from latentcourse.samplers import ancestral, counted, ddim, euler, last, times
from latentcourse.toybox import TOYS, split_seeds

double = torch.float64
seeded = lambda s=0: torch.Generator().manual_seed(s)
SPACE = Mixture(torch.randn(6, 4, generator=seeded(3), dtype=double), torch.linspace(.3, .8, 6, dtype=double), None, [0, 1, 2, 0, 1, 2])       # four "channels"
asks = lambda gm, path=LINEAR: lambda xt, t: exact_classifier(gm, path, xt, t)
EACH_PATH = pytest.mark.parametrize('path', PATHS, ids=lambda p: p.name)

def states(gm, path, b=24, seed=0):
    g = seeded(seed)
    t = torch.rand(b, generator=g, dtype=double) * .9 + .05
    return path.xt(mixture_samples(gm, b, None, g)[0], torch.randn(b, gm.mu.shape[1], generator=g, dtype=double), t), t, torch.arange(b) % gm.classes

# ---- one step -------------------------------------------------------------------------------------------------------------------------

def step_law(gm, t0, t1, noisier, candidates, y=None):
    "log p(x_i | x_i+1) on the line by conditioning each component's joint normal: no classifier, no score."
    (a, s), (b, r) = (t0, 1 - t0), (t1, 1 - t1)
    k, tau2 = a / b, s**2 - (a / b * r)**2
    mu, var = b * gm.mu[:, 0], (b * gm.std)**2 + r**2                                          # of x_i in each component
    total = k**2 * var + tau2
    gain = k * var / total
    log_w = gm.weights.log() + Normal(k * mu, total.sqrt()).log_prob(torch.tensor(noisier, dtype=double))
    if y is not None: log_w = log_w.masked_fill(gm.labels != y, -torch.inf)
    parts = Normal(mu + gain * (noisier - k * mu), (var - gain * k * var).sqrt()).log_prob(candidates[:, None])
    return (log_w.log_softmax(0) + parts).logsumexp(1)

LINE = torch.linspace(-7, 7, 1401, dtype=double)

@settings(max_examples=30, deadline=None)
@given(st.floats(.05, .9), st.floats(.02, .9), st.floats(-3, 3), st.integers(0, 1))
def test_bayes_for_one_step(t0, part, noisier, y):
    t1 = t0 + part * (.95 - t0)
    got = cg.class_step(step_law(HILLS, t0, t1, noisier, LINE), exact_classifier(HILLS, LINEAR, LINE[:, None], t1)[:, y])
    agree(got.exp(), step_law(HILLS, t0, t1, noisier, LINE, y).log_softmax(0).exp(), atol=1e-9)

@pytest.mark.parametrize('wrong', [.5, .7, .4, .95], ids=['noisier', 'a step ahead', 'flipped', 'nearly clean'])
def test_the_classifier_must_be_asked_at_the_time_of_the_candidate(wrong):
    want = step_law(HILLS, .5, .6, .2, LINE, 1).log_softmax(0).exp()
    good = cg.class_step(step_law(HILLS, .5, .6, .2, LINE), exact_classifier(HILLS, LINEAR, LINE[:, None], .6)[:, 1]).exp()
    bad = cg.class_step(step_law(HILLS, .5, .6, .2, LINE), exact_classifier(HILLS, LINEAR, LINE[:, None], wrong)[:, 1]).exp()
    assert agree(good, want, atol=1e-9) < 1e-9
    with pytest.raises(AssertionError): agree(bad, want, atol=1e-6)

def test_class_step_ignores_constants_and_order():
    a, b, order = torch.randn(3, 9, dtype=double), torch.randn(3, 9, dtype=double), torch.randperm(9)
    agree(cg.class_step(a + 3., b - 7.), cg.class_step(a, b), atol=1e-12)
    agree(cg.class_step(a[:, order], b[:, order]), cg.class_step(a, b)[:, order], atol=1e-12)
    agree(cg.class_step(a, b).exp().sum(1), 1., atol=1e-12)

SHIFTS = {'the deviation': lambda m, v, g, w: m + w * v**.5 * g, 'against the gradient': lambda m, v, g, w: m - w * v * g, 'w as 1 + w': lambda m, v, g, w: m + (1 + w) * v * g, 'w twice': lambda m, v, g, w: m + w**2 * v * g, 'half': lambda m, v, g, w: m + w * v * g / 2}
def shift_check(shift):
    "An affine log p(y | x), raised to w, times a normal density, on a grid."
    for mu, s, g, w in ((.3, .5, 1.7, 1.), (-1., .3, -4., 2.5), (0., 1.3, .9, .5)):
        line = torch.linspace(mu - 12 * s, mu + 12 * s, 6001, dtype=double)
        p = (Normal(torch.tensor(mu, dtype=double), s).log_prob(line) + w * g * line).softmax(0)
        error = agree(shift(torch.tensor([mu], dtype=double), torch.tensor([s**2], dtype=double), torch.tensor([g], dtype=double), w), (p @ line)[None], atol=1e-8)
    return error

def test_shifted_mean(): assert shift_check(cg.shifted_mean) < 1e-8

@pytest.mark.parametrize('bug', SHIFTS)
def test_bugs_in_the_shift(bug):
    with pytest.raises(AssertionError): shift_check(SHIFTS[bug])

# ---- the gradient and the field -------------------------------------------------------------------------------------------------------

@EACH_PATH
@pytest.mark.parametrize('gm', [HILLS, TOWNS, SPACE], ids=['1-D', '2-D', '4-D'])
def test_pull_is_a_difference_of_scores(gm, path):
    xt, t, y = states(gm, path)
    agree(cg.class_pull(asks(gm, path), xt, t, y), exact_score(gm, path, xt, t, y) - exact_score(gm, path, xt, t), atol=1e-8)

def test_pull_leaves_no_traces_and_does_not_mix_the_batch():
    torch.manual_seed(0)
    net, xt, t, y = cg.LatentClassifier(), torch.randn(5, 4, 16, 16), torch.rand(5), torch.tensor([0, 3, 7, 2, 2])
    with torch.no_grad(): pull = cg.class_pull(net, xt, t, y)                                  # samplers run without gradients
    assert not pull.requires_grad and not xt.requires_grad and all(q.grad is None for q in net.parameters())
    for i in range(5): agree(cg.class_pull(net, xt[i:i + 1], t[i:i + 1], y[i:i + 1]), pull[i:i + 1], atol=1e-5)

def test_pull_of_the_network_by_differences():
    torch.manual_seed(0)
    net = cg.LatentClassifier(width=8).double()
    for q in net.parameters(): torch.nn.init.normal_(q, std=.1)
    xt, t, y, d = torch.randn(3, 4, 16, 16, dtype=double), torch.rand(3, dtype=double), torch.tensor([1, 6, 4]), torch.randn(3, 4, 16, 16, dtype=double)
    said = lambda x: net(x, t).gather(1, y[:, None])[:, 0]
    with torch.no_grad(): want = (said(xt + 1e-3 * d) - said(xt - 1e-3 * d)).double() / 2e-3                   # it answers in single precision
    agree((cg.class_pull(net, xt, t, y) * d).flatten(1).sum(1) / want.abs().max(), want / want.abs().max(), atol=.01)

def field_check(build, gm=SPACE, w=1.):
    "A guided field must be v + w (v of the class - v), on all paths, relative to its size."
    for path in PATHS:
        xt, t, y = states(gm, path)
        free, tied = exact_velocity(gm, path, xt, t), exact_velocity(gm, path, xt, t, y)
        want = free + w * (tied - free)
        error = agree(build(exact_field(gm, path), asks(gm, path), path, y, w)(xt, t) / want.abs().max(), want / want.abs().max(), atol=1e-8)
    return error

@settings(max_examples=12, deadline=None)
@given(st.sampled_from([0., .3, 1., 2., 7.5]), st.sampled_from([HILLS, TOWNS, SPACE]))
def test_the_guided_field(w, gm): assert field_check(cg.classifier_guided, gm, w) <= 1e-8

def mutant(rate=lambda path, t: forward_sde(path, t)[1] / 2, time=lambda t: t, weight=lambda w: w, mask=lambda g: g):
    def build(field, classifier, path, y, w):
        return lambda xt, t: field(xt, t) + weight(w) * like(rate(path, t), xt) * mask(cg.class_pull(classifier, xt, time(t), y))
    return build

def first_three(g): g = g.clone(); g[:, 3:] = 0; return g
FIELDS = {'g for g squared': mutant(rate=lambda p, t: forward_sde(p, t)[1].sqrt() / 2), 'all of g squared': mutant(rate=lambda p, t: forward_sde(p, t)[1]), 'sigma squared': mutant(rate=lambda p, t: p.sigma(t)**2), 'sigma': mutant(rate=lambda p, t: p.sigma(t)),
          'rate at the flipped time': mutant(rate=lambda p, t: forward_sde(p, 1 - t)[1] / 2), 'classifier at the flipped time': mutant(time=lambda t: 1 - t), 'classifier a step late': mutant(time=lambda t: t - .04), 'classifier told that there is no noise': mutant(time=lambda t: torch.ones_like(t)),
          'w as 1 + w': mutant(weight=lambda w: 1 + w), 'w twice': mutant(weight=lambda w: w**2), 'w - 1': mutant(weight=lambda w: w - 1), 'three of four channels': mutant(mask=first_three), 'against the gradient': mutant(mask=lambda g: -g)}

def test_the_mutant_without_a_mutation_passes(): assert field_check(mutant(), w=2.) <= 1e-8

@pytest.mark.parametrize('bug', FIELDS)
def test_bugs_in_the_field(bug):
    with pytest.raises(AssertionError): field_check(FIELDS[bug], w=2.)

def test_without_guidance_nobody_is_asked():
    def no_classifier(xt, t): raise RuntimeError('asked')
    xt, t, y = states(TOWNS, LINEAR)
    assert torch.equal(cg.classifier_guided(exact_field(TOWNS, LINEAR), no_classifier, LINEAR, y, 0.)(xt, t), exact_velocity(TOWNS, LINEAR, xt, t))

@pytest.mark.parametrize('path', [LINEAR, COSINE], ids=lambda p: p.name)
def test_pure_noise_is_refused_with_advice(path):
    xt, _, y = states(TOWNS, path)
    with pytest.raises(ValueError, match='start a little later'): cg.classifier_guided(exact_field(TOWNS, path), asks(TOWNS, path), path, y, 1.)(xt, torch.zeros(len(xt), dtype=double))

@EACH_PATH
def test_guided_noise_and_its_bug(path):
    xt, t, y = states(TOWNS, path)
    pull = cg.class_pull(asks(TOWNS, path), xt, t, y)
    for w in (1., 3.):
        want = exact_noise(TOWNS, path, xt, t) + w * (exact_noise(TOWNS, path, xt, t, y) - exact_noise(TOWNS, path, xt, t))
        agree(cg.guided_noise(exact_noise(TOWNS, path, xt, t), pull, path.sigma(t), w), want, atol=1e-8)
        for wrong in (cg.guided_noise(exact_noise(TOWNS, path, xt, t), pull, path.sigma(t)**2, w), cg.guided_noise(exact_noise(TOWNS, path, xt, t), -pull, path.sigma(t), w)):
            with pytest.raises(AssertionError): agree(wrong, want, atol=1e-6)

@pytest.mark.parametrize('path', [LINEAR, COSINE, VP], ids=lambda p: p.name)
def test_imbalance_is_what_continuity_lacks(path):
    x, t = mixture_samples(pushed(SPACE, path, .5), 10, None, seeded(1))[0], torch.full((10,), .5, dtype=double)
    pull = cg.class_pull(asks(SPACE, path), x, t, torch.full((10,), 2))
    assert cg.imbalance(path, pull, t, 0.).abs().max() == 0 == cg.imbalance(path, pull, t, 1.).abs().max()
    assert (cg.imbalance(path, pull, t, 3.) > 0).all() and (cg.imbalance(path, pull, t, .5) < 0).all()
    agree(cg.imbalance(path, pull, t, 3.), 6 * forward_sde(path, t)[1] / 2 * (exact_score(SPACE, path, x, t, torch.full((10,), 2)) - exact_score(SPACE, path, x, t)).square().sum(1), atol=1e-7)

# ---- DDPM and DDIM --------------------------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(st.floats(.05, .9), st.floats(.02, .95), st.integers(0, 2))
def test_the_exact_shift(t0, part, y):
    t1 = t0 + part * (1 - t0)
    x, y = mixture_samples(pushed(TOWNS, LINEAR, t0), 8, None, seeded(y))[0], torch.full((8,), y)
    now, after = ((torch.full((8,), t, dtype=double), torch.full((8,), 1 - t, dtype=double)) for t in (t0, t1))
    exact, ddpm = cg.step_gains(now, after)
    mean = lambda x_hat: cg.step_posterior(x, x_hat, now, after)[0]
    want = mean(exact_mean(TOWNS, LINEAR, x, t0, y)) - mean(exact_mean(TOWNS, LINEAR, x, t0))
    pull = cg.class_pull(asks(TOWNS), x, now[0], y)
    agree(exact[:, None] * pull, want, atol=1e-7)
    assert (ddpm < exact).all()
    agree(ddpm[:, None], cg.step_posterior(x, x, now, after)[1], atol=1e-12)

start = mixture_samples(pushed(TOWNS, LINEAR, .2), 20, None, seeded(7))[0]
wanted = torch.arange(20) % 3

def by_hand(path, ts, w, gain='posterior', sign=1., when='now'):
    x, g = start, seeded(2)
    for t0, t1 in zip(ts[:-1], ts[1:]):
        (a0, s0), (a1, s1) = ((path.alpha(t), path.sigma(t)) for t in (t0, t1))
        k, tau2 = a0 / a1, s0**2 - (a0 / a1 * s1)**2
        var = s1**2 * tau2 / s0**2
        at_time = {'now': t0, 'next': t1, 'flipped': 1 - t0}[when].expand(20)
        push = {'posterior': var, 'deviation': var.sqrt(), 'stage': tau2}[gain] * (exact_score(TOWNS, path, x, at_time, wanted) - exact_score(TOWNS, path, x, at_time))
        x = (k * s1**2 * x + a1 * tau2 * exact_mean(TOWNS, path, x, t0)) / s0**2 + sign * w * push + var.sqrt() * torch.randn(20, 2, dtype=double, generator=g)
    return x

@pytest.mark.parametrize('path', [LINEAR, COSINE, VP], ids=lambda p: p.name)
def test_shifted_ancestral_by_hand_and_its_bugs(path):
    ts = times(6, .2, .9)
    got = last(cg.shifted_ancestral(exact_field(TOWNS, path), asks(TOWNS, path), wanted, 2., start, ts, path, seeded(2)))
    agree(got, by_hand(path, ts, 2.), atol=1e-8)
    for how in (dict(gain='deviation'), dict(gain='stage'), dict(sign=-1.), dict(when='next'), dict(when='flipped')):
        with pytest.raises(AssertionError): agree(got, by_hand(path, ts, 2., **how), atol=1e-3)
    for w in (1., 3., 4.):
        with pytest.raises(AssertionError): agree(got, by_hand(path, ts, w), atol=1e-3)

@pytest.mark.parametrize('path', [COSINE, VP], ids=lambda p: p.name)
def test_guided_steps_are_those_of_diffusers(path, monkeypatch):
    "DDIM with the guided noise, and DDPM with its own variance times the gradient, by diffusers' schedulers."
    from test_samplers import T_OF, scheduler, with_our_path
    field, c = exact_field(TOWNS, path), asks(TOWNS, path)
    for name, config in (('DDIMScheduler', {}), ('DDPMScheduler', dict(variance_type='fixed_small'))):
        sched = with_our_path(scheduler(name, monkeypatch, clip_sample=False, **config), path)
        sched.set_timesteps(10)
        grid = torch.cat([T_OF[sched.timesteps], torch.ones(1, dtype=double)])
        x, theirs, g = start, [], seeded(2)
        for i, t in zip(sched.timesteps, grid):
            t = t.expand(20)
            pull = cg.class_pull(c, x, t, wanted)
            eps_hat = convert(path, field(x, t), x, t, 'v', 'eps')
            if name == 'DDIMScheduler': x = sched.step(cg.guided_noise(eps_hat, pull, path.sigma(t), 2.), i, x).prev_sample
            else: x = sched.step(eps_hat, i, x, generator=g).prev_sample + (2. * sched._get_variance(i) * pull if i > 0 else 0)
            theirs.append(x)
        ours = ddim(cg.classifier_guided(field, c, path, wanted, 2.), start, grid, path) if name == 'DDIMScheduler' else cg.shifted_ancestral(field, c, wanted, 2., start, grid, path, seeded(2))
        ours = [*ours]
        n = len(ours) if name == 'DDIMScheduler' else len(ours) - 1                              # diffusers clamps the variance of the last step away from 0
        torch.testing.assert_close(torch.stack(ours[:n]), torch.stack(theirs[:n]), rtol=0, atol=1e-7)

def test_guidance_of_one_goes_where_the_class_is():
    y = torch.full((4_000,), 1)
    bend = cg.classifier_guided(exact_field(TOWNS, LINEAR), asks(TOWNS), LINEAR, y, 1.)
    x = last(ancestral(bend, .98 * torch.randn(4_000, 2, dtype=double, generator=seeded(1)), times(60, .02), LINEAR, seeded(2)))
    assert (exact_classifier(TOWNS, LINEAR, x, 1.).argmax(1) == 1).double().mean() > .99
    agree(x.mean(0), TOWNS.weights[TOWNS.labels == 1] @ TOWNS.mu[TOWNS.labels == 1] / TOWNS.weights[TOWNS.labels == 1].sum(), atol=.2)

# ---- the classifier -------------------------------------------------------------------------------------------------------------------

def test_class_loss_is_cross_entropy_with_its_floor():
    x, k = mixture_samples(TOWNS, 20_000, None, seeded(1))
    y, eps, t = TOWNS.labels[k], torch.randn(20_000, 2, dtype=double, generator=seeded(2)), torch.full((20_000,), .4, dtype=double)
    xt = LINEAR.xt(x, eps, t)
    logits = lambda xt, t: exact_classifier(TOWNS, LINEAR, xt, t) + 5.
    agree(cg.class_loss(lambda xt, t: logits(xt, t).log_softmax(1), x, y, t, eps), F.cross_entropy(logits(xt, t), y, reduction='none'), atol=1e-9)
    p = exact_classifier(TOWNS, LINEAR, xt, t)
    assert abs(z_score(cg.class_loss(asks(TOWNS), x, y, t, eps) + (p.exp() * p).sum(1), 0.)) < 5
    for wrong in (lambda xt, t: asks(TOWNS)(xt, 1 - t), lambda xt, t: asks(TOWNS)(xt, torch.ones_like(t)), lambda xt, t: 2 * asks(TOWNS)(xt, t).log_softmax(1) - (2 * asks(TOWNS)(xt, t)).logsumexp(1, keepdim=True)):
        assert z_score(cg.class_loss(wrong, x, y, t, eps) - cg.class_loss(asks(TOWNS), x, y, t, eps), 0.) > 5

def test_the_latent_classifier():
    torch.manual_seed(0)
    net, xt, t = cg.LatentClassifier(), torch.randn(6, 4, 16, 16), torch.rand(6)
    for q in net.parameters(): torch.nn.init.normal_(q, std=.1)
    with torch.no_grad():
        said = net(xt, t)
        assert said.shape == (6, len(TOYS)) and said.dtype == torch.float32
        agree(said.exp().sum(1), 1., atol=1e-5)
        assert (net(xt, 1 - t) - said).abs().max() > 1e-3                                       # it listens to the time
    for bad in ((xt[:, :3], t), (xt, t[:5]), (xt[..., :8], t), (xt[0], t)):
        with pytest.raises(ValueError, match='expected noisy latents'): net(*bad)

def test_told_clean_says_one():
    heard = []
    cg.told_clean(lambda xt, t: heard.append(t))(torch.zeros(3, 2), torch.tensor([.1, .5, .9]))
    assert torch.equal(heard[0], torch.ones(3))

TINY = cg.ClassifierCfg(width=8, scenes=64, steps=30, batch=16)

@pytest.fixture
def invented(monkeypatch):
    "Latents whose class can be seen, without codec and renderer."
    g = seeded(0)
    y = torch.randint(8, (64,), generator=g)
    z = torch.randn(8, 4, 16, 16, generator=g)[y] + .3 * torch.randn(64, 4, 16, 16, generator=g)
    monkeypatch.setattr(cg, 'training_latents', lambda n, first: (z[:n], y[:n]))
    return z, y

@pytest.mark.parametrize('noisy', [True, False])
def test_classifiers_learn_what_they_are_given(invented, monkeypatch, noisy):
    seen, loss = [], cg.class_loss
    monkeypatch.setattr(cg, 'class_loss', lambda c, x, y, t, eps: (seen.append(t), loss(c, x, y, t, eps))[1])
    model = cg.build_classifier(cg.ClassifierCfg(noisy=noisy, **{k: getattr(TINY, k) for k in ('width', 'scenes', 'steps', 'batch')}))
    log = list(cg.learn_classifier(model, replace(TINY, noisy=noisy), progress=False))
    assert len(log) == 30 and sum(r.loss for r in log[-5:]) < .7 * sum(r.loss for r in log[:5])
    ts = torch.cat(seen)
    assert (ts.min() < .1 and ts.max() > .9) if noisy else (ts == 1).all()
    again = list(cg.learn_classifier(cg.build_classifier(TINY), replace(TINY, noisy=noisy), progress=False))
    assert [r.loss for r in again] == [r.loss for r in log]

def test_generator_learns_with_and_without_classes(invented, monkeypatch):
    cfg, told = cg.LatentCfg(widths=(8, 16), d=16, scenes=64, steps=40, batch=16, drop=.5), []
    model = cg.build_latent_unet(cfg)
    monkeypatch.setattr(cg, 'forget', lambda y, drop, null, f=cg.forget: told.append(f(y, drop, null)) or told[-1])
    log = list(cg.learn_latent_unet(model, cfg, progress=False))
    assert len(log) == 40 and sum(r.loss for r in log[-10:]) < sum(r.loss for r in log[:10])
    share = (torch.cat(told) == 8).double().mean().item()
    assert .35 < share < .65

def test_forget():
    y = torch.randint(8, (40_000,), generator=seeded(1))
    torch.manual_seed(0)
    out = cg.forget(y, .15, 8)
    assert abs(z_score((out == 8).double(), .15)) < 5 and torch.equal(out[out != 8], y[out != 8])
    assert torch.equal(cg.forget(y, 0., 8), y) and (cg.forget(y, 1., 8) == 8).all()
    for drop in (-.1, 1.5):
        with pytest.raises(ValueError, match='probability'): cg.forget(y, drop, 8)

def test_names_that_do_not_exist():
    for f, bad in ((cg.load_latent_unet, 'unet'), (cg.load_classifier, 'classifier')):
        with pytest.raises(ValueError, match='unknown'): f(bad)
    with pytest.raises(ValueError, match='expected latent_unet'): cg.train_latent_unet('unet', cg.LATENT['CPU'])
    for name, noisy in (('noisy_classifier', False), ('clean_classifier', True), ('classifier', True)):
        with pytest.raises(ValueError, match='noisy'): cg.train_classifier(name, replace(TINY, noisy=noisy))

# ---- painting and marks ---------------------------------------------------------------------------------------------------------------

def test_guided_latents_count_and_are_the_same_in_any_batch():
    y, torch_net = torch.arange(103) % 8, lambda xt, t: -xt.flatten(1)[:, :8].square()
    field, c = counted(lambda xt, t: -xt), counted(lambda xt, t: torch_net(xt, t).log_softmax(1))
    a = cg.guided_latents(field, c, y, 2., n_steps=5, seed=3)
    assert a.shape == (103, 4, 16, 16) and field.calls == c.calls == 10                         # two batches of five steps
    agree(cg.guided_latents(field, c, y[:4], 2., n_steps=5, seed=3)[:0].numel(), 0, atol=0)
    g = seeded(3)
    z = .98 * torch.randn(103, 4, 16, 16, generator=g)
    want = last(euler(cg.classifier_guided(lambda xt, t: -xt, lambda xt, t: torch_net(xt, t).log_softmax(1), LINEAR, y, 2.), z, times(5, .02)))
    agree(a, want, atol=1e-4)
    calls = c.calls
    agree(cg.guided_latents(field, c, y, 0., n_steps=5, seed=3), last(euler(lambda xt, t: -xt, z, times(5, .02))), atol=1e-5)
    assert c.calls == calls

def test_variety():
    f, y = torch.tensor([[0., 0.], [3., 4.], [1., 0.], [1., 2.]]), torch.tensor([0, 0, 1, 1])
    agree(cg.variety(f, y), (5 + 2) / 2, atol=1e-6)
    agree(cg.variety(f + 7, y), 3.5, atol=1e-5)
    with pytest.raises(ValueError, match='variety'): cg.variety(f[:3], y[:3])

def test_the_study_is_declared():
    s = cg.STUDIES['classifier-guidance']
    assert s.point is cg.classifier_point and len(s.seeds) == 3 and {p['w'] for p in s.grid if p['classifier'] == 'noisy'} >= {0, 1, 4, 16, 64}

# ---- what is shipped ------------------------------------------------------------------------------------------------------------------

def ships(name):
    file = Path(latentcourse.__file__).parent / 'checkpoints' / f'{name}.safetensors'
    if not file.exists(): pytest.skip(f'{name} is not shipped')
    return file

@pytest.mark.parametrize('name', ['noisy_classifier', 'clean_classifier'])
def test_shipped_classifiers_are_those_that_were_examined(name):
    assert ships(name).stat().st_size < 4e5
    model, facts = cg.load_classifier(name)
    live = cg.examine_classifier(model, 150, start=30_000)
    assert check_figures(name, facts['evaluation'], {k: figure(v) for k, v in live.items()}) <= 5

@pytest.mark.parametrize('name', ['latent_unet', 'latent_weak'])
def test_shipped_generators_are_those_that_were_examined(name):
    assert ships(name).stat().st_size < 3e6
    model, facts = cg.load_latent_unet(name)
    live = cg.examine_latent_unet(model, 100, start=30_000, seed=3)
    assert check_figures(name, facts['evaluation'], {k: figure(v.double()) for k, v in live.items()}) <= 5

def test_noise_is_worth_training_with():
    ships('noisy_classifier'), ships('clean_classifier')
    x, labels = cg.latents_of(split_seeds('test', 40_000, 200))
    noisy, clean = cg.load_classifier('noisy_classifier')[0], cg.told_clean(cg.load_classifier('clean_classifier')[0])
    right = [[cg.hits_at(c, x, labels[:, 2], t).double().mean().item() for t in (.2, 1.)] for c in (noisy, clean)]
    assert right[0][0] > right[1][0] and min(right[0][1], right[1][1]) > .97
