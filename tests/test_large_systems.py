"Counts against what other libraries build and torch counts, motion against pixels, films frame by frame, laws of sentences by hand; mistakes must be noticed."
import math
from dataclasses import asdict, replace
from functools import cache
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from latentcourse import large_systems as ls
from latentcourse.diffusion import LINEAR
from latentcourse.dit import DiTBlock
from latentcourse.lib.check import agree
from latentcourse.mixture import HILLS, TOWNS, exact_field
from latentcourse.samplers import euler, heun, last, times
from latentcourse.toybox import TOYS, split_seeds

double = torch.float64
total = lambda g: sum(ls.design_parameters(g).values())

# ---- counting ---------------------------------------------------------------------------------------------------------------------

def small(kind):
    "A small design, and the arguments with which diffusers builds it."
    if kind == 'sd3': return ls.Design(32, 16, (16, 16), text=(24,), pooled=20, joint=3, last=True, qk_norm=True), 'SD3Transformer2DModel', dict(sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=16, qk_norm='rms_norm')
    if kind == 'flux': return ls.Design(32, 16, (16, 16), text=(24,), pooled=20, guided=True, joint=2, single=3, qk_norm=True), 'FluxTransformer2DModel', dict(in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    if kind == 'flux2': return ls.Design(32, 16, (16, 16), text=(24,), guided=True, joint=2, single=3, hidden=96, gated=True, bias=False, shared=True, qk_norm=True), 'Flux2Transformer2DModel', dict(in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4))
    return ls.Design(32, 16, (16, 32), text=(24, 32), plain=3, cross=True, shared=True), 'PixArtTransformer2DModel', dict(sample_size=16, num_layers=3, attention_head_dim=16, num_attention_heads=2, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False)

def build(name, config):
    diffusers = pytest.importorskip('diffusers')
    if not hasattr(diffusers, name): pytest.skip(f'this diffusers has no {name}')
    with torch.device('meta'): return getattr(diffusers, name)(**config)

@pytest.mark.parametrize('kind', ['sd3', 'flux', 'flux2', 'pixart'])
@pytest.mark.filterwarnings('ignore')
def test_parameters_are_those_of_diffusers(kind):
    g, name, config = small(kind)
    assert total(g) == sum(q.numel() for q in build(name, config).parameters())

def answer(kind, m):
    "One answer of a small design, with the numbers of its places and words."
    one, r = torch.ones(1, device='meta'), torch.randn
    if kind == 'sd3': return lambda: m(r(1, 4, 16, 16), r(1, 5, 24), r(1, 20), one), 64, 5
    if kind == 'flux': return lambda: m(r(1, 10, 16), r(1, 6, 24), r(1, 20), one, torch.zeros(10, 3), torch.zeros(6, 3), one), 10, 6
    if kind == 'flux2': return lambda: m(r(1, 10, 16), r(1, 6, 24), one, torch.zeros(1, 10, 4), torch.zeros(1, 6, 4), one), 10, 6
    return lambda: m(r(1, 4, 16, 16), r(1, 5, 24), one, {'resolution': None, 'aspect_ratio': None}), 64, 5

def counted(f):
    with torch.device('meta'), FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()

@pytest.mark.parametrize('kind', ['sd3', 'flux', 'flux2', 'pixart'])
@pytest.mark.filterwarnings('ignore')
def test_operations_are_those_that_torch_counts_in_diffusers(kind, monkeypatch):
    g, name, config = small(kind)
    f, n, s = answer(kind, build(name, config))
    theirs, right = counted(f), ls.matrices
    assert sum(ls.design_flops(g, n, s)) == theirs
    assert sum(ls.design_flops(g, n + s)) != theirs and sum(ls.design_flops(replace(g, gated=not g.gated), n, s)) != theirs
    for wrong in ({'places': 'words'}, {'words': 'places'}, {'time': 'places'}):                     # a matrix in the wrong stream
        monkeypatch.setattr(ls, 'matrices', lambda g: ((p, wrong.get(w, w), k, a, b) for p, w, k, a, b in right(g)))
        assert sum(ls.design_flops(g, n, s)) != theirs

