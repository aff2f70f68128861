"Every notebook runs from top to bottom in a real kernel, offline, within its time, and shows again what is committed."
import json, os
import pytest
from course import CHAPTERS, NOTEBOOKS, cells, name_of

LIMIT = float(os.environ.get('LATENTCOURSE_CHAPTER_SECONDS', '75' if (os.cpu_count() or 1) >= 2 else '150'))  # a slow machine may allow more
TIMES = {}

@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_notebook_runs(path, tmp_path, record_property):
    from latentcourse.lib.pages import execute
    ran = execute(path, tmp_path / path.name, timeout=300)
    TIMES[name_of(path)] = ran['seconds'], ran['peak_mb']
    record_property('seconds', ran['seconds'])
    e = ran['error']
    assert e is None, f"cell {e['cell']}: {e['message']}\n{e['source']}"
    now = json.loads((tmp_path / path.name).read_text(encoding='utf-8'))['cells']
    shown = lambda c: {o['output_type'] for o in c.get('outputs', []) if o.get('name') != 'stderr'}
    stale = [i for i, (a, b) in enumerate(zip(cells(path), now)) if a['cell_type'] == 'code' and shown(a) != shown(b)]
    assert not stale, f'cells {stale} show something else than what is committed: run the notebook and commit its outputs'
    if path in CHAPTERS:
        assert ran['seconds'] <= LIMIT, f"{ran['seconds']:.0f} s, {LIMIT:.0f} allowed (LATENTCOURSE_CHAPTER_SECONDS on a slow machine)"
        assert ran['peak_mb'] <= 4000, f"{ran['peak_mb']} MB, 4000 allowed"

@pytest.fixture(scope='module', autouse=True)
def print_times(request):
    yield
    capture = request.config.pluginmanager.getplugin('capturemanager')
    with capture.global_and_fixture_disabled():
        print(*(f'\n  {name}: {s:.1f} s, peak {mb / 1e3:.1f} GB' for name, (s, mb) in TIMES.items()), end='')
