"The vision transformer: its layout, its places, its twin in torchvision, its shipped weights, its measures, and its refusals."
import math
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse import vit as vt
from latentcourse.lib.check import agree
from latentcourse.lib.checkpoint import check_figures, figure
from latentcourse.lib.study import load_study
from latentcourse.toybox import backdrop, draw, split_seeds

double = torch.float64

@pytest.fixture(scope='module')
def shipped(): return vt.load_vit()

def small(**how): return vt.ViT(12, 4, 10, 2, 2, classes=3, **how).to(double)

def noisy(model): # torchvision's start leaves [CLS] and head at zero, and zeros hide mistakes
    for q in model.parameters(): nn.init.normal_(q, std=.3)
    return model

def torchvision_twin(**how):
    from torchvision.models import VisionTransformer
    return noisy(VisionTransformer(**(dict(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5) | how)).to(double).eval())

# ---- patches ------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_cut_and_laid_out_again(b, c, rows, columns, p):
    x = torch.randn(b, c, rows * p, columns * p)
    words = vt.patchify(x, p)
    assert words.shape == (b, rows * columns, c * p * p) and torch.equal(vt.unpatchify(words, p, rows), x)
    i = rows * columns - 1
    assert torch.equal(words[:, i], x[:, :, -p:, -p:].flatten(1)) and torch.equal(words[:, 0], x[:, :, :p, :p].flatten(1))
    if rows == columns: assert torch.equal(vt.unpatchify(words, p), x)

def test_embedding_is_a_convolution_with_that_stride():
    x, E = torch.randn(2, 3, 12, 20, dtype=double), torch.randn(7, 3, 4, 4, dtype=double)
    assert agree(vt.patchify(x, 4) @ E.flatten(1).T, rearrange(F.conv2d(x, E, stride=4), 'b d h w -> b (h w) d'), atol=1e-12) < 1e-12

def test_patch_order_wrong_is_caught():
    "Channels last, or columns first, is another function than torchvision's."
    theirs, x = torchvision_twin(), torch.randn(2, 3, 32, 32, dtype=double)
    ours, right = vt.vit_from_torchvision(theirs), vt.patchify
    for wrong in ('b c (h p) (w q) -> b (h w) (p q c)', 'b c (h p) (w q) -> b (w h) (c p q)', 'b c (h p) (w q) -> b (h w) (c q p)'):
        try:
            vt.patchify = lambda v, p: rearrange(v, wrong, p=p, q=p)
            with pytest.raises(AssertionError): agree(ours(x), theirs(x), atol=1e-6)
        finally: vt.patchify = right
    agree(ours(x), theirs(x), atol=1e-9)

# ---- the twin in torchvision ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', [{}, dict(image_size=24, patch_size=4, num_layers=1, num_heads=2), dict(num_classes=2, mlp_dim=64)])
def test_equals_torchvision(how):
    theirs = torchvision_twin(**how)
    ours, side = vt.vit_from_torchvision(theirs), how.get('image_size', 32)
    x = torch.randn(2, 3, side, side, dtype=double, requires_grad=True)
    assert agree(ours(x), theirs(x), atol=1e-9) < 1e-9 and not ours.training
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (ours, theirs)]
    assert agree(*grads, atol=1e-8) < 1e-8
    state = vt.torchvision_state(ours)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()} and all(torch.equal(v, state[k]) for k, v in theirs.state_dict().items())

def test_vit_b_16_in_full():
    from torchvision.models import vit_b_16
    theirs = vit_b_16().to(double).eval()
    nn.init.normal_(theirs.heads.head.weight, std=.02)
    ours, x = vt.vit_from_torchvision(theirs), torch.randn(1, 3, 224, 224, dtype=double)
    with torch.no_grad(): assert agree(ours(x), theirs(x), atol=1e-6) <= 1e-6
    assert sum(q.numel() for q in ours.parameters()) == vt.vit_parameters(224, 16, 768, 12, 1000) == 86_567_656

