"The loop: the steps it makes, the state it keeps, what it refuses."
import math, random, time
from types import SimpleNamespace
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse.lib.checkpoint import load, save
from latentcourse.lib.data import Batches, Prefetch
from latentcourse.lib.device import my_share, pick_device, processes, seed_all, share
from latentcourse.lib.sealed import CheckpointError, WrongConfig, WrongState
from latentcourse.lib.train import OneLine, TrainingDiverged, ema_of, endless, fit, lr_factor, per_sample

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

X = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))
ROWS = [X[i:i + 8] for i in range(0, 48, 8)]

def make(seed=0, drop=.1): seed_all(seed); return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.SiLU(), nn.Dropout(drop), nn.Linear(12, 5))
def loss_of(net): return lambda x: (net(x) - x).square().sum(1)
def go(net=None, batches=None, steps=8, loss=None, **more):
    net = net or make()
    return list(fit(loss or loss_of(net), net, ROWS if batches is None else batches, steps, **{**dict(device='cpu', progress=False), **more}))
def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())

# ---- the steps

@pytest.mark.parametrize('clip', [1., None])
@pytest.mark.parametrize('warmup, schedule', [(0, 'constant'), (3, 'cosine')])
def test_steps_are_those_of_a_bare_loop(clip, warmup, schedule):
    a, b = make(), make()
    go(a, lr=.01, warmup=warmup, schedule=schedule, clip=clip)
    opt = torch.optim.AdamW(make(1).parameters()); seed_all(0); make()             # the generators stand where they stood
    opt = torch.optim.AdamW(b.parameters(), lr=.01)
    for i in range(8):
        opt.param_groups[0]['lr'] = .01 * ((i + 1) / (warmup + 1) if i < warmup else 1. if schedule == 'constant' else .5 * (1 + math.cos(math.pi * (i - warmup) / (8 - warmup))))
        loss_of(b)(ROWS[i % 6]).mean().backward()
        if clip: nn.utils.clip_grad_norm_(b.parameters(), clip)
        opt.step(); opt.zero_grad()
    assert all((v - b.state_dict()[k]).abs().max() < 1e-6 for k, v in a.state_dict().items())

def test_records():
    net = make()
    hist = go(net, loss=lambda x: (loss_of(net)(x), {'size': 3, 'per_row': x[:, 0]}), lr=.01, warmup=2)
    assert [r.i for r in hist] == list(range(8)) and hist[2].per_row == pytest.approx(ROWS[2][:, 0].mean().item()) and {r.size for r in hist} == {3.}
    assert [r.lr for r in hist[:3]] == pytest.approx([.01 / 3, .02 / 3, .01]) and all(r.seconds > 0 and r.grad_norm > 0 for r in hist)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.data())
