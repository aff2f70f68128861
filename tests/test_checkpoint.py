"A checkpoint is whole and the one asked for, or loading it raises an error that names the file and the reason."
import json, math, os, subprocess
from dataclasses import dataclass, replace
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse.lib import checkpoint as ck, sealed
from latentcourse.lib.checkpoint import check_figures, figure, fingerprint, load, load_model, provenance, save, save_model, train_or_load
from latentcourse.lib.sealed import (CheckpointError, CorruptCheckpoint, MissingCheckpoint, TruncatedCheckpoint, UnreadableCheckpoint, UnwritableCheckpoint, WrongConfig,
    WrongFingerprint, WrongState, canonical)
from latentcourse.lib.state import pack, rng_state, set_rng_state, unpack

quick = settings(max_examples=40, deadline=None)

@dataclass(frozen=True)
class Cfg:
    width:int=4
    lr:float=1e-3
    seed:int=0

def make(cfg=Cfg()): torch.manual_seed(cfg.seed); return nn.Sequential(nn.Conv2d(3, cfg.width, 3, padding=1), nn.BatchNorm2d(cfg.width), nn.SiLU(), nn.Flatten(), nn.Linear(cfg.width * 64, 2))
PROBE = (2, 3, 8, 8)

@pytest.fixture
def path(tmp_path): return save_model(tmp_path / 'net.safetensors', make(), Cfg(), {'evaluation': {'accuracy': figure(torch.ones(9))}}, probe=PROBE, half=False)

# ---- what is written is what comes back

tensors = st.dictionaries(st.text('abc.', min_size=1, max_size=5), st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(['float32', 'float64', 'bfloat16', 'float16', 'int64', 'uint8', 'bool'])), max_size=4)

@quick
@given(tensors, st.booleans())
def test_round_trip(tmp_path_factory, spec, half):
    made = {k: (torch.randn(shape) * 2).to(getattr(torch, kind)) for k, (shape, kind) in spec.items()}
    back, meta = load(save(tmp_path_factory.mktemp('c') / 'c.safetensors', made, {'note': 'é'}, half))
    assert meta['note'] == 'é' and back.keys() == made.keys()
    for k, v in made.items():
        assert back[k].dtype == v.dtype and back[k].shape == v.shape
        assert torch.equal(back[k], v.half().to(v.dtype) if half and v.is_floating_point() else v)

def test_tied_strided_and_same_bytes(tmp_path):
    w = torch.randn(4, 6)
    made = {'a': w, 'tied': w, 'strided': w[:, ::2], 'last': torch.randn(1, 3, 4, 4).contiguous(memory_format=torch.channels_last)}
    files = [save(tmp_path / f'{n}.safetensors', made, {'b': 1, 'a': 2}) for n in 'xy']
    assert files[0].read_bytes() == files[1].read_bytes()
    assert all(torch.equal(load(files[0])[0][k], v) for k, v in made.items())

def test_half_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match='65504'): save(tmp_path / 'a.safetensors', {'w': torch.tensor([1e6])}, {}, half=True)

def test_no_pickle(): assert not [p for p in (Path(sealed.__file__).parent).glob('*.py') if 'pickle' in p.read_text(encoding='utf-8') or 'torch.load' in p.read_text(encoding='utf-8')]

def test_copy_for_people(path):
    import hashlib
    note = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
    assert note['file_sha256'] == hashlib.sha256(path.read_bytes()).hexdigest() and note['config'] == {'width': 4, 'lr': 1e-3, 'seed': 0} and note['seed'] == 0
    assert {'versions', 'device', 'commit', 'fingerprint', 'evaluation'} <= note.keys()
    path.with_suffix('.json').unlink()
    assert load(path)                                                              # only a copy

# ---- what is damaged is refused

