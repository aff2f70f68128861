"Pictures of one's own: from a folder that the test makes to pictures that the model makes; what is put aside, refused, remembered; and the two statistics."
import itertools, json, math
from dataclasses import replace
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw
from typer.testing import CliRunner
from latentcourse import own_pictures as o, pipeline
from latentcourse.cli import app
from latentcourse.lib.check import agree
from latentcourse.lib.checkpoint import CheckpointError
from latentcourse.lib.data import Labelled
from latentcourse.lib.files import DataError

double = torch.float64
TINY = {'vae': dict(steps=2, batch=4), 'clip': dict(steps=2, batch=8), 'dit': dict(steps=3, batch=8, d=32, depth=1), 'text_to_image': dict(steps=3, batch=8, d=32, depth=1)}

def picture(i, kind):
    img = Image.new('RGB', (80, 70), (200 - i, 210, 190 + i))
    getattr(ImageDraw.Draw(img), kind)((10 + i % 7, 12, 50, 52 + i % 5), fill=(20, 5 * i, 120))
    return img

def folder_of(path, n=48, said=lambda i, kind: f'a dark {kind}'):
    path.mkdir(parents=True)
    lines = []
    for i in range(n):
        kind = ('ellipse', 'rectangle')[i % 2]
        picture(i, kind).save(path / f'{i:02d}.png')
        lines.append(json.dumps({'file_name': f'{i:02d}.png', 'text': said(i, kind)}))
    (path / 'metadata.jsonl').write_text('\n'.join(lines))
    return path

def train(name, pictures, out, say=lambda text: None, **more):
    changes = {**TINY[name], **more.pop('changes', {})}
    return o.train_own(name, f'folder:{pictures}', out, changes=changes, progress=False, say=say, **more)

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A folder of 48 pictures of two kinds, taken through the three steps."
    home, said = tmp_path_factory.mktemp('own'), []
    pictures = folder_of(home / 'pictures')
    made = {name: train(name, pictures, home / 'model', said.append) for name in ('vae', 'clip', 'text_to_image')}
    return home / 'model', pictures, made, said

# ---- from a folder to pictures ------------------------------------------------------------------------------------------------------

def test_three_steps_leave_a_model_that_paints(model):
    folder, pictures, made, said = model
    for name, (path, facts) in made.items():
        assert path.exists() and path.with_suffix('.json').exists() and facts['evaluation'], name
    assert {p.name for p in folder.glob('*.safetensors')} == {'vae.safetensors', 'clip.safetensors', 'text.safetensors', 'text_to_image.safetensors'}
    assert sum('48 pictures' in s for s in said) == 3 and not any('shipped one goes' in s for s in said)
    pipe = pipeline.TextToImage.from_pretrained(folder)
    image = pipe('a dark ellipse', steps=2, progress=False)
    assert image.size == (64, 64) and pipe('a dark rectangle', steps=2, progress=False).tobytes() != image.tobytes()
    with pytest.raises(pipeline.UnknownWords, match='duck'): pipe('a dark duck', steps=1, progress=False)

def test_painting_uses_all_three_networks(model):
    folder = model[0]
    generator, codec, text, facts = pipeline.parts_in(folder)
    ours = pipeline.TextToImage(generator, codec, text, facts)('a dark ellipse', steps=2, progress=False).tobytes()
    for other in ((generator, o.load_codec()[0], text), (generator, codec, o.load_text()[0]), (o.build_text_to_image(o.T2iCfg(d=32, depth=1)), codec, text)):
        assert pipeline.TextToImage(*other, facts)('a dark ellipse', steps=2, progress=False).tobytes() != ours

def shell(*words): return CliRunner().invoke(app, [str(w) for w in words])

