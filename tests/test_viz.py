"Figures: sharp, small, legible, and refusing what they cannot draw."
import io
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from latentcourse.lib import viz

settings.register_profile('quick', deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('quick')
pytestmark = pytest.mark.filterwarnings('error')

@pytest.fixture(autouse=True)
def closed():
    yield
    import matplotlib.pyplot as plt
    plt.close('all')

def images(n=4, c=3, h=16, w=16): return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(0)) * 2 - 1
def drawn(ax): ax.figure.canvas.draw(); return np.asarray(ax.figure.canvas.buffer_rgba())[..., :3]

def test_importing_viz_does_not_import_pyplot():
    import subprocess, sys
    subprocess.run([sys.executable, '-c', 'import sys, latentcourse.lib.viz; assert "matplotlib" not in sys.modules'], check=True)

@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_every_concept_is_legible_in_both_themes(theme):
    def light(h): c = np.array([int(h[i:i + 2], 16) for i in (1, 3, 5)]) / 255; return np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055)**2.4) @ [.2126, .7152, .0722]
    def contrast(a, b): a, b = sorted((light(a), light(b))); return (b + .05) / (a + .05)
    card = viz.colour_of('card', theme)
    assert contrast(viz.colour_of('ink', theme), card) > 7
    assert all(contrast(viz.colour_of(k, theme), card) > 2.95 for k in viz.CONCEPTS)

def test_style_switches_the_card():
    try:
        for theme in ('dark', 'light'):
            viz.style(theme)
            want = [int(viz.THEMES[theme]['card'][i:i + 2], 16) for i in (1, 3, 5)]
            assert drawn(viz.show_curve([1., 2.]))[0, 0].tolist() == want
    finally: viz.style()

@pytest.mark.parametrize('theme', ['', 'sepia', None])
def test_unknown_theme(theme):
    with pytest.raises(ValueError, match='light, dark'): viz.style(theme)

# ---- images -----------------------------------------------------------------------------------------------------------------------

@given(st.integers(1, 9), st.sampled_from([1, 3]), st.integers(1, 24), st.integers(1, 24), st.integers(1, 5), st.integers(1, 4))
def test_grid_keeps_every_pixel(n, c, h, w, ncol, scale):
    import matplotlib.pyplot as plt
    x = images(n, c, h, w)
    got = drawn(viz.show_grid(x, ncol=ncol, scale=scale)); plt.close('all')
    ncol = min(n, ncol)
    for i in range(n):
        top, left = i // ncol * (h * scale + 6), i % ncol * (w * scale + 6)
        tile = got[top:top + h * scale, left:left + w * scale].astype(int)
        want = ((x[i].expand(3, -1, -1) / 2 + .5) * 255).numpy().transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
        assert np.abs(tile - want).max() <= 1

def test_captions_stay_in_their_column():
    ax = viz.show_grid(images(6), [f'a very long caption number {i} about a brown bear that reads a book' for i in range(6)], ncol=3)
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts]
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]) if a.y0 == b.y0) and all(b.y0 >= 0 for b in boxes)
    assert all('\n' in t.get_text() for t in ax.texts)

def test_captions_are_not_mathematics():
    drawn(viz.show_grid(images(1), [r'costs $5, not $\frac']))

def test_grid_into_given_axes():
    import matplotlib.pyplot as plt
    axes = plt.subplots(1, 2)[1]
    assert viz.show_grid(images(5), list('abcde'), ax=axes[1], title='five') is axes[1] and not axes[0].images
    drawn(axes[1])

def test_reduced_grid(): assert drawn(viz.show_grid(images(2, h=100, w=60), scale=.5)).shape[:2] == (50, 66)

BAD = {'numpy': (lambda x: x.numpy(), TypeError), 'list': (lambda x: x.tolist(), TypeError), 'None': (lambda x: None, TypeError), 'bytes': (lambda x: (x * 255).byte(), TypeError),
       'whole': (lambda x: x.long(), TypeError), 'one image': (lambda x: x[0], ValueError), 'five axes': (lambda x: x[None], ValueError), 'two channels': (lambda x: x[:, :2], ValueError),
       'channels last': (lambda x: x.movedim(1, 3), ValueError), 'empty': (lambda x: x[:0], ValueError), 'no height': (lambda x: x[:, :, :0], ValueError),
       'to 255': (lambda x: x * 127.5 + 127.5, ValueError), 'NaN': (lambda x: x.clone().index_fill_(0, torch.tensor(1), torch.nan), ValueError), 'inf': (lambda x: x / 0, ValueError)}