def test_schedule(steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    rate = [lr_factor(i, steps, warmup) for i in range(steps)]
    assert max(rate) == rate[warmup] == 1 and all(0 < r <= 1 for r in rate)
    assert rate[:warmup] == sorted(rate[:warmup]) and rate[warmup:] == sorted(rate[warmup:], reverse=True)
    assert {lr_factor(i, steps, warmup, 'constant') for i in range(warmup, steps)} == {1.}

def test_accumulation_is_a_larger_batch():
    a, b = (nn.Linear(5, 5) for _ in 'ab'); b.load_state_dict(a.state_dict())
    go(a, [torch.cat(ROWS[i:i + 2]) for i in (0, 2, 4)], 6); go(b, ROWS, 6, accumulate=2)
    assert torch.allclose(a.weight, b.weight, atol=1e-6)

def test_average_of_weights():
    net = make(); ema = ema_of(net, .8); seen = []
    for r in fit(loss_of(net), net, ROWS, 6, ema=ema, device='cpu', progress=False): seen.append(net[0].weight.detach().clone())
    want = seen[0]
    for n, w in enumerate(seen[1:], 1): m = min(.8, (1 + n) / (10 + n)); want = m * want + (1 - m) * w
    assert torch.allclose(ema.module[0].weight, want, atol=1e-6) and torch.equal(ema.module[1].running_mean, net[1].running_mean)
    for bad in (-.1, 1., 2): pytest.raises(ValueError, ema_of, net, bad)
    pytest.raises(ValueError, ema_of, make().bfloat16())

def test_bf16_keeps_single_precision_weights():
    net = make(); kinds = set()
    def loss(x): y = net(x); kinds.add(y.dtype); return (y - x).square().sum(1)
    hist = go(net, loss=loss, steps=4, precision='bf16')
    assert kinds == {torch.bfloat16} and net[0].weight.dtype == torch.float32 and all(math.isfinite(r.loss) for r in hist)

def test_training_mode_is_restored():
    net = make()
    for _ in fit(loss_of(net), net, ROWS, 3, device='cpu', progress=False): assert net.training; net.eval()

def test_frozen_and_unused_parameters():
    net = make(); net[0].weight.requires_grad_(False); net.register_parameter('unused', nn.Parameter(torch.ones(3)))
    before = net[0].weight.clone(); go(net)
    assert torch.equal(net[0].weight, before) and torch.equal(net.unused, torch.ones(3))

def test_progress_in_a_notebook(monkeypatch):
    shown = []
    monkeypatch.setattr('latentcourse.lib.train.get_ipython', lambda: SimpleNamespace(kernel=1))
    monkeypatch.setattr('latentcourse.lib.train.display', lambda *a, **k: SimpleNamespace(update=lambda d, raw: shown.append(d['text/plain'])))
    go(steps=3, progress=True)
    assert '3/3' in shown[-1] and 'loss' in shown[-1] and '\r' not in ''.join(shown) and all(shown)

def test_silent_where_nobody_looks(capfd):
    go(steps=3, progress=True)
    assert capfd.readouterr() == ('', '')

# ---- stop and go on

def streams():
    yield 'list', lambda: ROWS, True
    yield 'Batches', lambda: Batches(X, 7, seed=2), False
    yield 'Prefetch', lambda: Prefetch(Batches(X, 7, seed=2)), False

@pytest.mark.parametrize('stop', [1, 5, 12])
@pytest.mark.parametrize('stream', [s for _, s, _ in streams()], ids=[n for n, _, _ in streams()])
def test_stopped_and_resumed(tmp_path, stream, stop):
    def run(out, stop=None):
        net = make(); ema = ema_of(net, .9); hist, opt = [], torch.optim.SGD(net.parameters(), .05, momentum=.9) if stop == 5 or out.name == 'sgd' else None
        def loss(x): return loss_of(net)(x + .1 * torch.randn_like(x) + .1 * random.random() + .1 * np.random.rand()), {'first': x[0, 0]}
        for r in fit(loss, net, stream(), 12, opt=opt, ema=ema, accumulate=2, device='cpu', out=out, every=2, resume=True, progress=False):
            hist.append(r)
            if len(hist) == stop: return
        return net, ema, hist
    name = 'sgd' if stop == 5 else 'adam'
    net, ema, hist = run(tmp_path / 'whole' / name)
    run(tmp_path / name, stop)
    if stop == 5: assert load(tmp_path / name / 'state.safetensors')[1]['step'] == 4      # the last one it wrote
    net2, ema2, hist2 = run(tmp_path / name)
    assert same(net, net2) and same(ema, ema2)
    assert [(r.i, r.loss, r.lr, r.grad_norm, r.first) for r in hist] == [(r.i, r.loss, r.lr, r.grad_norm, r.first) for r in hist2]
    assert sum(hasattr(r, 'replayed') for r in hist2) == {1: 0, 5: 4, 12: 10}[stop]

def test_a_finished_run_only_replays(tmp_path):
    a = make(); first = go(a, out=tmp_path)
    b = make(3); again = go(b, out=tmp_path, resume=True, loss=lambda x: 1 / 0)
    assert same(a, b) and [r.loss for r in first] == [r.loss for r in again]

def test_a_run_is_not_overwritten(tmp_path):
    go(out=tmp_path)
    with pytest.raises(ValueError, match='holds a run already'): go(out=tmp_path)

@pytest.mark.parametrize('other, error', [(dict(steps=9), WrongConfig), (dict(lr=.5), WrongConfig), (dict(cfg={'width': 2}), WrongConfig), (dict(accumulate=2), WrongConfig), (dict(ema=True), WrongConfig),
                                          (dict(net=lambda: nn.Linear(5, 5)), WrongState), (dict(batches=lambda: Batches(X, 8, seed=9)), CheckpointError)])
def test_another_run_is_refused(tmp_path, other, error):
    go(make(), Batches(X, 8), out=tmp_path, cfg={'width': 1})
    net = other.pop('net', make)(); batches = other.pop('batches', lambda: Batches(X, 8))()
    if other.get('ema'): other['ema'] = ema_of(net)
    with pytest.raises(error, match='state.safetensors'): go(net, batches, out=tmp_path, resume=True, **{'cfg': {'width': 1}, **other})

def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    save(tmp_path / 'state.safetensors', {}, {})
    with pytest.raises(CheckpointError): go(out=tmp_path, resume=True)

# ---- not a number

@pytest.mark.parametrize('what', [math.nan, math.inf])
def test_diverged(tmp_path, what):
    net, rows = make(), [x.clone() for x in ROWS]
    rows[5][2] = what
    with pytest.raises(TrainingDiverged, match=r'step 5: loss (nan|inf).*batch 5 of the stream.*state\.safetensors, after 4 steps') as e: go(net, rows, out=tmp_path, every=2)
    assert isinstance(e.value, FloatingPointError) and net[0].weight.isfinite().all() and load(tmp_path / 'state.safetensors')[1]['step'] == 4

def test_diverged_gradient_and_stream():
    net = make()
    def loss(x): y = (net(x) - x).square().sum(1); return (y * 0).sqrt() + 1                       # finite loss, infinite slope
    with pytest.raises(TrainingDiverged, match=r"gradient norm (nan|inf).*'seed': 4.*there is no checkpoint"): go(net, Batches(X, 8, seed=4), loss=loss)

# ---- what is refused

BAD = [dict(steps=0), dict(steps=2.), dict(steps=None), dict(lr=0), dict(lr=-1.), dict(lr=math.nan), dict(lr='x'), dict(clip=0), dict(clip='x'), dict(warmup=-1), dict(warmup=8), dict(schedule='linear'), dict(precision='fp8'),
       dict(accumulate=0), dict(every=0), dict(every_s=-1), dict(device='abacus'), dict(net=[1]), dict(ema=make()), dict(opt='adam'), dict(batches=[]), dict(batches=iter(ROWS[:2])), dict(batches=3),
       dict(net=nn.Flatten()), dict(cfg={'x': object()}), dict(opt=torch.optim.SGD([torch.ones(1, requires_grad=True)], .1), lr=.1)]

@pytest.mark.parametrize('bad', BAD, ids=str)
def test_fit_refuses(bad):
    with pytest.raises((TypeError, ValueError)): go(**bad)

@pytest.mark.parametrize('out', [None, 1., torch.ones(()), torch.ones(2, 2, requires_grad=True), torch.ones(0, requires_grad=True), torch.ones(3), torch.ones(3, dtype=torch.long), (torch.ones(3, requires_grad=True), 1),
                                 (torch.ones(3, requires_grad=True), {'loss': 1}), (torch.ones(3, requires_grad=True), {'x': 'y'}), (torch.ones(3, requires_grad=True), {}, 1)])
def test_losses_refused(out):
    with pytest.raises((TypeError, ValueError), match='loss_fn'): per_sample(out)

def test_endless():
    it = endless([1, 2, 3], skip=4)
    assert [next(it) for _ in range(4)] == [2, 3, 1, 2]
    with pytest.raises(ValueError, match='nothing came'): next(endless([]))

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4))
def test_shares_make_the_whole(world, rows):
    n = rows * world
    batch = {'x': torch.arange(n), 'y': (torch.arange(2. * n).reshape(n, 2), [f'caption {i}' for i in range(n)]), 'name': 'same for all'}
    parts = [share(batch, r, world) for r in range(world)]
    assert sorted(torch.cat([p['x'] for p in parts]).tolist()) == list(range(n)) and sorted(sum((p['y'][1] for p in parts), [])) == sorted(batch['y'][1])
    assert all(p['name'] == 'same for all' and p['y'][0].shape == (rows, 2) for p in parts)
    if world > 1: pytest.raises(ValueError, share, torch.ones(n + 1), 0, world)