@pytest.mark.parametrize('name, told', [('SD3 medium', 2e9), ('SD3.5 large', 8e9), ('FLUX.1', 12e9), ('FLUX.2', 32e9), ('PixArt-Σ', .6e9), ('DiT-XL/2', 675e6), ('Movie Gen Video', 30e9)])
def test_published_sizes(name, told): assert abs(total(ls.DESIGNS[name]) / told - 1) < .03

@pytest.mark.parametrize('change', [dict(joint=23), dict(last=False), dict(pooled=768), dict(guided=True), dict(shared=True), dict(gated=True), dict(bias=False), dict(qk_norm=True), dict(classes=1), dict(hidden=6143), dict(cross=True, plain=1)])
def test_every_part_of_a_design_counts(change): assert total(replace(ls.DESIGNS['SD3 medium'], **change)) != total(ls.DESIGNS['SD3 medium'])

@settings(max_examples=20, deadline=None)
@given(st.sampled_from([16, 32, 64]), st.integers(1, 4), st.booleans())
def test_plain_blocks_are_those_of_chapter_eleven(d, depth, shared):
    g = ls.Design(d, d // 2, (4, 4), plain=depth, shared=shared)
    more = total(replace(g, plain=depth + 1)) - total(g)
    assert more == sum(q.numel() for q in DiTBlock(d, 2, shared=shared).parameters())

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(1, 20))
def test_operations_of_a_plain_block_are_those_that_torch_counts(n, s):
    g = ls.Design(16, 8, (4, 4), plain=1, cross=True, shared=True)
    more = sum(ls.design_flops(replace(g, plain=2), n, s)) - sum(ls.design_flops(g, n, s))
    with torch.device('meta'):
        block, x, e, c = DiTBlock(16, 2, cross=16, shared=True), torch.randn(1, n, 16), torch.randn(6, 1, 16), torch.randn(1, s, 16)
        with FlopCounterMode(display=False) as counter: block(x, e, c)
    assert more == counter.get_total_flops() - 2 * s * 16 * 16                                       # its own projection of words is not part of the design

def test_training_is_three_times_one_way():
    g = ls.DESIGNS['SD3 medium']
    assert ls.training_flops(g, 7, 256, 77) == 21 * sum(ls.design_flops(g, 256, 77))

