"Text to image: the published block on shared weights, the network by hand, the laws of joint attention, and the mistakes that these checks must catch."
import itertools, math
from dataclasses import replace
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
import latentcourse
from latentcourse import dit, text_to_image as t2i
from latentcourse.lib.check import agree, z_score
from latentcourse.lib.checkpoint import check_figures, figure
from latentcourse.lib.study import load_study
from latentcourse.toybox import FIELDS, READING, label_row, scenes, split_seeds
from latentcourse.transformer import attention_weights, rotate

double = torch.float64

def shaken(m, std=.3, seed=0):
    torch.manual_seed(seed)
    for q in m.double().parameters(): nn.init.normal_(q, std=std)
    return m.requires_grad_(False)

def streams(d=32, n=9, s=5, b=2, seed=1):
    torch.manual_seed(seed)
    return torch.randn(b, n, d, dtype=double), torch.randn(b, s, d, dtype=double), torch.randn(b, d, dtype=double)

# ---- Stable Diffusion 3's block ---------------------------------------------------------------------------------------------------

def published(**k):
    pytest.importorskip('diffusers')
    try: from diffusers.models.attention import JointTransformerBlock
    except ImportError as e: pytest.skip(str(e))
    return JointTransformerBlock(32, 4, k.pop('head', 8), **k)

@pytest.mark.parametrize('qk_norm', [None, 'rms_norm'])
@pytest.mark.parametrize('pre_only', [False, True])
def test_joint_block_is_stable_diffusion_3s(qk_norm, pre_only):
    theirs, (x, c, e) = shaken(published(qk_norm=qk_norm, context_pre_only=pre_only)), streams()
    ours = t2i.joint_from_diffusers(theirs)
    want_c, want_x = theirs(x, c, e)
    x_, c_ = ours(x, c, e)
    atol = 1e-6 if qk_norm else 1e-10                                                                     # their norm of queries squares in single precision
    agree(x_, want_x, atol=atol)
    if pre_only: assert c_ is None and want_c is None
    else: agree(c_, want_c, atol=atol)
    assert sum(q.numel() for q in ours.parameters()) == sum(q.numel() for q in theirs.parameters()) and ours.training == theirs.training

def test_its_gradients_are_theirs():
    theirs, (x, c, e) = published().double(), streams()
    for q in theirs.parameters(): nn.init.normal_(q, std=.3)
    ours = t2i.joint_from_diffusers(theirs)
    grads = []
    for f in (lambda a, b: theirs(a, b, e)[::-1], lambda a, b: ours(a, b, e)):
        a, b = x.clone().requires_grad_(), c.clone().requires_grad_()
        y, z = f(a, b)
        grads.append(torch.autograd.grad((y.sin().sum() + z.cos().sum()), (a, b)))
    for got, want in zip(grads[1], grads[0]): agree(got, want, atol=1e-8)

@pytest.mark.parametrize('k, says', [(dict(use_dual_attention=True), 'second attention'), (dict(qk_norm='layer_norm'), 'rms_norm')])
def test_other_blocks_are_refused(k, says):
    try: block = published(**k)
    except (ValueError, TypeError) as e: pytest.skip(str(e))
    with pytest.raises(ValueError, match=says): t2i.joint_from_diffusers(block)

def test_what_is_no_block_is_refused():
    with pytest.raises(TypeError, match='JointTransformerBlock'): t2i.joint_from_diffusers(nn.Linear(2, 2))

def test_heads_are_read_off_the_block():
    theirs, (x, c, e) = shaken(published(head=4)), streams()
    agree(t2i.joint_from_diffusers(theirs)(x, c, e)[0], theirs(x, c, e)[1], atol=1e-10)

# ---- the network by hand ----------------------------------------------------------------------------------------------------------

def net_of(seed=0, **k):
    return shaken(t2i.MMDiT(**(dict(size=8, d=32, joint=2, single=2, heads=4, rope=True, qk_norm=True, words=12, pooled=10, waves=16) | k)), .15, seed)

def asked(seed=0, b=2, s=6):
    torch.manual_seed(seed)
    return (torch.randn(b, 4, 8, 8, dtype=double), torch.rand(b, dtype=double), torch.randn(b, s, 12, dtype=double), torch.arange(s) < torch.tensor([[s], [s - 2]])[:b], torch.randn(b, 10, dtype=double))

