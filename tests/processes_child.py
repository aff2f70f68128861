"Trains a small network; run by test_distributed under a launcher and alone. Usage: processes_child.py FOLDER"
import sys
from pathlib import Path
import torch
from torch import nn
from latentcourse.lib.checkpoint import save
from latentcourse.lib.data import Batches
from latentcourse.lib.device import processes, seed_all
from latentcourse.lib.train import ema_of, fit

columns = tuple(torch.randn(96, n, generator=torch.Generator().manual_seed(n)) for n in (4, 2))

def run(out=None, stop=None, resume=False, presliced=False):
    me = processes()
    seed_all(me.process_index)                                   # unequal first weights: the loop must make them equal
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    ema = ema_of(net, .9)
    batches = Batches(columns, 24, seed=3, rank=me.process_index, world=me.num_processes) if presliced else Batches(columns, 24, seed=3)
    loss = lambda batch: (net(batch[0]) - batch[1]).square().sum(1)
    log = []
    for r in fit(loss, net, batches, 12, lr=1e-2, warmup=2, ema=ema, accumulate=2, device='cpu', out=out, every=3, resume=resume, progress=False):
        log.append(r.loss)
        if len(log) == stop: return
    return {**{f'net.{k}': v for k, v in net.state_dict().items()}, **{f'ema.{k}': v for k, v in ema.module.state_dict().items()}, 'loss': torch.tensor(log)}

def main(folder):
    found = dict(straight=run(), presliced=run(presliced=True))
    run(folder / 'run', stop=8)
    found['resumed'] = run(folder / 'run', resume=True)
    if processes().is_main_process:
        for name, state in found.items(): save(folder / f'{name}.safetensors', state, {'processes': processes().num_processes})

if __name__ == '__main__':
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
