"Stable Diffusion's autoencoder against diffusers' own: outputs, gradients, names and files; and what is refused."
import itertools, json
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from latentcourse import klf8
from latentcourse.klf8 import KLF8, KLF8_SPELLINGS, LatentNormal, from_diffusers, respell, to_diffusers
from latentcourse.lib.checkpoint import CorruptCheckpoint, MissingCheckpoint, UnreadableCheckpoint, WrongConfig, WrongState

SMALL = (32, 32, 64, 96)

def theirs(model, cls='AutoencoderKL', **more):
    "Diffusers' model with the same sizes and weights."
    diffusers = pytest.importorskip('diffusers')
    sizes = dict(down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4, block_out_channels=model.widths, latent_channels=model.k,
                 layers_per_block=model.depth, use_quant_conv=model.quant, use_post_quant_conv=model.quant)
    p = next(model.parameters())
    with torch.device(p.device): out = getattr(diffusers, cls)(**sizes | more).to(p.dtype)
    if not p.is_meta: assert not [k for k in out.load_state_dict(to_diffusers(model.state_dict()), strict=cls == 'AutoencoderKL').missing_keys if not k.startswith('bn.')]
    return out

def small(seed=0, dtype=torch.float64, **more):
    torch.manual_seed(seed)
    return KLF8(SMALL, **more).to(dtype)

def pictures(*size, seed=1, dtype=torch.float64): return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1

def gap(a, b): return (a - b).abs().max().item()

# ---- the same network as diffusers' ---------------------------------------------------------------------------------------------------

def test_parameters_of_the_published_size():
    with torch.device('meta'): ours = KLF8()
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(ours.encoder) == 34_163_592 and count(ours.decoder) == 49_490_179 and count(ours) == 83_653_863
    ref = theirs(ours)
    assert {k: v.shape for k, v in ref.state_dict().items()} == {k: v.shape for k, v in to_diffusers(ours.state_dict()).items()}

@pytest.mark.parametrize('more', [{}, {'k': 16, 'quant': False}, {'depth': 1}, {'depth': 3, 'k': 3}], ids=str)
def test_outputs_and_gradients_are_those_of_diffusers(more):
    ours = small(**more); ref = theirs(ours)
    x = pictures(2, 3, 16, 24).requires_grad_()
    x_ref, eps = x.detach().clone().requires_grad_(), torch.randn(2, ours.k, 2, 3, dtype=torch.float64)
    x_hat, q = ours(x, eps)
    q_ref = ref.encode(x_ref).latent_dist
    hat_ref = ref.decode(q_ref.mean + q_ref.std * eps).sample
    assert gap(q.mu, q_ref.mean) < 1e-6 and gap(q.logvar, q_ref.logvar) < 1e-6 and gap(x_hat, hat_ref) < 1e-6 and gap(q.kl(), q_ref.kl()) < 1e-6
    for a, b, p in ((x_hat, q.kl(), x), (hat_ref, q_ref.kl(), x_ref)): ((a - p.detach()).square().mean() + 1e-3 * b.mean()).backward()
    assert gap(x.grad, x_ref.grad) < 1e-6
    grads = to_diffusers({k: p.grad for k, p in ours.named_parameters()})
    assert grads.keys() == dict(ref.named_parameters()).keys()
    assert max(gap(grads[k], p.grad) for k, p in ref.named_parameters()) < 1e-6
    assert min(g.abs().max() for k, g in grads.items() if k.endswith('weight')) > 1e-9         # every part takes part

@pytest.fixture(scope='module')
def pair():
    ours = small()
    return ours, theirs(ours)

