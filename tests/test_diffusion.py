"Paths, conversions, chain and conventions: parity with diffusers and flow_matching in double precision, properties, refusals, and the historic mistakes, each caught by a check."
import math
from dataclasses import replace
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.distributions import Normal
from latentcourse import diffusion as df
from latentcourse.diffusion import COSINE, CONVENTIONS, LINEAR, PATHS, VE, VP, DDPMIndex, EDMSigma, FlowTime, Path, Prediction, ScoreTime, SD3Timestep, convert, from_t, like, time_of, to_t
from latentcourse.lib.check import agree, refuses

double = torch.float64
EACH_PATH = pytest.mark.parametrize('path', PATHS, ids=lambda p: p.name)
KINDS = 'x', 'eps', 'v', 'score'

def some(n=64, d=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, n, d, generator=g, dtype=double)
    return x, eps, .01 + .98 * torch.rand(n, generator=g, dtype=double)

# ---- peers -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('ours, theirs', [(df.linear_betas, 'linear'), (df.cosine_betas, 'squaredcos_cap_v2')])
def test_ddpm_is_that_of_diffusers(ours, theirs):
    "Their tables are float32, so we give them ours in double after comparing the tables to what float32 can hold; then their methods run in double."
    diffusers = pytest.importorskip('diffusers')
    peer = diffusers.DDPMScheduler(beta_schedule=theirs, clip_sample=False)
    bars = df.alpha_bars(ours())
    agree(peer.betas, ours(), atol=1e-7), agree(peer.alphas_cumprod, bars, atol=1e-6)
    again = torch.cumprod(1 - (torch.linspace(1e-4, .02, 1000, dtype=double) if theirs == 'linear' else torch.tensor([min(1 - math.cos(((i + 1) / 1000 + .008) / 1.008 * math.pi / 2)**2 / math.cos((i / 1000 + .008) / 1.008 * math.pi / 2)**2, .999) for i in range(1000)], dtype=double)), 0)
    agree(bars, again, atol=1e-12)
    peer.alphas_cumprod, peer.one = bars.clone(), torch.tensor(1., dtype=double)
    x, eps, _ = some(40)
    i = torch.randint(0, 1000, (40,), generator=torch.Generator().manual_seed(1)); i[:2] = torch.tensor([0, 999])
    a, s = df.levels(bars, i)
    xi = like(a, x) * x + like(s, x) * eps
    agree(peer.add_noise(x, eps, i), xi, atol=1e-6)
    angular = peer.get_velocity(x, eps, i)
    t = torch.atan2(a, s) * 2 / math.pi                                    # where our quarter circle is as noisy
    agree(COSINE.v(x, eps, t), -math.pi / 2 * angular, atol=1e-6)
    agree(COSINE.xt(x, eps, t), xi, atol=1e-6), agree(to_t(DDPMIndex(i, bars), COSINE), t, atol=1e-6)
    for k in (1, 10, 500, 999):                                             # a step of theirs with the true noise: our posterior's mean, and its variance
        now, after = df.levels(bars, torch.tensor([k])), df.levels(bars, torch.tensor([k - 1]))
        mean, var = df.step_posterior(now[0] * x + now[1] * eps, x, now, after)
        agree(peer._get_variance(k), var.flatten()[0], atol=1e-6)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=double)
        theirs_step = peer.step(eps, k, now[0] * x + now[1] * eps, generator=torch.Generator().manual_seed(2)).prev_sample
        agree(theirs_step, mean + var.sqrt() * noise, atol=1e-5 / now[0].item())   # their mean goes through eps: divided by alpha

