"What every notebook and module keeps to (CONTRIBUTING.md): read from the files, so a new chapter is held to it as soon as it exists."
import ast, configparser, filecmp, importlib, inspect, re, shutil, subprocess, sys
from collections import defaultdict
from pathlib import Path
import pytest
from course import CHAPTERS, MODULES, NBS, NOTEBOOKS, PKG, ROOT, cells, code_of, default_exp, figures, name_of, text_of, tree_of

ALL = pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
EACH_CHAPTER = pytest.mark.parametrize('path', CHAPTERS, ids=name_of)
EACH_MODULE = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(PKG).with_suffix('').as_posix())
def dotted(path): return '.'.join(path.relative_to(PKG).with_suffix('').parts)

def none(found):
    found = [str(f) for f in found]
    assert not found, '\n' + '\n'.join(found)

# ---- 1. notebooks and package say the same ----------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def copy(tmp_path_factory):
    "The checkout without what git ignores."
    to = tmp_path_factory.mktemp('copy') / 'latentcourse'
    skip = shutil.ignore_patterns('.venv', '.git', '_proc', '_docs', 'runs', 'build', 'dist', '*.egg-info', '__pycache__', '.*cache', '.hypothesis', '.ipynb_checkpoints', 'nbdev.yml', '.last_checked', '*.tmp')
    shutil.copytree(ROOT, to, ignore=skip)
    return to

def tool(copy, code):
    done = subprocess.run([sys.executable, '-c', code], cwd=copy, capture_output=True, text=True, encoding='utf-8', errors='replace')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr

def differing(copy, *patterns):
    files = {p.relative_to(d) for d in (ROOT, copy) for pattern in patterns for p in d.glob(pattern) if '__pycache__' not in p.parts and '.ipynb_checkpoints' not in p.parts}
    return sorted(f'{f}' for f in files if not ((ROOT / f).exists() and (copy / f).exists() and filecmp.cmp(ROOT / f, copy / f, shallow=False)))

