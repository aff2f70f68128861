"Samplers against the libraries, state by state in double precision; their orders; what they refuse; and the historic bugs, which the checks must catch."
import math
from functools import lru_cache
import pytest
import torch
from hypothesis import given, settings, strategies as st
from latentcourse.diffusion import COSINE, LINEAR, VE, VP, convert, forward_sde, like, step_posterior
from latentcourse.mixture import HILLS, TOWNS, Mixture, exact_field, exact_score, ink_world, mixture_samples, pushed
from latentcourse.samplers import (ancestral, at, bridge_velocity, counted, ddim, dpm_solver_2m, energy_baseline, energy_distance, euler, euler_maruyama, heun, karras_times, last,
                                   noise_like, scales, shifted, steps, times)

double = torch.float64
start = torch.randn(40, 2, dtype=double, generator=torch.Generator().manual_seed(0))
towns, swing = exact_field(TOWNS, LINEAR), exact_field(TOWNS, COSINE)
seeded = lambda s=1: torch.Generator().manual_seed(s)
SAMPLERS = {'euler': lambda f, x, ts, path=LINEAR: euler(f, x, ts), 'heun': lambda f, x, ts, path=LINEAR: heun(f, x, ts), 'ddim': lambda f, x, ts, path=LINEAR: ddim(f, x, ts, path),
            'ddim, eta 1': lambda f, x, ts, path=LINEAR: ddim(f, x, ts, path, 1., seeded()), 'ancestral': lambda f, x, ts, path=LINEAR: ancestral(f, x, ts, path, seeded()),
            'euler_maruyama': lambda f, x, ts, path=LINEAR: euler_maruyama(f, x, ts, path, None, seeded()), 'dpm_solver_2m': lambda f, x, ts, path=LINEAR: dpm_solver_2m(f, x, ts, path)}
EACH = pytest.mark.parametrize('name', SAMPLERS)

# ---- the libraries ----------------------------------------------------------------------------------------------------------------

class InDouble:
    "torch as a scheduler sees it, with double precision where it asks for single: several of them round every state to float32."
    float32 = torch.float64
    def __getattr__(self, name): return getattr(torch, name)

def scheduler(name, monkeypatch, **config):
    pytest.importorskip('diffusers')
    import diffusers, importlib
    kind = getattr(diffusers, name)
    monkeypatch.setattr(importlib.import_module(kind.__module__), 'torch', InDouble())
    return kind(**config)

T_OF = 1 - (torch.arange(1000, dtype=double) + .5) / 1000                                 # integer i is our time 1 - (i + 1/2) / 1000: neither end, where sigma / alpha is 0 or infinite

def with_our_path(sched, path):
    "A DDPM-like scheduler with the alphas of one of our paths, in double precision."
    sched.alphas_cumprod = path.alpha(T_OF)**2
    sched.alphas = sched.alphas_cumprod / torch.cat([torch.ones(1, dtype=double), sched.alphas_cumprod[:-1]])
    sched.betas = 1 - sched.alphas
    for k in ('final_alpha_cumprod', 'one'):
        if hasattr(sched, k): setattr(sched, k, torch.tensor(1., dtype=double))
    if hasattr(sched, 'lambda_t'): sched.alpha_t, sched.sigma_t = sched.alphas_cumprod.sqrt(), (1 - sched.alphas_cumprod).sqrt(); sched.lambda_t = sched.alpha_t.log() - sched.sigma_t.log()
    return sched

def eps_of(field, path, x, t): return convert(path, field(x, t.expand(len(x))), x, t.expand(len(x)), 'v', 'eps')

def same(ours, theirs, atol=1e-9): torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=atol)

@pytest.mark.parametrize('path', [COSINE, VP], ids=lambda p: p.name)
def test_ancestral_is_diffusers_ddpm(path, monkeypatch):
    sched = with_our_path(scheduler('DDPMScheduler', monkeypatch, clip_sample=False, variance_type='fixed_small'), path)
    sched.set_timesteps(20)
    field, grid = exact_field(TOWNS, path), torch.cat([T_OF[sched.timesteps], torch.ones(1, dtype=double)])
    x, g, theirs = start, seeded(), []
    for i, t in zip(sched.timesteps, grid): x = sched.step(eps_of(field, path, x, t), i, x, generator=g).prev_sample; theirs.append(x)
    same([*ancestral(field, start, grid, path, seeded())], theirs)

