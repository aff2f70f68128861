"""Latent flow matching: a cache that notices damage, scales and their theory by other routes, and mistakes that are noticed.

Run as a script (FOLDER KILLS SEED), it kills processes that build a cache, on a system that can fork; prints one JSON line a kill, then DONE."""
import json, math, os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Normal, SigmoidTransform, TransformedDistribution
from latentcourse import latent_flow as lf
from latentcourse.classifier_guidance import decoded, the_codec
from latentcourse.diffusion import LINEAR
from latentcourse.lib.check import agree, z_score
from latentcourse.lib.checkpoint import load
from latentcourse.lib.sealed import CheckpointError
from latentcourse.lib.study import load_study
from latentcourse.lib.train import ema_of, seed_all
from latentcourse.mixture import TOWNS, Mixture, exact_field, exact_velocity, mixture_samples
from latentcourse.samplers import euler, last, shifted, times
from latentcourse.text import MANNERS, caption_ids
from latentcourse.captions import captions
from latentcourse.toybox import LARGE, draw, scenes, split_seeds
from latentcourse.unet import affine_floor, centred, principal_variances

double = torch.float64
SCALES = st.sampled_from([1 / 5.49, .4, 1., 1.7, 5.49])
def seeded(s=0): return torch.Generator().manual_seed(s)

# ---- the cache --------------------------------------------------------------------------------------------------------------------

def rows_of(first, n, size=6): # what a row is depends on its number alone
    at = torch.arange(first, first + n, dtype=double)[:, None]
    return {'z': (at * 1.7 + torch.arange(size)).sin().half(), 'labels': at.long()}

class Maker:
    "Makes rows, and remembers which."
    def __init__(self, **how): self.asked, self.how = [], how
    def __call__(self, first, n): self.asked.append(first); return rows_of(first, n, **self.how)

def build(folder, n=20, shard=8, about=None, say=None, make=None):
    make = make or Maker()
    return lf.cached(make, n, folder, about or {'codec': [1., 2.]}, shard=shard, progress=False, say=say or (lambda s: None)), make.asked

def is_right(rows, n=20): return all(torch.equal(rows[k], v) for k, v in rows_of(0, n).items())

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 23), st.integers(1, 9))
def test_any_number_of_rows_in_any_shards(tmp_path_factory, n, shard):
    folder = tmp_path_factory.mktemp('cache')
    rows, asked = build(folder, n, shard)
    assert is_right(rows, n) and asked == list(range(0, n, shard)) and len(list(folder.glob('*.safetensors'))) == math.ceil(n / shard)
    rows, asked = build(folder, n, shard)
    assert is_right(rows, n) and asked == []

def cut(path): path.write_bytes(path.read_bytes()[:-40])
def cut_in_header(path): path.write_bytes(path.read_bytes()[:30])
def emptied(path): path.write_bytes(b'')
def flipped(path): blob = bytearray(path.read_bytes()); blob[-9] ^= 16; path.write_bytes(blob)
def other_rows(path): path.write_bytes(path.with_name('rows-00000000.safetensors').read_bytes())
def gone(path): path.unlink()
def note_edited(path): note = path.with_suffix('.json'); note.write_text(note.read_text().replace('"n": 8', '"n": 9'))

@pytest.mark.parametrize('harm', [cut, cut_in_header, emptied, flipped, other_rows, gone, note_edited], ids=lambda f: f.__name__)
def test_a_harmed_shard_is_made_again(harm, tmp_path):
    build(tmp_path)
    harm(tmp_path / 'rows-00000008.safetensors')
    said = []
    rows, asked = build(tmp_path, say=said.append)
    assert asked == [8] and is_right(rows) and len(said) == (harm is not gone)
    assert all('rows-00000008.safetensors' in s and 'made again' in s for s in said)
    assert build(tmp_path)[1] == []