def test_export_is_clean(copy):
    tool(copy, 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()')
    none([f'{f}: not what the notebooks export; run make export' for f in differing(copy, 'latentcourse/**/*.py', 'pyproject.toml', 'settings.ini')])

def test_notebooks_are_clean(copy):
    told = tool(copy, 'from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()')
    assert 'Failed to clean' not in told, told
    none([f'{f}: not clean; run make export' for f in differing(copy, 'nbs/**/*.ipynb')])

def test_readme_is_made_from_the_index():
    index = NBS / 'index.ipynb'
    if not index.exists(): pytest.skip('no nbs/index.ipynb yet')
    from latentcourse.lib.pages import readme_of
    text, pictures = readme_of(index)
    assert (ROOT / 'README.md').read_text(encoding='utf-8') == text, 'README.md is stale; run make readme'
    none([f'{name} is stale; run make readme' for name, data in pictures.items() if not (ROOT / name).exists() or (ROOT / name).read_bytes() != data])
    none([f'{p} is no longer shown' for p in (ROOT / 'README_files').glob('*') if f'README_files/{p.name}' not in pictures])

@pytest.mark.slow
def test_every_page_is_staged(copy):
    told = tool(copy, 'import nbdev.quarto as q\nq._ensure_quarto = lambda: None\nif __name__ == "__main__": q.nbdev_proc_nbs.__wrapped__(n_workers=0)')
    none([m for m in re.findall(r'Found cells containing imports and other code.*?---\n(.*?)\n---', told, re.S)])
    none([f'{name_of(p)} is not staged' for p in NOTEBOOKS if not (copy / '_proc' / p.relative_to(NBS)).exists()])
    none([f'{f} is not staged' for f in ('_quarto.yml', 'references.bib', 'style/light.scss', 'assets/mathjax/tex-svg-full.js') if not (copy / '_proc' / f).exists()])

# ---- 2. imports point down --------------------------------------------------------------------------------------------------------

ORDER = ['lib', *(default_exp(p) for p in CHAPTERS if default_exp(p)), 'cli']

def imported(tree, here):
    "Modules of this package that a tree imports, as 'lib.check' or 'pixels', and star imports."
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from ((a.name.removeprefix('latentcourse.'), False) for a in n.names if a.name.startswith('latentcourse.'))
        if isinstance(n, ast.ImportFrom):
            base = here.split('.')[:-n.level] if n.level else []
            module = '.'.join([*base, *(n.module or '').split('.')]).strip('.') if n.level else n.module or ''
            if not n.level and not (module + '.').startswith('latentcourse.'):
                if n.names[0].name == '*': yield None, True
                continue
            module = module.removeprefix('latentcourse').strip('.')
            names = [module] if module and (PKG / (module.replace('.', '/') + '.py')).exists() else [f'{module}.{a.name}'.strip('.') for a in n.names]
            for name in names:
                if (PKG / (name.replace('.', '/') + '.py')).exists(): yield name, n.names[0].name == '*'

def bad_imports(tree, here):
    for to, star in imported(tree, here):
        if star: yield f'{here}: star import'
        if to is None: continue
        a, b = to.split('.')[0], here.split('.')[0]
        if b not in ORDER or a not in ORDER: yield f'{here} imports {to}: {a if a not in ORDER else b} has no place in the order {ORDER}'
        elif ORDER.index(a) > ORDER.index(b): yield f'{here} imports {to}, which comes later'

@EACH_MODULE
def test_imports_point_down(path): none(bad_imports(ast.parse(path.read_text(encoding='utf-8')), dotted(path)))

@ALL
def test_pages_import_only_what_came_before(path):
    here = default_exp(path) or 'cli'
    if path.name == 'index.ipynb' or re.match('[A-Z]_', path.name): here = 'cli'
    none(b for c in code_of(path) for b in bad_imports(tree_of(c['source']), here))

def test_lib_has_no_cycle():
    needs = {dotted(p): {to for to, _ in imported(ast.parse(p.read_text(encoding='utf-8')), dotted(p)) if to} for p in MODULES}
    while free := [m for m, n in needs.items() if not n & needs.keys()]:
        for m in free: del needs[m]
    none([f'{m} needs {sorted(n & needs.keys())} in a circle' for m, n in needs.items()])

@ALL
def test_imports_stand_alone_in_their_cell(path):
    "nbdev executes cells with imports when it builds the site: other lines would run there too."
    def mixed(source):
        body = tree_of(source).body
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
        return any(imports) and not all(imports)
    none([c['source'][:200] for c in code_of(path) if mixed(c['source'])])

# ---- 3. documented parameters -----------------------------------------------------------------------------------------------------

def shape_first(anno, text): return 'Tensor' not in re.split(r'\W+', str(getattr(anno, '__name__', anno))) or re.match(r'`[^`]+`', text or '')

def undocumented(label, f):
    from fastcore.docments import docments
    doc = inspect.getdoc(f)
    if not doc: yield f'{label}: no docstring'
    elif '\n' in doc.strip(): yield f'{label}: a docstring of more than one line'
    for p, d in docments(f, full=True, args_kwargs=True).items():
        default = d.get('default')
        text = d['docment'] or getattr(default, 'help', None)          # a typer option says it in its help
        anno = None if d['anno'] is inspect._empty else d['anno']
        if p == 'return':
            if anno is not None and 'Tensor' in str(getattr(anno, '__name__', anno)) and not text: yield f'{label}: returns a Tensor, without saying which'
        elif not text: yield f'{label}: parameter {p} has no comment'
        if anno is not None and text and not shape_first(anno, text): yield f'{label}: the comment on {p} should begin with its shape in backticks'

@EACH_MODULE
def test_every_parameter_is_documented(path):
    m, found = importlib.import_module(f'latentcourse.{dotted(path)}'), []
    for k in getattr(m, '__all__', []):
        o = getattr(m, k)
        if getattr(o, '__module__', None) != m.__name__: continue
        if inspect.isfunction(o): found += undocumented(k, o)
        elif inspect.isclass(o) and '\n' in (inspect.getdoc(o) or '-').strip() and '__dataclass_fields__' not in vars(o): found.append(f'{k}: a docstring of more than one line')
        elif inspect.isclass(o) and not o.__doc__: found.append(f'{k}: no docstring')
    none(found)

# ---- 4. nothing twice -------------------------------------------------------------------------------------------------------------

def top_level(tree):
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): yield n.name, n
        for t in n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []:
            for leaf in ast.walk(t):
                if isinstance(leaf, ast.Name): yield leaf.id, n

