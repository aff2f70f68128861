"Chapter 7, pairs and strangers: open_clip in double precision, floors by brute force, refusals, two processes equal to one, and the historic bugs."
import inspect, itertools, math
from hashlib import blake2b
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
import contrastive_child
from contrastive_child import reference
from latentcourse import contrastive
from two_processes import by_one_and_two, apart

def normals(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def sphere(x): return x / x.norm(dim=1, keepdim=True)
def ids(seed, n, k): return torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
SEEDS, SIZES, SCALES = st.integers(0, 9999), st.integers(1, 12), st.floats(-2, 4.6)

# ---- parity with open_clip --------------------------------------------------------------------------------------------------------

def gap(ours, theirs, leaves):
    "Largest difference of value and of gradients."
    a, b = (torch.autograd.grad(l, leaves, allow_unused=True) for l in (ours, theirs))
    return max([(ours - theirs).abs().item(), *((p - q).abs().max().item() for p, q in zip(a, b) if q is not None)])

def pair_gap(module, seed=0, n=9, d=5, tau=1.7):
    u, v, t = normals(seed, n, d).requires_grad_(), normals(seed + 1, n, d).requires_grad_(), torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    return gap(module.clip_losses(u, v, t).mean(), reference.ClipLoss()(sphere(u), sphere(v), t.exp()), (u, v, t))

def cell_gap(module, seed=0, n=9, d=5, tau=1.7, bias=-3., chunk=None):
    u, v = normals(seed, n, d).requires_grad_(), normals(seed + 1, n, d).requires_grad_()
    t, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (tau, bias))
    return gap(module.sigmoid_losses(u, v, t, b, chunk=chunk).mean(), reference.SigLipLoss()(sphere(u), sphere(v), t.exp(), b), (u, v, t, b))

@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES, SIZES, SCALES)
def test_equals_open_clip(seed, n, d, tau): assert pair_gap(contrastive, seed, n, d + 1, tau) < 1e-9

@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES, SIZES, SCALES, st.floats(-12, 3), st.sampled_from([None, 1, 4, 100]))
def test_sigmoid_equals_open_clip(seed, n, d, tau, bias, chunk): assert cell_gap(contrastive, seed, n, d + 1, tau, bias, chunk) < 1e-9

# ---- mutations --------------------------------------------------------------------------------------------------------------------

def mutant(old, new):
    source = inspect.getsource(contrastive)
    assert source.count(old) == 1, (source.count(old), old)
    space = {'__name__': 'mutant', '__package__': contrastive.__package__}
    exec(compile(source.replace(old, new), 'mutant', 'exec'), space)
    return type('mutant', (), {k: staticmethod(v) if callable(v) else v for k, v in space.items()})

BOTH = '(one_way(u, vs, scale, at, same) + one_way(v, us, scale, at, same)) / 2'
BUGS = {'one direction': (BOTH, 'one_way(u, vs, scale, at, same)'), 'the other direction': (BOTH, 'one_way(v, us, scale, at, same)'),
        'sum, not half': (BOTH, BOTH[:-4]), 'one direction twice': (BOTH, BOTH.replace('(v, us', '(u, vs')),
        'temperature not exponentiated': ('.reshape(()).exp(), None', '.reshape(()), None'), 'temperature divided': ('.reshape(()).exp(), None', '.reshape(()).neg().exp(), None'),
        'not on the sphere': ('F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)', 'x'),
        'normalised over the batch': ('x.float(), dim=1)', 'x.float(), dim=0)')}

@pytest.mark.parametrize('bug', BUGS)
def test_bugs_are_caught(bug):
    bad = mutant(*BUGS[bug])
    assert pair_gap(bad) > 1e-3
    u, v = torch.tensor([[2., 0.], [7., 24.]]).double(), torch.tensor([[4., 3.], [0., .5]]).double()
    by_hand = (math.log1p(math.exp(-4)) + math.log1p(math.exp(-.8)) + math.log(2) + math.log1p(math.exp(-4.8))) / 4
    assert abs(bad.clip_losses(u, v, math.log(5)).mean() - by_hand) > 1e-3 and abs(contrastive.clip_losses(u, v, math.log(5)).mean() - by_hand) < 1e-12

