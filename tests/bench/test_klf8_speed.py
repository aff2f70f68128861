"""A training step of the SD-size autoencoder against diffusers' `AutoencoderKL`: the same weights, pictures, loss and optimiser, one thread of a CPU, small pictures.

Met when the lower end of the ratio's 95 % interval is at most 1: then the pairs do not show that the course is slower. That is less than showing that it is faster,
for which the upper end would have to be below 1; median and both ends are reported. The bootstrap takes the alternating pairs for independent."""
import json, subprocess, sys, time
import pytest, torch
from latentcourse.klf8 import KLF8, to_diffusers

PAIRS, SIDE, BATCH = 21, 64, 1

def median_ratio(a, b, draws=10_000):
    "Median of a/b over pairs, and its 95 % bootstrap interval."
    r = torch.tensor(a, dtype=torch.float64) / torch.tensor(b, dtype=torch.float64)
    again = r[torch.randint(len(r), (draws, len(r)), generator=torch.Generator().manual_seed(0))].median(1).values
    return r.median().item(), *again.quantile(torch.tensor([.025, .975], dtype=torch.float64)).tolist()

def test_training_step_of_the_sd_size_autoencoder(figure):
    diffusers = pytest.importorskip('diffusers')
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        ours = KLF8()
        theirs = diffusers.AutoencoderKL(block_out_channels=ours.widths, layers_per_block=2, down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4)
        theirs.load_state_dict(to_diffusers(ours.state_dict()))
        x, eps = torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1, torch.randn(BATCH, 4, SIDE // 8, SIDE // 8)

        def forward_ours():
            x_hat, q = ours(x, eps)
            return x_hat, q.kl()

        def forward_theirs():
            q = theirs.encode(x).latent_dist
            return theirs.decode(q.mean + q.std * eps).sample, q.kl()

        def step(forward, opt):
            start = time.process_time()                                   # one thread: other programs do not count
            x_hat, kl = forward()
            loss = (x_hat - x).abs().mean() + 1e-6 * kl.mean()
            opt.zero_grad(); loss.backward(); opt.step()
            return time.process_time() - start, loss.item()

        runs = [(f, torch.optim.AdamW(m.parameters(), lr=1e-5)) for f, m in ((forward_ours, ours), (forward_theirs, theirs))]
        first = [step(*r)[1] for r in runs]                               # warm up; the same loss from the same weights
        assert abs(first[0] - first[1]) < 1e-5
        times = [], []
        for i in range(PAIRS):
            for k in ((0, 1), (1, 0))[i % 2]: times[k].append(step(*runs[k])[0])
    finally: torch.set_num_threads(threads)
    middle, low, high = median_ratio(*times)
    for name, t in (('course', times[0]), ('diffusers', times[1])): figure(f'KL-f8 training step, {BATCH} x {SIDE} x {SIDE}, {name}', sorted(t)[PAIRS // 2], 's')
    figure(f'KL-f8 step, course / diffusers, median of {PAIRS} pairs', middle, 'ratio')
    figure('KL-f8 step, ratio, lower end of 95 %', low, 'ratio'); figure('KL-f8 step, ratio, upper end of 95 %', high, 'ratio')
    print(f'ratio {middle:.3f} [{low:.3f}, {high:.3f}]:', 'faster' if high < 1 else 'slower' if low > 1 else 'no difference shown')
    assert low <= 1, f'slower than diffusers: ratio {middle:.3f} [{low:.3f}, {high:.3f}]'

FULL = """
import json, resource, sys, time, torch
from latentcourse.klf8 import KLF8
torch.manual_seed(0); torch.set_num_threads(1)
def peak(): # GB; Linux hands a child the ru_maxrss of its parent, so the high-water mark of this process's own memory is read instead
    try: return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) / 1e6
    except (OSError, StopIteration): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6)
model, x, times = KLF8().eval(), torch.rand(1, 3, 256, 256) * 2 - 1, ([], [])
before = peak()
with torch.no_grad():
    for _ in range(3):
        start = time.process_time(); q = model.encode(x); between = time.process_time(); model.decode(q.mode()); end = time.process_time()
        times[0].append(between - start); times[1].append(end - between)
print(json.dumps([sorted(times[0])[1], sorted(times[1])[1], before, peak()]))
"""

def test_encode_and_decode_at_full_resolution(figure):
    "Seconds of one core and peak memory of one 256 x 256 picture, without gradients; in a process of its own, whose memory nothing else has used."
    pytest.importorskip('resource')                                       # not on Windows
    done = subprocess.run([sys.executable, '-c', FULL], capture_output=True, text=True, check=True)
    encode, decode, before, peak = json.loads(done.stdout.splitlines()[-1])
    figure('KL-f8 encode, 1 x 256 x 256, median of 3', encode, 's'); figure('KL-f8 decode, 1 x 256 x 256, median of 3', decode, 's')
    figure('KL-f8, peak resident memory of the process', peak, 'GB'); figure('KL-f8, of it before the first picture', before, 'GB')
