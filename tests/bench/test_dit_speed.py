"DiT-S/2 on the course's latents (4 x 16 x 16) against diffusers' own, with the same weights: a training step (loss, gradients, AdamW) and a guided walk of eight steps of Euler. One thread, process time, alternating pairs. LATENTCOURSE_BENCH_PAIRS sets how many pairs are timed."
import os, time
import pytest, torch
from latentcourse.classifier_free_guidance import cfg_field
from latentcourse.dit import dit_from_diffusers
from latentcourse.samplers import euler, last, times
from conftest import ratio_of_pairs

def pair(seed=0, classes=1_000):
    "The published small network twice: theirs and ours, with random weights, no label dropout."
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(seed)
    theirs = diffusers.DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=12, sample_size=16, patch_size=2, num_embeds_ada_norm=classes)
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())       # as in the published weights
        block.norm1.emb.class_embedder.dropout_prob = 0.
    ours = dit_from_diffusers(theirs)
    ours.drop = 0.
    return ours.train(), theirs.train()

def raced(figure, name, short, ours, theirs, same, limit=.9):
    "Alternating pairs; the first call of each must return the same number."
    def timed(call):
        start = time.process_time()
        out = call()
        return time.process_time() - start, out
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        first = [timed(c)[1] for c in (ours, theirs)]
        assert abs(first[0] - first[1]) < same, f'{first}: not the same work'
        pairs, took = int(os.environ.get('LATENTCOURSE_BENCH_PAIRS', 21)), ([], [])
        for i in range(pairs):
            for k in ((0, 1), (1, 0))[i % 2]: took[k].append(timed((ours, theirs)[k])[0])
    finally: torch.set_num_threads(threads)
    middle, low, high = ratio_of_pairs(*took)
    for who, t in (('course', took[0]), ('diffusers', took[1])): figure(f'{name}, {who}', sorted(t)[pairs // 2], 's')
    figure(f'{short}, course / diffusers, median of {pairs} pairs', middle, 'ratio')
    figure(f'{short}, ratio, lower end of 95 %', low, 'ratio'); figure(f'{short}, ratio, upper end of 95 %', high, 'ratio')
    if limit: assert low <= limit, f'{short}: {middle:.3f} [{low:.3f}, {high:.3f}] of the time of diffusers, {limit} at most expected'

@pytest.fixture(scope='module')
def question():
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 4, 16, 16, generator=g), torch.tensor([3, 250, 600, 990]), torch.tensor([0, 7, 207, 999]), torch.randn(4, 4, 16, 16, generator=g)

def test_a_training_step(figure, question):
    x, i, y, target = question
    def steps(net, call, optimizer):
        opt = optimizer(net) if optimizer else None
        def once():
            loss = (call(net) - target).square().mean()
            loss.backward()
            if opt: opt.step()
            net.zero_grad(set_to_none=True)
            return loss.item()
        return once
    calls = (lambda net: net(x, i / 1_000, y=y)), (lambda net: net(x, timestep=i, class_labels=y).sample)
    adamw = lambda net: torch.optim.AdamW(net.parameters(), 1e-4)
    raced(figure, 'DiT-S/2, 4 latents, forward and backward', 'DiT passes', *(steps(n, c, None) for n, c in zip(pair(), calls)), same=1e-4, limit=None)
    raced(figure, 'DiT-S/2, 4 latents, training step with AdamW', 'DiT step', *(steps(n, c, adamw) for n, c in zip(pair(), calls)), same=1e-4)

def test_a_guided_walk(figure, question):
    from diffusers import FlowMatchEulerDiscreteScheduler
    start, _, y, _ = question
    ours, theirs = (net.eval().requires_grad_(False) for net in pair())
    n, w, scheduler = 8, 4., FlowMatchEulerDiscreteScheduler()
    class Turned:                                                                # theirs goes from data at 0 to noise at 1, and so do its velocities
        classes = ours.classes
        def __call__(self, xt, t, y): return -ours(xt, 1 - t, y=y)
    ends = []
    def course():
        ends.append(last(euler(cfg_field(Turned(), y, w), start, times(n))))
        return ends[-1].std().item()
    @torch.no_grad()
    def pipeline():                                                              # the loop of diffusers' own pipelines
        scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)])
        z, labels = start, torch.cat([torch.full_like(y, ours.classes), y])
        for t in scheduler.timesteps:
            two = torch.cat([z, z])
            empty, told = theirs(two, timestep=t.expand(len(two)), class_labels=labels).sample.chunk(2)
            z = scheduler.step(empty + w * (told - empty), t, z, return_dict=False)[0]
        ends.append(z)
        return z.std().item()
    course(); pipeline()
    assert (ends[0] - ends[1]).abs().max() < 1e-3 * ends[1].abs().max()
    raced(figure, 'DiT-S/2, guided walk of 4 latents, 8 steps', 'DiT walk', course, pipeline, same=1e-3)
