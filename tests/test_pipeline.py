"From a sentence to a picture: the promise that nothing else decides it, the tricks against exact worlds, and clear refusals."
import json, math, subprocess, sys
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from latentcourse import pipeline as p
from latentcourse.classifier_free_guidance import guide, latent_noise
from latentcourse.codec import load_codec
from latentcourse.dit import DitCfg, build_dit, dit_probe, the_text
from latentcourse.lib.check import agree
from latentcourse.lib.checkpoint import save_model
from latentcourse.lib.files import DataError, to_pixels
from latentcourse.lib.sealed import CheckpointError
from latentcourse.mixture import TOWNS, exact_velocity, log_density
from latentcourse.diffusion import LINEAR
from latentcourse.samplers import euler, last, times
from latentcourse.text import encode, lessons
from latentcourse.text_to_image import T2iCfg, build_text_to_image

double = torch.float64
DUCK, BALL = 'a yellow duck on grass', 'a red ball'

def stirred(model, seed=0):
    "An untrained network that says something."
    torch.manual_seed(seed)
    for q in model.parameters(): nn.init.normal_(q, std=.08)
    return model.eval().requires_grad_(False)

@pytest.fixture(scope='module')
def pipe():
    "A pipeline of the usual parts around a small, untrained network."
    return p.TextToImage(stirred(build_text_to_image(T2iCfg(d=32, depth=1, heads=2))), load_codec()[0], the_text(), device='cpu')

def quick(pipe, *args, **how): return pipe(*args, **{'steps': 2, 'progress': False, **how})
def levels(a, b): return (to_pixels(a) - to_pixels(b)).abs().max().item() * 127.5

# ---- the promise ------------------------------------------------------------------------------------------------------------------

def company_matters(pipe):
    alone = quick(pipe, DUCK, seed=4)
    others = [quick(pipe, [BALL, DUCK], seed=4)[1], quick(pipe, DUCK, seed=3, n=2)[1], quick(pipe, [DUCK], seed=4, n=3)[0], quick(pipe, DUCK, seed=4, callback=lambda i, t, preview: preview())]
    return any(o.tobytes() != alone.tobytes() for o in others)

def test_a_picture_is_the_same_in_any_company(pipe): assert not company_matters(pipe)

def test_one_noise_for_a_batch_is_noticed(pipe, monkeypatch):
    def dice(self, seeds):
        g = torch.Generator().manual_seed(seeds[0])
        return lambda: torch.randn(len(seeds), 4, 16, 16, generator=g)
    monkeypatch.setattr(p.TextToImage, 'dice', dice)
    together, alone = quick(pipe, [BALL, DUCK], seed=4, batch=2)[1], quick(pipe, DUCK, seed=4)
    assert levels(together, alone) > 20

def test_a_batch_moves_the_last_digits_alone(pipe):
    alone = quick(pipe, [DUCK, BALL, 'a big blue star to the left of a small dotted mug'], n=2, seed=1)
    together = quick(pipe, [DUCK, BALL, 'a big blue star to the left of a small dotted mug'], n=2, seed=1, batch=6)
    assert max(levels(a, b) for a, b in zip(alone, together)) < 1.5
    assert torch.cat([(to_pixels(a) != to_pixels(b)).float().flatten() for a, b in zip(alone, together)]).mean() < .01

def test_seeds_and_prompts_change_the_picture(pipe):
    first = quick(pipe, DUCK, seed=4)
    for other in (quick(pipe, DUCK, seed=5), quick(pipe, BALL, seed=4), quick(pipe, DUCK, seed=4, w=5), quick(pipe, DUCK, seed=4, negative='a small duck')): assert levels(first, other) > 1
    assert torch.equal(pipe.dice([4])(), latent_noise(1, 4)) and torch.equal(pipe.dice([7, 4])()[1:], latent_noise(1, 4))

def test_w_0_does_not_listen(pipe):
    assert quick(pipe, DUCK, w=0).tobytes() == quick(pipe, BALL, w=0).tobytes() == quick(pipe, '', w=0).tobytes()

