"Gradients and a short training with the losses of chapter 7; run by test_contrastive under a launcher and alone. Usage: contrastive_child.py FOLDER"
import importlib.util, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from latentcourse import contrastive
from latentcourse.lib.checkpoint import save
from latentcourse.lib.device import average_gradients, processes, share
from latentcourse.lib.train import fit

def reference_losses(): # open_clip's own file, without the towers that the whole package would import
    path = Path(importlib.util.find_spec('open_clip').submodule_search_locations[0]) / 'loss.py'
    spec = importlib.util.spec_from_file_location('open_clip_loss', path)
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module
reference = reference_losses()

def columns(seed): # pictures, captions, groups with duplicates
    g = torch.Generator().manual_seed(seed)
    return torch.randn(24, 7, generator=g, dtype=torch.float64), torch.randn(24, 5, generator=g, dtype=torch.float64), torch.randint(9, (24,), generator=g)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(7, 4).double(), nn.Linear(5, 4).double()
        self.log_scale, self.bias = nn.Parameter(torch.tensor(1.3, dtype=torch.float64)), nn.Parameter(torch.tensor(-2., dtype=torch.float64))

LOSSES = {
    'softmax': lambda m, x, c, g: contrastive.clip_losses(m.image(x), m.text(c), m.log_scale, across=True),
    'masked': lambda m, x, c, g: contrastive.clip_losses(m.image(x), m.text(c), m.log_scale, g, across=True),
    'sigmoid': lambda m, x, c, g: contrastive.sigmoid_losses(m.image(x), m.text(c), m.log_scale, m.bias, across=True),
    'sigmoid-parts': lambda m, x, c, g: contrastive.sigmoid_losses(m.image(x), m.text(c), m.log_scale, m.bias, g, chunk=5, across=True),
}

FITS = ('softmax', 'masked', 'sigmoid-parts')

def theirs(local, through): # the two switches of open_clip's `ClipLoss`
    def loss(m, x, c, g):
        me = processes()
        of = reference.ClipLoss(local_loss=local, gather_with_grad=through, rank=me.process_index, world_size=me.num_processes)
        return of(F.normalize(m.image(x), dim=1), F.normalize(m.text(c), dim=1), m.log_scale.exp())
    return loss

def their_sigmoid(m, x, c, g):
    me = processes()
    return reference.SigLipLoss(rank=me.process_index, world_size=me.num_processes)(F.normalize(m.image(x), dim=1), F.normalize(m.text(c), dim=1), m.log_scale.exp(), m.bias)

THEIRS = {'both': theirs(True, True), 'default': theirs(False, False), 'local': theirs(True, False), 'sigmoid': their_sigmoid}

def gradients(loss):
    m, me = Two(), processes()
    loss(m, *share(columns(1), me.process_index, me.num_processes)).mean().backward()
    if me.num_processes > 1: average_gradients(m)
    return {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in m.named_parameters()}

def trained(loss):
    m = Two()
    log = [r.loss for r in fit(lambda b: loss(m, *b), m, [columns(i) for i in range(4)], 4, lr=1e-2, device='cpu', progress=False)]
    return {**m.state_dict(), 'loss': torch.tensor(log)}

class Own(contrastive.Gather): # the gradient of the own loss alone, as if the own rows were put back among the copies
    @staticmethod
    def backward(ctx, grad): return grad.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]

class Plain(contrastive.Gather): # numbers without gradients: what `all_gather` alone does
    @staticmethod
    def backward(ctx, grad): return 0 * grad.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]

def main(folder):
    found = {f'grad-{k}': gradients(f) for k, f in LOSSES.items()} | {f'fit-{k}': trained(LOSSES[k]) for k in FITS} | {f'open-{k}': gradients(f) for k, f in THEIRS.items()}
    true = contrastive.Gather
    for name, contrastive.Gather in (('own', Own), ('plain', Plain)): found[f'grad-{name}'] = gradients(LOSSES['softmax'])
    contrastive.Gather = true
    if processes().is_main_process:
        for name, state in found.items(): save(folder / f'{name}.safetensors', state, {'processes': processes().num_processes})

if __name__ == '__main__':
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
