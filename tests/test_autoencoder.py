"Chapter 2: parity with PyTorch, refusals, and the mistakes of this field put back in one by one."
import inspect, json
from dataclasses import replace
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from torch import nn
import latentcourse
from latentcourse import autoencoder as ae

D = torch.float64
SETTING = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))   # h, w, kernel, stride, padding, dilation

def fits(h, w, kernel, stride, padding, dilation): return min(h, w) + 2 * padding >= dilation * (kernel - 1) + 1

# ---- parity ------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(SETTING, st.integers(0, 999))
def test_convolution_and_its_gradients(setting, seed):
    assume(fits(*setting))
    h, w, kernel, *rest = setting
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(2, 3, h, w, dtype=D, requires_grad=True), torch.randn(4, 3, kernel, kernel, dtype=D, requires_grad=True), torch.randn(4, dtype=D)
    got, want = ae.conv2d_unfold(x, weight, bias, *rest), F.conv2d(x, weight, bias, *rest)
    assert torch.allclose(got, want, atol=1e-10, rtol=0) and got.shape[2:] == (ae.out_side(h, kernel, *rest), ae.out_side(w, kernel, *rest))
    y = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad((got * y).sum(), (x, weight)), torch.autograd.grad((want * y).sum(), (x, weight))): assert torch.allclose(a, b, atol=1e-10, rtol=0)

@settings(max_examples=25, deadline=None)
@given(SETTING, st.integers(0, 999))
def test_transposed_convolution_is_the_adjoint(setting, seed):
    assume(fits(*setting))
    h, w, kernel, *rest = setting
    torch.manual_seed(seed)
    x, weight = torch.randn(2, 3, h, w, dtype=D, requires_grad=True), torch.randn(4, 3, kernel, kernel, dtype=D)
    Ax = F.conv2d(x, weight, None, *rest)
    y = torch.randn_like(Ax)
    ATy = ae.conv_transpose2d_paint(y, weight, (h, w), *rest)
    assert abs((Ax * y).sum() - (x * ATy).sum()) < 1e-9
    assert torch.allclose(ATy, torch.autograd.grad((Ax * y).sum(), x)[0], atol=1e-10, rtol=0)

@settings(max_examples=20, deadline=None)
@given(st.integers(4, 13), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1), st.sampled_from(['max', 'mean']))
def test_pooling(n, kernel, stride, padding, how):
    assume(2 * padding <= kernel)
    x = torch.randn(2, 3, n, n + 1, dtype=D)
    known = F.max_pool2d if how == 'max' else F.avg_pool2d
    assert torch.allclose(ae.pool2d_unfold(x, kernel, stride, padding, how), known(x, kernel, stride, padding), atol=1e-12, rtol=0)

@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_channels_and_space_undo_each_other(r, c, h, w):
    x = torch.randn(2, c, h * r, w * r)
    y = ae.space_to_channels(x, r)
    assert torch.equal(y, F.pixel_unshuffle(x, r)) and torch.equal(ae.channels_to_space(y, r), x) and torch.equal(F.pixel_shuffle(y, r), x)

def test_losses_are_one_a_picture():
    x, y = torch.randn(2, 5, 3, 8, 8).clamp(-1, 1)
    assert torch.allclose(ae.ae_loss(x, y), torch.stack([F.l1_loss(a, b) for a, b in zip(x, y)])) and torch.allclose(ae.ae_loss(x, y, 2), torch.stack([F.mse_loss(a, b) for a, b in zip(x, y)]))