@pytest.mark.parametrize('sampler', p.SAMPLERS)
def test_the_call_is_its_parts(pipe, sampler):
    said = encode(pipe.text, ['', DUCK])
    field = lambda xt, t: guide(*pipe.model(torch.cat([xt, xt]), torch.cat([t, t]), *said).chunk(2), 3.)
    with torch.no_grad(): x = pipe.codec.decode(last(p.SAMPLERS[sampler](field, latent_noise(1, 9), times(3))) * pipe.model.std[:, None, None] + pipe.model.mean[:, None, None]).clamp(-1, 1)
    agree(to_pixels(quick(pipe, DUCK, seed=9, steps=3, sampler=sampler)), x[0], atol=1 / 255 + 1e-3)

def test_one_or_a_list(pipe):
    assert isinstance(quick(pipe, DUCK), Image.Image) and quick(pipe, DUCK).size == (64, 64)
    for asked, n in ((dict(prompt=[DUCK]), 1), (dict(prompt=DUCK, n=2), 2), (dict(prompt=[DUCK, BALL], n=2, negative=['a mug', '']), 4)):
        got = quick(pipe, **asked)
        assert isinstance(got, list) and len(got) == n
    assert [p.settings_of(i)['seed'] for i in got] == [0, 1, 0, 1] and [p.settings_of(i)['negative'] for i in got] == ['a mug', 'a mug', '', '']

def test_callback_sees_every_step(pipe):
    seen = []
    final = quick(pipe, DUCK, steps=4, callback=lambda i, t, preview: seen.append((i, t, preview()[0])))
    assert [(i, t) for i, t, _ in seen] == [(1, .25), (2, .5), (3, .75), (4, 1.)] and seen[-1][2].tobytes() == final.tobytes()

def test_guess_is_the_end_of_a_straight_field():
    x, eps = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    field = p.watched(lambda xt, t: x - eps)
    for t in (0., .3, .9):
        field(t * x + (1 - t) * eps, torch.full((2,), t))
        agree(field.guess(), x, atol=1e-5)

# ---- labels -----------------------------------------------------------------------------------------------------------------------

def test_a_png_makes_its_picture_again(pipe, tmp_path):
    image = quick(pipe, 'a “big” réd ball', seed=11, w=2.5, sampler='dpm', negative='a mug', unknown='go on')
    path = p.save_png(image, tmp_path / 'new' / 'ball.png')
    again = pipe(**p.settings_of(path), progress=False)
    assert again.tobytes() == image.tobytes() == Image.open(path).tobytes()
    assert p.settings_of(path) == {'prompt': 'a “big” réd ball', 'negative': 'a mug', 'w': 2.5, 'steps': 2, 'seed': 11, 'sampler': 'dpm', 'unknown': 'go on'}
    assert p.settings_of(path, 'made') == {**pipe.made} and Image.open(path).info['Description'] == 'a “big” réd ball'
    with pytest.raises(ValueError, match='settings, made'): p.settings_of(path, 'all')

def test_a_picture_that_was_begun_names_what_it_began_with(pipe, tmp_path):
    init = Image.new('RGB', (80, 64), 'green')
    image = quick(pipe, DUCK, init=init, strength=.4)
    told, made = p.settings_of(image), p.settings_of(image, 'made')
    assert told['strength'] == .4 and len(made['init']) == 12 and 'mask' not in made
    assert pipe(**told, init=init, progress=False).tobytes() == image.tobytes()
    assert p.settings_of(quick(pipe, DUCK, init=Image.new('RGB', (64, 64), 'red')), 'made')['init'] != made['init']

