"Ablations: intervals and counts by other routes, one change at a time, mechanisms against explicit algebra, and mistakes that are noticed."
import itertools, math
from dataclasses import asdict, replace
import pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import nn
from latentcourse import ablations as a
from latentcourse.dit import DiT, DiTBlock, encode, large_latents, the_text
from latentcourse.lib.check import agree, z_score
from latentcourse.lib.study import load_study
from latentcourse.lib.train import TrainingDiverged, seed_all
from latentcourse.text_to_image import MMDiT
from latentcourse.vit import patchify, unpatchify

double = torch.float64
SMALL = a.AblationCfg(d=16, depth=2, heads=2, scenes=64, steps=4, batch=8)

def lively(model, std=.2, seed=0):
    torch.manual_seed(seed)
    for q in model.parameters(): nn.init.normal_(q, std=std)
    return model.requires_grad_(False).eval()

# ---- statistics -------------------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9_999), st.integers(2, 9), st.sampled_from([.8, .95, .99]))
def test_interval_is_that_of_scipy(seed, n, level):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, dtype=double, generator=g)
    peer = stats.ttest_rel(x, y).confidence_interval(level)
    agree(torch.stack(a.paired_gap(x, y, level)), torch.tensor([(x - y).mean(), peer.low, peer.high]), atol=1e-9)

@pytest.mark.parametrize('mistake', ['normal', 'divides by n', 'forgets the root', 'one-sided'])
def test_mistakes_in_the_interval_are_noticed(mistake):
    x, y = torch.randn(2, 3, dtype=double, generator=torch.Generator().manual_seed(1))
    d, n = x - y, 3
    q, s, root = stats.t.ppf(.975, n - 1), d.std(), math.sqrt(n)
    if mistake == 'normal': q = 1.96
    if mistake == 'divides by n': s = d.std(correction=0)
    if mistake == 'forgets the root': root = 1.
    if mistake == 'one-sided': q = stats.t.ppf(.95, n - 1)
    with pytest.raises(AssertionError): agree(torch.stack(a.paired_gap(x, y)), torch.stack([d.mean(), d.mean() - q * s / root, d.mean() + q * s / root]), atol=1e-6)

def test_interval_of_many_at_once_and_what_it_says():
    x, y = torch.randn(2, 4, 3, dtype=double)
    many = torch.stack(a.paired_gap(x, y))
    agree(many[:, 2], torch.stack(a.paired_gap(x[2], y[2])), atol=1e-12)
    assert [a.verdict_on(g) for g in ((1, .1, 2), (0, -1, 1), (-1, -2, -.1))] == ['worse', 'no difference at this size', 'better']
    for bad in ((x[0], y[0, :2]), (x[0, :1], y[0, :1]), (x[0], y[0], 1.)):
        with pytest.raises(ValueError, match='same seeds'): a.paired_gap(*bad)

def test_pairing_gain():
    x = torch.randn(9, dtype=double)
    y = x + .5 * torch.randn(9, dtype=double)
    rho = torch.corrcoef(torch.stack([x, y]))[0, 1]
    agree(a.pairing_gain(x, y), (x.var() + y.var()) / (x.var() + y.var() - 2 * rho * x.std() * y.std()), atol=1e-9)
    assert a.pairing_gain(x, -x) == pytest.approx(.5) and a.pairing_gain(x, y) == pytest.approx(a.pairing_gain(y, x))
    with pytest.raises(ValueError, match='same seeds'): a.pairing_gain(x, x[:4])

def test_false_alarms_by_counting():
    "All outcomes of m comparisons, each with its probability."
    for m, level in itertools.product((1, 3, 6), (.9, .95)):
        some = sum(math.prod(level if ok else 1 - level for ok in seen) for seen in itertools.product((0, 1), repeat=m) if not all(seen))
        assert a.false_alarms(m, level) == pytest.approx(some)
    with pytest.raises(ValueError, match='one or more'): a.false_alarms(0)

@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.floats(.001, .5))
def test_holm_by_its_steps(p, alpha):
    "Sort, compare with alpha over how many are left, stop at the first that fails."
    order, called = sorted(range(len(p)), key=lambda i: p[i]), set()
    for left, i in zip(range(len(p), 0, -1), order):
        if left * p[i] > alpha: break
        called.add(i)
    assert {i for i, v in enumerate(a.holm(torch.tensor(p, dtype=double)).tolist()) if v <= alpha} == called

