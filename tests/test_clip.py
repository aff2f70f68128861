"CLIP's towers against open_clip's, its batches, its shipped weights, and its refusals."
import math
from dataclasses import replace
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse import clip as cl
from latentcourse.captions import captions, parse
from latentcourse.contrastive import clip_losses, cosine
from latentcourse.lib.checkpoint import check_figures, figure
from latentcourse.toybox import BESIDE, READING, TOYS, draw, scenes, split_seeds

SMALL = cl.ClipCfg(out=16, d=16, depth=1, text_depth=1, heads=2, stem=8, steps=3, batch=8)

@pytest.fixture(scope='module')
def shipped(): return cl.load_clip()

@pytest.fixture(scope='module')
def scene(): return scenes(split_seeds('test', 90_000, 24))

@pytest.fixture(scope='module')
def open_model():
    model = pytest.importorskip('open_clip.model')
    def build(quick=False, seed=0, **image):
        torch.manual_seed(seed)
        clip = model.CLIP(24, model.CLIPVisionCfg(**{**dict(layers=3, width=32, head_width=8, patch_size=8, image_size=32), **image}),
                          model.CLIPTextCfg(context_length=20, vocab_size=600, width=16, heads=2, layers=2), quick_gelu=quick).double().eval()
        with torch.no_grad():
            for p in clip.parameters(): p.add_(.1 * torch.randn_like(p))
        return clip
    return build

def open_ids(lengths, n=20):
    "Random tokens that end with their largest id, as open_clip's do."
    ids = torch.randint(3, 598, (len(lengths), n))
    for row, length in zip(ids, lengths): row[length - 1], row[length:] = 599, 0
    return ids, torch.tensor(lengths)

# ---- parity -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('quick', [False, True])
@torch.no_grad()
def test_towers_equal_open_clip(open_model, quick):
    theirs = open_model(quick)
    ours, x, (ids, lengths) = cl.from_open_clip(theirs), torch.randn(5, 3, 32, 32, dtype=torch.float64), open_ids([3, 20, 9, 2, 14])
    u, v = ours(x, ids, lengths)
    assert (u - theirs.encode_image(x)).abs().max() < 1e-9 and (v - theirs.encode_text(ids)).abs().max() < 1e-9
    logits = theirs.get_logits(x, ids)[0]
    assert (ours.log_scale.exp() * cosine(u, v) - logits).abs().max() < 1e-8
    assert (cosine(u, v) * ours.log_scale.exp()).std() > .1                    # the towers do not say the same of everything
    wrong = cl.from_open_clip(open_model(not quick))
    assert (wrong.image(x) - u).abs().max() > 1e-4                             # another bend is another network

def test_states_go_both_ways(open_model):
    theirs, other = open_model(), open_model(seed=1)
    state = cl.to_open_clip(cl.from_open_clip(theirs))
    assert state.keys() == theirs.state_dict().keys()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), theirs.state_dict().values()))

def test_loss_and_gradients_equal_open_clip(open_model):
    loss = pytest.importorskip('open_clip.loss').ClipLoss()
    theirs = open_model()
    ours, x, (ids, lengths) = cl.from_open_clip(theirs), torch.randn(6, 3, 32, 32, dtype=torch.float64), open_ids([3, 20, 9, 2, 14, 7])
    u, v, scale = theirs(x, ids)
    a, b = loss(u, v, scale), clip_losses(*ours(x, ids, lengths), ours.log_scale).mean()
    a.backward(); b.backward()
    assert abs(a.item() - b.item()) < 1e-9
    named = dict(ours.named_parameters())
    for key, p in theirs.named_parameters():
        mine = next(named[k] for k in named if cl.open_clip_name(k) == key).grad
        mine = mine.T if mine.ndim == 2 and key in ('visual.proj', 'text_projection') else mine.reshape(p.shape)
        assert (mine - p.grad).abs().max() < 1e-9, key