def test_paths_are_those_of_flow_matching():
    scheduler = pytest.importorskip('flow_matching.path.scheduler')
    from flow_matching.path import AffineProbPath
    x, eps, t = some(200)
    for ours, theirs in ((LINEAR, scheduler.CondOTScheduler()), (COSINE, scheduler.CosineScheduler()), (VP, scheduler.VPScheduler())):
        out, peer = theirs(t), AffineProbPath(theirs)
        for f, want in ((ours.alpha, out.alpha_t), (ours.sigma, out.sigma_t), (ours.d_alpha, out.d_alpha_t), (ours.d_sigma, out.d_sigma_t)): agree(f(t), want, atol=1e-6)
        sample = peer.sample(x_0=eps, x_1=x, t=t)
        agree(ours.xt(x, eps, t), sample.x_t, atol=1e-6), agree(ours.v(x, eps, t), sample.dx_t, atol=1e-6)
        T = like(t, x).expand(x.shape)
        for name, have, want, value in (('target_to_velocity', 'x', 'v', x), ('epsilon_to_velocity', 'eps', 'v', eps), ('velocity_to_target', 'v', 'x', sample.dx_t), ('epsilon_to_target', 'eps', 'x', eps),
                                        ('velocity_to_epsilon', 'v', 'eps', sample.dx_t), ('target_to_epsilon', 'x', 'eps', x)):
            agree(convert(ours, value, sample.x_t, t, have, want), getattr(peer, name)(value, sample.x_t, T), atol=1e-6)
        agree(time_of(ours, ours.lam(t)), theirs.snr_inverse(ours.alpha(t) / ours.sigma(t)), atol=1e-6)

def test_edm_and_sd3_are_those_of_diffusers():
    diffusers = pytest.importorskip('diffusers')
    x, eps, _ = some(5)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.)
    steps = flow.timesteps[[0, 200, 500, 800, 998]]
    noisy = torch.cat([flow.scale_noise(x[k:k + 1], steps[k:k + 1], eps[k:k + 1]) for k in range(5)])
    time = SD3Timestep(steps.double())
    agree(LINEAR.xt(x, eps, to_t(time, LINEAR)), noisy, atol=1e-5), agree(df.scale_to(time, LINEAR), 1., atol=1e-9)
    edm = diffusers.EDMEulerScheduler(num_train_timesteps=50)
    sigma = edm.sigmas[[0, 10, 20, 30, 40]].double()
    time, state = EDMSigma(sigma), x + like(sigma, x) * eps
    unit = replace(COSINE)                                                  # variance 1: EDM's own input scale for data of variance 1
    agree(df.scale_to(time, unit), 1 / (sigma**2 + 1).sqrt(), atol=1e-9)
    agree(like(df.scale_to(time, unit), x) * state, unit.xt(x, eps, to_t(time, unit)), atol=1e-8)

# ---- properties ------------------------------------------------------------------------------------------------------------------------

unit = st.floats(.01, .99)

@EACH_PATH
@settings(max_examples=60, deadline=None)
@given(t=unit, seed=st.integers(0, 1000), have=st.sampled_from(KINDS), want=st.sampled_from(KINDS))
def test_round_trips(path, t, seed, have, want):
    x, eps, _ = some(4, seed=seed); t = torch.full((4,), t, dtype=double)
    xt = path.xt(x, eps, t)
    truth = dict(x=x, eps=eps, v=path.v(x, eps, t), score=-eps / like(path.sigma(t), x))
    out = convert(path, truth[have], xt, t, have, want)
    agree(out, truth[want], atol=1e-6), agree(convert(path, out, xt, t, want, have), truth[have], atol=1e-6)

@EACH_PATH
@settings(max_examples=40, deadline=None)
@given(a=unit, b=unit)
def test_chains_compose(path, a, b):
    "Noising from one time to a noisier one by the step inside `step_posterior`, and Bayes' rule: both ways give the joint law of the two states."
    if abs(a - b) < 1e-3: return
    noisy, clean = (torch.tensor([v], dtype=double) for v in sorted((a, b)))
    now, after = ((path.alpha(t), path.sigma(t)) for t in (noisy, clean))
    x = torch.tensor([.7], dtype=double)
    state, less = torch.tensor([.4], dtype=double) * now[1] + now[0] * x, torch.tensor([-.3], dtype=double) * after[1] + after[0] * x
    k = now[0] / after[0]
    mean, var = df.step_posterior(state, x, now, after)
    forward = Normal(after[0] * x, after[1]).log_prob(less) + Normal(k * less, (now[1]**2 - (k * after[1])**2).sqrt()).log_prob(state)
    back = Normal(now[0] * x, now[1]).log_prob(state) + Normal(mean, var.sqrt()).log_prob(less)
    agree(back / forward, 1., atol=1e-6)

