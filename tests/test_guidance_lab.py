"Guidance rules against the libraries in double precision; what holds for all weights; what they refuse; and the historic bugs, which the checks must catch."
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from latentcourse import guidance_lab as lab
from latentcourse.diffusion import COSINE, LINEAR, VP, convert, forward_sde, like
from latentcourse.lib.check import agree, refuses, z_score
from latentcourse.mixture import HILLS, TOWNS, Mixture, exact_field, exact_score, exact_velocity, grid_moments, log_tilted, mixture_samples, quadrature
from latentcourse.samplers import ancestral, at, batch_of, counted, euler, heun, last, noise_like, steps, times

double, root2 = torch.float64, 2**.5
seeded = lambda s=0: torch.Generator().manual_seed(s)
empty, told = exact_field(TOWNS, LINEAR), exact_field(TOWNS, LINEAR, 1)
points = torch.randn(60, 2, dtype=double, generator=seeded())
normal = lambda std: Mixture(torch.zeros(1, 1, dtype=double), std)
one = torch.ones(1, dtype=double)

def answers(shape=(6, 4, 8, 8)): return torch.randn(2, *shape, dtype=double, generator=seeded(3)) * torch.tensor([1., 1.7], dtype=double).reshape(2, *[1] * len(shape))

# ---- the libraries ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('phi', [0., .3, .7, 1.])
def test_rescaled_is_diffusers(phi):
    theirs = pytest.importorskip('diffusers.guiders.guider_utils').rescale_noise_cfg
    a, b = answers()
    torch.testing.assert_close(lab.rescaled(a, b, phi), theirs(a, b, phi), rtol=0, atol=1e-12)

@pytest.mark.parametrize('w', [0., .5, 1., 3., 7.5])
def test_autoguidance_is_diffusers(w):
    guiders = pytest.importorskip('diffusers.guiders')
    weak, good = answers()
    theirs = guiders.AutoGuidance(guidance_scale=w, auto_guidance_layers=[0], dropout=1.)
    torch.testing.assert_close(lab.guide(weak, good, w) if w != 1 else good, theirs.forward(good, weak).pred, rtol=0, atol=1e-12)

@pytest.mark.parametrize('w', [1.5, 4.])
def test_zero_star_is_diffusers(w):
    "Theirs finds the multiple in single precision."
    m = pytest.importorskip('diffusers.guiders.classifier_free_zero_star_guidance')
    other, y = answers()
    s = m.cfg_zero_star_scale(y.flatten(1), other.flatten(1))
    ours = lab.zero_star_field(lambda xt, t: other, lambda xt, t: y, w)(other, torch.full((6,), .5))
    torch.testing.assert_close(ours, s.reshape(-1, 1, 1, 1) * other + w * (y - s.reshape(-1, 1, 1, 1) * other), rtol=0, atol=3e-6)

@pytest.mark.parametrize('eta, r, beta', [(0., math.inf, 0.), (1., math.inf, 0.), (0., 3., 0.), (.3, 3., -.5)])
@pytest.mark.parametrize('w', [1.5, 5.])
def test_projected_is_diffusers(eta, r, beta, w):
    "Their normalized_guidance on the guesses of the data; `use_original_formulation` with scale w - 1 starts from the condition, as the paper and this course do."
    m = pytest.importorskip('diffusers.guiders.adaptive_projected_guidance')
    buffer = m.MomentumBuffer(beta)
    field = lab.projected_field(empty, told, w, LINEAR, eta, r, beta)
    for time in (.2, .45, .7):
        t = torch.full((60,), time, dtype=double)
        x_other, x_y = (convert(LINEAR, f(points, t), points, t, 'v', 'x') for f in (empty, told))
        theirs = m.normalized_guidance(x_y, x_other, w - 1, buffer, eta, 0. if r == math.inf else r, use_original_formulation=True)
        torch.testing.assert_close(convert(LINEAR, field(points, t), points, t, 'v', 'x'), theirs, rtol=0, atol=1e-9)

