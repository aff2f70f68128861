"Byte-level BPE: any text comes back, the rules are the `tokenizers` library's, bad input is refused, and the classic mistakes are noticed."
import json, random, unicodedata
from collections import Counter
from functools import cache
import pytest, torch
from hypothesis import given, settings, strategies as st
from latentcourse.tokens import (BOS, BYTE_ID, BYTES, EOS, PAD, SPECIALS, Bpe, apply_merges, as_bytes, byte_letters, code_bits, count_pieces, learn_merges,
                                 load_bpe, merge_at, pad, pair_counts, pieces, places, replace_pair, said, save_bpe, spell, toybox_bpe, unspell)

CORPUS = count_pieces(said(1000))
BPE = Bpe(learn_merges(CORPUS, 400))
FEWEST = len(SPECIALS) + 256
WORDS = st.lists(st.text('ab ', max_size=12), min_size=1, max_size=12)
KNOWN = st.text(st.characters(exclude_categories=('Cs', 'Cn')), max_size=60)                # characters that this Python's Unicode lists

# ---- any text comes back ----------------------------------------------------------------------------------------------------------

@given(st.text(max_size=200))
def test_decode_is_the_inverse_of_encode(text):
    assert ''.join(pieces(text)) == text
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.decode(torch.tensor(BPE.encode(text), dtype=torch.int64)) == text
    assert all(len(SPECIALS) <= i < len(BPE) for i in BPE.encode(text))

@given(st.lists(st.text(max_size=30), min_size=1, max_size=6))
def test_a_batch_holds_its_texts(texts):
    ids, lengths = BPE.batch(texts)
    assert ids.dtype == torch.int64 and ids.shape == (len(texts), int(lengths.max()))
    for text, row, n in zip(texts, ids, lengths.tolist()):
        assert row[0] == BOS and row[n - 1] == EOS and (row[n:] == PAD).all() and (row[:n] != PAD).all()
        assert BPE.decode(row) == text

@given(st.lists(st.integers(0, 399), max_size=30))
def test_any_ids_decode(ids): assert isinstance(BPE.decode(ids), str)

@given(st.binary(max_size=50))
def test_letters_of_bytes(b): assert unspell(spell(b)) == b and len(spell(b)) == len(b)

@pytest.mark.parametrize('text', ['<pad>', '<bos>', '<eos>', 'a<eos>b'])
def test_no_text_is_special(text): assert not {PAD, BOS, EOS} & set(BPE.encode(text))

def test_every_byte_has_its_id(): assert sorted(BYTE_ID) == list(range(256)) and sorted(BYTE_ID.values()) == list(range(3, FEWEST)) and len(set(BYTES)) == 256

def test_memory_is_bounded_and_harmless():
    small, texts = Bpe(BPE.merges, memory=5), said(50)
    assert [small.encode(t) for t in texts] == [BPE.encode(t) for t in texts]
    assert len(small.known) <= 5

def test_a_long_piece_takes_no_square_time():
    text = 'ab' * 50_000
    assert BPE.decode(BPE.encode(text)) == text

# ---- the rule ---------------------------------------------------------------------------------------------------------------------

def learn_by_the_rule(corpus, size, least):
    tokens, words, merges = [s.encode() for s in SPECIALS] + list(BYTES), [[BYTE_ID[b] for b in w] for w in corpus], []
    while len(tokens) < size:
        seen = Counter()
        for w, m in zip(words, corpus.values()):
            for p in zip(w, w[1:]): seen[p] += m
        best = min(seen, key=lambda p: (-seen[p], p), default=None)
        if best is None or seen[best] < least: break
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == best: w[i:i + 2] = [len(tokens)]
                i += 1
        merges.append((tokens[best[0]], tokens[best[1]]))
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return merges

@given(WORDS, st.integers(0, 40), st.integers(1, 3))
def test_fast_training_follows_the_rule(texts, more, least):
    corpus = count_pieces(texts)
    if not corpus: return
    merges = learn_merges(corpus, FEWEST + more, least)
    assert merges == learn_by_the_rule(corpus, FEWEST + more, least)
    assert len({a + b for a, b in merges}) == len(merges)                                   # no token is made twice
    made = Bpe(merges)
    assert all(made.decode(made.encode(t)) == t for t in texts)