def test_rows_of_another_origin_are_made_again(tmp_path):
    build(tmp_path)
    assert build(tmp_path, about={'codec': [1., 2.5]})[1] == [0, 8, 16]
    assert build(tmp_path, about={'codec': [1., 2.5], 'large': True})[1] == [0, 8, 16]
    rows, asked = build(tmp_path, n=13, about={'codec': [1., 2.5], 'large': True})         # the last shard is shorter now
    assert asked == [8] and is_right(rows, 13)

def ignoring_the_config(path, cfg=None): return load(path)
def ignoring_the_seal(path, cfg=None): return load_file(path), {}
def believing_what_exists(path, cfg=None):
    try: return load(path, cfg)
    except CheckpointError: return rows_of(0, 8), {}

@pytest.mark.parametrize('wrong', [ignoring_the_config, ignoring_the_seal, believing_what_exists], ids=lambda f: f.__name__)
def test_a_cache_that_does_not_look_is_noticed(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(lf, 'load', wrong)
    with pytest.raises(AssertionError):
        test_rows_of_another_origin_are_made_again(tmp_path / 'a')
        test_a_harmed_shard_is_made_again(flipped, tmp_path / 'b')

def test_an_interrupted_build_goes_on(tmp_path):
    class Stops(Maker):
        def __call__(self, first, n):
            if first == 16: raise KeyboardInterrupt
            return super().__call__(first, n)
    with pytest.raises(KeyboardInterrupt): build(tmp_path, make=Stops())
    rows, asked = build(tmp_path)
    assert asked == [16] and is_right(rows)

def test_what_is_no_request_is_refused(tmp_path):
    for n, shard in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(ValueError, match='whole numbers, 1 or more'): build(tmp_path, n, shard)
    with pytest.raises(ValueError, match='asked for 8 rows from 0 on'): build(tmp_path, make=lambda first, n: {'z': torch.zeros(n + 1)})
    assert not list(tmp_path.glob('*'))                                                     # nothing wrong was kept

def test_what_was_made_for_another_folder_is_left_alone(tmp_path):
    build(tmp_path / 'a'); build(tmp_path / 'b', about={'codec': [9.]})
    assert build(tmp_path / 'a')[1] == []

def fork_build(folder, size):
    pid = os.fork()
    if pid: return pid
    code = 1
    def slow(first, n): time.sleep(.004); return rows_of(first, n, size)
    try: lf.cached(slow, 40, folder, {'codec': 1}, shard=4, progress=False, say=lambda s: None); code = 0
    finally: os._exit(code)

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def kill_builders(folder, kills, rng, size=40_000):
    "Kill builders at random instants or while they write; say what they left, and whether another went on from it to the right rows."
    want = rows_of(0, 40, size)
    start = time.monotonic(); assert ended(fork_build(folder / 'straight', size)) == 0; life = time.monotonic() - start
    for i in range(kills):
        out, writing = folder / f'run{i}', i % 2 == 1
        while True:
            pid, start, until = fork_build(out, size), time.monotonic(), rng.uniform(.1, .9) * life
            while time.monotonic() - start < until: time.sleep(.0005)
            while writing and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and not any(out.glob('.*.tmp')): time.sleep(.0002)
            os.kill(pid, signal.SIGKILL)
            if ended(pid) == -signal.SIGKILL: break
            for f in out.iterdir(): f.unlink()                                             # it was already over: that was no kill
        left = sorted(p.name for p in out.glob('*')) if out.exists() else []
        shards = [load(p)[0] for p in sorted(out.glob('rows-*.safetensors'))] if out.exists() else []     # raises if one is not whole
        make = Maker(size=size)
        rows = lf.cached(make, 40, out, {'codec': 1}, shard=4, progress=False, say=lambda s: None)
        print(json.dumps({'kill': i, 'writing': any(n.endswith('.tmp') for n in left), 'kept': len(shards), 'made': len(make.asked), 'right': all(torch.equal(rows[k], want[k]) for k in want)}), flush=True)
    print('DONE', flush=True)

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_killed_builder_leaves_whole_shards(tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, __file__, str(tmp_path), '4', '1'], env=env, capture_output=True, text=True, timeout=400)
    lines = done.stdout.split('\n')
    assert done.returncode == 0 and 'DONE' in lines, done.stdout[-1000:] + done.stderr[-3000:]
    kills = [json.loads(line) for line in lines if line.startswith('{')]
    assert len(kills) == 4 and all(k['right'] and k['kept'] + k['made'] == 10 for k in kills), kills
    assert any(k['kept'] for k in kills) and any(k['made'] for k in kills)

