"Every test runs offline, on few threads, with its own caches left alone."
import os
from pathlib import Path

here = Path(__file__).parent
for name in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE'): os.environ[name] = '1'
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.pop('LATENTCOURSE_TRAIN', None)  # a stray variable must not retrain models here
cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, str(min(4, cores)))

# the same guard in this process and, through PYTHONPATH, in kernels and other subprocesses
os.environ['PYTHONPATH'] = os.pathsep.join(p for p in (str(here / 'offline'), os.environ.get('PYTHONPATH')) if p)
exec(compile((here / 'offline' / 'sitecustomize.py').read_text(encoding='utf-8'), 'tests/offline/sitecustomize.py', 'exec'), {})

import pytest  # noqa: E402

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    gpu_there = None
    for item in items:
        if (here / 'bench') in Path(item.fspath).parents: item.add_marker('bench')
        if item.get_closest_marker('gpu'):
            if gpu_there is None:
                import torch
                gpu_there = torch.cuda.is_available()
            if not gpu_there: item.add_marker(pytest.mark.skip(reason='no CUDA device'))