def test_a_label_tells_every_network(pipe):
    from copy import deepcopy
    made, parts = p.settings_of(quick(pipe, DUCK), 'made'), {'generator': 'model', 'codec': 'codec', 'text': 'text'}
    for k, part in parts.items():
        changed = deepcopy(getattr(pipe, part))
        with torch.no_grad(): next(changed.parameters()).add_(1)
        other = p.TextToImage(*(changed if part == name else getattr(pipe, name) for name in ('model', 'codec', 'text')), device='cpu').made
        assert made[k] == p.state_mark(getattr(pipe, part)) and [name for name in made if made[name] != other[name]] == [k]

def test_nothing_is_overwritten(pipe, tmp_path):
    image = quick(pipe, DUCK)
    path = p.save_png(image, tmp_path / p.file_name(p.Settings(DUCK)))
    assert path.name == 'a-yellow-duck-on-grass-0.png'
    with pytest.raises(FileExistsError): p.save_png(image, path)
    second = p.free_path(path); p.save_png(image, second)
    assert second.name == 'a-yellow-duck-on-grass-0-2.png' and p.free_path(path).name == 'a-yellow-duck-on-grass-0-3.png'
    p.save_png(quick(pipe, BALL), path, overwrite=True)
    assert p.settings_of(path)['prompt'] == BALL
    with pytest.raises(p.WrongRequest, match='.png'): p.save_png(image, tmp_path / 'duck.jpg')