@pytest.mark.parametrize('old, new', [('torch.where(mine[:, None] == theirs, z, -z)', 'torch.where(mine[:, None] == theirs, -z, z)'), (' + bias', ' - bias'), ('.sum(1) ', '.mean(1) '), ('.reshape(()).exp(), None', '.reshape(()), None')])
def test_sigmoid_bugs_are_caught(old, new):
    source = inspect.getsource(contrastive.cell_terms)
    if old in source and inspect.getsource(contrastive).count(old) > 1:
        whole = inspect.getsource(contrastive)
        space = {'__name__': 'mutant', '__package__': contrastive.__package__}
        exec(compile(whole.replace(source, source.replace(old, new)), 'mutant', 'exec'), space)
        bad = type('mutant', (), {'sigmoid_losses': staticmethod(space['sigmoid_losses'])})
    else: bad = mutant(old, new)
    assert cell_gap(bad) > 1e-3

# ---- properties -------------------------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES, SCALES)
def test_order_and_length_do_not_matter(seed, n, tau):
    u, v = normals(seed, n, 4), normals(seed + 1, n, 4)
    g, p, stretch = ids(seed, n, 3), torch.randperm(n, generator=torch.Generator().manual_seed(seed)), normals(seed + 2, n, 1).abs() + .1
    for f in (lambda a, b, c: contrastive.clip_losses(a, b, tau, c), lambda a, b, c: contrastive.sigmoid_losses(a, b, tau, -1., c), lambda a, b, c: contrastive.sigmoid_losses(a, b, tau, -1., c, chunk=2)):
        want = f(u, v, g)
        assert want.shape == (n,) and torch.allclose(f(u[p], v[p], g[p]), want[p], atol=1e-9) and torch.allclose(f(u * stretch, v, g), want, atol=1e-9)
    assert torch.allclose(contrastive.clip_losses(u, v, tau), contrastive.clip_losses(v, u, tau), atol=1e-12)

@settings(max_examples=40, deadline=None)
@given(SEEDS, SIZES, st.integers(1, 5), SCALES)
def test_no_loss_is_below_its_floor(seed, n, k, tau):
    g, u, texts = ids(seed, n, k), normals(seed, n, 6), normals(seed + 1, k, 6)
    v, m = texts[g], (g[:, None] == g).sum(1)
    assert contrastive.clip_losses(u, v, tau).mean() >= contrastive.clip_floor(g).mean() - 1e-9
    assert contrastive.sigmoid_losses(u, v, tau, -1.).mean() >= contrastive.sigmoid_floor(m).mean() - 1e-9
    if n > 1: assert contrastive.clip_losses(u, normals(seed + 2, n, 6), tau).mean() >= contrastive.simplex_floor(n, tau) - 1e-9

@pytest.mark.parametrize('counts', [(1, 1, 1), (2, 1), (4, 2, 1), (5,), (3, 3)])
def test_floors_are_reached(counts):
    "One direction a group; the sigmoid needs a logit of -log(m - 1) within a group, so groups of one size."
    g = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    u = torch.eye(len(counts), dtype=torch.float64)[g]
    assert abs(contrastive.clip_losses(u, u, math.log(40)).mean() - contrastive.clip_floor(g).mean()) < 1e-9
    assert contrastive.clip_losses(u, u, math.log(40), g).mean() < 1e-9
    if len(set(counts)) == 1:
        within = -math.log(counts[0] - 1) if counts[0] > 1 else 40.
        assert abs(contrastive.sigmoid_losses(u, u, math.log(80), within - 80.).mean() - contrastive.sigmoid_floor(torch.tensor(float(counts[0])))) < 1e-9
    assert contrastive.sigmoid_losses(u, u, math.log(80), -40., g).mean() < 1e-9