@settings(max_examples=40, deadline=None)
@given(t=unit, shape=st.lists(st.integers(1, 4), min_size=0, max_size=3))
def test_any_shape_and_dtype(t, shape):
    for dtype in (torch.float32, double):
        x, eps, time = torch.randn(3, *shape, dtype=dtype), torch.randn(3, *shape, dtype=dtype), torch.full((3,), t, dtype=dtype)
        for path in PATHS:
            xt = path.xt(x, eps, time)
            assert xt.shape == x.shape and xt.dtype == dtype and convert(path, eps, xt, time, 'eps', 'score').dtype == dtype
            assert path.xt(x, eps, time[0]).shape == x.shape                # one time for all

@EACH_PATH
def test_a_time_of_any_noise(path):
    t = torch.linspace(0, 1, 101, dtype=double)
    agree(path.lam(time_of(path, path.lam(t[1:-1]))), path.lam(t[1:-1]), atol=1e-9)
    agree(time_of(path, path.lam(t)), t, atol=1e-9)                         # the ends too, infinite or not
    refuses(lambda: time_of(path, torch.tensor([math.nan], dtype=double)), ValueError)

def test_the_ends_of_a_path_are_refused_where_nothing_can_be_read():
    x, eps, _ = some(2)
    end = lambda v: torch.full((2,), v, dtype=double)
    for path, t, have, want in ((LINEAR, 0., 'eps', 'x'), (LINEAR, 0., 'score', 'v'), (LINEAR, 1., 'x', 'eps'), (LINEAR, 1., 'v', 'score'), (LINEAR, 1., 'eps', 'score'), (VP, 1., 'x', 'v'), (VP, 1., 'eps', 'v'), (VP, 1., 'v', 'x')):
        assert path.name in refuses(lambda: convert(path, x, eps, end(t), have, want), ValueError)
    for path, t, have, want in ((LINEAR, 0., 'v', 'x'), (LINEAR, 0., 'v', 'score'), (LINEAR, 1., 'v', 'eps'), (LINEAR, 1., 'score', 'eps'), (VE, 1., 'eps', 'x'), (VP, 1., 'eps', 'x')):
        assert convert(path, x, eps, end(t), have, want).isfinite().all()

# ---- refusals --------------------------------------------------------------------------------------------------------------------------

def foreigners(t): return DDPMIndex(torch.tensor([3, 4])), ScoreTime(t), EDMSigma(t), FlowTime(t), SD3Timestep(t)

def test_foreign_times_do_nothing_but_convert():
    t = torch.tensor([.3, .6], dtype=double); x = torch.randn(2, 3, dtype=double)
    for time in foreigners(t):
        name = type(time).__name__
        for use in (lambda: time + 1, lambda: 1 - time, lambda: time * t, lambda: t * time, lambda: time / 2, lambda: -time, lambda: time < .5, lambda: time == time, lambda: time != t, lambda: float(time), lambda: int(time), lambda: bool(time),
                    lambda: torch.sin(time), lambda: torch.stack([t, time]), lambda: t + time, lambda: abs(time) if hasattr(time, '__abs__') else -time, *(lambda p=p: p.alpha(time) for p in PATHS), *(lambda p=p: p.xt(x, x, time) for p in PATHS),
                    lambda: convert(LINEAR, x, x, time, 'x', 'v'), lambda: df.forward_sde(VP, time), lambda: df.loss_weight(LINEAR, time, 'v')):
            assert name in refuses(use, TypeError)
        for other in foreigners(t):
            refuses(lambda: time + other, TypeError), refuses(lambda: time < other, TypeError)
            for kind in (ScoreTime, EDMSigma, FlowTime, SD3Timestep, DDPMIndex): refuses(lambda: kind(other), TypeError)
        with pytest.raises(AttributeError): time.anything = 3
        assert time.lam().shape == (2,)

