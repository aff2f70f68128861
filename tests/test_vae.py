"Chapter 3: divergences, bounds and gradients against torch.distributions in double precision, their refusals, and the historic bugs."
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from latentcourse import vae
from latentcourse.vae import LinearModel

def normals(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def model(d=5, k=3, var=.4, seed=0): return LinearModel(normals(seed, d, k), normals(seed + 1, d), var)
def covariance(k, seed): return torch.cov(normals(seed, k, 3 * k))

SHAPES = st.sampled_from([(1, 1), (3, 5), (4, 2, 3, 3)])
SEEDS = st.integers(0, 9999)

# ---- parity with torch.distributions ----------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS, st.floats(.1, 3))
def test_kl_equals_torch(shape, seed, scale):
    mu, logvar, p_mu, p_logvar = scale * normals(seed, 4, *shape)
    q, p = Normal(mu, (.5 * logvar).exp()), Normal(p_mu, (.5 * p_logvar).exp())
    want = kl_divergence(q, p).flatten(1).sum(1)
    got = vae.kl_normal(mu, logvar, p_mu, p_logvar)
    assert got.shape == (shape[0],) and ((got - want).abs() <= 1e-6 + 1e-12 * want).all()
    want = kl_divergence(q, Normal(torch.zeros_like(mu), 1.)).flatten(1).sum(1)
    assert ((vae.kl_std_normal(mu, logvar) - want).abs() <= 1e-6 + 1e-12 * want).all()

@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS, st.floats(.01, 3))
def test_kl_is_never_negative_and_zero_iff_equal(shape, seed, scale):
    mu, logvar, dm, dv = normals(seed, 4, *shape)
    assert vae.kl_normal(mu, logvar, mu, logvar).abs().max() == 0
    assert (vae.kl_normal(mu, logvar, mu + scale * dm, logvar) > 0).all() and (vae.kl_normal(mu, logvar, mu, logvar + scale * dv) > 0).all()
    assert vae.kl_std_normal(torch.zeros_like(mu), torch.zeros_like(mu)).abs().max() == 0
    assert torch.allclose(vae.kl_std_normal(mu, logvar), vae.kl_normal(mu, logvar, torch.zeros_like(mu), torch.zeros_like(mu)))

def test_kl_is_asymmetric():
    mu, logvar, p_mu, p_logvar = normals(0, 4, 8, 3)
    assert ((vae.kl_normal(mu, logvar, p_mu, p_logvar) - vae.kl_normal(p_mu, p_logvar, mu, logvar)).abs() > 1e-3).all()

def test_kl_of_half_precision_is_summed_in_single():
    mu, logvar = torch.randn(2, 4, 20_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = vae.kl_std_normal(mu, logvar)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), vae.kl_std_normal(mu.double(), logvar.double()), rtol=1e-5)

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), SEEDS)
def test_kl_full_equals_torch(k, seed):
    mu, p_mu, cov, p_cov = *normals(seed, 2, 6, k), covariance(k + 1, seed)[:k, :k], covariance(k + 1, seed + 1)[:k, :k]
    want = kl_divergence(MultivariateNormal(mu, cov), MultivariateNormal(p_mu, p_cov))
    assert ((vae.kl_full(mu, cov, p_mu, p_cov) - want).abs() <= 1e-6 * (1 + want)).all()
    assert ((vae.log_gauss(mu, p_mu, cov) - MultivariateNormal(p_mu, cov).log_prob(mu)).abs() <= 1e-6 * (1 + want)).all()
    assert vae.kl_full(mu, cov, mu, cov).abs().max() < 1e-9
    batch = cov.expand(6, k, k) * torch.arange(1., 7., dtype=torch.float64)[:, None, None]
    assert torch.allclose(vae.kl_full(mu, batch, p_mu, p_cov), torch.cat([vae.kl_full(mu[i:i+1], batch[i], p_mu[i:i+1], p_cov) for i in range(6)]))

def test_variance_penalty():
    a = torch.logspace(-3, 3, 200, dtype=torch.float64)
    assert (vae.variance_penalty(a) >= 0).all() and vae.variance_penalty(torch.ones(1)) == 0

