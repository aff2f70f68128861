"Batches resume exactly; hostile files are named, never dropped in silence."
import io, json, os, random, subprocess, sys, threading, time
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from latentcourse.lib import data
from latentcourse.lib.data import Batches, Prefetch
from latentcourse.lib.files import DataError, image_folder, read_image

settings.register_profile('quick', deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile('quick')

def through_text(state): return json.loads(json.dumps(state))
def take(batches, k): return [next(batches) for _ in range(k)]
def same(a, b): return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b))

# ---- batches ----------------------------------------------------------------------------------------------------------------------

@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 12), st.sampled_from([None, 1, 2]))
def test_resuming_anywhere_changes_nothing(n, batch, seed, shuffle, drop_last, cut, ahead):
    if n < batch and drop_last: return
    make = lambda: Batches(torch.arange(n), batch, seed, shuffle, drop_last)
    wrap = (lambda b: b) if ahead is None else (lambda b: Prefetch(b, ahead))
    want = take(make(), 13)
    first, second = wrap(make()), wrap(make())
    got = take(first, cut)
    second.load_state_dict(through_text(first.state_dict()))
    assert same(got + take(second, 13 - cut), want)
    if ahead: first.close(); second.close()

@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_an_epoch_shows_each_item_once(n, batch, seed, drop_last):
    if n < batch and drop_last: return
    seen = torch.cat(list(Batches(torch.arange(n), batch, seed, drop_last=drop_last, epochs=1)))
    assert len(seen) == len(seen.unique()) == (n // batch * batch if drop_last else n)

@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 30))
def test_processes_share_the_global_batch(world, i):
    parts = [Batches(torch.arange(50), 12, 7, rank=r, world=world).at(i) for r in range(world)]
    assert all(len(p) == 12 // world for p in parts) and torch.equal(torch.cat(parts), Batches(torch.arange(50), 12, 7).at(i))

def test_batches_leave_the_global_generators_alone():
    torch.manual_seed(3); random.seed(3); np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    take(Batches(torch.arange(20), 3), 20)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]

def test_every_kind_of_source():
    x, names = torch.randn(6, 2), list('abcdef')
    got, words = next(Batches((x, names), 4, shuffle=False))
    assert torch.equal(got, x[:4]) and words == list('abcd')
    assert next(Batches(dict(x=x, y=torch.arange(6)), 2, shuffle=False))['y'].tolist() == [0, 1]
    got, words = next(Batches(list(zip(x, names)), 3, shuffle=False))
    assert torch.equal(got, x[:3]) and list(words) == list('abc')
    assert next(Batches(lambda seeds: seeds, 4, seed=7)).tolist() == [7, 8, 9, 10]

def test_finite_batches_end_and_start_again():
    b = Batches(torch.arange(10), 4, epochs=2, drop_last=False)
    assert len(b) == 6 and [len(list(b)) for _ in range(2)] == [6, 6]
    p = Prefetch(Batches(torch.arange(10), 4, epochs=2))
    assert len(p) == 4 and [len(list(p)) for _ in range(2)] == [4, 4]; p.close()

def test_a_finished_run_stays_finished():
    b = Batches(torch.arange(8), 4, epochs=1); take(b, 2)
    c = Batches(torch.arange(8), 4, epochs=1); c.load_state_dict(b.state_dict())
    assert list(c) == []

def test_prefetch_uses_one_thread_and_keeps_the_order():
    seen = []
    def draw(seeds): seen.append((threading.get_ident(), seeds[0].item())); time.sleep(random.random() * .005); return seeds
    p = Prefetch(Batches(draw, 2), 3)
    got = [b[0].item() for b in take(p, 20)]; p.close()
    assert got == list(range(0, 40, 2)) and len({t for t, _ in seen}) == 1 and seen[0][0] != threading.get_ident() and [s for _, s in seen[:20]] == got