@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES, st.integers(1, 4), SCALES)
def test_soft_targets_change_nothing_for_equal_captions(seed, n, k, tau):
    g, u, texts = ids(seed, n, k), normals(seed, n, 5).requires_grad_(), normals(seed + 1, k, 5).requires_grad_()
    logits = math.exp(tau) * contrastive.cosine(u, texts[g])
    target = (g[:, None] == g).double(); target = target / target.sum(1, keepdim=True)
    soft = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert gap(contrastive.clip_losses(u, texts[g], tau).mean(), soft, (u, texts)) < 1e-9

def test_expected_floor_by_enumeration():
    law = torch.tensor([.5, .3, .2], dtype=torch.float64)
    for n in (1, 2, 4):
        for floor, cost in ((contrastive.clip_floor, torch.log), (lambda g: contrastive.sigmoid_floor((g[:, None] == g).sum(1)), contrastive.sigmoid_floor)):
            want = sum(law[list(w)].prod() * floor(torch.tensor(w)).mean() for w in itertools.product(range(3), repeat=n))
            assert abs(contrastive.expected_floor(law, n, cost) - want) < 1e-12
    assert abs(contrastive.expected_floor([1.], 8) - math.log(8)) < 1e-12 and contrastive.expected_floor([.25] * 4, 1) == 0

@pytest.mark.parametrize('n, d, tau', [(2, 2, 0.), (8, 3, 1.), (32, 16, 2.5), (64, 128, math.log(1 / .07))])
def test_first_loss(n, d, tau):
    losses = torch.stack([contrastive.clip_losses(normals(i, n, d), normals(10_000 + i, n, d), tau).mean() for i in range(400)])
    want = contrastive.first_loss(n, d, tau)
    assert abs((losses.mean() - want) / (losses.std() / 20)) < 5
    s = sphere(normals(7, 20_000, d))[:, 0]
    assert math.log(n) - 1e-6 <= want <= math.log(n) + (math.exp(tau) * s).exp().mean().log().item() + .05

def test_half_precision_is_scored_in_single():
    u, v = normals(0, 64, 32).float(), normals(1, 64, 32).float()
    with torch.autocast('cpu', torch.bfloat16): got = contrastive.clip_losses(u, v, math.log(100.)), contrastive.sigmoid_losses(u, v, math.log(100.), -10., chunk=10)
    want = contrastive.clip_losses(u, v, math.log(100.)), contrastive.sigmoid_losses(u, v, math.log(100.), -10.)
    assert all(g.dtype == torch.float32 and torch.allclose(g, w, atol=1e-3) for g, w in zip(got, want))
    assert contrastive.clip_losses(u.bfloat16(), v.bfloat16(), 1.).dtype == torch.float32

def test_cap():
    "The parameter itself is cut, as open_clip does after a step; its gradient is whole, so it can come down again."
    hot, cool = nn.Parameter(torch.tensor(6.)), nn.Parameter(torch.tensor(1.))
    assert contrastive.capped(hot) is hot and abs(hot.item() - math.log(100)) < 1e-6 and contrastive.capped(cool).item() == 1
    contrastive.capped(hot).exp().backward()
    assert abs(hot.grad.item() - 100) < 1e-3
    u = normals(0, 4, 3).float()
    loss = contrastive.clip_losses(u, u.flip(0), contrastive.capped(hot)).mean()
    assert contrastive.capped(hot).exp().isfinite()                                                # asked once more before the way back, as by a log
    loss.backward()
    torch.optim.SGD([hot], lr=.01).step()
    assert hot.item() < 4

def test_no_temperature_no_zero():
    "The floor of the errata: 4.55 at N = 256."
    assert abs(contrastive.simplex_floor(256, 0.) - 4.55) < 5e-3 and abs(math.log(256) - 5.55) < 6e-3