@quick
@given(st.data())
def test_damage_is_noticed(tmp_path_factory, data):
    path = save(tmp_path_factory.mktemp('c') / 'c.safetensors', {'w': torch.arange(6.)}, {'seed': 1})
    blob = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(['flip', 'cut', 'grow', 'swap', 'noise']))
    i = data.draw(st.integers(0, len(blob) - 1))
    if kind == 'flip': blob[i] ^= 1 << data.draw(st.integers(0, 7))
    if kind == 'cut': blob = blob[:i]
    if kind == 'grow': blob += data.draw(st.binary(min_size=1, max_size=9))
    if kind == 'swap': blob[i] = (blob[i] + data.draw(st.integers(1, 255))) % 256
    if kind == 'noise': blob = data.draw(st.binary(max_size=99))
    path.write_bytes(blob)
    with pytest.raises((CorruptCheckpoint, TruncatedCheckpoint), match='c.safetensors'): load(path)

def test_truncated(path):
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TruncatedCheckpoint, match=r'net\.safetensors: has \d+ bytes of \d+'): load(path)

def test_foreign_safetensors(tmp_path):
    from safetensors.torch import save_file
    save_file({'w': torch.ones(2)}, tmp_path / 'a.safetensors')
    with pytest.raises(CorruptCheckpoint, match='not a checkpoint of this course'): load(tmp_path / 'a.safetensors')

def test_doctored_copy(path):
    note = path.with_suffix('.json')
    note.write_text(note.read_text(encoding='utf-8').replace('"width": 4', '"width": 8'), encoding='utf-8')
    with pytest.raises(CorruptCheckpoint, match=r'net\.json: was edited'): load(path)
    note.write_text('{', encoding='utf-8')
    with pytest.raises(CorruptCheckpoint, match=r'net\.json'): load(path)

def test_doctored_facts(path):
    blob = path.read_bytes()
    path.write_bytes(blob.replace(b'\\"mean\\": 1.0', b'\\"mean\\": 9.0', 1))
    assert path.read_bytes() != blob
    with pytest.raises(CorruptCheckpoint, match='seal'): load(path)

def test_missing(tmp_path):
    with pytest.raises(MissingCheckpoint, match='no such file'): load(tmp_path / 'a.safetensors')

def test_unreadable(path, monkeypatch):
    def refuse(self): raise PermissionError(13, 'Permission denied')
    with monkeypatch.context() as m:
        m.setattr(Path, 'read_bytes', refuse)
        with pytest.raises(UnreadableCheckpoint, match='Permission denied'): load(path)
    path.unlink(); path.mkdir()
    with pytest.raises(UnreadableCheckpoint): load(path)

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='permissions do not bind this user')
def test_forbidden(path):
    path.chmod(0)
    with pytest.raises(UnreadableCheckpoint, match='permission'): load(path)

