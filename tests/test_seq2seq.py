"The translator: its language, its loss, its two kinds of writing, its shipped weights, and the mistakes that its checks must catch."
import itertools, math
from dataclasses import replace
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
import torch.nn.functional as F
import latentcourse
from latentcourse import seq2seq as s2s, transformer
from latentcourse.captions import parses
from latentcourse.lib.check import agree
from latentcourse.lib.checkpoint import check_figures, figure
from latentcourse.lib.metrics import wilson
from latentcourse.tokens import BOS, EOS, PAD, pad
from latentcourse.toybox import FIELDS, WORDS, scenes, split_seeds

TINY = s2s.Seq2seqCfg(vocabulary=20, words=6, d=8, heads=2, hidden=12, encoder=1, decoder=2, longest=16)
QUICK = s2s.Seq2seqCfg(d=16, heads=2, hidden=16, encoder=1, decoder=1, pool=200, steps=6, batch=8)
SEEDS = st.integers(0, 10**6)
double = torch.float64

def stranger(seed, cfg=TINY, b=1, n=7):
    "A random translator with opinions; sources with their lengths."
    model = s2s.build_seq2seq(replace(cfg, seed=seed)).to(double).eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
        model.decoder.norm.weight.copy_(3 * torch.randn(cfg.d).sign() * (.5 + torch.rand(cfg.d)))
    return model, torch.randint(3, cfg.vocabulary, (b, n)), torch.randint(2, n + 1, (b,))

def every_sentence(words, longest):
    return pad([[BOS, *inner, EOS] for k in range(longest - 1) for inner in itertools.product(range(EOS + 1, words), repeat=k)], longest)[0]

def shuffle(seed, model, b=4, i=6):
    return torch.randint(EOS + 1, model.target.num_embeddings, (b, i), generator=torch.Generator().manual_seed(seed))

@pytest.fixture(scope='module')
def shipped(): return s2s.load_seq2seq()

# ---- the language -------------------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0, 1))
def test_every_scene_has_a_sentence_and_gives_itself_back(seed, omit):
    labels = scenes(split_seeds('valid', seed, 20)).labels
    gone = (torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < omit) & ~torch.tensor([f.startswith('toy') for f in FIELDS])
    labels = labels.masked_fill(gone, -1)
    ids, n = s2s.scene_ids(labels)
    assert (n == (labels >= 0).sum(1) + 2).all() and (ids[:, 0] == BOS).all() and (ids.gather(1, n[:, None] - 1) == EOS).all()
    assert ((ids != PAD).sum(1) == n).all() and ((ids == EOS).sum(1) == 1).all()
    for row, label in zip(ids, labels):
        text = s2s.scene_words(row)
        assert torch.equal(s2s.read_scene(text), label)
        assert text.split() == [WORDS[f][v] for f, v in enumerate(label.tolist()) if v >= 0]

@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(s2s.SCENE_WORDS), max_size=11))
def test_what_is_no_sentence_is_refused(words):
    "Whatever is not refused is the sentence of what it was read as."
    text = ' '.join(words)
    try: row = s2s.read_scene(text)
    except ValueError as e: assert 'expected' in str(e) or 'describes no scene' in str(e)
    else: assert s2s.scene_words(s2s.scene_ids(row[None])[0][0]) == text

def test_words_are_all_different(): assert len(set(s2s.SCENE_WORDS)) == len(s2s.SCENE_WORDS) == 38

def test_pairs_are_what_the_parser_understands():
    texts = s2s.caption_pairs(120, 'test')
    assert len(texts) == 120 and len(set(texts)) > 100
    source, lengths, ids, words = s2s.translation_pairs(texts)
    assert torch.equal(torch.stack([s2s.read_scene(s2s.scene_words(row)) for row in ids]), parses(texts))
    assert [s2s.caption_bpe().decode(row) for row in source] == texts
    assert s2s.caption_pairs(30, heard=False) != s2s.caption_pairs(30, heard=True) and s2s.caption_pairs(30) == s2s.caption_pairs(30)
    assert torch.equal(s2s.source_ids(['A Red BALL'])[0], s2s.source_ids(['a red ball'])[0])

