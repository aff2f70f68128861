"What the generator is told: entrances against other routes, bags that cannot bind, and mistakes that are noticed."
import itertools, math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from latentcourse import conditions as c
from latentcourse.lib.check import agree
from latentcourse.toybox import COLOURS, label_row, split_seeds
from latentcourse.transformer import attention

double = torch.float64
SWAPPED = ['a red ball to the left of a blue car', 'a blue ball to the left of a red car']

def look(seed=0, width=16, k=12, heads=4):
    torch.manual_seed(seed)
    m = c.CrossLook(width, k, heads).double()
    for q in m.parameters(): nn.init.normal_(q, std=.3)
    return m.requires_grad_(False)

def peer_of(m):
    p = nn.MultiheadAttention(m.attention.d, m.attention.heads, batch_first=True).double()
    p.load_state_dict({'in_proj_weight': m.attention.in_proj.weight, 'in_proj_bias': m.attention.in_proj.bias, 'out_proj.weight': m.attention.out.weight, 'out_proj.bias': m.attention.out.bias})
    return p

def by_torch(m, x, tokens, mask):
    q, words = m.norm(x).flatten(2).mT, m.words(tokens)
    with torch.no_grad(): seen = peer_of(m)(q, words, words, key_padding_mask=~mask)[0]
    return x + seen.mT.reshape(x.shape)

@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_cross_look_is_torchs_attention(seed, s, heads):
    m = look(seed, heads=heads)
    x, tokens = torch.randn(3, 16, 4, 2, dtype=double), torch.randn(3, s, 12, dtype=double)
    mask = torch.arange(s) < torch.randint(1, s + 1, (3, 1))
    agree(m(x, tokens, mask), by_torch(m, x, tokens, mask), atol=1e-10)

@pytest.mark.parametrize('mistake', ['no mask', 'looks at itself', 'one head', 'keys as values', 'no root'])
def test_mistakes_in_the_entrance_are_noticed(mistake, monkeypatch):
    m = look()
    x, tokens, mask = torch.randn(2, 16, 4, 4, dtype=double), torch.randn(2, 5, 12, dtype=double), torch.arange(5) < torch.tensor([[5], [3]])
    want = by_torch(m, x, tokens, mask)
    agree(m(x, tokens, mask), want, atol=1e-10)
    if mistake == 'no mask': got = m(x, tokens, torch.ones_like(mask))
    elif mistake == 'one head': m.attention.heads = 1; got = m(x, tokens, mask)
    elif mistake == 'looks at itself':
        own = type(m.attention).forward
        monkeypatch.setattr(type(m.attention), 'forward', lambda self, x, context=None, mask=None: own(self, x)); got = m(x, tokens, mask)
    elif mistake == 'keys as values': m.attention.in_proj.weight[-16:] = m.attention.in_proj.weight[16:32]; want = by_torch(look(), x, tokens, mask); got = m(x, tokens, mask)
    else: m.attention.in_proj.weight[:16] *= 2; m.attention.in_proj.bias[:16] *= 2; got = m(x, tokens, mask)      # 1/sqrt(4) left out
    with pytest.raises(AssertionError): agree(got, want, atol=1e-6)

def test_a_new_entrance_is_the_identity():
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(c.CrossLook(16, 12, 4)(x, torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool)), x)

@pytest.mark.parametrize('tokens, mask, says', [((2, 5, 12), (2, 4), 'expected'), ((3, 5, 12), (3, 5), 'same b'), ((2, 5, 12), None, 'empty caption')])
def test_bad_captions_are_refused(tokens, mask, says):
    mask = torch.zeros(2, 5, dtype=torch.bool) if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=says): c.CrossLook(16, 12, 4)(torch.randn(2, 16, 4, 4), torch.randn(tokens), mask)

@pytest.mark.parametrize('m', [2, 3, 4])
def test_a_bag_of_m_colours_serves_one_order_in_m_factorial(m):
    orders = list(itertools.permutations(COLOURS[:m]))
    toys = ('ball', 'car', 'star', 'duck')
    texts = [', '.join(f'a {colour} {toy}' for colour, toy in zip(order, toys)) for order in orders]
    assert abs(c.ceiling(c.what_is_told('bag', texts)[0], torch.arange(len(orders))) - 1 / math.factorial(m)) < 1e-9
    assert c.ceiling(c.what_is_told('pooled', texts)[0], torch.arange(len(orders))) == 1

