"Chapter 4a: known answers, refusals, and the historic bugs of adversarial training, put back one by one."
import math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call
from latentcourse import adversarial as adv
from latentcourse.autoencoder import Decoder, Encoder

def pictures(n=4, side=16, seed=0, dtype=torch.float64):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1

def grads(loss, to): # None and no graph at all both mean: nothing arrives
    if not loss.requires_grad: return [torch.zeros_like(t) for t in to]
    got = torch.autograd.grad(loss.mean(), to, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(got, to)]

# ---- losses -----------------------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(3,), (2, 5), (4, 1, 3, 3)]), st.integers(0, 999))
def test_losses_have_one_value_a_sample(shape, seed):
    g = torch.Generator().manual_seed(seed)
    real, made = (4 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    each = lambda t: t.flatten(1).mean(1) if t.ndim > 1 else t
    for got, want in ((adv.hinge_critic(real, made), each((1 - real).clamp(min=0)) + each((1 + made).clamp(min=0))), (adv.hinge_generator(made), -each(made)),
                      (adv.bce_critic(real, made), -each(F.logsigmoid(real)) - each(F.logsigmoid(-made))), (adv.bce_generator(made), -each(F.logsigmoid(made)))):
        assert got.shape == shape[:1] and (got - want).abs().max() < 1e-12

def test_losses_do_not_overflow_and_keep_single_precision():
    big = torch.tensor([1e4, -1e4])
    for loss in (adv.bce_critic(big, big), adv.bce_generator(big), adv.hinge_critic(big, big)): assert loss.isfinite().all()
    assert adv.hinge_critic(torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(2, 5, dtype=torch.bfloat16)).dtype == torch.float32
    assert adv.bce_critic(torch.tensor([[math.nan]]), torch.zeros(1, 1)).isnan().all()      # fit stops there

@pytest.mark.parametrize('bad, error', [(torch.zeros(2, dtype=torch.long), TypeError), ('logits', TypeError), (torch.zeros(0, 3), ValueError), (torch.tensor(1.), ValueError)])
def test_losses_refuse(bad, error):
    for f in (adv.hinge_generator, adv.bce_generator, lambda l: adv.hinge_critic(torch.zeros(2), l), lambda l: adv.bce_critic(l, torch.zeros(2))):
        with pytest.raises(error, match='logits'): f(bad)

# ---- the best critic --------------------------------------------------------------------------------------------------------------

def test_best_critic_of_two_normals_is_logistic():
    N, x = torch.distributions.Normal, torch.linspace(-4, 4, 101, dtype=torch.float64)
    got = adv.best_critic(N(1., 1.).log_prob(x).exp(), N(-1., 1.).log_prob(x).exp())
    assert (got - torch.sigmoid(2 * x)).abs().max() < 1e-7
    for p, q in ((torch.zeros(2), torch.zeros(2)), (torch.tensor([-1.]), torch.ones(1)), (torch.tensor([math.nan]), torch.ones(1))):
        with pytest.raises(ValueError, match='densities'): adv.best_critic(p, q)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 999))
def test_jensen_shannon_is_a_bounded_symmetric_divergence(n, seed):
    p, q = torch.rand(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)
    js = adv.jensen_shannon(p, q)
    assert -1e-12 <= js <= math.log(2) and (js - adv.jensen_shannon(q, p)).abs() < 1e-12 and adv.jensen_shannon(p, p).abs() < 1e-12

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_jensen_shannon_where_both_laws_are_zero(dtype):
    a, b = torch.tensor([1., 0., 0.], dtype=dtype), torch.tensor([0., 1., 0.], dtype=dtype)
    assert adv.jensen_shannon(a, a) == 0 and (adv.jensen_shannon(a, b) - math.log(2)).abs() < 1e-6

def test_non_saturating_gradient_is_that_of_kl_minus_twice_js():
    N, x = torch.distributions.Normal, torch.linspace(-8, 8, 2001, dtype=torch.float64)
    p, mu, dx = N(0., 1.).log_prob(x).exp(), torch.tensor(.7, dtype=torch.float64, requires_grad=True), x[1] - x[0]
    q = N(mu, 1.).log_prob(x).exp()
    push = torch.autograd.grad((q * adv.bce_generator((p / q).log().detach()[:, None]) * dx).sum(), mu, retain_graph=True)[0]
    want = torch.autograd.grad(mu**2 / 2 - 2 * adv.jensen_shannon(p * dx, q * dx), mu)[0]   # KL of two unit normals in closed form
    assert (push - want).abs() < 1e-6

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(.1, 5))
def test_any_hinge_critic_bounds_the_total_variation(seed, scale):
    g = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, 12, generator=g, dtype=torch.float64).softmax(1)
    logits, far = scale * torch.randn(12, generator=g, dtype=torch.float64), torch.full((12,), 9., dtype=torch.float64)
    cost = (p * adv.hinge_critic(logits, -far) + q * adv.hinge_critic(far, logits)).sum()
    assert 1 - cost / 2 <= (p - q).abs().sum() / 2 + 1e-12