def test_from_a_shell(tmp_path):
    pictures, folder = folder_of(tmp_path / 'pictures', 12), tmp_path / 'model'
    for name in ('vae', 'clip', 'dit'):
        done = shell('train', name, '--data', f'folder:{pictures}', '--out', folder, '--steps', 2, '--preset', 'cpu')
        assert done.exit_code == 0 and f'{name}: kept as' in done.stdout and 'mean of' in done.stdout, done.output
        assert ('next: latentcourse generate' if name == 'dit' else 'next: latentcourse train') in done.stderr
    before = (folder / 'vae.json').read_text()
    again = shell('train', 'vae', '--data', f'folder:{pictures}', '--out', folder, '--steps', 2, '--preset', 'cpu')
    facts = [{k: v for k, v in json.loads(text).items() if k in ('minutes', 'log', 'pictures')} for text in (before, (folder / 'vae.json').read_text())]
    assert again.exit_code == 0 and facts[0] and facts[0] == facts[1]                  # it was finished: nothing is trained twice
    done = shell('generate', 'a dark ellipse', '--steps', 2, '--model', folder, '--out', tmp_path / 'a.png', '--device', 'cpu')
    assert done.exit_code == 0, done.output
    want = pipeline.TextToImage.from_pretrained(folder, 'cpu')('a dark ellipse', steps=2, progress=False)
    assert Image.open(tmp_path / 'a.png').tobytes() == want.tobytes()
    assert shell('generate', 'a purple duck', '--model', folder).exit_code == 2

def test_a_shell_is_told_what_is_wrong(tmp_path):
    pictures = folder_of(tmp_path / 'pictures', 12)
    (pictures / '03.png').write_bytes(b'')
    done = shell('train', 'vae', '--data', f'folder:{pictures}', '--out', tmp_path / 'm', '--steps', 1)
    assert done.exit_code == 1 and '03.png: the file is empty' in done.stderr and 'Traceback' not in done.stderr
    done = shell('train', 'vae', '--data', f'folder:{pictures}', '--out', tmp_path / 'm', '--steps', 1, '--on-bad', 'skip')
    assert done.exit_code == 0 and '11 pictures in use, 1 left out' in done.stderr
    for words, code, says in ((('teacher',), 2, 'toybox scenes alone'), (('vae', '--preset', 'TPU'), 2, 'TPU'), (('vae', '--on-bad', 'shout'), 1, 'shout')):
        done = shell('train', *words, '--data', f'folder:{pictures}', '--out', tmp_path / 'm')
        assert done.exit_code == code and says in done.stderr
    assert shell('train', 'vae', '--data', 'folder:no/such', '--out', tmp_path / 'm').exit_code == 1

def test_the_generator_alone_begins_with_the_shipped_networks(model, tmp_path):
    said = []
    train('dit', model[1], tmp_path / 'b', said.append)
    generator, codec, text, facts = pipeline.parts_in(tmp_path / 'b')
    assert sum('shipped one goes into it' in s for s in said) == 2 and type(generator).__name__ == 'DiT' and facts['words'] == ['a', 'dark', 'ellipse', 'rectangle']
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    agree(codec(x), o.load_codec()[0](x), atol=1e-4)
    assert pipeline.state_mark(codec) == facts['made_for']['vae']

def test_folders_of_classes_need_no_captions(tmp_path):
    for kind in ('rectangle', 'blue_ellipse'):
        (tmp_path / kind).mkdir()
        for i in range(5): picture(3 * i + len(kind), kind.split('_')[-1]).save(tmp_path / kind / f'{i}.jpg')
    assert set(o.gather(f'folder:{tmp_path}').captions) == {'rectangle', 'blue ellipse'}

def test_labelled_sets_are_described_by_their_classes():
    class Inner:
        classes = ['cat', 'tabby_cat']
        def __len__(self): return 6
        def __getitem__(self, i): return picture(i, 'ellipse'), i % 2
    x, captions = o.read_rows(Labelled(Inner(), 64), torch.tensor([1, 2]))
    assert x.shape == (2, 3, 64, 64) and captions == ['tabby_cat', 'cat']