@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES, st.integers(1, 4), SCALES)
def test_soft_targets_keep_the_floor(seed, n, k, tau):
    g, logits = ids(seed, n, k), math.exp(tau) * contrastive.cosine(normals(seed, n, 5), normals(seed + 1, n, 5))
    target = (g[:, None] == g).double(); target = target / target.sum(1, keepdim=True)
    for way in (logits, logits.T): assert (F.cross_entropy(way, target, reduction='none') >= contrastive.clip_floor(g) - 1e-9).all()

@settings(max_examples=10, deadline=None)
@given(SEEDS, st.integers(2, 3), st.integers(2, 3), st.integers(2, 3))
def test_information_bound(seed, x, c, n):
    "Every batch of a small world, one true pair and n - 1 strangers, each way."
    joint = normals(seed, x, c).abs() + .05
    joint = joint / joint.sum()
    score, shown = contrastive.best_score(joint), 0.
    for table, law in ((score, joint), (score.T, joint.T)):
        for i, k in itertools.product(*map(range, law.shape)):
            for others in itertools.product(range(law.shape[1]), repeat=n - 1):
                weight = law[i, k] * law.sum(0)[list(others)].prod()
                shown += weight * (math.log(n) - F.cross_entropy(table[i, [k, *others]][None], torch.tensor([0]))) / 2
    info = (joint * score).sum()
    assert -1e-9 <= shown <= min(info, math.log(n)) + 1e-9

def batches_of(n, joint): # picture, caption and weight of all batches of n pairs
    b = torch.cartesian_prod(*[torch.arange(joint.numel())] * n)
    return b // joint.shape[1], b % joint.shape[1], joint.flatten()[b].prod(1)

@pytest.mark.parametrize('seed', range(3))
def test_duplicates_leave_the_best_score_and_masking_moves_it(seed):
    "All batches of three pairs, with logits as free numbers."
    joint = normals(seed, 3, 2).abs() + .1
    joint, slopes = joint / joint.sum(), {}
    x, c, weight = batches_of(3, joint)
    for masked in (False, True):
        score = contrastive.best_score(joint).requires_grad_()
        logits = score[x[:, :, None], c[:, None]]
        if masked: logits = logits.masked_fill((c[:, :, None] == c[:, None]) & ~torch.eye(3, dtype=torch.bool), -math.inf)
        total = (weight * (logits.logsumexp(2) + logits.logsumexp(1) - 2 * logits.diagonal(dim1=1, dim2=2)).mean(1) / 2).sum()
        slopes[masked] = torch.autograd.grad(total, score)[0].abs().max().item()
    assert slopes[False] < 1e-12 < 1e-3 < slopes[True]

def test_masked_logits_are_those_of_groups():
    "What the test above masks by hand is what `groups` does."
    u, v, g = normals(0, 7, 4), normals(1, 7, 4), ids(2, 7, 3)
    logits = (math.exp(1.3) * contrastive.cosine(u, v)).masked_fill((g[:, None] == g) & ~torch.eye(7, dtype=torch.bool), -math.inf)
    want = (F.cross_entropy(logits, torch.arange(7), reduction='none') + F.cross_entropy(logits.T, torch.arange(7), reduction='none')) / 2
    assert torch.allclose(contrastive.clip_losses(u, v, 1.3, g), want, atol=1e-12)

@pytest.mark.parametrize('n', [2, 5, 40])
def test_best_logit_of_the_relabelled_sigmoid(n):
    joint = normals(3, 4, 3).abs() + .05
    joint = joint / joint.sum()
    c, given = joint.sum(0), joint / joint.sum(1, keepdim=True)
    z = ((given / (1 - given)).log() + ((1 + (n - 1) * c) / ((n - 1) * c)).log()).requires_grad_()
    loss = 0.
    for x, own in itertools.product(range(4), range(3)):                          # a row: its own caption and n - 1 strangers' captions, relabelled
        label = (torch.arange(3) == own).double()
        loss = loss + joint[x, own] * (F.softplus(-z[x, own]) + (n - 1) * (c * (label * F.softplus(-z[x]) + (1 - label) * F.softplus(z[x]))).sum())
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-12