# ---- the model ----------------------------------------------------------------------------------------------------------------------

def torch_pair(seed=0):
    "Torch's encoder and decoder, and a `Seq2seq` with the same weights and tables of its own."
    torch.manual_seed(seed)
    cfg = replace(TINY, words=12, d=12, heads=3, hidden=20, encoder=2, decoder=3)
    reference = nn.Transformer(12, 3, 2, 3, 20, dropout=0., activation='gelu', batch_first=True, norm_first=True, dtype=double)
    with torch.no_grad():
        for p in reference.parameters(): p.add_(.2 * torch.randn_like(p))
    model = s2s.Seq2seq(cfg).to(double)
    for ours, theirs in ((model.encoder, reference.encoder), (model.decoder, reference.decoder)):
        ours.blocks, ours.norm = nn.ModuleList(map(transformer.block_from, theirs.layers)), theirs.norm
    return model, reference

def check_parity():
    model, reference = torch_pair()
    source, lengths, ids = torch.randint(3, 20, (4, 9)), torch.tensor([9, 5, 7, 2]), shuffle(0, model)
    gone = torch.arange(9) >= lengths[:, None]
    states = reference(model.embed(model.source, source), model.embed(model.target, ids), tgt_mask=~torch.ones(6, 6, dtype=torch.bool).tril(), src_key_padding_mask=gone, memory_key_padding_mask=gone)
    return agree(model(source, lengths, ids)[..., EOS:], states @ model.target.weight[EOS:].T, atol=1e-6)

@pytest.mark.filterwarnings('ignore:enable_nested_tensor')
def test_equals_torch(): assert check_parity() < 1e-10

@settings(max_examples=12, deadline=None)
@given(st.integers(4, 60), st.integers(4, 40), st.integers(1, 6), st.integers(1, 30), st.integers(1, 3), st.integers(1, 3))
def test_parameter_formula(vocabulary, words, half, hidden, encoder, decoder):
    cfg = s2s.Seq2seqCfg(vocabulary=vocabulary, words=words, d=4 * half, heads=2, hidden=hidden, encoder=encoder, decoder=decoder)
    assert s2s.seq2seq_parameters(cfg) == sum(p.numel() for p in s2s.Seq2seq(cfg).parameters())

@settings(max_examples=8, deadline=None)
@given(SEEDS)
def test_sentences_are_scored_word_by_word(seed):
    "All words at once equal one word at a time, each from its own beginning."
    model, source, lengths = stranger(seed, b=3)
    ids = torch.cat([torch.full((3, 1), BOS), shuffle(seed, model, 3, 5), torch.full((3, 1), EOS)], 1)
    ids[0, 3], ids[0, 4:] = EOS, PAD
    slow = torch.zeros(3, dtype=double)
    for b, row in enumerate(ids.tolist()):
        row = row[:row.index(EOS) + 1]
        for i in range(1, len(row)): slow[b] -= model(source[b:b + 1, :lengths[b]], lengths[b:b + 1], torch.tensor([row[:i]]))[0, -1].log_softmax(0)[row[i]]
    agree(s2s.sentence_nats(model(source, lengths, ids[:, :-1]), ids), slow, atol=1e-9)

def test_sentences_add_up_to_one():
    "Over all sentences of up to four words, and all beginnings of five that have not ended."
    model, source, lengths = stranger(3)
    ids = every_sentence(6, 6)
    of = lambda rows: model(source.expand(len(rows), -1), lengths.expand(len(rows)), rows[:, :-1])
    ended = (-s2s.sentence_nats(of(ids), ids)).exp().sum()
    open_ = torch.tensor([[BOS, *w] for w in itertools.product(range(3, 6), repeat=5)])
    agree(ended + (-s2s.sentence_nats(of(open_), open_)).exp().sum(), 1., atol=1e-9)

