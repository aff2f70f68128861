"The command line as a shell sees it: exit codes, help, what goes to which stream, what a program can parse."
import functools, importlib, json, os, signal, subprocess, sys, threading, time
from pathlib import Path
import nbformat
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner
from latentcourse import cli
from latentcourse.lib.pages import UnknownName, answers_to, at_a_time, chapters, course_root, execute, execute_all, pick, relink, skipped
from course import CHAPTERS, NBS, ROOT

CLAIM = 'from latentcourse.lib.check import claim\nclaim("1", "twice two is four", verdict="confirmed", measured=4)'

def call(*words): return CliRunner().invoke(cli.app, [str(w) for w in words])

def shell(*words, timeout=120, **kw):
    return subprocess.run([sys.executable, '-m', 'latentcourse', *map(str, words)], capture_output=True, text=True, encoding='utf-8', timeout=timeout, **kw)

def page(folder, name, *sources):
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell('# a page'), *map(new_code_cell, sources)]), folder / f'{name}.ipynb')
    return folder / f'{name}.ipynb'

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A course of three notebooks, the second of which fails."
    nbs = tmp_path_factory.mktemp('course') / 'nbs'
    page(nbs, '00_first', CLAIM)
    page(nbs, '00a_broken', 'a = 1', 'def half(n):\n    return n / 0', 'half(a)', 'a = 2')
    page(nbs, '01_last', 'import os, sys\nprint(os.environ.get("LATENTCOURSE_TRAIN", "load"))\nsys.executable')
    (nbs / 'notes.ipynb').write_text('not a notebook')
    return nbs

@pytest.fixture(scope='module')
def ran(small): return call('run', '--json', '--nbs', small)

# ---- run --------------------------------------------------------------------------------------------------------------------------

def test_run_says_everything_in_json(ran, small):
    told = json.loads(ran.stdout)
    assert ran.exit_code == 1 and told['ok'] is False
    assert [c['name'] for c in told['chapters']] == ['00_first', '00a_broken', '01_last']
    assert [c['error'] is None for c in told['chapters']] == [True, False, True]
    error = told['chapters'][1]['error']
    assert error == {'cell': 3, 'source': 'half(a)', 'message': 'ZeroDivisionError: division by zero'}
    assert told['claims'] == [{'row': '1', 'text': 'twice two is four', 'verdict': 'confirmed', 'measured': 4, 'seeds': None, 'source': None, 'chapter': '00_first'}]
    assert all(c['seconds'] > 0 and c['peak_mb'] > 10 for c in told['chapters'])

def test_run_keeps_copies_and_leaves_the_source(ran, small):
    copies = small.parent / 'runs' / 'notebooks'
    assert sorted(p.name for p in copies.iterdir()) == ['00_first.ipynb', '00a_broken.ipynb', '01_last.ipynb']
    last, source = nbformat.read(copies / '01_last.ipynb', 4), nbformat.read(small / '01_last.ipynb', 4)
    assert last.cells[1].outputs[0].text == 'load\n' and not source.cells[1].outputs
    assert Path(eval(last.cells[1].outputs[1].data['text/plain'])).samefile(sys.executable), 'the kernel is another Python'
    assert any(o.output_type == 'error' for o in nbformat.read(copies / '00a_broken.ipynb', 4).cells[3].outputs)

def test_run_tells_people_where_it_failed(small, tmp_path):
    done = shell('run', 'broken', '--nbs', small, '--out', tmp_path)
    assert done.returncode == 1
    for part in ('00a_broken.ipynb failed in cell 3', 'ZeroDivisionError', 'half(a)', str(tmp_path)): assert part in done.stderr
    assert 'failed in cell 3' in done.stdout and 'Traceback' not in done.stderr

def test_run_ends_with_claims_and_times(small, tmp_path):
    done = call('run', '0', '--nbs', small, '--out', tmp_path)
    assert done.exit_code == 0 and 'twice two is four' in done.stdout and done.stdout.index('Claims') < done.stdout.index('Chapters')
    assert '1 of 1 notebooks ran' in done.stdout

def test_run_train_asks_every_kernel_for_the_same_new_training(small, tmp_path):
    assert call('run', 'last', '--train', '--nbs', small, '--out', tmp_path).exit_code == 0
    assert nbformat.read(tmp_path / '01_last.ipynb', 4).cells[1].outputs[0].text.startswith('run-') and 'LATENTCOURSE_TRAIN' not in os.environ