@settings(max_examples=8, deadline=None)
@given(b=st.integers(1, 3), h=st.integers(1, 4), w=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_sides_that_8_divides(pair, b, h, w, seed):
    (ours, ref), x = pair, pictures(b, 3, 8 * h, 8 * w, seed=seed)
    with torch.no_grad():
        z = ours.encode(x).mode()
        assert z.shape == (b, 4, h, w) and gap(z, ref.encode(x).latent_dist.mode()) < 1e-6 and gap(ours.decode(z), ref.decode(z).sample) < 1e-6

@pytest.mark.slow
def test_the_full_size_is_diffusers_too():
    torch.manual_seed(0)
    ours = KLF8(); ref = theirs(ours)
    ref.load_state_dict(to_diffusers(ours.state_dict()), assign=True)                         # shares the weights' memory
    x = pictures(1, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        q, p = ours.encode(x), ref.encode(x).latent_dist
        assert gap(q.mu, p.mean) < 1e-4 and gap(ours.decode(q.mu), ref.decode(q.mu).sample) < 1e-4

def test_flux2_is_the_same_network_with_more_channels():
    diffusers = pytest.importorskip('diffusers')
    if not hasattr(diffusers, 'AutoencoderKLFlux2'): pytest.skip('this diffusers has no FLUX.2')
    with torch.device('meta'): published = diffusers.AutoencoderKLFlux2()
    assert published.config.latent_channels == 32 and tuple(published.config.patch_size) == (2, 2) and tuple(published.config.block_out_channels) == klf8.WIDTHS
    with torch.device('meta'): assert {k for k in published.state_dict() if not k.startswith('bn.')} == to_diffusers(KLF8(k=32).state_dict()).keys()
    ours = small(k=32); ref, x = theirs(ours, 'AutoencoderKLFlux2'), pictures(1, 3, 32, 32)
    with torch.no_grad(): assert gap(ours.encode(x).mode(), ref.encode(x).latent_dist.mode()) < 1e-6
    with pytest.raises(ValueError, match='FLUX.2'): from_diffusers(ref.state_dict())

def test_posterior_is_diffusers_distribution():
    vae = pytest.importorskip('diffusers.models.autoencoders.vae')
    moments = torch.randn(3, 8, 4, 5, dtype=torch.float64) * 20                               # wide enough for the clipping to matter
    ref = vae.DiagonalGaussianDistribution(moments)
    mu, logvar = moments.chunk(2, 1)
    q = LatentNormal(mu, logvar.clamp(-30, 20))
    eps = torch.randn(mu.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert gap(q.mode(), ref.mode()) == 0 and gap(q.kl() / ref.kl(), torch.ones(3)) < 1e-12
    assert gap(q.sample(eps), ref.sample(torch.Generator().manual_seed(5))) < 1e-6 * ref.std.max()
    torch.manual_seed(0); a = q.sample(); torch.manual_seed(0)
    assert torch.equal(a, q.sample()) and not torch.equal(a, q.sample())

def test_logvar_is_clipped_as_published():
    ours = small()
    with torch.no_grad(): ours.quant_conv.bias[4:6], ours.quant_conv.bias[6:] = 1e3, -1e3
    logvar = ours.encode(pictures(1, 3, 16, 16)).logvar
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()

# ---- its parts ------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_merged_doubling_is_the_published_one(c, d, h, w, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((2, c, h, w), (d, c, 3, 3), (d,)))
    a, b = klf8.up_conv(x, weight, bias), F.conv2d(F.interpolate(x, scale_factor=2., mode='nearest'), weight, bias, padding=1)
    assert gap(a, b) < 1e-10
    up = torch.randn(a.shape, generator=g, dtype=torch.float64)
    for p, q in zip(torch.autograd.grad(a, (x, weight, bias), up), torch.autograd.grad(b, (x, weight, bias), up)): assert gap(p, q) < 1e-9

def test_details_that_raise_no_error_change_the_result():
    "The slips of the chapter, made in our own modules, are caught by the comparison with diffusers."
    ours = small(); ref, x = theirs(ours), pictures(1, 3, 32, 32)
    want = ref.encode(x).latent_dist.mean.detach()
    def wrong(change):
        model = small(); change(model)
        with torch.no_grad(): return gap(model.encode(x).mode(), want)
    def no_attention(m): m.encoder.middle[1] = torch.nn.Identity()
    def other_tiny(m):
        for n in m.modules():
            if isinstance(n, torch.nn.GroupNorm): n.eps = 1e-5
    def other_groups(m):
        for n in m.modules():
            if isinstance(n, torch.nn.GroupNorm): n.num_groups = 16
    def other_side(m):
        for i in range(3): m.encoder.stages[i][-1] = Padded(m.encoder.stages[i][-1].conv)
    class Padded(torch.nn.Module):
        def __init__(self, conv): super().__init__(); self.conv = conv
        def forward(self, x): return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)
    def no_quant(m): m.quant_conv = torch.nn.Identity()
    assert wrong(lambda m: None) < 1e-9
    for slip in (no_attention, other_tiny, other_groups, other_side, no_quant): assert wrong(slip) > 1e-6, slip.__name__

def test_counts_on_paper():
    for design in ((klf8.WIDTHS, 4, 2), (klf8.WIDTHS, 32, 2), (SMALL, 3, 1), ((64, 32, 96, 32), 16, 3)):
        with torch.device('meta'): m = KLF8(*design)
        assert klf8.klf8_parameters(*design) == tuple(sum(p.numel() for p in part.parameters()) for part in (m.encoder, m.decoder))

def test_work_is_what_the_syllabus_says():
    with torch.device('meta'): m = KLF8()
    a, b = (sum(w for _, w in klf8.census(part, torch.empty(1, c, s, s, device='meta')).values()) for part, c, s in ((m.encoder, 3, 256), (m.decoder, 4, 32)))
    assert round(b / a, 2) == 2.28
    for part, c, s in ((m.encoder, 3, 256), (m.decoder, 4, 32)):
        found = klf8.census(part, torch.empty(1, c, s, s, device='meta'))
        assert list(found) == [256, 128, 64, 32] and sum(n for n, _ in found.values()) == sum(p.numel() for p in part.parameters())
    assert not any(mod._forward_hooks for mod in m.modules())                                 # the hooks are gone

# ---- names ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('a, b', itertools.product(KLF8_SPELLINGS, KLF8_SPELLINGS))
def test_spellings_translate_into_each_other(a, b):
    for m in (small(), small(depth=1, quant=False), small(depth=3)):
        state = respell(m.state_dict(), a)
        there = respell(state, b)
        back = respell(there, a)
        assert klf8.spelling_of(there) == b and len(there) == len(state) and back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())

def test_ldm_names_are_those_diffusers_converts():
    utils = pytest.importorskip('diffusers.loaders.single_file_utils')
    m = small()
    ldm = {f'first_stage_model.{k}': v for k, v in respell(m.state_dict(), 'ldm').items()}
    got = utils.convert_ldm_vae_checkpoint(ldm, {'down_block_types': [''] * 4, 'up_block_types': [''] * 4})
    want = to_diffusers(m.state_dict())
    assert got.keys() == want.keys() and all(torch.equal(got[k], v) for k, v in want.items())

def test_names_refuse():
    m = small()
    with pytest.raises(ValueError, match='spelling'): respell(m.state_dict(), 'compvis')
    with pytest.raises(ValueError, match='not the state'): from_diffusers({})
    with pytest.raises(ValueError, match='not the state'): from_diffusers({'a.weight': torch.zeros(1)})
    with pytest.raises(ValueError, match='at once'): from_diffusers(m.state_dict() | to_diffusers(m.state_dict()))
    for bad in (None, [1], {'a': 1}, {1: torch.zeros(1)}):
        with pytest.raises(TypeError, match='dict of name'): from_diffusers(bad)
    for extra in ('loss.logvar', 'encoder.down_blocks.0.resnets.0.conv9.weight', 'encoder.conv_in.running_mean', 'encoder.down_blocks.3.resnets.2.conv1.weight'):
        with pytest.raises(ValueError, match='no such part'): from_diffusers(to_diffusers(m.state_dict()) | {extra: torch.zeros(1)})

# ---- files ----------------------------------------------------------------------------------------------------------------------------

def test_diffusers_reads_our_folder_and_we_read_theirs(tmp_path):
    diffusers = pytest.importorskip('diffusers')
    x = pictures(1, 3, 32, 32, dtype=torch.float32)
    for i, more in enumerate(({}, {'k': 16, 'quant': False, 'depth': 1})):
        ours = small(dtype=torch.float32, **more); ours.scale, ours.shift = .13, .05 * i
        ref = diffusers.AutoencoderKL.from_pretrained(ours.save_pretrained(tmp_path / f'ours{i}'))
        assert ref.config.scaling_factor == .13 and (ref.config.shift_factor or 0) == .05 * i
        ref.save_pretrained(tmp_path / f'theirs{i}')
        back = KLF8.from_pretrained(tmp_path / f'theirs{i}')
        assert (back.widths, back.k, back.depth, back.quant, back.scale, back.shift, back.training) == (ours.widths, ours.k, ours.depth, ours.quant, .13, .05 * i, False)
        with torch.no_grad():
            z = back.encode(x).mode()
            assert gap(z, ref.encode(x).latent_dist.mode()) < 1e-5 and gap(back.decode(z), ref.decode(z).sample) < 1e-5
        assert all(torch.equal(v, ours.state_dict()[k]) for k, v in back.state_dict().items())

@pytest.mark.parametrize('spelling', KLF8_SPELLINGS)
def test_single_files_in_every_spelling(spelling, tmp_path):
    m = small(dtype=torch.float32)
    state = {k: v.half().contiguous() for k, v in respell(m.state_dict(), spelling).items()}
    if spelling == 'ldm': state = {f'first_stage_model.{k}': v for k, v in state.items()} | {'model.diffusion_model.out.2.bias': torch.zeros(4)}
    save_file(state, tmp_path / 'vae.safetensors')
    back = KLF8.from_pretrained(tmp_path / 'vae.safetensors')
    assert back.widths == SMALL and all(v.dtype == torch.float32 and torch.equal(v, m.state_dict()[k].half().float()) for k, v in back.state_dict().items())

def test_a_pipeline_folder_and_another_variant(tmp_path):
    m = small(dtype=torch.float32)
    m.save_pretrained(tmp_path / 'vae')
    (tmp_path / 'vae' / 'diffusion_pytorch_model.safetensors').rename(tmp_path / 'vae' / 'diffusion_pytorch_model.fp16.safetensors')
    assert KLF8.from_pretrained(tmp_path).widths == SMALL

def test_the_scale_comes_from_the_configuration_or_from_nobody(tmp_path):
    "A wrong scale raises no error later, so none is guessed."
    m = small(dtype=torch.float32); m.scale, m.shift = .3611, .1159
    folder = m.save_pretrained(tmp_path / 'm'); file = folder / 'diffusion_pytorch_model.safetensors'
    for path in (folder, file): assert ((back := KLF8.from_pretrained(path)).scale, back.shift) == (.3611, .1159)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'act_fn': 'gelu'}))
    with pytest.raises(WrongConfig, match='act_fn'): KLF8.from_pretrained(file)
    (folder / 'config.json').write_text(json.dumps({k: v for k, v in config.items() if not k.endswith('_factor')}))
    assert ((back := KLF8.from_pretrained(file)).scale, back.shift) == (.18215, 0.)                     # what diffusers takes where a configuration is silent
    (folder / 'config.json').write_text(json.dumps(config | {'scaling_factor': 1., 'shift_factor': 0.}))
    assert ((back := KLF8.from_pretrained(folder)).scale, back.shift) == (1., 0.)
    file.rename(folder / 'ae.safetensors')                                                             # a name that any file may have: the configuration beside it may be another's
    back = KLF8.from_pretrained(folder / 'ae.safetensors')
    assert back.scale is None and back.shift is None
    with pytest.raises(ValueError, match='set them first'): back.save_pretrained(tmp_path / 'again')