# ---- networks ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('f', (2, 4, 8, 16))
def test_shapes_and_start(f):
    torch.manual_seed(0)
    model = ae.Autoencoder(f, 5, 8, 1, 8, 2)
    x = torch.randn(2, 3, 32, 48)
    z = model.encode(x)
    assert z.shape == (2, 5, 32 // f, 48 // f) and model(x).shape == x.shape and torch.equal(model(x), model.decoder(model.encoder(x)))
    blocks = [m for m in model.modules() if isinstance(m, ae.ResBlock)]
    assert len(blocks) == 3 * len(ae.stage_widths(f, 8)) and all(torch.equal(b(h), h) for b in blocks for h in [torch.randn(1, b.conv1.in_channels, 4, 4)])

def test_block_that_is_normalised_or_changes_channels():
    assert not torch.equal((b := ae.ResBlock(8, norm=nn.BatchNorm2d))(h := torch.randn(2, 8, 4, 4)), h) and b.conv2.weight.abs().max() > 0
    assert ae.ResBlock(8, 12)(h).shape == (2, 12, 4, 4)

def test_names_of_the_state_do_not_change():
    "Checkpoints of this and later chapters rely on them."
    names = set(ae.Autoencoder(4, 4, 8, 1, 8, 1).state_dict())
    for n in ('encoder.stem.1.weight', 'encoder.stages.0.0.conv1.weight', 'encoder.stages.1.0.weight', 'encoder.stages.1.1.conv2.bias', 'encoder.head.1.weight',
              'decoder.stem.weight', 'decoder.stages.0.0.conv1.weight', 'decoder.stages.1.0.weight', 'decoder.stages.1.2.conv2.bias', 'decoder.head.1.weight'): assert n in names, n

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_remixed_latents_give_the_same_pictures(seed):
    torch.manual_seed(seed)
    model = ae.Autoencoder(4, 3, 4, 1, 4, 1).double()
    x, M = torch.randn(2, 3, 8, 8, dtype=D), torch.linalg.qr(torch.randn(3, 3, dtype=D)).Q * torch.tensor([.1, 1., 10.], dtype=D)
    other = ae.remix(model, M)
    assert torch.allclose(other(x), model(x), atol=1e-9, rtol=0) and torch.allclose(other.encode(x), torch.einsum('jk,bkhw->bjhw', M, model.encode(x)), atol=1e-9, rtol=0)

# ---- a linear autoencoder ----------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.data())
def test_no_linear_autoencoder_beats_the_dropped_eigenvalues(n, data):
    m, seed = data.draw(st.integers(1, n)), data.draw(st.integers(0, 999))
    torch.manual_seed(seed)
    C = torch.cov(torch.randn(n, 4 * n, dtype=D)); U = torch.linalg.eigh(C).eigenvectors[:, n - m:]
    least, M = ae.dropped(C, m), torch.randn(m, m, dtype=D) + 3 * torch.eye(m, dtype=D)
    assert ae.linear_loss(torch.randn(m, n, dtype=D), torch.randn(n, m, dtype=D), C) >= least - 1e-9
    assert abs(ae.linear_loss(M @ U.T, U @ torch.linalg.inv(M), C) - least) < 1e-8

def test_descent_finds_it():
    torch.manual_seed(0)
    C = torch.diag(torch.tensor([4., 2., 1., .2, .1], dtype=D))
    A, B, log = ae.train_linear(C, 2, steps=120, seed=3)
    assert log[0] > log[-1] and abs(ae.linear_loss(A, B, C) - 1.3) < 1e-6 and torch.linalg.qr(B).Q[2:].abs().max() < 1e-3
    assert torch.equal(A, ae.train_linear(C, 2, steps=120, seed=3)[0])

# ---- refusals ----------------------------------------------------------------------------------------------------------------------

MAP, NAN = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan)

