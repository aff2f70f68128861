"Recorded sweeps: kept points, honest reruns, damaged and stale tables."
import os, random, subprocess, sys
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from latentcourse.lib import study as s
from latentcourse.lib.study import CorruptStudy, StaleStudy, Study, StudyError, UnknownStudy, allowed, grid, load_study, rerun, study_file, sweep

settings.register_profile('quick', deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile('quick')
CALLS = []

def point(a, b, seed):
    CALLS.append((a, b, seed))
    return dict(sum=a + b + random.Random(f'{a}{b}{seed}').gauss(0, .1), product=a * b)

def other_point(a, b, seed): return dict(sum=a + b + 1., product=a * b)
def interrupted(a, b, seed):
    if len(CALLS) == STOP[0]: raise KeyboardInterrupt
    CALLS.append((a, b, seed)); return dict(v=a + b + seed)
STOP = [99]

GRID = grid(dict(a=(1, 2), b=(3., 4.)))
def make(f=point, name='sums', settings_=GRID, seeds=(0, 1, 2)): return Study(name, f, settings_, seeds, 'Sums.')

@pytest.fixture(autouse=True)
def fresh(): CALLS.clear(); STOP[0] = 99

@pytest.fixture
def table(tmp_path): sweep(make(), tmp_path, False); CALLS.clear(); return tmp_path

def test_a_table_holds_every_point_and_where_it_was_made(table):
    points = load_study(make(), table).points
    assert [(p['settings']['a'], p['settings']['b'], p['seed']) for p in points] == [(a, b, k) for a in (1, 2) for b in (3., 4.) for k in (0, 1, 2)]
    assert all({'values', 'minutes', 'versions', 'device', 'commit', 'code', 'written'} <= set(p) for p in points)
    rows = load_study('sums', table).rows()
    assert len(rows) == 4 and rows[3]['values']['product'] == [8., 8., 8.] and rows[0]['seeds'] == [0, 1, 2]
    text = load_study(make(), table)._repr_markdown_()
    assert text.count('\n| ') == 5 and '±' in text and 'seeds 0, 1, 2' in text

@pytest.mark.parametrize('stop', range(13))
def test_recorded_points_are_kept(tmp_path, stop):
    st_, STOP[0] = make(interrupted), stop
    try: sweep(st_, tmp_path, False)
    except KeyboardInterrupt: assert stop < 12
    STOP[0] = 99
    assert len(sweep(st_, tmp_path, False)) == 12 and len(CALLS) == len(set(CALLS)) == 12
    assert [p.name for p in tmp_path.iterdir()] == ['sums.json']

def test_a_wider_study_measures_only_what_is_new(table):
    with pytest.raises(StaleStudy, match='12 of 16'): load_study(make(seeds=(0, 1, 2, 3)), table)
    sweep(make(seeds=(0, 1, 2, 3)), table, False)
    assert CALLS == [(a, b, 3) for a in (1, 2) for b in (3., 4.)]
    with pytest.raises(StaleStudy, match='4 others'): load_study(make(), table)
    CALLS.clear(); assert len(sweep(make(), table, False)) == 12 and not CALLS

def test_other_code_is_stale_and_measured_again(table):
    with pytest.raises(StaleStudy, match='latentcourse run --study sums'): load_study(make(other_point), table)
    with pytest.raises(StaleStudy): rerun(make(other_point), 0, folder=table)
    sweep(make(other_point), table, False)
    assert load_study(make(other_point), table).points[0]['values']['sum'] == 5.

def test_the_mark_of_code_survives_comments_and_a_new_process(tmp_path):
    (tmp_path / 'mod_a.py').write_text('def f(seed):\n    return dict(v=f"{seed:>3}")\n'); (tmp_path / 'mod_b.py').write_text('def f(seed): # why\n\n  return dict( v = f"{seed:>3}" )\n')
    (tmp_path / 'mod_c.py').write_text('def f(seed):\n    return dict(v=f"{seed:>4}")\n')
    code = 'import importlib, sys\nfrom latentcourse.lib.study import code_mark\nprint(*(code_mark(importlib.import_module(n).f) for n in ("mod_a", "mod_b", "mod_c")))'
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])})
    a, b, c = out.stdout.split()
    assert a == b != c, out.stderr

# ---- reruns -----------------------------------------------------------------------------------------------------------------------

def test_an_honest_rerun_agrees(table):
    for i in range(4):
        for seed in (0, 1, 2):
            got = {g['name']: g for g in rerun(make(), i, seed, dict(product=0), table)}
            assert got['sum']['live'] == got['sum']['recorded'] and got['product']['low'] == got['product']['high']
    assert rerun(make(), dict(a=2, b=3.), folder=table)[1]['live'] == 6

