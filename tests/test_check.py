"Instruments that must not be fooled: agreement, standard errors, claims and their records."
import json, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from latentcourse.lib.check import CHECKED, MIME, VERDICTS, Claim, agree, claim, claims_of, claims_table, plain, refuses, show_value, z_score

quick = settings(max_examples=60, deadline=None)
finite = st.floats(-1e6, 1e6)
values = st.lists(finite, min_size=1, max_size=8)

@quick
@given(values, st.floats(1e-9, 1e3))
def test_agree_is_the_largest_difference(x, gap):
    x = torch.tensor(x, dtype=torch.float64)
    assert agree(x, x) == 0
    far = x.clone(); far[-1] += gap
    assert agree(far, x, atol=2 * gap + 1e-6) == pytest.approx(gap, rel=1e-4, abs=1e-8)
    with pytest.raises(AssertionError, match='differ by'): agree(far, x, atol=gap / 2 - 1e-9 if gap > 1e-8 else 0)

@pytest.mark.parametrize('got, want', [
    ([1., math.nan], [1., 1.]), ([1.], [math.nan]), ([], []), (torch.ones(3), torch.ones(1)), (torch.ones(2, 1), torch.ones(2)), (1., torch.ones(3)),
    ([math.inf], [-math.inf]), ([math.inf], [1.]), (2**60, 2**60 + 1), (True, False), (1 + 1j, 1.)])
def test_agree_refuses(got, want):
    with pytest.raises(AssertionError): agree(got, want)

@pytest.mark.parametrize('got, want', [(torch.ones(3), 1), (np.ones((2, 2)), torch.ones(2, 2)), ([math.inf, 1.], [math.inf, 1.]), (2**60, 2**60), (1 + 1j, 1 + 1j), (torch.ones(3).bfloat16(), torch.ones(3)),
                                       (torch.ones(2, requires_grad=True), [1, 1]), (True, 1)])
def test_agree_accepts(got, want): assert agree(got, want) == 0

@pytest.mark.parametrize('bad', [dict(got='a', want=1), dict(got=None, want=1), dict(got=object(), want=1), dict(got=[[1], [1, 2]], want=1), dict(got=1, want=1, atol=-1), dict(got=1, want=1, atol=math.nan),
                                 dict(got=1, want=1, atol='x'), dict(got=1, want=1, eq='3.4'), dict(got=1, want=1, eq=3)])
def test_agree_wants_numbers(bad):
    with pytest.raises((TypeError, ValueError)): agree(**bad)

def test_python_numbers_are_not_rounded():
    third = torch.tensor(1, dtype=torch.float64) / 3
    assert agree(1/3, third, atol=0) == agree([[1/3, 2/3]], torch.stack([third, 2 * third])[None], atol=0) == agree([[1/3 + 2j/3]], torch.complex(third, 2 * third)[None, None], atol=0) == 0
    assert agree(.1 + 1e-9, .1) == pytest.approx(1e-9, rel=1e-6) and agree([1, .1], [1., .1 + 1e-12]) == pytest.approx(1e-12, rel=1e-3)
    assert agree(torch.tensor(.1), .1) == pytest.approx(abs(np.float32(.1).astype(float) - .1))   # a tensor keeps its own precision
    assert z_score([.1 + 1e-9, .1 + 3e-9], .1) == pytest.approx(2, rel=1e-4)

def test_equations_are_remembered():
    agree([1., 2.], [1., 2. + 1e-6], eq='eq-of-this-test')
    assert CHECKED['eq-of-this-test'] == pytest.approx(1e-6, rel=.1)
    with pytest.raises(AssertionError, match='eq-of-that-test'): agree(1., 2., eq='eq-of-that-test')
    assert 'eq-of-that-test' not in CHECKED

def test_refuses():
    def wrong(): raise ValueError('no')
    assert refuses(wrong) == 'ValueError: no'
    with pytest.raises(AssertionError, match='expected a refusal'): refuses(lambda: 1)
    with pytest.raises(ZeroDivisionError): refuses(lambda: 1 / 0)