def test_what_is_no_time():
    t = torch.tensor([.3], dtype=double)
    for bad in (.3, 3, t, None, 'noise', VP): refuses(lambda: to_t(bad, LINEAR), TypeError)
    for bad in (.3, ScoreTime(t), torch.tensor([1])): refuses(lambda: from_t(bad, LINEAR, EDMSigma), TypeError)
    refuses(lambda: from_t(t, LINEAR, float), TypeError), refuses(lambda: from_t(t + 1, LINEAR, EDMSigma), ValueError)
    for make in (lambda: ScoreTime(t + 1), lambda: FlowTime(-t), lambda: EDMSigma(-t), lambda: SD3Timestep(4000 * t), lambda: DDPMIndex(torch.tensor([1000])), lambda: DDPMIndex(torch.tensor([-1])), lambda: ScoreTime(t * math.nan)): refuses(make, ValueError)
    for make in (lambda: ScoreTime(.3), lambda: EDMSigma(1), lambda: DDPMIndex(3), lambda: DDPMIndex(t), lambda: ScoreTime(torch.tensor([1]))): refuses(make, TypeError)
    refuses(lambda: to_t(EDMSigma(torch.tensor([80.], dtype=double)), VE), ValueError)     # noisier than this path ever is
    refuses(lambda: from_t(torch.ones(1, dtype=double), LINEAR, DDPMIndex), ValueError)    # data has no index
    agree(to_t(SD3Timestep(torch.tensor([0., 1000.], dtype=double)), LINEAR), torch.tensor([1., 0.]), atol=0)

@pytest.mark.parametrize('kind', CONVENTIONS, ids=lambda k: k.__name__)
@EACH_PATH
def test_times_come_back(kind, path):
    t = torch.linspace(.02, .98, 25, dtype=double)
    if path is VE: t = t[3:]                                                # below, ve is noisier than DDPM's last index is
    back = to_t(from_t(t, path, kind), path)
    agree(path.lam(back), path.lam(t), atol=.4 if kind is DDPMIndex else 1e-6)
    x, eps, _ = some(len(t))
    time = from_t(t, path, kind)
    a, s = time.levels()
    agree(like(df.scale_to(time, path), x) * (like(a, x) * x + like(s, x) * eps) - path.xt(x, eps, back), 0., atol=1e-6)

def test_predictions_do_not_mix():
    x, eps, t = some(4)
    p = {(k, path.name): Prediction(x, k, path) for k in KINDS for path in PATHS}
    for a, one in p.items():
        for b, other in p.items():
            if a == b: assert torch.equal((one + 2. * (other - one)).value, x + 2 * (x - x))
            else: refuses(lambda: one + other, TypeError), refuses(lambda: one - other, TypeError)
    for bad in (lambda: p['x', 'vp'] + x, lambda: p['x', 'vp'] - 1., lambda: p['x', 'vp'] * p['x', 'vp']): refuses(bad, TypeError)
    agree(p['v', 'linear'].turn(eps, t, 'x').value, convert(LINEAR, x, eps, t, 'v', 'x'), atol=0)

def test_errors_say_what_was_expected():
    x, eps, t = some(4)
    for bad in (lambda: LINEAR.xt(x, eps[:1], t), lambda: LINEAR.v(x, eps[:, :1], t), lambda: LINEAR.xt(x, eps, t[:3]), lambda: like(torch.rand(4, 3, 2), x), lambda: convert(LINEAR, x, eps, t, 'noise', 'x'), lambda: convert(LINEAR, x[:1], eps, t, 'x', 'v'),
                lambda: df.loss_weight(LINEAR, t, 'noise'), lambda: df.regression_loss(lambda xt, t: xt[:, :1], LINEAR, x, eps, t), lambda: df.vp_path(2., 1.), lambda: df.ve_path(1., 1.), lambda: df.linear_betas(1), lambda: df.cosine_betas(10, most=1.),
                lambda: df.alpha_bars(torch.tensor([.1, 1.2])), lambda: df.levels(df.alpha_bars(df.linear_betas()), torch.tensor([1000]))):
        assert 'expected' in refuses(bad, ValueError)
    refuses(lambda: df.levels(df.alpha_bars(df.linear_betas()), 3), TypeError), refuses(lambda: like(.3, x), TypeError)