# ---- rows of the toybox -----------------------------------------------------------------------------------------------------------

def test_encoded_is_the_mean_and_lets_no_gradient_through():
    x = draw(centred(split_seeds('test', 0, 6))).requires_grad_()
    z = lf.encoded(the_codec(), x)
    with torch.no_grad(): mu, _ = the_codec().posterior(x)
    assert not z.requires_grad and z.dtype == torch.float32 and z.shape == (6, 4, 16, 16)
    assert (z - mu).abs().max() < (.1 if lf.bf16_helps() else 1e-4) and (z - mu).square().mean().sqrt() < .01

@pytest.mark.parametrize('large', [False, True])
def test_rows_say_what_the_scenes_are(large):
    seeds = split_seeds('train', 40, 6)
    rows, scene = lf.toy_rows(seeds, the_codec(), large), scenes(seeds, LARGE if large else None)
    assert {k: v.dtype for k, v in rows.items()} == {'z': torch.float16, 'labels': torch.int8, 'ids': torch.int16, 'lengths': torch.int16}
    assert torch.equal(rows['labels'].long(), scene.labels)
    agree(rows['z'].float(), lf.encoded(the_codec(), draw(scene)), atol=.02)
    for j, manner in enumerate(MANNERS):
        ids, lengths = caption_ids(captions(scene.labels, seeds, *manner), lf.WIDTH)
        assert torch.equal(rows['lengths'][:, j].long(), lengths) and torch.equal(rows['ids'][:, j, :ids.shape[1]].long(), ids) and (rows['ids'][:, j, ids.shape[1]:] == 0).all()

def test_toy_latents_are_kept_and_belong_to_their_scenes(tmp_path, monkeypatch):
    rows = lf.toy_latents(5, tmp_path, first=3, progress=False)
    agree(rows['z'].float(), lf.toy_rows(split_seeds('train', 3, 5), the_codec())['z'].float(), atol=.02)
    asked = []
    true = lf.toy_rows
    monkeypatch.setattr(lf, 'toy_rows', lambda *a: asked.append(a[2]) or true(*a))
    assert torch.equal(lf.toy_latents(5, tmp_path, first=3, progress=False)['z'], rows['z']) and asked == []
    lf.toy_latents(5, tmp_path, first=4, progress=False); lf.toy_latents(5, tmp_path, large=True, first=4, progress=False)
    assert asked == [False, True]

# ---- the scale --------------------------------------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(2, 9), st.integers(1, 5), st.floats(.05, 20), st.floats(-5, 5))
def test_scaled_latents_have_deviation_one(seed, n, k, s, m):
    z = s * torch.randn(n, k, 3, 5, generator=seeded(seed)) + m * torch.arange(k)[:, None, None]
    mean, std = lf.channel_stats(z)
    for c in range(k):
        flat = z[:, c].double().flatten()
        agree(mean[c], flat.mean(), atol=1e-4 * (1 + abs(m) * k)), agree(std[c], ((flat - flat.mean()).square().sum() / (len(flat) - 1)).sqrt(), atol=1e-4 * s)
    w = lf.normalised(z, mean, std)
    agree(w.mean((0, 2, 3)), torch.zeros(k), atol=1e-4 * (1 + abs(m) * k / s)), agree(w.std((0, 2, 3)), torch.ones(k), atol=1e-3)
    agree(lf.restored(w, mean, std), z, atol=1e-4 * (1 + s + abs(m) * k))