def by_hand(net, xt, t, tokens, mask, pooled):
    "The forward pass again, from the state dict and torch's functions."
    P, heads = net.state_dict(), 4
    lin = lambda h, k: h @ P[f'{k}.weight'].T + P[f'{k}.bias']
    norm = lambda h: F.layer_norm(h, h.shape[-1:], eps=1e-6)
    mlp = lambda h, k: lin(F.gelu(lin(h, f'{k}.up')), f'{k}.down')
    two = lambda h, k: lin(F.silu(lin(h, f'{k}.0')), f'{k}.2')
    def qkv(h, k, turn):
        q, key, v = lin(h, f'{k}.in_proj').unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(2, 3)
        if f'{k}.q_norm.weight' in P: q, key = (F.rms_norm(a, a.shape[-1:], P[f'{k}.{n}.weight'], 1e-6) for a, n in ((q, 'q_norm'), (key, 'k_norm')))
        return (rotate(q, turn), rotate(key, turn), v) if turn is not None else (q, key, v)
    def look(q, k, v): return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
    def near(h, k): return h + F.conv2d(h.mT.unflatten(2, (4, 4)), P[f'{k}.near.conv.weight'], P[f'{k}.near.conv.bias'], padding=1, groups=h.shape[-1]).flatten(2).mT
    e = two(dit.unit_waves(t, net.waves), 'time') + two(pooled, 'pooled')
    told = [lin(F.silu(e), f'modulations.{i}.make').unflatten(-1, (6, -1)).movedim(1, 0)[:, :, None] for i in range(len(net.modulations))]
    x = lin(F.unfold(xt, 2, stride=2).mT, 'embed') + P['places']
    c, n, turn = lin(tokens, 'words'), 16, net.turn
    seen = torch.cat([torch.ones(len(mask), n, dtype=torch.bool), mask], 1)[:, None, None]
    for i in range(len(net.joint)):
        k = f'joint.{i}'
        m, w = P[f'{k}.table'][:, :, None] + told[0], P[f'{k}.text_table'][:, :, None] + told[1][:len(P[f'{k}.text_table'])]
        x = near(x, k)
        y = look(*(torch.cat(p, 2) for p in zip(qkv(norm(x) * (1 + m[1]) + m[0], f'{k}.image', turn), qkv(norm(c) * (1 + w[1]) + w[0], f'{k}.text', None))))
        x = x + m[2] * lin(y[:, :n], f'{k}.image.out')
        x = x + m[5] * mlp(norm(x) * (1 + m[4]) + m[3], f'{k}.feed')
        if f'{k}.text_feed.up.weight' not in P: break
        c = c + w[2] * lin(y[:, n:], f'{k}.text.out')
        c = c + w[5] * mlp(norm(c) * (1 + w[4]) + w[3], f'{k}.text_feed')
    h = torch.cat([x, c], 1)
    turn = None if turn is None else torch.cat([turn, torch.zeros(c.shape[1], turn.shape[1])])
    for i in range(len(net.single)):
        k = f'single.{i}'
        m = P[f'{k}.table'][:, :, None] + told[2]
        h = torch.cat([near(h[:, :n], k), h[:, n:]], 1)
        h = h + m[2] * lin(look(*qkv(norm(h) * (1 + m[1]) + m[0], f'{k}.own', turn)), f'{k}.own.out')
        h = h + m[5] * mlp(norm(h) * (1 + m[4]) + m[3], f'{k}.feed')
    a, b = lin(F.silu(e), 'exit.modulation.make').chunk(2, -1)
    return F.fold(lin(norm(h[:, :n]) * (1 + b[:, None]) + a[:, None], 'exit.out').mT, 8, 2, stride=2)

@pytest.mark.parametrize('k', [{}, dict(rope=False, qk_norm=False), dict(joint=1, single=0), dict(joint=1, single=3)], ids=['both kinds', 'plain', 'joint alone', 'as shipped'])
def test_network_by_hand(k):
    net, a = net_of(**k), asked()
    agree(net(*a), by_hand(net, *a), atol=1e-9)

# ---- mistakes that must be caught -------------------------------------------------------------------------------------------------

def drop_text(monkeypatch): # keys and values of the words are gone
    own = t2i.JointBlock.qkv
    monkeypatch.setattr(t2i.JointBlock, 'qkv', lambda self, x, c, m, n, turn=None: tuple(torch.cat([p[:, :, :x.shape[1]], 0 * p[:, :, x.shape[1]:]], 2) for p in own(self, x, c, m, n, turn)))
def ignore_mask(monkeypatch):
    own = t2i.attention
    monkeypatch.setattr(t2i, 'attention', lambda q, k, v, mask=None: own(q, k, v))