def test_up_kernel_keeps_device_and_precision():
    w = torch.zeros(4, 2, 3, 3)
    assert klf8.up_kernel(w.to('meta')).is_meta
    assert klf8.up_kernel(w.double()).dtype == torch.float64
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(): assert klf8.up_conv(torch.zeros(1, 2, 4, 4, device='cuda'), torch.zeros(4, 2, 3, 3, device='cuda'), torch.zeros(4, device='cuda')).device.type == 'cuda'

def test_files_refuse(tmp_path):
    m = small(dtype=torch.float32)
    with pytest.raises(MissingCheckpoint, match='hf download stabilityai/sd-vae-ft-mse'): KLF8.from_pretrained('stabilityai/sd-vae-ft-mse')
    with pytest.raises(MissingCheckpoint, match='no such file') as e: KLF8.from_pretrained(tmp_path / 'nothing')
    assert 'hf download' not in str(e.value)
    with pytest.raises(MissingCheckpoint, match='holds no'): KLF8.from_pretrained(tmp_path)
    (tmp_path / 'model.ckpt').write_bytes(b'PK')
    with pytest.raises(UnreadableCheckpoint, match='pickle'): KLF8.from_pretrained(tmp_path / 'model.ckpt')
    folder = m.save_pretrained(tmp_path / 'm')
    file, good = folder / 'diffusion_pytorch_model.safetensors', (folder / 'config.json').read_text()
    config = json.loads(good)
    for key, value in (('act_fn', 'gelu'), ('mid_block_add_attention', False), ('norm_num_groups', 16), ('in_channels', 1), ('latents_mean', [0., 1.])):
        (folder / 'config.json').write_text(json.dumps(config | {key: value}))
        with pytest.raises(WrongConfig, match=key): KLF8.from_pretrained(folder)
    (folder / 'config.json').write_text('{')
    with pytest.raises(UnreadableCheckpoint, match='configuration'): KLF8.from_pretrained(folder)
    (folder / 'config.json').write_text(good)
    state = load_file(file)
    for change, word in ((lambda s: s.pop('decoder.conv_in.weight'), 'decoder.stem'), (lambda s: s.update({'encoder.conv_out.weight': torch.zeros(8, 3, 3, 3)}), 'encoder.head'),
                         (lambda s: s.update(other=torch.zeros(1)), 'other'), (lambda s: s.pop('encoder.conv_out.bias'), 'encoder.head'), (lambda s: s.clear() or s.update(a=torch.zeros(1)), 'not the state')):
        bad = dict(state); change(bad); save_file(bad, file)
        with pytest.raises(WrongState, match=word): KLF8.from_pretrained(folder)
    save_file(state, file)
    data = file.read_bytes()
    for cut in (0, 5, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises((CorruptCheckpoint, WrongState)): KLF8.from_pretrained(folder)
    file.write_bytes(data); KLF8.from_pretrained(folder)
    with pytest.raises(TypeError, match='KLF8'): klf8.save_klf8(torch.nn.Linear(1, 1), tmp_path)

# ---- bad input ------------------------------------------------------------------------------------------------------------------------

def test_pictures_and_latents_are_checked():
    m = small(dtype=torch.float32)
    for bad in (torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 30, 32), torch.zeros(1, 3, 32, 4), torch.zeros(0, 3, 32, 32)):
        with pytest.raises(ValueError, match='pictures'): m.encode(bad)
    for bad in (torch.zeros(4, 2, 2), torch.zeros(1, 3, 2, 2), torch.zeros(0, 4, 2, 2), torch.full((1, 4, 2, 2), torch.inf)):
        with pytest.raises(ValueError, match='latents'): m.decode(bad)
    with pytest.raises(ValueError, match='NaN'): m.encode(torch.full((1, 3, 16, 16), torch.nan))
    for bad in (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), [[1.]], None):
        with pytest.raises(TypeError, match='floats'): m.encode(bad)