# ---- mistakes of the field, each built and each caught -----------------------------------------------------------------------------------

def slopes_hold(path, h=1e-6):
    "The check of the page: derivatives by finite differences, and the arrow of time."
    t = torch.linspace(.05, .95, 19, dtype=double)
    x, eps = torch.randn(2, 19, 2, generator=torch.Generator().manual_seed(0), dtype=double)
    agree((path.xt(x, eps, t + h) - path.xt(x, eps, t - h)) / (2 * h), path.v(x, eps, t), atol=1e-5)
    if not (path.lam(t).diff() > 0).all(): raise AssertionError('noise does not decrease with t')

MUTANT_PATHS = {
    'flipped time': Path('bad', lambda t: 1 - t, lambda t: +t, lambda t: 0 * t - 1, lambda t: 0 * t + 1),
    'flipped clock, same derivatives': replace(LINEAR, alpha=lambda t: 1 - t, sigma=lambda t: +t),
    'sigma squared for sigma': replace(COSINE, sigma=lambda t: torch.cos(math.pi / 2 * t)**2),
    'missing square root': replace(VP, sigma=lambda t: VP.sigma(t)**2),
    'alpha-bar for alpha': replace(VP, alpha=lambda t: VP.alpha(t)**2),
    'sign of d_sigma': replace(VP, d_sigma=lambda t: -VP.d_sigma(t)),
    'quarter turn forgotten': replace(COSINE, d_alpha=lambda t: torch.cos(math.pi / 2 * t)),
}

@pytest.mark.parametrize('name', MUTANT_PATHS)
def test_a_wrong_path_is_caught(name): refuses(lambda: slopes_hold(MUTANT_PATHS[name]), AssertionError)

@EACH_PATH
def test_right_paths_pass(path): slopes_hold(path)

def variance_is_kept(path):
    "xt has variance alpha² c² + sigma², and on vp and cosine 1 if the data have."
    t = torch.linspace(.05, .95, 19, dtype=double)
    agree(path.alpha(t)**2 + path.sigma(t)**2, 1., atol=1e-9)

@pytest.mark.parametrize('name', ['sigma squared for sigma', 'missing square root', 'alpha-bar for alpha'])
def test_a_wrong_level_loses_variance(name): variance_is_kept(VP), variance_is_kept(COSINE), refuses(lambda: variance_is_kept(MUTANT_PATHS[name]))

def chain_agrees(levels):
    "Run the chain in law, without products."
    mean, var, bars = 1., 0., df.alpha_bars(df.linear_betas(200))
    for i, b in enumerate(df.linear_betas(200).tolist()):
        mean, var = math.sqrt(1 - b) * mean, (1 - b) * var + b
        a, s = levels(bars, torch.tensor([i]))
        agree(a, mean, atol=1e-9), agree(s**2, var, atol=1e-9)

@pytest.mark.parametrize('wrong', [lambda bars, i: (bars[i], 1 - bars[i]), lambda bars, i: (bars[i].sqrt(), 1 - bars[i]), lambda bars, i: (bars[i - 1].sqrt(), (1 - bars[i - 1]).sqrt()), lambda bars, i: (bars.flip(0)[i].sqrt(), (1 - bars.flip(0)[i]).sqrt())],
                         ids=['no roots', 'no root of the variance', 'index off by one', 'index reversed'])
def test_a_wrong_chain_is_caught(wrong): chain_agrees(df.levels), refuses(lambda: chain_agrees(wrong), AssertionError)