@pytest.mark.parametrize('mistake', ['one number for all', 'over pictures alone', 'variance for deviation', 'of a picture'])
def test_mistakes_in_the_scale_are_noticed(mistake, monkeypatch):
    z = torch.randn(40, 3, 4, 4, generator=seeded()) * torch.tensor([.2, 1., 6.])[:, None, None] + torch.tensor([3., 0., -1.])[:, None, None]
    wrong = {'one number for all': lambda z: (z.mean().expand(3), z.std().expand(3)), 'over pictures alone': lambda z: (z.mean((0, 2, 3)), z.std(0).mean((1, 2)) * 0 + z.std(0)[:, 0, 0]),
             'variance for deviation': lambda z: (z.mean((0, 2, 3)), z.var((0, 2, 3))), 'of a picture': lambda z: (z[0].mean((1, 2)), z[0].std((1, 2)))}[mistake]
    def check(stats): agree(lf.normalised(z, *stats(z)).std((0, 2, 3)), torch.ones(3), atol=1e-3), agree(lf.normalised(z, *stats(z)).mean((0, 2, 3)), torch.zeros(3), atol=1e-3)
    check(lf.channel_stats)
    with pytest.raises(AssertionError): check(wrong)

@pytest.mark.parametrize('z', [torch.randn(4, 3, 2), torch.randn(1, 3, 2, 2)])
def test_what_has_no_deviation_is_refused(z):
    with pytest.raises(ValueError, match=r'expected \(n, k, h, w\)'): lf.channel_stats(z)
def test_a_dead_channel_is_refused():
    z = torch.randn(4, 3, 2, 2); z[:, 1] = .5
    with pytest.raises(ValueError, match='has no scale'): lf.channel_stats(z)
    z[:, 1] = math.nan
    with pytest.raises(ValueError, match='not finite'): lf.channel_stats(z)

def towns_at(s): return Mixture(s * TOWNS.mu, s * TOWNS.std, TOWNS.weights, TOWNS.labels)

@settings(max_examples=15, deadline=None)
@given(SCALES, st.integers(0, 99))
def test_a_scale_is_another_clock_and_the_loss_follows_it(s, seed):
    g = seeded(seed)
    z, eps, t_same = mixture_samples(TOWNS, 50, generator=g)[0], torch.randn(50, 2, dtype=double, generator=g), .01 + .98 * torch.rand(50, dtype=double, generator=g)
    t = shifted(t_same, s)
    c = t * s + 1 - t
    agree(LINEAR.xt(s * z, eps, t), c[:, None] * LINEAR.xt(z, eps, t_same), atol=1e-10)
    agree(t_same.logit() - t.logit(), math.log(s), atol=1e-9)
    loss = lambda k, when: (exact_velocity(towns_at(k), LINEAR, LINEAR.xt(k * z, eps, when), when) - (k * z - eps)).square().sum(1)
    agree(loss(s, t) * (c / s)**2, loss(1., t_same), atol=1e-6)

@settings(max_examples=15, deadline=None)
@given(SCALES, st.integers(1, 12), st.integers(0, 99))
def test_euler_at_a_scale_is_euler_on_another_grid(s, n, seed):
    start = torch.randn(20, 2, dtype=double, generator=seeded(seed))
    agree(last(euler(exact_field(towns_at(s), LINEAR), start, times(n))) / s, last(euler(exact_field(TOWNS, LINEAR), start, shifted(times(n), 1 / s))), atol=1e-8)

@settings(max_examples=25, deadline=None)
@given(st.floats(.05, 20), st.integers(1, 40))
def test_euler_gain_is_what_euler_does(s, n):
    line = exact_field(Mixture(torch.zeros(1, 1, dtype=double), s), LINEAR)
    end = last(euler(line, torch.ones(1, 1, dtype=double), times(n)))
    agree(lf.euler_gain(s, times(n)) / s, end.abs().item() / s, atol=1e-9)
    agree(lf.euler_gain(s, times(n)) / s, s * lf.euler_gain(1 / s, times(n)), atol=1e-9)
    if n > 1: assert lf.euler_gain(s, times(n)) / s <= lf.euler_gain(1., times(n)) + 1e-12