@pytest.mark.parametrize('eta', [0., .5, 1.])
@pytest.mark.parametrize('path', [COSINE, VP], ids=lambda p: p.name)
def test_ddim_is_diffusers_ddim(path, eta, monkeypatch):
    sched = with_our_path(scheduler('DDIMScheduler', monkeypatch, clip_sample=False), path)
    sched.set_timesteps(10)
    field, grid = exact_field(TOWNS, path), torch.cat([T_OF[sched.timesteps], torch.ones(1, dtype=double)])
    x, g, theirs = start, seeded(), []
    for i, t in zip(sched.timesteps, grid): x = sched.step(eps_of(field, path, x, t), i, x, eta=eta, generator=g).prev_sample; theirs.append(x)
    same([*ddim(field, start, grid, path, eta, seeded())], theirs)

@pytest.mark.parametrize('path', [COSINE, VP], ids=lambda p: p.name)
@pytest.mark.parametrize('n', [3, 12, 25])
def test_2m_is_diffusers_dpm_solver_multistep(path, n, monkeypatch):
    "Order 2, midpoint, dpmsolver++; from 15 steps on diffusers' lower_order_final has nothing to say, but its last step to sigma 0 is of first order as ours is."
    sched = with_our_path(scheduler('DPMSolverMultistepScheduler', monkeypatch, solver_order=2, algorithm_type='dpmsolver++', solver_type='midpoint', final_sigmas_type='zero'), path)
    sched.set_timesteps(n)
    a = sched.alphas_cumprod[sched.timesteps]
    sched.sigmas = torch.cat([((1 - a) / a).sqrt(), torch.zeros(1, dtype=double)])                # set_timesteps rounds them to single precision
    field, grid = exact_field(TOWNS, path), torch.cat([T_OF[sched.timesteps], torch.ones(1, dtype=double)])
    x, theirs = start, []
    for i, t in zip(sched.timesteps, grid): x = sched.step(eps_of(field, path, x, t), i, x).prev_sample; theirs.append(x)
    same([*dpm_solver_2m(field, start, grid, path)], theirs)

def test_2m_on_the_linear_path_is_diffusers_with_flow_sigmas(monkeypatch):
    sched = scheduler('DPMSolverMultistepScheduler', monkeypatch, solver_order=2, prediction_type='flow_prediction', use_flow_sigmas=True)
    sched.set_timesteps(16)
    grid = torch.cat([times(17)[1:-1], torch.ones(1, dtype=double)])
    sched.sigmas = torch.cat([1 - grid[:-1], torch.zeros(1, dtype=double)])
    x, theirs = start, []
    for i, t in zip(sched.timesteps, grid): x = sched.step(-towns(x, t.expand(len(x))), i, x).prev_sample; theirs.append(x)      # its velocity points to the noise
    same([*dpm_solver_2m(towns, start, grid, LINEAR)], theirs)

@pytest.mark.parametrize('shift', [1., 3.])
def test_euler_is_diffusers_flow_match_euler(shift, monkeypatch):
    sched = scheduler('FlowMatchEulerDiscreteScheduler', monkeypatch, shift=shift)
    sched.set_timesteps(sigmas=torch.linspace(1, 1 / 12, 12).tolist())
    grid = shifted(times(12), shift)
    torch.testing.assert_close(1 - sched.sigmas.double(), grid, rtol=0, atol=1e-6)                # SD3's shift, as they compute it
    sched.sigmas = 1 - grid
    x, theirs = start, []
    for t in sched.timesteps: x = sched.step(-towns(x, grid[len(theirs)].expand(len(x))), t, x).prev_sample; theirs.append(x)
    same([*euler(towns, start, grid)], theirs)

def test_heun_is_diffusers_flow_match_heun(monkeypatch):
    "Theirs takes an Euler step at the end, ours a Heun step: alike up to there."
    sched = scheduler('FlowMatchHeunDiscreteScheduler', monkeypatch)
    sched.set_timesteps(8)
    grid = torch.cat([times(9)[1:-1], torch.ones(1, dtype=double)])
    sched.sigmas = torch.cat([(1 - grid[:1]), (1 - grid[1:-1]).repeat_interleave(2), torch.zeros(1, dtype=double)])
    x, theirs, at_time = start, [], torch.cat([grid[:1], grid[1:-1].repeat_interleave(2)])
    for k, t in enumerate(sched.timesteps):
        x = sched.step(-towns(x, at_time[k].expand(len(x))), t, x).prev_sample
        if k % 2 == 1 or k == len(sched.timesteps) - 1: theirs.append(x)
    ours = [*heun(towns, start, grid[:-1])]
    same(ours + [last(euler(towns, ours[-1], grid[-2:]))], theirs)

