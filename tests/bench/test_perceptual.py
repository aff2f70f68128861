"LPIPS as a training loss on VGG's shapes, forward and backward to one picture: ours over the lpips package, in interleaved pairs of one run."
import time, warnings
import pytest, torch
from latentcourse.perceptual import Lpips, published_weights, tower

PAIRS, LOW, HIGH = 17, 4, 12                                              # order statistics 5 and 13 of 17: a 95 % interval of the median

def ratio(f, g):
    "Median and interval of time(f) / time(g)."
    f(), g()
    out = []
    for i in range(PAIRS):
        times = {}
        for h in ((f, g) if i % 2 else (g, f)):
            start = time.perf_counter(); h(); times[h] = time.perf_counter() - start
        out.append(times[f] / times[g])
    out.sort()
    return out[PAIRS // 2], out[LOW], out[HIGH]

@pytest.mark.parametrize('batch, size', [(4, 64), (1, 128)])
def test_loss_against_the_package(batch, size, figure):
    lpips = pytest.importorskip('lpips')
    torch.set_num_threads(min(2, torch.get_num_threads()))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = lpips.LPIPS(net='vgg', pnet_rand=True, verbose=False).requires_grad_(False)
    ours = Lpips(tower('vgg', {k.split('.', 2)[2]: v.clone() for k, v in theirs.state_dict().items() if k.startswith('net.')}), published_weights('vgg'))
    x, y = torch.rand(2, batch, 3, size, size) * 2 - 1
    kept = ours.features(x)
    def step(d):
        z = y.clone().requires_grad_()
        d(z).sum().backward()
        return z.grad
    grads = [step(lambda z: ours(x, z)), step(lambda z: theirs(x, z))]
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[1].abs().max()
    for name, d in (('ours', lambda z: ours(x, z)), ('ours, target kept', lambda z: ours.distance(kept, ours.features(z)))):
        mid, low, high = ratio(lambda: step(d), lambda: step(lambda z: theirs(x, z)))
        figure(f'LPIPS {batch} x {size}, {name} / package [{low:.2f}, {high:.2f}]', mid, 'of its time')
        assert low <= 1., f'{name}: {mid:.2f} of the time of the package, 95 % interval {low:.2f} to {high:.2f}'
