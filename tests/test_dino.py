"Learning without labels: views, losses, collapse, training, neighbours, and what is shipped."
import math
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from latentcourse import dino as dn
from latentcourse.lib.checkpoint import check_figures, figure
from latentcourse.lib.study import load_study
from latentcourse.toybox import draw, split_seeds

double = torch.float64
TINY = dn.DinoCfg(d=16, depth=1, prototypes=8, steps=4, batch=8)

# ---- views --------------------------------------------------------------------------------------------------------------------------

def test_the_whole_box_is_the_picture_and_a_negative_width_mirrors():
    x = torch.rand(3, 3, 16, 16, dtype=double)
    whole = torch.tensor([[0., 0., 1., 1.]], dtype=double).expand(3, 4)
    assert torch.allclose(dn.cut(x, whole, 16), x, atol=1e-12)
    assert torch.allclose(dn.cut(x, whole * torch.tensor([1., 1., -1., 1.], dtype=double), 16), x.flip(3), atol=1e-12)

@settings(max_examples=25, deadline=None)
@given(st.floats(.05, 1.), st.floats(0., 1.), st.integers(1, 40))
def test_boxes_lie_inside_and_have_their_share(low, more, n):
    area = low, low + more * (1 - low)
    b = dn.boxes(n, area)
    assert ((b[:, :2].abs() + b[:, 2:].abs()) <= 1 + 1e-5).all()
    share = (b[:, 2] * b[:, 3]).abs()
    assert (share <= area[1] + 1e-5).all() and (share >= min(area[0], .75) - 1e-5).all()      # a side that would stick out is cut

def test_half_of_the_boxes_are_mirrored():
    flips = (dn.boxes(4_000, (.3, .6))[:, 2] < 0).double().mean().item()
    assert abs(flips - .5) < 5 * .5 / 4_000**.5

def test_hues_are_turned_and_nothing_else():
    R = dn.hue_turn(torch.linspace(-3, 3, 9, dtype=double))
    eye = torch.eye(3, dtype=double).expand(9, 3, 3)
    assert torch.allclose(R @ R.mT, eye, atol=1e-12) and torch.allclose(torch.linalg.det(R), torch.ones(9, dtype=double))
    assert torch.allclose(R @ torch.ones(3, dtype=double), torch.ones(9, 3, dtype=double)) and torch.allclose(R @ R.flip(0), eye, atol=1e-12)

def test_recoloured_pictures_stay_pictures():
    x = draw(dn.single(torch.arange(16)), 32)
    y = dn.recolour(x, spread=.9)
    assert y.shape == x.shape and y.abs().max() <= 1 and (y != x).flatten(1).any(1).all()
    grey = dn.recolour(x, grey=1.)
    assert (grey - grey.mean(1, keepdim=True)).abs().max() < 1e-5

def test_elsewhere_changes_the_ground_alone_and_is_the_same_in_any_batch():
    scene = dn.single(torch.arange(200))
    there = dn.elsewhere(scene)
    assert (scene.labels[:, [0, *range(2, 10)]] == there.labels[:, [0, *range(2, 10)]]).all()
    same = (scene.labels[:, 1] == there.labels[:, 1]).double().mean().item()                  # five grounds, drawn again
    assert abs(same - .2) < 5 * (.16 / 200)**.5
    assert torch.equal(dn.elsewhere(dn.single(torch.arange(50, 60))).offset, there.offset[50:60])
    inside = (dn.draw(scene, 64) - dn.draw(there, 64)).abs()[:, :, 28:36, 28:36].flatten(1).median(1).values
    plain = scene.labels[:, 4] != 4                                                           # strands of plush are drawn anew
    assert (inside[plain] < .02).double().mean() > .95                                        # the toy's middle is the same paint
    assert all(torch.equal(getattr(there, k), getattr(scene, k)) for k in ('place', 'turn', 'coat', 'second', 'phase'))

# ---- the loss -----------------------------------------------------------------------------------------------------------------------

