"Chapter 3a: properties, refusals, and the bugs that this model has had everywhere (mutations)."
import json, math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse import picture_vae as pv
from latentcourse.lib.check import agree, refuses
from latentcourse.vae import kl_std_normal, likelihood_constant, sample_latent, vae_terms

def rand(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1

# ---- the likelihood ----------------------------------------------------------------------------------------------------------------

def nats(x, x_hat, s2):
    none = torch.zeros(len(x), 1)
    return vae_terms(x, x_hat, none, none, float(s2))[0] + likelihood_constant(x[0].numel(), float(s2))

@settings(max_examples=30, deadline=None)
@given(st.floats(.2, 5), st.integers(0, 99))
def test_no_variance_beats_the_best(factor, seed):
    x, x_hat = rand(4, 3, 8, 8, seed=seed), rand(4, 3, 8, 8, seed=seed + 1)
    best = pv.best_variance(x, x_hat)
    assert nats(x, x_hat, best).mean() <= nats(x, x_hat, factor * best).mean() + 1e-3

def test_likelihood_refuses():
    x = rand(2, 3, 8, 8)
    for bad in (x[:1], x[..., :4], x[:0]):
        with pytest.raises(ValueError): pv.best_variance(x, bad)
    for n in (0, -3, 2.5):
        with pytest.raises(ValueError, match='whole number'): pv.bits_per_dim(torch.ones(2), n)

# ---- the model ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    m = pv.PictureVae(d=6, k=4, width=8)
    for p in m.parameters(): p.data += .02 * torch.randn_like(p)          # residual blocks start as the identity
    return m

def test_shapes_and_refusals(model):
    x = rand(3, 3, 32, 32)
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (3, 6) and model(x).shape == x.shape and model.decode(mu).dtype == torch.float32
    for bad in (rand(3, 3, 64, 64), rand(3, 1, 32, 32), rand(3, 3, 33, 33), rand(0, 3, 32, 32), x * math.nan):
        with pytest.raises(ValueError): model.encode(bad)
    with pytest.raises(TypeError): model.encode((x * 100).long())
    for bad in (torch.randn(3, 5), torch.randn(6), torch.full((2, 6), math.nan)):
        with pytest.raises(ValueError, match='latents'): model.decode(bad)
    for bad in (dict(size=30), dict(d=0), dict(width=0), dict(depth=0)):
        with pytest.raises(ValueError): pv.PictureVae(**bad)

def bound(model, x, beta=1., s2=.1, seed=3):
    "Minus the bound by torch.distributions, in double precision, for the noise of this seed."
    torch.manual_seed(seed)
    mu, logvar = model.encode(x)
    z = mu + (logvar / 2).exp() * torch.randn_like(mu)
    rec = -torch.distributions.Normal(model.decode(z).double(), s2**.5).log_prob(x.double()).flatten(1).sum(1)
    q = torch.distributions.Normal(mu.double(), (logvar.double() / 2).exp())
    return rec + beta * torch.distributions.kl_divergence(q, torch.distributions.Normal(0., 1.)).sum(1)

@pytest.mark.parametrize('beta', [.1, 1., 30.])
def test_loss_is_minus_the_bound(model, beta):
    x = rand(4, 3, 32, 32)
    torch.manual_seed(3)
    losses, logs = pv.picture_loss(model, x, beta, .1)
    assert losses.shape == (4,) and torch.allclose(losses.double(), bound(model, x, beta), rtol=1e-5)
    assert set(logs) == {'mse', 'kl', 'bits'}

def test_variance_of_the_batch_gets_no_gradient(model):
    "At the optimum the derivative with respect to the variance is zero: with or without it, the same gradient."
    x, grads = rand(4, 3, 32, 32), []
    for detach in (True, False):
        model.zero_grad(); torch.manual_seed(3)
        if detach: pv.picture_loss(model, x)[0].mean().backward()
        else:
            mu, logvar = model.encode(x); x_hat = model.decode(sample_latent(mu, logvar))
            m = pv.best_variance(x, x_hat)
            (1536 * (m / m + m.log()) + kl_std_normal(mu, logvar)).mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-3 * grads[0].abs().max().item())

def test_plain_autoencoder_draws_no_noise(model):
    x = rand(4, 3, 32, 32)
    torch.manual_seed(0); one = pv.picture_loss(model, x, beta=0.)[0]
    torch.manual_seed(1); other = pv.picture_loss(model, x, beta=0.)[0]
    assert torch.equal(one, other) and 'kl' not in pv.picture_loss(model, x, beta=0.)[1]