def test_no_name_is_defined_in_two_modules():
    where = defaultdict(set)
    for p in MODULES:
        for name, _ in top_level(ast.parse(p.read_text(encoding='utf-8'))):
            if not name.startswith('_') and name != 'STUDIES': where[name].add(dotted(p)) # each chapter declares its own studies there, see lib.study
    none([f'{name}: {sorted(mods)}' for name, mods in where.items() if len(mods) > 1])

def test_no_definition_is_written_twice():
    where = defaultdict(set)
    for p in NOTEBOOKS:
        for c in code_of(p):
            for n in ast.walk(tree_of(c['source'])):
                if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.end_lineno - n.lineno >= 3:
                    where[ast.dump(ast.Module(n.body, []))].add(f'{name_of(p)}: {n.name}')
    none([sorted(w) for w in where.values() if len(w) > 1])

# ---- 5, 8. sizes and notation -----------------------------------------------------------------------------------------------------

FORBIDDEN = {'x0', 'x1', 'lv', 'log_var', 'noise_level'}
LAYOUT = {'view', 'permute', 'transpose'}

def misnamed(tree):
    for n in ast.walk(tree):
        line = getattr(n, 'lineno', '?')
        names = {ast.Name: lambda: n.id, ast.arg: lambda: n.arg, ast.FunctionDef: lambda: n.name, ast.Attribute: lambda: n.attr, ast.keyword: lambda: n.arg}
        name = names.get(type(n), lambda: None)()
        if name in FORBIDDEN: yield f'line {line}: the name {name} (see the notation table)'
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in LAYOUT: yield f'line {line}: .{n.func.attr}( (einops says it in words)'
        if isinstance(n, ast.FunctionDef):
            if n.args.kwarg and n.args.kwarg.arg in ('kwargs', 'kw'): yield f'line {line}: {n.name} passes **{n.args.kwarg.arg} on'
            given = list(zip(n.args.args[len(n.args.args) - len(n.args.defaults):], n.args.defaults))
            for a, d in given:
                if a.arg == 'eps' and isinstance(d, ast.Constant) and d.value is not None: yield f'line {line}: eps is noise; a numerical constant is tiny'
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant) and any(getattr(t, 'id', '') == 'eps' for t in n.targets): yield f'line {line}: eps is noise; a numerical constant is tiny'

@EACH_MODULE
def test_notation(path): none(misnamed(ast.parse(path.read_text(encoding='utf-8'))))

@ALL
def test_notebook_is_small(path):
    assert path.stat().st_size <= 1.5e6, f'{path.stat().st_size / 1e6:.2f} MB; 1.5 at most: fewer or smaller figures'
    none([f'a figure of {size / 1e3:.0f} kB (150 at most; a palette PNG at 100 dpi is smaller): {c["source"][:80]}' for c in code_of(path) for size in figures(c) if size > 150e3])

def test_sizes_of_chapters(capsys):
    "Guidance, printed and not enforced."
    with capsys.disabled():
        for p in CHAPTERS:
            code = [c['source'].count('\n') + 1 for c in code_of(p)] or [0]
            texts = sum(c['cell_type'] == 'markdown' for c in cells(p))
            checked = sum(bool(re.search(r'\b(agree|refuses|assert|z_score|check_ex)', c['source'])) for c in code_of(p))
            print(f'\n  {name_of(p)}: {len(code)} code cells, median {sorted(code)[len(code) // 2]} lines, {texts / len(code):.1f} markdown to code, '
                  f'{checked / len(code):.0%} of cells check, {p.stat().st_size / 1e3:.0f} kB', end='')

@ALL
def test_outputs_are_those_of_a_run_that_passed(path):
    outputs = [o for c in code_of(path) for o in c.get('outputs', [])]
    none([f'{o["ename"]}: {o["evalue"]}' for o in outputs if o['output_type'] == 'error'])
    if any(c['source'].strip() and not c['source'].startswith('#| default_exp') for c in code_of(path)): assert outputs, 'no cell has an output: run the notebook'
    none([k for o in outputs for k in o.get('data', {}) if 'widget' in k or 'javascript' in k])

# ---- 6. figures -------------------------------------------------------------------------------------------------------------------