def drop_pooled(monkeypatch):
    monkeypatch.setattr(t2i.MMDiT, 'forward', (lambda own: lambda self, xt, t, tokens, mask, pooled: own(self, xt, t, tokens, mask, 0 * pooled))(t2i.MMDiT.forward))
def swap_streams(monkeypatch): # the two outputs of an attention come back in the other order
    own = t2i.attention
    monkeypatch.setattr(t2i, 'attention', lambda q, k, v, mask=None: own(q, k, v, mask).roll(6, 2))
def swap_weights(monkeypatch): # words by the matrices of places, and the other way round
    own = t2i.JointBlock.qkv
    def qkv(self, x, c, m, n, turn=None):
        self.image, self.text = self.text, self.image
        try: return own(self, x, c, m, n, turn)
        finally: self.image, self.text = self.text, self.image
    monkeypatch.setattr(t2i.JointBlock, 'qkv', qkv)
def turn_words(monkeypatch):
    own = t2i.JointBlock.qkv
    def qkv(self, x, c, m, n, turn=None):
        q, k, v = own(self, x, c, m, n, turn)
        spin = lambda a: torch.cat([a[:, :, :x.shape[1]], rotate(a[:, :, x.shape[1]:], turn[1:1 + c.shape[1]])], 2)
        return spin(q), spin(k), v
    monkeypatch.setattr(t2i.JointBlock, 'qkv', qkv)
def words_by_places_modulation(monkeypatch):
    own = t2i.JointBlock.told
    monkeypatch.setattr(t2i.JointBlock, 'told', lambda self, e: (own(self, e)[0],) * 2)
def no_table(monkeypatch): monkeypatch.setattr(t2i.JointBlock, 'told', lambda self, e: e)
def cross_alone(monkeypatch): # places read words, words read nobody new: cross-attention passed off as joint
    own = t2i.attention
    monkeypatch.setattr(t2i, 'attention', lambda q, k, v, mask=None: own(q, k, v, t2i.words_apart(16, q.shape[2] - 16) & mask))

@pytest.mark.parametrize('mistake', [drop_text, ignore_mask, drop_pooled, swap_streams, swap_weights, turn_words, words_by_places_modulation, no_table, cross_alone], ids=lambda f: f.__name__)
def test_mistakes_are_caught(mistake, monkeypatch):
    net, a = net_of(), asked()
    want = by_hand(net, *a)
    agree(net(*a), want, atol=1e-9)
    mistake(monkeypatch)
    with pytest.raises(AssertionError): agree(net(*a), want, atol=1e-4)

# ---- laws of joint attention ------------------------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 999), st.booleans())
def test_gate_of_joint_attention(n, s, seed, padded):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, 2, n + s, 4, dtype=double)
    mask = torch.arange(n + s)[None, None, None] < torch.tensor([n + s, n + 1])[:, None, None, None] if padded else None
    around, told, share = t2i.merged(q, k, v, n, mask)
    agree((1 - share) * around + share * told, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-10)
    assert ((0 < share) & (share < 1)).all()
    a = attention_weights(q, k, mask)
    xx, xc, cx, cc = t2i.quarters(a, n)
    agree(torch.cat([torch.cat([xx, xc], -1), torch.cat([cx, cc], -1)], -2), a, atol=0)
    agree(share, torch.cat([xc, cc], -2).sum(-1, keepdim=True), atol=1e-10)

@pytest.mark.parametrize('n', [0, 5, 9])
def test_quarters_refuse(n):
    with pytest.raises(ValueError, match='expected a square'): t2i.quarters(torch.ones(5, 5), n)

@settings(max_examples=3, deadline=None)
@given(st.permutations(range(6)), st.integers(0, 99))
def test_words_have_no_order_of_their_own(mixed, seed):
    net, (xt, t, tokens, mask, pooled) = net_of(seed), asked(seed)
    agree(net(xt, t, tokens[:, mixed], mask[:, mixed], pooled), net(xt, t, tokens, mask, pooled), atol=1e-9)

def test_padding_is_not_heard():
    net, (xt, t, tokens, mask, pooled) = net_of(), asked()
    agree(net(xt, t, torch.where(mask[..., None], tokens, 1e3), mask, pooled), net(xt, t, tokens, mask, pooled), atol=1e-9)
    agree(net(xt, t, F.pad(tokens, (0, 0, 0, 3)), F.pad(mask, (0, 3)), pooled), net(xt, t, tokens, mask, pooled), atol=1e-9)
    alone = net(*(p[1:] for p in (xt, t, tokens[:, :4], mask[:, :4], pooled)))
    agree(net(xt, t, tokens, mask, pooled)[1:], alone, atol=1e-9)