def test_prefetch_passes_errors_on_at_their_place():
    def draw(seeds):
        if seeds[0] == 4 and broken: raise OSError('disk')
        return seeds
    broken, p = True, Prefetch(Batches(draw, 2), 3)
    assert [b[0].item() for b in take(p, 2)] == [0, 2]
    with pytest.raises(OSError): next(p)
    assert p.state_dict()['position'] == 2
    broken = False
    assert next(p)[0] == 4; p.close()

def test_a_program_with_a_thread_ahead_ends():
    code = 'import torch\nfrom latentcourse.lib.data import Batches, Prefetch\np = Prefetch(Batches(torch.arange(9), 2))\nnext(p)\nprint("done")'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120).stdout.strip() == 'done'

X = torch.arange(10)
@pytest.mark.parametrize('call, error', [
    (lambda: Batches(X, 0), ValueError), (lambda: Batches(X, -1), ValueError), (lambda: Batches(X, 2.5), TypeError), (lambda: Batches(X, '2'), TypeError), (lambda: Batches(X, 11), ValueError),
    (lambda: Batches(X[:0], 1, drop_last=False), ValueError), (lambda: Batches(torch.tensor(1), 1), ValueError), (lambda: Batches(None, 1), TypeError), (lambda: Batches((), 1), ValueError),
    (lambda: Batches((X, X[:3]), 1), ValueError), (lambda: Batches(X, 2, seed=-1), ValueError), (lambda: Batches(X, 2, seed=.5), TypeError), (lambda: Batches(X, 2, epochs=0), ValueError),
    (lambda: Batches(X, 2, rank=2, world=2), ValueError), (lambda: Batches(X, 3, world=2), ValueError), (lambda: Batches(X, 2, drop_last=False, world=2), ValueError),
    (lambda: Batches(lambda s: s, 2, epochs=1), ValueError), (lambda: len(Batches(X, 2)), TypeError), (lambda: Prefetch(X), TypeError), (lambda: Prefetch(Batches(X, 2), 0), ValueError)])
def test_bad_batches(call, error):
    with pytest.raises(error): call()

@pytest.mark.parametrize('change', [dict(seed=1), dict(batch=5), dict(n=11), dict(shuffle=False), dict(drop_last=False), dict(position=-1), dict(extra=1)])
def test_a_state_of_other_data_is_refused(change):
    with pytest.raises(ValueError): Batches(X, 2).load_state_dict(Batches(X, 2).state_dict() | change)

@pytest.mark.parametrize('state', [None, {}, [], dict(position=0)])
def test_not_a_state(state):
    with pytest.raises(ValueError, match='expected the keys'): Batches(X, 2).load_state_dict(state)

# ---- pictures that come along -----------------------------------------------------------------------------------------------------

def test_sample_pictures():
    photos = data.sample_photos()
    assert list(photos) == ['china', 'flower', 'portrait'] and all(p.shape[:2] == (1, 3) and p.aminmax().max <= 1 and p.aminmax().min >= -1 for p in photos.values())
    assert data.sample_photos(40).shape == (3, 3, 40, 40)
    x, y = data.digits()
    assert x.shape == (1797, 1, 8, 8) and x.aminmax() == (-1, 1) and y.unique().tolist() == list(range(10))
    assert torch.equal(data.photo_patches(5, 16, 2), data.photo_patches(5, 16, 2)) and not torch.equal(data.photo_patches(5, 16, 2), data.photo_patches(5, 16, 3))

@pytest.mark.parametrize('call', [lambda: data.photo_patches(0), lambda: data.photo_patches(1, 0), lambda: data.photo_patches(1, 5000), lambda: data.photo_patches(1, 8, -1), lambda: data.sample_photos(0)])
def test_bad_pictures(call):
    with pytest.raises(ValueError): call()

# ---- one file ---------------------------------------------------------------------------------------------------------------------