@ALL
def test_figures_are_described_and_read(path):
    all_cells, found = cells(path), []
    for i, c in enumerate(all_cells):
        if c['cell_type'] != 'code' or not list(figures(c)): continue
        alt = re.search(r'^#\|\s*fig-alt:\s*(.+)$', c['source'], re.M)
        if not alt or len(alt[1]) < 20: found.append(f'cell {i}: no alt text (#| fig-alt: "...")')
        if i + 1 == len(all_cells) or all_cells[i + 1]['cell_type'] != 'markdown': found.append(f'cell {i}: the figure is not followed by markdown that reads it')
    none(found)

# ---- equations --------------------------------------------------------------------------------------------------------------------

SPAN = re.compile(r'<span id="(eq-[\w-]+)"></span>')

@ALL
def test_equations_are_labelled_and_checked(path):
    text, code = text_of(path), '\n'.join(c['source'] for c in code_of(path))
    labels, tags = SPAN.findall(text), re.findall(r'\\tag\{([^}]*)\}', text)
    named = set(re.findall(r'''['"](eq-[\w-]+)['"]''', code))
    found = [f'\\tag{{{t}}} twice' for t in set(tags) if tags.count(t) > 1] + [f'#{label} twice' for label in set(labels) if labels.count(label) > 1]
    if len(labels) != len(tags): found.append(f'{len(tags)} numbered equations, {len(labels)} anchors <span id="eq-...">')
    for label in labels:
        if not re.search(rf'<span id="{label}"></span>\s*\$\$(?:(?!\$\$).)*\\tag', text, re.S): found.append(f'#{label} does not stand above a $$ ... \\tag{{}} $$')
    found += [f'{label} is named by no check (agree(..., eq="{label}"))' for label in labels if label not in named]
    found += [f'a check names {label}, which this page does not have' for label in sorted(named - set(labels)) if re.search(rf'eq=[^)]*{label}', code) and path in CHAPTERS]
    none(found)

def test_equation_numbers_and_labels_are_unique():
    where = defaultdict(list)
    for p in CHAPTERS:
        for t in SPAN.findall(text_of(p)) + re.findall(r'\\tag\{([^}]*)\}', text_of(p)): where[t].append(name_of(p))
    none([f'{t}: {w}' for t, w in where.items() if len(w) > 1])

@ALL
def test_links_lead_somewhere(path):
    found = []
    for target in re.findall(r'\]\(([^)\s]+)\)', re.sub(r'`[^`]*`', '', text_of(path))):
        if re.match(r'(https?:|mailto:|attachment:)', target): continue
        file, _, anchor = target.partition('#')
        to = (path.parent / file).resolve() if file else path
        if not to.exists(): found.append(f'{target}: no such file')
        elif anchor.startswith('eq-') and anchor not in SPAN.findall(text_of(to)): found.append(f'{target}: no such equation')
    none(found)

def test_citations_are_in_the_bibliography():
    keys = set(re.findall(r'^@\w+\{([\w:-]+),', (NBS / 'references.bib').read_text(encoding='utf-8'), re.M))
    used = {(name_of(p), k) for p in NOTEBOOKS for k in re.findall(r'(?<![\w/.`])@([a-z]+\d{4}\w*|[a-z]+_\w+)', re.sub(r'`[^`]*`', '', text_of(p)))}
    none([f'{where}: @{k} is not in references.bib' for where, k in sorted(used) if k not in keys])

# ---- 7. exercises -----------------------------------------------------------------------------------------------------------------

def exercise_calls(path):
    "For each `check_ex_*`: is it called for a solution that must pass, and for a mistake that must fail?"
    made, passes, fails = set(), set(), set()
    def walk(n, guarded):
        if isinstance(n, ast.FunctionDef) and n.name.startswith('check_ex_'): made.add(n.name); return
        if isinstance(n, ast.Call):
            name = getattr(n.func, 'id', '')
            if name.startswith('check_ex_'): (fails if guarded else passes).add(name)
            guarded = guarded or name in ('refuses', 'raises')
        for field in ast.iter_child_nodes(n): walk(field, guarded or isinstance(n, ast.Try) and field in n.body)
    for c in code_of(path): walk(tree_of(c['source']), False)
    return made, passes, fails