def test_the_cut_makes_cross_attention():
    block, (x, c, e) = shaken(t2i.JointBlock(32, 4)), streams()
    other = torch.randn_like(x)
    cut = t2i.words_apart(9, 5)
    assert torch.equal(block(x, c, e, cut)[1], block(other, c, e, cut)[1]) and (block(x, c, e)[1] - block(other, c, e)[1]).abs().max() > 1e-2
    assert (block(x, c, e, cut)[0] - block(x, torch.randn_like(c), e, cut)[0]).abs().max() > 1e-2
    assert (~cut).sum() == 9 * 5 and not cut[9:, :9].any()
    with pytest.raises(ValueError, match='one or more of each'): t2i.words_apart(3, 0)

def test_same_weights_twice_make_a_single_stream():
    single, (x, c, e) = shaken(dit.DiTBlock(32, 4)), streams()
    joint = t2i.JointBlock(32, 4).double()
    for mine, its in ((joint.image, single.own), (joint.text, single.own), (joint.feed, single.feed), (joint.text_feed, single.feed), (joint.modulation, single.modulation), (joint.text_modulation, single.modulation)): mine.load_state_dict(its.state_dict())
    agree(torch.cat(joint(x, c, e), 1), single(torch.cat([x, c], 1), e), atol=1e-10)

def test_new_networks_say_nothing():
    block, (x, c, e) = t2i.JointBlock(32, 4, near=True), (p.float() for p in streams())
    for got, want in zip(block(x, c, e, rows=3), (x, c)): assert torch.equal(got, want)
    net = t2i.MMDiT(size=8, d=32, words=12, pooled=10)
    assert (net(*(p.float() if p.is_floating_point() else p for p in asked())) == 0).all()

def test_bad_questions_are_refused():
    net, (xt, t, tokens, mask, pooled) = net_of(), asked()
    for a in ((xt, t, tokens, mask[:, :4], pooled), (xt, t[:1], tokens, mask, pooled), (xt, t, tokens, mask, pooled[:1])):
        with pytest.raises(ValueError, match='same b'): net(*a)
    with pytest.raises(ValueError, match='divisor'): t2i.MMDiT(size=15)

# ---- counting ---------------------------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 60), st.booleans(), st.booleans())
def test_blocks_have_as_many_numbers_as_the_formula(k, hidden, shared, near):
    d = 8 * k
    count = lambda m: sum(q.numel() for q in m.parameters())
    assert t2i.joint_parameters(d, hidden, 2, shared, near) == count(t2i.JointBlock(d, 2, hidden, shared, near))
    assert t2i.joint_parameters(d, hidden, 1, shared, near) == count(dit.DiTBlock(d, 2, hidden, None, shared, near))

@pytest.mark.parametrize('joint, single', [(1, 4), (3, 1)])
def test_networks_have_as_many(joint, single):
    assert t2i.mmdit_parameters(24, joint, single) == sum(q.numel() for q in t2i.MMDiT(d=24, joint=joint, single=single).parameters())
    cfg = t2i.T2I['SHIPPED']
    assert t2i.mmdit_parameters(cfg.d, cfg.joint, cfg.depth) == sum(q.numel() for q in t2i.build_text_to_image(cfg).parameters())
    with pytest.raises(ValueError, match='streams'): t2i.joint_parameters(8, streams=3)

@pytest.mark.parametrize('k, n', [(2, 5), (3, 4), (5, 3), (1, 4), (4, 1)])
def test_fair_bits_by_listing_all_draws(k, n):
    def bits(draw): return -sum(p * math.log2(p) for p in (draw.count(a) / n for a in set(draw)))
    want = sum(map(bits, itertools.product(range(k), repeat=n))) / k**n
    assert abs(t2i.fair_bits(k, n) - want) < 1e-12
    assert t2i.fair_bits(k, 4_000) <= math.log2(k) + 1e-12 and math.log2(k) - t2i.fair_bits(k, 4_000) < 2e-3
    with pytest.raises(ValueError, match='one or more'): t2i.fair_bits(k, 0)