@pytest.mark.parametrize('call', [
    lambda: ae.ae_loss(MAP, MAP, 3), lambda: ae.ae_loss(MAP, MAP[:, :2]), lambda: ae.ae_loss(MAP[:0], MAP[:0]),
    lambda: ae.compression(0, 4), lambda: ae.compression(8, 0), lambda: ae.compression(8, 4, -1),
    lambda: ae.out_side(0, 1), lambda: ae.out_side(4, 5), lambda: ae.out_side(4, 3, 0), lambda: ae.out_side(4, 3, 1, -1), lambda: ae.out_side(4, 3, dilation=0),
    lambda: ae.windows(MAP[0], 3), lambda: ae.windows(MAP, 9), lambda: ae.windows(MAP[:0], 3), lambda: ae.windows([1.], 3),
    lambda: ae.conv2d_unfold(MAP, torch.zeros(2, 4, 3, 3)), lambda: ae.conv2d_unfold(MAP, torch.zeros(2, 3, 3, 2)), lambda: ae.conv2d_unfold(MAP, torch.zeros(3, 3, 3)),
    lambda: ae.pool2d_unfold(MAP, 2, how='median'), lambda: ae.pool2d_unfold(MAP, 2, 2, 2),
    lambda: ae.conv_transpose2d_paint(torch.zeros(1, 2, 4, 4), torch.zeros(2, 3, 3, 3), (8, 8)), lambda: ae.conv_transpose2d_paint(torch.zeros(1, 3, 6, 6), torch.zeros(2, 3, 3, 3), (8, 8)),
    lambda: ae.space_to_channels(MAP, 3), lambda: ae.space_to_channels(MAP[0], 2), lambda: ae.space_to_channels(MAP, 0), lambda: ae.channels_to_space(MAP, 2), lambda: ae.channels_to_space(MAP[0], 1),
    lambda: ae.stage_widths(3, 8), lambda: ae.Encoder(32), lambda: ae.Decoder(1),
    lambda: ae.remix(ae.Autoencoder(4, 4, 4, 1, 4, 1), torch.eye(3)), lambda: ae.remix(ae.Autoencoder(4, 2, 4, 1, 4, 1), torch.ones(2, 2)), lambda: ae.remix(ae.Autoencoder(4, 2, 4, 1, 4, 1), torch.full((2, 2), torch.nan)),
    lambda: ae.linear_loss(torch.zeros(2, 4), torch.zeros(4, 3), torch.eye(4)), lambda: ae.linear_loss(torch.zeros(2, 4), torch.zeros(4, 2), torch.eye(3)),
    lambda: ae.dropped(torch.zeros(2, 3), 1), lambda: ae.dropped(torch.eye(3), 4), lambda: ae.dropped(torch.tensor([[1., 2.], [0., 1.]]), 1), lambda: ae.dropped(torch.full((2, 2), torch.nan), 1),
    lambda: ae.train_linear(torch.eye(3), 0), lambda: ae.train_linear(torch.zeros(2, 3), 1), lambda: ae.train_linear(torch.eye(3), 4),
    lambda: ae.train_ae('teacher', ae.AE['CPU'])])
def test_refuses(call):
    with pytest.raises(ValueError, match='expected|trains|fit|divide|least|hold|invertible|symmetric'): call()

@pytest.mark.parametrize('x', [MAP[0], MAP[:0], torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 6), NAN, torch.full((1, 3, 8, 8), torch.inf)])
def test_autoencoder_refuses_what_is_not_a_picture(x):
    model = ae.Autoencoder(4, 4, 4, 1, 4, 1)
    with pytest.raises(ValueError, match='x has shape|x holds'): model(x)
    with pytest.raises(TypeError, match='floats'): model(MAP.long())
    with pytest.raises(TypeError, match='list'): model.encode([1])
    with pytest.raises(ValueError, match='z has shape'): model.decode(MAP)

@pytest.mark.parametrize('x, z', [(NAN, None), (None, torch.full((1, 4, 2, 2), torch.inf))])
def test_numbers_are_looked_at_unless_in_training(x, z):
    "Data are checked always; what the network itself made is left to `fit`, which says at which step it went wrong."
    model = ae.Autoencoder(4, 4, 4, 1, 4, 1)
    part, bad = (model.encode, x) if z is None else (model.decode, z)
    with pytest.raises(ValueError, match='NaN or infinite'): part(bad)
    assert part(bad.clone().requires_grad_()).isnan().any()
    assert model.to('meta')(torch.empty(1, 3, 8, 8, device='meta')).shape == (1, 3, 8, 8)