@pytest.mark.parametrize('kind', BAD)
def test_bad_images(kind):
    make, error = BAD[kind]
    with pytest.raises(error, match='expected'): viz.show_grid(make(images()))

@pytest.mark.parametrize('more', [dict(captions=['one']), dict(captions='abcd'), dict(ncol=0), dict(scale=0), dict(scale=-1)])
def test_bad_grid(more):
    with pytest.raises(ValueError): viz.show_grid(images(), **more)

# ---- curves and the rest ----------------------------------------------------------------------------------------------------------

finite = hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=2, max_side=12), elements=st.floats(-1e6, 1e6))

@given(finite)
def test_any_finite_series_is_drawn(y):
    import matplotlib.pyplot as plt
    ax = viz.show_curve(y, label='y')
    assert ax.get_xlabel() and ax.get_ylabel() and np.allclose(ax.lines[-1].get_ydata(), np.atleast_2d(y).mean(0))
    plt.close('all')

@given(finite, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_a_series_with_a_hole_is_refused(y, hole, data):
    y = y.copy(); y.flat[data.draw(st.integers(0, y.size - 1))] = hole
    with pytest.raises(ValueError, match='NaN or infinite'): viz.show_curve(y)

def test_records_of_a_run():
    hist = [SimpleNamespace(i=i * 10, loss=1 / (i + 1), grad_norm=2.) for i in range(5)]
    assert viz.show_curve(hist).lines[0].get_xdata().tolist() == [0, 10, 20, 30, 40]
    assert set(viz.show_curve(hist, key='grad_norm').lines[0].get_ydata()) == {2.}

def test_bands():
    y = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
    for band, low in (('se', y.mean(0) - y.std(0) / 3), ('quantile', y.quantile(.1, 0)), (torch.stack([y[0] - 1, y[0] + 1]), y[0] - 1)):
        v = viz.show_curve(y, band=band, label='runs').collections[0].get_paths()[0].vertices
        assert np.allclose([v[v[:, 0] == k][:, 1].min() for k in range(20)], low, atol=1e-5)

@pytest.mark.parametrize('call, error', [
    (lambda: viz.show_curve([]), ValueError), (lambda: viz.show_curve('loss'), TypeError), (lambda: viz.show_curve(torch.zeros(2, 2, 2)), ValueError), (lambda: viz.show_curve([1.], x=[1., 2.]), ValueError),
    (lambda: viz.show_curve([1., 2.], band='se'), ValueError), (lambda: viz.show_curve(torch.ones(3, 2), band='std'), ValueError), (lambda: viz.show_curve(torch.ones(3, 2), band=torch.ones(3)), ValueError),
    (lambda: viz.show_curve([1., 0.], log=True), ValueError), (lambda: viz.show_curve([1., 2.], smooth=3), ValueError), (lambda: viz.show_curve([1.], concept='teddy'), ValueError),
    (lambda: viz.show_spectrum([0., .1], [1., 1.]), ValueError), (lambda: viz.show_spectrum([.1, .2], [1., -1.]), ValueError), (lambda: viz.show_spectrum([.1, .2], [1.]), ValueError),
    (lambda: viz.show_scatter(torch.zeros(3, 3)), ValueError), (lambda: viz.show_scatter(torch.zeros(3, 2), [0, 1]), ValueError), (lambda: viz.show_scatter(torch.zeros(3, 2), [0, 1, 1], ['a']), ValueError),
    (lambda: viz.show_scatter(torch.zeros(40, 2), torch.arange(40)), ValueError), (lambda: viz.show_bars([1.], ['a', 'b']), ValueError), (lambda: viz.show_bars([1.], ['a'], [[0., 1.], [0., 1.]]), ValueError),
    (lambda: viz.show_bars([], []), ValueError), (lambda: viz.show_reliability([.5, 1.5], [0, 1]), ValueError), (lambda: viz.show_reliability([.5], [2]), ValueError),
    (lambda: viz.show_reliability([.5], [1, 0]), ValueError), (lambda: viz.show_reliability([.5], [1], bins=0), ValueError), (lambda: viz.colour_of('teddy'), ValueError)])
def test_refusals(call, error):
    with pytest.raises(error): call()

def test_every_function_takes_and_returns_axes():
    import matplotlib.pyplot as plt
    for f in (lambda ax: viz.show_curve([1., 2.], ax=ax), lambda ax: viz.show_spectrum([.1, .2], [2., 1.], ax=ax), lambda ax: viz.show_scatter(torch.randn(5, 2), ax=ax),
              lambda ax: viz.show_bars([1.], ['a'], ax=ax), lambda ax: viz.show_reliability([.5, .9], [0, 1], ax=ax)):
        ax = plt.subplots()[1]
        assert f(ax) is ax and ax.get_xlabel()

def test_reliability_puts_each_answer_in_its_bin():
    pts = viz.show_reliability([0., .05, .95, 1.], [0, 1, 1, 1], bins=10).collections[-1].get_offsets()
    assert np.allclose(pts, [[.025, .5], [.975, 1.]])

# ---- what a notebook keeps --------------------------------------------------------------------------------------------------------

def test_noise_fits_the_budget():
    from PIL import Image
    png = viz.palette_png(viz.show_grid(images(64, 3, 32, 32)).figure)
    assert len(png) <= 150_000 and Image.open(io.BytesIO(png)).mode == 'P'

def test_a_smaller_budget_is_kept_or_refused():
    fig = viz.show_grid(images(16, 3, 32, 32)).figure
    assert len(viz.palette_png(fig, 20_000)) <= 20_000
    with pytest.raises(ValueError, match='at least 2000'): viz.palette_png(fig, 100)

def test_a_real_kernel_stores_palette_figures(monkeypatch):
    monkeypatch.delenv('MPLBACKEND', raising=False) # as in a reader's notebook
    import base64
    import nbformat
    from nbclient import NotebookClient
    from PIL import Image
    code = ['import torch\nfrom latentcourse.lib.viz import show_grid, show_curve, style', 'ax = show_grid(torch.rand(2, 3, 8, 8))', "style('dark')\nax = show_curve([3., 1., 2.])"]
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), cells=[nbformat.v4.new_code_cell(c) for c in code])
    NotebookClient(nb, timeout=120, kernel_name='python3').execute()
    pngs = [base64.b64decode(o['data']['image/png']) for c in nb.cells for o in c.outputs if 'image/png' in o.get('data', {})]
    pictures = [Image.open(io.BytesIO(p)) for p in pngs]
    assert len(pictures) == 2 and all(p.mode == 'P' for p in pictures)
    assert pictures[1].convert('RGB').getpixel((0, 0)) == tuple(int(viz.THEMES['dark']['card'][i:i + 2], 16) for i in (1, 3, 5))

def test_slider_shows_one_frame_and_needs_no_network():
    import re
    frames = [images(2) * k for k in (.2, .6, 1.)]
    s = viz.show_slider(frames, ['a & b', 'c"d', 'e'], 'w', 'Two noisy squares, stronger from frame to frame.', start=1)
    html = s._repr_html_()
    assert html.count('<img') == 3 and html.count('display:block') == 1 and 'value="1"' in html and '://' not in html
    assert re.findall('title="([^"]*)"', html) == ['a &amp; b', 'c&quot;d', 'e'] and '<output>c&quot;d</output>' in html
    assert len({bytes(p) for p in s.pngs}) == 3 and sum(map(len, s.pngs)) <= 300_000 and repr(s) == 'slider over w: a & b, c"d, e'

@pytest.mark.parametrize('bad', [dict(frames=1), dict(labels=2), dict(start=3), dict(alt='short')])
def test_slider_says_what_is_wrong(bad):
    with pytest.raises(ValueError, match='expected'):
        viz.show_slider([images(2)] * bad.get('frames', 3), list(range(bad.get('labels', bad.get('frames', 3)))), 'w', bad.get('alt', 'Two noisy squares.....'), start=bad.get('start', 0))