def test_designs_are_checked():
    for widths in ((32, 32, 32), (32,) * 5, (32, 32, 32, 40), (16, 32, 32, 32), (0, 32, 32, 32)):
        with pytest.raises(ValueError, match='expected'): KLF8(widths)
        with pytest.raises(ValueError, match='expected'): klf8.klf8_parameters(widths)
    for more in ({'k': 0}, {'depth': 0}, {'k': -1}):
        with pytest.raises(ValueError, match='at least 1'): KLF8(SMALL, **more)

def test_parts_refuse():
    with pytest.raises(ValueError, match='even'): klf8.down_conv(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 3), torch.zeros(1))
    with pytest.raises(ValueError, match='one shape'): klf8.attend_places(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))
    for bad in (torch.zeros(1, 4, 3, 2), torch.zeros(4, 2, 2)):
        with pytest.raises(ValueError, match='even'): klf8.pack_latent(bad)
    with pytest.raises(ValueError, match='packed'): klf8.unpack_latent(torch.zeros(1, 6, 2, 2))
    for bad in (torch.zeros(2, 2), torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 5, 5)):
        with pytest.raises(ValueError, match='3, 3'): klf8.up_kernel(bad)

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_packing_is_a_bijection(b, k, h, w):
    z = torch.arange(b * k * 4 * h * w).reshape(b, k, 2 * h, 2 * w).float()
    packed = klf8.pack_latent(z)
    assert packed.shape == (b, 4 * k, h, w) and torch.equal(klf8.unpack_latent(packed), z)