MUTANTS = {
    'mean over latents (hidden beta)': lambda x, x_hat, mu, logvar: nats(x, x_hat, .1) + pv.kl_parts(mu, logvar).mean(1),
    'mean over pixels': lambda x, x_hat, mu, logvar: nats(x, x_hat, .1) / x[0].numel() + kl_std_normal(mu, logvar),
    'sigma for sigma squared': lambda x, x_hat, mu, logvar: nats(x, x_hat, .1**.5) + kl_std_normal(mu, logvar),
    'no half before the squares': lambda x, x_hat, mu, logvar: nats(x, x_hat, .05) + kl_std_normal(mu, logvar),
    'KL forgotten': lambda x, x_hat, mu, logvar: nats(x, x_hat, .1),
    'log-variance read as log of the deviation': lambda x, x_hat, mu, logvar: nats(x, x_hat, .1) + kl_std_normal(mu, 2 * logvar)}

@pytest.mark.parametrize('bug', MUTANTS)
def test_mutants_are_killed(model, bug):
    "N9: each historic bug changes the direction of the gradient, which is what the bound is compared by."
    x = rand(4, 3, 32, 32)
    def direction(loss):
        model.zero_grad(); loss.mean().backward()
        g = model.squeeze.weight.grad.double().flatten()
        return g / g.norm()
    def ours(f):
        torch.manual_seed(3)
        mu, logvar = model.encode(x)
        return f(x, model.decode(sample_latent(mu, logvar)), mu, logvar)
    want = direction(bound(model, x))
    agree(direction(ours(lambda x, x_hat, mu, logvar: nats(x, x_hat, .1) + kl_std_normal(mu, logvar))), want, atol=1e-4)
    refuses(lambda: agree(direction(ours(MUTANTS[bug])), want, atol=1e-4), AssertionError)

# ---- the parts of the KL -----------------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_parts_add_up(b, d, seed):
    mu, logvar = torch.randn(2, b, d, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(pv.kl_parts(mu, logvar).sum(1), kl_std_normal(mu, logvar), atol=1e-5)

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.floats(0, 3), st.integers(0, 99))
def test_free_bits_are_a_floor(b, d, floor, seed):
    mu, logvar = torch.randn(2, b, d, generator=torch.Generator().manual_seed(seed))
    want = pv.kl_parts(mu, logvar).mean(0).clamp(min=floor).sum()
    assert torch.allclose(pv.free_bits(mu, logvar, floor).mean(), want, atol=1e-5)
    assert torch.allclose(pv.free_bits(mu, logvar, 0.), kl_std_normal(mu, logvar), atol=1e-5)

def test_free_bits_refuse():
    for floor in (-.1, math.nan):
        with pytest.raises(ValueError, match='floor'): pv.free_bits(torch.zeros(2, 2), torch.zeros(2, 2), floor)

@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 99))
def test_split_adds_up_and_knows_its_limit(b, d, seed):
    g = torch.Generator().manual_seed(seed)
    mu, logvar, eps = torch.randn(3, b, d, generator=g, dtype=torch.float64)
    z = sample_latent(3 * mu, logvar, eps)
    told, wrong = pv.split_kl(3 * mu, logvar, z)
    given_ = torch.distributions.Normal(3 * mu, (logvar / 2).exp()).log_prob(z).sum(1) - torch.distributions.Normal(0., 1.).log_prob(z).sum(1)
    assert torch.allclose(told + wrong, given_) and told.max() <= math.log(b) + 1e-9

def test_split_of_equal_posteriors():
    "If all posteriors are the prior, nothing is told and nothing is wrong; if all are equal but elsewhere, all is wrong."
    eps = torch.randn(50, 3)
    told, wrong = pv.split_kl(torch.zeros(50, 3), torch.zeros(50, 3), eps)
    assert told.abs().max() < 1e-5 and wrong.abs().max() < 1e-5
    told, wrong = pv.split_kl(torch.ones(50, 3), torch.zeros(50, 3), eps + 1)
    assert told.abs().max() < 1e-5 and abs(wrong.mean() - 1.5) < 5 * (3 / 50)**.5
    with pytest.raises(ValueError, match='one draw'): pv.split_kl(torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(4, 3))

def test_fit_codes_finds_a_normal():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 3, generator=g) @ torch.tensor([[1., .5, 0], [0, 1, 0], [0, 0, 2]]) + 1
    r = pv.fit_codes(z)
    want = torch.distributions.MultivariateNormal(z.mean(0), z.T.cov()).log_prob(z[:9])
    assert torch.allclose(torch.as_tensor(r.score_samples(z[:9].double().numpy())).float(), want, atol=.02)
    for bad in (z[0], z[:1], z * math.nan):
        with pytest.raises(ValueError, match='codes'): pv.fit_codes(bad)

