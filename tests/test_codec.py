"The codec: its loss term by term, its two parts, its shipped weights, and its refusals."
import math
from dataclasses import replace
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse import codec as cd
from latentcourse.adversarial import PatchCritic
from latentcourse.lib.checkpoint import check_figures, figure
from latentcourse.oracle import load_oracle
from latentcourse.perceptual import load_perceptual
from latentcourse.toybox import draw, scenes, split_seeds

SMALL = cd.CodecCfg(width=8, depth=1, dec_width=8, dec_depth=1, steps=3, refine=3, batch=4)

@pytest.fixture(scope='module')
def shipped(): return {name: cd.load_codec(name) for name in ('vae', 'vae_plain')}

@pytest.fixture(scope='module')
def x(): return draw(scenes(torch.arange(4)))

# ---- what is shipped ----------------------------------------------------------------------------------------------------------------

def test_shipped_figures_hold_and_keep_the_promise(shipped):
    "Recomputed on other scenes within the interval; better than the prototype at the same f."
    codec, facts = shipped['vae']
    again = {k: figure(v) for k, v in cd.examine_codec(codec, {'judge': load_oracle('judge')[0]}, 400, start=50_000).items()}
    assert set(again) == set(facts['evaluation']) and check_figures('vae', facts['evaluation'], again) < 5
    e = {k: v['mean'] for k, v in facts['evaluation'].items()}
    assert facts['evaluation']['psnr']['n'] >= 2_000 and codec.f == 4
    assert e['psnr'] > 26.3 and e['ssim'] > .88 and abs(1 - e['detail']) < .54
    assert e['judge toy'] >= .98 and e['judge colour'] >= .98

def test_refined_against_plain(shipped, x):
    "At equal training: detail nearer to 1 by 0.2 or more, and a smaller perceptual distance."
    same = ('f', 'k', 'width', 'depth', 'dec_width', 'dec_depth', 'kl', 'square', 'steps', 'refine', 'batch', 'lr', 'seed', 'first')
    assert all(getattr(cd.CODEC['SHIPPED'], k) == getattr(cd.CODEC['PLAIN'], k) for k in same)
    detail = {name: facts['evaluation']['detail']['mean'] for name, (_, facts) in shipped.items()}
    assert abs(1 - detail['vae']) <= abs(1 - detail['vae_plain']) - .2
    lpips, pictures = load_perceptual(), draw(scenes(split_seeds('test', 60_000, 100)))
    with torch.no_grad(): far = {name: lpips(pictures, cd.through(codec, pictures)).mean() for name, (codec, _) in shipped.items()}
    assert far['vae'] < far['vae_plain']

# ---- the loss -----------------------------------------------------------------------------------------------------------------------