def mutate_cls(m): m.forward = lambda x: m.head(m.tokens(x)[:, -1])                    # reads the last patch
def mutate_mean(m): m.forward = lambda x: m.head(m.tokens(x).mean(1))                  # reads everybody
def mutate_places(m): m.places.data.zero_()
def mutate_order(m): m.places.data = m.places.data[:, [0, *range(16, 0, -1)]]
def mutate_cls_place(m): m.places.data[:, 0] = 0
def mutate_norm(m): m.blocks.norm = nn.Identity()
def mutate_eps(m):
    for k in m.modules():
        if isinstance(k, nn.LayerNorm): k.eps = 1e-3

@pytest.mark.parametrize('mutate', [mutate_cls, mutate_mean, mutate_places, mutate_order, mutate_cls_place, mutate_norm, mutate_eps])
def test_mutations_of_the_network_are_caught(mutate):
    theirs, x = torchvision_twin(), torch.randn(2, 3, 32, 32, dtype=double)
    ours = vt.vit_from_torchvision(theirs)
    mutate(ours)
    with pytest.raises(AssertionError): agree(ours(x), theirs(x), atol=1e-6)

def test_without_places_the_picture_is_a_bag():
    vit, x, order = noisy(small()), torch.randn(2, 3, 12, 12, dtype=double), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    mixed = vt.unpatchify(vt.patchify(x, 4)[:, order], 4)
    assert (vit(mixed) - vit(x)).abs().max() > 1e-4
    vit.places.data[:, 1:] = .3
    agree(vit(mixed), vit(x), atol=1e-10)

@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.none() | st.integers(1, 9))
def test_parameters_counted(patch, rows, depth, width, classes):
    vit = vt.ViT(patch * rows, patch, 4 * width, depth, 2, classes=classes)
    assert sum(q.numel() for q in vit.parameters()) == vt.vit_parameters(patch * rows, patch, 4 * width, depth, classes)

# ---- places for other sizes -----------------------------------------------------------------------------------------------------------

def test_places_of_the_same_size_are_left_alone():
    places = torch.randn(1, 17, 3)
    assert vt.resize_places(places, 4, 4) is places

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 7))
def test_enlarged_places(h, w, side):
    "[CLS] stays, constants stay, a ramp keeps its mean, rows and columns trade places."
    places = torch.randn(1, 1 + side**2, 5, dtype=double)
    new = vt.resize_places(places, h, w)
    assert new.shape == (1, 1 + h * w, 5) and torch.equal(new[:, 0], places[:, 0])
    agree(vt.resize_places(torch.full((1, 1 + side**2, 2), .7, dtype=double), h, w), .7, atol=1e-12)
    flip = lambda p, r, c: torch.cat([p[:, :1], rearrange(p[:, 1:], '1 (r c) d -> 1 (c r) d', r=r, c=c)], 1)
    agree(vt.resize_places(flip(places, side, side), w, h), flip(new, h, w), atol=1e-10)

def test_against_pillow():
    "Pillow's bicubic filter has the same kernel, and widens it too when it shrinks."
    import numpy as np
    from PIL import Image
    places = torch.randn(1, 65, 1)
    for h, w in ((12, 12), (5, 8), (16, 3)):
        by_pillow = torch.tensor(np.array(Image.fromarray(rearrange(places[0, 1:, 0], '(r c) -> r c', r=8).numpy(), 'F').resize((w, h), Image.Resampling.BICUBIC)))
        agree(vt.resize_places(places, h, w)[0, 1:, 0], by_pillow.flatten(), atol=1e-5)

def test_interpolation_with_cls_in_the_map_is_caught():
    "The classic mistake: to resize all rows of the table, [CLS] among them."
    places = torch.randn(1, 17, 3, dtype=double)
    naive = rearrange(F.interpolate(rearrange(places, '1 n d -> 1 d n'), 37, mode='linear'), '1 d n -> 1 n d')
    with pytest.raises(AssertionError): agree(vt.resize_places(places, 6, 6), naive, atol=1e-3)
    assert not torch.equal(naive[:, 1], vt.resize_places(places, 6, 6)[:, 1])