def test_kept_numbers_are_what_autograd_keeps():
    block, x, e = DiTBlock(32, 4, 64), torch.randn(1, 24, 32, requires_grad=True), torch.randn(1, 32)
    own, found = {q.untyped_storage().data_ptr() for q in block.parameters()}, {}
    def keep(t):
        if t.untyped_storage().data_ptr() not in own: found[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): block(x, e)
    assert abs(ls.kept_numbers(24, 32, 64, 4) / sum(t.untyped_storage().nbytes() // 4 for t in found.values()) - 1) < .005

def test_memory_and_hours_by_hand():
    assert ls.training_bytes(10) == 160 and ls.training_bytes(10, 5, 4) == 180
    assert abs(ls.gpu_hours(989e12 * .4 * 3600) - 1) < 1e-12 and abs(ls.gpu_hours(3600., 1., 1.) - 1) < 1e-12

@pytest.mark.parametrize('bad, says', [(lambda: ls.Design(30, 16, (4, 4)), 'divisor'), (lambda: ls.Design(32, 16, (4, 4), last=True), 'none below 0'), (lambda: ls.Design(32, 16, (4,)), 'two sizes'),
    (lambda: ls.design_flops(ls.DESIGNS['FLUX.1'], 0), 'one place'), (lambda: ls.design_flops(ls.DESIGNS['FLUX.1'], 4, -1), 'no words'), (lambda: ls.training_bytes(-1), 'none below 0'),
    (lambda: ls.gpu_hours(1., share=0.), 'share'), (lambda: ls.gpu_hours(1., peak=0.), 'peak'), (lambda: ls.video_tokens(12, 64, 64), 'multiples'), (lambda: ls.video_tokens(0, 64, 64), 'multiples')])
def test_bad_numbers_are_refused(bad, says):
    with pytest.raises(ValueError, match=says): bad()

# ---- clips ------------------------------------------------------------------------------------------------------------------------

def test_movie_gen_sees_73_thousand_tokens(): assert ls.video_tokens(256, 768, 768) == 73_728

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
def test_patches_are_a_convolution(t, h, w, i, p):
    x, conv = torch.randn(2, 3, t * i, h * p, w * p, dtype=double), nn.Conv3d(3, 5, (i, p, p), stride=(i, p, p)).double()
    tokens = ls.patchify3d(x, i, p)
    agree(tokens @ conv.weight.flatten(1).T + conv.bias, conv(x).flatten(2).mT, atol=1e-10)
    assert torch.equal(ls.unpatchify3d(tokens, i, p, (t, h, w)), x) and tokens.shape[1] == ls.video_tokens(t * i, h * p, w * p, (1, 1, 1), (i, p, p))

def test_clips_that_cannot_be_cut_are_refused():
    for shape in ((2, 3, 8, 8), (2, 3, 5, 8, 8), (2, 3, 4, 9, 8)):
        with pytest.raises(ValueError, match='multiple'): ls.patchify3d(torch.zeros(shape), 2, 4)

def test_toys_move_as_they_are_labelled():
    x, told, at = ls.clips(split_seeds('test', 0, 32))
    assert x.shape == (32, 3, 8, 64, 64) and x.abs().max() <= 1 and set(told[:, 2].tolist()) == {0, 1, 2, 3} and set(told[:, 3].tolist()) == {0, 1}
    step = ls.HEADINGS[told[:, 2]] * torch.tensor(ls.PACES)[told[:, 3], None]
    assert (at.diff(dim=1) == step[:, None]).all() and at.min() >= 16 and at.max() <= 48
    agree(ls.centroids(x).diff(dim=1), step[:, None].expand(-1, 7, -1).double(), atol=.3)
    again = ls.clips(split_seeds('test', 20, 3))
    assert torch.equal(again[0], x[20:23]) and torch.equal(again[1], told[20:23])
    assert (ls.seen_in(x, told)['right way'] == 1).all()

@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 99))
def test_motion_of_straight_and_of_shaken_paths(a, b, seed):
    k, shake = torch.arange(8.), torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))
    c = torch.stack([3 + a * k, 5 + b * k], 1)
    v, jerk = ls.motion(torch.stack([c, c + shake]))
    agree(v[0], [a, b], atol=1e-4); assert jerk[0] < 1e-3
    want = (shake[2:] - 2 * shake[1:-1] + shake[:-2]).square().sum(1).mean().sqrt()
    agree(jerk[1], want, atol=1e-3)

@cache
def true_films():
    x, told, _ = ls.clips(split_seeds('test', 0, 16))
    return x, told, ls.seen_in(x, told)

@pytest.mark.parametrize('mistake', ['other way', 'other pace', 'other toy', 'other colour', 'toy changes', 'jumps', 'shaken ground'])
def test_what_is_wrong_with_a_film_is_seen(mistake):
    x, told, good = true_films()
    said = told.clone()
    if mistake == 'other way': said[:, 2] = (told[:, 2] + 2) % 4
    elif mistake == 'other pace': said[:, 3] = 1 - told[:, 3]
    elif mistake == 'other toy': said[:, 0] = (told[:, 0] + 1) % 8
    elif mistake == 'other colour': said[:, 1] = (told[:, 1] + 1) % 9
    elif mistake == 'toy changes': x = torch.where((torch.arange(8) < 4)[:, None, None], x, x.roll(1, 0))
    elif mistake == 'jumps': x = x[:, :, torch.tensor([0, 4, 2, 6, 1, 5, 3, 7])]
    else: x = (x + .1 * torch.randn(16, 1, 8, 1, 1)).clamp(-1, 1)
    figure, worse = {'other way': ('right way', -1), 'other pace': ('error of pace', 1), 'other toy': ('right toy', -1), 'other colour': ('right colour', -1), 'toy changes': ('one toy throughout', -1), 'jumps': ('jerkiness', 1), 'shaken ground': ('restless ground', 1)}[mistake]
    bad = ls.seen_in(x, said)[figure].double().mean(), good[figure].double().mean()
    assert worse * (bad[0] - bad[1]) > .05