def test_sigmoid_floors_of_unequal_groups_are_reached_together():
    "One scale and one bias, pictures just so far from their caption that its logit is -log(m - 1)."
    g = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    m, a = (g[:, None] == g).sum(1), 400.
    v, side = torch.eye(6, dtype=torch.float64)[:3][g], torch.eye(6, dtype=torch.float64)[3:][g]
    want = torch.tensor([-math.log(3), 0., 40.], dtype=torch.float64)[g]                           # the wanted logits, with a bias of -a / 2
    cos = (want + a / 2) / a
    u = cos[:, None] * v + (1 - cos**2).sqrt()[:, None] * side
    assert abs(contrastive.sigmoid_losses(u, v, math.log(a), -a / 2).mean() - contrastive.sigmoid_floor(m).mean()) < 1e-9

@pytest.mark.parametrize('n', [2, 3, 128])
def test_first_loss_to_second_order(n):
    "The excess is half the variance within a row: (1 - 1/n) a^2 / 2d."
    assert abs((contrastive.first_loss(n, 512, 0.) - math.log(n)) / ((1 - 1 / n) / 1024) - 1) < .01

def test_search():
    u = normals(0, 40, 8)
    assert contrastive.recall(u, u)['image to text R@1'] == 1 and contrastive.recall(torch.ones(40, 3), torch.ones(40, 3), (1, 39)) == {f'{w} R@{k}': 0. for w in ('image to text', 'text to image') for k in (1, 39)}
    v, g = normals(1, 40, 8), ids(0, 40, 6)
    s = contrastive.cosine(u, v).tolist()
    want = [1 + sum(s[i][j] >= max(s[i][k] for k in range(40) if g[k] == g[i]) for j in range(40) if g[j] != g[i]) for i in range(40)]
    assert contrastive.match_ranks(u, v, g).tolist() == want

def test_groups():
    a = contrastive.groups_of(['a red ball', 'a ball', 'a red ball', 'ein roter Ball', ''])
    assert a[0] == a[2] and len(a.unique()) == 4 and a.dtype == torch.int64
    assert a[0].item() == int.from_bytes(blake2b(b'a red ball', digest_size=7).digest(), 'big')

# ---- refusals ---------------------------------------------------------------------------------------------------------------------

x = torch.randn(4, 3)
BAD = {'lengths differ': lambda: contrastive.clip_losses(x, x[:3], 0.), 'widths differ': lambda: contrastive.sigmoid_losses(x, x[:, :2], 0., 0.), 'empty': lambda: contrastive.clip_losses(x[:0], x[:0], 0.),
       'whole numbers': lambda: contrastive.clip_losses(x.long(), x.long(), 0.), 'one axis': lambda: contrastive.clip_losses(x[0], x[0], 0.), 'a list': lambda: contrastive.clip_losses([[1.]], [[1.]], 0.),
       'two scales': lambda: contrastive.clip_losses(x, x, torch.zeros(2)), 'NaN scale': lambda: contrastive.clip_losses(x, x, math.nan), 'short groups': lambda: contrastive.clip_losses(x, x, 0., torch.zeros(3).long()),
       'listed groups': lambda: contrastive.clip_losses(x, x, 0., [0, 1, 2, 3]), 'real groups': lambda: contrastive.clip_losses(x, x, 0., torch.zeros(4)), 'chunk 0': lambda: contrastive.sigmoid_losses(x, x, 0., 0., chunk=0), 'cosine widths': lambda: contrastive.cosine(x, x[:, :2]),
       'NaN search': lambda: contrastive.recall(x * math.nan, x), 'R@0': lambda: contrastive.recall(x, x, (0,)), 'no class': lambda: contrastive.prototypes(lambda c: x, []), 'a vector too few': lambda: contrastive.prototypes(lambda c: x[:1], [['a'], ['b']]), 'NaN prototype': lambda: contrastive.prototypes(lambda c: x[:1] * math.nan, [['a']]),
       'NaN picture': lambda: contrastive.zero_shot(x * math.nan, x), 'infinite scale': lambda: contrastive.zero_shot(x, x, math.inf), 'a capped number': lambda: contrastive.capped(3.), 'a cap of 0': lambda: contrastive.capped(torch.tensor(1.), 0.),
       'class without captions': lambda: contrastive.prototypes(lambda c: x, [['a'], []]),
       'law': lambda: contrastive.expected_floor([.5, .6], 4), 'empty law': lambda: contrastive.expected_floor([], 4), 'NaN law': lambda: contrastive.expected_floor([math.nan], 4), 'batch of none': lambda: contrastive.expected_floor([1.], 0),
       'joint': lambda: contrastive.best_score(torch.ones(2, 2)), 'one pair': lambda: contrastive.simplex_floor(1, 0.), 'a line': lambda: contrastive.first_loss(4, 1, 0.), 'm = 0': lambda: contrastive.sigmoid_floor(torch.tensor([0.])),
       'one caption': lambda: contrastive.groups_of('a ball'), 'not captions': lambda: contrastive.groups_of([1]), 'floor of reals': lambda: contrastive.clip_floor(torch.zeros(3)), 'floor of none': lambda: contrastive.clip_floor(torch.zeros(0).long())}