def test_run_stops_a_cell_that_takes_too_long(tmp_path):
    page(tmp_path / 'nbs', '00_slow', 'import time; time.sleep(60)')
    done = call('run', '--nbs', tmp_path / 'nbs', '--timeout', '1', '--json')
    assert done.exit_code == 1 and 'still running after 1 s' in json.loads(done.stdout)['chapters'][0]['error']['message']

def test_no_kernel_is_left_behind(small, tmp_path):
    import psutil
    page(tmp_path / 'nbs', '00_pid', 'import os\nos.getpid()')
    done = call('run', '--nbs', tmp_path / 'nbs')
    pid = int(nbformat.read(tmp_path / 'runs' / 'notebooks' / '00_pid.ipynb', 4).cells[1].outputs[0].data['text/plain'])
    assert done.exit_code == 0 and not psutil.pid_exists(pid)

def test_run_survives_a_kernel_that_dies(tmp_path):
    page(tmp_path / 'nbs', '00_dies', 'import os; os._exit(9)')
    done = call('run', '--nbs', tmp_path / 'nbs', '--json')
    assert done.exit_code == 1 and 'kernel died' in json.loads(done.stdout)['chapters'][0]['error']['message']

@pytest.mark.skipif(os.name == 'nt', reason='no SIGINT to another process')
@pytest.mark.parametrize('jobs', [1, 2])
def test_ctrl_c_is_130(tmp_path, jobs):
    import psutil
    for i in range(3): page(tmp_path / 'nbs', f'0{i}_slow', f'import os, time\nopen({str(tmp_path / f"on{i}")!r}, "w").write(str(os.getpid()))\ntime.sleep(60)')
    p = subprocess.Popen([sys.executable, '-m', 'latentcourse', 'run', '--nbs', str(tmp_path / 'nbs'), '--jobs', str(jobs)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) # a shell's `&` has its children ignore Ctrl-C
    on = [tmp_path / f'on{i}' for i in range(jobs)]
    for _ in range(600):
        if all(f.exists() and f.read_text() for f in on): break
        time.sleep(.1)
    time.sleep(.5)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'stopped' in err and 'Traceback' not in err, err
    assert not any(psutil.pid_exists(int(f.read_text())) for f in on), 'a kernel lives on'
    assert not (tmp_path / 'on2').exists()

def test_ctrl_c_before_the_kernel_is_up(tmp_path):
    stop = threading.Event()
    stop.set()
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt): execute(page(tmp_path, '00_slow', 'import time; time.sleep(60)'), tmp_path / 'out.ipynb', stop=stop)
    assert time.perf_counter() - began < 30

def test_several_at_a_time_tell_the_same(small, tmp_path):
    one, two = (json.loads(call('run', '--nbs', small, '--out', tmp_path / str(jobs), '--jobs', jobs, '--json').stdout) for jobs in (1, 2))
    plain = lambda ran: [(c['name'], c['cells'], c['error']) for c in ran['chapters']]
    assert plain(one) == plain(two) and one['claims'] == two['claims'] and len(plain(one)) > 1

def test_cores_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 6)
    pages = [page(tmp_path, f'0{i}_who', 'import os; os.environ.get("OMP_NUM_THREADS")') for i in range(2)]
    told = lambda jobs: {nbformat.read(r['copy'], 4).cells[1].outputs[0].data['text/plain'] for r in execute_all(pages, tmp_path / 'out', jobs=jobs) if nbformat.read(r['copy'], 4).cells[1].outputs}
    assert told(2) == {"'3'"} and told(1) == set()
    monkeypatch.setenv('OMP_NUM_THREADS', '5')
    assert told(2) == {"'5'"} and 1 <= at_a_time() <= 4

