"Teacher and judge: what is shipped is what was measured, they read what they should, and refuse what they cannot read."
from dataclasses import replace
import pytest, torch
from latentcourse import oracle as oc
from latentcourse.lib.checkpoint import check_figures, figure
from latentcourse.toybox import FIELDS, READING, draw, scenes, split_seeds

@pytest.fixture(scope='module')
def readers(): return {name: oc.load_oracle(name) for name in ('teacher', 'judge')}

@pytest.mark.parametrize('name', ['teacher', 'judge'])
def test_shipped_figures_hold(name, readers):
    "The recorded accuracy is recomputed on other scenes, within its interval, and reaches what the course promises."
    model, facts = readers[name]
    again = {a: figure(v.double()) for a, v in oc.examine(model, 1000, start=50_000).items()}
    assert set(again) == set(facts['evaluation']) and check_figures(name, facts['evaluation'], again) < 5
    for a in ('toy', 'colour', 'layout', 'background'): assert facts['evaluation'][a]['mean'] >= .995 and facts['evaluation'][a]['n'] >= 10_000
    for a in ('pattern', 'size'): assert facts['evaluation'][a]['mean'] >= .97

def test_the_two_share_neither_seed_nor_scenes_nor_architecture(readers):
    t, j = (oc.TEACHER['CPU'], oc.JUDGE['CPU'])
    assert t.seed != j.seed and j.first >= t.first + t.steps * t.batch
    kinds = [{type(m).__name__ for m in model.modules()} for model, _ in readers.values()]
    assert 'BatchNorm2d' in kinds[0] - kinds[1] and 'PlaceNorm' in kinds[1] - kinds[0]

def test_held_out_combinations_are_read_too(readers):
    for model, _ in readers.values():
        seen = oc.examine(model, 300, 'heldout')
        assert seen['toy'].float().mean() > .97 and seen['colour'].float().mean() > .97

def test_other_sizes_are_read(readers):
    scene = scenes(split_seeds('test', 70_000, 120))
    for size, floor in ((32, .80), (128, .97)):
        for model, _ in readers.values():
            assert oc.right(model, draw(scene, size), scene.labels)['toy'].float().mean() > floor

def test_answers_leave_out_what_a_layout_lacks():
    y = oc.answers(torch.randn(200, sum(oc.CLASSES)))
    assert ((y[:, 6:] == -1).all(1) == (y[:, 0] < 3)).all() and (y[:, :6] >= 0).all()

def test_attributes_do_not_ask_a_held_book():
    y = scenes(torch.arange(3000)).labels
    asked = oc.attributes(y, y)
    pairs = int((y[:, 6] >= 0).sum()); books = int((y[:, 0] == READING).sum())
    assert len(asked['toy']) == 3000 + pairs and len(asked['pattern']) == len(asked['size']) == 3000 + pairs - books

def test_pixels_vote_for_the_right_colour():
    scene = scenes(split_seeds('test', 80_000, 300))
    lone = (scene.labels[:, 0] < 3) & (scene.labels[:, 4] == 0)
    votes = oc.pixel_colour(draw(scene), scene.labels)
    assert (votes == scene.labels[:, 3])[lone].float().mean() > .85
    assert (oc.pixel_colour(draw(scene), scene.labels, 1)[scene.labels[:, 6] < 0] == -1).all()

def test_training_repeats_itself_and_resumes(tmp_path):
    cfg = replace(oc.TEACHER['CPU'], width=8, batch=16, steps=6)
    log = list(oc.learn(oc.build(cfg), cfg, out=tmp_path, progress=False))
    again = list(oc.learn(oc.build(cfg), cfg, out=tmp_path, resume=True, progress=False))
    assert len(log) == len(again) == 6 and log[0].loss < 25 and [r.loss for r in log] == [r.loss for r in again]
    assert [r.loss for r in oc.learn(oc.build(cfg), cfg, progress=False)] == [r.loss for r in log]       # and the same from nothing
    with pytest.raises(ValueError, match='resume'): next(oc.learn(oc.build(cfg), cfg, out=tmp_path, progress=False))

@pytest.mark.parametrize('x', [torch.zeros(3, 64, 64), torch.zeros(2, 1, 64, 64), torch.zeros(2, 3, 64, 32), torch.zeros(0, 3, 64, 64), torch.full((1, 3, 64, 64), torch.nan),
                               torch.full((1, 3, 64, 64), torch.inf), torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [1, 2], None])
def test_bad_pictures_are_refused(x, readers):
    with pytest.raises((ValueError, TypeError), match='x '): oc.score(readers['teacher'][0], x)

def test_unknown_readers_are_refused():
    with pytest.raises(ValueError, match='oracle.*teacher or judge|unknown reader'): oc.load_oracle('oracle')
    with pytest.raises(ValueError, match='teacher or judge'): oc.build(replace(oc.TEACHER['CPU'], name='critic'))
    with pytest.raises(ValueError, match='not of the judge'): oc.train_oracle('judge', oc.TEACHER['CPU'])

@pytest.mark.parametrize('mistake', ['mean over fields', 'absent fields count'])
def test_loss_tells_mistakes(mistake):
    logits, labels = torch.randn(8, sum(oc.CLASSES)), scenes(torch.arange(8)).labels
    good = oc.field_loss(logits, labels)
    bad = good / len(FIELDS) if mistake == 'mean over fields' else oc.field_loss(logits, labels.clamp(min=0))
    assert good.shape == (8,) and not torch.allclose(good, bad)