def test_unwritable(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UnwritableCheckpoint): save(tmp_path / 'file' / 'a.safetensors', {}, {})
    (tmp_path / 'b.safetensors').mkdir()
    with pytest.raises(UnwritableCheckpoint): save(tmp_path / 'b.safetensors', {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['b.safetensors', 'file']

def test_leftovers_are_swept(path):
    old, new = path.with_name(f'.{path.name}.1.tmp'), path.with_name(f'.{path.name}.2.tmp')
    for p in (old, new): p.write_bytes(b'x')
    os.utime(old, (0, 0))
    save(path, {}, {})
    assert not old.exists() and new.exists()

@pytest.mark.parametrize('bad', [dict(path='a.pt'), dict(tensors=[1]), dict(tensors={'a': 1}), dict(tensors={1: torch.ones(1)}), dict(meta=None), dict(meta={'x': math.nan}), dict(meta={'x': object()})])
def test_save_refuses(tmp_path, bad):
    given = {**dict(path='a.safetensors', tensors={}, meta={}), **bad}
    with pytest.raises((TypeError, ValueError)): save(tmp_path / given['path'], given['tensors'], given['meta'])
    assert not list(tmp_path.iterdir())

# ---- what is another model's is refused

def test_wrong_config(path):
    with pytest.raises(WrongConfig, match=r'lr: stored 0.001, asked for 0.01; width: stored 4, asked for 8'): load(path, cfg=replace(Cfg(), width=8, lr=1e-2))
    with pytest.raises(WrongConfig, match=r"depth: stored 'nothing', asked for 2"): load(path, cfg={'width': 4, 'lr': 1e-3, 'seed': 0, 'depth': 2})
    load(path, cfg=Cfg())

@pytest.mark.parametrize('other', [lambda: make(Cfg(width=8)), lambda: make().double(), lambda: nn.Linear(2, 2)])
def test_wrong_state(path, other):
    with pytest.raises(WrongState, match='net.safetensors: does not fit the model'): load_model(path, other())

def test_fingerprint_notices_changed_code(path):
    assert load_model(path, make(Cfg(seed=5)), Cfg())['seed'] == 0
    changed = make(); changed[0].padding_mode = 'reflect'; changed[0]._reversed_padding_repeated_twice = [1] * 4
    with pytest.raises(WrongFingerprint, match='code has changed'): load_model(path, changed)

def test_fingerprint_leaves_no_trace():
    net = make().train(); state, before = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
    a, b = fingerprint(net, PROBE), fingerprint(net, lambda m: {'two': [m(torch.zeros(PROBE)), torch.rand(3)]})
    assert net.training and torch.equal(state, torch.get_rng_state()) and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert len(a['outputs']) == 4 and b['probe'] == 'own' and b == fingerprint(net, lambda m: {'two': [m(torch.zeros(PROBE)), torch.rand(3)]})
    with torch.no_grad(): net[4].weight.fill_(math.nan)
    with pytest.raises(ValueError, match='NaN'): fingerprint(net, PROBE)

def test_half_models_keep_their_fingerprint(tmp_path):
    path = save_model(tmp_path / 'a.safetensors', make(), Cfg(), probe=PROBE, half=True)
    assert load_model(path, make(Cfg(seed=1)), Cfg()) and path.stat().st_size + 900 < save_model(tmp_path / 'b.safetensors', make(), Cfg(), probe=PROBE, half=False).stat().st_size

def test_figures():
    right = torch.rand(5000, generator=torch.Generator().manual_seed(0)) < .97
    stored = {'accuracy': figure(right), 'exact': figure(torch.ones(9))}
    assert check_figures('x', stored, {'accuracy': figure(right[:300])}) < 5 and check_figures('x', stored, {'exact': figure(torch.ones(3))}) == 0
    with pytest.raises(WrongFingerprint, match='standard errors apart'): check_figures('x', stored, {'accuracy': figure(torch.rand(300) < .8)})
    with pytest.raises(WrongFingerprint, match='no recorded figure'): check_figures('x', stored, {'other': figure(right)})
    for bad in ([], [[1.]], [math.nan], 'x'):
        with pytest.raises((TypeError, ValueError)): figure(bad)

def test_provenance():
    facts = provenance()
    assert facts['versions']['torch'] == torch.__version__ and canonical(facts)

# ---- nested state

nests = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False) | st.text(max_size=5) | st.integers(0, 4).map(torch.arange),
                     lambda s: st.lists(s, max_size=3) | st.lists(s, max_size=3).map(tuple) | st.dictionaries(st.text('a.~', max_size=3) | st.integers(0, 9), s, max_size=3), max_leaves=12)

def same(a, b): return type(a) is type(b) and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a.keys() == b.keys() and all(same(a[k], b[k]) for k in a) if isinstance(a, dict)
                                               else len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b)

@quick
@given(nests)
def test_any_nest_comes_back(nest):
    found = {}
    assert same(unpack(json.loads(canonical(pack(nest, found))), found), nest)

def test_pack_arrays_and_refusals():
    found = {}
    back = unpack(pack({'a': np.arange(3), 'b': np.float32(.5), 'c': torch.Size([2]), 'd': math.inf}, found), found)
    assert isinstance(back['a'], np.ndarray) and back['b'] == .5 and back['c'] == (2,) and back['d'] == math.inf
    for bad in (object(), {(1, 2): 3}, {'f': print}, [{1, 2}]):
        with pytest.raises(TypeError, match='cannot store'): pack(bad, {})

