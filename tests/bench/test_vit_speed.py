"A forward and a backward pass of ViT-B/16 against torchvision's: the same weights, pictures and loss, 2 pictures of 224 x 224. LATENTCOURSE_BENCH_PAIRS sets how many pairs are timed."
import os
import torch
from latentcourse.vit import vit_from_torchvision

def test_forward_and_backward_of_vit_b_16(race):
    from torchvision.models import vit_b_16
    torch.manual_seed(0)
    theirs = vit_b_16()                                                   # its dropout is zero
    torch.nn.init.normal_(theirs.heads.head.weight, std=.02)
    ours = vit_from_torchvision(theirs)
    x, y = torch.randn(2, 3, 224, 224), torch.randint(1000, (2,))

    def pass_of(model):
        def once():
            model.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(model(x), y); loss.backward()
            return loss.item()
        return once
    race('ViT-B/16 forward and backward, 2 x 224 x 224', 'torchvision', pass_of(ours), pass_of(theirs), pairs=int(os.environ.get('LATENTCOURSE_BENCH_PAIRS', 11)))