@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_who_remembers_nothing_is_as_near_to_both(m, k, seed):
    torch.manual_seed(seed)
    x = torch.randn(4_000, 1 + m + k, 2)
    near = t2i.remembers(x[:, 0], x[:, 1:1 + m], x[:, 1 + m:])
    assert abs(z_score(near.double(), m / (m + k))) < 5
    assert t2i.remembers(x[:, 1], x[:, 1:1 + m], x[:, 1 + m:]).all() and not t2i.remembers(x[:, 1 + m], x[:, 1:1 + m], x[:, 1 + m:]).any()
    with pytest.raises(ValueError, match='expected'): t2i.remembers(x[:, 0], x[:10, 1:], x)

@pytest.mark.parametrize('k, m, fresh', [(6, 2, 2), (9, 3, 1), (4, 4, 4)])
def test_who_copies_any_of_k_is_found_as_often_as_the_page_says(k, m, fresh):
    torch.manual_seed(k)
    x = torch.randn(8_000, k + fresh, 3)
    copied = x[torch.arange(8_000), torch.randint(k, (8_000,))]
    found = t2i.remembers(copied, x[:, :m], x[:, k:]).double()
    want = m / k + (1 - m / k) * m / (m + fresh)
    assert found.all() if m == k else abs(z_score(found, want)) < 5

# ---- asking it --------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def painter(monkeypatch):
    "A small untrained network in the place of the shipped one."
    torch.manual_seed(0)
    net = t2i.MMDiT(d=32, joint=1, single=1).eval().requires_grad_(False)
    for q in net.parameters(): nn.init.normal_(q, std=.1)
    net.std.fill_(1.1)
    monkeypatch.setattr(t2i, 'the_painter', lambda: (net, {'fingerprint': {'outputs': [0., .5]}}))
    for f in (t2i.read_wishes, t2i.painted_again, t2i.training_labels): f.cache_clear()
    yield net
    for f in (t2i.read_wishes, t2i.painted_again, t2i.training_labels): f.cache_clear()

def test_rules_are_chapter_10as(painter):
    texts = ['a red ball', 'a duck on grass']
    plain = t2i.ruled_dream('guidance', texts, 3., 2, seed=1)
    want = dit.dream(painter, texts, 3., 2, 1, t2i.euler)
    agree(plain * painter.std[:, None, None] + painter.mean[:, None, None], want, atol=.05)                # separate calls; half precision where it is fast
    agree(t2i.ruled_dream('rescale', texts, 1., 1, seed=1), t2i.ruled_dream('projected', texts, 1., 1, seed=1), atol=1e-6)
    seen = {rule: t2i.ruled_dream(rule, texts, 6., 2, seed=1) for rule in t2i.T2I_RULES}
    assert all(z.shape == (2, 4, 16, 16) and z.isfinite().all() for z in seen.values())
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(seen.values(), 2))
    with pytest.raises(ValueError, match='unknown rule'): t2i.ruled_dream('louder', texts, 3.)

def test_judged_shares_are_those_of_the_survey(painter):
    got = t2i.t2i_point(0, 'test', 8, 2., 1)
    want = dit.survey_prompts(painter, 8, w=2., steps=1, reader='judge')
    for k, v in want.items(): assert abs(got[k] - v.double().mean().item()) < 1e-9 or len(v) == 0
    assert got['of one'] + got['of two'] == 8 and got['bound'] <= got['there'] <= got['of two'] and got['fingerprint'] == .5

def test_real_scenes_are_read_right(painter):
    got = t2i.t2i_point(0, 'test', 32, 3., 0)
    assert got['one toy, its colour'] > .9 and got['everything'] > .7 and got['bound'] == got['there'] > 0

def test_rule_point_measures(painter):
    got = t2i.rule_point(0, 'guidance', 2., 4, 2, 1)
    assert set(got) == {'all toys, all colours', 'toy', 'colour', 'pattern', 'background', 'layout', 'bare toy', 'bits', 'spread', 'deviation'} and all(math.isfinite(v) for v in got.values())

def test_everything_that_was_asked_for():
    row = label_row({'layout': 'reading', 'background': 'grass', 'toy1': 'bear', 'colour1': 'red', 'pattern1': 'plain', 'size1': 'big', 'toy2': 'book', 'colour2': 'blue', 'pattern2': 'plain', 'size2': 'small'})
    bent, other, less = row.clone(), row.clone(), row.clone()
    bent[8], other[7], less[1] = 2, 0, -1
    assert t2i.all_right(torch.stack([row, bent, other, other]), torch.stack([row, row, row, row])).tolist() == [True, True, False, False]
    assert t2i.all_right(row[None], less[None]).all() and row[0] == READING
    plain = label_row(dict(zip(FIELDS, ('beside', 'sand', 'duck', 'red', 'plain', 'big', 'car', 'blue', 'plain', 'big'))))
    bent = plain.clone(); bent[8] = 1
    assert not t2i.all_right(bent[None], plain[None]).any()