def posterior_agrees(step):
    "Bayes' rule on a grid."
    bars = df.alpha_bars(df.linear_betas())
    for i in (3, 300, 900):
        now, after = df.levels(bars, torch.tensor([i])), df.levels(bars, torch.tensor([i - 1]))
        x, state = torch.tensor([.8], dtype=double), now[0] * .8 + now[1] * 1.3
        k, added = now[0] / after[0], now[1]**2 - (now[0] / after[0] * after[1])**2
        true_mean = (k * after[1]**2 * state + after[0] * added * x) / now[1]**2
        grid = true_mean + torch.linspace(-12, 12, 6001, dtype=double) * (after[1]**2 * added / now[1]**2).sqrt()
        weight = (Normal(after[0] * x, after[1]).log_prob(grid) + Normal(k * grid, added.sqrt()).log_prob(state)).softmax(0)
        mean, var = step(state, x, now, after)
        agree(mean, weight @ grid, atol=1e-8), agree(var / (weight @ (grid - weight @ grid)**2), 1., atol=1e-6)

def wrong_variance(state, x, now, after): # DDPM's "large" variance, beta itself
    return df.step_posterior(state, x, now, after)[0], now[1]**2 - (now[0] / after[0] * after[1])**2
def wrong_mean(state, x, now, after): # alpha-bar where alpha belongs
    mean, var = df.step_posterior(state, x, (now[0]**2, now[1]), (after[0]**2, after[1]))
    return mean, var
def wrong_root(state, x, now, after): mean, var = df.step_posterior(state, x, now, after); return mean, var.sqrt()

@pytest.mark.parametrize('wrong', [wrong_variance, wrong_mean, wrong_root])
def test_a_wrong_posterior_is_caught(wrong): posterior_agrees(df.step_posterior), refuses(lambda: posterior_agrees(wrong), AssertionError)

def sde_agrees(rates, path):
    "Integrate the moments of the noising and compare with alpha and sigma."
    ts = torch.linspace(.9, .2, 2001, dtype=double); ds = ts[0] - ts[1]
    f, g2 = rates(path, (ts[1:] + ts[:-1]) / 2)
    a, var = path.alpha(ts[:1]) * torch.exp((f * ds).sum()), path.sigma(ts[:1])**2
    for fi, gi in zip(f, g2): var = var * torch.exp(2 * fi * ds) + gi * ds * torch.exp(fi * ds)
    agree(a / path.alpha(ts[-1:]), 1., atol=1e-4), agree(var / path.sigma(ts[-1:])**2, 1., atol=1e-4)

WRONG_RATES = {'g for g squared': lambda p, t: (df.forward_sde(p, t)[0], df.forward_sde(p, t)[1].sqrt()), 'sign of f': lambda p, t: (-df.forward_sde(p, t)[0], df.forward_sde(p, t)[1]),
               'the shrinking forgotten in g': lambda p, t: (df.forward_sde(p, t)[0], -2 * p.sigma(t) * p.d_sigma(t)), 'sigma for sigma squared': lambda p, t: (df.forward_sde(p, t)[0], df.forward_sde(p, t)[1] / p.sigma(t))}

@pytest.mark.parametrize('name', WRONG_RATES)
def test_wrong_rates_are_caught(name):
    sde_agrees(df.forward_sde, VP)
    refuses(lambda: sde_agrees(WRONG_RATES[name], VP), AssertionError)

def reversal_agrees(drift, path=VP, c=.6):
    "Normal data: the variance of the reversed process, integrated, against alpha² c² + sigma². The velocity of such data is linear in the state."
    ts = torch.linspace(.1, .9, 1001, dtype=double)
    dt, var_at = ts[1] - ts[0], lambda t: path.alpha(t)**2 * c**2 + path.sigma(t)**2
    var = var_at(ts[:1])
    mid, one = (ts[1:] + ts[:-1]) / 2, torch.ones(1000, 1, dtype=double)
    v = (path.alpha(mid) * path.d_alpha(mid) * c**2 + path.sigma(mid) * path.d_sigma(mid)) / var_at(mid)      # half the growth rate of the variance
    for strength in (0., 1., 2.):
        g2 = strength * df.forward_sde(path, mid)[1]
        rate, now = drift(path, v[:, None] * one, one, mid, g2)[:, 0], var
        for r, g in zip(rate, g2): now = now * torch.exp(2 * r * dt) + g * dt * torch.exp(r * dt)
        agree(now / var_at(ts[-1:]), 1., atol=1e-3)

