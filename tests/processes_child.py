"Trains a small network; run by test_distributed under a launcher and alone. Usage: processes_child.py FOLDER"
import sys
from pathlib import Path
import torch
from torch import nn
from latentcourse.lib.checkpoint import save
from latentcourse.lib.data import Batches
from latentcourse.lib.device import average_gradients, processes, seed_all
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

def unused(): # a layer that no loss reads, under weight decay
    seed_all(0)
    net = nn.ModuleDict(dict(read=nn.Linear(4, 2), unread=nn.Linear(4, 2)))
    first = {f'first.{k}': v.clone() for k, v in net.state_dict().items()}
    opt = torch.optim.AdamW(net.parameters(), lr=.1, weight_decay=.5)
    list(fit(lambda batch: (net['read'](batch[0]) - batch[1]).square().sum(1), net, Batches(columns, 24, seed=3), 4, opt=opt, device='cpu', progress=False))
    return {**net.state_dict(), **first}

def on_one(): # gradients of a network of which only the first process reads the first layer
    seed_all(0)
    me, net = processes(), nn.ModuleDict(dict(first=nn.Linear(4, 2), all=nn.Linear(4, 2), none=nn.Linear(4, 2)))
    for name in ('first', 'all')[me.process_index:]: net[name](columns[0]).sum().backward()
    if me.num_processes > 1: average_gradients(net)
    return {k: torch.full_like(p, -1e6) if p.grad is None else p.grad for k, p in net.named_parameters()}

def main(folder):
    found = dict(straight=run(), presliced=run(presliced=True), unused=unused(), on_one=on_one())
    run(folder / 'run', stop=8)
    found['resumed'] = run(folder / 'run', resume=True)
    if processes().is_main_process:
        for name, state in found.items(): save(folder / f'{name}.safetensors', state, {'processes': processes().num_processes})

if __name__ == '__main__':
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