def test_each_part_trains_what_it_should(x):
    codec, critic = cd.build_codec(SMALL), PatchCritic(8)
    before = {k: v.clone() for k, v in codec.state_dict().items()}
    list(cd.learn_codec(codec, SMALL, progress=False))
    moved = {k.split('.')[0] for k, v in codec.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {'encoder', 'decoder', 'draft'}
    assert not torch.equal(codec.draft.stem.weight, codec.decoder.stem.weight)        # the second part went on from the draft
    codec = cd.build_codec(SMALL).requires_grad_(True)
    loss, _ = cd.with_critic(codec, critic, load_perceptual(), x, SMALL)
    loss.mean().backward()
    assert all(p.grad is None for p in codec.encoder.parameters()) and all(p.grad is None for p in codec.draft.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters() if p.ndim > 1)    # a fresh critic stands inside both margins: its bias feels +1 and -1

def test_second_part_leaves_the_latents_alone(x):
    codec = cd.build_codec(SMALL)
    log = cd.learn_codec(codec, SMALL, progress=False)
    for _ in range(3): next(log)                                                      # the last step of the first part is done
    next(log)
    z = codec.eval().encode(x)
    for _ in log: pass
    assert torch.equal(z, codec.encode(x))

def test_kl_is_in_nats_per_latent_value(x):
    codec = cd.build_codec(SMALL)
    torch.manual_seed(0); with_kl, logs = cd.without_critic(codec, None, x, replace(SMALL, perceptual=0., kl=.5))
    torch.manual_seed(0); without, _ = cd.without_critic(codec, None, x, replace(SMALL, perceptual=0., kl=0.))
    mu, logvar = codec.posterior(x)
    by_torch = torch.distributions.kl_divergence(torch.distributions.Normal(mu, (.5 * logvar).exp()), torch.distributions.Normal(0., 1.)).mean((1, 2, 3))
    assert torch.allclose(with_kl - without, .5 * by_torch, atol=1e-5) and torch.allclose(logs['kl'], by_torch.mean(), atol=1e-5)

@settings(max_examples=20, deadline=None)
@given(st.floats(1e-9, 1.), st.integers(1, 10**6), st.integers(1, 10**7))
def test_lambda_mean(weight, m, n):
    kl, error = 12.5, 3.25
    assert math.isclose(n * (error / n + cd.lambda_mean(weight, m, n) * kl / m), error + weight * kl, rel_tol=1e-9)

def test_killed_and_resumed_is_the_same(tmp_path):
    "A run stopped in the middle of the second part and one stopped in the first end where an undisturbed one does."
    def end(*stops):
        out = tmp_path / '-'.join(map(str, stops or ['whole']))
        for stop in (*stops, None):
            codec = cd.build_codec(SMALL)
            for i, r in enumerate(cd.learn_codec(codec, SMALL, out=out, resume=True, progress=False)):
                if stop is not None and i + 1 == stop: break
        return codec.state_dict()
    whole = end()
    for stops in ((2,), (5,)):
        assert all(torch.equal(v, whole[k]) for k, v in end(*stops).items())

# ---- measures -----------------------------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.floats(0., 1.), st.integers(0, 99))
def test_coherence_is_a_correlation(r, seed):
    a, b = .2 * torch.randn(2, 40, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    freq, gamma = cd.coherence(a.clamp(-1, 1), (r * a + math.sqrt(1 - r*r) * b).clamp(-1, 1))
    assert len(freq) == len(gamma) == 8 and abs(gamma.mean() - r) < .1 and gamma.abs().max() <= 1.0001
    assert torch.allclose(cd.coherence(a.clamp(-1, 1), -a.clamp(-1, 1))[1], -torch.ones(8), atol=1e-4)

def test_roughness_of_filtered_noise():
    "White noise through a box of five places: the share follows from the box's own transfer function."
    g = torch.Generator().manual_seed(0)
    white = torch.randn(50, 4, 16, 16, generator=g)
    soft = nn.functional.avg_pool2d(nn.functional.pad(white, (2, 2, 2, 2), mode='circular'), 5, 1)
    line = [(1 + 2 * math.cos(2 * math.pi * k / 16) + 2 * math.cos(4 * math.pi * k / 16)) / 5 for k in range(-8, 8)]
    gain = {(i, j): (line[i + 8] * line[j + 8])**2 for i in range(-8, 8) for j in range(-8, 8)}
    share = sum(v for (i, j), v in gain.items() if math.hypot(i, j) > 4) / sum(gain.values())
    assert abs(cd.roughness(soft) - share) < .01 and abs(cd.roughness(white) - sum(math.hypot(i, j) > 4 for i, j in gain) / 256) < .01
    assert abs(cd.roughness(7 * white + 3) - cd.roughness(white)) < 1e-6

def test_it_runs_at_other_sizes(shipped):
    codec = shipped['vae'][0]
    for size in (32, 128):
        with torch.no_grad(): assert codec(draw(scenes(torch.arange(2)), size)).shape == (2, 3, size, size)

def test_refusals(shipped, x):
    codec = shipped['vae'][0]
    for bad in (x[:, :1], x[0], x[..., :62], x[:0]):
        with pytest.raises(ValueError, match='expected pictures'): codec.encode(bad)
    with pytest.raises(ValueError, match='expected latents'): codec.decode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match='same'): cd.pixel_loss(x, x[:2])
    with pytest.raises(ValueError, match='vae or vae_plain'): cd.load_codec('unicorn')
    with pytest.raises(ValueError, match='above 0'): cd.lambda_mean(1e-6, 0, 4)
    with pytest.raises(ValueError, match='same'): cd.coherence(x, x[:2])
    with pytest.raises(ValueError, match='two pictures'): cd.standardised(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match='cut'): cd.roughness(torch.randn(4, 2, 8, 8), .7)
    with pytest.raises(ValueError, match='noise'): cd.tolerance(codec, x, 0.)
    with pytest.raises(ValueError, match='one scene'): cd.examine_codec(codec, {}, 0)
    with pytest.raises(ValueError, match='expected 2, 4, 8 or 16'): cd.build_codec(replace(SMALL, f=3))
    with pytest.raises(ValueError, match='finite'): next(cd.learn_codec(cd.build_codec(SMALL), replace(SMALL, kl=math.nan), progress=False))
