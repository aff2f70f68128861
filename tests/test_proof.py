"`make proof`: perturb the function under each numbered equation, and a check that names the equation must notice."
import ast, re
import pytest
from course import CHAPTERS, code_of, name_of, text_of, tree_of

def equations(path):
    "Number -> label of a chapter's equations."
    return {tag: label for label, tag in re.findall(r'<span id="(eq-[\w-]+)"></span>\s*\$\$(?:(?!\$\$).)*\\tag\{([^}]*)\}', text_of(path), re.S)}

def implemented(path):
    "(function, label) for each function whose docstring names an equation of its chapter."
    numbers = equations(path)
    for c in code_of(path):
        for n in tree_of(c['source']).body:
            if not isinstance(n, ast.FunctionDef) or ast.unparse(n.returns or ast.Constant(0)) == 'None': continue
            for number in re.findall(r'eqs?\. \(([\d.]+)\)', ast.get_docstring(n) or ''):
                if number in numbers: yield n.name, numbers[number]

def off(value):
    "The same result, one per cent off; a sign of life for whole numbers and truth values."
    import torch
    if isinstance(value, tuple): return tuple(off(v) for v in value)
    if torch.is_tensor(value): return ~value if value.dtype == torch.bool else value * 1.01 + 1e-3 if value.is_floating_point() else value + 1
    if isinstance(value, bool): return not value
    if isinstance(value, str): return value + ' and so on'
    return value + 1 if isinstance(value, int) else value * 1.01 + 1e-3 if isinstance(value, float) else value

def run_until(path, name, label):
    "Run a chapter's cells up to the last check of `label`, with function `name` perturbed; True if a check raised."
    cells = [c['source'] for c in code_of(path)]
    checks = [i for i, s in enumerate(cells) if re.search(rf'''['"]{label}['"]''', s)]
    space, there = {'__name__': '__main__', 'display': lambda *a: None}, False
    for i, source in enumerate(cells[:max(checks) + 1]):
        try: exec(compile(tree_of(source), f'{name_of(path)} cell {i}', 'exec'), space)
        except Exception:
            if there: return True                                        # a check raised, or the page broke before it
            raise
        if not there and callable(space.get(name)) and re.search(rf'^def {name}\(', source, re.M):
            true, there = space[name], True
            space[name] = lambda *a, **k: off(true(*a, **k))
    return False

PAIRS = [(p, f, label) for p in CHAPTERS for f, label in implemented(p)]

@pytest.mark.proof
@pytest.mark.parametrize('path, name, label', PAIRS, ids=[f'{name_of(p)}-{f}-{label}' for p, f, label in PAIRS])
def test_a_perturbed_function_is_noticed(path, name, label, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr('matplotlib.pyplot.show', lambda *a, **k: None)
    assert run_until(path, name, label), f'{name} is off by one per cent and no check of {label} noticed'