# ---- what is remembered -------------------------------------------------------------------------------------------------------------

def test_any_change_of_the_folder_is_noticed(tmp_path):
    base = o.gather(f'folder:{folder_of(tmp_path / "a", 8)}').mark
    assert o.gather(f'folder:{folder_of(tmp_path / "b", 8)}').mark == base
    assert o.gather(f'folder:{folder_of(tmp_path / "c", 8, lambda i, k: f"a dark {k}" if i else "a light one")}').mark != base
    img = Image.open(tmp_path / 'b' / '03.png'); img.putpixel((40, 40), (255, 0, 255)); img.save(tmp_path / 'b' / '03.png')
    assert o.gather(f'folder:{tmp_path / "b"}').mark != base

def test_latents_are_made_again_for_other_pictures_or_other_weights(tmp_path):
    pictures, said = o.gather(f'folder:{folder_of(tmp_path / "a", 8)}'), []
    codec = o.own_codec(o.OWN['CPU']['vae']).eval()
    first = o.own_latents(pictures, codec, tmp_path / 'z', say=said.append)
    assert torch.equal(o.own_latents(pictures, codec, tmp_path / 'z', say=said.append), first) and not said
    with torch.no_grad(): codec.encoder.state_dict()[next(iter(codec.encoder.state_dict()))].mul_(1.01)
    second = o.own_latents(pictures, codec, tmp_path / 'z', say=said.append)
    assert len(said) == 1 and 'codec' in said[0] and not torch.equal(first, second)
    o.own_latents(replace(pictures, mark='other'), codec, tmp_path / 'z', say=said.append)
    assert len(said) == 2 and 'pictures' in said[1]

def test_a_run_goes_on_only_with_the_same_pictures(tmp_path):
    pictures = folder_of(tmp_path / 'a', 12)
    one = train('vae', pictures, tmp_path / 'm')[1]
    again = train('vae', pictures, tmp_path / 'm')[1]
    assert again['log'] == one['log'] and again['minutes'] == one['minutes']          # nothing was trained twice
    picture(77, 'ellipse').save(pictures / '05.png')
    with pytest.raises(CheckpointError, match='pictures'): train('vae', pictures, tmp_path / 'm')
    assert train('vae', pictures, tmp_path / 'm', resume=False)[1]['log'] != one['log']

def test_parts_that_were_not_made_for_each_other_are_refused(model, tmp_path):
    folder = tmp_path / 'm'
    train('dit', model[1], folder)
    pipeline.parts_in(folder)
    train('vae', model[1], folder)
    with pytest.raises(CheckpointError, match=r'vae.safetensors.*train dit again'): pipeline.parts_in(folder)
    train('dit', model[1], folder, resume=False)
    train('clip', model[1], folder)
    with pytest.raises(CheckpointError, match='text.safetensors'): pipeline.parts_in(folder)
    (folder / 'text.safetensors').unlink()
    pipeline.parts_in(folder)                                                          # the shipped one again, and that is the right one
    (folder / 'vae.safetensors').unlink()
    with pytest.raises(CheckpointError, match='vae.safetensors'): pipeline.parts_in(folder)
    with pytest.raises(DataError, match='no generator here'): pipeline.parts_in(tmp_path)

# ---- what is refused ----------------------------------------------------------------------------------------------------------------

def test_bad_files_are_named_or_counted(tmp_path):
    folder, said = folder_of(tmp_path / 'a', 12), []
    (folder / '02.png').write_bytes((folder / '02.png').read_bytes()[:90]); (folder / '04.png').write_bytes(b''); (folder / '06.png').write_text('no picture')
    with pytest.raises(DataError, match='02.png'): train('vae', folder, tmp_path / 'm')
    train('vae', folder, tmp_path / 'm', said.append, on_bad='skip')
    assert '9 pictures in use, 3 left out' in said[0] and all(f'0{k}.png' in said[0] for k in (2, 4, 6)) and '9 pictures' in said[1]