def loss_of(p, s, temperature=.1, own=False, order=False):
    "(6.23) by loops, or with a historic mistake."
    m, b = len(s), p.shape[1]
    out = torch.zeros(b, dtype=p.dtype)
    for i in range(2):
        for j in range(m):
            if i != j or own: out = out - (p[i] * (s[j] / temperature).log_softmax(-1)).sum(-1) if not order else out - ((s[j] / temperature).softmax(-1) * p[i].log()).sum(-1)
    return out / (2 * m if own else 2 * (m - 1))

def test_loss_is_the_sum_over_other_views():
    p, s = torch.randn(2, 6, 5, dtype=double).softmax(-1), torch.randn(4, 6, 5, dtype=double)
    got = dn.dino_losses(p, s)
    assert torch.allclose(got, loss_of(p, s), atol=1e-12)
    for wrong in (dict(own=True), dict(order=True)): assert not torch.allclose(got, loss_of(p, s, **wrong), atol=1e-3)

def test_loss_is_least_at_the_teachers_answer():
    p = torch.randn(1, 4, 6, dtype=double).softmax(-1).expand(2, -1, -1)
    best = .1 * p.log()
    at = dn.dino_losses(p, torch.cat([best, best]))
    assert torch.allclose(at, -(p[0] * p[0].log()).sum(-1), atol=1e-10)
    for _ in range(20): assert (dn.dino_losses(p, torch.cat([best, best]) + .05 * torch.randn(4, 4, 6, dtype=double)) >= at - 1e-12).all()

def test_centre_then_sharpen():
    t, c = torch.randn(5, 7, dtype=double), torch.randn(7, dtype=double)
    p = dn.teacher_says(t, c, .2)
    assert torch.allclose((p.log() * .2 + c) - (p.log() * .2 + c).mean(-1, keepdim=True), t - t.mean(-1, keepdim=True), atol=1e-10)
    assert dn.told_by(dn.teacher_says(t, c, .01))[1] < dn.told_by(p)[1] < dn.told_by(dn.teacher_says(t, c, 10.))[1]

def test_information_is_zero_for_both_collapses_and_log_n_for_a_code():
    uniform, one = torch.full((6, 6), 1 / 6, dtype=double), F.one_hot(torch.zeros(6, dtype=torch.int64), 6).double()
    for p, want in ((uniform, 0.), (one, 0.), (torch.eye(6, dtype=double), math.log(6))):
        spread, entropy = dn.told_by(p)
        assert abs((spread - entropy).item() - want) < 1e-12

# ---- training -----------------------------------------------------------------------------------------------------------------------

def test_every_parameter_learns_and_the_teacher_gets_no_gradient():
    student = dn.build_dino(replace(TINY, decay=0.))                                          # decay would move a matrix that nothing reads
    before = {k: v.clone() for k, v in student.named_parameters()}
    ema = dn.teacher_of(student, .9)
    for _ in dn.learn_dino(student, replace(TINY, decay=0.), ema, progress=False): pass
    still = [k for k, v in student.named_parameters() if torch.equal(v.cpu(), before[k])]
    assert not still, still
    assert all(q.grad is None for q in ema.module.parameters()) and torch.equal(ema.module.center, student.center) and student.center.abs().max() > 0

def test_no_centring_leaves_the_centre_alone_and_momentum_zero_copies_the_student():
    cfg = replace(TINY, centred=False, momentum=0.)
    student = dn.build_dino(cfg)
    ema = dn.teacher_of(student, cfg.momentum)
    for _ in dn.learn_dino(student, cfg, ema, progress=False): pass
    assert not student.center.any() and all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), student.parameters()))

def test_training_is_repeatable_and_resumes(tmp_path):
    def run(steps=None, **how):
        student = dn.build_dino(TINY)
        ema, log = dn.teacher_of(student, TINY.momentum), []
        for r in dn.learn_dino(student, TINY, ema, progress=False, **how):
            log.append(r.loss)
            if len(log) == steps: break
        return ema.module, log
    a, la = run()
    run(steps=2, out=tmp_path / 'half')
    d, ld = run(out=tmp_path / 'half', resume=True)
    assert ld == la and all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), d.state_dict().values()))
    b, lb = run(out=tmp_path / 'whole')
    c, lc = run(out=tmp_path / 'whole', resume=True)
    assert la == lb == lc and all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), c.state_dict().values()))