def test_scenes_of_the_same_kind(painter, monkeypatch):
    cfg = replace(t2i.T2I['SHIPPED'], scenes=16_384, first=1_000)
    monkeypatch.setitem(t2i.T2I, 'SHIPPED', cfg)
    rows, train, fresh = t2i.same_kind(3, 1, 0)
    assert train.shape == (3, 1, 4, 16, 16) and fresh.shape == (3, 2, 4, 16, 16) and (rows[:, 6] < 0).all()
    known = scenes(split_seeds('train', 1_000, 16_384)).labels
    assert torch.equal(t2i.training_labels().long(), known)
    at = [(known == row).all(1).nonzero()[0, 0] for row in rows]
    agree(train[:, 0], dit.encoded(t2i.the_codec(), t2i.draw(scenes(split_seeds('train', 1_000, 16_384)[torch.stack(at)]))), atol=.05)
    assert (train[:, 0] - fresh[:, 0]).abs().max() > .1 and (fresh[:, 0] - fresh[:, 1]).abs().max() > .1
    got = t2i.memory_point(0, 3, 1, 2., 1)
    assert got['a copy'] == 1. and 0 <= got['painted'] <= 1 and got['distance, times that of a real scene'] > 0
    with pytest.raises(ValueError, match='fewer'): t2i.same_kind(3, 99, 0)

def test_what_is_inside():
    net, a = net_of(), asked()
    plain = net(*a)
    maps, words = t2i.inside(net, *a)
    assert len(maps) == len(words) == 4 and all(m.shape == (2, 4, 22, 22) for m in maps) and all(w.shape == (2, 6, 32) for w in words)
    for m in maps:
        agree(m.sum(-1), torch.ones(2, 4, 22), atol=1e-9)
        assert (m[1, :, :, 20:] == 0).all() and (m[0, :, :, 20:] > 0).all()
    assert torch.equal(net(*a), plain) and not any(b._forward_hooks for b in net.modules())
    moved = t2i.inside(net, a[0] + 1, *a[1:])[1]
    assert all((x - y).abs().max() > 1e-3 for x, y in zip(words, moved))

# ---- the recipe -------------------------------------------------------------------------------------------------------------------

def test_training_repeats_itself():
    cfg = replace(t2i.T2I['CPU'], d=32, depth=1, scenes=8, steps=2, batch=4)
    data, ends = training_rows(), []
    for _ in range(2):
        net = t2i.build_text_to_image(cfg)
        log = list(dit.learn_dit(net, cfg, data, progress=False))
        ends.append((log[-1].loss, net.exit.out.weight.clone(), net.joint[0].text_feed.up.weight.clone()))
    assert ends[0][0] == ends[1][0] and all(torch.equal(a, b) for a, b in zip(ends[0][1:], ends[1][1:])) and ends[0][1].abs().max() > 0
    with pytest.raises(ValueError, match='text_to_image'): t2i.train_text_to_image('dit', cfg)

def training_rows():
    from latentcourse.codec import load_codec
    from latentcourse.latent_flow import toy_rows
    return toy_rows(split_seeds('train', 0, 8), load_codec()[0])

SHIPPED = Path(latentcourse.__file__).parent / 'checkpoints' / 'text_to_image.safetensors'

@pytest.mark.skipif(not SHIPPED.exists(), reason='not shipped yet')
def test_shipped_figures_hold():
    model, facts = t2i.load_text_to_image()
    got = {k: figure(v.double()) for k, v in dit.examine_dit(model, 12).items()}
    check_figures('text_to_image', facts['evaluation'], got)
    assert facts['config']['steps'] == t2i.T2I['SHIPPED'].steps and sum(facts['log']['loss'][-10:]) < .5 * sum(facts['log']['loss'][:10])
    assert facts['evaluation']['loss at 0.1, told']['mean'] < facts['evaluation']['loss at 0.1, not told']['mean']

def test_studies_are_declared():
    assert set(t2i.STUDIES) == {'text-to-image', 'text-to-image-guidance', 'text-to-image-memory'} and all(s.seeds == (0, 1, 2) for s in t2i.STUDIES.values())
    assert all(s['w'] == t2i.T2I_W for s in t2i.TEXT_TO_IMAGE.grid)