@pytest.mark.parametrize('mistake', ['bonferroni', 'does not stop', 'unsorted'])
def test_mistakes_in_holm_are_noticed(mistake):
    p = torch.tensor([.02, .3, .01, .013], dtype=double)
    wrong = {'bonferroni': (4 * p).clamp(max=1), 'does not stop': (p * torch.tensor([2, 1, 4, 3])).clamp(max=1), 'unsorted': (p * torch.arange(4, 0, -1)).cummax(0).values}[mistake]
    with pytest.raises(AssertionError): agree(a.holm(p), wrong, atol=1e-6)
    for bad in (p[None], p - 1, p[:0]):
        with pytest.raises(ValueError, match='from 0 to 1'): a.holm(bad)

# ---- one change at a time ---------------------------------------------------------------------------------------------------------

def test_each_variant_changes_one_field_and_the_last_both_positions():
    base = asdict(a.AblationCfg())
    for name, change in a.CHANGED.items():
        other = asdict(replace(a.AblationCfg(), **change))
        assert [k for k in base if base[k] != other[k]] == list(change) and len(change) == {'all parts': 0, 'no places': 2}.get(name, 1)

@pytest.mark.parametrize('width', [(16, 2), (24, 1), (32, 4)])
@pytest.mark.parametrize('depth', [2, 3, 5])
def test_excess_is_what_is_built(width, depth):
    d, heads = width
    built = [DiT(d=d, depth=depth, heads=heads, qk_norm=True), MMDiT(d=d, joint=1, single=depth - 1, heads=heads, near=False, qk_norm=True)]
    count = [sum(q.numel() for q in m.parameters()) for m in built]
    assert a.cross_excess(d, depth, heads) == count[0] - count[1] and (depth != 3 or a.cross_excess(d, 3, heads) < 250 * d)

def test_excess_refuses():
    with pytest.raises(ValueError, match='share the width'): a.cross_excess(10, 3, 4)

def test_open_gates_let_every_branch_in():
    closed, open_ = (a.build_ablation(replace(SMALL, zero=z)).requires_grad_(False) for z in (True, False))
    x, e, said = torch.randn(2, 64, 16), torch.randn(2, 16), encode(the_text(), ['a red ball', ''])
    call = lambda block: block(x, e, said[0], said[1][:, None, None], turn=closed.turn, rows=8)
    assert torch.equal(call(closed.blocks[0]), x) and (call(open_.blocks[0]) - x).abs().mean() > .05
    assert a.gate_figures(closed).eq(0).all() and agree(a.gate_figures(open_), torch.tensor([[1.] * 2, [1.] * 2, [0.] * 2]), atol=1e-6) is not None
    block = open_.blocks[1]
    m = nn.functional.layer_norm(x, (16,), eps=1e-6)
    y = x + block.own(m, turn=open_.turn)
    y = y + block.cross(block.cross_norm(y), block.words(said[0]), said[1][:, None, None])
    agree(call(block), y + block.feed(nn.functional.layer_norm(y, (16,), eps=1e-6)), atol=1e-5)
    with pytest.raises(ValueError, match='shared=False'): a.open_gates(DiT(d=16, depth=1, heads=2, shared=True))

def test_gate_figures_are_signed():
    net = lively(a.build_ablation(SMALL), .3)
    rms, mean, negative = a.gate_figures(net)
    told = net.known(torch.full((16,), .5), a.test_scenes(16)[1][2])
    for i, block in enumerate(net.blocks):
        _, _, c, _, _, h = block.modulation(told)
        gates = torch.cat([c, h]).double()
        agree(torch.stack([rms[i], mean[i], negative[i]]), torch.stack([gates.square().mean().sqrt(), gates.mean(), (gates < 0).double().mean()]), atol=1e-5)
    assert 0 < negative.min() and (mean.abs() < rms).all()

def test_without_places_nothing_is_anywhere():
    "Places exchanged, answers exchanged; not so if they are turned or added."
    order, said = torch.randperm(64, generator=torch.Generator().manual_seed(0)), encode(the_text(), ['a red ball', ''])
    xt, t = torch.randn(2, 4, 16, 16), torch.tensor([.3, .6])
    moved = lambda x: unpatchify(patchify(x, 2)[:, order], 2)
    for part, blind in (('no places', True), ('turned, not added', False), ('places added, not turned', False)):
        net = a.build_ablation(replace(SMALL, **a.CHANGED[part]))
        for name, q in net.named_parameters():
            if name != 'places': nn.init.normal_(q, std=.3)
        net.requires_grad_(False)
        assert torch.allclose(net(moved(xt), t, *said), moved(net(xt, t, *said)), atol=1e-3) == blind, part