def test_views_come_in_order_and_the_first_loss_is_theirs():
    x, y = torch.full((5, 3, 32, 32), -.5), torch.full((5, 3, 32, 32), .5)
    whole, part = dn.views(x, y, replace(TINY, hue=0., spread=0., parts=3))
    assert torch.allclose(whole, torch.cat([k[..., :24, :24] for k in (x, y)]), atol=1e-5) and torch.allclose(part, torch.cat([k[..., :12, :12] for k in (x, y, x)]), atol=1e-5)
    cfg = replace(TINY, steps=1)
    student, copy, scene = dn.build_dino(cfg), dn.build_dino(cfg), dn.single(cfg.first + torch.arange(8))
    torch.manual_seed(3); r = list(dn.learn_dino(student, cfg, dn.teacher_of(student, .9), progress=False))[0]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=dn.bf16_helps()):                    # the arithmetic of this machine's training
        torch.manual_seed(3); w, p = dn.views(draw(scene, 32), draw(dn.elsewhere(scene), 32), cfg)
        t, parts = (torch.stack(copy(k).float().split(8)) for k in (w, p))
    want = dn.dino_losses(dn.teacher_says(t, torch.zeros(8), cfg.teacher), torch.cat([t, parts])).mean().item()
    assert r.loss == pytest.approx(want, abs=1e-4)

def test_words_that_are_no_configuration():
    with pytest.raises(ValueError, match='ground'): dn.build_dino(replace(TINY, ground='none'))
    with pytest.raises(ValueError, match='temperature'): dn.teacher_says(torch.zeros(2, 3), torch.zeros(3), 0.)
    with pytest.raises(ValueError, match='expected'): dn.cut(torch.zeros(2, 3, 8, 8), torch.zeros(3, 4), 4)
    with pytest.raises(ValueError, match='area'): dn.boxes(3, (.5, .2))
    with pytest.raises(ValueError, match='multiple of 4'): dn.Eye(size=22)
    with pytest.raises(ValueError, match='k is'): dn.knn_answers(torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64), torch.zeros(1, 2), 2)
    with pytest.raises(ValueError, match='unknown model'): dn.train_dino('vit', TINY)

# ---- neighbours, and what is shipped --------------------------------------------------------------------------------------------------

def test_the_nearest_of_all_decides_alone():
    bank, answers = torch.randn(40, 6, dtype=double), torch.randint(5, (40,))
    queries = bank[:9] * 3 + 1e-6
    assert torch.equal(dn.knn_answers(bank, answers, queries, 5, k=1), answers[:9])

def test_shipped_figures_hold_and_keep_the_promise():
    model, facts = dn.load_dino()
    now = dn.examine_dino(model.eye, 400, start=20_000)
    check_figures('dino', facts['evaluation'], {a: figure(v.double()) for a, v in now.items()})
    raw = dn.examine_dino(dn.build_dino(dn.DINO['SHIPPED']).eval().eye, 1_000)['toy'].double()
    shipped = facts['evaluation']['toy']
    error = (shipped['std']**2 / shipped['n'] + raw.var().item() / len(raw))**.5
    assert shipped['mean'] - raw.mean().item() - 2 * error > .2, (shipped, raw.mean())

def test_the_study_shows_both_collapses():
    rows = {r['settings']['part']: r['values'] for r in load_study(dn.PART_STUDY).rows() if r['settings']['steps'] == 400}
    assert max(rows['no centring']['entropy of the mean']) < .01
    assert min(rows['no sharpening']['mean entropy']) > .99 * math.log(64)
    assert min(a - b for a, b in zip(rows['the recipe']['entropy of the mean'], rows['the recipe']['mean entropy'])) > .3