@pytest.mark.parametrize('path', [LINEAR, COSINE], ids=lambda p: p.name)
@pytest.mark.parametrize('w', [-.5, .5, 2., 3.])
def test_geometric_by_torchdiffeq(path, w):
    odeint = pytest.importorskip('torchdiffeq').odeint
    f = lab.guided_field(exact_field(normal(root2), path), exact_field(normal(1.), path), w)
    x = odeint(lambda t, x: f(x, t.clamp(0, 1).expand(1)), one[:, None], torch.tensor([0., 1.], dtype=double), rtol=1e-9, atol=1e-10)[-1]
    agree(x[0, 0]**2, 2**(1 - w), atol=1e-6)
    agree(lab.geometric_variance(path, one, root2, 1., w), 2**(1 - w), atol=1e-12)

def test_ddpm_variance_by_sympy():
    sympy = pytest.importorskip('sympy')
    r = sympy.symbols('r', positive=True)
    for w, u, c in ((3, 2, 1), (2, 3, 1), (1, 5, 2), (0, 5, 2)):
        exact = sympy.integrate(sympy.Integer(1) / ((u + r)**(2 - 2 * w) * (c + r)**(2 * w)), (r, 0, sympy.oo)) * sympy.Rational(u)**(2 - 2 * w) * sympy.Rational(c)**(2 * w)
        assert abs(lab.ddpm_variance(math.sqrt(u), math.sqrt(c), w) - float(exact)) < 1e-9
    assert abs(lab.ddpm_variance(root2, 1., 3.) - 31 / 80) < 1e-12

# ---- what holds for all weights ---------------------------------------------------------------------------------------------------

stds = st.floats(.2, 4.)

@settings(max_examples=80, deadline=None)
@given(stds, stds, st.floats(-1, 4), st.floats(0, 1))
def test_means_of_two_variances(std, std_y, w, t):
    "Inside [0, 1] the harmonic mean is below the geometric one, outside above; DDPM ends between the two."
    t = torch.tensor([t], dtype=double)
    G = lab.geometric_variance(LINEAR, t, std, std_y, w)
    try: H = lab.harmonic_variance(LINEAR, t, std, std_y, w)
    except ValueError: return                                                        # no such law
    low, high = (H, G) if 0 <= w <= 1 else (G, H)
    assert (low <= high * (1 + 1e-9)).all()
    if t == 1: assert low.item() * (1 - 1e-6) <= lab.ddpm_variance(std, std_y, w) <= high.item() * (1 + 1e-6)

@settings(max_examples=40, deadline=None)
@given(stds, stds)
def test_ddpm_at_the_ends(std, std_y):
    assert lab.ddpm_variance(std, std_y, 1.) == pytest.approx(std_y**2, rel=1e-6)
    assert lab.ddpm_variance(std, std_y, 0.) == pytest.approx(std**2, rel=1e-6)
    assert lab.ddpm_variance(std, std, 3.) == pytest.approx(std**2, rel=1e-9)

@settings(max_examples=15, deadline=None)
@given(st.floats(-2, 8), st.sampled_from(['x', 'eps', 'v', 'score']))
def test_guidance_is_the_same_in_every_target(w, kind):
    t = torch.full((60,), .4, dtype=double)
    a, b = (convert(COSINE, exact_velocity(TOWNS, COSINE, points, t, y), points, t, 'v', kind) for y in (None, torch.ones(60, dtype=torch.int64)))
    whole = lab.guided_field(exact_field(TOWNS, COSINE), exact_field(TOWNS, COSINE, 1), w)(points, t)
    torch.testing.assert_close(convert(COSINE, whole, points, t, 'v', kind), lab.guide(a, b, w), rtol=1e-8, atol=1e-8)

RULES = pytest.mark.parametrize('rule', lab.LAB_RULES)

