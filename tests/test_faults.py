"A run killed at any instant and resumed ends in the same bits; a disk that fills up costs nothing that was there."
import errno, json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from latentcourse.lib import sealed
from latentcourse.lib.checkpoint import UnwritableCheckpoint, load, save

def kill(folder, kills, seed):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'OBJC_DISABLE_INITIALIZE_FORK_SAFETY': 'YES'}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name('kill_child.py')), str(folder), str(kills), str(seed)], env=env, capture_output=True, text=True, timeout=300 + 60 * kills)
    lines = done.stdout.split('\n')
    assert done.returncode == 0 and 'DONE' in lines, done.stdout[-1000:] + done.stderr[-4000:]
    found = [json.loads(line) for line in lines if line.startswith('{')]
    print(f'{len(found)} kills, {sum(f["writing"] for f in found)} while writing, after {sorted(f["at"] for f in found)} saved steps')
    assert len(found) == kills
    assert not [f for f in found if f['code'] or f['differing']]
    return found

unforkable = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the kill test forks, which Windows cannot')

@unforkable
def test_killed_and_resumed(tmp_path):
    found = kill(tmp_path, 8, seed=0)
    assert any(f['writing'] for f in found)

@unforkable
@pytest.mark.proof
def test_killed_and_resumed_200_times(tmp_path):
    found = kill(tmp_path, 200, seed=1)
    assert sum(f['writing'] for f in found) >= 20 and len({f['at'] for f in found}) >= 10

OLD, NEW = {'w': torch.zeros(1000)}, {'w': torch.ones(1000)}

def whole(path, value):
    "The checkpoint is there, loads, and holds `value`; nothing else lies about."
    assert load(path)[0]['w'].eq(value).all() and sorted(p.name for p in path.parent.iterdir()) == ['a.json', 'a.safetensors']

@pytest.mark.parametrize('call', ['write', 'fsync', 'replace', 'open'])
@pytest.mark.parametrize('nth', [1, 2])
def test_disk_full(tmp_path, monkeypatch, call, nth):
    path = save(tmp_path / 'a.safetensors', OLD, {})
    count = 0
    def full(*a, **k):
        nonlocal count; count += 1
        if count == nth: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true(*a, **k)
    if call == 'write':
        def opened(*a, **k):
            f = open(*a, **k); inner = f.write
            class Full:
                def __enter__(self): return self
                def __exit__(self, *a): f.close()
                def write(self, b): return full(inner, b)
                def flush(self): f.flush()
                def fileno(self): return f.fileno()
            return Full()
        def true(inner, b): return inner(b)
        monkeypatch.setattr(sealed, 'open', opened, raising=False)
    elif call == 'open': true = open; monkeypatch.setattr(sealed, 'open', full, raising=False)
    else: true = getattr(os, call); monkeypatch.setattr(sealed.os, call, full)
    with pytest.raises(UnwritableCheckpoint, match=r'a\.(safetensors|json).*No space left'): save(path, NEW, {})
    monkeypatch.undo()
    whole(path, 1 if (call, nth) == ('replace', 2) else 0)              # the second rename is that of the readable copy

@pytest.mark.skipif(sys.platform != 'linux', reason='file size limits as on Linux')
def test_disk_really_full(tmp_path):
    "The kernel itself refuses the write: a limit on the size of files, in a process of its own."
    path = save(tmp_path / 'a.safetensors', OLD, {})
    code = (f'import resource, signal, torch; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n'
            f'from latentcourse.lib.checkpoint import save, UnwritableCheckpoint\n'
            f'try: save({str(path)!r}, {{"w": torch.ones(1000)}}, {{}})\nexcept UnwritableCheckpoint as e: print("REFUSED", e)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'})
    assert 'REFUSED' in done.stdout and 'untouched' in done.stdout, done.stdout + done.stderr
    whole(path, 0)

@pytest.mark.parametrize('stop', ['before', 'between', 'after'])
def test_died_around_the_renames(tmp_path, monkeypatch, stop):
    "Whichever rename came last, what is there is one whole checkpoint."
    path, renamed = save(tmp_path / 'a.safetensors', OLD, {'seed': 1}), []
    class Died(BaseException): pass
    def rename(temp, to):
        if len(renamed) == ['before', 'between', 'after'].index(stop): raise Died
        os.replace(temp, to); renamed.append(to)
    monkeypatch.setattr(sealed, 'rename', rename)
    try: save(path, NEW, {'seed': 2})
    except Died: pass
    tensors, meta = load(path)
    assert (tensors['w'][0].item(), meta['seed']) == ((0, 1) if stop == 'before' else (1, 2))