def test_euler_gain_follows_its_formula_and_refuses():
    for s in (.1, .7, 1., 6.): agree(-2 * 4000 * math.log(lf.euler_gain(s, times(4000)) / s), 1 + math.pi / 4 * (s + 1 / s), atol=.03)
    for s in (0., -1., math.inf):
        with pytest.raises(ValueError, match='positive'): lf.euler_gain(s, times(4))

# ---- times ------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(st.floats(-2, 2), st.floats(.3, 2))
def test_logit_normal_times_and_density(mean, std):
    law = TransformedDistribution(Normal(torch.tensor(mean, dtype=double), torch.tensor(std, dtype=double)), SigmoidTransform())
    t = torch.linspace(.02, .98, 49, dtype=double)
    agree(lf.logit_normal_density(t, mean, std), law.log_prob(t).exp(), atol=1e-9)
    drawn = lf.logit_normal_times(2_000, mean=mean, std=std).double().sort().values
    assert (drawn > 0).all() and (drawn < 1).all()
    below = Normal(0., 1.).cdf((drawn.logit() - mean) / std)                        # one in each of equally likely parts
    agree(below[20:-20], ((torch.arange(2_000) + .5) / 2_000)[20:-20].double(), atol=1e-3)

@pytest.mark.parametrize('wrong', [lambda t: lf.logit_normal_density(t) * t * (1 - t), lambda t: lf.logit_normal_density(1 - t, .5), lambda t: torch.ones_like(t)], ids=['no Jacobian', 'time reversed', 'uniform'])
def test_wrong_densities_are_noticed(wrong):
    t = torch.linspace(.02, .98, 49, dtype=double)
    law = TransformedDistribution(Normal(torch.tensor(.5, dtype=double), torch.tensor(1., dtype=double)), SigmoidTransform())
    agree(lf.logit_normal_density(t, .5), law.log_prob(t).exp(), atol=1e-9)
    with pytest.raises(AssertionError): agree(wrong(t), law.log_prob(t).exp(), atol=1e-2)

def test_times_refuse():
    for t in (0., 1., 1.2):
        with pytest.raises(ValueError, match='between 0 and 1'): lf.logit_normal_density(torch.tensor([.5, t]))
    for b, std in ((0, 1.), (4, 0.), (4, -1.), (4, math.inf)):
        with pytest.raises(ValueError, match='1 or more, and a positive number'): lf.logit_normal_times(b, std=std)

# ---- yardsticks and costs -----------------------------------------------------------------------------------------------------------

def by_matrices(seen, new, s):
    cov, eye = (seen - seen.mean(0)).T @ (seen - seen.mean(0)) / len(seen), torch.eye(seen.shape[1], dtype=double)
    K = (s * cov - (1 - s) * eye) @ torch.linalg.inv(s**2 * cov + (1 - s)**2 * eye)
    return (((new - seen.mean(0)) @ (eye - s * K).T).square().sum(1).mean() + (eye + (1 - s) * K).square().sum()) / len(eye)

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(2, 6), st.floats(.02, .9))
def test_affine_on_new(seed, d, s):
    g = seeded(seed)
    mixing, t = torch.randn(d, d, dtype=double, generator=g), torch.tensor([s], dtype=double)
    seen, new = (torch.randn(n, d, dtype=double, generator=g) @ mixing + k for n, k in ((30, .5), (20, 0.)))
    agree(lf.affine_on_new(seen, new, t)[0], by_matrices(seen, new, s), atol=1e-7)
    agree(lf.affine_on_new(seen, seen, t), affine_floor(principal_variances(seen), t), atol=1e-8)

def test_affine_on_new_is_what_an_affine_field_loses():
    g = seeded(4)
    seen, new = (torch.randn(n, 3, dtype=double, generator=g) * torch.tensor([.3, 1., 2.]) for n in (25, 4_000))
    s, cov = .6, torch.cov(seen.T, correction=0)
    K = (s * cov - (1 - s) * torch.eye(3)) @ torch.linalg.inv(s**2 * cov + (1 - s)**2 * torch.eye(3, dtype=double))
    eps, m = torch.randn(new.shape, dtype=double, generator=g), seen.mean(0)
    said = m + (s * new + (1 - s) * eps - s * m) @ K.T                                 # best on what was seen: m + K (xt - s m)
    assert abs(z_score((said - (new - eps)).square().mean(1), lf.affine_on_new(seen, new, torch.tensor([s]))[0].item())) < 5
    for a, b in ((seen, new[:, :2]), (seen[:1], new)):
        with pytest.raises(ValueError, match='same shape'): lf.affine_on_new(a, b, torch.tensor([.5]))