def test_a_wrong_rerun_fails(table, monkeypatch):
    row = load_study(make(), table).rows()[0]
    good = {k: v[0] for k, v in row['values'].items()}
    assert s.agree_study(row, good)
    for wrong in (dict(sum=40.), dict(product=3.1), dict(sum=-4.)):
        with pytest.raises(AssertionError, match='outside'): s.agree_study(row, good | wrong)
    with pytest.raises(AssertionError): s.agree_study(row, good | dict(sum=good['sum'] + .011), dict(sum=.01))
    with pytest.raises(AssertionError): s.agree_study(row, good | dict(sum=float('nan')))
    with pytest.raises(StaleStudy): s.agree_study(row, dict(sum=4.))
    with pytest.raises(ValueError): s.agree_study(row, good, dict(difference=1.))

@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=8))
def test_the_interval_holds_every_recorded_mean(seen):
    low, high = allowed(seen)
    assert low - 1e-6 <= sum(seen) / len(seen) <= high + 1e-6

@pytest.mark.parametrize('call', [lambda t: rerun(make(), 4, folder=t), lambda t: rerun(make(), -1, folder=t), lambda t: rerun(make(), dict(a=9, b=3.), folder=t), lambda t: rerun(make(), 0, 7, folder=t),
                                  lambda t: allowed([1., 2.]), lambda t: allowed([1.], -1.), lambda t: allowed([1.], float('nan'))])
def test_bad_reruns(table, call):
    with pytest.raises(ValueError): call(table)

# ---- damage -----------------------------------------------------------------------------------------------------------------------

@given(data=st.data())
def test_a_damaged_table_is_never_believed(data, table):
    f = study_file('sums', table); raw = f.read_bytes(); honest = load_study('sums', table).points
    at = data.draw(st.integers(0, len(raw) - 1))
    f.write_bytes(raw[:at] if data.draw(st.booleans()) else raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1:])
    try: assert load_study('sums', table).points == honest      # spacing, the text, or nothing at all
    except CorruptStudy as err: assert 'sums.json' in str(err)
    finally: f.write_bytes(raw)

@pytest.mark.parametrize('content', ['', '{}', '[]', 'null', '{"name": "sums", "text": "", "points": [], "sha256": ""}', '{"name": 1'])
def test_not_a_table(tmp_path, content):
    study_file('sums', tmp_path).write_text(content)
    with pytest.raises(CorruptStudy): load_study('sums', tmp_path)
    with pytest.raises(CorruptStudy): sweep(make(), tmp_path, False)

def test_a_doctored_value_is_found(table):
    f = study_file('sums', table); f.write_text(f.read_text().replace('"product": 8.0', '"product": 9.0'))
    with pytest.raises(CorruptStudy, match='not those that were measured'): load_study(make(), table)

def test_a_full_disk_leaves_the_old_table(table, monkeypatch):
    raw = study_file('sums', table).read_bytes()
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(ValueError, match='No space left'): sweep(make(seeds=(0, 1, 2, 3)), table, False)
    assert study_file('sums', table).read_bytes() == raw

def test_unknown_studies(tmp_path):
    with pytest.raises(UnknownStudy, match='latentcourse run --study cards'): load_study('cards', tmp_path)
    with pytest.raises(UnknownStudy, match='there are: none'): s.find_study('cards', ['latentcourse.lib.check'])
    (tmp_path / 'chapter_of_cards.py').write_text('from latentcourse.lib.study import Study\ndef p(seed): return dict(v=1.)\nSTUDIES = {"cards": Study("cards", p, ({},))}')
    sys.path.insert(0, str(tmp_path))
    try: assert s.find_study('cards', ['chapter_of_cards']).name == 'cards'
    finally: sys.path.remove(str(tmp_path))
    with pytest.raises(UnknownStudy, match='cards'): s.find_study('dice', ['chapter_of_cards'])

@pytest.mark.parametrize('value, error', [(None, TypeError), (3., TypeError), ({}, ValueError), (dict(v=float('nan')), ValueError), (dict(v=float('inf')), ValueError), (dict(v='x'), TypeError), (dict(v=[1., 2.]), TypeError), (dict(v=object()), TypeError)])
def test_a_point_returns_finite_numbers(tmp_path, value, error):
    def p(seed): return value
    with pytest.raises(error): sweep(Study('p', p, ({},)), tmp_path, False)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('call, error', [
    (lambda: make(name=''), ValueError), (lambda: make(name='../x'), ValueError), (lambda: make(name='A'), ValueError), (lambda: make(name=3), ValueError), (lambda: make(f=3), TypeError), (lambda: make(settings_=()), ValueError),
    (lambda: make(settings_=(1,)), ValueError), (lambda: make(settings_=({}, {})), ValueError), (lambda: make(settings_=({'a': object()},)), TypeError), (lambda: make(seeds=()), ValueError), (lambda: make(seeds=(0, 0)), ValueError),
    (lambda: make(seeds=(.5,)), ValueError), (lambda: grid({}), ValueError), (lambda: grid(dict(a=())), ValueError), (lambda: sweep('sums'), TypeError), (lambda: load_study(3), TypeError), (lambda: s.code_mark(len), StudyError)])
def test_bad_studies(call, error):
    with pytest.raises(error): call()