def picture(w=40, h=40):
    a = np.full((h, w, 3), (255, 0, 0), dtype=np.uint8); a[:h // 2, :w // 2] = 0, 0, 255
    return Image.fromarray(a)

def quarter_is_blue(x): return torch.allclose(x[:, 5, 5], torch.tensor([-1., -1., 1.]), atol=.1) and torch.allclose(x[:, -5, -5], torch.tensor([1., -1., -1.]), atol=.1)

@pytest.mark.parametrize('mode, ext', [('RGB', 'png'), ('RGB', 'jpg'), ('RGB', 'bmp'), ('RGB', 'webp'), ('RGBA', 'png'), ('P', 'png'), ('P', 'gif'), ('CMYK', 'jpg'), ('CMYK', 'tif'), ('YCbCr', 'jpg'), ('LAB', 'tif')])
def test_modes(tmp_path, mode, ext):
    picture().convert(mode).save(f := tmp_path / f'a.{ext}') if mode != 'LAB' else picture().save(f := tmp_path / 'a.tif')
    assert quarter_is_blue(read_image(f)) and read_image(f, 16).shape == (3, 16, 16)

def test_grey_two_level_and_sixteen_bits(tmp_path):
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    Image.fromarray(ramp).save(tmp_path / 'l.png'); Image.fromarray(ramp).convert('1').save(tmp_path / '1.png'); Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / '16.png')
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / '16.tif')
    want = torch.tensor(ramp / 127.5 - 1).float()
    for name in ('l.png', '16.png', '16.tif'): assert torch.allclose(read_image(tmp_path / name), want.expand(3, -1, -1), atol=1e-5), name
    assert set(read_image(tmp_path / '1.png').unique().tolist()) == {-1., 1.}

def test_transparency_lies_on_white(tmp_path):
    Image.new('RGBA', (8, 8), (255, 0, 0, 0)).save(tmp_path / 'a.png')
    p = picture(8, 8).convert('P'); p.save(tmp_path / 'b.png', transparency=p.getpixel((0, 0)))
    assert (read_image(tmp_path / 'a.png') == 1).all() and (read_image(tmp_path / 'b.png')[:, 0, 0] == 1).all()

@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(tmp_path, orientation):
    op = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation) # what undoes each
    img = picture(30, 40)
    if op is not None: img = img.transpose(op)
    exif = Image.Exif(); exif[0x0112] = orientation
    img.save(tmp_path / 'a.png', exif=exif)
    x = read_image(tmp_path / 'a.png')
    assert x.shape == (3, 40, 30) and quarter_is_blue(x)

@pytest.mark.parametrize('size', [(1, 1), (1, 400), (400, 1), (7, 3)])
def test_odd_sizes(tmp_path, size):
    picture(*size).save(tmp_path / 'a.png')
    assert read_image(tmp_path / 'a.png', 12).shape == (3, 12, 12) and read_image(tmp_path / 'a.png', 12).isfinite().all()

def bytes_of(ext, w=60): b = io.BytesIO(); picture(w, w).save(b, {'jpg': 'jpeg'}.get(ext, ext)); return b.getvalue()

@given(st.sampled_from(['png', 'jpg', 'gif', 'bmp', 'webp']), st.floats(0, 1), st.binary(max_size=4), st.booleans())
def test_damaged_files_are_read_or_named(tmp_path, ext, where, junk, cut):
    raw = bytes_of(ext); at = int(where * len(raw))
    (f := tmp_path / f'x.{ext}').write_bytes(raw[:at] + junk + (b'' if cut else raw[at + len(junk):]))
    try: x = read_image(f)
    except DataError as err: assert str(f) in str(err)
    else: assert x.ndim == 3 and x.shape[0] == 3 and x.isfinite().all()