# ---- wrong questions --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words, code, says', [
    (['run', 'nowhere'], 2, 'there are: 00_first'),
    (['run', '--nbs', 'no/such/folder'], 1, 'not a folder'),
    (['run', '--timeout', '0'], 2, ''),
    (['run', '--timeout', 'soon'], 2, ''),
    (['train', 'unicorn'], 2, 'there are: teacher, judge, ae'),
    (['train', 'teacher', '--preset', 'TPU'], 2, 'CPU'),
    (['train', 'teacher', '--data', 'cifar10'], 2, 'toybox'),
    (['train', 'seq2seq', '--data', 'folder:pictures'], 2, 'vae, clip, dit, text_to_image'),
    (['train', 'vae', '--data', 'folder:no/such'], 1, 'no such folder'),
    (['train', 'vae', '--data', 'photos'], 1, 'folder:PATH'),
    (['train', 'dit', '--data', 'folder:pictures', '--preset', 'SHIPPED'], 2, 'CPU, GPU'),
    (['generate', 'a red ball', '--model', 'no/such'], 1, 'no generator here'),
    (['train', 'teacher', '--steps', '-3'], 2, ''),
    (['train', 'teacher', '--seed', 'x'], 2, ''),
    (['train'], 2, ''),
    (['nonsense'], 2, 'No such command'),
    (['run', '--nonsense'], 2, 'No such option'),
    (['run', '--study', 'no-such-study'], 2, 'no study'),
])
def test_wrong_questions_get_a_clear_answer(words, code, says, small):
    if words[:2] == ['train', 'teacher'] and not (ROOT / 'latentcourse' / 'oracle.py').exists(): pytest.skip('no oracle yet')
    if words[0] == 'run' and '--nbs' not in words and '--study' not in words: words = [*words, '--nbs', small]
    done = call(*words)
    assert done.exit_code == code, done.output
    assert says in done.stderr and 'Traceback' not in done.output and done.stdout == ''

def test_empty_and_missing_courses(tmp_path):
    (tmp_path / 'nbs').mkdir()
    assert call('run', '--nbs', tmp_path / 'nbs').exit_code == 2
    page(tmp_path / 'nbs', '00_ok', '1')
    (tmp_path / 'nbs' / '01_bad.ipynb').write_text('{"cells": [')
    assert call('run', '01', '--nbs', tmp_path / 'nbs').exit_code == 1