@EACH_CHAPTER
def test_exercises_pass_their_solution_and_fail_their_mistake(path):
    made, passes, fails = exercise_calls(path)
    none([f'{e}: no solution is put to it' for e in sorted(made - passes)] + [f'{e}: no mistake is put to it' for e in sorted(made - fails)])
    assert len(made) >= 3, f'{len(made)} exercises with a check, three expected'

@EACH_CHAPTER
def test_chapter_has_its_beats(path):
    heads = re.findall(r'^## (.+)$', text_of(path), re.M)
    want = [h for h in ('Motivation', 'What we need', 'Exercises', "What's next")]
    assert [h for h in heads if h in want] == want, f'headings {heads}; expected {want} among them, in this order'
    assert heads[0] == 'Motivation' and heads[-1] == "What's next"

# ---- claims -----------------------------------------------------------------------------------------------------------------------

ROWS = {'pixels': [str(i) for i in range(1, 7)], 'autoencoder': ['7', '8', '9', '10'], 'vae': ['11', '12', '13', '14', '15', '17', 'N8'], 'picture_vae': ['3', '10', '16', '17'], 'perceptual': ['16', '18'], 'adversarial': ['19', '20'], 'codec': ['5', '21', '22'], 'klf8': ['23'], 'transformer': ['31', '33', '34', '35'], 'tokens': ['32'], 'seq2seq': ['36', '37'], 'contrastive': ['41', '42', '44', 'N17'], 'text': ['37'], 'vit': ['31', '38', '39'], 'dino': ['40'], 'clip': ['42', '43'], 'diffusion': ['27', '28', 'N10'], 'mixture': ['N3'], 'samplers': ['28', '29'], 'classifier_guidance': ['45', '46', '47', '48'], 'classifier_free_guidance': ['49', '50', '51', '52'], 'guidance_lab': ['N11', 'N12'], 'conditions': ['53'], 'latent_flow': ['24', '25', '26', '30', 'N16'], 'dit': ['54', '55', '56'], 'latent_spaces': ['N18'], 'text_to_image': ['57', 'N5'], 'ablations': ['N19'], 'large_systems': ['57', '58']}  # rows of the syllabus that a written chapter owes

@pytest.mark.parametrize('module', ROWS)
def test_every_row_has_its_claim(module):
    from latentcourse.lib.check import claims_of
    if module not in ORDER: pytest.skip(f'no chapter {module} yet')
    found = [c for p in CHAPTERS for c in claims_of(p)]
    rows = {re.match(r'[A-Z]?\d+', c['row'])[0] for c in found}
    none([f'row {r}: no claim in any chapter' for r in ROWS[module] if r not in rows])
    none([f'row {c["row"]}: nothing measured' for c in found if c['verdict'] != 'cited' and c['measured'] is None])

def test_no_claim_is_numbered_like_one_of_another_page():
    from latentcourse.lib.check import claims_of
    where = defaultdict(set)
    for p in CHAPTERS:
        for c in claims_of(p): where[c['row']].add(name_of(p))
    none([f'claim {row}: {sorted(pages)}' for row, pages in where.items() if len(pages) > 1])

# ---- the site and the packaging ---------------------------------------------------------------------------------------------------

def test_sidebar_lists_every_notebook():
    import yaml
    def pages(items):
        for i in items:
            if isinstance(i, str): yield i
            elif 'href' in i: yield i['href']
            yield from pages(i.get('contents', []) if isinstance(i, dict) else [])
    site = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))
    listed = list(pages(site['website']['sidebar']['contents']))
    there = {p.relative_to(NBS).as_posix() for p in NOTEBOOKS}
    none([f'{p} is in no sidebar' for p in sorted(there - set(listed))] + [f'the sidebar lists {p}, which does not exist' for p in listed if p not in there])
    chapters = [p for p in listed if re.match(r'\d\d', p)]
    assert chapters == sorted(chapters), 'chapters out of order'