@settings(max_examples=25, deadline=None)
@given(SHAPES, SEEDS)
def test_sample_latent_moves_with_its_parameters(shape, seed):
    mu, logvar, eps = normals(seed, 3, *shape)
    mu.requires_grad_(), logvar.requires_grad_()
    z = vae.sample_latent(mu, logvar, eps)
    assert torch.allclose((z - mu) * (-.5 * logvar).exp(), eps)
    dm, dv = torch.autograd.grad(z.sum(), (mu, logvar))
    assert torch.equal(dm, torch.ones_like(dm)) and torch.allclose(dv, .5 * (.5 * logvar).exp() * eps)
    torch.manual_seed(seed); a = vae.sample_latent(mu, logvar)
    torch.manual_seed(seed); assert torch.equal(a, vae.sample_latent(mu, logvar)) and not torch.equal(a, vae.sample_latent(mu, logvar))

def test_a_draw_in_half_precision_keeps_its_noise():
    mu, logvar = torch.full((1, 20_000), 3.).bfloat16(), torch.full((1, 20_000), 2 * math.log(3e-3)).bfloat16()
    z = vae.sample_latent(mu, logvar)
    assert z.dtype == torch.float32 and abs(z.std() / (.5 * logvar[0, 0].float()).exp() - 1) < .05
    assert torch.equal(vae.sample_latent(mu, logvar, torch.zeros_like(mu)), mu.float())

def test_a_draw_in_single_precision_is_the_plain_formula():
    mu, logvar = normals(0, 2, 5, 3).float()
    torch.manual_seed(1); z = vae.sample_latent(mu, logvar)
    torch.manual_seed(1); assert torch.equal(z, mu + (0.5 * logvar).exp() * torch.randn_like(mu))

@pytest.mark.parametrize('size', [1e-2, 1e-4, 1e-6, 1e-20])
def test_a_small_divergence_is_not_negative(size):
    logvar = size * normals(0, 4, 4096).float()
    zero = torch.zeros_like(logvar)
    for kl in (vae.kl_std_normal(zero, logvar), vae.kl_normal(zero, logvar, zero, zero)):
        assert (kl >= 0).all() and torch.allclose(kl.double(), logvar.double().square().sum(1) / 4, rtol=.02)
    assert (vae.kl_std_normal(zero.reshape(-1, 1), logvar.reshape(-1, 1)) >= 0).all()

# ---- the bound --------------------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(.05, 3), SEEDS)
def test_the_gap_is_the_divergence_from_the_posterior(d, k, var, seed):
    m, x = model(d, k, var, seed), normals(seed + 2, 7, d)
    mu, cov = vae.posterior(m, x)
    cov = (cov + cov.T) / 2
    truth = vae.log_evidence(m, x)
    assert torch.allclose(truth, MultivariateNormal(m.m, m.W @ m.W.T + var * torch.eye(d, dtype=torch.float64)).log_prob(x), atol=1e-6)
    assert torch.allclose(vae.linear_elbo(m, x, mu, cov), truth, atol=1e-6)
    q_mu, q_cov = mu + normals(seed + 3, 7, k), cov + covariance(k + 1, seed)[:k, :k]
    gap = vae.kl_full(q_mu, q_cov, mu, cov)
    assert (gap > 0).all() and torch.allclose(vae.linear_elbo(m, x, q_mu, q_cov) + gap, truth, atol=1e-6)
    assert vae.diagonal_gap(m) >= -1e-9

@pytest.mark.parametrize('var', [1., 1e-4, 1e-6, 1e-8])
def test_evidence_of_a_small_variance_in_single_precision(var):
    m = model(12, 5, var)
    x = (normals(2, 6, 5) @ m.W.T + m.m + var**.5 * normals(3, 6, 12)).float()
    short = LinearModel(m.W.float(), m.m.float(), var)
    G = short.W.double().T @ short.W.double() + var * torch.eye(5)                                          # the square completed, another route
    r = x.double() - short.m.double()
    mu = torch.linalg.solve(G, (r @ short.W.double()).T).T
    want = -.5 * ((r - mu @ short.W.double().T).square().sum(1) / var + mu.square().sum(1) + torch.linalg.slogdet(G).logabsdet + 7 * math.log(var) + 12 * math.log(2 * math.pi))
    got = vae.log_evidence(short, x)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, rtol=1e-5, atol=1e-3)

