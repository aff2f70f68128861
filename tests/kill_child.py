"""Kills training runs. Usage: kill_child.py FOLDER KILLS SEED, on a system that can fork; prints one JSON line a kill, then DONE.

Every run is a child forked from this process, which has imported torch and computed nothing with it. A run is killed once, at a random
instant of its life or while it writes; then another child resumes it to the end. What it leaves is compared bit for bit with a run left alone."""
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np, torch, torch._dynamo   # the optimizer would import the latter in every child
from torch import nn
from latentcourse.lib.checkpoint import load
from latentcourse.lib.data import Batches
from latentcourse.lib.device import seed_all
from latentcourse.lib.train import ema_of, fit

torch.set_num_threads(1)

def train(out):
    "A run that uses everything that has a state: dropout, batch statistics, moments, average, shuffled data, three generators."
    seed_all(0)
    columns = torch.randn(40, 6), torch.arange(40.)
    net = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.SiLU(), nn.Dropout(.2), nn.Linear(32, 6))
    def loss(batch):
        x, item = batch
        noise = torch.randn_like(x) * (.1 + .1 * random.random() + .1 * np.random.rand())
        return (net(x + noise) - x).square().sum(1), {'order': (item * torch.arange(1., 9.)).sum()}   # tells which items came, and in which order
    for r in fit(loss, net, Batches(columns, 8, seed=5), 40, lr=1e-2, warmup=5, ema=ema_of(net, .9), accumulate=2, device='cpu', out=out, every=2, resume=True, progress=False):
        if r.i % 10 == 9 and not hasattr(r, 'replayed'): torch.rand(3)                               # the caller draws too

def fork(out, run=train):
    pid = os.fork()
    if pid: return pid
    code = 1
    try: run(out); code = 0
    finally: os._exit(code)

def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def kill_at(pid, seconds, out, writing):
    "Kill a run after some seconds or, if `writing`, in the first write from then on; say whether it was there to be killed."
    start = time.monotonic()
    while time.monotonic() - start < seconds: time.sleep(.0005)
    while writing and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and not any(out.glob('.*.tmp')): time.sleep(.0002)
    os.kill(pid, signal.SIGKILL)
    return end(pid) == -signal.SIGKILL

def differing(a, b):
    "Names of what is not the same, bit for bit; the clock is no part of it."
    (ta, ma), (tb, mb) = load(a), load(b)
    off = [k for k in {*ta, *tb} if k != 'log.seconds' and not (k in ta and k in tb and torch.equal(ta[k].nan_to_num(), tb[k].nan_to_num()))]
    return sorted(off) + [k for k in ('state', 'step', 'loss') if ma[k] != mb[k]]

if __name__ == '__main__':
    folder, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    folder.mkdir(parents=True, exist_ok=True)
    assert end(fork(folder / 'straight')) == 0
    start = time.monotonic(); assert end(fork(folder / 'timed')) == 0; life = time.monotonic() - start
    assert not differing(*(folder / n / 'state.safetensors' for n in ('straight', 'timed')))
    for i in range(kills):
        out = folder / f'run{i}'
        while True:
            writing = i % 2 == 1
            if kill_at(fork(out), rng.uniform(0, life), out, writing): break
            for f in out.iterdir(): f.unlink()                     # it was already over: that was no kill
        left = [p.name for p in out.iterdir()] if out.exists() else []
        at = load(out / 'state.safetensors')[1]['step'] if 'state.safetensors' in left else 0
        code = end(fork(out))
        print(json.dumps({'kill': i, 'writing': any(n.endswith('.tmp') for n in left), 'at': at, 'code': code, 'differing': differing(folder / 'straight' / 'state.safetensors', out / 'state.safetensors') if code == 0 else None}), flush=True)
    print('DONE', flush=True)
