"""After Quarto rendered: no page asks another machine for anything.

Quarto loads require.js and jQuery from a CDN on every page with an HTML output (widgets might need them; ours have none), and pandoc
writes the path of MathJax as it was given, which is wrong in a subfolder. Both are set right here, and anything else that is left raises."""
import os, re, sys
from pathlib import Path

MATHJAX = 'assets/mathjax/tex-svg-full.js'
WIDGETS = re.compile(r'<script[^>]*src="https://(?:cdnjs\.cloudflare\.com/ajax/libs/(?:require\.js|jquery)|(?:cdn\.jsdelivr\.net/npm|unpkg\.com)/(?:requirejs|jquery|@jupyter-widgets)'
                     r'|(?:cdnjs\.cloudflare\.com|cdn\.jsdelivr\.net|polyfill\.io|cdn\.polyfill\.io)[^"]*polyfill)[^>]*>\s*</script>\s*'
                     r"|<script[^>]*>\s*define\('jquery'.*?</script>\s*", re.S)
FETCHED = re.compile(r'<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc="(?:https?:)?//[^"]+"|<link\b(?=[^>]*\brel="(?:stylesheet|preload|modulepreload|icon)")[^>]*\bhref="(?:https?:)?//[^"]+"')

def local(page, depth):
    "A page that loads only what lies beside it; `depth` folders below the top."
    page = WIDGETS.sub('', page)
    return re.sub(rf'src="[^"]*{re.escape(MATHJAX)}"', f'src="{"../" * depth}{MATHJAX}"', page)

def main(out):
    left = []
    for f in sorted(out.rglob('*.html')):
        text = f.read_text(encoding='utf-8')
        new = local(text, len(f.relative_to(out).parts) - 1)
        if new != text: f.write_text(new, encoding='utf-8', newline='\n')
        left += [f'{f.relative_to(out)}: {m}' for m in FETCHED.findall(new)]
    for f in sorted(out.rglob('*.css')):
        if re.search(r'@import\s+(?:url\()?["\']?(?:https?:)?//', f.read_text(encoding='utf-8', errors='replace')): left.append(f'{f.relative_to(out)}: imports a style sheet')
    if left: sys.exit('these would be fetched from another machine:\n' + '\n'.join(left))

if __name__ == '__main__': main(Path(os.environ.get('QUARTO_PROJECT_OUTPUT_DIR', '_docs')))