@RULES
@pytest.mark.parametrize('shape', [(3, 5), (3, 4, 8, 8)])
def test_rules_take_any_shape_and_mix_no_samples(rule, shape):
    g = torch.randn(3, *shape, dtype=double, generator=seeded(7))
    fields = lambda keep: [lambda xt, t, a=a: a[keep] + .3 * xt for a in g]
    x, t = torch.randn(shape, dtype=double, generator=seeded(8)), torch.full((3,), .5, dtype=double)
    whole = lab.lab_field(rule, *fields(slice(None)), 3., 20, 80)(x, t)
    assert whole.shape == x.shape and whole.isfinite().all()
    torch.testing.assert_close(lab.lab_field(rule, *fields(slice(1, 2)), 3., 20, 80)(x[1:2], t[1:2]), whole[1:2], rtol=1e-9, atol=1e-9)

@RULES
def test_rules_leave_two_equal_answers_alone(rule):
    "Whoever agrees with itself is not guided: weak, empty and conditional model the same."
    t = torch.full((60,), .5, dtype=double)
    torch.testing.assert_close(lab.lab_field(rule, told, told, told, 4., 20, 2)(points, t), told(points, t), rtol=1e-9, atol=1e-9)

@RULES
def test_weight_one_costs_one_call(rule):
    fields = [counted(f) for f in (empty, told, told)]
    last(euler(lab.lab_field(rule, *fields, 1., 20, 2), points, times(20)))
    assert [f.calls for f in fields] == [0, 20, 0]

def test_growth_vanishes_where_nothing_is_lost():
    t = torch.rand(60, dtype=double, generator=seeded(1)) * .9 + .05
    a, b = empty(points, t), told(points, t)
    for w, sign in ((0., 0), (1., 0), (.5, -1), (3., 1), (-1., 1)): assert (torch.sign(lab.lost_growth(LINEAR, a, b, t, w)) == sign).all()
    by_scores = .5 * forward_sde(LINEAR, t)[1] * (exact_score(TOWNS, LINEAR, points, t) - exact_score(TOWNS, LINEAR, points, t, torch.ones(60, dtype=torch.int64))).square().sum(1)
    torch.testing.assert_close(lab.lost_growth(LINEAR, a, b, t, 3.), 6 * by_scores, rtol=1e-7, atol=1e-9)

def test_resampling_is_fair():
    log_w = torch.randn(50, dtype=double, generator=seeded(2))
    counts = torch.stack([torch.bincount(lab.resampled(torch.arange(50), log_w, seeded(s)), minlength=50) for s in range(400)]).double()
    want = 50 * log_w.softmax(0)
    assert ((counts - want).abs() < 1 + 1e-9).all()                                   # each to within one
    assert ((counts.mean(0) - want).abs() < 5 * counts.std(0) / 20 + 1e-9).all()

def test_momentum_starts_afresh_with_every_run():
    f = lab.projected_field(empty, told, 3., LINEAR, beta=-.5)
    first, again = (last(euler(f, points, times(8))) for _ in range(2))
    assert torch.equal(first, again)

# ---- the historic bugs ------------------------------------------------------------------------------------------------------------

def check_interval(make):
    for t in (.05, .3, .7, .95):
        want = (lab.guided_field(empty, told, 3.) if .22 <= t <= .62 else told)(points, torch.full((60,), t, dtype=double))
        agree(make(empty, told, 3., .22, .62)(points, torch.full((60,), t, dtype=double)), want, atol=0)
    fields = [counted(f) for f in (empty, told)]
    last(euler(make(*fields, 3., .22, .62), points, times(20)))
    agree(sum(f.calls for f in fields), 20 + 8, atol=0)

def test_interval_bugs():
    check_interval(lab.interval_field)
    def outside(o, c, w, a, b): return lambda xt, t: (c if a <= float(t[0]) <= b else lab.guided_field(o, c, w))(xt, t)
    refuses(lambda: check_interval(outside))
    refuses(lambda: check_interval(lambda o, c, w, a, b: lab.interval_field(o, c, w, 1 - b, 1 - a)))                        # noise at t = 1, as half of the papers have it
    refuses(lambda: check_interval(lambda o, c, w, a, b: lab.interval_field(o, c, w, b, a)))                                # ends swapped
    refuses(lambda: check_interval(lambda o, c, w, a, b: lambda xt, t: lab.guide(o(xt, t), c(xt, t), w if a <= float(t[0]) <= b else 1.)))   # asks for nothing