def test_jensen_shannon_refuses():
    for p, q in ((torch.ones(2), torch.ones(2)), (torch.ones(1), torch.ones(2) / 2), (torch.ones(0), torch.ones(0)), (torch.tensor([math.nan, 1.]), torch.tensor([0., 1.]))):
        with pytest.raises(ValueError): adv.jensen_shannon(p, q)

# ---- the critic -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('side', [16, 32, 64])
def test_patch_critic_has_the_size_it_states(side):
    critic = adv.PatchCritic()
    assert critic(torch.zeros(2, 3, side, side)).shape == (2, 1, side // 4, side // 4)
    assert 2e5 < sum(p.numel() for p in critic.parameters()) < 5e5
    with_norm = adv.PatchCritic(8, norm=lambda c: nn.GroupNorm(4, c))
    assert with_norm(torch.zeros(1, 3, side, side)).shape == (1, 1, side // 4, side // 4)

@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4))
def test_receptive_field_is_what_autograd_sees(layers):
    r = adv.receptive_field(layers)
    net = nn.Sequential(*(nn.Conv1d(1, 1, k, stride=s) for k, s in layers)).double()
    for p in net.parameters(): nn.init.ones_(p)
    x = torch.ones(1, 1, r, dtype=torch.float64, requires_grad=True)
    y = net(x)
    assert y.shape == (1, 1, 1)                                             # exactly one patch fits
    if all(k >= s for k, s in layers): assert (torch.autograd.grad(y.sum(), x)[0] > 0).all()
    for bad in ([], [(0, 1)], [(3, 0)]):
        with pytest.raises(ValueError): adv.receptive_field(bad)

# ---- two players: what must hold, and the bugs it must catch ----------------------------------------------------------------------

def separates(losses, game='hinge'):
    "Each loss reaches its own player only, and each player really learns."
    torch.manual_seed(0)
    critic, x, made = adv.PatchCritic(8).double(), pictures(), pictures(seed=1).requires_grad_()
    params = list(critic.parameters())
    a = losses(critic, x, made, game)
    assert a.generator.shape == a.critic.shape == (4,) and all(p.requires_grad for p in params), 'the critic is left frozen'
    assert grads(a.generator, [made])[0].abs().max() > 0, 'the pictures get no advice'
    assert all(g.abs().max() > 0 for g in grads(a.critic, params) if g.ndim > 1), 'the critic is frozen'  # inside the margin the last bias is pulled both ways
    assert all(g.abs().max() == 0 for g in grads(a.generator, params)), 'the critic learns to be fooled'
    assert grads(a.critic, [made])[0].abs().max() == 0, 'the pictures are trained to look made'

def plays(losses, game='hinge'):
    "A step of either player lowers what it pays, and its opponent's part tells so."
    torch.manual_seed(0)
    critic, x, made = adv.PatchCritic(8).double(), pictures(), pictures(seed=1).requires_grad_()
    a, params = losses(critic, x, made, game), list(critic.parameters())
    g, gc = grads(a.generator, [made])[0], grads(a.critic, params)
    with torch.no_grad():
        before = critic(made).mean(), critic(x).mean() - critic(made).mean()
        assert critic(made - .01 * g / g.norm()).mean() > before[0], 'the generator walks away from what looks real'
        moved = {k: p - .01 * h for (k, p), h in zip(critic.named_parameters(), gc)}
        gap = functional_call(critic, moved, (x,)).mean() - functional_call(critic, moved, (made,)).mean()
        assert gap > before[1], 'the critic mistakes real for made'

@pytest.mark.parametrize('game', adv.GAMES)
def test_two_players_are_kept_apart(game): separates(adv.adversarial_losses, game); plays(adv.adversarial_losses, game)

def detached(critic): return lambda x: functional_call(critic, {k: p.detach() for k, p in critic.named_parameters()}, (x,))

def frozen_critic(critic, x, x_hat, game):
    held = detached(critic)
    return adv.Adversarial(adv.hinge_generator(held(x_hat)), adv.hinge_critic(held(x), held(x_hat.detach())), None, None)

def detach_missing(critic, x, x_hat, game):
    return adv.Adversarial(adv.hinge_generator(detached(critic)(x_hat)), adv.hinge_critic(critic(x), critic(x_hat)), None, None)

def critic_not_held(critic, x, x_hat, game):
    return adv.Adversarial(adv.hinge_generator(critic(x_hat)), adv.hinge_critic(critic(x), critic(x_hat.detach())), None, None)