def test_karras_grid_is_diffusers():
    pytest.importorskip('diffusers')
    from diffusers import EulerDiscreteScheduler
    want = EulerDiscreteScheduler(sigma_min=.002, sigma_max=80., use_karras_sigmas=True)._convert_to_karras(torch.tensor([80., .002]), 9)
    got = karras_times(9, LINEAR)
    torch.testing.assert_close((1 - got[1:-1]) / got[1:-1], torch.as_tensor(want, dtype=double)[1:], rtol=1e-9, atol=0)

@pytest.mark.parametrize('method, ours', [('euler', euler), ('heun2', heun)])
def test_torchdiffeq(method, ours):
    odeint = pytest.importorskip('torchdiffeq').odeint
    grid = times(9)**2 / 1.
    same([*ours(swing, start, grid)], [*odeint(lambda t, x: swing(x, t), start, grid, method=method)[1:]])

@pytest.mark.parametrize('method, ours', [('euler', euler), ('heun2', heun)])
def test_meta_ode_solver(method, ours):
    solver = pytest.importorskip('flow_matching.solver')
    class Model(torch.nn.Module):
        def forward(self, x, t): return towns(x, t.expand(len(x)))
    theirs = solver.ODESolver(velocity_model=Model()).sample(x_init=start, step_size=None, method=method, time_grid=times(7), return_intermediates=True)
    same([*ours(towns, start, times(7))], [*theirs[1:]])

def test_meta_adaptive_is_where_heun_goes():
    solver = pytest.importorskip('flow_matching.solver')
    class Model(torch.nn.Module):
        def forward(self, x, t): return towns(x, t.clamp(max=1.).expand(len(x)))
    theirs = solver.ODESolver(velocity_model=Model()).sample(x_init=start, step_size=None, method='dopri5', atol=1e-9, rtol=1e-9, time_grid=times(1))
    assert (last(heun(towns, start, times(100))) - theirs).norm(dim=1).median() < 1e-3

# ---- identities and orders --------------------------------------------------------------------------------------------------------

@lru_cache(None)
def very_fine(start, end):
    x = mixture_samples(pushed(TOWNS, COSINE, start), 60, None, seeded())[0]
    return x, last(heun(swing, x, times(600, start, end)))

def order(sampler, ends=(.05, .95), ns=(32, 64)):
    "Measured strong order between ns, away from the ends, against a very fine Heun run."
    x, truth = very_fine(*ends)
    a, b = ((last(sampler(swing, x, times(n, *ends))) - truth).norm(dim=1).median() for n in ns)
    return math.log2(a / b)

@pytest.mark.parametrize('name, want', [('euler', 1), ('ddim', 1), ('heun', 2), ('dpm_solver_2m', 2)])
def test_orders(name, want): assert abs(order(lambda f, x, ts: SAMPLERS[name](f, x, ts, COSINE)) - want) < .25

def test_ddim_is_euler_on_the_linear_path_and_ancestral_is_eta_1():
    same([*ddim(towns, start, times(9), LINEAR)], [*euler(towns, start, times(9))])
    for path, f in ((LINEAR, towns), (COSINE, swing), (VP, exact_field(TOWNS, VP))): same([*ancestral(f, start, times(9), path, seeded())], [*ddim(f, start, times(9), path, 1., seeded())])

@pytest.mark.parametrize('path', [LINEAR, COSINE, VP], ids=lambda p: p.name)
@pytest.mark.parametrize('name', ['ddim', 'dpm_solver_2m'])
def test_a_single_data_point_in_one_step(name, path):
    point = torch.tensor([[1.5, -.5]], dtype=double)
    field = lambda xt, t: convert(path, point.expand(len(xt), 2), xt, t, 'x', 'v')
    eps, ts = torch.randn(7, 2, dtype=double), torch.tensor([.1, .5, .8], dtype=double)
    for got, t in zip(SAMPLERS[name](field, path.xt(point.expand(7, 2), eps, ts[:1].expand(7)), ts, path), ts[1:]): torch.testing.assert_close(got, path.xt(point.expand(7, 2), eps, t.expand(7)), rtol=0, atol=1e-10)

