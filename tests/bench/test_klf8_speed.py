"A training step of the SD-size autoencoder against diffusers' `AutoencoderKL`: the same weights, pictures, loss and optimiser, small pictures; its memory and time at full size."
import json, subprocess, sys, time
import pytest, torch
from latentcourse.klf8 import KLF8, to_diffusers

PAIRS, SIDE, BATCH = 21, 64, 1

def test_training_step_of_the_sd_size_autoencoder(race):
    diffusers = pytest.importorskip('diffusers')
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

    def step(model, forward):
        opt = torch.optim.AdamW(model.parameters(), lr=1e-5)
        def once():
            x_hat, kl = forward()
            loss = (x_hat - x).abs().mean() + 1e-6 * kl.mean()
            opt.zero_grad(); loss.backward(); opt.step()
            return loss.item()
        return once

    race(f'KL-f8 training step, {BATCH} x {SIDE} x {SIDE}', 'diffusers', step(ours, forward_ours), step(theirs, forward_theirs), PAIRS, same=1e-5, short='KL-f8 step')

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