def test_reads_other_sizes():
    vit = noisy(small())
    for h, w in ((12, 12), (16, 8), (4, 4), (24, 36)): assert vit(torch.randn(1, 3, h, w, dtype=double)).shape == (1, 3)

# ---- what is shipped, and what was recorded ----------------------------------------------------------------------------------------------

def test_shipped_figures_hold(shipped):
    vit, facts = shipped
    again = {a: figure(v.double()) for a, v in vt.examine_vit(vit, n=400, start=50_000).items()}
    assert set(again) == set(facts['evaluation']) and check_figures('vit', facts['evaluation'], again) < 5
    assert facts['evaluation']['toy']['mean'] > .75 and facts['evaluation']['toy']['n'] >= 2_000

def test_shipped_file_is_small():
    from pathlib import Path
    assert (Path(vt.__file__).parent / 'checkpoints' / 'vit.safetensors').stat().st_size <= 1.5e6

def test_killed_and_resumed_is_the_same(tmp_path):
    cfg = replace(vt.VIT['CPU'], d=16, depth=1, steps=6, batch=4)
    def end(*stops):
        out = tmp_path / '-'.join(map(str, stops or ['whole']))
        for stop in (*stops, None):
            model = vt.build_vit(cfg)
            for i, r in enumerate(vt.learn_vit(model, cfg, out=out, resume=True, progress=False)):
                if stop is not None and i + 1 == stop: break
        return model.state_dict()
    whole = end()
    assert all(torch.equal(v, whole[k]) for k, v in end(3).items())

def test_training_asks_for_what_it_says():
    labels = torch.tensor([[0, 3, 5, 8, 2, 0, -1, -1, -1, -1]])
    assert abs(vt.asked_loss(torch.zeros(1, 8), labels, 'toy') - math.log(8)) < 1e-6
    logits = torch.zeros(1, 8 + 5)
    logits[0, 5], logits[0, 8 + 3] = 50., 50.                                          # toy 5, background 3
    assert vt.asked_loss(logits, labels, 'toy+background') < 1e-6 < vt.asked_loss(logits, labels.roll(1, 1), 'toy+background')

def test_lone_scenes_hold_one_toy():
    scene = vt.lone(split_seeds('valid', 0, 300))
    assert (scene.labels[:, 6] == -1).all() and set(scene.labels[:, 0].tolist()) == {0, 1, 2}
    for a, (k, answers) in vt.QUESTIONS.items(): assert set(scene.labels[:, k].tolist()) == set(range(len(answers))), a

def test_studies_are_recorded():
    for study in (vt.SIZE_STUDY, vt.PROBE_STUDY): assert all(len(r['seeds']) == 3 for r in load_study(study).rows())

def test_equal_parameters_in_the_study():
    rows = load_study(vt.SIZE_STUDY).rows()
    for data in vt.SIZES_TRIED:
        cnn, vit = ({r['values']['parameters'][0] for r in rows if r['settings']['net'] == net and r['settings']['data'] == data} for net in ('cnn', 'vit'))
        assert len(cnn) == len(vit) == 1 and abs(cnn.pop() / vit.pop() - 1) < .1