def test_diagonal_gap_is_zero_for_orthogonal_columns():
    W = torch.linalg.qr(normals(0, 6, 3)).Q * torch.tensor([2., 1., .3], dtype=torch.float64)
    assert vae.diagonal_gap(LinearModel(W, torch.zeros(6, dtype=torch.float64), .3)).abs() < 1e-9 < vae.diagonal_gap(model())

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), SEEDS)
def test_means_of_weights(n, seed):
    log_w = 3 * normals(seed, 2 * n, 4)
    assert torch.allclose(vae.log_mean(log_w), log_w.exp().mean(0).log()) and torch.allclose(vae.log_mean(log_w + 1e3), vae.log_mean(log_w) + 1e3)
    assert (vae.log_mean(log_w) >= (vae.log_mean(log_w[:n]) + vae.log_mean(log_w[n:])) / 2 - 1e-12).all()       # doubling K cannot hurt
    e = vae.effective_samples(log_w)
    assert (e >= 1 - 1e-9).all() and (e <= 2 * n + 1e-9).all()

# ---- gradients --------------------------------------------------------------------------------------------------------------------

def test_both_gradients_have_the_right_mean():
    mu, logvar, eps = torch.tensor([.5, -1.], dtype=torch.float64), torch.tensor([-.5, .3], dtype=torch.float64), normals(0, 100_000, 2)
    f = lambda z: z.square().sum(1) / 2
    for g in (vae.pathwise_gradient(f, mu, logvar, eps), vae.score_gradient(f, mu, logvar, eps), vae.score_gradient(f, mu, logvar, eps, 1.)):
        assert g.shape == eps.shape and ((g.mean(0) - mu).abs() < 5 * g.std(0) / len(g)**.5).all()

# ---- the loss ---------------------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(SHAPES, SEEDS, st.floats(.01, 10), st.floats(1e-6, 20))
def test_loss_is_one_number_a_sample_in_nats(shape, seed, var, beta):
    x, x_hat = normals(seed, 2, shape[0], 3, 4, 4)
    mu, logvar = normals(seed + 1, 2, *shape)
    rec, kl = vae.vae_terms(x, x_hat, mu, logvar, var)
    nll = -Normal(x_hat, var**.5).log_prob(x).flatten(1).sum(1)
    assert rec.shape == kl.shape == (shape[0],) and torch.allclose(rec + vae.likelihood_constant(48, var), nll, atol=1e-6)
    assert torch.allclose(vae.beta_vae_loss(x, x_hat, mu, logvar, beta, var), rec + beta * kl)
    assert torch.allclose(vae.beta_vae_loss(x, x_hat, mu, logvar, beta, 1.), beta * vae.beta_vae_loss(x, x_hat, mu, logvar, 1., beta))

def test_samples_do_not_mix():
    x, x_hat, mu, logvar = normals(0, 2, 4, 6)[0], normals(1, 4, 6), normals(2, 4, 3), normals(3, 4, 3)
    whole = vae.beta_vae_loss(x, x_hat, mu, logvar)
    for i in range(4): assert torch.allclose(vae.beta_vae_loss(x[i:i+1], x_hat[i:i+1], mu[i:i+1], logvar[i:i+1]), whole[i:i+1])