@pytest.mark.parametrize('name, preset, says', [('teacher', 'CPU', "'teacher'.*vae, clip, dit, text_to_image"), ('vae', 'TPU', "'TPU'.*CPU or GPU")])
def test_unknown_names_are_refused(name, preset, says, tmp_path):
    with pytest.raises(ValueError, match=says): o.train_own(name, f'folder:{tmp_path}', tmp_path, preset)

@pytest.mark.parametrize('spec, says', [('folder:no/such', 'no such folder'), ('photos', 'cannot train on'), ('digits', 'cannot train on'), ('unicorns', 'unknown data')])
def test_unknown_data_is_refused(spec, says):
    with pytest.raises(ValueError, match=says): o.gather(spec)

def test_too_little_to_learn_from_is_refused(tmp_path):
    with pytest.raises(DataError, match='3 different pictures'): o.gather(f'folder:{folder_of(tmp_path / "a", 3)}')
    with pytest.raises(DataError, match='all captions are the same'): train('clip', folder_of(tmp_path / 'b', 8, lambda i, k: 'a thing'), tmp_path / 'm')
    with pytest.raises(ValueError, match='expected at most 256'): train('clip', folder_of(tmp_path / 'c', 8, lambda i, k: f'{k} ' * 90), tmp_path / 'm')

def test_pictures_without_captions_teach_the_codec_alone(tmp_path):
    folder = folder_of(tmp_path / 'a', 8)
    (folder / 'metadata.jsonl').unlink()
    assert train('vae', folder, tmp_path / 'm')[0].exists()
    with pytest.raises(DataError, match='all captions are the same'): train('clip', folder, tmp_path / 'm')
    with pytest.raises(DataError, match='no picture has a caption: write metadata.jsonl'): train('dit', folder, tmp_path / 'm')

def test_long_captions_need_a_reader_of_their_own(tmp_path):
    folder = folder_of(tmp_path / 'a', 8, lambda i, k: f'a {"very " * 25}dark {k}')
    with pytest.raises(DataError, match='train clip'): train('dit', folder, tmp_path / 'm')
    train('clip', folder, tmp_path / 'm'); train('dit', folder, tmp_path / 'm')
    assert pipeline.parts_in(tmp_path / 'm')[2].cfg.length == o.token_room(o.gather(f'folder:{folder}').captions) > 64

# ---- no training sees what is put aside ---------------------------------------------------------------------------------------------

def test_no_training_sees_what_is_put_aside(model, tmp_path, monkeypatch):
    pictures, seen, real = o.gather(f'folder:{model[1]}'), [], o.Batches
    def spy(source, *args, **more): seen.append(source); return real(source, *args, **more)
    monkeypatch.setattr(o, 'Batches', spy)
    for name in ('vae', 'clip', 'dit'): train(name, model[1], tmp_path / 'm')
    assert len(seen) == 3 and all(len(s if isinstance(s, torch.Tensor) else s[0]) == int((~pictures.aside).sum()) for s in seen)
    for x in (seen[0], seen[1][0]): assert not set(o.picture_keys(x).tolist()) & set(o.picture_keys(pictures.x[pictures.aside]).tolist())
    z = o.own_latents(pictures, pipeline.parts_in(tmp_path / 'm')[1], tmp_path / 'z')
    assert torch.equal(seen[2][0], z[~pictures.aside])

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**48 - 1), min_size=4, max_size=60, unique=True), st.randoms())
def test_what_is_put_aside_depends_on_each_picture_alone(keys, random):
    chosen = o.put_aside(torch.tensor(keys))
    assert chosen.any() and not chosen.all()
    order = random.sample(range(len(keys)), len(keys))
    assert torch.equal(o.put_aside(torch.tensor(keys)[order]), chosen[order])
    twice = o.put_aside(torch.tensor(keys + keys))
    assert torch.equal(twice[:len(keys)], twice[len(keys):])

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_varied_pictures_are_pieces_of_the_padded_ones(seed, pad):
    torch.manual_seed(seed)
    x = torch.randn(3, 2, 12, 10)
    big = torch.nn.functional.pad(x, (pad,) * 4, 'reflect')
    for picture, out in zip(big, o.varied(x, pad)):
        pieces = [p for t in range(2 * pad + 1) for l in range(2 * pad + 1) for p in [picture[:, t:t + 12, l:l + 10]]]
        assert any(torch.equal(out, p) or torch.equal(out, p.flip(2)) for p in pieces)

