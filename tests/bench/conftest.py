"`figure(name, value, unit)` keeps one benchmark figure; all are printed at the end and kept in runs/bench.json, each with where and when it was measured."
import json, os, platform, time
from pathlib import Path
import pytest

FIGURES = []

@pytest.fixture
def figure():
    "Record one figure: `figure('renderer 64', 4100, 'images/s', floor=3405)` fails below its floor."
    def record(name, value, unit, floor=None):
        FIGURES.append({'name': name, 'value': float(value), 'unit': unit, 'floor': floor})
        assert floor is None or value >= floor, f'{name}: {value:.4g} {unit}, at least {floor:.4g} expected'
    return record

def pytest_sessionfinish(session):
    if not FIGURES: return
    import torch
    out = Path(str(session.config.rootpath)) / 'runs' / 'bench.json'
    out.parent.mkdir(exist_ok=True)
    where = {'python': platform.python_version(), 'torch': torch.__version__, 'cores': os.cpu_count(),
             'device': torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(), 'written': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}
    new = {f['name']: f | {'where': where} for f in FIGURES}
    old = json.loads(out.read_text(encoding='utf-8'))['figures'] if out.exists() else []
    kept = [f for f in old if f['name'] not in new and 'where' in f]              # figures of benchmarks that did not run this time
    out.write_text(json.dumps({'figures': kept + list(new.values())}, indent=1), encoding='utf-8')

def pytest_terminal_summary(terminalreporter):
    for f in FIGURES:
        floor = f" (floor {f['floor']:.4g})" if f['floor'] is not None else ''
        terminalreporter.write_line(f"{f['name']:<48} {f['value']:>12.4g} {f['unit']}{floor}")