# ---- writing ------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=8, deadline=None)
@given(SEEDS, st.integers(1, 5))
def test_cache_changes_nothing(seed, cut):
    model, source, lengths = stranger(seed, b=4)
    ids = shuffle(seed, model)
    context, there = model.encode(source, lengths)
    whole, cache = model.decode(ids, context, there), {}
    parts = torch.cat([model.decode(ids[:, a:b], context, there, cache, a) for a, b in ((0, cut), (cut, 6))], 1)
    agree(parts[..., EOS:], whole[..., EOS:], atol=1e-9)
    assert torch.equal(s2s.greedy(model, source, lengths), s2s.greedy(model, source, lengths, cached=False))

@settings(max_examples=8, deadline=None)
@given(SEEDS, st.floats(0, 1.5))
def test_a_wide_beam_finds_the_best_sentence(seed, alpha):
    model, source, lengths = stranger(seed)
    ids = every_sentence(6, 5)
    logp = -s2s.sentence_nats(model(source.expand(len(ids), -1), lengths.expand(len(ids)), ids[:, :-1]), ids)
    score = logp / ((ids != PAD).sum(1).double() - 1)**alpha
    got = s2s.beam(model, source, lengths, 27, 5, alpha)
    assert math.isclose(got[0][0], score.max().item(), abs_tol=1e-9) and got[0][2] == [i for i in ids[score.argmax()].tolist() if i != PAD]
    for s, l, row in got:                                                          # and what it says of each is true
        at = (ids == pad([row], 5)[0]).all(1).nonzero().item()
        assert math.isclose(l, logp[at].item(), abs_tol=1e-9) and math.isclose(s, score[at].item(), abs_tol=1e-9)
    assert [g[0] for g in got] == sorted((g[0] for g in got), reverse=True)
    narrow = s2s.beam(model, source, lengths, 1, 5, alpha)
    assert narrow[0][0] <= got[0][0] + 1e-9

@settings(max_examples=6, deadline=None)
@given(SEEDS, st.integers(2, 12))
def test_greedy_writes_sentences(seed, longest):
    model, source, lengths = stranger(seed, b=5)
    ids = s2s.greedy(model, source, lengths, longest)
    assert (ids[:, 0] == BOS).all() and ids.shape[1] <= longest
    for row in ids.tolist():
        end = row.index(EOS) if EOS in row else len(row)
        assert all(i > EOS for i in row[1:end]) and all(i == PAD for i in row[end + 1:])
        if EOS in row: agree(s2s.greedy(model, source[:1], lengths[:1], longest)[0, 0], BOS)

# ---- mistakes -----------------------------------------------------------------------------------------------------------------------

def check_no_word_sees_itself():
    "Logits are unmoved by the words that come after."
    model, source, lengths = stranger(1, b=4)
    ids = shuffle(1, model)
    for i in range(1, 6):
        other = torch.cat([ids[:, :i], 3 + (ids[:, i:] - 2) % 3], 1)
        agree(model(source, lengths, ids)[:, :i, EOS:], model(source, lengths, other)[:, :i, EOS:], atol=1e-12)

def check_padding():
    "A source alone and in a batch with longer ones."
    model, source, lengths = stranger(2, b=4)
    ids = shuffle(2, model)
    alone = torch.cat([model(source[b:b + 1, :n], lengths[b:b + 1], ids[b:b + 1]) for b, n in enumerate(lengths)])
    agree(model(source, lengths, ids)[..., EOS:], alone[..., EOS:], atol=1e-9)

def check_source_matters():
    "Another source, other scores."
    model, source, lengths = stranger(4, b=2)
    ids = shuffle(4, model, 2)
    assert (model(source, lengths, ids) - model(3 + (source - 2) % 17, lengths, ids))[..., EOS:].abs().max() > 1e-3