@pytest.mark.parametrize('ext', ['png', 'jpg'])
def test_truncated(tmp_path, ext):
    b = io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(b, {'jpg': 'jpeg'}.get(ext, ext)); raw = b.getvalue()
    for at in (1, 10, len(raw) // 2, len(raw) - len(raw) // 10):
        (tmp_path / 'x').write_bytes(raw[:at])                        # noise, so that every part of the file holds pixels
        with pytest.raises(DataError, match='x: '): read_image(tmp_path / 'x')

def test_refused_files(tmp_path):
    (tmp_path / 'empty.png').touch(); (tmp_path / 'text.png').write_text('hello'); picture(100, 100).save(tmp_path / 'big.png')
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / 'float.tif')
    for name, why in (('empty.png', 'empty'), ('text.png', 'not an image'), ('gone.png', 'no such file'), ('', 'not a file'), ('float.tif', 'expected 8 or 16')):
        with pytest.raises(DataError, match=why) as e: read_image(tmp_path / name)
        assert str(tmp_path / name) in str(e.value)
    with pytest.raises(DataError, match='more than the limit'): read_image(tmp_path / 'big.png', max_pixels=9999)
    with pytest.raises(ValueError): read_image(tmp_path / 'big.png', 0)

def test_a_decompression_bomb_is_not_decoded(tmp_path):
    import struct, zlib
    chunk = lambda k, d: struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d))
    (tmp_path / 'bomb.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'0')) + chunk(b'IEND', b''))
    tick = time.perf_counter()
    with pytest.raises(DataError, match='bomb.png'): read_image(tmp_path / 'bomb.png')
    assert time.perf_counter() - tick < 2

@pytest.mark.skipif(os.name == 'nt' or getattr(os, 'geteuid', lambda: 1)() == 0, reason='this user may read everything')
def test_unreadable_file(tmp_path):
    picture().save(tmp_path / 'a.png'); (tmp_path / 'a.png').chmod(0)
    with pytest.raises(DataError, match='a.png'): read_image(tmp_path / 'a.png')

# ---- a folder ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'bear').mkdir()
    for n in ('a.png', 'b.jpg', 'bear/c.png'): picture().save(tmp_path / n)
    (tmp_path / '.DS_Store').write_bytes(b'x')
    return tmp_path

def meta(folder, *rows): (folder / 'metadata.jsonl').write_text('\n'.join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding='utf-8')
def row(name, text='a picture'): return dict(file_name=name, text=text)
GOOD = [row('a.png', 'ein Bär'), row('b.jpg'), row('bear/c.png')]

def test_a_good_folder(folder):
    pics = image_folder(folder, 16)
    assert len(pics) == 3 and pics.captions == ['', '', 'bear'] and not pics.skipped and quarter_is_blue(image_folder(folder, 40)[0][0])
    meta(folder, *GOOD, '')
    pics = image_folder(str(folder), 16)
    assert pics.captions == ['ein Bär', 'a picture', 'a picture']
    x, texts = next(Batches(pics, 2, shuffle=False))
    assert x.shape == (2, 3, 16, 16) and texts == pics.captions[:2]
    kept = pics.take(torch.arange(3))[0]; pics.pixels = None
    assert torch.equal(pics.take(torch.arange(3))[0], kept)           # decoded again, or kept as bytes: the same

FAULTS = [(row('../x.png'), 'leads out'), (row('/etc/passwd'), 'leads out'), (row('C:\\x.png'), 'leads out'), (row('bear/../../x.png'), 'leads out'), (row('..\\x.png'), 'leads out'), (row(''), 'leads out'),
          (row('gone.png'), 'not in the folder'), (row('a.png'), 'twice'), ('{', 'not JSON'), ('[1]', 'file_name'), ('{"text": "x"}', 'file_name'), ('{"file_name": 3, "text": "x"}', 'file_name'), (row('bear'), 'not in the folder')]

@pytest.mark.parametrize('fault, why', FAULTS, ids=[str(f) for f, _ in FAULTS])
def test_bad_metadata(folder, fault, why):
    meta(folder, *GOOD, fault)
    with pytest.raises(DataError, match=f'metadata.jsonl, line 4: .*{why}'): image_folder(folder, 8)
    with pytest.warns(UserWarning, match='3 pictures in use, 1 left out'): pics = image_folder(folder, 8, on_bad='skip')
    assert len(pics) == 3 and len(pics.skipped) == 1 and why in pics.skipped[0][1]

@pytest.mark.parametrize('text', ['', ' ', None, 3, ['x']])
def test_missing_caption(folder, text):
    meta(folder, *GOOD[1:], row('a.png', text))
    with pytest.raises(DataError, match='no caption for a.png'): image_folder(folder, 8)
    meta(folder, *GOOD[1:])
    with pytest.raises(DataError, match='a.png: no caption in metadata'): image_folder(folder, 8)

def test_every_file_is_accounted_for(folder):
    raw = bytes_of('png')
    for name, content in (('cut.png', raw[:80]), ('empty.jpg', b''), ('readme.txt', b'hello')): (folder / name).write_bytes(content)
    with pytest.raises(DataError, match="on_bad='skip'"): image_folder(folder, 8)
    with pytest.warns(UserWarning, match='3 pictures in use, 3 left out'): pics = image_folder(folder, 8, 'skip')
    assert sorted(os.path.basename(w) for w, _ in pics.skipped) == ['cut.png', 'empty.jpg', 'readme.txt']
    with pytest.warns(UserWarning), pytest.raises(DataError, match='no usable picture'): image_folder(folder, 8, 'skip', max_pixels=10)

@pytest.mark.parametrize('call', [lambda f: image_folder(f / 'gone'), lambda f: image_folder(f / 'a.png'), lambda f: image_folder(f, 0), lambda f: image_folder(f, 8, 'ignore'), lambda f: image_folder(f, 8, max_pixels=0)])
def test_bad_calls(folder, call):
    with pytest.raises(ValueError): call(folder)

def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match='no usable picture among 0'): image_folder(tmp_path)

