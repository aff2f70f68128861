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

def ratio_of_pairs(a, b, draws=10_000):
    "Median of a/b over pairs, and its 95 % bootstrap interval, which takes the pairs for independent."
    import torch
    r = torch.tensor(a, dtype=torch.float64) / torch.tensor(b, dtype=torch.float64)
    again = r[torch.randint(len(r), (draws, len(r)), generator=torch.Generator().manual_seed(0))].median(1).values
    return r.median().item(), *again.quantile(torch.tensor([.025, .975], dtype=torch.float64)).tolist()

@pytest.fixture
def race(figure):
    """`race('ViT-B/16 step', 'torchvision', ours, theirs, pairs=11)`: two calls that return their loss, on one thread, in alternating pairs, by process time, so that other programs do not count.

    Passed when the lower end of the ratio's 95 % interval is at most 1: then the pairs do not show that the course is slower. That is less than showing that it is faster,
    for which the upper end would have to be below 1; median and both ends are kept."""
    import torch
    def timed(call):
        start = time.process_time()
        loss = call()
        return time.process_time() - start, loss
    def run(name, peer, ours, theirs, pairs, same=1e-4, short=None):
        short = short or name
        threads = torch.get_num_threads(); torch.set_num_threads(1)
        try:
            first = [timed(c)[1] for c in (ours, theirs)]                          # warm up; the same loss from the same weights
            assert abs(first[0] - first[1]) < same, f'losses {first}: not the same work'
            times = [], []
            for i in range(pairs):
                for k in ((0, 1), (1, 0))[i % 2]: times[k].append(timed((ours, theirs)[k])[0])
        finally: torch.set_num_threads(threads)
        middle, low, high = ratio_of_pairs(*times)
        for who, t in (('course', times[0]), (peer, times[1])): figure(f'{name}, {who}', sorted(t)[pairs // 2], 's')
        figure(f'{short}, course / {peer}, median of {pairs} pairs', middle, 'ratio')
        figure(f'{short}, ratio, lower end of 95 %', low, 'ratio'); figure(f'{short}, ratio, upper end of 95 %', high, 'ratio')
        print(f'ratio {middle:.3f} [{low:.3f}, {high:.3f}]:', 'faster' if high < 1 else 'slower' if low > 1 else 'no difference shown')
        assert low <= 1, f'slower than {peer}: ratio {middle:.3f} [{low:.3f}, {high:.3f}]'
    return run

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
