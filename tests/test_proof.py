"`make proof`: perturb the function under each numbered equation, and a check that names the equation must notice."
import ast, contextlib, linecache, re
from functools import lru_cache
import pytest
from course import CHAPTERS, code_of, name_of, text_of, tree_of

def equations(path):
    "Number -> label of a chapter's equations."
    return {tag: label for label, tag in re.findall(r'<span id="(eq-[\w-]+)"></span>\s*\$\$(?:(?!\$\$).)*\\tag\{([^}]*)\}', text_of(path), re.S)}

def implemented(path):
    "(function, label) for each function or method whose docstring names an equation of its chapter; a method is 'Class.method'."
    numbers = equations(path)
    for c in code_of(path):
        for top in tree_of(c['source']).body:
            inner = [(f'{top.name}.{n.name}', n) for n in top.body if isinstance(n, ast.FunctionDef)] if isinstance(top, ast.ClassDef) else []
            for name, n in ([(top.name, top)] if isinstance(top, ast.FunctionDef) else inner):
                if ast.unparse(n.returns or ast.Constant(0)) == 'None': continue
                named = re.findall(r'eqs?\.((?:\s*(?:,|and|to)?\s*\([\w.]+\))+)', ast.get_docstring(n) or '')
                for number in re.findall(r'\(([\w.]+)\)', ' '.join(named)):
                    if number in numbers: yield name, numbers[number]

def off(value, by):
    "The same result, a little off: `by` for each floating-point number; a sign of life for whole numbers, truth values and words."
    import torch
    if torch.is_tensor(value): return by(value) if value.is_floating_point() or value.is_complex() else ~value if value.dtype == torch.bool else value + 1
    if isinstance(value, tuple) and hasattr(value, '_fields'): return type(value)(*(off(v, by) for v in value))
    if isinstance(value, (tuple, list)): return type(value)(off(v, by) for v in value)
    if isinstance(value, dict): return {k: off(v, by) for k, v in value.items()}
    if hasattr(value, '__next__'): return (off(v, by) for v in value)
    if isinstance(value, bool): return not value
    if isinstance(value, str): return value + ' and so on'
    return value + 1 if isinstance(value, int) else by(value) if isinstance(value, float) else value

PERTURBATIONS = {'one per cent': lambda x: x * 1.01 + 1e-3, 'sign': lambda x: -x}

class Noticed(BaseException): "A check of the equation failed."

def watched(agree, label, seen):
    "`agree` that notes the equations it was asked about. With a label it speaks for this equation alone: others may fail while it is perturbed."
    def agree_watched(got, want, atol=1e-5, eq=None):
        seen.add(eq)
        try: return agree(got, want, atol, eq)
        except AssertionError:
            if label is None: raise
            if eq == label: raise Noticed from None
            return 0.
    return agree_watched

@contextlib.contextmanager
def perturbed(space, name, by):
    "The function is off while this lasts; then everything the cells can see is as it was."
    from latentcourse.lib.state import rng_state, set_rng_state
    def forget():
        for v in list(space.values()): getattr(v, 'cache_clear', int)()
    kept, drawn, (owner, _, method) = dict(space), rng_state(), name.partition('.')
    true = getattr(space[owner], method) if method else space[name]
    def wrong(*a, **k): return off(true(*a, **k), by)
    for k in ('cache_clear', 'cache_info'):                              # a page may ask a cached function to forget
        if hasattr(true, k): setattr(wrong, k, getattr(true, k))
    forget()
    if method: setattr(space[owner], method, wrong)
    else: space[name] = wrong
    try: yield
    finally:
        if method: setattr(kept[owner], method, true)
        space.clear(); space.update(kept); forget(); set_rng_state(drawn)

class ChecksAlone(ast.NodeTransformer):
    "A cell without its plain `assert`s, which name no equation, and without the definition that is perturbed."
    def __init__(self, name): self.name = name.split('.')[0]
    def visit_Assert(self, node): return ast.copy_location(ast.Pass(), node)
    def visit_Module(self, node):
        node.body = [n for n in node.body if getattr(n, 'name', None) != self.name]
        return self.generic_visit(node)

@lru_cache(None)
def noticed(path):
    """(function, label) -> names of the perturbations that a check of the equation noticed. The chapter runs once, as it is; after each cell that
    checked an equation, this cell alone runs again with the function off, once for each function and perturbation that nothing has noticed yet."""
    import matplotlib.pyplot as plt
    from latentcourse.lib.check import agree
    pairs, found = list(dict.fromkeys(implemented(path))), {}
    last = max(i for i, c in enumerate(code_of(path)) if any(label in c['source'] for _, label in pairs))
    space, defined = {'__name__': '__main__', 'display': lambda *a: None}, set()
    for i, c in enumerate(code_of(path)[:last + 1]):
        if re.search(r'^#\|\s*eval:\s*false', c['source'], re.M): continue
        tree, seen = tree_of(c['source']), set()
        file = f'{name_of(path)} cell {i}'
        code = lambda t: compile(t, file, 'exec')
        linecache.cache[file] = (len(c['source']), None, c['source'].splitlines(True), file)  # a study marks the code of its function
        if space.get('agree'): space['agree'] = watched(agree, None, seen)
        before = dict(space)
        exec(code(tree), space)
        defined |= {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for name, label in pairs:
            for kind, by in PERTURBATIONS.items():
                if label not in seen or name.split('.')[0] not in defined or kind in found.setdefault((name, label), set()): continue
                after = dict(space)
                space.clear(); space.update(before | {k: v for k, v in after.items() if k == name.split('.')[0]})
                with perturbed(space, name, by):
                    space['agree'] = watched(agree, label, set())
                    try: exec(code(ChecksAlone(name).visit(tree_of(c['source']))), space)
                    except Noticed: found[name, label].add(kind)
                    except Exception as e: print(f'cell {i}, {name}, {kind}: {type(e).__name__}: {e}')
                space.clear(); space.update(after)
        plt.close('all')
    return found

PAIRS = [(p, f, label) for p in CHAPTERS for f, label in dict.fromkeys(implemented(p))]

@pytest.mark.proof
@pytest.mark.parametrize('path, name, label', PAIRS, ids=[f'{name_of(p)}-{f}-{label}' for p, f, label in PAIRS])
def test_a_perturbed_function_is_noticed(path, name, label, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr('matplotlib.pyplot.show', lambda *a, **k: None)
    missed = PERTURBATIONS.keys() - noticed(path).get((name, label), set())
    assert not missed, f'no check of {label} noticed {name} with another {" or ".join(sorted(missed))}'