def test_generators_come_back():
    import random
    def draw(): return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()]
    draw(); found = {}
    packed = json.loads(canonical(pack(rng_state(), found)))
    first = draw(); set_rng_state(unpack(packed, found))
    assert draw() == first

# ---- train or load

@pytest.fixture
def calls(tmp_path, monkeypatch):
    "Counts trainings; runs go to a folder of the test."
    monkeypatch.setenv('LATENTCOURSE_RUNS', str(tmp_path / 'runs'))
    monkeypatch.delenv('LATENTCOURSE_TRAIN', raising=False)
    made = []
    def train(cfg): made.append(cfg); return make(cfg), {'minutes': .1}
    made_by = lambda cfg=Cfg(), **more: train_or_load('net', cfg, train, make, tmp_path, **more)
    return made, made_by

def test_nothing_shipped_trains_once(calls, capsys):
    made, go = calls
    net, meta = go(probe=PROBE)
    assert len(made) == 1 and meta['minutes'] == .1 and 'training it (none is shipped)' in capsys.readouterr().out
    twin, _ = go()
    assert len(made) == 1 and torch.equal(twin[0].weight, net[0].weight) and 'trained earlier' in capsys.readouterr().out
    go(Cfg(width=2))
    assert len(made) == 2

def test_shipped_is_loaded(calls, path, capsys):
    made, go = calls
    assert go()[1]['config'] == {'width': 4, 'lr': 1e-3, 'seed': 0} and not made and 'shipped checkpoint' in capsys.readouterr().out
    with pytest.raises(WrongConfig, match='LATENTCOURSE_TRAIN=1'): go(Cfg(width=2))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedCheckpoint): go()
    assert not made                                                                # nothing was retrained in silence

@pytest.mark.parametrize('asked, times', [('1', 1), ('run-7', 1), ('0', 0), ('', 0)])
def test_training_on_request(calls, path, monkeypatch, asked, times):
    made, go = calls
    monkeypatch.setenv('LATENTCOURSE_TRAIN', asked)
    go(); go()
    assert len(made) == times
    monkeypatch.setenv('LATENTCOURSE_TRAIN', 'run-8'); go()
    assert len(made) == times + 1

def test_tensors_without_a_model(calls, tmp_path):
    tensors, meta = train_or_load('plain', {'n': 3}, lambda cfg: ({'w': torch.ones(cfg['n'])}, {'log': [1]}), folder=tmp_path, say=lambda s: None)
    assert tensors['w'].sum() == 3 and meta['config'] == {'n': 3} and meta['log'] == [1]

@pytest.mark.parametrize('bad', [dict(name='../up'), dict(name=''), dict(name=3), dict(train=lambda cfg: make()), dict(train=lambda cfg: (make(), None)), dict(cfg=object())])
def test_train_or_load_refuses(calls, tmp_path, bad):
    with pytest.raises((TypeError, ValueError)): train_or_load(**{**dict(name='net', cfg=Cfg(), train=lambda cfg: (make(), {}), folder=tmp_path, say=lambda s: None), **bad})

def shipped(): return sorted((Path(ck.__file__).parents[1] / 'checkpoints').glob('*.safetensors'))

@pytest.mark.parametrize('path', shipped(), ids=lambda p: p.stem)
def test_what_is_shipped(path):
    "Whole, with its copy for people up to date, and small."
    tensors, meta = load(path)
    note = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
    assert canonical({k: note[k] for k in meta if k in note}) == canonical({k: meta[k] for k in meta if k in note}) and {'config', 'seed', 'versions', 'device', 'log', 'evaluation', 'fingerprint'} <= meta.keys()
    assert path.stat().st_size <= 10e6 and sum(p.stat().st_size for p in shipped()) <= 48e6