def test_z_is_standard_normal():
    draws = torch.randn(400, 2000, generator=torch.Generator().manual_seed(0)) * 3 + 7
    z = torch.tensor([z_score(d, 7.) for d in draws])
    assert abs(z.mean()) < .25 and abs(z.std() - 1) < .15 and z_score(draws[0], 6.) > 5

@pytest.mark.parametrize('samples, want', [([1.], 1.), ([], 1.), ([[1., 2.]], 1.), ([1., math.nan], 1.), ([1., 2.], math.inf), ([1., 1.], 1.), ('ab', 1.), ([1., 2.], None)])
def test_z_refuses(samples, want):
    with pytest.raises((TypeError, ValueError)): z_score(samples, want)

json_like = st.recursive(st.booleans() | st.integers(-10**9, 10**9) | finite | st.text(min_size=1, max_size=9), lambda s: st.lists(s, min_size=1, max_size=3) | st.dictionaries(st.text(max_size=5), s, min_size=1, max_size=3), max_leaves=8)

@quick
@given(st.text(min_size=1).filter(str.strip), st.sampled_from(sorted(VERDICTS)), json_like, st.lists(st.integers(0, 99), max_size=3))
def test_claims_come_back(tmp_path_factory, text, verdict, measured, seeds):
    c = Claim('3.a', text, verdict, measured, seeds, 'someone, 2026')
    bundle = c._repr_mimebundle_()
    page = tmp_path_factory.mktemp('page') / 'page.ipynb'
    page.write_text(json.dumps({'cells': [{'cell_type': 'markdown'}, {'outputs': [{'text': 'x'}, {'data': bundle}]}]}), encoding='utf-8')
    [back] = claims_of(page)
    assert back == json.loads(json.dumps(bundle[MIME])) and len(claims_table([back]).split('\n')) == 3
    assert not {'<script', '</div><b>'} & {bundle['text/html']} and bundle['text/html'].count('<div') == bundle['text/html'].count('</div>')

def test_markup_is_escaped():
    html = Claim('1', '<script>x</script>', 'confirmed', '<b>', source='<i>').html()
    assert '<script' not in html and '<b><b>' not in html and '<i>' not in html

@pytest.mark.parametrize('bad', [dict(row='x'), dict(row=''), dict(row=1.5), dict(text=''), dict(text=None), dict(verdict='true'), dict(verdict='cited'), dict(verdict='cited', source=' '), dict(measured=None), dict(measured=math.nan),
                                 dict(measured={'a': math.inf}), dict(measured=[]), dict(measured={}), dict(measured=''), dict(measured=object()), dict(measured=[None]), dict(measured=torch.tensor([1., math.nan])), dict(seeds=['a']), dict(seeds=1.5)])
def test_claim_refuses(bad):
    with pytest.raises((TypeError, ValueError)): Claim(**{**dict(row='1', text='it is so', verdict='confirmed', measured=1.), **bad})

def test_claim_outside_a_notebook(capsys):
    claim('17', 'it is so', 'confirmed', {'gap': np.float32(.5), 'n': torch.tensor(3_000)}, seeds=0)
    assert capsys.readouterr().out.strip() == '[✓ confirmed] row 17: it is so\n    measured: gap 0.5, n 3,000 · seeds 0'

def test_rows_are_sorted():
    rows = [dict(row=r, text='a|b', verdict='confirmed', measured=1, source=None) for r in ('N2', '10', '3.b', '3.a', '2')]
    assert [line.split('|')[1].strip() for line in claims_table(rows).split('\n')[2:]] == ['2', '3.a', '3.b', '10', 'N2']

@pytest.mark.parametrize('contents', [None, b'', b'{}', b'[1]', b'\xff\xfe', b'{"cells": [{"outputs": [{"data": {"%s": {"row": "1"}}}]}]}' % MIME.encode()])
def test_claims_of_refuses(tmp_path, contents):
    page = tmp_path / 'page.ipynb'
    if contents is not None: page.write_bytes(contents)
    with pytest.raises((TypeError, ValueError)): claims_of(page)
    with pytest.raises(ValueError): claims_of(tmp_path)

def test_numbers_as_read():
    assert show_value(plain({'n': 3145728, 'x': 1 / 3, 'both': (1, 2.), 'ok': True})) == 'n 3,145,728, x 0.3333, both 1 / 2, ok True'