@given(st.text(max_size=90), st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_file_names_are_harmless(text, seed):
    name = p.file_name(p.Settings(text, w=0, seed=seed))
    assert name.endswith(f'-{seed}.png') and all(c.isascii() and (c.isalnum() or c in '-.') for c in name) and name[0] not in '.-' and len(name) < 90

def test_pictures_without_a_label(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path / 'plain.png'); (tmp_path / 'text.png').write_text('no picture')
    with pytest.raises(DataError, match='does not say'): p.settings_of(tmp_path / 'plain.png')
    with pytest.raises(DataError, match='not an image'): p.settings_of(tmp_path / 'text.png')
    with pytest.raises(FileNotFoundError): p.settings_of(tmp_path / 'none.png')

@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_levels_are_the_nearest(h, w, seed):
    x = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    back = torch.stack([to_pixels(i) for i in p.to_images(x)])
    assert (back - x).abs().max() <= 1 / 255 + 1e-6 and [i.tobytes() for i in p.to_images(back)] == [i.tobytes() for i in p.to_images(x)]

def test_pixels_outside_are_refused():
    for bad in (torch.full((1, 3, 2, 2), math.nan), torch.full((1, 3, 2, 2), 1.5), torch.zeros(1, 1, 2, 2)):
        with pytest.raises(ValueError): p.to_images(bad)

# ---- words ------------------------------------------------------------------------------------------------------------------------

def test_every_caption_of_the_toybox_is_known():
    for omit, heard in ((0., False), (.5, False), (.3, True)): p.check_words(lessons(300, 'heldout', 0, omit, heard)[0], p.known_words())

def test_unknown_words_are_named_with_their_neighbours(pipe):
    with pytest.raises(p.UnknownWords) as e: quick(pipe, [DUCK, 'a purpel Zebra, a zebra on the lawn'])
    text = str(e.value)
    assert e.value.words == ('purpel', 'zebra') and "near 'purpel': purple" in text and "near 'zebra'" not in text and 'yellow' in text and 'underneath' in text
    with pytest.raises(p.UnknownWords, match='unicorn'): quick(pipe, DUCK, negative='a unicorn')
    with pytest.raises(p.UnknownWords, match='unicorn'): pipe.between(DUCK, 'a unicorn', 2, steps=1, progress=False)
    assert quick(pipe, 'a zebra', unknown='go on').size == (64, 64)
    with pytest.raises(p.WrongRequest, match='refuse'): quick(pipe, DUCK, unknown='ask')

def test_a_model_of_other_words(pipe):
    other = p.TextToImage(pipe.model, pipe.codec, pipe.text, {'words': ['zebra', 'a']}, device='cpu')
    quick(other, 'A zebra')
    with pytest.raises(p.UnknownWords, match='It knows: a, zebra'): quick(other, 'a duck')

# ---- refusals ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('asked, error, says', [
    (dict(prompt=''), p.WrongRequest, 'w=0'), (dict(prompt=' ,. '), p.WrongRequest, 'no words'), (dict(prompt='a duck ' * 40), p.WrongRequest, 'at most 64'),
    (dict(prompt=7), TypeError, 'a text'), (dict(prompt=None), TypeError, 'a text'), (dict(prompt=[]), TypeError, 'a list'), (dict(prompt=[DUCK, 7]), TypeError, 'prompt is a int'), (dict(prompt=b'duck'), TypeError, 'a text'),
    (dict(w=math.nan), p.WrongRequest, 'finite'), (dict(w=math.inf), p.WrongRequest, 'finite'), (dict(w='3'), TypeError, 'a number'), (dict(w=True), TypeError, 'a number'), (dict(w=None), TypeError, 'a number'), (dict(w=1j), TypeError, 'a number'),
    (dict(steps=0), p.WrongRequest, 'at least 1'), (dict(steps=-3), p.WrongRequest, 'at least 1'), (dict(steps=2.5), TypeError, 'whole'), (dict(steps='2'), TypeError, 'whole'), (dict(steps=True), TypeError, 'whole'),
    (dict(seed=-1), p.WrongRequest, 'at least 0'), (dict(seed=1.5), TypeError, 'whole'), (dict(seed='x'), TypeError, 'whole'), (dict(seed=None), TypeError, 'whole'), (dict(seed=2**63), p.WrongRequest, 'less than'), (dict(seed=2**63 - 1, n=2), p.WrongRequest, 'less than'),
    (dict(n=0), p.WrongRequest, 'at least 1'), (dict(n=1.), TypeError, 'whole'), (dict(batch=-1), p.WrongRequest, 'at least 1'), (dict(repeats=0), p.WrongRequest, 'at least 1'),
    (dict(sampler='magic'), p.WrongRequest, 'heun, euler, ddim, dpm'), (dict(negative=3), p.WrongRequest, 'walk away'), (dict(negative=['a mug', 'a car']), p.WrongRequest, 'as many'), (dict(negative=[3]), TypeError, 'negative is a int'),
    (dict(negative='a mug', w=1), p.WrongRequest, 'above 1'), (dict(strength=.5), p.WrongRequest, 'init'), (dict(mask='m.png'), p.WrongRequest, 'init'),
    (dict(repeats=2), p.WrongRequest, 'expected mask'), (dict(repeats=2, init=torch.zeros(3, 64, 64)), p.WrongRequest, 'expected mask'), (dict(repeats=1.5), TypeError, 'whole'), (dict(repeats=0, init=torch.zeros(3, 64, 64)), p.WrongRequest, 'at least 1'),
    (dict(init='no/such.png'), DataError, 'no such file'), (dict(init=3), TypeError, 'init'), (dict(init=torch.zeros(4, 4)), ValueError, 'init'), (dict(init=torch.full((3, 64, 64), 9.)), ValueError, 'init'),
    (dict(init=torch.zeros(3, 64, 64), strength=0), p.WrongRequest, 'more than 0'), (dict(init=torch.zeros(3, 64, 64), strength=1.1), p.WrongRequest, 'at most 1'),
    (dict(init=torch.zeros(3, 64, 64), mask=torch.zeros(64, 64, dtype=torch.bool)), p.WrongRequest, 'black'), (dict(init=torch.zeros(3, 64, 64), mask=torch.ones(32, 64, dtype=torch.bool)), p.WrongRequest, 'same')])
def test_what_cannot_be_painted_is_refused(pipe, asked, error, says):
    with pytest.raises(error, match=says): quick(pipe, **{'prompt': DUCK, **asked})

def test_refusals_come_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(p, 'paint_prompts', lambda *a: 1 / 0)
    for asked in (dict(prompt='a zebra'), dict(prompt=DUCK, w=math.nan), dict(prompt=[DUCK, ''])):
        with pytest.raises(ValueError): quick(pipe, **asked)

