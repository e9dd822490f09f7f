# Each target sets up .venv by itself; when it is there and up to date that takes no time.
PYTHON ?= python3
BIN := .venv/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONDONTWRITEBYTECODE=1

.PHONY: demo test test-slow lab site clean setup

demo: setup  ## train the bundled model on your own documentation and show whether it got better
	$(RUN) papermill nbs/train.ipynb runs/demo.ipynb -p run demo --log-output
	@$(BIN)/python -c "import embedlab.records as r; print(r.as_text(r.read_record('runs/demo.ipynb')))"
	@echo "the whole run, with its plots: runs/demo.ipynb"

# one thread a process: two processes with two threads each are ten times slower on two cores than one after the other;
# three tests at a time, because one that runs a notebook waits for a process to start for half of its time
test: setup  ## what CI runs: notebooks clean, package in step with them, chapters, tests
	$(RUN) OMP_NUM_THREADS=1 nbdev_test --n_workers 2
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist worksteal -m "not slow"

test-slow: setup  ## the tests and chapter cells that take minutes
	$(RUN) nbdev_test --n_workers 1 --flags slow
	$(RUN) $(BIN)/pytest -m slow

lab: setup  ## open the course in JupyterLab
	$(RUN) jupyter lab nbs

site: setup  ## build the site into _docs from the committed notebooks; executes nothing
	@command -v quarto >/dev/null || { echo "make site needs Quarto, which is not on the PATH: pip install quarto-cli, or see https://quarto.org/docs/get-started"; exit 1; }
	$(RUN) $(BIN)/python -c "from embedlab.report import write_leaderboard; write_leaderboard('runs')"
	$(RUN) nbdev_docs

clean:  ## remove what was built; runs and their artefacts stay
	rm -rf .venv _proc _docs nbdev.yml .pytest_cache embedlab.egg-info build

setup: .venv/ready

.venv/ready: constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" || { echo "embedlab needs Python 3.11 to 3.13; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