# ---- blur, study, checkpoints ------------------------------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(st.floats(0, 2), st.floats(0, 2), st.integers(0, 99))
def test_blurs_add_in_squares(a, b, seed):
    x = rand(2, 3, 16, 16, seed=seed)
    twice, once = pv.blurred(pv.blurred(x, a), b), pv.blurred(x, math.hypot(a, b))
    assert torch.allclose(twice, once, atol=1e-4) and torch.allclose(once.mean((2, 3)), x.mean((2, 3)), atol=1e-5)

def test_blur_refuses():
    for bad in (rand(3, 8, 8), rand(0, 3, 8, 8), rand(1, 3, 8, 8) * math.nan):
        with pytest.raises(ValueError): pv.blurred(bad, 1.)
    for s in (-1., math.nan):
        with pytest.raises(ValueError, match='pixels'): pv.blurred(rand(1, 3, 8, 8), s)

def test_stream_draws_the_scenes_it_is_asked_for():
    seeds = torch.arange(250, 262) + 2**32                                # across two blocks
    assert (pv.picture_stream(seeds).cpu() - pv.large_pictures(seeds)).abs().max() < 1e-6

def test_pictures_stay_where_they_are_asked_for(monkeypatch):
    "On a machine with an accelerator the pages' models still live on the CPU; only the training stream may draw elsewhere."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    seeds, asked = torch.arange(4), []
    assert pv.large_pictures(seeds).device.type == 'cpu'
    monkeypatch.setattr(pv, 'draw', lambda scene, size: asked.append(scene[0].device.type) or torch.zeros(len(scene[0]), 3, size, size))
    pv.large_pictures(seeds, 32, 'meta')
    assert asked == ['meta']

def test_logarithm_of_the_error_is_what_is_minimised(model):
    "With the best variance put in, the reconstruction term costs n/2 (log 2 pi m + 1) on average."
    x = rand(4, 3, 32, 32)
    losses, logs = pv.picture_loss(model, x, beta=0.)
    assert abs(losses.mean().item() - 1536 * (math.log(2 * math.pi * logs['mse'].item()) + 1)) < .05

def test_names_are_known():
    for name in ('vae', 'picture', ''):
        with pytest.raises(ValueError, match='unknown model'): pv.load_picture_vae(name)
    with pytest.raises(ValueError, match='expected picture_vae'): pv.train_picture_vae('picture_ae', pv.PICTURE_VAE['CPU'])
    with pytest.raises(ValueError, match='expected picture_vae'): pv.train_picture_vae('picture_vae', pv.PICTURE_AE['CPU'])
    with pytest.raises(ValueError, match='remedy'): pv.collapse_point(0, 1., 'prayer')

def test_training_resumes_and_learns(tmp_path):
    from dataclasses import replace
    cfg = replace(pv.PICTURE_VAE['CPU'], d=8, k=4, width=8, steps=12, batch=8)
    whole = list(pv.learn_picture_vae(pv.build_picture_vae(cfg), cfg, progress=False))
    half = pv.build_picture_vae(cfg)
    stream = pv.learn_picture_vae(half, cfg, out=tmp_path, progress=False)
    assert [r.loss for r in whole] == [r.loss for r in stream] and whole[-1].loss < whole[0].loss
    again = list(pv.learn_picture_vae(pv.build_picture_vae(cfg), cfg, out=tmp_path, resume=True, progress=False))
    assert [r.loss for r in again] == [r.loss for r in whole]

@pytest.mark.parametrize('name', ['picture_vae', 'picture_ae'])
def test_shipped_checkpoint_is_what_it_says(name, monkeypatch):
    from latentcourse.lib.checkpoint import check_figures, figure
    monkeypatch.delenv('LATENTCOURSE_TRAIN', raising=False)
    model, facts = pv.load_picture_vae(name)
    now = pv.examine_picture_vae(model, 200, beta=facts['config']['beta'], start=300)
    check_figures(name, facts['evaluation'], {k: figure(v.double()) for k, v in now.items()})
    assert abs(now['mse'].mean() / model.sigma2 - 1) < .15

def test_studies_are_recorded_with_this_code():
    from latentcourse.lib.study import load_study
    for s in pv.STUDIES.values(): assert len(load_study(s).rows()) == len(s.grid)