@torch.no_grad()
def test_the_published_size_equals_open_clip():
    "ViT-B-32 as open_clip builds it, random weights, double precision."
    open_clip = pytest.importorskip('open_clip')
    theirs = open_clip.create_model('ViT-B-32', pretrained=None).double().eval()
    ours, x = cl.from_open_clip(theirs), torch.randn(2, 3, 224, 224, dtype=torch.float64)
    ids = open_clip.get_tokenizer('ViT-B-32')(['a red ball', 'a photo of a teddy bear reading a book'])
    u, v = ours(x, ids, ids.argmax(1) + 1)
    a, b = theirs.encode_image(x), theirs.encode_text(ids)
    assert (u - a).abs().max() < 1e-6 and (v - b).abs().max() < 1e-6
    assert (ours.log_scale.exp() * cosine(u, v) - theirs.get_logits(x, ids)[0]).abs().max() < 1e-6
    assert sum(p.numel() for p in ours.parameters()) == cl.clip_parameters(512, (224, 32, 768, 12), (49_408, 77, 512, 12)) == 151_277_313

def test_other_architectures_are_refused(open_model):
    for image in (dict(layers=(1, 1, 1, 1), width=8, head_width=8, image_size=32),):
        with pytest.raises(TypeError, match='ViT'): cl.from_open_clip(open_model(**image))
    with pytest.raises(ValueError, match='without a stem'): cl.to_open_clip(cl.build_clip(SMALL))

def test_open_clip_names_are_checked(monkeypatch):
    pytest.importorskip('open_clip')
    with pytest.raises(ValueError, match='unknown architecture'): cl.load_open_clip('ViT-B32')
    with pytest.raises(ValueError, match='has no weights'): cl.load_open_clip('ViT-B-32', 'openay')
    import open_clip
    def no_network(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr(open_clip, 'create_model', no_network)
    with pytest.raises(ConnectionError, match='pretrained=None'): cl.load_open_clip('ViT-B-32', 'openai')

def test_open_clip_by_the_same_call(monkeypatch):
    "Pictures in [-1, 1] and plain captions through a model of open_clip."
    open_clip = pytest.importorskip('open_clip')
    small = open_clip.create_model('ViT-S-32-alt', pretrained=None)
    monkeypatch.setattr(open_clip, 'create_model', lambda *a, **k: small)
    clip, x = cl.load_open_clip('ViT-S-32-alt'), torch.rand(2, 3, 50, 60) * 2 - 1
    u, v = clip.encode_image(x), clip.encode_text(['a red ball', 'two mugs'])
    big = nn.functional.interpolate(x, (224, 224), mode='bicubic', antialias=True).clamp(-1, 1)
    mean, std = (torch.tensor(t)[:, None, None] for t in (small.visual.image_mean, small.visual.image_std))
    with torch.no_grad():
        assert (u - small.eval().encode_image((big / 2 + .5 - mean) / std, normalize=True)).abs().max() < 1e-4
        assert (v - small.encode_text(open_clip.get_tokenizer('ViT-S-32-alt')(['a red ball', 'two mugs']), normalize=True)).abs().max() < 1e-4

# ---- the towers ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_caption_does_not_feel_its_batch():
    clip = cl.build_clip(SMALL).double().eval()
    texts = ['a ball', 'a small red ball on the grass', 'a duck']
    together, alone = clip.encode_text(texts), torch.cat([clip.encode_text([t]) for t in texts])
    assert (together - alone).abs().max() < 1e-12
    assert (clip.encode_text(['A RED ball']) - clip.encode_text(['a red ball'])).abs().max() == 0
    assert (clip.encode_text(['a bear above a ball']) - clip.encode_text(['a ball above a bear'])).abs().max() > 1e-3     # places count

@torch.no_grad()
def test_mutations_of_the_towers_are_caught():
    "[CLS] and [EOS] are where they should be; reading elsewhere gives something else."
    clip = cl.build_clip(SMALL).double().eval()
    x, (ids, lengths) = torch.rand(3, 3, 64, 64, dtype=torch.float64) * 2 - 1, cl.toybox_tokens(['a ball', 'a small red ball on the grass', 'a duck'])
    y = clip.image.vit.tokens(clip.image.stem(x))
    assert (clip.image(x) - clip.image.proj(y[:, 0])).abs().max() < 1e-12
    for wrong in (y[:, 1], y[:, -1], y.mean(1)): assert (clip.image(x) - clip.image.proj(wrong)).abs().max() > 1e-3
    h = clip.text.blocks(clip.text.words(ids) + clip.text.places[:ids.shape[1]], mask=torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril())
    rows = torch.arange(3)
    assert (clip.text(ids, lengths) - clip.text.proj(h[rows, lengths - 1])).abs().max() < 1e-12
    for wrong in (h[:, 0], h[:, -1], h[rows, lengths - 2]): assert (clip.text(ids, lengths) - clip.text.proj(wrong)).abs().max() > 1e-3

def test_one_direction_or_a_raw_temperature_are_another_loss():
    torch.manual_seed(0)
    u, v, log_scale = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64), torch.tensor(2., dtype=torch.float64)
    logits = log_scale.exp() * cosine(u, v)
    one_way = nn.functional.cross_entropy(logits, torch.arange(6))
    both = (one_way + nn.functional.cross_entropy(logits.T, torch.arange(6))) / 2
    assert abs(clip_losses(u, v, log_scale).mean() - both) < 1e-12
    assert abs(one_way - both) > 1e-3 and abs(clip_losses(u, v, log_scale.log()).mean() - both) > 1e-3