def test_an_installed_package_without_notebooks_says_so(tmp_path):
    import shutil
    shutil.copytree(ROOT / 'latentcourse', tmp_path / 'site' / 'latentcourse', ignore=shutil.ignore_patterns('__pycache__', 'checkpoints'))
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path / 'site'), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run([sys.executable, '-P', '-m', 'latentcourse', 'run'], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1 and 'clone https://github.com/latentcourse/latentcourse' in done.stderr, done.stderr

# ---- the others -------------------------------------------------------------------------------------------------------------------

def test_help_is_quick_and_loads_nothing_heavy():
    code = 'import sys, latentcourse.cli; print([m for m in ("torch", "nbclient", "matplotlib", "jupyterlab", "nbformat") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
    seconds = 'import atexit, sys, time; atexit.register(lambda: print("cpu", time.process_time())); sys.argv = ["latentcourse", "--help"]; from latentcourse.cli import main; main()'
    done = [subprocess.run([sys.executable, '-c', seconds], capture_output=True, text=True) for _ in range(2)]  # CPU time: the machine may be busy
    assert min(float(d.stdout.split('cpu ')[1]) for d in done) < 1, done
    assert done[0].returncode == 0 and all(c in done[0].stdout for c in ('run', 'train', 'generate', 'lab', 'doctor'))

@pytest.mark.parametrize('command', ['run', 'train', 'generate', 'lab', 'doctor'])
def test_every_command_has_help(command):
    done = call(command, '--help')
    assert done.exit_code == 0 and 'Usage' in done.stdout
    if command == 'run': assert all(o in done.stdout for o in ('--train', '--study', '--json', '--timeout'))
    if command == 'generate': assert all(o in done.stdout for o in ('-w', '--steps', '--seed', '-n', '--out', '--sampler', '--negative', '--anyway', '--init', '--strength', '--mask', '--json'))
    if command == 'train': assert all(o in done.stdout for o in ('--preset', '--data', '--on-bad', '--resume', '--out', '--steps', '--seed', 'folder:PATH'))

def test_version():
    import latentcourse
    assert call('--version').stdout.strip() == f'latentcourse {latentcourse.__version__}' and call().exit_code == 2

def test_doctor_in_json():
    done = call('doctor', '--json')
    told = json.loads(done.stdout)
    assert done.exit_code == (0 if told['ok'] else 1)
    assert told['ok'], (told['missing'], told['checkpoints'])
    assert told['machine']['cores'] >= 1 and told['packages']['torch'] and told['course'] == str(ROOT)

def test_doctor_finds_what_is_missing_or_damaged(monkeypatch, tmp_path):
    real = cli.version_of
    monkeypatch.setattr(cli, 'version_of', lambda p: None if p == 'torchmetrics' else real(p))
    monkeypatch.setattr(cli, 'checkpoints', lambda: {'teacher': 'does not match its seal'})
    done = call('doctor')
    assert done.exit_code == 1 and 'pip install torchmetrics' in done.stdout and 'does not match its seal' in done.stdout

def test_doctor_reads_checkpoints(monkeypatch, tmp_path):
    import torch
    from latentcourse.lib import checkpoint
    (tmp_path / 'lib').mkdir()
    for name in ('good', 'bad'): checkpoint.save(tmp_path / 'checkpoints' / f'{name}.safetensors', {'w': torch.ones(300)}, {'config': {}})
    blob = bytearray((tmp_path / 'checkpoints' / 'bad.safetensors').read_bytes())
    blob[-7] ^= 1
    (tmp_path / 'checkpoints' / 'bad.safetensors').write_bytes(blob)
    monkeypatch.setattr(checkpoint, '__file__', str(tmp_path / 'lib' / 'checkpoint.py'))
    found = cli.checkpoints()
    assert found['good'] == 'whole' and found['bad'] != 'whole'

def test_lab_passes_options_through(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, 'call', lambda args, cwd: calls.append((args, cwd)) or 0)
    assert call('lab', '--port', '8899', '--no-browser').exit_code == 0
    assert calls[0][0][1:] == ['-m', 'jupyterlab', '--port', '8899', '--no-browser'] and calls[0][1] == NBS
    monkeypatch.setattr(cli, 'find_spec', lambda name: None)
    done = call('lab')
    assert done.exit_code == 1 and 'pip install jupyterlab' in done.stderr

def test_train_writes_a_checkpoint_and_resumes(tmp_path, monkeypatch):
    "Of the commands, not of the models: a stand-in for the training function."
    if not (ROOT / 'latentcourse' / 'oracle.py').exists(): pytest.skip('no oracle yet')
    import torch
    from torch import nn
    oracle, seen = importlib.import_module('latentcourse.oracle'), []
    def train_oracle(name, cfg, out=None, resume=False, progress=True):
        seen.append((name, cfg.steps, cfg.seed, resume, [p.name for p in Path(out).glob('*')]))
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)), {'minutes': 0., 'evaluation': {'toy': {'mean': .5, 'std': .5, 'n': 4}}}
    monkeypatch.setattr(oracle, 'train_oracle', train_oracle)
    done = call('train', 'judge', '--preset', 'cpu', '--steps', '7', '--seed', '3', '--out', tmp_path)
    assert done.exit_code == 0 and '0.5 ± 0.2, mean of 4' in done.stdout and (tmp_path / 'judge.safetensors').exists(), done.output
    (tmp_path / 'state.safetensors').write_bytes(b'')
    assert call('train', 'judge', '--no-resume', '--out', tmp_path).exit_code == 0
    assert seen[0][:4] == ('judge', 7, 3, True) and seen[1][3] is False and 'state.safetensors' not in seen[1][4]
    def interrupted(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(oracle, 'train_oracle', interrupted)
    done = call('train', 'judge', '--out', tmp_path)
    assert done.exit_code == 130 and str(tmp_path / 'state.safetensors') in done.stderr
    def diverged(*a, **k): raise FloatingPointError('loss is NaN at step 12')
    monkeypatch.setattr(oracle, 'train_oracle', diverged)
    done = call('train', 'judge', '--out', tmp_path)
    assert done.exit_code == 1 and 'NaN at step 12' in done.stderr and 'Traceback' not in done.stderr

# ---- generate ---------------------------------------------------------------------------------------------------------------------

@functools.cache
def whole_codec(): return importlib.import_module('latentcourse.codec').load_codec()[0]

@pytest.fixture
def painter(monkeypatch, tmp_path):
    "A small untrained network in the place of the shipped one, and an empty folder to work in."
    import torch
    from latentcourse import pipeline
    from latentcourse.text_to_image import T2iCfg, build_text_to_image
    model = build_text_to_image(T2iCfg(d=32, depth=1, heads=2))
    for q in model.parameters(): torch.nn.init.normal_(q, std=.05)
    codec = whole_codec()
    def shipped_parts():
        print('text_to_image: shipped checkpoint')                              # what loading says must not reach a program
        return model, codec, pipeline.the_text(), {}
    monkeypatch.setattr(pipeline, 'shipped_parts', shipped_parts)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def test_generate_names_its_pictures_and_overwrites_none(painter):
    from latentcourse.pipeline import settings_of
    names = []
    for _ in range(2):
        done = call('generate', 'A red ball!', '--steps', 2, '--seed', 5, '--device', 'cpu')
        assert done.exit_code == 0, done.output
        names += done.stdout.split()
        assert 'shipped checkpoint' in done.stderr
    assert names == ['a-red-ball-5.png', 'a-red-ball-5-2.png'] and (painter / names[0]).read_bytes() == (painter / names[1]).read_bytes()
    assert settings_of(names[0]) == {'prompt': 'A red ball!', 'negative': '', 'w': 3., 'steps': 2, 'seed': 5, 'sampler': 'heun'}

def test_generate_speaks_json_and_takes_all_options(painter):
    from PIL import Image
    Image.new('RGB', (64, 64), 'green').save('init.png'); Image.new('L', (64, 64), 255).save('mask.png')
    done = call('generate', 'a red ball', 'a mug', '-n', 2, '-w', 2, '--steps', 2, '--sampler', 'euler', '--negative', 'a car', '--init', 'init.png', '--mask', 'mask.png', '--strength', .5, '--repeats', 2, '--out', 'new/folder', '--json', '--device', 'cpu')
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [Path(q['path']).name for q in told['pictures']] == ['a-red-ball-0.png', 'a-red-ball-1.png', 'a-mug-0.png', 'a-mug-1.png'] and all((painter / q['path']).is_file() for q in told['pictures'])
    first = {k: told['pictures'][0][k] for k in ('prompt', 'negative', 'w', 'steps', 'seed', 'sampler', 'strength', 'repeats')}
    assert first == {'prompt': 'a red ball', 'negative': 'a car', 'w': 2., 'steps': 2, 'seed': 0, 'sampler': 'euler', 'strength': .5, 'repeats': 2}
    assert told['made']['device'] == 'cpu' and told['seconds']['painting'] > 0

def test_generate_reads_prompts_from_a_pipe_and_into_a_file(painter):
    done = CliRunner().invoke(cli.app, ['generate', '-', '--steps', '1', '--device', 'cpu', '--out', 'p.png'], input='a red ball\n\n  a mug \n')
    assert done.exit_code == 0 and done.stdout.split() == ['p.png', 'p-2.png'], done.output
    nothing = CliRunner().invoke(cli.app, ['generate', '-', '--device', 'cpu'], input='\n')
    assert nothing.exit_code in (1, 2) and 'expected' in nothing.stderr and nothing.stdout == ''

@pytest.mark.parametrize('words, code, says', [
    (['a zebra'], 2, "'zebra': not among the words"), (['a puple duck'], 2, 'purple'), ([''], 2, 'w=0'), (['a duck', '-w', 'nan'], 2, 'finite'), (['a duck', '-w', 'much'], 2, ''), (['a duck', '--steps', '0'], 2, ''), (['a duck', '--seed', '-1'], 2, ''),
    (['a duck', '--seed', '1.5'], 2, ''), (['a duck', '-n', '0'], 2, ''), (['a duck', '--sampler', 'magic'], 2, 'heun, euler'), (['a duck', '--strength', '.5'], 2, 'init'), (['a duck', '--init', 'none.png'], 1, 'no such file'),
    (['a duck', '--negative', 'a mug', '-w', '1'], 2, 'above 1'), (['a duck ' * 40], 2, 'at most 64'), (['a duck', '--device', 'abacus'], 1, 'abacus'), (['a duck', '--model', 'nowhere'], 1, 'no generator here'), ([], 2, '')])
def test_generate_refuses_in_one_line(painter, words, code, says):
    done = call('generate', *words)
    assert done.exit_code == code and says in done.stderr and done.stdout == '' and 'Traceback' not in done.output, done.output
    assert not list(painter.glob('*.png'))

def test_generate_goes_on_if_told_to(painter):
    done = call('generate', 'a zebra', '--anyway', '--steps', 1, '--device', 'cpu')
    assert done.exit_code == 0 and done.stdout.strip() == 'a-zebra-0.png'
    done = call('generate', '', '-w', 0, '--steps', 1, '--device', 'cpu')
    assert done.exit_code == 0 and done.stdout.strip() == 'picture-0.png'

def test_generate_can_be_stopped(painter, monkeypatch):
    from latentcourse import pipeline
    def interrupted(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(pipeline, 'paint_prompts', interrupted)
    done = call('generate', 'a duck', '--steps', 1)
    assert done.exit_code == 130 and 'stopped' in done.stderr and done.stdout == ''

# ---- names of chapters ------------------------------------------------------------------------------------------------------------

def test_every_chapter_answers_to_its_names():
    for p in chapters(NBS):
        number, name = p.stem.split('_', 1)
        for asked in (p.stem, p.name, number, name, f'nbs/{p.name}', number.lstrip('0') or '0'): assert pick([asked], chapters(NBS)) == [p], asked
    assert [p for p in chapters(NBS) if p in CHAPTERS] == CHAPTERS and course_root() == ROOT

@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(max_size=12), min_size=1, max_size=4))
def test_any_text_is_a_chapter_or_a_clear_error(names):
    shelf = [Path(f'{s}.ipynb') for s in ('00_toybox', '00a_captions', '01_pixels', 'A_errata')]
    try: found = pick(names, shelf)
    except UnknownName as e: assert '00_toybox' in str(e)
    else: assert found == sorted(set(found), key=shelf.index) and all(any(Path(n).name in answers_to(p) for p in found) for n in names)