@given(st.lists(st.integers(0, 2), max_size=30), st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_changes_are_the_difference_of_the_counts(word, pair):
    after, changes = replace_pair(word, pair, 9)
    want = Counter(pair_counts([after], [1]))
    want.subtract(pair_counts([word], [1]))
    got = Counter()
    for p, sign in changes: got[p] += sign
    for p in set(want) | set(got):
        if p != pair: assert got[p] == want[p], p

@given(st.lists(st.integers(0, 2), max_size=30), st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_what_a_merge_creates_holds_the_new_token(word, pair):
    "So a pair of two old tokens never comes back."
    after, changes = replace_pair(word, pair, 9)
    assert all(9 in p for p, sign in changes if sign > 0)
    assert pair[0] == pair[1] or pair not in zip(after, after[1:])

def test_rows_of_english_get_longer_from_words_to_sub_words_to_characters():
    from pydoc_data.topics import topics
    manual = list(topics.values())[::4]
    made = Bpe(learn_merges(count_pieces(manual[::2]), 10_000))
    words, tokens, letters = (sum(len(f(t)) for t in manual[1::2]) for f in (pieces, made.encode, list))
    assert 1.05 * words < tokens < letters / 2

@given(WORDS)
def test_books_stay_right(texts):
    words, times = [list(t.encode()) for t in texts], [1 + i % 3 for i in range(len(texts))]
    seen = Counter(pair_counts(words, times))
    if not seen: return
    pair = min(seen)
    merge_at(places(words)[pair], pair, 300, words, times, seen)
    fresh = pair_counts(words, times)
    assert all(fresh.get(p, 0) == n for p, n in seen.items() if p != pair)

@given(st.lists(st.integers(0, 1), max_size=40))
def test_merges_apply_by_rank_then_from_the_left(word):
    rules = {(0, 0): (0, 2), (2, 1): (1, 3), (0, 1): (2, 4), (3, 0): (3, 5), (2, 2): (4, 6)}
    want = list(word)
    while fits := [(rules[p][0], i) for i, p in enumerate(zip(want, want[1:])) if p in rules]:
        i = min(fits)[1]
        want[i:i + 2] = [rules[want[i], want[i + 1]][1]]
    assert apply_merges(word, rules) == want

def test_training_reproduces_the_words_it_was_trained_on():
    full = Bpe(learn_merges(CORPUS, 10_000, least=1))
    assert all(len(full.encode_piece(w.decode())) == 1 for w in CORPUS)

def test_code_bits():
    assert code_bits([0, 1] * 8) == 16 and code_bits([5] * 9) == 0
    with pytest.raises(ValueError): code_bits([])

# ---- the library ------------------------------------------------------------------------------------------------------------------

def library(texts, size, least):
    tk = pytest.importorskip('tokenizers')
    made = tk.Tokenizer(tk.models.BPE())
    made.pre_tokenizer, made.decoder = tk.pre_tokenizers.ByteLevel(add_prefix_space=False), tk.decoders.ByteLevel()
    made.train_from_iterator(texts, tk.trainers.BpeTrainer(vocab_size=size, min_frequency=least, show_progress=False, special_tokens=list(SPECIALS),
                                                           initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet()))
    made.encode_special_tokens = True
    return made

def same_rules(ours, theirs):
    merges = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m) for m in json.loads(theirs.to_str())['model']['merges']]
    vocabulary = {(SPECIALS[i] if i < len(SPECIALS) else spell(t)): i for i, t in enumerate(ours.tokens)}
    return vocabulary == theirs.get_vocab() and [(spell(a), spell(b)) for a, b in ours.merges] == merges

@settings(deadline=None)
@given(st.lists(st.one_of(st.text('ab \n', max_size=20), KNOWN), min_size=1, max_size=12), st.integers(0, 60), st.integers(1, 3))
def test_training_equals_the_library(texts, more, least):
    corpus = count_pieces(texts)
    if not corpus: return
    ours, theirs = Bpe(learn_merges(corpus, FEWEST + more, least)), library(texts, FEWEST + more, least)
    assert same_rules(ours, theirs)
    for t in texts: assert theirs.encode(t).ids == ours.encode(t)

def test_ten_thousand_captions_equal_the_library():
    texts = said(10_000)
    ours, theirs = Bpe(learn_merges(count_pieces(texts), 512)), library(texts, 512, 2)
    assert same_rules(ours, theirs)
    assert [ours.encode(t) for t in texts] == [e.ids for e in theirs.encode_batch(texts)]

@cache
def trained(): return library(said(1000), 400, 2)

@settings(deadline=None, max_examples=300)
@given(KNOWN)
def test_arbitrary_unicode_equals_the_library(text):
    theirs = trained()
    assert theirs.encode(text).ids == BPE.encode(text)
    assert theirs.decode(BPE.encode(text)) == text

# ---- what is refused --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bad', [None, 3, b'ab', ['a'], 1.5])
def test_only_text_is_encoded(bad):
    with pytest.raises(TypeError): BPE.encode(bad)
    with pytest.raises(TypeError): pieces(bad)