# ---- batches ------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**36), st.sampled_from(['train', 'valid', 'test']))
def test_twins_are_legal_and_small_changes(first, split):
    seeds = split_seeds(split, first, 64)
    labels = scenes(seeds).labels
    other = cl.twins(labels, seeds)
    assert torch.equal(other, cl.twins(labels, seeds)) and cl.not_held_out(other).all()
    assert torch.equal(scenes(seeds, other).labels, other)                        # can be drawn
    one = labels[:, 6] < 0
    assert ((other != labels)[one].sum(1) <= 1).all() and torch.equal(other[one, :2], labels[one, :2])
    for row, new in zip(labels[~one].tolist(), other[~one].tolist()):             # the same things, elsewhere
        assert all(sorted((row[i], row[i + 4])) == sorted((new[i], new[i + 4])) for i in range(2, 6)) and row[:2] == new[:2]

def test_exchanged_colours_by_the_parser():
    text = 'a red ball to the left of a blue duck'
    labels = parse(text)[None]
    assert torch.equal(cl.exchanged(labels, 'colour')[0], parse('a blue ball to the left of a red duck'))
    assert torch.equal(cl.exchanged(labels, 'toy')[0], parse('a red duck to the left of a blue ball'))
    assert torch.equal(cl.exchanged(labels, 'places')[0], parse('a blue duck to the left of a red ball'))
    reading = parse('a brown bear reading a red book')[None]
    assert torch.equal(cl.exchanged(reading, 'toy'), reading) and torch.equal(cl.exchanged(reading, 'places'), reading)
    alone = parse('a red ball')[None]
    assert all(torch.equal(cl.exchanged(alone, w), alone) for w in cl.EXCHANGES)

def test_pairs_are_pairs():
    seeds = split_seeds('train', 5_000, 32)
    x, ids, lengths, groups = cl.pairs(seeds)
    assert x.shape == (32, 3, 64, 64) and len(ids) == len(lengths) == len(groups) == 32
    texts = [cl.shared_bpe().decode(row) for row in ids]
    labels = torch.cat([scenes(seeds[:16]).labels, cl.twins(scenes(seeds[:16]).labels, seeds[:16])])
    assert torch.allclose(x, draw(scenes(torch.cat([seeds[:16]] * 2), labels)))
    said = torch.stack([parse(t) for t in texts])
    assert ((said == labels) | (said < 0)).all()                                  # every caption is true of its picture
    assert cl.pairs(seeds, 0.)[0].shape == x.shape