@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=6))
def test_ceiling_is_the_best_of_all_generators(pairs):
    said, wishes = torch.tensor([[float(a)] for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    best = max(sum(paint[a] == b for a, b in pairs) for paint in itertools.product(range(3), repeat=3)) / len(pairs)
    assert abs(c.ceiling(said, wishes) - best) < 1e-12

def test_what_is_told_in_each_way():
    texts = SWAPPED + ['', 'a duck']
    for way in c.WAYS:
        vector, tokens, mask = c.what_is_told(way, texts)
        assert (vector is None) == (way in ('words', 'sequence')) and (tokens is None) == (way in ('bag', 'clip', 'pooled')) == (mask is None)
        assert all(v.isfinite().all() and len(v) == 4 for v in (vector, tokens, mask) if v is not None)
    assert torch.equal(c.what_is_told('words', texts)[2].sum(1) + 1, c.what_is_told('sequence', texts)[2].sum(1))
    bag, clip, pooled = (c.what_is_told(way, SWAPPED)[0] for way in ('bag', 'clip', 'pooled'))
    assert (bag[0] - bag[1]).abs().max() < 1e-6 * bag.abs().max() and (pooled[0] - pooled[1]).norm() > .1 * pooled[0].norm() and (clip[0] - clip[1]).norm() > 1e-3
    agree(clip.norm(dim=1), torch.ones(2), atol=1e-5)
    with pytest.raises(ValueError, match='unknown way'): c.what_is_told('loud', texts)

def test_bag_does_not_hear_the_order_and_the_sequence_does():
    torch.manual_seed(0)
    xt, t = torch.randn(1, 4, 16, 16).expand(2, -1, -1, -1), torch.full((2,), .5)
    for way in c.WAYS:
        net = c.Listener(way)
        for q in net.parameters(): nn.init.normal_(q, std=.1)
        a, b = net(xt, t, *c.what_is_told(way, SWAPPED))
        gap = (a - b).abs().max() / a.abs().max()
        assert gap < 1e-4 if way == 'bag' else gap > 1e-3, (way, gap)
    with pytest.raises(ValueError, match='hears'): c.Listener('pooled')(xt, t, *c.what_is_told('sequence', SWAPPED))
    with pytest.raises(ValueError, match='unknown way'): c.Listener('loud')

def test_binding_counts_by_hand():
    row = label_row({'layout': 'beside', 'toy1': 'ball', 'colour1': 'red', 'toy2': 'car', 'colour2': 'blue'})
    coats, mirror, toys, wrong, same = (row.clone() for _ in range(5))
    coats[[3, 7]], mirror[[2, 3, 6, 7]], toys[[2, 6]], wrong[3], same[3] = row[[7, 3]], row[[6, 7, 2, 3]], row[[6, 2]], 4, row[7]
    there, right = c.binding(torch.stack([row, coats, mirror, toys, wrong, same, row]), torch.stack([row] * 5 + [same] * 2))
    assert there.tolist() == [True] * 4 + [False] * 3 and right.tolist() == [True, False, True, False, False, False, False]
    with pytest.raises(ValueError, match='n 10'): c.binding(row[None], row)

def test_silence_is_the_last_row():
    parts = (torch.arange(5.)[:, None], None, None)
    got = c.chosen(parts, torch.tensor([0, 1, 2]), torch.tensor([False, True, False]))
    assert got[0][:, 0].tolist() == [0, 4, 2] and got[1] is None

def test_pairs_are_two_big_plain_toys_on_sand():
    scene, texts = c.toy_pairs(split_seeds('test', 0, 50))
    said = c.PAIRS >= 0
    assert (scene.labels[:, said] == c.PAIRS[said]).all() and len(set(texts)) == 50
    again = c.toy_pairs(split_seeds('test', 0, 50)[7:9])[1]
    assert again == texts[7:9]

def test_training_repeats_itself():
    cfg = c.ListenerCfg('both', scenes=64, steps=3, batch=8)
    ends = []
    for _ in range(2):
        net = c.build_listener(cfg)
        log = list(c.learn_listener(net, cfg, progress=False))
        ends.append((log[-1].loss, net.out.weight.clone()))
    assert len(log) == 3 and ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])