def detach_too_early(critic, x, x_hat, game):
    return adv.Adversarial(adv.hinge_generator(detached(critic)(x_hat.detach())), adv.hinge_critic(critic(x), critic(x_hat.detach())), None, None)

def generator_sign(critic, x, x_hat, game):
    a = adv.adversarial_losses(critic, x, x_hat, game)
    return a._replace(generator=-a.generator)

def critic_sign(critic, x, x_hat, game):
    a = adv.adversarial_losses(critic, x, x_hat, game)
    return a._replace(critic=adv.hinge_critic(critic(x_hat.detach()), critic(x)))

def left_frozen(critic, x, x_hat, game):
    a = adv.adversarial_losses(critic, x, x_hat, game)
    critic.requires_grad_(False)
    return a

@pytest.mark.parametrize('bug', [frozen_critic, detach_missing, critic_not_held, detach_too_early, generator_sign, critic_sign, left_frozen])
def test_each_historic_bug_is_caught(bug):
    with pytest.raises(AssertionError): separates(bug); plays(bug)

@pytest.mark.parametrize('name, wrong', [('hinge_generator', lambda made: adv.mean_logit_loss(lambda l: l, made)), ('hinge_critic', lambda real, made: adv.mean_logit_loss(lambda l: F.relu(1 + l), real) + adv.mean_logit_loss(lambda l: F.relu(1 - l), made)),
                                         ('bce_generator', lambda made: adv.mean_logit_loss(F.softplus, made))])
def test_a_wrong_sign_in_the_module_is_caught(monkeypatch, name, wrong):
    game = name.split('_')[0]
    pair = tuple(wrong if f.__name__ == name else f for f in adv.GAMES[game])
    monkeypatch.setitem(adv.GAMES, game, pair)
    with pytest.raises(AssertionError): plays(adv.adversarial_losses, game)

def test_the_critic_moves_and_the_pair_trains_in_one_step():
    from latentcourse.lib.data import Batches
    from latentcourse.lib.train import fit
    torch.manual_seed(0)
    maker = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    pair, opt = adv.two_players(maker, adv.PatchCritic(8), 1e-3, 1e-3)
    before = {k: p.detach().clone() for k, p in pair.named_parameters()}
    def loss(x):
        a = adv.adversarial_losses(pair['critic'], x, pair['generator'](x))
        return a.generator + a.critic
    for _ in fit(loss, pair, Batches(pictures(16, dtype=torch.float32), 4), 3, opt=opt, device='cpu', progress=False): pass
    assert all((p - before[k]).abs().max() > 0 for k, p in pair.named_parameters() if p.ndim > 1)

def test_adversarial_losses_refuse():
    critic, x, made = adv.PatchCritic(4), pictures(dtype=torch.float32), pictures(seed=1, dtype=torch.float32)
    with pytest.raises(ValueError, match='no gradient'): adv.adversarial_losses(critic, x, made)
    made.requires_grad_()
    with pytest.raises(ValueError, match='unknown game'): adv.adversarial_losses(critic, x, made, 'wgan')
    with pytest.raises(ValueError, match='same'): adv.adversarial_losses(critic, x[:2], made)
    with torch.no_grad(): assert adv.adversarial_losses(critic, x, made).critic.shape == (4,)
    with pytest.raises(ValueError, match='frozen'): adv.adversarial_losses(critic.requires_grad_(False), x, made)

# ---- the weight -------------------------------------------------------------------------------------------------------------------

def test_adaptive_weight_equals_autograd_at_the_last_layer():
    torch.manual_seed(0)
    encoder, decoder, critic, x = Encoder(4, 4, 8, 1).double(), Decoder(4, 4, 8, 1).double(), adv.PatchCritic(8).double(), pictures(3, 32)
    last, x_hat = decoder.head[1].weight, decoder(encoder(x))
    rec, made = (x - x_hat).square().flatten(1).mean(1), adv.adversarial_losses(critic, x, x_hat).generator
    norm = lambda l: torch.autograd.grad(l.mean(), last, retain_graph=True)[0].norm()
    want = norm(rec) / (norm(made) + 1e-6)
    losses, weight = adv.balanced(rec, made, x_hat, last, share=.3)
    assert (weight / (.3 * want) - 1).abs() < 1e-6 and not weight.requires_grad and (losses - rec - weight * made).abs().max() < 1e-9
    params = [*encoder.parameters(), *decoder.parameters(), *critic.parameters()]
    for got, ref in zip(grads(losses, params), grads(rec + weight * made, params)): assert (got - ref).abs().max() < 1e-9
    assert adv.balanced(rec, made, x_hat, last, top=.01)[1] <= .01