def test_places_can_be_left_out():
    net = a.build_ablation(replace(SMALL, places=False))
    assert not net.places.requires_grad and net.places.eq(0).all() and net.turn is not None
    assert a.build_ablation(replace(SMALL, rope=False)).turn is None and isinstance(a.build_ablation(replace(SMALL, joint=True)), MMDiT)

# ---- mechanisms -------------------------------------------------------------------------------------------------------------------

def test_gradient_by_depth_is_a_product_of_jacobians():
    blocks = nn.ModuleList(DiTBlock(6, 2) for _ in range(3)).double()
    lively(blocks, .4)
    x, e, slope = torch.randn(1, 3, 6, dtype=double), torch.randn(1, 6, dtype=double), torch.randn(1, 3, 6, dtype=double)
    tokens, grads = a.by_depth(blocks, x, e, slope)
    def ahead(k): # from the entrance of block k to the end
        def f(v):
            for block in blocks[k:]: v = block(v, e)
            return v
        return f
    h = x
    for k in range(4):
        agree(grads[k], torch.autograd.functional.vjp(ahead(k), h, slope)[1].norm(), atol=1e-9)
        agree(tokens[k], h.norm(), atol=1e-9)
        if k < 3: h = blocks[k](h, e)
    assert not torch.allclose(grads[0], grads[-1])

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(2, 5))
def test_offset_share_by_hand(seed, rows, columns):
    n, g = rows * columns, torch.Generator().manual_seed(seed)
    m = torch.randn(n, n, dtype=double, generator=g)
    groups = {}
    for i, j in itertools.product(range(n), repeat=2): groups.setdefault((i // columns - j // columns, i % columns - j % columns), []).append(m[i, j].item())
    mean = m.mean().item()
    between = sum(len(v) * (sum(v) / len(v) - mean)**2 for v in groups.values())
    agree(a.offset_share(m, rows), between / ((m - mean)**2).sum(), atol=1e-9)
    only = torch.tensor([[math.sin(3 * (i // columns - j // columns) + (i % columns - j % columns)) for j in range(n)] for i in range(n)], dtype=double)
    agree(a.offset_share(torch.stack([only, only]), rows), 1., atol=1e-9)

def test_offset_share_is_not_of_distances():
    "Left and right are different offsets: a share of distances alone would be noticed."
    columns = 5
    turned = torch.arange(columns, dtype=double)[:, None] - torch.arange(columns)
    assert a.offset_share(turned, 1) == pytest.approx(1) and a.offset_share(turned + torch.arange(columns)[:, None] * 3, 1) < .9
    for bad in ((torch.zeros(4, 3), 1), (torch.zeros(4, 4), 3)):
        with pytest.raises(ValueError, match='full rows'): a.offset_share(*bad)

def test_shared_optimum_is_where_the_slope_is_zero():
    p, steep, best = torch.rand(4, dtype=double), torch.rand(4, dtype=double), torch.randn(4, dtype=double)
    x = a.shared_optimum(p, steep, best).requires_grad_()
    agree(torch.autograd.grad((p * steep * (x - best)**2).sum(), x)[0], 0., atol=1e-12)
    agree(a.shared_optimum(7 * p, steep, best), a.shared_optimum(p, steep, best), atol=1e-12)
    with pytest.raises(ValueError, match='some weight'): a.shared_optimum(0 * p, steep, best)
    with pytest.raises(ValueError, match='every time'): a.shared_optimum(p[:2], steep, best)

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9_999), st.integers(2, 6))
def test_exchange_is_not_above_zero_between_minima(seed, k):
    "Quadratics: by completed squares. And whatever the losses are, on a list of candidates."
    g = torch.Generator().manual_seed(seed)
    p, other = torch.rand(2, k, dtype=double, generator=g).softmax(1)
    steep, best = torch.rand(k, dtype=double, generator=g) + .1, torch.randn(k, dtype=double, generator=g)
    x, y = a.shared_optimum(p, steep, best), a.shared_optimum(other, steep, best)
    agree(a.exchange(p, other, steep * (x - best)**2, steep * (y - best)**2), -((p + other) * steep).sum() * (x - y)**2, atol=1e-9)
    table = torch.rand(30, k, dtype=double, generator=g)
    mine, theirs = table[(table @ p).argmin()], table[(table @ other).argmin()]
    assert a.exchange(p, other, mine, theirs) <= 1e-12
    agree(a.exchange(p, other, torch.stack([mine, mine]), torch.stack([theirs, mine])), torch.stack([((other - p) * (theirs - mine)).sum(), torch.zeros((), dtype=double)]), atol=1e-12)

def test_exchange_refuses():
    p = torch.full((3,), 1 / 3)
    for bad in ((p, p[:2], p, p), (p, p, p, p[None]), (p, p, torch.rand(3, 2), torch.rand(3, 2))):
        with pytest.raises(ValueError, match='twice'): a.exchange(*bad)

def test_stable_rank():
    D = torch.randn(5, 8, dtype=double)
    Q, R = (torch.linalg.qr(torch.randn(k, k, dtype=double))[0] for k in (5, 8))
    s = torch.linalg.svdvals(D)
    agree(a.stable_rank(D), (s**2).sum() / s[0]**2, atol=1e-9)
    for other in (3 * D, D.T, Q @ D @ R): agree(a.stable_rank(other), a.stable_rank(D), atol=1e-9)
    assert a.stable_rank(torch.outer(D[0], D[1])) == pytest.approx(1) and a.stable_rank(torch.linalg.qr(D.T)[0]) == pytest.approx(5)
    for bad in (torch.zeros(3, 3), torch.ones(3)):
        with pytest.raises(ValueError, match='not zero'): a.stable_rank(bad)

@pytest.mark.parametrize('joint', [False, True])
def test_resized_keeps_the_function_at_its_size(joint):
    cfg = replace(SMALL, joint=joint)
    net, said = lively(a.build_ablation(cfg)), encode(the_text(), ['a red ball', ''])
    xt, t = torch.randn(2, 4, 16, 16), torch.tensor([.2, .7])
    agree(a.resized(net, cfg, 16)(xt, t, *said), net(xt, t, *said), atol=1e-4)
    wide, tight = (a.resized(net, cfg, 24, s) for s in (False, True))
    assert len(wide.places) == 144 and wide(torch.randn(2, 4, 24, 24), t, *said).shape == (2, 4, 24, 24)
    agree(tight.turn * 12 / 8, wide.turn, atol=1e-5)
    agree(wide.turn[12 * 3 + 5], net.turn[8 * 3 + 5], atol=1e-6)                 # the same place, the same angles
    agree(wide.places.mean(0), net.places.mean(0), atol=.1)

def test_place_logits_are_those_of_the_attention():
    net, seen = lively(a.build_ablation(SMALL), .3), []
    hook = net.blocks[1].own.register_forward_pre_hook(lambda own, args: seen.append(own.maps(args[0], None, args[2], args[4])))
    logits = a.place_logits(net, 2)
    hook.remove()
    assert logits.shape == (2, 2, 2, 64, 64)
    agree(logits[1].softmax(-1), seen[0], atol=1e-5)
    bound = math.sqrt(8) * max((b.own.q_norm.weight.abs().max() * b.own.k_norm.weight.abs().max()).item() for b in net.blocks)
    assert logits.abs().max() <= 1.001 * bound

def test_place_logits_of_a_joint_block_are_those_of_its_attention():
    "Against the weights of the joint attention, places among themselves: equal up to a factor for each query."
    net = lively(a.build_ablation(replace(SMALL, joint=True)), .3)
    z, said = a.test_scenes(2)
    x, noise = a.normalised(z, net.mean, net.std), torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    maps = a.inside(net, (x + noise) / 2, torch.full((2,), .5), *said)[0]
    logits = a.place_logits(net, 2)
    assert logits.shape == (2, 2, 2, 64, 64)
    for want, got in zip(maps, logits): agree(got.softmax(-1), want[..., :64, :64] / want[..., :64, :64].sum(-1, keepdim=True), atol=1e-4)

def test_sketches_tell_networks_apart():
    "In the mean over many signs, squared differences are those of the answers; a network is not apart from itself."
    nets = [lively(a.build_ablation(replace(SMALL, seed=s)), .3, s) for s in (0, 1)]
    one, two = (a.answer_sketch(net, 2_000, 2) for net in nets)
    z, said = a.test_scenes(2)
    x, noise = a.normalised(z, nets[0].mean, nets[0].std), torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    v, u = (net((x + noise) / 2, torch.full((2,), .5), *said) for net in nets)
    assert abs(z_score((one - two)**2, (u - v).square().mean().item())) < 5 and torch.equal(one, a.answer_sketch(nets[0], 2_000, 2))

def test_losses_are_of_the_same_noise_for_all():
    net = a.build_ablation(SMALL).eval()
    t = torch.tensor([.25, .75])
    losses, again = a.told_losses(net, 4, t), a.told_losses(a.build_ablation(replace(SMALL, seed=9)).eval(), 4, t)
    assert losses.shape == (2, 4) and torch.equal(losses, again)                 # new networks answer zero, whatever their seed
    x, g = a.normalised(a.test_scenes(4)[0], net.mean, net.std), torch.Generator().manual_seed(0)
    agree(losses, torch.stack([(x - torch.randn(x.shape, generator=g)).square().mean((1, 2, 3)) for _ in t]), atol=1e-4)

def test_words_and_places_share_their_weight():
    net = lively(a.build_ablation(replace(SMALL, joint=True)))
    words, places = a.who_looks(net, 4)
    assert 0 < words < 1 and 0 < places < 1
    for q in [m for b in (*net.joint, *net.single) for n, m in b.named_parameters() if 'in_proj' in n]: nn.init.zeros_(q)
    lengths = a.test_scenes(4)[1][1].sum(1).double()                            # everybody looks everywhere alike
    words, places = a.who_looks(net, 4)
    agree(words, (64 / (64 + lengths) * lengths).sum() / lengths.sum(), atol=1e-4)
    agree(places, (lengths / (64 + lengths)).mean(), atol=1e-4)

# ---- training and the study -------------------------------------------------------------------------------------------------------

def test_training_repeats_itself_and_is_watched():
    ends = []
    for _ in range(2):
        net = a.build_ablation(SMALL)
        done, seen = a.learn_watched(net, SMALL, large_latents(64))
        ends.append((done, seen, net.exit.out.weight.detach().clone()))
    assert ends[0][0] == 4 and list(seen) == [f'{k} at {i}/4' for i in range(5) for k in ('largest logit', 'gates')] and seen['gates at 0/4'] == 0 < seen['gates at 4/4'] and ends[0][:2] == ends[1][:2] and torch.equal(ends[0][2], ends[1][2]) and ends[0][2].abs().max() > 0

def test_a_training_that_diverges_ends_early(monkeypatch):
    def breaks(model, cfg, data, progress):
        for i in range(2): yield type('R', (), {'i': i})()
        raise TrainingDiverged('step 2')
    monkeypatch.setattr(a, 'learn_dit', breaks)
    done, seen = a.learn_watched(a.build_ablation(replace(SMALL, joint=True)), replace(SMALL, joint=True), {})
    assert done == 2 and list(seen) == [f'largest logit at {i}/4' for i in range(5)] and seen['largest logit at 4/4'] == seen['largest logit at 2/4']

@pytest.mark.parametrize('part', ['all parts', 'joint attention'])
def test_a_point_measures_finite_numbers(part):
    values = a.ablation_point(0, part, 1e-2, steps=4, scenes=64, n=4)
    assert all(math.isfinite(v) for v in values.values()) and values['steps done'] == 4 and 0 <= values['toy'] <= 1 and 0 <= values['offset share'] <= 1
    assert ('words at places' in values) == (part == 'joint attention') == ('negative gates of block 0' not in values) and values['loss'] == pytest.approx(sum(values[f'loss at {t:.2f}'] for t in a.MIDDLES) / 8)

def test_the_studies_are_complete():
    "All variants with five seeds, all rates of both optimisers with three or more."
    rows, more = load_study(a.ABLATIONS).rows(), load_study(a.ABLATION_RATES).rows()
    assert {r['settings']['part'] for r in rows} == set(a.CHANGED) and all(r['seeds'] == [0, 1, 2, 3, 4] for r in rows) and all(r['seeds'] == [0, 1, 2] for r in more)
    assert {(r['settings']['lr'], r['settings'].get('muon', True)) for r in rows + more if r['settings']['part'] == 'all parts'} == set(itertools.product(a.RATES, (True, False)))
    assert all(v == 200 for r in rows + more if 'steps' not in r['settings'] for v in r['values']['steps done'])