def check_rescaled(f):
    a, b = answers()
    for phi in (.4, 1.): agree(f(a, b, phi).flatten(1).std(1), phi * b.flatten(1).std(1) + (1 - phi) * a.flatten(1).std(1), atol=1e-9)

def test_rescale_bugs():
    check_rescaled(lab.rescaled)
    dims = (1, 2, 3)
    refuses(lambda: check_rescaled(lambda a, b, phi: phi * a * b.var(dims, keepdim=True) / a.var(dims, keepdim=True) + (1 - phi) * a))      # variance for standard deviation
    refuses(lambda: check_rescaled(lambda a, b, phi: phi * a * b.std() / a.std() + (1 - phi) * a))                                         # over the batch
    refuses(lambda: check_rescaled(lambda a, b, phi: phi * a * a.std(dims, keepdim=True) / b.std(dims, keepdim=True) + (1 - phi) * a))      # upside down
    refuses(lambda: check_rescaled(lambda a, b, phi: (1 - phi) * a * b.std(dims, keepdim=True) / a.std(dims, keepdim=True) + phi * a))      # phi the other way round

def check_across(f):
    push, to = answers((9, 3, 4, 4))
    agree(lab.inner(f(push, to), to), 0., atol=1e-9)
    agree(f(push, to) + (push - f(push, to)), push, atol=1e-12)
    agree(lab.inner(push - f(push, to), push - f(push, to)) * lab.inner(to, to), lab.inner(push, to)**2, atol=1e-6)         # what is taken away lies along `to`

def test_projection_bugs():
    check_across(lab.across)
    refuses(lambda: check_across(lambda p, to: p - lab.across(p, to)))                                                     # onto it
    refuses(lambda: check_across(lambda p, to: p - lab.inner(p, to) / lab.inner(to, to).sqrt() * to))                      # square of the norm forgotten
    refuses(lambda: check_across(lambda p, to: p - (p * to).sum() / (to * to).sum() * to))                                  # over the batch

def check_projected(make):
    "On x_hat, not on v."
    t = torch.full((60,), .4, dtype=double)
    x_other, x_y, got = (convert(LINEAR, f(points, t), points, t, 'v', 'x') for f in (empty, told, make(empty, told, 3., LINEAR)))
    agree(got, x_y + 2 * lab.across(x_other * -1 + x_y, x_y), atol=1e-9)

def test_projecting_the_velocity_is_noticed():
    check_projected(lab.projected_field)
    def on_v(o, c, w, path): return lambda xt, t: c(xt, t) + (w - 1) * lab.across(c(xt, t) - o(xt, t), c(xt, t))
    refuses(lambda: check_projected(on_v))
    refuses(lambda: check_projected(lambda o, c, w, path: lab.projected_field(o, c, w + 1, path)))                          # w counted from the other answer

def check_zero_star(make):
    t = torch.full((60,), .4, dtype=double)
    o, c = empty(points, t), told(points, t)
    s = torch.stack([torch.linalg.lstsq(a[:, None], b[:, None]).solution[0, 0] for a, b in zip(o, c)])[:, None]
    agree(make(empty, told, 3.)(points, t), s * o + 3 * (c - s * o), atol=1e-9)

def test_zero_star_bugs():
    check_zero_star(lab.zero_star_field)
    def with_scale(scale): return lambda o, c, w: lambda xt, t: lab.guide(scale(o(xt, t), c(xt, t)) * o(xt, t), c(xt, t), w)
    check_zero_star(with_scale(lambda o, c: lab.inner(o, c) / lab.inner(o, o)))
    refuses(lambda: check_zero_star(with_scale(lambda o, c: lab.inner(o, c) / lab.inner(c, c))))                            # the wrong norm
    refuses(lambda: check_zero_star(with_scale(lambda o, c: lab.inner(o, c) / lab.inner(o, o).sqrt())))                     # not squared
    refuses(lambda: check_zero_star(with_scale(lambda o, c: (o * c).sum() / (o * o).sum())))                                # over the batch