def test_a_training_that_goes_wrong_says_where():
    from latentcourse.lib.train import TrainingDiverged
    model = ae.build_ae(TINY)
    nn.init.constant_(model.encoder.stem[1].weight, torch.nan)
    with pytest.raises(TrainingDiverged, match='step 0'): list(ae.learn_ae(model, TINY, progress=False))

def on(device, make, *args):
    with torch.device(device): return make(*args)

@pytest.mark.parametrize('call', [
    lambda x, w: ae.conv2d_unfold(x, w, x.new_zeros(4), 2, 1), lambda x, w: ae.pool2d_unfold(x, 3, 2, 1), lambda x, w: ae.conv_transpose2d_paint(x.new_zeros(2, 4, 4, 4), w, (8, 8), 2, 1),
    lambda x, w: ae.channels_to_space(ae.space_to_channels(x, 2), 2), lambda x, w: ae.linear_loss(x.new_zeros(2, 5), x.new_zeros(5, 2), x.new_zeros(5, 5)), lambda x, w: ae.ae_loss(x, x),
    lambda x, w: on(x.device, ae.Autoencoder, 4, 4, 4, 1, 4, 1)(x.requires_grad_())])
def test_nothing_is_made_on_another_device(call):
    "Tensors without numbers that claim to be on a GPU: an operation that mixes devices fails as it would there."
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(): assert call(torch.zeros(2, 3, 8, 8, device='cuda'), torch.zeros(4, 3, 3, 3, device='cuda')).device.type == 'cuda'

# ---- mutations: a mistake put back in must be noticed --------------------------------------------------------------------------------

def mutant(f, *changes):
    source = inspect.getsource(f)
    for old, new in changes:
        assert old in source, f'{f.__name__} no longer holds {old!r}'
        source = source.replace(old, new)
    space = dict(vars(ae)); exec(source, space)
    return space[f.__name__]

def conv_is_right(f):
    x, w, b = torch.randn(2, 3, 9, 9, dtype=D), torch.randn(4, 3, 3, 3, dtype=D), torch.randn(4, dtype=D)
    return all(torch.allclose(f(x, w, b, *s), F.conv2d(x, w, b, *s)) for s in ((1, 1, 1), (2, 0, 2), (2, 1, 1)))

def paint_is_right(f):
    x, w = torch.randn(2, 3, 9, 9, dtype=D), torch.randn(4, 3, 3, 3, dtype=D)
    Ax = F.conv2d(x, w, stride=2, padding=1); y = torch.randn_like(Ax)
    return abs((Ax * y).sum() - (x * f(y, w, (9, 9), 2, 1)).sum()).item() < 1e-9

def pool_is_right(f):
    x = torch.randn(1, 2, 6, 6, dtype=D) - 5
    return torch.allclose(f(x, 3, 2, 1), F.max_pool2d(x, 3, 2, 1)) and torch.allclose(f(x, 2), F.max_pool2d(x, 2))

def remix_is_right(f):
    model, x = ae.Autoencoder(4, 3, 4, 1, 4, 1).double(), torch.randn(1, 3, 8, 8, dtype=D)
    nn.init.normal_(model.encoder.head[-1].bias)
    return torch.allclose(f(model, torch.randn(3, 3, dtype=D))(x), model(x), atol=1e-7)

def linear_is_right(f):
    A, B, x = torch.randn(2, 5, dtype=D), torch.randn(5, 2, dtype=D), torch.randn(50, 5, dtype=D)
    return torch.allclose(f(A, B, x.T @ x / 50), (x - x @ A.T @ B.T).square().sum(1).mean())

