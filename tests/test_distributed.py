"Two processes take the same optimisation path as one with the doubled batch."
import os, socket, subprocess, sys
import pytest
import processes_child
from latentcourse.lib.checkpoint import load

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return str(s.getsockname()[1])

def launch(folder):
    "Two processes without a GPU, under accelerate's launcher."
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no',
                           '--main_process_port', free_port(), processes_child.__file__, str(folder)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    if sys.platform == 'win32': pytest.skip('torch on Windows is built without libuv, which the launcher asks for')
    found = {}
    for n, go in ((1, processes_child.main), (2, launch)):
        folder = tmp_path_factory.mktemp(f'by{n}')
        go(folder)
        found[n] = {p.stem: load(p) for p in folder.glob('*.safetensors')}
    return found

def gap(a, b): return max((a[k] - b[k]).abs().max().item() for k in {*a, *b})

def test_as_many_as_asked(runs): assert {n: r['straight'][1]['processes'] for n, r in runs.items()} == {1: 1, 2: 2}

def test_same_path(runs):
    one, two = runs[1]['straight'][0], runs[2]['straight'][0]
    assert gap(one, two) < 1e-5 and one['loss'][-1] < one['loss'][0]

def test_batches_that_come_shared(runs): assert gap(runs[1]['straight'][0], runs[2]['presliced'][0]) < 1e-5

@pytest.mark.parametrize('n', [1, 2])
def test_resumed_to_the_same_bits(runs, n): assert gap(runs[n]['straight'][0], runs[n]['resumed'][0]) == 0

def test_unused_parameters_stay(runs):
    "What no process reads has no gradient, so weight decay leaves it alone on two processes as it does on one."
    for n in (1, 2):
        state = runs[n]['unused'][0]
        assert gap({k: state[f'unread.{k}'] for k in ('weight', 'bias')}, {k: state[f'first.unread.{k}'] for k in ('weight', 'bias')}) == 0
        assert gap({'weight': state['read.weight']}, {'weight': state['first.read.weight']}) > .01
    assert gap(runs[1]['unused'][0], runs[2]['unused'][0]) < 1e-5

def test_gradient_of_one_process_alone(runs):
    "A parameter that one of two processes reads gets half its gradient, one that none reads gets none."
    one, two = runs[1]['on_one'][0], runs[2]['on_one'][0]
    assert gap(two, {k: g / 2 if k.startswith('first') else g for k, g in one.items()}) < 1e-5 and (two['none.weight'] == -1e6).all() and (two['first.weight'] != 0).all()