def check_autoguidance(make):
    "Weak is to good as good is to the truth: w = 2 is the truth."
    weak, good = (exact_field(normal(.8 * k), LINEAR) for k in (1.69, 1.3))
    agree(last(heun(make(weak, good, 2.), one[:, None], times(100)))[0, 0], .8, atol=1e-3)

def test_weak_and_good_swapped_is_noticed():
    check_autoguidance(lab.guided_field)
    refuses(lambda: check_autoguidance(lambda weak, good, w: lab.guided_field(good, weak, w)))
    refuses(lambda: check_autoguidance(lambda weak, good, w: lab.guided_field(weak, good, w + 1)))                          # w = 1 for no guidance, as Karras and w - 1 formulas tempt to

def check_langevin(step):
    x = torch.randn(20_000, 1, dtype=double, generator=seeded(4)) * .5**.5
    for s in range(60): x = step(-x / .5, x, .05, seeded(5 + s))
    agree(z_score(x[:, 0]**2, .5 / (1 - .05)), 0., atol=5.)

def test_langevin_bugs():
    check_langevin(lab.langevin)
    refuses(lambda: check_langevin(lambda score, x, d, g: x + d * score + d**.5 * noise_like(x, g)))                        # the square root of 2 is missing: half the temperature
    refuses(lambda: check_langevin(lambda score, x, d, g: x + d / 2 * score + (2 * d)**.5 * noise_like(x, g)))              # the half of another convention: twice the temperature
    refuses(lambda: check_langevin(lambda score, x, d, g: x - d * score + (2 * d)**.5 * noise_like(x, g)), (AssertionError, ValueError))

def corrected_by(target, step=lab.langevin):
    "The predictor-corrector with a target of one's own for the corrector."
    def sample(o, c, w, x, ts, path, generator):
        for t0, t1 in steps(x, ts):
            x = x + (t1 - t0) * lab.guide(at(o, x, t0), at(c, x, t0), w)
            if t1 == 1: continue
            for _ in range(100 if t1 > .97 else 5): x = step(convert(path, at(target(o, c, w), x, t1), x, batch_of(t1, x), 'v', 'score'), x, .05 * (path.sigma(t1[None])[0]**2 + .16), generator)
        return x
    return sample

def check_corrector(sample):
    "Variance one half: 2 % for the step and five standard errors."
    fields = exact_field(normal(root2), LINEAR), exact_field(normal(1.), LINEAR)
    x = torch.randn(4_000, 1, dtype=double, generator=seeded(6))
    got = sample(*fields, 3., x, torch.cat([times(25, 0., .985), torch.ones(1, dtype=double)]), LINEAR, seeded(7))
    agree(got.square().mean(), .5, atol=.02 * .5 + 5 * .5 * (2 / 4_000)**.5)

def test_corrector_bugs():
    check_corrector(lambda o, c, w, x, ts, path, g: last(lab.predictor_corrector(o, c, w, x, ts, path, grain=.4, generator=g)))
    check_corrector(corrected_by(lambda o, c, w: lab.guided_field(o, c, w)))
    refuses(lambda: check_corrector(corrected_by(lambda o, c, w: c)))                                                       # the score of the class, not of the tilted law
    refuses(lambda: check_corrector(corrected_by(lambda o, c, w: o)))
    refuses(lambda: check_corrector(corrected_by(lambda o, c, w: lab.guided_field(o, c, w), lambda s, x, d, g: x + d * s + d**.5 * noise_like(x, g))))   # the wrong temperature
    refuses(lambda: check_corrector(lambda o, c, w, x, ts, path, g: last(euler(lab.guided_field(o, c, w), x, ts))))         # no corrector

def check_growth(f):
    "By differences of the tilted density in time and space, chapter 8a's and no velocity's."
    t = torch.linspace(.2, .8, 50, dtype=double)
    x, h, w = torch.linspace(-2, 2, 50, dtype=double)[:, None], 1e-4, 3.
    o, c = exact_field(HILLS, LINEAR), exact_field(HILLS, LINEAR, 0)
    v, q = lab.guided_field(o, c, w), lambda x, t: log_tilted(HILLS, LINEAR, x, t, 0, w)
    left = (q(x, t + h) - q(x, t - h)) / (2 * h) + (v(x + h, t) - v(x - h, t))[:, 0] / (2 * h) + v(x, t)[:, 0] * (q(x + h, t) - q(x - h, t)) / (2 * h)
    right = f(LINEAR, o(x, t), c(x, t), t, w)
    agree(left / (1 + left.abs()), right / (1 + left.abs()), atol=1e-5)