def test_inherit_takes_what_fits():
    big, small = torch.nn.Sequential(torch.nn.Embedding(6, 3), torch.nn.Linear(3, 4)), torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(2, 4))
    before = big[1].weight.clone()
    assert o.inherit(big, small) == 2 and torch.equal(big[0].weight[:4], small[0].weight) and torch.equal(big[1].weight, before) and torch.equal(big[1].bias, small[1].bias)
    assert o.inherit(small, big) == 1 and torch.equal(small[1].bias, big[1].bias)      # a smaller table takes nothing
    codec = o.build_codec(o.OWN['CPU']['vae'])
    assert o.inherit(codec, o.load_codec()[0]) == len(codec.state_dict())

# ---- what the generator is told -----------------------------------------------------------------------------------------------------

def test_each_picture_is_told_its_own_caption():
    text, captions = o.load_text()[0], ['a red ball', 'a small blue star', 'a red ball', '', 'a duck']
    table, rows = o.read_once(text, captions)
    tokens, mask, pooled = o.heard_in(table, rows, 0.)
    for i, c in enumerate(captions):
        want = o.encode(text, [c])
        agree(pooled[i], want[2][0], atol=1e-5), agree(tokens[i, mask[i]], want[0][0], atol=5e-3)
    silence = o.encode(text, [''])[2]
    agree(o.heard_in(table, rows, 1.)[2], silence.expand(5, -1), atol=1e-5)
    torch.manual_seed(0)
    share = (o.heard_in(table, torch.ones(4_000, dtype=torch.int64), .1)[2] - silence).abs().max(1).values.lt(1e-4).double().mean().item()
    assert abs(share - .1) < .03

# ---- the two statistics -------------------------------------------------------------------------------------------------------------

def shares_hold(true_share):
    for p, a, k in itertools.product((0., .3, 1.), (.6, .9, 1.), (2, 10)):
        agree(true_share(p * a + (1 - p) * (1 - a) / (k - 1), a, k), p, atol=1e-12)

def errors_hold(share_error):
    for m, a, k, n, n_a in ((.7, .9, 10, 50, 80), (.2, .8, 3, 400, 30), (.95, .99, 10, 100, 100)):
        x = torch.tensor([m, a], dtype=double, requires_grad=True)
        dm, da = torch.autograd.grad(((k - 1) * x[0] + x[1] - 1) / (k * x[1] - 1), x)[0]
        agree(share_error(m, n, a, n_a, k), math.sqrt(dm**2 * m * (1 - m) / n + da**2 * a * (1 - a) / n_a), atol=1e-12)

def copies_hold(copy_share):
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        d, e = torch.randint(0, 6, (7,), generator=g).double(), torch.randint(0, 6, (9,), generator=g).double()
        by_hand = sum(1. if a < b else .5 if a == b else 0. for a in d.tolist() for b in e.tolist()) / 63
        agree(copy_share(d, e), by_hand, atol=1e-12)

def chances_hold(copy_chance):
    for n, m in ((1, 1), (2, 3), (4, 4)):
        deals = [set(c) for c in itertools.combinations(range(n + m), n)]
        values = torch.tensor([sum(i < j for i in d for j in set(range(n + m)) - d) / (n * m) for d in deals], dtype=double)
        agree(copy_chance(n, m), values.std(correction=0).item(), atol=1e-12)

