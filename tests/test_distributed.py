"Two processes take the same optimisation path as one with the doubled batch."
import pytest
import processes_child
from two_processes import by_one_and_two, apart

@pytest.fixture(scope='module')
def runs(tmp_path_factory): return by_one_and_two(processes_child, tmp_path_factory)

def test_as_many_as_asked(runs): assert {n: r['straight'][1]['processes'] for n, r in runs.items()} == {1: 1, 2: 2}

def test_same_path(runs):
    one, two = runs[1]['straight'][0], runs[2]['straight'][0]
    assert apart(one, two) < 1e-5 and one['loss'][-1] < one['loss'][0]

def test_batches_that_come_shared(runs): assert apart(runs[1]['straight'][0], runs[2]['presliced'][0]) < 1e-5

@pytest.mark.parametrize('n', [1, 2])
def test_resumed_to_the_same_bits(runs, n): assert apart(runs[n]['straight'][0], runs[n]['resumed'][0]) == 0

def test_unused_parameters_stay(runs):
    "What no process reads has no gradient, so weight decay leaves it alone on two processes as it does on one."
    for n in (1, 2):
        state = runs[n]['unused'][0]
        assert apart({k: state[f'unread.{k}'] for k in ('weight', 'bias')}, {k: state[f'first.unread.{k}'] for k in ('weight', 'bias')}) == 0
        assert apart({'weight': state['read.weight']}, {'weight': state['first.read.weight']}) > .01
    assert apart(runs[1]['unused'][0], runs[2]['unused'][0]) < 1e-5

def test_gradient_of_one_process_alone(runs):
    "A parameter that one of two processes reads gets half its gradient, one that none reads gets none."
    one, two = runs[1]['on_one'][0], runs[2]['on_one'][0]
    assert apart(two, {k: g / 2 if k.startswith('first') else g for k, g in one.items()}) < 1e-5 and (two['none.weight'] == -1e6).all() and (two['first.weight'] != 0).all()
