"Every notebook runs from top to bottom in a real kernel, offline, within its time, and shows again what is committed."
import json, os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from course import CHAPTERS, NOTEBOOKS, cells, name_of

LIMIT = float(os.environ.get('LATENTCOURSE_CHAPTER_SECONDS', '75' if (os.cpu_count() or 1) >= 2 else '150'))  # a slow machine may allow more
TIMES = {}

@pytest.fixture(scope='module')
def run_page(request, tmp_path_factory):
    "Run a page. A chapter asked for alone has the machine to itself and 75 seconds. Several run two at a time, on one core each, and have 150: what 75 s of two cores are."
    from latentcourse.lib.pages import at_a_time, execute
    folder, started = tmp_path_factory.mktemp('pages'), {}
    asked = list(dict.fromkeys(i.callspec.params['path'] for i in request.session.items if i.fspath == request.fspath and hasattr(i, 'callspec')))
    jobs = 1 if sum(p in CHAPTERS for p in asked) == 1 else min(2, at_a_time())
    with ThreadPoolExecutor(jobs) as pool:
        def run(path): return execute(path, folder / f'{name_of(path).replace("/", ".")}.ipynb', timeout=300, env={} if jobs == 1 else {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'})
        def result(path):
            if not started: started.update({p: pool.submit(run, p) for p in asked})
            return started[path].result(), jobs * LIMIT
        yield result
        pool.shutdown(cancel_futures=True)

@pytest.mark.slow
@pytest.mark.parametrize('path', sorted(NOTEBOOKS, key=lambda p: p not in CHAPTERS), ids=name_of)
def test_notebook_runs(path, run_page, record_property):
    ran, limit = run_page(path)
    TIMES[name_of(path)] = ran['seconds'], ran['peak_mb']
    record_property('seconds', ran['seconds'])
    e = ran['error']
    assert e is None, f"cell {e['cell']}: {e['message']}\n{e['source']}"
    now = json.loads(Path(ran['copy']).read_text(encoding='utf-8'))['cells']
    shown = lambda c: {o['output_type'] for o in c.get('outputs', []) if o.get('name') != 'stderr'}
    stale = [i for i, (a, b) in enumerate(zip(cells(path), now)) if a['cell_type'] == 'code' and shown(a) != shown(b)]
    assert not stale, f'cells {stale} show something else than what is committed: run the notebook and commit its outputs'
    if path in CHAPTERS:
        assert ran['seconds'] <= limit, f"{ran['seconds']:.0f} s, {limit:.0f} allowed (LATENTCOURSE_CHAPTER_SECONDS on a slow machine)"
        assert ran['peak_mb'] <= 4000, f"{ran['peak_mb']} MB, 4000 allowed"

@pytest.fixture(scope='module', autouse=True)
def print_times(request):
    yield
    capture = request.config.pluginmanager.getplugin('capturemanager')
    with capture.global_and_fixture_disabled():
        print(*(f'\n  {name}: {s:.1f} s, peak {mb / 1e3:.1f} GB' for name, (s, mb) in TIMES.items()), end='')
