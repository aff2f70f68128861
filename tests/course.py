"What several tests read: the notebooks, their cells, the package's modules."
import ast, json, re
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, PKG = ROOT / 'nbs', ROOT / 'latentcourse'
NOTEBOOKS = sorted(p for p in [*NBS.glob('*.ipynb'), *(NBS / 'lib').glob('*.ipynb')] if '.ipynb_checkpoints' not in p.parts)
CHAPTERS = [p for p in NOTEBOOKS if re.match(r'\d\d[a-z]?_', p.name)]
MODULES = sorted(p for p in PKG.rglob('*.py') if not p.name.startswith('_'))

def name_of(path):
    "'01_pixels' or 'lib/check': how a notebook is called in a test's name."
    return path.relative_to(NBS).with_suffix('').as_posix()

@lru_cache(None)
def cells(path):
    "Cells of a notebook as dicts with `source` a string."
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [dict(c, source=''.join(c['source'])) for c in nb['cells']]

def code_of(path): return [c for c in cells(path) if c['cell_type'] == 'code']
def text_of(path): return '\n\n'.join(c['source'] for c in cells(path) if c['cell_type'] == 'markdown')

@lru_cache(None)
def default_exp(path):
    "The module a notebook exports, such as 'lib.check', or None."
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(c['source'] for c in code_of(path)), re.M)
    return found and found[1]

def tree_of(source):
    "The syntax tree of a cell, with IPython's own lines left out."
    lines = ['pass' if re.match(r'\s*[%!?]', line) else line for line in source.split('\n')]
    if lines and lines[0].startswith('pass') and source.lstrip().startswith('%%'): return ast.Module([], [])
    return ast.parse('\n'.join(lines))

def figures(cell):
    "Bytes of each picture a cell shows."
    import base64
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'image/png' in data: yield len(base64.b64decode(''.join(data['image/png'])))
        elif 'image/svg+xml' in data: yield len(''.join(data['image/svg+xml']).encode())