def test_metadata_that_is_not_text(folder):
    (folder / 'metadata.jsonl').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(DataError, match='metadata.jsonl: cannot be read'): image_folder(folder, 8)

# ---- by name ----------------------------------------------------------------------------------------------------------------------

def test_data_by_name(folder):
    assert len(data.dataset(f'folder:{folder}', 8)) == 3 and data.dataset('photos', 8).shape == (3, 3, 8, 8)
    x, y = data.dataset('digits', 16)
    assert x.shape == (1797, 3, 16, 16) and len(y) == 1797 and x.aminmax().max <= 1

@pytest.mark.parametrize('name', data.TORCHVISION)
def test_a_missing_set_says_how_to_get_it(tmp_path, name):
    with pytest.raises(DataError, match=f'{name} is not ready under .*download=True'): data.dataset(name, root=tmp_path)

def test_a_download_without_network(tmp_path):
    with pytest.raises(DataError, match='download failed'): data.dataset('svhn', root=tmp_path, download=True)

def test_a_set_through_torchvision(tmp_path, monkeypatch):
    "MNIST's own file format, written here."
    import struct
    raw = tmp_path / 'MNIST' / 'raw'; raw.mkdir(parents=True)
    for part in ('train', 't10k'):
        (raw / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 2051, 4, 28, 28) + bytes(range(196)) * 16)
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 2049, 4) + bytes([3, 1, 4, 1]))
    monkeypatch.setenv('LATENTCOURSE_DATA', str(tmp_path))
    x, y = next(Batches(data.dataset('mnist', 28), 4, shuffle=False))
    assert x.shape == (4, 3, 28, 28) and y.tolist() == [3, 1, 4, 1] and torch.equal(x[0, 0, 0, :3], torch.tensor([0, 1, 2]) / 127.5 - 1)
    assert len(data.dataset('mnist', 28, train=False)) == 4

@pytest.mark.parametrize('spec, error', [('imagenet', ValueError), ('', TypeError), (None, TypeError), ('folder:', ValueError), ('folder:/no/such/folder', DataError), ('toybox', ValueError)])
def test_unknown_names(spec, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error): data.dataset(spec)