@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(.01, .99), min_size=1, max_size=6, unique=True), st.floats(.2, 5.))
def test_grids(ts, shift):
    ts = torch.tensor(sorted(ts), dtype=double)
    torch.testing.assert_close(shifted(shifted(ts, shift), 1 / shift), ts)
    torch.testing.assert_close((1 - shifted(ts, shift)) / shifted(ts, shift), shift * (1 - ts) / ts)

@pytest.mark.parametrize('path', [LINEAR, COSINE, VP, VE], ids=lambda p: p.name)
def test_karras_grids_increase_on_every_path(path):
    ts = karras_times(12, path, most=20., least=.02)
    assert ts[0] == 0 and ts[-1] == 1 and (ts.diff() > 0).all()

@EACH
@pytest.mark.parametrize('path', [VP, VE], ids=lambda p: p.name)
def test_other_paths_arrive(name, path):
    "From exact noise of the path to the towns: the cloud's second moment."
    if name == 'heun' and path is VP: pytest.skip('the velocity of VP is infinite at t = 1, where Heun asks')
    x = mixture_samples(pushed(TOWNS, path, 0.), 1500, None, seeded(5))[0]
    got = last(SAMPLERS[name](exact_field(TOWNS, path), x, times(100), path))
    want = (TOWNS.weights @ (TOWNS.mu.square().sum(1) + 2 * TOWNS.std**2)).item()
    assert abs(got.square().sum(1).mean() / want - 1) < .12

def test_heun_says_where_the_velocity_is_infinite():
    with pytest.raises(ValueError, match='infinite'): last(heun(exact_field(TOWNS, VP), start, times(4)))

# ---- how they are called ----------------------------------------------------------------------------------------------------------

@EACH
def test_states_at_each_later_time_any_shape_without_gradients(name):
    w = torch.nn.Parameter(torch.tensor(.5))
    field = lambda xt, t: w * xt * like(t, xt).to(xt)
    for shape in ((3,), (2, 5), (2, 3, 4, 4)):
        x = torch.randn(shape)
        states = [*SAMPLERS[name](field, x, times(4))]
        assert len(states) == 4 and all(s.shape == x.shape and s.dtype == x.dtype and not s.requires_grad for s in states)
    assert torch.is_grad_enabled()
    for s in SAMPLERS[name](field, torch.randn(2, 3), times(2)): assert torch.is_grad_enabled()    # the caller's own mode is left alone between states

@EACH
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precisions(name, dtype):
    seen = []
    def field(xt, t): seen.append((xt.dtype, t.dtype)); return -xt
    out = last(SAMPLERS[name](field, torch.ones(2, 3, dtype=dtype), times(5)))
    assert out.dtype == dtype and out.isfinite().all()
    assert set(seen) == {(dtype, torch.float64 if dtype == torch.float64 else torch.float32)}      # a time in half precision would be rounded

@EACH
def test_single_precision_follows_double(name):
    single = exact_field(TOWNS.to(torch.zeros(1)), LINEAR)
    if name in ('ddim, eta 1', 'ancestral', 'euler_maruyama'): return                              # other random numbers in another precision
    torch.testing.assert_close(last(SAMPLERS[name](single, start.float(), times(12))).double(), last(SAMPLERS[name](towns, start, times(12))), rtol=0, atol=1e-3)

@EACH
@pytest.mark.gpu
def test_on_a_gpu(name):
    gm = TOWNS.to(torch.zeros(1, dtype=double, device='cuda'))
    out = last(SAMPLERS[name](exact_field(gm, LINEAR), start.cuda(), times(6))) if '1' not in name and name not in ('ancestral', 'euler_maruyama') else last(ddim(exact_field(gm, LINEAR), start.cuda(), times(6), LINEAR, 1.))
    assert out.is_cuda and out.isfinite().all()

@EACH
def test_evaluations_are_counted(name):
    f = counted(towns)
    last(SAMPLERS[name](f, start, times(6)))
    assert f.calls == (12 if name == 'heun' else 6)