@given(st.text(alphabet='ab/#.()[]" \n:', max_size=60))
def test_relink_keeps_text_without_links(text):
    if '](' not in text and 'src="' not in text and 'href="' not in text: assert relink(text, 'nbs') == text

def test_directives():
    assert skipped('#| eval: false\n1') and skipped('#|gpu\n1', ()) and skipped('#| slow\n#| gpu\n1', ('slow',)) and not skipped('x = "#| slow"', ())

def test_execute_refuses_to_overwrite_its_source(tmp_path):
    source = page(tmp_path, '00_a', '1')
    with pytest.raises(ValueError, match='source itself'): execute(source, source)
    with pytest.raises(FileNotFoundError): execute(tmp_path / 'none.ipynb', tmp_path / 'out.ipynb')

# ---- the picture at the end ---------------------------------------------------------------------------------------------------------

def test_whole_course_ends_with_a_picture(tmp_path, monkeypatch):
    from PIL import Image
    page(tmp_path / 'nbs', '00_first', CLAIM)
    monkeypatch.setattr(cli, 'course_root', lambda: tmp_path)
    monkeypatch.delenv('LATENTCOURSE_RUNS', raising=False)
    told = json.loads(call('run', '--json').stdout)
    assert told['ok'] and Image.open(told['picture']).size == (64, 64)
    from latentcourse.pipeline import settings_of
    assert settings_of(told['picture'])['prompt'] == 'a brown teddy bear reading a red book'
    done = call('run')                                                      # a second time: painted over, and said last
    assert done.exit_code == 0 and done.stdout.rstrip().endswith(told['picture'])

def test_a_part_of_the_course_or_a_failed_one_paints_nothing(ran, tmp_path, monkeypatch):
    assert json.loads(ran.stdout)['picture'] is None                        # --nbs
    page(tmp_path / 'nbs', '00_first', '1 / 0')
    page(tmp_path / 'nbs', '01_second', CLAIM)
    monkeypatch.setattr(cli, 'course_root', lambda: tmp_path)
    monkeypatch.setattr(cli, 'farewell', lambda *a: 1 / 0)
    assert json.loads(call('run', 'second', '--json', '--out', tmp_path / 'out').stdout)['picture'] is None
    failed = call('run', '--json', '--out', tmp_path / 'out')
    assert failed.exit_code == 1 and json.loads(failed.stdout)['picture'] is None

def test_a_picture_as_text():
    from PIL import Image
    image = Image.new('RGB', (3, 4), (1, 2, 3)); image.putpixel((2, 1), (9, 8, 7))
    lines = cli.in_colours(image).split('\n')
    assert len(lines) == 2 and lines[0].split('▀')[2] == '\x1b[38;2;1;2;3;48;2;9;8;7m' and lines[1].endswith('▀\x1b[0m')