def test_bad_clips_are_refused():
    with pytest.raises(ValueError, match='expected clips'): ls.centroids(torch.zeros(2, 8, 3, 16, 16))

# ---- the generator ----------------------------------------------------------------------------------------------------------------

def shaken(together, seed=0):
    torch.manual_seed(seed)
    m = ls.VideoDiT(d=32, depth=2, heads=2, together=together).double().requires_grad_(False)
    for q in m.parameters(): nn.init.normal_(q, std=.2)
    return m

def test_only_frames_that_look_together_know_each_other():
    xt, t, y = torch.randn(2, 4, 8, 16, 16, dtype=double), torch.tensor([.2, .9], dtype=double), torch.tensor([[1, 2, 3, 1], [0, 0, 0, 0]])
    other = xt.clone(); other[:, :, 6] = 0
    for together in (True, False):
        m = shaken(together)
        moved = (m(xt, t, y) - m(other, t, y)).abs().amax((0, 1, 3, 4))
        assert moved[6] > 1e-3 and ((moved[:6] > 1e-6).all() if together else (moved[[0, 1, 2, 3, 4, 5, 7]] < 1e-12).all())

def test_a_frame_knows_which_one_it_is_and_what_is_asked():
    m, t = shaken(False), torch.tensor([.5], dtype=double)
    same = torch.randn(1, 4, 1, 16, 16, dtype=double).expand(-1, -1, 8, -1, -1)
    v = m(same, t, torch.tensor([[1, 2, 3, 1]]))
    assert (v[:, :, 1:] - v[:, :, :-1]).abs().amax((0, 1, 3, 4)).min() > 1e-3
    for k in range(4):
        y = torch.tensor([[1, 2, 3, 1]]); y[0, k] = 0
        assert (m(same, t, y) - v).abs().max() > 1e-3

def test_training_and_imagining_repeat_themselves():
    data = ls.clip_rows(0, 16)
    assert data['z'].shape == (16, 4, 8, 16, 16) and torch.equal(data['z'][5:7], ls.clip_rows(5, 2)['z']) and torch.equal(data['told'].long(), ls.clips(split_seeds('train', 0, 16))[1])
    ends = []
    for _ in range(2):
        cfg = replace(ls.VIDEO['CPU'], d=32, depth=1, steps=3, batch=8)
        m = ls.build_video(cfg)
        log = list(ls.learn_video(m, cfg, data, progress=False))
        ends.append((log[-1].loss, ls.imagine(m.eval(), ls.wishes_to_see(2), steps=2)))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1]) and ends[0][1].shape == (2, 3, 8, 64, 64) and len(log) == 3
    with pytest.raises(ValueError, match='trains video'): ls.train_video('film', ls.VIDEO['CPU'])

def test_the_shipped_generator_moves_toys():
    model, facts = ls.load_video()
    assert facts['config'] == asdict(ls.VIDEO['CPU'])
    from latentcourse.lib.checkpoint import check_figures, figure
    check_figures('video', facts['evaluation'], {k: figure(v.double()) for k, v in ls.examine_video(model, 16, 500).items()})
    told = ls.wishes_to_see(12, 5)
    assert ls.seen_in(ls.imagine(model, told, steps=6), told)['right way'].mean() > .7

# ---- what comes next --------------------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.floats(-2.5, 2.5))
def test_rank_is_kept(z):
    x = ls.quantile_map(HILLS, torch.tensor([[z]], dtype=double))
    below = (HILLS.weights * torch.special.ndtr((x[0] - HILLS.mu[:, 0]) / HILLS.std)).sum()
    agree(below, torch.special.ndtr(torch.tensor(z, dtype=double)), atol=1e-9)