def check_loss():
    "The loss is the chain of next words, from BOS to EOS."
    model, source, lengths = stranger(5, b=2)
    ids, words = torch.tensor([[BOS, 3, 4, 5, EOS], [BOS, 5, EOS, PAD, PAD]]), torch.tensor([5, 3])
    loss, logs = s2s.translation_loss(model, (source, lengths, ids, words))
    slow = [sum(-model(source[b:b + 1, :lengths[b]], lengths[b:b + 1], ids[b:b + 1, :i])[0, -1].log_softmax(0)[ids[b, i]] for i in range(1, n)) for b, n in enumerate(words.tolist())]
    agree(loss, torch.stack(slow) / 3, atol=1e-9)

CHECKS = {'causal': check_no_word_sees_itself, 'padding': check_padding, 'source': check_source_matters, 'loss': check_loss, 'parity': check_parity}

@pytest.mark.filterwarnings('ignore:enable_nested_tensor')
def test_checks_pass():
    for check in CHECKS.values(): check()

def unshifted(model, batch):
    source, lengths, ids, words = batch
    nats = s2s.sentence_nats(model(source, lengths, ids[:, 1:]), ids) / (words.float().mean() - 1)
    return nats, {}

def look_at_itself(self, x, context=None, mask=None, cache=None, turn=None): return TRUE_LOOK(self, x, None, None, None, turn)
TRUE_LOOK = transformer.Attention.forward

MUTANTS = {'shift missing': (s2s, 'translation_loss', unshifted, ['loss']),
           'mask off by one': (s2s, 'causal_mask', lambda n, device=None: torch.ones(n, n, dtype=torch.bool, device=device).tril(1), ['causal', 'loss', 'parity']),
           'no causal mask': (s2s, 'causal_mask', lambda n, device=None: torch.ones(n, n, dtype=torch.bool, device=device), ['causal', 'loss', 'parity']),
           'padding visible': (s2s, 'padding_mask', lambda lengths, n: torch.ones(len(lengths), 1, 1, n, dtype=torch.bool), ['padding', 'loss', 'parity']),
           'padding off by one': (s2s, 'padding_mask', lambda lengths, n: transformer.padding_mask((lengths + 1).clamp(max=n), n), ['padding', 'parity']),
           'self-attention for cross-attention': (transformer.Attention, 'forward', look_at_itself, ['source', 'parity'])}

@pytest.mark.filterwarnings('ignore:enable_nested_tensor')
@pytest.mark.parametrize('name', MUTANTS)
def test_mistakes_are_caught(name, monkeypatch):
    owner, attribute, wrong, by = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, wrong)
    for check in by:
        with pytest.raises(AssertionError): CHECKS[check]()

def test_the_end_is_read_where_it_is():
    "The state at [EOS] is at `lengths - 1`; the last column is padding, and says something else."
    model, source, lengths = stranger(6, b=4)
    lengths = torch.tensor([3, 5, 6, 7])
    state = model.encode(source, lengths)[0]
    alone = torch.cat([model.encode(source[b:b + 1, :n], lengths[b:b + 1])[0][:, -1] for b, n in enumerate(lengths)])
    agree(state[torch.arange(4), lengths - 1], alone, atol=1e-9)
    with pytest.raises(AssertionError): agree(state[:, -1], alone, atol=1e-3)
    assert s2s.scene_words(torch.tensor([BOS, 9, EOS, 10, EOS])) == s2s.SCENE_WORDS[9]          # what stands after the end is not read

def test_a_beginning_takes_its_own_past_along(monkeypatch):
    "A beam whose cache stays in the old order is caught by the list of all sentences."
    ids = every_sentence(6, 5)
    def worst():
        gap = 0.
        for seed in range(5):
            model, source, lengths = stranger(seed)
            logp = -s2s.sentence_nats(model(source.expand(len(ids), -1), lengths.expand(len(ids)), ids[:, :-1]), ids)
            true_of = {tuple(i for i in row if i != PAD): l for row, l in zip(ids.tolist(), logp.tolist())}
            gap = max(gap, *(abs(l - true_of[tuple(row)]) for _, l, row in s2s.beam(model, source, lengths, 27, 5, 1.)))
        return gap
    assert worst() < 1e-9
    true = s2s.Seq2seq.decode
    def wrong(self, ids, context, there, cache=None, start=0):
        if cache: cache.update({k: tuple(t[:1].expand(len(ids), -1, -1, -1) for t in kv) for k, kv in cache.items()})
        return true(self, ids, context, there, cache, start)
    monkeypatch.setattr(s2s.Seq2seq, 'decode', wrong)
    assert worst() > 1e-3