def test_half_a_surrogate_pair_is_refused():
    for bad in ('\ud800', 'a\udfff', '\ud83e text'):
        with pytest.raises(ValueError, match='surrogate'): BPE.encode(bad)
    with pytest.raises(ValueError, match='surrogate'): as_bytes('\ud800')

@pytest.mark.parametrize('bad, error', [([-1], ValueError), ([400], ValueError), ([1.], TypeError), (['a'], TypeError), ([True], TypeError),
                                        (torch.tensor([1.]), TypeError), (torch.tensor([[3, 4]]), TypeError), (torch.tensor([float('nan')]), TypeError)])
def test_bad_ids_are_refused(bad, error):
    with pytest.raises(error): BPE.decode(bad)

@pytest.mark.parametrize('size', [FEWEST - 1, 0, -5, 300., True, None, '300'])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError): learn_merges(CORPUS, size)

def test_empty_and_wrong_corpora_are_refused():
    with pytest.raises(ValueError): learn_merges({}, 300)
    with pytest.raises(TypeError): count_pieces('one text')
    with pytest.raises(TypeError): count_pieces([3])
    for bad in ([], 'one text', b'x'):
        with pytest.raises(ValueError): BPE.batch(bad)
    with pytest.raises(ValueError): pad([])
    with pytest.raises(TypeError): pad([[1]], length=2.5)
    with pytest.raises(ValueError, match='at most 3'): BPE.batch(['a red ball'], length=3)
    with pytest.raises(ValueError): unspell('a b')
    with pytest.raises(ValueError): pair_counts([[1, 2]], [])

@pytest.mark.parametrize('merges', [[(b'ab', b'c')], [(b'a', b'b'), (b'a', b'b')], [(b'a', b'')]])
def test_impossible_merges_are_refused(merges):
    with pytest.raises(ValueError): Bpe(merges)

def test_fixed_length(): assert BPE.batch(['a', 'a red ball'], length=20)[0].shape == (2, 20)

def test_files(tmp_path):
    save_bpe(BPE, tmp_path / 'bpe.json')
    again = load_bpe(tmp_path / 'bpe.json')
    assert again.merges == BPE.merges and again.tokens == BPE.tokens
    good = json.loads((tmp_path / 'bpe.json').read_text(encoding='utf-8'))
    for i, text in enumerate(['', '{', '[]', 'null', json.dumps(good | {'specials': ['<s>']}), json.dumps(good | {'merges': ['ab']}), json.dumps(good | {'merges': [3]}),
                              json.dumps(good | {'merges': None}), json.dumps(good | {'merges': ['x yz']})]):
        (tmp_path / f'{i}.json').write_text(text, encoding='utf-8')
        with pytest.raises(ValueError): load_bpe(tmp_path / f'{i}.json')
    with pytest.raises(ValueError): load_bpe(tmp_path / 'none.json')
    with pytest.raises(ValueError): load_bpe(tmp_path)

def test_the_shipped_one():
    bpe = load_bpe()
    assert bpe.merges == toybox_bpe().merges
    assert all(len(bpe.encode_piece(p)) == 1 for t in said(500, 'valid') for p in pieces(t))

# ---- mutations that must be caught (N9) -------------------------------------------------------------------------------------------

def reference(): return [tuple(m) for m in learn_by_the_rule(CORPUS, 400, 2)]

def test_ties_the_other_way_give_other_merges():
    words, tokens = [[BYTE_ID[b] for b in w] for w in CORPUS], [s.encode() for s in SPECIALS] + list(BYTES)
    merges = []
    for _ in range(400 - FEWEST):
        seen = pair_counts(words, list(CORPUS.values()))
        a, b = max(seen, key=lambda p: (seen[p], p))
        words = [replace_pair(w, (a, b), len(tokens))[0] for w in words]
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
    assert merges != reference() == BPE.merges

def test_multiplicities_matter(): assert learn_merges(dict.fromkeys(CORPUS, 2), 400) != BPE.merges

def test_order_of_the_merges_matters():
    longest = {p: (-r, new) for p, (r, new) in BPE.rules.items()}                            # newest rule first
    word = [BYTE_ID[b] for b in b' yellow']
    assert any(apply_merges([BYTE_ID[b] for b in w], longest) != list(BPE.encode_piece(w.decode())) for w in CORPUS), word

def test_old_counts_in_the_heap_are_noticed(monkeypatch):
    import latentcourse.tokens as m
    text = __import__('inspect').getsource(learn_merges).replace('if -n != seen[pair]:', 'if False:')
    space = dict(vars(m)); exec(text, space)
    assert space['learn_merges'](CORPUS, 450) != learn_merges(CORPUS, 450)
