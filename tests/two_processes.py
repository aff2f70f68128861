"Runs a child program once by itself and once as two processes without a GPU, under accelerate's launcher, and reads what it wrote."
import os, socket, subprocess, sys
import pytest
from latentcourse.lib.checkpoint import load

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return str(s.getsockname()[1])

def launch(child, folder):
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no',
                           '--main_process_port', free_port(), child.__file__, str(folder)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]

def by_one_and_two(child, tmp_path_factory):
    "Number of processes -> name of a file the child wrote -> `(tensors, facts)`."
    if sys.platform == 'win32': pytest.skip('torch on Windows is built without libuv, which the launcher asks for')
    found = {}
    for n in (1, 2):
        folder = tmp_path_factory.mktemp(f'by{n}')
        child.main(folder) if n == 1 else launch(child, folder)
        found[n] = {p.stem: load(p) for p in folder.glob('*.safetensors')}
    return found

def apart(a, b): return max((a[k] - b[k]).abs().max().item() for k in {*a, *b})