@settings(max_examples=25, deadline=None)
@given(st.floats(.01, 20), st.floats(.05, 3), SEEDS)
def test_collapse_threshold(beta, var, seed):
    x = normals(seed, 60, 6) * torch.tensor([3., 2., 1.5, 1., .5, .1], dtype=torch.float64)
    lam = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    best = vae.best_linear(x, 6, beta, var)
    mu, _ = vae.posterior(best._replace(var=beta * var), x)
    assert vae.active_units(mu, 1e-12) == int((lam > beta * var * (1 + 1e-9)).sum())
    assert torch.allclose(best.W.square().sum(0), (lam - beta * var).clamp(min=0), atol=1e-9)
    rate, distortion = vae.water_filling(lam, beta * var)
    assert torch.allclose(rate, .5 * torch.log(torch.maximum(lam / (beta * var), torch.ones(6, dtype=torch.float64))).sum()) and distortion <= lam.sum() + 1e-9

def test_no_linear_vae_beats_the_optimum():
    x = normals(0, 200, 5) * torch.tensor([2., 1.5, 1., .5, .2], dtype=torch.float64)
    top = vae.log_evidence(vae.best_linear(x, 3, 1., .3), x).mean()
    for seed in range(20): assert vae.log_evidence(LinearModel(normals(seed, 5, 3), x.mean(0), .3), x).mean() < top
    assert vae.log_evidence(vae.best_linear(x, 3, 1.3, .3), x).mean() < top

def test_linear_vae_runs():
    torch.manual_seed(0)
    net, x = vae.LinearVae(5, 2), torch.randn(7, 5)
    x_hat, mu, logvar = net(x)
    assert x_hat.shape == x.shape and mu.shape == logvar.shape == (7, 2)
    vae.beta_vae_loss(x, x_hat, mu, logvar).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())

def test_active_units():
    mu = torch.zeros(50, 2, 2, 2); mu[:, 0, 1, 1] = torch.linspace(-1, 1, 50); mu[:, 1, 0, 0] = 3.
    assert vae.active_units(mu) == 1 and vae.active_units(torch.zeros(4, 3)) == 0

# ---- the historic bugs ------------------------------------------------------------------------------------------------------------

MUTANTS = {'mean-reduced': lambda mu, logvar: .5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).mean(1),
           'mean over everything': lambda mu, logvar: .5 * (mu**2 + logvar.exp() - 1 - logvar).mean(),
           'sigma for sigma²': lambda mu, logvar: .5 * (mu**2 + (.5 * logvar).exp() - 1 - logvar).flatten(1).sum(1),
           'sign of the log-variance': lambda mu, logvar: .5 * (mu**2 + logvar.exp() - 1 + logvar).flatten(1).sum(1),
           'sign of the whole': lambda mu, logvar: -.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)}

def run_page(replaced):
    "Run the chapter's cells up to its check of the KL, with one definition replaced."
    from course import NBS, code_of
    space, names = {'__name__': '__main__', 'display': lambda *a: None}, set(replaced)
    for c in code_of(NBS / '03_vae.ipynb'):
        if c['source'].startswith('#| default_exp') or 'fig-alt' in c['source'] or 'ring_ae' in c['source']: continue
        exec(c['source'], space)
        for name in names & space.keys(): space[name] = replaced[name]
        if 'eq-beta-vae' in c['source']: return

@pytest.mark.parametrize('bug', MUTANTS)
def test_the_page_notices_a_wrong_kl(bug):
    with pytest.raises(AssertionError): run_page({'kl_std_normal': MUTANTS[bug]})

def test_the_page_notices_sigma_for_sigma_squared_when_drawing():
    with pytest.raises(AssertionError): run_page({'sample_latent': lambda mu, logvar, eps=None: mu + logvar.exp() * (torch.randn_like(mu) if eps is None else eps)})
    with pytest.raises(AssertionError): run_page({'sample_latent': lambda mu, logvar, eps=None: mu + (-.5 * logvar).exp() * (torch.randn_like(mu) if eps is None else eps)})

def test_the_page_notices_a_mean_in_the_reconstruction():
    with pytest.raises(AssertionError): run_page({'vae_terms': lambda x, x_hat, mu, logvar, var=1.: ((x - x_hat).square().flatten(1).mean(1) / (2 * var), vae.kl_std_normal(mu, logvar))})

def test_the_page_passes_unchanged(): run_page({})

# ---- devices ----------------------------------------------------------------------------------------------------------------------