@EACH
def test_the_same_generator_gives_the_same_states(name): same([*SAMPLERS[name](towns, start, times(5))], [*SAMPLERS[name](towns, start, times(5))], 0.)

@EACH
@pytest.mark.parametrize('ts, says', [([0., .5, .5, 1.], 'increasing'), ([1., .5, 0.], 'increasing'), ([0., 1.1], r'\[0, 1\]'), ([-.1, 1.], r'\[0, 1\]'), ([0., math.nan, 1.], r'\[0, 1\]'), ([0.], 'two or more'), ([[0., 1.]], 'two or more')])
def test_bad_grids(name, ts, says):
    with pytest.raises(ValueError, match=says): last(SAMPLERS[name](towns, start, ts))

@EACH
def test_bad_fields_and_states(name):
    with pytest.raises(FloatingPointError, match='at t = 0.5.*NaN'): last(SAMPLERS[name](lambda x, t: x / (t[:, None] < .4), start, times(4)))
    with pytest.raises(ValueError, match='answered'): last(SAMPLERS[name](lambda x, t: x[:, :1], start, times(4)))
    for x in (start.long(), torch.zeros(0, 2), 'x', torch.tensor(1.)):
        with pytest.raises(ValueError, match='x: expected a batch'): last(SAMPLERS[name](towns, x, times(4)))

@pytest.mark.parametrize('call, says', [
    (lambda: last([]), 'no state'), (lambda: times(0), 'whole number'), (lambda: times(2.5), 'whole number'), (lambda: last(ddim(towns, start, times(2), LINEAR, 1.5)), 'eta'), (lambda: shifted(times(3), 0.), 'shift'),
    (lambda: karras_times(1, LINEAR), 'expected n'), (lambda: karras_times(5, LINEAR, least=9., most=1.), 'least < most'), (lambda: karras_times(9, VE), 'runs from'), (lambda: last(euler_maruyama(towns, start, times(4), LINEAR, lambda t: forward_sde(LINEAR, t)[1])), 'start the grid later'),
    (lambda: last(euler_maruyama(towns, start, times(4), LINEAR, lambda t: 0 * t - 1)), 'rate of noise'), (lambda: energy_distance(torch.zeros(3, 2), torch.zeros(3, 1)), 'two sets'), (lambda: energy_distance(torch.zeros(3, 2) * math.nan, torch.zeros(3, 2)), 'NaN')])
def test_errors_say_what_was_wrong(call, says):
    with pytest.raises(ValueError, match=says): call()

# ---- energy distance and bridges --------------------------------------------------------------------------------------------------

def test_energy_distance_against_scipy():
    from scipy.stats import energy_distance as theirs
    g = seeded()
    a, b = torch.randn(50, 1, dtype=double, generator=g), torch.randn(70, 1, dtype=double, generator=g) + .3
    assert energy_distance(a, b) == pytest.approx(theirs(a[:, 0], b[:, 0])**2, rel=1e-9)           # scipy gives the root

def test_the_permutation_baseline_is_calibrated():
    "Of two sets of one law the distance is as likely as not above the median deal; of two laws it is above all."
    g = seeded(2)
    ranks = [(lambda d: (d[1] >= d[0]).double().mean().item())(energy_baseline(*torch.randn(2, 40, 2, dtype=double, generator=g), 100, g)) for _ in range(60)]
    assert abs(sum(ranks) / 60 - .5) < 5 * .29 / 60**.5
    d, deals = energy_baseline(torch.randn(100, 2, generator=g), torch.randn(100, 2, generator=g) + 1, 200, g)
    assert d > deals.max()

def test_bridges():
    normal, flat = Mixture(torch.zeros(1, 2, dtype=double), 1.), Mixture(torch.tensor([[3., 0.]], dtype=double), .5)
    for path in (LINEAR, COSINE):
        t = torch.rand(40, dtype=double, generator=seeded()) * .98 + .01
        torch.testing.assert_close(bridge_velocity(normal, TOWNS, path, start, t), exact_field(TOWNS, path)(start, t))
        torch.testing.assert_close(bridge_velocity(TOWNS, flat, path, start, t), -bridge_velocity(flat, TOWNS, path, start, 1 - t))   # walked the other way
    x = mixture_samples(flat, 100, None, seeded())[0]
    out = last(heun(lambda xt, t: bridge_velocity(flat, normal, LINEAR, xt, t), x, times(40)))
    torch.testing.assert_close(out, (x - flat.mu) / .5, rtol=0, atol=1e-2)                          # between two normals: the straight map of their quantiles