def test_training_is_repeatable_and_resumes(tmp_path):
    def run(**how):
        clip = cl.build_clip(SMALL)
        log = list(cl.learn_clip(clip, SMALL, progress=False, **how))
        return clip, [r.loss for r in log]
    (a, la), (b, lb) = run(), run()
    assert la == lb and all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    clip = cl.build_clip(SMALL)
    steps = cl.learn_clip(clip, SMALL, out=tmp_path, progress=False)
    from latentcourse.lib import train
    old, train.time.monotonic = train.time.monotonic, iter(range(0, 10**6, 100)).__next__       # a checkpoint is always due
    try: next(steps); next(steps); steps.close()
    finally: train.time.monotonic = old
    c, lc = run(out=tmp_path, resume=True)
    assert lc == la and all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), c.state_dict().values()))

# ---- what is shipped ----------------------------------------------------------------------------------------------------------------

def test_shipped_figures_hold_and_keep_the_promise(shipped):
    clip, facts = shipped
    again = {k: figure(v) for k, v in cl.examine_clip(clip, 512, start=50_000).items()}
    assert check_figures('clip', facts['evaluation'], again) < 5
    held = {f'held out: {k}': figure(v) for k, v in cl.examine_clip(clip, 512, 'heldout', 50_000).items()}
    assert check_figures('clip', facts['evaluation'], held) < 5
    e = {k: v['mean'] for k, v in facts['evaluation'].items()}
    assert min(e['image to text'], e['text to image']) >= .95 and e['colour'] >= .98 and e['toy'] >= .90
    assert e['both'] > .68 and e['colour exchanged'] > .75 and e['toy exchanged'] > .69

def test_search_in_a_thousand(shipped):
    "FACTS: R@1 90 and R@5 100 of 1,000."
    from latentcourse.contrastive import recall
    seeds = split_seeds('test', 70_000, 1000)
    scene = scenes(seeds)
    got = recall(shipped[0].encode_image(draw(scene)), shipped[0].encode_text(captions(scene.labels, seeds)), (1, 5))
    assert min(v for k, v in got.items() if '@1' in k) > .90 and min(v for k, v in got.items() if '@5' in k) > .99

def test_a_prompt_is_a_classifier(shipped, scene):
    wanted = scene.labels[:, 2]
    one = scene.labels[:, 6] < 0
    right = cl.zero_shot_right(shipped[0], shipped[0].encode_image(draw(scene))[one], scene.labels[one])
    assert set(right) == set(cl.PROMPTS) and right['toy'].mean() > .7 and len(wanted[one]) == len(right['toy'])

# ---- refusals -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('call, error', [
    (lambda c: c.encode_text('a ball'), TypeError), (lambda c: c.encode_text([]), TypeError), (lambda c: c.encode_text([3]), TypeError),
    (lambda c: c.encode_text(['ball ' * 200]), ValueError), (lambda c: c.image(torch.zeros(1, 1, 64, 64)), (ValueError, RuntimeError)),
    (lambda c: cl.exchanged(torch.zeros(1, 10, dtype=torch.int64), 'size'), ValueError), (lambda c: cl.pairs(torch.arange(4), .7), ValueError),
    (lambda c: cl.ImageTower(8, 64, 6, 8, 1, 2, stem=8), ValueError), (lambda c: cl.train_clip('klip', SMALL), ValueError)])
def test_bad_calls_are_refused(call, error):
    with pytest.raises(error): call(cl.build_clip(SMALL).eval())

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(shipped, scene):
    clip = cl.build_clip(cl.CLIP['SHIPPED']).eval()
    clip.load_state_dict(shipped[0].state_dict())
    x, texts = draw(scene), captions(scene.labels, scene.seeds)
    u, v = clip.cuda().encode_image(x), clip.encode_text(texts)
    assert (u.cpu() - shipped[0].encode_image(x)).abs().max() < 1e-3 and (v.cpu() - shipped[0].encode_text(texts)).abs().max() < 1e-3