ROW, SQUARE = normals(9, 3), covariance(4, 0)[:3, :3]
ELSEWHERE = { # each function on inputs of one device, while another is the default: a tensor made without `device=` does not fit them
    'log_evidence': lambda: vae.log_evidence(model(), normals(9, 4, 5)), 'posterior': lambda: vae.posterior(model(), normals(9, 4, 5)), 'log_gauss': lambda: vae.log_gauss(normals(9, 4, 3), ROW, SQUARE),
    'linear_elbo': lambda: vae.linear_elbo(model(), normals(9, 4, 5), normals(8, 4, 3), SQUARE), 'diagonal_gap': lambda: vae.diagonal_gap(model()), 'kl_full': lambda: vae.kl_full(normals(9, 4, 3), SQUARE, normals(8, 4, 3), SQUARE),
    'kl_normal': lambda: vae.kl_normal(*normals(9, 4, 4, 3)), 'kl_std_normal': lambda: vae.kl_std_normal(*normals(9, 2, 4, 3)), 'sample_latent': lambda: vae.sample_latent(*normals(9, 2, 4, 3)), 'variance_penalty': lambda: vae.variance_penalty(SQUARE.exp()),
    'vae_terms': lambda: vae.vae_terms(*normals(9, 4, 4, 3)), 'beta_vae_loss': lambda: vae.beta_vae_loss(*normals(9, 4, 4, 3)), 'best_linear': lambda: vae.best_linear(normals(9, 9, 5), 3), 'water_filling': lambda: vae.water_filling(ROW.exp(), .5),
    'active_units': lambda: vae.active_units(normals(9, 4, 3)), 'log_mean': lambda: vae.log_mean(SQUARE), 'effective_samples': lambda: vae.effective_samples(SQUARE), 'pathwise_gradient': lambda: vae.pathwise_gradient(lambda z: z.square().sum(1), ROW, ROW, normals(9, 4, 3)),
    'score_gradient': lambda: vae.score_gradient(lambda z: z.square().sum(1), ROW, ROW, normals(9, 4, 3)), 'cholesky': lambda: vae.cholesky(SQUARE), 'wide': lambda: vae.wide(ROW), 'LinearVae': lambda: LINEAR(normals(9, 4, 3).float())}
LINEAR = vae.LinearVae(3, 2)

@pytest.mark.parametrize('name', ELSEWHERE)
def test_nothing_is_made_on_the_default_device(name, monkeypatch):
    drawn = {}
    def normals_here(seed, *shape): return drawn.setdefault((seed, shape), torch.randn(*shape, generator=torch.Generator('cpu').manual_seed(seed), dtype=torch.float64, device='cpu'))
    monkeypatch.setitem(globals(), 'normals', normals_here)
    with torch.device('meta'): got = ELSEWHERE[name]()
    for t in got if isinstance(got, tuple) else (got,): assert not torch.is_tensor(t) or (t.device.type == 'cpu' and t.isfinite().all())

def test_every_function_is_tried_elsewhere():
    import inspect
    assert {n for n in vae.__all__ if inspect.isfunction(getattr(vae, n))} - ELSEWHERE.keys() == {'check_linear', 'check_normal', 'check_noise', 'likelihood_constant'}

# ---- refusals ---------------------------------------------------------------------------------------------------------------------

OK = torch.zeros(2, 3)
NAN = torch.tensor([[math.nan, 0., 0.], [0., 0., 0.]])

@pytest.mark.parametrize('f', [vae.kl_std_normal, vae.sample_latent], ids=lambda f: f.__name__)
@pytest.mark.parametrize('mu, logvar', [(OK, torch.zeros(3, 2)), (OK, torch.zeros(2)), (torch.zeros(3), torch.zeros(3)), (torch.zeros(0, 3), torch.zeros(0, 3)),
                                        (NAN, OK), (OK, NAN), (OK, OK + math.inf), (OK.long(), OK.long()), (OK, 0.), ([[0.]], [[0.]])])
def test_means_and_log_variances_are_checked(f, mu, logvar):
    with pytest.raises((ValueError, TypeError), match='expected|NaN'): f(mu, logvar)