@pytest.mark.parametrize('name', BAD)
def test_refuses(name):
    with pytest.raises((ValueError, TypeError)) as e: BAD[name]()
    assert len(str(e.value)) > 15

# ---- two processes ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def runs(tmp_path_factory): return by_one_and_two(contrastive_child, tmp_path_factory)

def test_two_took_part(runs): assert {n: r['grad-softmax'][1]['processes'] for n, r in runs.items()} == {1: 1, 2: 2}

@pytest.mark.parametrize('kind', contrastive_child.LOSSES)
def test_gradient_of_two_is_that_of_one(runs, kind): assert apart(runs[1][f'grad-{kind}'][0], runs[2][f'grad-{kind}'][0]) < 1e-12

@pytest.mark.parametrize('kind', contrastive_child.FITS)
def test_training_of_two_is_that_of_one(runs, kind):
    "Weights in double precision. The log is kept in single, so there the last bits may differ."
    (one, two), first = ((dict(runs[n][f'fit-{kind}'][0]) for n in (1, 2)), contrastive_child.Two().state_dict())
    logs = one.pop('loss'), two.pop('loss')
    assert apart(one, two) < 1e-12 < 1e-3 < apart(one, first)
    assert ((logs[0] - logs[1]).abs() <= 4 * torch.finfo(torch.float32).eps * logs[0].abs()).all()
    if kind in ('softmax', 'masked'): assert apart({'bias': one['bias'], 'of two': two['bias']}, {'bias': first['bias'], 'of two': first['bias']}) == 0    # not used, so not decayed either

def test_a_gather_without_gradient_is_caught(runs):
    "Own rows put back in their place, and numbers only: two other losses, and not the same one."
    own, plain = runs[2]['grad-own'][0], runs[2]['grad-plain'][0]
    assert min(apart(runs[1]['grad-softmax'][0], bad) for bad in (own, plain)) > 1e-3 and apart(own, plain) > 1e-3

def test_open_clip_on_two_processes(runs):
    "With gradients through the gather it is ours. By default towers get half (one over the number of processes), the scale all. With `local_loss` alone, rows get no gradient as candidates: another loss."
    ours, theirs = runs[1]['grad-softmax'][0], {k: runs[2][f'open-{k}'][0] for k in contrastive_child.THEIRS}
    assert apart(theirs['both'], ours) < 1e-12 and apart(theirs['sigmoid'], runs[1]['grad-sigmoid'][0]) < 1e-12
    assert apart(theirs['default'], {k: g if k == 'log_scale' else g / 2 for k, g in ours.items()}) < 1e-12
    assert apart(theirs['local'], ours) > .1