def test_growth_bugs():
    check_growth(lab.lost_growth)
    refuses(lambda: check_growth(lambda *a: -lab.lost_growth(*a)))
    refuses(lambda: check_growth(lambda p, o, c, t, w: w**2 * 2 / forward_sde(p, t)[1] * (c - o).square().sum(1)))          # w squared
    refuses(lambda: check_growth(lambda p, o, c, t, w: lab.lost_growth(p, o, c, t, w) / 2))                                  # g for g squared over 2

# ---- refusals ---------------------------------------------------------------------------------------------------------------------

def test_refusals():
    assert 'the same' in refuses(lambda: lab.guide(points, points[:, :1], 2.))
    for w in ('3', None, True, math.nan, math.inf): assert 'expected a' in refuses(lambda: lab.guided_field(None, None, w))
    assert '0 noise' in refuses(lambda: lab.interval_field(empty, told, 3., .8, .3))
    assert '0 noise' in refuses(lambda: lab.interval_field(empty, told, 3., 200, 800))
    assert 'unknown rule' in refuses(lambda: lab.lab_field('apg', empty, told, told, 3., 20, 2))
    assert 'step' in refuses(lambda: lab.langevin(points, points, -.1))
    assert 'finite numbers' in refuses(lambda: lab.resampled(points, torch.full((60,), math.nan)))
    assert 'finite numbers' in refuses(lambda: lab.resampled(points, torch.zeros(59)))
    assert 'positive' in refuses(lambda: lab.ddpm_variance(0., 1., 2.))
    assert 'no finite mass' in refuses(lambda: lab.harmonic_variance(LINEAR, one, 1., 3., 2.))
    assert 'field answered' in refuses(lambda: last(lab.predictor_corrector(lambda x, t: x[:, :1], told, 2., points, times(3), LINEAR)))
    with pytest.raises(FloatingPointError): last(lab.predictor_corrector(lambda x, t: x * math.nan, told, 2., points, times(3), LINEAR))

def check_variety(f):
    "Backgrounds and colours apart, and added."
    y = torch.tensor([0] * 4 + [1] * 4)
    blank = torch.zeros(8, 10, dtype=torch.int64)
    for column in (1, 3):
        labels = blank.clone(); labels[:4, column] = torch.arange(4)
        agree(f(labels, y), 2 / 2, atol=1e-12)
    labels[4:, 1] = torch.tensor([0, 0, 1, 1])
    agree(f(labels, y), (2 + 1) / 2, atol=1e-12)

def test_variety_bugs():
    check_variety(lab.bits_of_looks)
    def blind(column): return lambda labels, y: lab.bits_of_looks(labels * (torch.arange(10) != column), y)
    for column in (1, 3): refuses(lambda: check_variety(blind(column)))                                                     # one of the two is not looked at
    refuses(lambda: check_variety(lambda labels, y: lab.bits_of_looks(labels, torch.zeros_like(y))))                        # all toys in one heap

@pytest.mark.parametrize('path', [LINEAR, COSINE], ids=lambda p: p.name)
def test_guidance_keeps_its_promise_where_the_slope_is_constant(path):
    "Two normal laws that differ in the mean alone: (10.47) is large, its variation nothing, and N(3, 1) is reached."
    other, shifted = exact_field(normal(1.), path), exact_field(Mixture(one[:, None], 1.), path)
    x, t = torch.linspace(-3, 3, 13, dtype=double)[:, None], torch.full((13,), .5, dtype=double)
    growth = lab.lost_growth(path, other(x, t), shifted(x, t), t, 3.)
    assert growth.min() > 1 and growth.std() < 1e-9
    agree(last(heun(lab.guided_field(other, shifted, 3.), x, times(60))), x + 3, atol=1e-3)
