"Chapter 1's measures on cases with known answers, and their refusals."
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse import pixels as px

def test_dimension():
    assert px.dimension(1024, 1024) == 3_145_728 and px.dimension(600, 1000) == 1_800_000 and px.dimension(8, 8, 1) == 64
    for bad in ((0, 5), (5, -1), (5, 5, 0)):
        with pytest.raises(ValueError, match='at least 1'): px.dimension(*bad)

def test_lag_correlation_of_a_wave():
    "A cosine along the rows, constant down the columns: cos(2 pi f k) and 1 on average."
    x = torch.cos(2 * math.pi * torch.arange(400.) / 8)[None, None, None].expand(1, 1, 400, 400)
    for k in (1, 2, 4): assert abs(px.lag_correlation(x, k) - (math.cos(2 * math.pi * k / 8) + 1) / 2) < .01
    for bad, k in ((torch.zeros(1, 1, 8, 8), 1), (torch.randn(1, 1, 8, 8), 8), (torch.randn(1, 1, 8, 8), 0), (torch.randn(8, 8), 1)):
        with pytest.raises(ValueError): px.lag_correlation(bad, k)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 999))
def test_components_of_a_subspace(rank, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(60, rank, generator=g) @ torch.randn(rank, 40, generator=g)
    assert px.components_for(x, 1.) <= rank and px.components_for(x, .5) <= px.components_for(x, .95) <= rank
    assert px.components_for(x) == px.components_for(x @ torch.linalg.qr(torch.randn(40, 40, generator=g)).Q)

def test_components_refuse():
    for bad in (torch.zeros(1, 5), torch.ones(9, 5)):
        with pytest.raises(ValueError): px.components_for(bad)
    for share in (0, -1, 1.5):
        with pytest.raises(ValueError): px.components_for(torch.randn(9, 5), share)

@settings(max_examples=30, deadline=None)
@given(st.sampled_from([8, 15, 32]), st.sampled_from([8, 21]), st.floats(.01, .8), st.integers(0, 999))
def test_frequencies_split_and_add(h, w, cut, seed):
    x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = px.split_frequencies(x, cut)
    assert (low + high - x).abs().max() < 1e-9 and (low * high).sum().abs() < 1e-6
    assert (px.split_frequencies(low, cut)[0] - low).abs().max() < 1e-9          # twice is once

def test_frequencies_refuse():
    with pytest.raises(ValueError): px.split_frequencies(torch.zeros(8, 8), .2)
    for cut in (0, -.1, math.nan):
        with pytest.raises(ValueError): px.split_frequencies(torch.zeros(1, 3, 8, 8), cut)

def test_feature_distance_is_a_distance():
    class Net(nn.Module):
        def features(self, x): return [x, x[:, :, ::2, ::2]]
    x, y = torch.randn(2, 4, 3, 8, 8)
    d = px.feature_distance(Net(), x, y)
    assert d.shape == (4,) and (d > 0).all() and (d <= 4).all()
    assert px.feature_distance(Net(), x, x).max() < 1e-10 and torch.allclose(d, px.feature_distance(Net(), y, x)) and torch.allclose(d, px.feature_distance(Net(), x, 3 * y), atol=1e-5)
    assert torch.allclose(px.feature_distance(Net(), x, -x), torch.full((4,), 4.))
    with pytest.raises(ValueError, match='same'): px.feature_distance(Net(), x, y[:2])

def test_work_counts_a_linear_map():
    flops, kept = px.work(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10, device='meta')), 16, batch=2)
    assert flops == 2 * 2 * 768 * 10 and kept > 0

def test_scorecard_measures_what_it_says():
    class Tell(nn.Module): # reads the same from every picture, or not
        def __init__(self, shift): super().__init__(); self.shift = shift
        def forward(self, x):
            out = torch.zeros(len(x), 59); out[:, self.shift] = 1
            return out
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    s = px.score_space('halves', lambda x: x[..., ::2, ::2], lambda z: z.repeat_interleave(2, 2).repeat_interleave(2, 3), x, Tell(0), Tell(0))
    assert s.numbers == 192 and s.midpoints == 1 and 0 < s.psnr < 40 and 0 < s.directions <= 1
    assert px.score_space('same', lambda x: x, lambda x: x, x, Tell(0), Tell(1)).midpoints == 0
    assert 'halves' in px.scorecard([s]) and '192' in px.scorecard([s])
    for bad in ([], ['x'], None):
        with pytest.raises(TypeError): px.scorecard(bad)
    with pytest.raises(ValueError, match='even'): px.score_space('odd', lambda x: x, lambda x: x, x[:5], Tell(0), Tell(0))
    with pytest.raises(ValueError, match='divide'): px.score_space('odd', lambda x: x[..., :5, :5], lambda x: x, x, Tell(0), Tell(0))
