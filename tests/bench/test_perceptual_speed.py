"LPIPS as a training loss on VGG's shapes, forward and backward to one picture: ours over the lpips package, interleaved in one run."
import time, warnings
import pytest, torch
from latentcourse.perceptual import Lpips, published_weights, tower

ROUNDS, LOW, HIGH = 17, 4, 12                                             # order statistics 5 and 13 of 17: a 95 % interval of the median

def ratios(steps):
    "Median and interval of the time of each step over that of the first, in rounds of changing order."
    for f in steps: f()
    out = [[] for _ in steps]
    for i in range(ROUNDS):
        times = {}
        for k in range(len(steps)):
            k = (k + i) % len(steps)
            start = time.perf_counter(); steps[k](); times[k] = time.perf_counter() - start
        for k, r in enumerate(out): r.append(times[k] / times[0])
    return [(sorted(r)[ROUNDS // 2], sorted(r)[LOW], sorted(r)[HIGH]) for r in out]

def test_loss_against_the_package(figure):
    lpips = pytest.importorskip('lpips')
    torch.set_num_threads(min(2, torch.get_num_threads()))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = lpips.LPIPS(net='vgg', pnet_rand=True, verbose=False).requires_grad_(False)
    ours = Lpips(tower('vgg', {k.split('.', 2)[2]: v.clone() for k, v in theirs.state_dict().items() if k.startswith('net.')}), published_weights('vgg'))
    x, y = torch.rand(2, 4, 3, 64, 64) * 2 - 1
    kept = ours.features(x)
    def step(d):
        z = y.clone().requires_grad_()
        d(z).sum().backward()
        return z.grad
    losses = [lambda z: theirs(x, z), lambda z: ours(x, z), lambda z: ours.distance(kept, ours.features(z))]
    grads = [step(d) for d in losses]
    for g in grads[1:]: assert (g - grads[0]).abs().max() < 1e-4 * grads[0].abs().max()
    found = ratios([lambda d=d: step(d) for d in losses])[1:]
    for name, ends in zip(('', ', features of the target kept'), found):
        for what, value in zip((f'median of {ROUNDS} rounds', 'lower end of 95 %', 'upper end of 95 %'), ends): figure(f'LPIPS loss, VGG, 4 x 64 x 64{name}, course / package, {what}', value, 'ratio')
    for mid, low, high in found: assert low <= 1., f'{mid:.2f} of the time of the package, 95 % interval {low:.2f} to {high:.2f}'
