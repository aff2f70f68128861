"The toybox: the same bits whatever the batch, the same scene at every size, labels that keep their promises, clear refusals."
import torch, pytest
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from latentcourse import toybox as tb

SEEDS = tb.split_seeds('test', 500, 40)
KNOWN_LABELS, KNOWN_MEAN = [3, 1, 7, 6, 2, 1, 5, 8, 0, 0], -0.0977640  # scene 1,234,567

def test_parameters_are_the_same_bits_in_any_company():
    whole = tb.scenes(SEEDS)
    for a, b in zip(whole, tb.scenes(SEEDS.flip(0))): assert torch.equal(a, b.flip(0))
    for a, b in zip(whole, tb.scenes(torch.cat([torch.arange(7), SEEDS]))): assert torch.equal(a, b[7:])

@pytest.mark.parametrize('size', [32, 64, 128])
def test_pixels_do_not_depend_on_the_batch(size):
    together = tb.draw(tb.scenes(SEEDS[:12]), size)
    alone = torch.cat([tb.draw(tb.scenes(s[None]), size) for s in SEEDS[:12]])
    backwards = tb.draw(tb.scenes(SEEDS[:12].flip(0)), size).flip(0)
    assert (together - alone).abs().max() <= 1e-6 and (together - backwards).abs().max() <= 1e-6
    assert together.min() >= -1 and together.max() <= 1 and together.isfinite().all()

def test_a_scene_has_no_resolution():
    scene = tb.scenes(SEEDS[:6])
    fine, coarse = tb.draw(scene, 512), tb.draw(scene, 64)
    gap = (F.avg_pool2d(fine, 8) - coarse).abs()
    assert gap.mean() < .015 and gap.flatten(1).kthvalue(int(.99 * gap[0].numel()), 1).values.max() < .25

def test_known_scene_stays_the_same():
    "Scene 1,234,567 of the training split: a change here changes every data set."
    scene = tb.scenes(torch.tensor([1_234_567]))
    assert scene.labels[0].tolist() == KNOWN_LABELS
    assert abs(tb.draw(scene).mean().item() - KNOWN_MEAN) < 1e-5

def test_splits_share_no_scene_and_hold_out_what_they_promise():
    hidden = torch.tensor([tb.COLOURS.index(tb.HELD_OUT[t]) for t in tb.TOYS])
    for split in tb.SPLITS:
        y = tb.scenes(tb.split_seeds(split, 0, 20_000)).labels
        out = (y[:, 3] == hidden[y[:, 2]])
        assert out.all() if split == 'heldout' else not out.any()
        pair = y[:, 6] >= 0
        assert not (y[pair, 7] == hidden[y[pair, 6]]).any() and (y[pair, 2] != y[pair, 6]).all()
        assert torch.equal(pair, y[:, 0] >= tb.BESIDE)
        reading = y[:, 0] == tb.READING
        assert (y[reading][:, [2, 5, 6, 8, 9]] == torch.tensor([0, 1, 2, 0, 0])).all()
    seeds = torch.cat([tb.split_seeds(s, 0, 1000) for s in tb.SPLITS])
    assert len(seeds.unique()) == 4000

def test_large_level_is_large():
    y = tb.scenes(torch.arange(2000), tb.LARGE).labels
    assert (y[:, 5] == 1).all() and (y[(y[:, 6] >= 0) & (y[:, 0] != tb.READING), 9] == 1).all() and len(y[:, 0].unique()) == 6

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**42 - 1), st.integers(0, 2**30))
def test_what_is_asked_is_drawn(seed, other):
    "Any part of a true label row can be asked for, and comes back."
    row = tb.scenes(torch.tensor([seed])).labels[0]
    keep = torch.rand(10, generator=torch.Generator().manual_seed(other)) < .5
    asked = torch.where(keep, row, -1)
    try: got = tb.scenes(torch.tensor([other]), asked).labels[0]
    except ValueError: pytest.fail(f'{asked.tolist()} was refused')
    stated = asked >= 0
    if got[6] < 0: stated[6:] = False                                    # what is asked of a second toy waits for one
    if got[0] == tb.READING: stated[[5, 8, 9]] = False                   # a held book is plain and small
    assert (got == asked)[stated].all()
    assert torch.equal(tb.label_row(tb.words_of(got)), got)

def test_layouts_put_toys_where_they_say():
    s = tb.scenes(torch.arange(4000))
    x, y, layout = s.place[..., 0], s.place[..., 1], s.labels[:, 0]
    assert (x[layout == 1, 0] < .4).all() and (x[layout == 2, 0] > .6).all() and ((x[layout == 0, 0] - .5).abs() < .06).all()
    assert (x[layout == 3, 0] < x[layout == 3, 1] - .4).all() and (y[layout == 4, 0] < y[layout == 4, 1] - .4).all()
    small, big = s.place[:, 0, 2][s.labels[:, 5] == 0], s.place[:, 0, 2][s.labels[:, 5] == 1]
    assert small.max() < .18 < .21 < big.min()

BAD_GIVEN = [torch.zeros(10), torch.zeros(9, dtype=torch.int64), torch.zeros(3, 10, dtype=torch.int64), [0] * 10, torch.full((10,), 99), torch.full((10,), -2)]
@pytest.mark.parametrize('asked', BAD_GIVEN)
def test_bad_labels_are_refused(asked):
    with pytest.raises((ValueError, TypeError), match='given|asks'): tb.scenes(torch.arange(2), asked)

@pytest.mark.parametrize('words, why', [(dict(layout='left', toy2='car'), 'for one'), (dict(toy1='car', toy2='car'), 'same toy'), (dict(layout='reading', toy1='duck'), 'big bear'),
                                        (dict(layout='reading', size1='small'), 'big bear'), (dict(layout='reading', toy2='mug'), 'book')])
def test_impossible_scenes_are_refused(words, why):
    with pytest.raises(ValueError, match=why): tb.scenes(torch.arange(2), tb.label_row(words))

@pytest.mark.parametrize('seeds', [torch.tensor([]), torch.tensor(3), torch.tensor([1.5]), torch.tensor([-1]), torch.tensor([4 << 40]), [1, 2], None, 'seven', torch.zeros(2, 2, dtype=torch.int64)])
def test_bad_seeds_are_refused(seeds):
    with pytest.raises((ValueError, TypeError), match='seed'): tb.scenes(seeds)

@pytest.mark.parametrize('size', [0, -64, 31, 100, 513, 1024, 64., '64', None, True])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match='multiple of 32'): tb.draw(tb.scenes(torch.arange(1)), size)

def test_other_bad_input_is_refused():
    with pytest.raises(TypeError, match='Scene'): tb.draw(torch.zeros(1, 10))
    with pytest.raises(ValueError, match='unknown split'): tb.split_seeds('training', 0, 1)
    for start, n in ((-1, 5), (0, 0), (2**40, 1)):
        with pytest.raises(ValueError, match='2\\^40'): tb.split_seeds('train', start, n)
    with pytest.raises(ValueError, match='unknown field.*toy3'): tb.label_row({'toy3': 'duck'})
    with pytest.raises(ValueError, match='unknown toy1.*dragon'): tb.label_row({'toy1': 'dragon'})
    with pytest.raises(ValueError, match='shape'): tb.words_of(torch.zeros(3))

@pytest.mark.gpu
def test_pictures_agree_between_devices():
    scene = tb.scenes(SEEDS)
    assert (tb.draw(scene.to('cuda'), 64).cpu() - tb.draw(scene, 64)).abs().max() <= 1e-6