def test_shuffled_digits_are_the_same_patches():
    "The same order for every picture and every seed, and the answers unmoved."
    plain, mixed = vt.sized_data('digits', 50, 3), vt.sized_data('shuffled', 50, 3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for i in (0, 2): assert torch.equal(vt.patchify(mixed[i], 2), vt.patchify(plain[i], 2)[:, order]) and torch.equal(mixed[i + 1], plain[i + 1])
    with pytest.raises(ValueError, match='expected toys, digits or shuffled'): vt.sized_data('toy', 50, 0)

def test_learned_and_asked_pictures_differ():
    for data in ('toys', 'digits'):
        x, y, test, want = vt.sized_data(data, 200, 1)
        assert len(x) == len(y) == 200 and len(test) == len(want) and not (set(map(tuple, x.flatten(1).tolist())) & set(map(tuple, test.flatten(1).tolist())))

# ---- measures -----------------------------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(0, 99))
def test_rollout_is_a_chain_of_shares(depth, heads, n, seed):
    maps = torch.randn(depth, 2, heads, n, n, dtype=double, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    R = vt.rollout(maps)
    agree(R.sum(-1), 1., atol=1e-10)
    assert (R >= 0).all()
    by_powers = torch.eye(n, dtype=double)
    for A in maps[:, 0].mean(1): by_powers = .5 * (torch.eye(n) + A) @ by_powers        # the first block acts first
    agree(R[0], by_powers, atol=1e-10)
    nobody = torch.eye(n, dtype=double).expand(depth, 1, heads, n, n)
    agree(vt.rollout(nobody)[0], torch.eye(n), atol=1e-12)

def test_rollout_mutations_are_caught():
    maps = torch.randn(3, 1, 2, 5, 5, dtype=double).softmax(-1)
    R, A = vt.rollout(maps)[0], maps[:, 0].mean(1)
    eye = torch.eye(5, dtype=double)
    for wrong in (A[2] @ A[1] @ A[0], .5 * (eye + A[0]) @ (.5 * (eye + A[1])) @ (.5 * (eye + A[2])), .5 * (eye + A[2])):
        with pytest.raises(AssertionError): agree(R, wrong, atol=1e-3)                  # no residual, wrong order, last block alone

def test_attention_maps_are_those_the_blocks_use(shipped):
    vit, x = shipped[0], draw(vt.lone(split_seeds('test', 0, 2)))
    with torch.no_grad():
        maps, levels = vt.attention_maps(vit, x), vt.depth_features(vit, x, batch=1)
        assert maps.shape == (4, 2, 4, 65, 65) and len(levels) == 5
        agree(vit.head(vit.blocks.norm(levels[-1])[:, 0]), vit(x), atol=1e-4)
        block, words = vit.blocks.blocks[2], levels[2]
        q, k, v = block.own.qkv(block.norms[0](words))
        by_maps = words + block.own.out(rearrange(maps[2] @ v, 'b g n d -> b n (g d)'))
        by_maps = by_maps + block.feed(block.norms[1](by_maps))
        agree(by_maps, levels[3], atol=1e-4)

def test_mask_is_where_the_toy_is():
    "Most of what differs from the empty background lies inside the circle, and no toy fills less than a third of it."
    scene = vt.lone(split_seeds('test', 500, 50))
    empty = rearrange(backdrop(scene, 64), 'b h w c -> b c h w').clamp(0, 1) * 2 - 1
    changed = ((draw(scene) - empty).abs().amax(1, keepdim=True) > .25).float()
    fine = rearrange(vt.toy_mask(scene, 64, 4), 'b (h w) -> b 1 h w', h=64)
    inside = (changed * fine).sum((1, 2, 3))
    assert (inside / changed.sum((1, 2, 3))).mean() > .8 and (inside / fine.sum((1, 2, 3))).min() > 1/3
    agree(rearrange(F.avg_pool2d(fine, 8), 'b 1 h w -> b (h w)'), vt.toy_mask(scene), atol=.03)

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(.01, 100))
def test_mass(seed, scale):
    g = torch.Generator().manual_seed(seed)
    share, mask = torch.rand(3, 9, generator=g, dtype=double) + .01, torch.rand(3, 9, generator=g, dtype=double)
    got = vt.mass_on(share, mask)
    agree(vt.mass_on(scale * share, mask), got, atol=1e-12)
    agree(got + vt.mass_on(share, 1 - mask), 1., atol=1e-12)
    assert (got >= mask.amin(1) - 1e-9).all() and (got <= mask.amax(1) + 1e-9).all()

def test_probe_reads_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    labels = torch.full((1_200, 10), 0)
    labels[:, 2], labels[:, 1] = torch.randint(8, (1_200,), generator=g), torch.randint(5, (1_200,), generator=g)
    features = 3 + 5 * F.one_hot(labels[:, 2], 8).double() @ torch.randn(8, 12, generator=g, dtype=double) + .1 * torch.randn(1_200, 12, generator=g, dtype=double)
    assert vt.probe_accuracy(features, labels, 'toy') > .99 and vt.probe_accuracy(features, labels, 'background') < .32
    W, c = vt.linear_probe(features, labels[:, 2], 8, decay=.1)
    Wc = torch.cat([W, c[:, None]], 1).requires_grad_()                                # convex: at the best W the slope is zero
    loss = F.cross_entropy(features @ Wc[:, :-1].T + Wc[:, -1], labels[:, 2]) + .05 * (Wc[:, :-1] * features.std(0)).square().sum()
    assert torch.autograd.grad(loss, Wc)[0].abs().max() < 1e-4

# ---- refusals -----------------------------------------------------------------------------------------------------------------------

def test_refusals(shipped):
    vit, x = shipped[0], torch.zeros(2, 3, 64, 64)
    for bad in (x[0], x[:0], x[..., :60]):
        with pytest.raises(ValueError, match='expected'): vt.patchify(bad, 8)
        with pytest.raises(ValueError, match='expected'): vit(bad)
    with pytest.raises(ValueError, match='expected pictures'): vit(x[:, :1])
    with pytest.raises(ValueError, match='expected'): vt.patchify(x, 0)
    for bad in (torch.zeros(2, 16), torch.zeros(2, 16, 190), torch.zeros(0, 16, 192)):
        with pytest.raises(ValueError, match='expected'): vt.unpatchify(bad, 8)
    with pytest.raises(ValueError, match='number of rows'): vt.unpatchify(torch.zeros(2, 15, 192), 8)
    with pytest.raises(ValueError, match='rows'): vt.unpatchify(torch.zeros(2, 15, 192), 8, 4)
    with pytest.raises(ValueError, match='square'): vt.resize_places(torch.zeros(1, 16, 4), 2, 2)
    with pytest.raises(ValueError, match='first'): vt.resize_places(torch.zeros(2, 17, 4), 2, 2)
    with pytest.raises(ValueError, match='1 or more'): vt.resize_places(torch.zeros(1, 17, 4), 0, 2)
    with pytest.raises(ValueError, match='divisor'): vt.ViT(30, 8)
    with pytest.raises(ValueError, match='divisor'): vt.ViT(32, 8, d=10, heads=3)
    with pytest.raises(ValueError, match='divisor'): vt.vit_parameters(30, 8, 4, 1)
    with pytest.raises(TypeError, match='VisionTransformer'): vt.vit_from_torchvision(nn.Linear(2, 2))
    with pytest.raises(TypeError, match='norm before'): vt.torchvision_state(small(pre=True))
    with pytest.raises(ValueError, match='expected names'): vt.build_vit(replace(vt.VIT['CPU'], labels='toy+smell'))
    with pytest.raises(ValueError, match='expected vit'): vt.train_vit('vat', vt.VIT['CPU'])
    with pytest.raises(ValueError, match='one scene'): vt.examine_vit(vit, n=0)
    with pytest.raises(ValueError, match='expected'): vt.rollout(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match='sum to 1'): vt.rollout(torch.ones(1, 1, 1, 3, 3))
    with pytest.raises(ValueError, match='expected'): vt.cls_share(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match='same'): vt.mass_on(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match='negative'): vt.mass_on(-torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match='expected'): vt.linear_probe(torch.zeros(3, 2), torch.zeros(4, dtype=torch.long), 2)
    with pytest.raises(ValueError, match='finite'): vt.linear_probe(torch.full((3, 2), math.nan), torch.zeros(3, dtype=torch.long), 2)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_the_gpu(shipped):
    vit, x = shipped[0], draw(vt.lone(split_seeds('test', 0, 4)))
    here, there = vit(x), vit.to('cuda')(x.cuda())
    agree(there, here, atol=1e-2)
    agree(vt.rollout(vt.attention_maps(vit, x.cuda())), vt.rollout(vt.attention_maps(vit.cpu(), x)), atol=1e-3)
    for _ in vt.learn_vit(vit, replace(vt.VIT['CPU'], steps=2), progress=False): pass
    vit.cpu()