def test_device_and_seed():
    assert pick_device('cpu') == torch.device('cpu') and pick_device() == processes().device and my_share(ROWS) == (0, 1)
    with pytest.raises(ValueError, match='shared by 2'): my_share(Batches(X, 8, rank=1, world=2))
    for bad in ('abacus', 'cuda:99', 3.5): pytest.raises(ValueError, pick_device, bad)
    for bad in (-1, 2**32, 1.5, None, True): pytest.raises(ValueError, seed_all, bad)
    seed_all(7); a = random.random(), np.random.rand(), torch.rand(1).item()
    seed_all(7); assert a == (random.random(), np.random.rand(), torch.rand(1).item())

@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    def run(out, stop=None):
        torch.use_deterministic_algorithms(True)
        net = make(); ema = ema_of(net)
        for r in fit(loss_of(net), net, Batches(X, 8), 20, ema=ema, precision='bf16', out=out, every=5, resume=True, progress=False):
            if r.i == stop: return
        return net
    a = run(tmp_path / 'a'); run(tmp_path / 'b', stop=12); b = run(tmp_path / 'b')
    torch.use_deterministic_algorithms(False)
    assert a[0].weight.is_cuda and same(a, b)

def test_seconds_of_a_step_include_the_optimizer():
    net = torch.nn.Linear(2, 1)
    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            time.sleep(.05)
            return super().step(closure)
    hist = list(fit(lambda x: net(x).square().flatten(), net, torch.randn(4, 2).split(2), 3, opt=Slow(net.parameters(), .1), device='cpu', progress=False))
    assert all(r.seconds >= .05 for r in hist)