def test_site_files_exist():
    import yaml
    html = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))['format']['html']
    files = [f for side in html['theme'].values() for f in side if f.endswith('.scss')] + [html['include-in-header'], html['include-after-body'], html['html-math-method']['url'], 'references.bib', 'style/offline.py']
    none([f for f in files if not (NBS / f).exists()])
    assert not re.search(r'(https?:)?//[^"\']*(cdn|jsdelivr|unpkg|googleapis)', ''.join((NBS / f).read_text(encoding='utf-8') for f in files if f.endswith(('.scss', '.html'))))
    assert (ROOT / 'nbs' / '_quarto.yml').read_text(encoding='utf-8').split() == 'metadata-files: [../_quarto.yml, nbdev.yml, sidebar.yml]'.split()

def test_pages_ask_no_other_machine(tmp_path):
    "What nbs/style/offline.py does to the pages that Quarto wrote."
    page = ('<head><script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="sha512-x" crossorigin="anonymous"></script>\n'
            '<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js" data-relocate-top="true"></script>\n'
            '''<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>\n'''
            '<script src="assets/mathjax/tex-svg-full.js" type="text/javascript"></script><link href="https://latentcourse.github.io" rel="canonical"></head><a href="https://arxiv.org">p</a>')
    (tmp_path / 'lib').mkdir()
    for f in ('index.html', 'lib/check.html'): (tmp_path / f).write_text(page, encoding='utf-8')
    script = [sys.executable, str(NBS / 'style' / 'offline.py')]
    env = {**__import__('os').environ, 'QUARTO_PROJECT_OUTPUT_DIR': str(tmp_path)}
    assert subprocess.run(script, env=env).returncode == 0
    top, low = ((tmp_path / f).read_text(encoding='utf-8') for f in ('index.html', 'lib/check.html'))
    assert 'src="assets/mathjax/' in top and 'src="../assets/mathjax/' in low and 'cloudflare' not in top + low and 'define(' not in top and 'arxiv' in top
    (tmp_path / 'bad.html').write_text('<img src="https://example.org/a.png">', encoding='utf-8')
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and 'bad.html' in done.stderr

def test_settings_agree():
    ini = configparser.ConfigParser(delimiters=['='], comment_prefixes=['#'], interpolation=None)
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    cfg = ini['DEFAULT']
    import latentcourse
    assert latentcourse.__version__ == cfg['version'] and f"version: {cfg['version']}\n" in (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
    assert not any(r.split('=')[0].split('<')[0] in ('nbdev', 'fastcore', 'execnb', 'ghapi') for r in cfg['requirements'].split())
    assert 'nbdev==2.4.14 execnb<0.2 fastcore<2 ghapi<2' in cfg['dev_requirements']

def test_makefile_has_every_target():
    text = (ROOT / 'Makefile').read_text(encoding='utf-8')
    none([t for t in 'run test lab docs train export readme bench proof clean help'.split() if not re.search(rf'^{t}:.*## ', text, re.M)])
    for f in ('README.md', 'CONTRIBUTING.md'):
        for target in re.findall(r'^\s*make (\w+)|`make (\w+)', (ROOT / f).read_text(encoding='utf-8'), re.M):
            assert re.search(rf'^{"".join(target)}:', text, re.M), f'{f} speaks of make {"".join(target)}'

# ---- what an import costs ---------------------------------------------------------------------------------------------------------

def test_import_is_quick():
    code = 'import time; t = time.perf_counter(); import latentcourse; print(time.perf_counter() - t); import sys; assert "torch" not in sys.modules'
    times = sorted(float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout) for _ in range(5))
    assert times[0] < 0.3, times  # the least disturbed of five

def test_package_needs_no_nbdev():
    "Every module imports without the developer's tools, and none imports the slow ones before it needs them."
    names = ['latentcourse.' + dotted(p) for p in MODULES]
    code = f'''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {{'nbdev', 'execnb', 'fastcore', 'ghapi', 'pytest', 'hypothesis', 'nbconvert', 'astunparse'}}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import importlib
for name in {names}: importlib.import_module(name)
print(*(m for m in ('torchmetrics', 'sklearn', 'torchvision', 'lpips', 'open_clip', 'sympy', 'pandas', 'diffusers') if m in sys.modules))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    slow = set(done.stdout.split())
    if slow:  # torch itself may bring some of them
        alone = subprocess.run([sys.executable, '-c', 'import sys, torch, torch.nn.functional, matplotlib.pyplot, einops\nprint(*sys.modules)'], capture_output=True, text=True).stdout.split()
        none([f'{m} is imported before it is needed' for m in sorted(slow - set(alone))])