MUTANTS = [('kernel turned round', conv_is_right, ae.conv2d_unfold, ("rearrange(weight, 'o c", "rearrange(weight.flip(2, 3), 'o c")),
           ('kernel transposed', conv_is_right, ae.conv2d_unfold, ("weight, 'o c u v ->", "weight, 'o c v u ->")),
           ('bias forgotten', conv_is_right, ae.conv2d_unfold, ('y if bias is None else y + bias', 'y')),
           ('dilation forgotten', conv_is_right, ae.conv2d_unfold, ('stride, padding, dilation)', 'stride, padding)')),
           ('stride and padding swapped', conv_is_right, ae.conv2d_unfold, ('stride, padding, dilation)', 'padding + 1, stride - 1, dilation)')),
           ('strokes overwrite instead of adding', paint_is_right, ae.conv_transpose2d_paint, ('canvas.index_add_(', 'canvas.index_copy_(')),
           ('padding not cut off again', paint_is_right, ae.conv_transpose2d_paint, ('padding:padding + h, padding:padding + w', ':h, :w')),
           ('kernel turned round on the way back', paint_is_right, ae.conv_transpose2d_paint, ("einsum(y, weight,", "einsum(y, weight.flip(2, 3),")),
           ('maximum padded with zeros', pool_is_right, ae.pool2d_unfold, ("-torch.inf if how == 'max' else 0.", '0.')),
           ('windows always touch', pool_is_right, ae.pool2d_unfold, ('stride or kernel', 'kernel')),
           ('decoder not compensated', remix_is_right, ae.remix, ('torch.linalg.inv(M)', 'M')),
           ('bias of the encoder not mixed', remix_is_right, ae.remix, (', last.bias.copy_(M @ last.bias)', '')),
           ('the error transposed', linear_is_right, ae.linear_loss, ('B @ A', '(B @ A).T'))]

@pytest.mark.parametrize('name, right, f, change', MUTANTS, ids=[m[0] for m in MUTANTS])
def test_mistakes_are_noticed(name, right, f, change):
    torch.manual_seed(0)
    assert right(f), 'the check fails the right function'
    try: fooled = right(mutant(f, change))
    except (RuntimeError, ValueError): fooled = False                      # shapes that do not fit are noticed too
    assert not fooled, f'not noticed: {name}'

def test_blocks_into_channels_in_another_order_is_noticed():
    x = torch.arange(3 * 16.).reshape(1, 3, 4, 4)
    assert not torch.equal(mutant(ae.space_to_channels, ('(c u v)', '(u v c)'))(x, 2), F.pixel_unshuffle(x, 2))

# ---- training and what is shipped -----------------------------------------------------------------------------------------------------

TINY = ae.AeCfg(width=4, depth=1, dec_width=4, dec_depth=1, steps=6, batch=4)

def test_recipe_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    examine = ae.examine_ae
    monkeypatch.setattr(ae, 'examine_ae', lambda model: examine(model, 20))
    whole = list(ae.learn_ae(ae.build_ae(TINY), TINY, progress=False))
    state = dict(out=tmp_path, resume=True, progress=False)
    assert [r.loss for r in ae.learn_ae(ae.build_ae(TINY), TINY, **state)] == [r.loss for r in whole] and whole[0].lr < whole[1].lr
    again = ae.build_ae(replace(TINY, seed=1)); again.load_state_dict(ae.build_ae(TINY).state_dict())
    assert all(r.replayed for r in ae.learn_ae(again, TINY, **state))
    model, facts = ae.train_ae('ae', TINY, progress=False)
    assert len(facts['log']['loss']) == 6 and facts['evaluation'].keys() == {'psnr', 'ssim', 'l1'} and not model.training

def test_shipped_autoencoder_is_what_its_log_says():
    from latentcourse.lib.checkpoint import check_figures, figure
    model, facts = ae.load_ae()
    got = {k: figure(v) for k, v in ae.examine_ae(model, 200).items()}
    assert check_figures('ae', facts['evaluation'], got) < 5
    file = Path(latentcourse.__file__).parent / 'checkpoints' / 'ae.safetensors'
    assert file.stat().st_size < 2.5e6 and json.loads(file.with_suffix('.json').read_text())['config']['f'] == 4
    assert facts['evaluation']['psnr']['mean'] > 24 and facts['log']['loss'][0] > .3