def test_a_nan_in_training_is_left_to_the_loop():
    "`fit` names the step and the batch of a NaN loss; an error inside the loss would come without them."
    mu = NAN.clone().requires_grad_()
    assert vae.kl_std_normal(mu, OK)[0].isnan()

M = model()
X = normals(9, 4, 5)
REFUSED = [
    lambda: vae.sample_latent(OK, OK, torch.zeros(2, 4)), lambda: vae.kl_normal(OK, OK, torch.zeros(1, 3), torch.zeros(1, 3)), lambda: vae.kl_normal(OK, OK, OK, NAN),
    lambda: vae.variance_penalty(torch.tensor([0.])), lambda: vae.variance_penalty(torch.tensor([math.nan])),
    lambda: vae.log_evidence(M, X[:, :3]), lambda: vae.log_evidence(M, X[0]), lambda: vae.log_evidence(M, X[:0]), lambda: vae.log_evidence(M, X * math.nan),
    lambda: vae.log_evidence(M._replace(var=0.), X), lambda: vae.log_evidence(M._replace(m=M.m[:2]), X), lambda: vae.posterior(M._replace(var=-1.), X),
    lambda: vae.log_gauss(X, M.m, -torch.eye(5, dtype=torch.float64)), lambda: vae.log_gauss(X, M.m, torch.ones(5, 4, dtype=torch.float64)),
    lambda: vae.kl_full(X, torch.eye(4, dtype=torch.float64), X, torch.eye(5, dtype=torch.float64)), lambda: vae.kl_full(X, normals(0, 5, 5), X, torch.eye(5, dtype=torch.float64)),
    lambda: vae.log_mean(torch.zeros(0, 3)), lambda: vae.log_mean(torch.zeros(3)), lambda: vae.log_mean(NAN), lambda: vae.effective_samples(NAN), lambda: vae.effective_samples(torch.zeros(3)),
    lambda: vae.vae_terms(OK, torch.zeros(2, 4), OK, OK), lambda: vae.vae_terms(torch.zeros(3, 4), torch.zeros(3, 4), OK, OK), lambda: vae.vae_terms(OK, OK, OK, OK, 0.), lambda: vae.vae_terms(OK, OK, OK, OK, math.nan),
    lambda: vae.vae_terms(OK, NAN, OK, OK), lambda: vae.linear_elbo(M, X, X, torch.eye(3, dtype=torch.float64)), lambda: vae.diagonal_gap(M._replace(var=0.)), lambda: vae.log_gauss(X, M.m, torch.eye(4, dtype=torch.float64)),
    lambda: vae.pathwise_gradient(torch.sum, OK[0], OK[0], torch.zeros(4, 2)), lambda: vae.score_gradient(torch.sum, OK[0], NAN[0], torch.zeros(4, 3)), lambda: vae.score_gradient(torch.sum, OK[0], OK[0], torch.zeros(0, 3)),
    lambda: vae.likelihood_constant(0), lambda: vae.likelihood_constant(3, -1.), lambda: vae.beta_vae_loss(OK, OK, OK, OK, -1.), lambda: vae.beta_vae_loss(OK, OK, OK, OK, math.nan),
    lambda: vae.best_linear(X, 6), lambda: vae.best_linear(X, 0), lambda: vae.best_linear(X[:1], 2), lambda: vae.best_linear(X * math.nan, 2), lambda: vae.best_linear(X, 2, -1.), lambda: vae.best_linear(X, 2, 1., 0.),
    lambda: vae.water_filling(torch.tensor([1.]), 0.), lambda: vae.water_filling(torch.tensor([-1.]), 1.), lambda: vae.water_filling(torch.zeros(0), 1.),
    lambda: vae.active_units(torch.zeros(1, 3)), lambda: vae.active_units(torch.zeros(3)), lambda: vae.active_units(NAN)]

@pytest.mark.parametrize('call', REFUSED, ids=range(len(REFUSED)))
def test_bad_input_is_refused(call):
    with pytest.raises((ValueError, TypeError)) as e: call()
    assert len(str(e.value)) > 20