def test_what_does_not_pass_through_the_picture_is_lost_in_balanced_and_kept_outside():
    torch.manual_seed(0)
    encoder, decoder, x = Encoder(4, 4, 8, 1).double(), Decoder(4, 4, 8, 1).double(), pictures(2, 32)
    z = encoder(x); x_hat = decoder(z); kl = z.square().flatten(1).mean(1); last = decoder.head[1].weight
    rec, made = (x - x_hat).abs().flatten(1).mean(1), x_hat.square().flatten(1).mean(1)
    first = list(encoder.parameters())
    got = lambda l: torch.cat([g.flatten() for g in grads(l, first)])
    alone = got(adv.balanced(rec, made, x_hat, last)[0])
    assert (got(adv.balanced(rec + 100 * kl, made, x_hat, last)[0]) - alone).abs().max() < 1e-12       # as documented
    assert (got(adv.balanced(rec, made, x_hat, last)[0] + kl) - alone - got(kl)).abs().max() < 1e-9 and got(kl).abs().max() > 0

def test_adaptive_weight_is_limited_where_the_critic_is_silent():
    w = torch.ones(3, requires_grad=True)
    x_hat = w * torch.ones(2, 3)
    assert adv.adaptive_weight(torch.ones(2, 3), torch.zeros(2, 3), x_hat, w, top=50.) == 50.

# ---- grids ------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 5))
def test_overlap_counts_stamps(n, k, s):
    want = F.conv_transpose1d(torch.ones(1, 1, n), torch.ones(1, 1, k), stride=s)[0, 0]
    assert torch.equal(adv.overlap(n, k, s).float(), want)
    inner = adv.overlap(20, k, s)[k:-k] if k else None
    assert (len(inner.unique()) == 1) == (k % s == 0)                      # even away from the border iff the stride divides the kernel

def test_overlap_and_grid_peak_refuse():
    for bad in ((0, 3, 2), (3, 0, 2), (3, 3, 0)):
        with pytest.raises(ValueError): adv.overlap(*bad)
    for x, period in ((torch.zeros(2, 3, 32, 16), 4), (torch.zeros(2, 3, 30, 30), 4), (torch.zeros(2, 3, 16, 16), 4), (torch.zeros(2, 3, 32, 32), 1)):
        with pytest.raises(ValueError): adv.grid_peak(x, period)
    with pytest.raises(ValueError): adv.grid_peak(torch.full((1, 1, 32, 32), math.nan))
    with pytest.raises(ValueError, match='unknown kind'): adv.doubling('nearest', 3, 3)

@pytest.mark.parametrize('period', [2, 4])
def test_grid_peak_sees_its_own_period(period):
    torch.manual_seed(0)
    x = .1 * torch.randn(64, 1, 32, 32).clamp(-3, 3); y = x.clone()
    y[..., ::period, ::period] += .3
    assert .8 < adv.grid_peak(x, period) < 1.25 and adv.grid_peak(y, period) > 5

def test_each_way_of_doubling_doubles():
    for kind in ('transposed', 'sub-pixel', 'resize'): assert adv.doubling(kind, 4, 3)(torch.zeros(2, 4, 5, 6)).shape == (2, 3, 10, 12)

# ---- the ring and the latent ------------------------------------------------------------------------------------------------------

def test_modes_are_counted():
    assert adv.modes_found(adv.ring(2000))[0] == 8 and adv.modes_found(adv.ring(2000))[1] > .99
    one = torch.tensor([1., 0.]) + .01 * torch.randn(100, 2)
    assert adv.modes_found(one) == (1, 1.) and adv.modes_found(torch.zeros(10, 2)) == (0, 0.)
    for bad in (torch.zeros(5, 3), torch.zeros(0, 2), torch.full((3, 2), math.inf)):
        with pytest.raises(ValueError): adv.modes_found(bad)

def test_jacobian_norm_of_a_linear_map():
    A, z = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    got = adv.jacobian_norm(lambda z: z @ A.T, z, 6**.5 * torch.eye(6, dtype=torch.float64))
    assert (got - A.square().sum()).abs().max() < 1e-9
    with pytest.raises(ValueError, match='probes'): adv.jacobian_norm(lambda z: z @ A.T, z, torch.randn(5, 4))

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(-3, 3), st.floats(-5, 5))
def test_carried_is_blind_to_scale_and_shift(seed, scale, shift):
    z = torch.randn(9, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    back = scale * z + shift
    assert abs(adv.carried(z, back) - (abs(scale) > 1e-3)) < 1e-3 or abs(scale) <= 1e-3

def test_a_fresh_critic_tells_grey_from_real():
    assert adv.told_apart(lambda z: torch.zeros(len(z), 3, 32, 32), steps=30) > .8

def test_carried_refuses():
    z = torch.randn(4, 3)
    for a, b in ((z, z[:3]), (z[:1], z[:1]), (torch.ones(4, 3), z), (z * math.nan, z)):
        with pytest.raises(ValueError): adv.carried(a, b)
