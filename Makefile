# latentcourse: `make run` runs the course, `make test` its tests. Each sets up its own .venv first.
#   PYTHON=python3.12 picks the interpreter, ARGS="00 01" goes to the command, NO_UV=1 uses pip alone.
SHELL = /bin/sh
.DEFAULT_GOAL = help
.PHONY: run test lab docs train export readme bench proof doctor hooks clean help
.NOTPARALLEL:

ARGS   =
PYTHON =
VENV   = .venv
BIN    := $(shell if [ "$$OS" = Windows_NT ]; then echo $(VENV)/Scripts; else echo $(VENV)/bin; fi)
PY     = $(BIN)/python
# what was installed is a function of these files and of where the checkout lies
KEY    := $(shell { cat settings.ini setup.py; pwd; } | cksum | cut -d' ' -f1)
READY_RUN = $(VENV)/.ready-run-$(KEY)
READY_DEV = $(VENV)/.ready-dev-$(KEY)

help: ## say what there is
	@echo 'latentcourse. On a fresh machine with Python 3.11 or newer:'
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile | expand -t 16
	@echo 'Options: ARGS="..." for the command behind a target, PYTHON=python3.12, NO_UV=1.'

run: $(READY_RUN) ## set up, run the chapters, end with the table of claims (ARGS="01" for one)
	@$(PY) -m latentcourse run $(ARGS)

lab: $(READY_RUN) ## JupyterLab on the course (ARGS="--port 8899")
	@$(PY) -m latentcourse lab $(ARGS)

train: $(READY_RUN) ## train one model from nothing (ARGS="teacher --preset CPU")
	@$(PY) -m latentcourse train $(ARGS)

doctor: $(READY_RUN) ## versions, device, memory, checkpoints, what is missing
	@$(PY) -m latentcourse doctor $(ARGS)

test: $(READY_DEV) ## set up, pass the tests (ARGS="-k cli")
	@$(PY) -m pytest $(ARGS)

proof: $(READY_DEV) ## the long tests: hundreds of kills, equations perturbed
	@$(PY) -m pytest -m proof $(ARGS)

bench: $(READY_DEV) ## speed figures, printed and kept in runs/bench.json
	@$(PY) -m pytest -m bench -s -q tests/bench $(ARGS)

export: $(READY_DEV) ## notebooks to package, then clean the notebooks
	@$(PY) -c "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"
	@$(PY) -c "from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()"

readme: $(READY_DEV) ## nbs/index.ipynb to README.md
	@$(PY) -c "from latentcourse.lib.pages import write_readme; print(write_readme('nbs/index.ipynb', '.'))"

hooks: $(READY_DEV) ## let git merge notebooks cell by cell in this clone
	@git config --local include.path ../.gitconfig && echo 'git now merges notebooks with nbdev_merge'

# Without Quarto nbdev would try to install one system-wide, as root: stage the pages only, and say so.
docs: $(READY_DEV) readme ## the site, into _docs (needs Quarto: tries the wheel)
	@PATH="$(CURDIR)/$(BIN):$$PATH"; export PATH; \
	if ! command -v quarto >/dev/null 2>&1; then \
	  echo '== no Quarto here: trying the quarto-cli wheel, which downloads a release'; \
	  $(PY) -m pip install -q -e '.[dev,docs]' >$(VENV)/quarto.log 2>&1 || true; fi; \
	if command -v quarto >/dev/null 2>&1; then \
	  $(PY) -c "from nbdev.quarto import nbdev_docs; nbdev_docs.__wrapped__()" && echo '== the site is in _docs/index.html'; \
	else \
	  echo "== Quarto could not be fetched (see $(VENV)/quarto.log). Install it from https://quarto.org/docs/get-started and run make docs again."; \
	  echo '== Staging every page in _proc instead; errors in a page show here.'; \
	  $(PY) -c "import nbdev.quarto as q; q._ensure_quarto = lambda: None; q.nbdev_proc_nbs.__wrapped__()" && echo '== every page is staged in _proc, none is rendered'; fi

clean: ## remove what runs and builds made (not .venv)
	rm -rf _proc _docs build dist runs .pytest_cache .hypothesis nbs/nbdev.yml
	find latentcourse nbs tests -name __pycache__ -prune -exec rm -rf {} +

$(READY_RUN):
	@want=. ; stamps='$(READY_RUN)'; $(SETUP)

$(READY_DEV):
	@want='.[dev]'; stamps='$(READY_RUN) $(READY_DEV)'; $(SETUP)

# Make or mend $(VENV), then install $$want in it. Interrupted at any point, the next call goes on from there.
define SETUP
set -e; \
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; \
if [ "$$OS" = Windows_NT ]; then exe='.exe'; else exe=''; fi; \
uv=''; if [ -z "$(NO_UV)" ] && command -v uv >/dev/null 2>&1; then uv=uv; fi; \
if ! $(PY) -c "$$new_enough" >/dev/null 2>&1; then \
  found=''; \
  for p in $(PYTHON) python3.14 python3.13 python3.12 python3.11 python3 python; do \
    for need in ', ensurepip, venv' ''; do \
      if [ -z "$$found" ] && { [ -n "$$uv" ] || [ -n "$$need" ]; } && "$$p" -c "import sys$$need; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; then found="$$p"; fi; \
    done; \
  done; \
  if [ -n "$$uv" ]; then \
    echo "== making $(VENV) with uv ($${found:-a Python that uv fetches})"; \
    uv venv -q --clear --seed --python "$${found:->=3.11}" $(VENV); \
  elif [ -n "$$found" ]; then \
    echo "== making $(VENV) with $$found ($$($$found --version))"; \
    "$$found" -m venv --clear $(VENV); \
  else \
    echo "latentcourse needs Python 3.11 or newer with its venv module, and finds none: $$(python3 --version 2>&1 || echo no python3 at all)." >&2; \
    echo "Install one from https://www.python.org/downloads (Debian and Ubuntu: sudo apt install python3 python3-venv), or uv," >&2; \
    echo "or name the interpreter: make run PYTHON=/path/to/python3.12" >&2; exit 1; \
  fi; \
fi; \
rm -f $(VENV)/.ready-*; \
if [ -z "$$uv" ]; then \
  $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null; \
  if [ -z "$(NO_UV)" ] && { [ -x $(BIN)/uv$$exe ] || $(PY) -m pip install -q --disable-pip-version-check uv >/dev/null 2>&1; }; then uv=$(BIN)/uv$$exe; fi; \
fi; \
done=''; \
if [ -n "$$uv" ]; then \
  echo "== installing $$want and what it needs with uv (torch is large: some minutes the first time)"; \
  if "$$uv" pip install -p $(PY) -e "$$want"; then done=yes; else echo '== uv could not; trying pip' >&2; fi; \
fi; \
if [ -z "$$done" ]; then \
  echo "== installing $$want and what it needs with pip (torch is large: some minutes the first time)"; \
  $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null; \
  $(PY) -m pip install --disable-pip-version-check -e "$$want"; \
fi; \
touch $$stamps; \
echo "== $(VENV) is ready"
endef