# ---- the historic bugs, one by one ------------------------------------------------------------------------------------------------

def heun_at_the_old_time(field, x, ts):
    for t0, t1 in steps(x, ts):
        d0 = at(field, x, t0)
        x = x + (t1 - t0) * (d0 + at(field, x + (t1 - t0) * d0, t0)) / 2
        yield x

def heun_at_the_old_place(field, x, ts):
    for t0, t1 in steps(x, ts):
        x = x + (t1 - t0) * (at(field, x, t0) + at(field, x, t1)) / 2
        yield x

@pytest.mark.parametrize('wrong', [heun_at_the_old_time, heun_at_the_old_place])
def test_a_silently_first_order_heun_is_caught(wrong): assert abs(order(wrong) - 2) > .5

def test_a_flipped_time_is_caught():
    flipped = lambda x, t: towns(x, 1 - t)
    truth = last(heun(towns, start, times(200)))
    assert (last(heun(flipped, start, times(200))) - truth).norm(dim=1).median() > .5
    with pytest.raises(ValueError, match='increasing'): last(euler(towns, start, times(10).flip(0)))

def posterior_with(wrong):
    "step_posterior, spoiled: `wrong` takes mean, variance, and what went in."
    return lambda xt, x, now, after: wrong(*step_posterior(xt, x, now, after), xt, x, [like(level, xt) for level in (*now, *after)])

WRONG = {'sigma for sigma^2': lambda m, v, xt, x, l: (m, v.sqrt()), 'twice the variance': lambda m, v, xt, x, l: (m, 2 * v), 'the guess for the mean': lambda m, v, xt, x, l: (l[2] * x, v),
         "the stage's variance": lambda m, v, xt, x, l: (m, l[1]**2 - (l[0] / l[2] * l[3])**2), 'data and state exchanged': lambda m, v, xt, x, l: step_posterior(x, xt, l[:2], l[2:])}

@pytest.mark.parametrize('wrong', WRONG)
def test_a_wrong_posterior_is_caught(wrong, monkeypatch):
    pair = lambda: same([*ancestral(towns, start, times(9), LINEAR, seeded())], [*ddim(towns, start, times(9), LINEAR, 1., seeded())])
    pair()
    monkeypatch.setattr('latentcourse.samplers.step_posterior', posterior_with(WRONG[wrong]))
    with pytest.raises(AssertionError): pair()

@pytest.mark.parametrize('drift, noise', [(1., 2**.5), (1., .5**.5), (0., 1.)], ids=['noise of variance 2 too many', 'noise of half the variance', 'the score forgotten'])
def test_a_wrong_sde_is_caught(drift, noise):
    "The mean square on the line, after many steps, leaves the exact law."
    hills, g, x = exact_field(HILLS, LINEAR), seeded(), mixture_samples(pushed(HILLS, LINEAR, .05), 6000, None, seeded(3))[0]
    for t0, t1 in steps(x, times(120, .05)):
        kappa, h, t = 2., t1 - t0, t0.expand(len(x))
        x = x + h * (hills(x, t) + drift * kappa * exact_score(HILLS, LINEAR, x, t)) + noise * (2 * kappa * h).sqrt() * noise_like(x, g)
    want = (HILLS.weights @ (HILLS.mu[:, 0]**2 + HILLS.std**2)).item()
    z = lambda x: abs((x.square().mean() - want) / (x.square().std() / len(x)**.5))
    assert z(x) > 5
    right = last(euler_maruyama(hills, mixture_samples(pushed(HILLS, LINEAR, .05), 6000, None, seeded(3))[0], times(120, .05), LINEAR, lambda t: 0 * t + 4, seeded()))
    assert z(right) < 5

def test_a_2m_that_extrapolates_into_the_last_step_is_caught():
    "On the cosine path sigma(1) is 6e-17, not 0: lambda is finite there, and a rule that asks for infinity extrapolates by a factor of hundreds."
    assert 0 < COSINE.sigma(torch.ones(1, dtype=double)).item() < 1e-15
    truth = last(heun(swing, start, times(300)))
    assert (last(dpm_solver_2m(swing, start, times(16), COSINE)) - truth).norm(dim=1).median() < .05