def test_numbers_of_other_libraries_will_do(pipe, tmp_path):
    import numpy as np
    image = quick(pipe, DUCK, w=np.float32(2), seed=np.int64(3), steps=np.int32(2))
    assert p.settings_of(p.save_png(image, tmp_path / 'a.png')) == {'prompt': DUCK, 'negative': '', 'w': 2., 'steps': 2, 'seed': 3, 'sampler': 'heun'}

# ---- answers that add up ----------------------------------------------------------------------------------------------------------

def asked(xt, t, y): return exact_velocity(TOWNS, LINEAR, xt, t, y)

def tilted(xt, t, weights):
    x = xt.clone().requires_grad_()
    return torch.autograd.grad(sum(w * log_density(TOWNS, LINEAR, x, t, torch.full((len(x),), c)) for c, w in enumerate(weights)).sum(), x)[0]

@given(st.floats(-4, 4), st.floats(-4, 4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_mixed_answers_are_the_score_of_a_product(a, b, seed):
    g = torch.Generator().manual_seed(seed)
    xt, t, weights = 2 * torch.randn(9, 2, dtype=double, generator=g), torch.rand(9, dtype=double, generator=g) * .8 + .1, (a, b, 1 - a - b)
    v = p.mixed_field(asked, (torch.arange(3).repeat_interleave(9),), weights)(xt, t)
    want = tilted(xt, t, weights)
    agree((t[:, None] * v - xt) / (1 - t)[:, None], want, atol=1e-8 * (1 + want.abs().max().item()))

@pytest.mark.parametrize('mistake', ['weights turned', 'conditions interleaved', 'one per cent'])
def test_mistakes_in_mixing_are_noticed(mistake):
    torch.manual_seed(0)
    xt, t, weights, y = torch.randn(9, 2, dtype=double), torch.full((9,), .5, dtype=double), (-2., 3., 0.), torch.arange(3).repeat_interleave(9)
    if mistake == 'conditions interleaved': y = torch.arange(3).repeat(9)
    v = p.mixed_field(asked, (y,), weights[::-1] if mistake == 'weights turned' else weights)(xt, t)
    if mistake == 'one per cent': v = 1.01 * v
    with pytest.raises(AssertionError): agree((t[:, None] * v - xt) / (1 - t)[:, None], tilted(xt, t, weights), atol=1e-6)

def test_conditions_without_weight_cost_nothing(pipe):
    rows, hook = [], pipe.model.register_forward_hook(lambda m, given, out: rows.append(len(out)))
    for how, want in ((dict(w=0., prompt=''), 1), (dict(w=1.), 1), (dict(w=3.), 2), (dict(w=3., negative='a mug'), 2)):
        rows.clear(); quick(pipe, **{'prompt': DUCK, 'steps': 3, 'sampler': 'euler', **how})
        assert rows == [want] * 3 and sum(rows) == p.rows_asked(p.Settings(**{'prompt': DUCK, 'steps': 3, 'sampler': 'euler', **how}))
    x = torch.zeros(3, 64, 64)
    for how, want in ((dict(strength=.5, init=x), 2 * 2), (dict(repeats=3, init=x, mask=x[0] == 0), 4 * 3 * 2), (dict(repeats=3, strength=.5, sampler='heun', init=x, mask=x[0] == 0), 2 * 3 * 2 * 2)):
        rows.clear(); quick(pipe, **{'prompt': DUCK, 'steps': 4, 'sampler': 'euler', **how})
        assert sum(rows) == want == p.rows_asked(p.Settings(**{'prompt': DUCK, 'steps': 4, 'sampler': 'euler', **{k: v for k, v in how.items() if k not in ('init', 'mask')}}))
    hook.remove()
    with pytest.raises(ValueError, match="add up"): p.mixed([torch.ones(1), torch.ones(1)], (1., .5))

# ---- over and into a picture ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('s, strength', [(.5, .3), (1., .5), (2., .8)])
def test_what_survives_of_a_picture(s, strength):
    g = torch.Generator().manual_seed(1)
    z, eps, t0 = s * torch.randn(50_000, dtype=double, generator=g), torch.randn(50_000, dtype=double, generator=g), 1 - strength
    end = s * (t0 * z + strength * eps) / math.hypot(t0 * s, strength)                  # the exact flow between two normal laws
    got = torch.corrcoef(torch.stack([z, end]))[0, 1].item()
    assert abs(got - p.survives(strength, s)) < .02 and abs(1.05 * got - p.survives(strength, s)) > .02
    assert p.survives(1.) == 0 and p.survives(1e-9) == pytest.approx(1)

def test_strength_shortens_the_way(pipe):
    begun, ticks = torch.rand(3, 64, 64) * 2 - 1, []
    quick(pipe, DUCK, init=begun, strength=.5, steps=10, callback=lambda i, t, preview: ticks.append(t))
    assert len(ticks) == 5 and ticks[0] == pytest.approx(.6) and ticks[-1] == 1
    slight, strong = quick(pipe, DUCK, init=begun, strength=.05, steps=20), quick(pipe, DUCK, init=begun, strength=1., steps=20)
    z = lambda x: pipe.encode(x[None]).flatten()
    corr = lambda a, b: torch.corrcoef(torch.stack([a, b]))[0, 1]
    assert corr(z(begun), z(to_pixels(slight))) > corr(z(begun), z(to_pixels(strong))) + .2
    assert strong.tobytes() == quick(pipe, DUCK, steps=20).tobytes()                    # at full strength the beginning is forgotten

@pytest.mark.parametrize('kind', ['path', 'picture', 'tensor'])
def test_beginnings_of_every_kind(pipe, kind, tmp_path):
    x = torch.rand(3, 64, 64) * 2 - 1
    image = p.to_images(x[None])[0]; image.save(tmp_path / 'x.png')
    given = {'path': tmp_path / 'x.png', 'picture': image, 'tensor': x}[kind]
    assert quick(pipe, DUCK, init=given).tobytes() == quick(pipe, DUCK, init=str(tmp_path / 'x.png')).tobytes()

@pytest.mark.parametrize('repeats', [1, 3])
@pytest.mark.parametrize('sampler', p.SAMPLERS)
def test_what_is_kept_comes_home(pipe, sampler, repeats):
    x, mask = torch.rand(3, 64, 64) * 2 - 1, torch.zeros(64, 64, dtype=torch.bool)
    mask[10:30, 21:50] = True
    image = quick(pipe, DUCK, init=x, mask=mask, sampler=sampler, repeats=repeats, steps=3)
    a, b = to_pixels(image), to_pixels(p.to_images(x[None])[0])
    assert torch.equal(a[:, ~mask], b[:, ~mask]) and (a[:, mask] - b[:, mask]).abs().max() > .1
    z, free = pipe.encode(b[None]), p.free_cells(mask, 4)
    latents = p.walk(pipe.field([([''], -2.), ([DUCK], 3.)]), p.Settings(DUCK, steps=3, sampler=sampler, repeats=repeats), pipe.dice([0]), z, free)
    agree(latents[..., ~free], z[..., ~free], atol=1e-4)

def pair_field(rho):
    S = torch.tensor([[1., rho], [rho, 1.]], dtype=double)
    return lambda xt, t: xt @ torch.linalg.solve(t[0]**2 * S + (1 - t[0])**2 * torch.eye(2), t[0] * S - (1 - t[0]) * torch.eye(2))

def painted_slope(repeats, rho=.9, n=8_000, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n, 2, dtype=double, generator=g)
    z, eps = draw()[:, :1].expand(n, 2), draw()
    x = last(p.painted_in(pair_field(rho), eps, times(20), euler, z, eps, torch.tensor([False, True]), repeats, draw))
    agree(x[:, 0], z[:, 0], atol=1e-9)
    return (x[:, 1] * z[:, 0]).mean().item() / z[:, 0].square().mean().item()

def test_taking_steps_again_makes_the_free_ones_listen():
    once, often = painted_slope(1), painted_slope(16)
    assert once < .55 and abs(often - .9) < .07

def test_ddim_takes_the_steps_of_euler():
    eps, field, both = torch.randn(6, 2, dtype=double), pair_field(.7), [p.SAMPLERS[name] for name in ('ddim', 'euler')]
    agree(*(torch.stack(list(run(field, eps, times(9)))) for run in both), atol=1e-10)
    assert (last(p.SAMPLERS['dpm'](field, eps, times(9))) - last(both[1](field, eps, times(9)))).abs().max() > 1e-3

def test_kept_field_is_replacement():
    torch.manual_seed(0)
    z, eps, free, field = torch.randn(5, 2, dtype=double), torch.randn(5, 2, dtype=double), torch.tensor([False, True]), pair_field(.7)
    x = eps
    for begin, end in zip(times(12)[:-1], times(12)[1:]):
        x = torch.where(free, x, begin * z + (1 - begin) * eps)
        x = x + (end - begin) * field(x, begin.expand(5))
    agree(last(euler(p.kept_field(field, z, eps, free), eps, times(12))), torch.where(free, x, z), atol=1e-10)

@given(st.floats(.05, .95), st.floats(.05, .95), st.floats(.05, .95))
@settings(max_examples=50, deadline=None)
def test_steps_back_compose(a, b, c):
    then, mid, now = (torch.tensor(v, dtype=double) for v in sorted((a, b, c)))
    e = torch.eye(4, dtype=double)
    state = now * e[0] + (1 - now) * e[1]
    for got in (p.noised_back(state, now, then, e[2]), p.noised_back(p.noised_back(state, now, mid, e[2]), mid, then, e[3])):
        agree([got[0].item(), got[1:].norm().item()], [then.item(), 1 - then.item()], atol=1e-7)

@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_cells_are_free_where_a_pixel_is(h, w, f, seed):
    mask = torch.rand(h * f, w * f, generator=torch.Generator().manual_seed(seed)) < .1
    want = [[bool(mask[f * i:f * (i + 1), f * j:f * (j + 1)].any()) for j in range(w)] for i in range(h)]
    assert p.free_cells(mask, f).tolist() == want

def test_masks_of_a_wrong_shape():
    for bad in (torch.ones(1, 8, 8, dtype=torch.bool), torch.ones(9, 8, dtype=torch.bool)):
        with pytest.raises(ValueError, match='multiples of 4'): p.free_cells(bad, 4)

# ---- between ----------------------------------------------------------------------------------------------------------------------

@given(st.integers(0, 99), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_circle_keeps_lengths_and_can_be_walked_back(seed, u):
    g = torch.Generator().manual_seed(seed)
    a, b = (nn.functional.normalize(torch.randn(3, 8, dtype=double, generator=g)) for _ in range(2))
    x = p.slerp(a, b, u)
    agree(x.norm(dim=1), torch.ones(3), atol=1e-9); agree(p.slerp(b, a, 1 - u), x, atol=1e-9)
    angle = lambda p, q: (p * q).sum(1).clamp(-1, 1).acos()
    agree(angle(a, x), u * angle(a, b), atol=1e-6)
    agree(p.slerp(a, b, 0.), a, atol=1e-12)

def test_no_circle_to_follow():
    a = torch.randn(2, 3, 4)
    agree(p.slerp(a, a, .3), a, atol=1e-6)
    assert p.slerp(a, -a, .5).isfinite().all()
    with pytest.raises(ValueError, match='same'): p.slerp(a, a[:1], .5)

def test_a_walk_begins_and_ends_with_its_prompts(pipe):
    way = pipe.between(DUCK, BALL, 3, seed=5, other_seed=6, steps=2, progress=False)
    assert len(way) == 3 and way[0].tobytes() == quick(pipe, DUCK, seed=5).tobytes() and way[2].tobytes() == quick(pipe, BALL, seed=6).tobytes()
    assert levels(way[1], way[0]) > 5 < levels(way[1], way[2])
    for wrong, error in ((dict(n=1), ValueError), (dict(n=2.), TypeError), (dict(w=math.nan), ValueError), (dict(sampler='magic'), ValueError)):
        with pytest.raises(error): pipe.between(DUCK, BALL, **wrong)

# ---- models of one's own, and the shipped one -------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['text_to_image', 'dit'])
def test_a_folder_of_ones_own(kind, tmp_path, pipe):
    cfg, build = (T2iCfg(d=32, depth=1, heads=2), build_text_to_image) if kind == 'text_to_image' else (DitCfg(d=32, depth=1, heads=2), build_dit)
    model = stirred(build(cfg), 3)
    codec, facts = load_codec()
    made_for = {'vae': p.state_mark(codec), 'text': p.state_mark(the_text())}
    save_model(tmp_path / f'{kind}.safetensors', model, cfg, {'words': ['duck'], 'made_for': made_for}, dit_probe, half=False)
    own = p.TextToImage.from_pretrained(tmp_path, device='cpu')
    assert own.words == {'duck'} and own.made['generator'] == p.state_mark(model)
    direct = p.TextToImage(model, codec, the_text(), {'words': ['duck']}, device='cpu')
    assert quick(own, 'duck').tobytes() == quick(direct, 'duck').tobytes() != quick(pipe, 'duck').tobytes()
    stirred(codec, 9)
    save_model(tmp_path / 'vae.safetensors', codec, facts['config'], {}, (2, 3, 64, 64))
    with pytest.raises(CheckpointError, match=f'vae.*{kind} was trained with'): p.TextToImage.from_pretrained(str(tmp_path))

def test_folders_without_a_model(tmp_path):
    with pytest.raises(DataError, match='no generator here'): p.TextToImage.from_pretrained(tmp_path)
    save_model(tmp_path / 'text_to_image.safetensors', nn.Linear(2, 2), {'colour': 'red'})
    with pytest.raises(CheckpointError, match='does not know'): p.TextToImage.from_pretrained(tmp_path)
    (tmp_path / 'text_to_image.safetensors').write_bytes(b'nothing')
    with pytest.raises(CheckpointError): p.TextToImage.from_pretrained(tmp_path)

def test_the_shipped_one_paints(tmp_path):
    pipe = p.TextToImage.from_pretrained(device='cpu')
    image = pipe(DUCK, steps=6, seed=3, progress=False)
    assert pipe.words == p.known_words() and to_pixels(image).std() > .05
    r, g, b = to_pixels(image)[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
    assert g > max(r, b)                                                                # grass in the corners

def test_bf16_is_for_those_who_ask(pipe):
    halved = p.TextToImage(pipe.model, pipe.codec, pipe.text, device='cpu', bf16=True)
    a, b = quick(pipe, DUCK), quick(halved, DUCK)
    assert p.settings_of(b, 'made')['bf16'] and a.tobytes() != b.tobytes() and (to_pixels(a) - to_pixels(b)).abs().mean() < .2

def test_an_unknown_device_is_named(pipe):
    with pytest.raises(ValueError, match='abacus'): p.TextToImage(pipe.model, pipe.codec, pipe.text, device='abacus')

def test_the_package_brings_it_when_asked():
    code = '''
import sys, latentcourse as lc
assert 'torch' not in sys.modules and 'TextToImage' in dir(lc)
try: lc.TextToPoem
except AttributeError as e: assert 'TextToPoem' in str(e)
else: raise SystemExit('no error')
assert 'torch' not in sys.modules
from latentcourse import TextToImage
assert TextToImage is lc.TextToImage is sys.modules['latentcourse.pipeline'].TextToImage
print(*(m for m in ('torchmetrics', 'sklearn', 'torchvision', 'lpips', 'open_clip', 'matplotlib.pyplot', 'scipy.linalg') if m in sys.modules))'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '', f'slow to start: {done.stdout}'
