"What guidance costs beyond the network: one thread, process time. A guided field, which asks for both answers in one batch, in alternating pairs with the bare network on a batch of twice the size; and a walk guided in an interval of time alone, in alternating pairs with one that is guided all the way. LATENTCOURSE_BENCH_PAIRS sets how many pairs are timed."
import os, time
import torch
from latentcourse.classifier_free_guidance import cfg_field
from latentcourse.classifier_guidance import LATENT, build_latent_unet
from latentcourse.guidance_lab import guided_field, interval_field
from latentcourse.samplers import counted, euler, last, times
from conftest import ratio_of_pairs

def test_a_guided_step_costs_one_call_of_twice_the_batch(figure):
    model = build_latent_unet(LATENT['CPU']).eval().requires_grad_(False)
    x, t, y = torch.randn(16, 4, 16, 16), torch.rand(16), torch.arange(16) % 8
    xx, tt, yy = torch.cat([x, x]), torch.cat([t, t]), torch.cat([torch.full_like(y, model.classes), y])
    field = cfg_field(model, y, 3.)
    two_calls = lambda: (model(x, t, yy[:16]), model(x, t, y))

    def timed(f):
        begun = time.process_time()
        with torch.no_grad(): f()
        return time.process_time() - begun

    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        calls = (lambda: field(x, t)), (lambda: model(xx, tt, yy)), two_calls
        for f in calls: timed(f)
        pairs = int(os.environ.get('LATENTCOURSE_BENCH_PAIRS', 31))
        took = [], [], []
        for i in range(pairs):
            for k in ((0, 1, 2), (2, 1, 0))[i % 2]: took[k].append(timed(calls[k]))
    finally: torch.set_num_threads(threads)
    middle, low, high = ratio_of_pairs(took[0], took[1])
    figure('guided step of 16 latents, one batch', 1e3 * sorted(took[0])[pairs // 2], 'ms')
    figure('guided step of 16 latents, two calls', 1e3 * sorted(took[2])[pairs // 2], 'ms')
    figure(f'guided step / one call at twice the batch, median of {pairs} pairs', middle, 'ratio')
    figure('guided step / one call, lower end of 95 %', low, 'ratio'); figure('guided step / one call, upper end of 95 %', high, 'ratio')
    assert low <= 1.05, f'{middle:.3f} [{low:.3f}, {high:.3f}], 1.05 at most expected'

def test_an_interval_saves_what_it_promises(figure):
    model = build_latent_unet(LATENT['CPU']).eval().requires_grad_(False)
    x, y = torch.randn(16, 4, 16, 16), torch.arange(16) % 8
    fields = [counted(lambda xt, t: model(xt, t)), counted(lambda xt, t: model(xt, t, y))]
    walks = [lambda f=f: last(euler(f, x, times(20))) for f in (interval_field(*fields, 3., .25, .75), guided_field(*fields, 3.))]

    def timed(f):
        begun = time.process_time()
        f()
        return time.process_time() - begun

    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        calls = []
        for f in walks:
            before = sum(g.calls for g in fields)
            timed(f)
            calls.append(sum(g.calls for g in fields) - before)
        pairs, took = int(os.environ.get('LATENTCOURSE_BENCH_PAIRS', 31)), ([], [])
        for i in range(pairs):
            for k in ((0, 1), (1, 0))[i % 2]: took[k].append(timed(walks[k]))
    finally: torch.set_num_threads(threads)
    promised, (middle, low, high) = calls[0] / calls[1], ratio_of_pairs(*took)
    figure('guided in an interval / all the way, calls', promised, 'ratio')
    figure(f'guided in an interval / all the way, time, median of {pairs} pairs', middle, 'ratio')
    assert low <= 1.03 * promised, f'{middle:.3f} [{low:.3f}, {high:.3f}] of the time for {promised:.3f} of the calls'