def test_straight_paths_do_not_bend():
    z = torch.randn(20, 2, dtype=double)
    assert ls.bend([z + k / 9 for k in range(10)]).max() < 1e-20
    assert ls.bend([z + (k / 9)**2 for k in range(10)]).min() > .1
    assert ls.bend([z, *euler(exact_field(TOWNS, LINEAR), z, times(30))]).mean() > .5

def test_average_velocity_arrives():
    z = torch.randn(30, 1, dtype=double)
    middle = ls.quantile_map(ls.pushed(HILLS, LINEAR, .4), z)
    agree(middle + .6 * ls.average_velocity(HILLS, z, .4, 1.), ls.quantile_map(HILLS, z), atol=1e-8)
    agree(middle + .3 * ls.average_velocity(HILLS, z, .4, .7), last(heun(exact_field(HILLS, LINEAR), middle, times(100, .4, .7))), atol=2e-4)
    with pytest.raises(ValueError, match='expected 1'): ls.quantile_map(TOWNS, z)

def law(seed, v=2, n=3):
    p = torch.rand((v,) * n, generator=torch.Generator().manual_seed(seed), dtype=double) + .05
    return p / p.sum()

@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.sampled_from([(2, 2), (3, 2), (2, 3)]))
def test_masked_generators_by_hand(seed, shape):
    p = law(seed, *shape)
    agree(ls.guesses(p, (1,) + (-1,) * (p.ndim - 1))[1], p[1].reshape(len(p), -1).sum(1) / p[1].sum(), atol=1e-12)
    agree(ls.masked_loss(p, 1.), sum(-(q * q.log()).sum() for q in (p.sum([j for j in range(p.ndim) if j != i]) for i in range(p.ndim))), atol=1e-10)
    for n in (1, 3): agree(ls.unmasked_law(p, times(n)).sum(), 1., atol=1e-12)
    flat = torch.full_like(p, 1 / p.numel())
    agree(ls.unmasked_law(flat, times(1)), flat, atol=1e-12)                                        # words that do not care for each other may come at once

def test_the_masked_loss_is_the_entropy():
    p, m = law(3, 3, 3), torch.linspace(0, 1, 2_001, dtype=double)
    values = torch.tensor([ls.masked_loss(p, float(s)) / float(s) for s in m[1:]] , dtype=double)
    agree(torch.trapezoid(torch.cat([values[:1], values]), m), -(p * p.log()).sum(), atol=2e-3)

@pytest.mark.parametrize('mistake', ['modulation twice', 'no offsets', 'rolled the wrong way', 'frames and rows mixed', 'words drawn together'])
def test_mistakes_are_noticed(mistake, monkeypatch):
    if mistake in ('modulation twice', 'no offsets'):
        g, name, config = small('flux')
        right, theirs = ls.matrices, sum(q.numel() for q in build(name, config).parameters())
        if mistake == 'modulation twice': monkeypatch.setattr(ls, 'matrices', lambda g: ((p, w, (1 + (p == 'modulation')) * k, a, b) for p, w, k, a, b in right(g)))
        assert total(replace(g, bias=mistake != 'no offsets')) != theirs
    elif mistake == 'frames and rows mixed':
        x, conv = torch.randn(1, 3, 4, 4, 4), nn.Conv3d(3, 5, (1, 2, 2), stride=(1, 2, 2))
        wrong = ls.patchify3d(x.mT.swapaxes(2, 3), 1, 2)
        assert (wrong @ conv.weight.flatten(1).T + conv.bias - conv(x).flatten(2).mT).abs().max() > .1
    elif mistake == 'rolled the wrong way':
        x, told, _ = ls.clips(split_seeds('test', 0, 24))
        right = ls.to_the_middle
        monkeypatch.setattr(ls, 'to_the_middle', lambda x, c: right(x, 64 - c))
        assert ls.seen_in(x, told)['right toy'].mean() < .95
    else:
        p, far = law(1), lambda n: (ls.unmasked_law(law(1), times(n)) - law(1)).abs().sum()
        assert far(8) < far(2) < far(1)