def test_maps_say_where_it_looks():
    model, source, lengths = stranger(7, b=3)
    ids = shuffle(7, model, 3)
    maps = s2s.cross_maps(model, source, lengths, ids)
    assert maps.shape == (2, 3, 2, 6, 7)
    agree(maps.sum(-1), 1., atol=1e-9)
    for b, n in enumerate(lengths): assert maps[:, b, ..., n:].abs().max() == 0 if n < 7 else True
    seen = []
    hook = [block.cross.register_forward_hook(lambda m, args, out: seen.append((m, args, out))) for block in model.decoder.blocks]
    model(source, lengths, ids)
    for h in hook: h.remove()
    for (layer, args, out), m in zip(seen, maps):                                  # weights times values, through the output matrix, is what the layer returned
        v = layer.qkv(args[0], args[1])[2]
        fetched = torch.einsum('bgim,bgmd->bigd', m, v).flatten(2)
        agree(layer.out(fetched), out, atol=1e-9)

# ---- training and what is shipped ---------------------------------------------------------------------------------------------------

def test_killed_and_resumed_is_the_same(tmp_path):
    def end(*stops):
        for stop in (*stops, None):
            model = s2s.build_seq2seq(QUICK)
            for i, r in enumerate(s2s.learn_seq2seq(model, QUICK, tmp_path / '-'.join(map(str, stops or ['whole'])), resume=True, progress=False)):
                if stop is not None and i + 1 == stop: break
        return model.state_dict()
    whole = end()
    for stops in ((3,), (1, 4)):
        assert all(torch.equal(v, whole[k]) for k, v in end(*stops).items())

def test_it_learns_and_reports(monkeypatch):
    monkeypatch.setattr(s2s, 'examine_seq2seq', lambda model: {'test, said': torch.tensor([0., 1.])})
    model, facts = s2s.train_seq2seq('seq2seq', replace(QUICK, steps=50, pool=600, batch=16, lr=8e-3), progress=False)
    assert facts['log']['nats'][-1] < .8 * facts['log']['nats'][0] and facts['evaluation']['test, said'] == figure(torch.tensor([0., 1.]))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training

def test_shipped_figures_hold_and_keep_the_promise(shipped):
    "More than 99 % of sentences right in every word, on both splits, in both kinds of words; recomputed on other captions within the interval."
    model, facts = shipped
    assert set(facts['evaluation']) == {f'{split}, {kind}' for split in ('test', 'heldout') for kind in ('said', 'heard')}
    for f in facts['evaluation'].values(): assert f['n'] >= 5_000 and wilson(round(f['mean'] * f['n']), f['n'])[0] > .99
    again = {k: figure(v) for k, v in s2s.examine_seq2seq(model, 300, 700_000).items()}
    assert check_figures('seq2seq', facts['evaluation'], again) < 5
    file = Path(latentcourse.__file__).parent / 'checkpoints/seq2seq.safetensors'
    assert not file.exists() or file.stat().st_size <= 1.5e6

def test_shipped_translations(shipped):
    model, _ = shipped
    for text, want in (('A Red Ball', 'ball red'), ('a blue mug below a green car, on sand', 'above sand car green mug blue'), ('a book being read by a pink bear', 'reading bear pink big book plain small')):
        assert s2s.translate(model, [text]) == [want]
    long_batch = s2s.translate(model, ['a red ball', s2s.caption_pairs(1, omits=(0.,), heard=False)[0]])
    assert long_batch[0] == 'ball red'