CHECKS = {'true_share': shares_hold, 'share_error': errors_hold, 'copy_share': copies_hold, 'copy_chance': chances_hold}

@pytest.mark.parametrize('name', CHECKS)
def test_statistics_by_other_routes(name): CHECKS[name](getattr(o, name))

@pytest.mark.parametrize('name', CHECKS)
def test_one_per_cent_is_noticed(name):
    with pytest.raises(AssertionError): CHECKS[name](lambda *args: 1.01 * getattr(o, name)(*args))

@pytest.mark.parametrize('name, mistake', [('true_share', lambda m, a, k=10: m / a), ('true_share', lambda m, a, k=10: (k * m + a - 1) / (k * a - 1)), ('share_error', lambda m, n, a, n_a, k=10: math.sqrt(m * (1 - m) / n)),
                                           ('share_error', lambda m, n, a, n_a, k=10: o.share_error(m, n, a, 10**12, k)), ('copy_share', lambda d, e: (d[:, None] <= e).double().mean().item()),
                                           ('copy_share', lambda d, e: (d[:, None] > e).double().mean().item()), ('copy_chance', lambda n, m: math.sqrt((n + m) / (12 * n * m)))])
def test_mistakes_in_the_statistics_are_noticed(name, mistake):
    with pytest.raises(AssertionError): CHECKS[name](mistake)

def test_statistics_refuse_nonsense():
    for args in ((.5, .1, 10), (1.5, .9, 10), (.5, 1.1, 10), (.5, .9, 1)):
        with pytest.raises(ValueError): o.true_share(*args)
    with pytest.raises(ValueError, match='some of each'): o.copy_share(torch.zeros(0), torch.ones(3))
    with pytest.raises(ValueError, match='at least'): o.copy_chance(0, 3)

# ---- the digits of the page ---------------------------------------------------------------------------------------------------------

def test_digits_are_drawn_as_their_captions_say():
    rows = torch.arange(1_500, 1_700)
    x, y, ink = o.draw_digits(rows, 3)
    assert x.shape == (200, 3, 64, 64) and x.abs().max() <= 1 and not (y == 2 * ink).any() and len(ink.unique()) == 5
    digit, colour = o.read_digits(x)
    assert (colour == ink).all() and (digit == y).double().mean() > .95
    assert o.digit_caption(7, 2) == 'a handwritten seven in blue ink'

def test_the_sheet_shows_every_caption_once(tmp_path, monkeypatch):
    asked = []
    def paint(pipe, y, ink):
        asked.append((y, ink))
        shape, paper, inks = torch.zeros(64, 64), *(torch.tensor(c).float() / 127.5 - 1 for c in (o.PAPER, list(o.INKS.values())))
        shape[20:44, 20:44] = 1
        return torch.lerp(paper[:, None, None], inks[ink][..., None, None], shape)
    monkeypatch.setattr(o, 'own_world', lambda folder, seed, **steps: None)
    monkeypatch.setattr(o, 'paint_digits', paint)
    sheet = Image.open(o.own_sheet(tmp_path / 'a.png')).convert('RGB')
    assert sheet.size == (640, 320) and sorted(zip(*(v.tolist() for v in asked[0]))) == [(d, k) for d in range(10) for k in range(5)]
    for k, colour in enumerate(o.INKS.values()):
        for d in range(10): assert max(abs(a - b) for a, b in zip(sheet.getpixel((64 * d + 32, 64 * k + 32)), colour)) <= 2

def test_a_folder_of_digits_reads_back(tmp_path):
    pictures = o.gather(f'folder:{o.digit_folder(tmp_path / "d", 10, 4)}')
    digit, ink = o.read_digits(pictures.x.float() / 127.5 - 1)
    assert sum(o.digit_caption(*q) == c for q, c in zip(zip(digit.tolist(), ink.tolist()), pictures.captions)) >= 8
    with pytest.raises(ValueError, match='1 to 1500'): o.digit_folder(tmp_path / 'e', 1_501)
