"What a sampler's step costs beyond the network: one thread, process time, 8 pictures of 32 x 32. A sampler whose field costs nothing, in alternating pairs with a small convolutional network. LATENTCOURSE_BENCH_PAIRS sets how many pairs are timed."
import os, time
import pytest
import torch
from torch import nn
from latentcourse.diffusion import LINEAR
from latentcourse.samplers import ancestral, ddim, dpm_solver_2m, euler, euler_maruyama, heun, last, times
from conftest import ratio_of_pairs

STEPS = 20
SAMPLERS = {'euler': lambda f, x, ts: euler(f, x, ts), 'heun': lambda f, x, ts: heun(f, x, ts), 'ddim': lambda f, x, ts: ddim(f, x, ts, LINEAR), 'ancestral': lambda f, x, ts: ancestral(f, x, ts, LINEAR),
            'euler_maruyama': lambda f, x, ts: euler_maruyama(f, x, ts, LINEAR), 'dpm_solver_2m': lambda f, x, ts: dpm_solver_2m(f, x, ts, LINEAR)}

@pytest.mark.parametrize('name', SAMPLERS)
def test_overhead_beyond_the_network(name, figure):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.SiLU(), *(m for _ in range(4) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.SiLU())), nn.Conv2d(64, 3, 3, padding=1)).eval()
    x, v, ts = torch.randn(8, 3, 32, 32), .1 * torch.randn(8, 3, 32, 32), times(STEPS)
    calls = 2 if name == 'heun' else 1                                    # network calls a step

    @torch.no_grad()
    def network():
        for _ in range(calls): net(x)
    def sampler(): last(SAMPLERS[name](lambda xt, t: v, x, ts))
    def timed(f): begun = time.process_time(); f(); return time.process_time() - begun

    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        network(), sampler()
        pairs = int(os.environ.get('LATENTCOURSE_BENCH_PAIRS', 31))
        took = [], []
        for i in range(pairs):
            for k in ((0, 1), (1, 0))[i % 2]: took[k].append(timed((sampler, network)[k]))
    finally: torch.set_num_threads(threads)
    middle, low, high = ratio_of_pairs([t / STEPS for t in took[0]], took[1])
    figure(f'{name}, a step without the network', 1e6 * sorted(took[0])[pairs // 2] / STEPS, 'microseconds')
    figure(f'{name}, beyond the network, median of {pairs} pairs', 100 * middle, '%')
    figure(f'{name}, beyond the network, lower end of 95 %', 100 * low, '%'); figure(f'{name}, beyond the network, upper end of 95 %', 100 * high, '%')
    assert low <= .03, f'{name}: {100 * middle:.2f} % beyond the network [{100 * low:.2f}, {100 * high:.2f}], 3 at most expected'