def test_one_wrong_word_is_a_wrong_sentence(shipped, monkeypatch):
    model, _ = shipped
    texts = s2s.caption_pairs(40, 'test', 800_000, heard=False)
    assert s2s.right_sentences(model, texts).all() or s2s.right_sentences(model, texts).double().mean() > .9
    true = s2s.greedy
    def one_word_off(*args, **named):
        ids = true(*args)
        ids[0, 1] = 3 + (ids[0, 1] - 2) % 35
        return ids
    before = s2s.right_sentences(model, texts)
    monkeypatch.setattr(s2s, 'greedy', one_word_off)
    assert s2s.right_sentences(model, texts).sum() == before.sum() - before[0].int()
    monkeypatch.setattr(s2s, 'greedy', lambda *a: F.pad(true(*a)[:, :-1], (0, 0)))                  # the longest lack their end
    assert s2s.right_sentences(model, texts).sum() < before.sum()

def test_the_command_line_knows_it():
    from latentcourse.cli import MODELS, config_of
    cfg, train = config_of('seq2seq', 'CPU', {'steps': 7})
    assert cfg == replace(s2s.SEQ2SEQ['CPU'], steps=7) and train is s2s.train_seq2seq
    probe = MODELS['seq2seq'][3](cfg)
    assert probe(s2s.build_seq2seq(replace(cfg, d=8, heads=2, hidden=8))).isfinite().all()

# ---- refusals -----------------------------------------------------------------------------------------------------------------------

def test_refusals():
    model, source, lengths = stranger(0, b=2)
    ids = shuffle(0, model, 2)
    for bad in (source.double(), source[0], source[:, :0]):
        with pytest.raises(ValueError): model(bad, lengths, ids)
    with pytest.raises(ValueError, match='expected 0 to 19'): model(source + 20, lengths, ids)
    with pytest.raises(ValueError, match='at most 16'): model(source, lengths, ids.repeat(1, 3))
    with pytest.raises(ValueError, match='expected 1 to 7'): model(source, lengths + 7, ids)
    with pytest.raises(ValueError, match='one row of logits'): s2s.sentence_nats(torch.zeros(2, 6, 6), ids)
    with pytest.raises(ValueError, match='room for BOS'): s2s.greedy(model, source, lengths, 1)
    with pytest.raises(ValueError, match='one source'): s2s.beam(model, source, lengths)
    with pytest.raises(ValueError, match='width'): s2s.beam(model, source[:1], lengths[:1], 0)
    with pytest.raises(ValueError, match='alpha'): s2s.beam(model, source[:1], lengths[:1], alpha=-1.)
    with pytest.raises(ValueError, match='a word or more'): s2s.beam_score(-1., 0)
    with pytest.raises(TypeError, match='list of captions'): s2s.source_ids('a red ball')
    with pytest.raises(TypeError, match='list of captions'): s2s.source_ids([3])
    with pytest.raises(ValueError): s2s.source_ids([])
    with pytest.raises(ValueError, match='whole numbers above 0'): s2s.caption_pairs(0)
    with pytest.raises(ValueError, match='whole numbers above 0'): s2s.caption_pairs(5, omits=())
    with pytest.raises(ValueError, match='unknown split'): s2s.caption_pairs(5, 'attic')
    with pytest.raises(ValueError, match='not in the vocabulary'): s2s.translation_pairs(['a red unicorn'])
    with pytest.raises(ValueError, match='special tokens'): s2s.seq2seq_parameters(replace(TINY, words=3))
    with pytest.raises(TypeError, match='a sentence is a str'): s2s.read_scene(['bear'])
    with pytest.raises(ValueError, match='describes no scene'): s2s.read_scene('')
    with pytest.raises(ValueError, match='cannot stand here'): s2s.read_scene('unicorn')
    with pytest.raises(ValueError, match='expected 0 to 37'): s2s.scene_words(torch.tensor([99]))
    with pytest.raises(ValueError, match='expected shape'): s2s.scene_ids(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match='heads'): s2s.build_seq2seq(replace(TINY, heads=3))