WRONG_DRIFTS = {'no score': lambda p, v, xt, t, g2: v, 'the whole of g²': lambda p, v, xt, t, g2: 2 * df.reverse_drift(p, v, xt, t, g2) - v, 'sign of the score': lambda p, v, xt, t, g2: 2 * v - df.reverse_drift(p, v, xt, t, g2),
                'score without 1 / sigma': lambda p, v, xt, t, g2: v - like(g2, xt) / 2 * convert(p, v, xt, t, 'v', 'eps')}

@pytest.mark.parametrize('name', WRONG_DRIFTS)
def test_wrong_drifts_are_caught(name): reversal_agrees(df.reverse_drift), refuses(lambda: reversal_agrees(WRONG_DRIFTS[name]), AssertionError)

@pytest.mark.parametrize('wrong', [lambda t: 1 - t, lambda t: t**2, lambda t: t.sqrt()], ids=['flipped', 'squared', 'root'])
def test_a_wrong_clock_is_caught(wrong):
    "The state mixed in the other convention must be the state of the path: at a wrong time it is not."
    x, eps, t = some(20)
    time = from_t(t, LINEAR, EDMSigma)
    state = like(df.scale_to(time, LINEAR), x) * (x + like(time.sigma, x) * eps)
    agree(state, LINEAR.xt(x, eps, t), atol=1e-9)
    refuses(lambda: agree(state, LINEAR.xt(x, eps, wrong(t)), atol=1e-3))

# ---- learning --------------------------------------------------------------------------------------------------------------------------

@EACH_PATH
def test_affine_networks_learn_the_same_field(path):
    "For normal data every best answer is affine, so least squares on each kind of target must give the same velocity, that of the closed form."
    g = torch.Generator().manual_seed(0)
    x, eps = .5 + .8 * torch.randn(200_000, 1, generator=g, dtype=double), torch.randn(200_000, 1, generator=g, dtype=double)
    t = torch.full((200_000,), .5, dtype=double); a, s = path.alpha(t[:1]).item(), path.sigma(t[:1]).item()
    xt = path.xt(x, eps, t)
    targets, features = dict(x=x, eps=eps, v=path.v(x, eps, t), score=-eps / s), torch.cat([xt, torch.ones_like(xt)], 1)
    u = torch.linspace(-1, 1, 5, dtype=double)[:, None] * (a**2 + s**2)**.5; many = torch.full((5,), .5, dtype=double)
    guess = .5 + a * .64 / (a**2 * .64 + s**2) * (u - a * .5)
    exact = convert(path, guess, u, many, 'x', 'v')
    for kind, y in targets.items():
        w = torch.linalg.lstsq(features, y).solution
        agree(convert(path, torch.cat([u, torch.ones_like(u)], 1) @ w, u, many, kind, 'v') / exact.abs().max(), exact / exact.abs().max(), atol=.02)

def test_regression_loss_is_that_of_the_kind():
    x, eps, t = some(32)
    net = nn.Linear(3, 3).to(double)
    f = lambda xt, t: net(xt)
    for path in PATHS:
        xt = path.xt(x, eps, t)
        for kind, target in dict(x=x, eps=eps, v=path.v(x, eps, t), score=-eps / like(path.sigma(t), x)).items():
            want = (net(xt) - target).square().sum(1)
            agree(df.regression_loss(f, path, x, eps, t, kind) / want, 1., atol=1e-9)
    pictures = torch.randn(2, 3, 4, 4)
    assert df.regression_loss(lambda xt, t: xt, LINEAR, pictures, torch.randn_like(pictures), torch.rand(2)).shape == (2,)