def test_operations_are_counted_by_hand():
    assert lf.operations(nn.Linear(7, 5), (3, 7)) == 2 * 7 * 5
    assert lf.operations(nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 8, 8)) == 2 * 3 * 8 * 9 * 16

# ---- trained somewhere, at some scale -----------------------------------------------------------------------------------------------

def known_way(z, scale): # the field that leads the noise of seed 0 to the latents z, counted in another unit
    eps = torch.randn(z.shape, generator=seeded())
    return lambda xt, t, y=None: scale * z - eps

@pytest.mark.parametrize('scale', [1 / 5.49, 1., 5.49])
def test_pictures_do_not_depend_on_the_unit(scale, monkeypatch):
    cfg = lf.SpaceCfg(scale=scale, scenes=64)
    x, y, mean, std = lf.space_data('latents', 64)
    got = lf.space_pictures(known_way(x[:4].float(), scale), cfg, y[:4], times(6))
    agree(got, decoded(lf.restored(x[:4].float(), mean, std)), atol=.02)
    if scale != 1:
        with pytest.raises(AssertionError): agree(lf.space_pictures(known_way(x[:4].float(), scale), lf.SpaceCfg(scenes=64), y[:4], times(6)), got, atol=.02)       # the scale forgotten

def test_space_data_is_standardised_and_what_it_says():
    for space, shape in lf.SHAPES.items():
        x, y, mean, std = lf.space_data(space, 64)
        assert x.shape == (64, *shape) and x.dtype == torch.float16 and y.shape == (64,) and mean.shape == std.shape == shape[:1]
        agree(x.float().std((0, 2, 3)), torch.ones(shape[0]), atol=.01)
    assert torch.equal(y, centred(torch.arange(2**34, 2**34 + 64)).labels[:, 2])
    agree(lf.restored(x[:3].float(), mean, std), draw(centred(torch.arange(2**34, 2**34 + 3))), atol=.01)
    with pytest.raises(ValueError, match='unknown space'): lf.space_data('sound', 4)

def normal_at(s): return lambda xt, t, y=None: ((s**2 * t - (1 - t)) / (s**2 * t**2 + (1 - t)**2))[:, None, None, None] * xt

def test_losses_of_scales_are_compared_in_one_unit():
    want = lf.space_loss(normal_at(1.), lf.SpaceCfg(scenes=64), 16)
    for s in (1 / 5.49, .5, 5.49): agree(lf.space_loss(normal_at(s), lf.SpaceCfg(scale=s, scenes=64), 16), want, atol=1e-4)
    with pytest.raises(AssertionError): agree(lf.space_loss(normal_at(1.), lf.SpaceCfg(scale=2., scenes=64), 16), want, atol=1e-2)

def test_training_repeats_itself_and_learns_at_its_scale():
    ends = []
    for scale in (1., 1., 5.49):
        cfg = lf.SpaceCfg(scale=scale, widths=(8, 16), d=16, scenes=64, steps=4, batch=8)
        net = lf.build_space(cfg)
        log = list(lf.learn_space(net, ema_of(net, cfg.ema), cfg, progress=False))
        ends.append([r.loss for r in log])
    assert len(ends[0]) == 4 and ends[0] == ends[1]
    assert 10 < ends[2][0] / ends[0][0] < 20                                              # s² + 1 over 2, before anything is learned

def test_recorded_studies_are_those_of_the_code():
    for study in lf.STUDIES.values(): assert len(load_study(study).points) == len(study.grid)

if __name__ == '__main__':
    torch.set_num_threads(1)
    kill_builders(Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3])))
