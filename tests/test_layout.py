"The rules that keep the tree what it says it is."
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
import yaml

from conftest import ROOT, keeps_record
from embedlab.benchmarking import BenchConfig
from embedlab.comparison import CompareConfig
from embedlab.config import ChooseConfig, EvaluateConfig, RunConfig, SolveConfig, make_config
from embedlab.estimate import PreflightConfig
from embedlab.sweeping import SweepConfig

CHAPTERS = sorted(ROOT.glob("nbs/[0-9][0-9]_*.ipynb"))
DRIVERS = sorted(p for p in ROOT.glob("nbs/*.ipynb") if p not in CHAPTERS)
RUNS = sorted(ROOT.glob("runs/*.ipynb"))
HERE = ROOT if ROOT.parent == Path(tempfile.gettempdir()) else ROOT.parent   # what no committed page may name; chapters name files in the folder for temporary ones
code = lambda p: [c.source for c in nbformat.read(p, 4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", DRIVERS, ids=lambda p: p.stem)
def test_parameters_tag(path):
    "Without the tag papermill runs the defaults and exits with success."
    tagged = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"


@pytest.mark.parametrize("driver, cls", [("train", RunConfig), ("evaluate", EvaluateConfig), ("choose", ChooseConfig), ("solve", SolveConfig), ("compare", CompareConfig), ("sweep", SweepConfig), ("bench", BenchConfig), ("preflight", PreflightConfig)])
def test_parameters_are_the_defaults(driver, cls):
    cell = next(c for c in nbformat.read(ROOT / f"nbs/{driver}.ipynb", 4).cells if "parameters" in c.metadata.get("tags", []))
    values = {}
    exec(cell.source, {}, values)
    assert list(values) == list(cls.model_fields), "all of them, in their order"
    assert make_config(cls, **values) == make_config(cls)


PRESETS = sorted(ROOT.glob("nbs/presets/*/*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_presets_are_settings(path):
    "Each is taken by the driver, says its own name, and begins with its reason; 1e-4 would be read as text."
    values = yaml.safe_load(path.read_text())
    cfg = make_config({"recipes": ChooseConfig, "puzzles": SolveConfig}.get(path.parent.name, RunConfig), **values)
    assert cfg.preset == f"{path.parent.name}/{path.stem}" and path.read_text().startswith("# ")
    assert all(not isinstance(v, str) or isinstance(getattr(cfg, k), (str, list)) for k, v in values.items())


@pytest.mark.parametrize("path", DRIVERS, ids=lambda p: p.stem)
def test_drivers_define_and_export_nothing(path):
    for source in code(path):
        assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Lambda)) for n in ast.walk(ast.parse(source))), source
        assert "#| export" not in source
    first = nbformat.read(path, 4).cells[0]
    assert first.cell_type == "raw" and "skip_exec: true" in first.source


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_import_lower_numbers_only(path):
    numbers = {p.stem[3:]: int(p.stem[:2]) for p in CHAPTERS}
    own = int(path.stem[:2])
    for source in code(path):
        for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M))):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("embedlab"):
                names = [node.module.split(".")[1]] if "." in node.module else [a.name for a in node.names]
            for name in names:
                assert numbers[name] < own, f"{path.stem} imports {name}, which is chapter {numbers[name]}"


def test_exported_modules_need_no_development_tool():
    for p in ROOT.glob("embedlab/*.py"):
        if p.name == "_modidx.py": continue
        for node in ast.walk(ast.parse(p.read_text())):
            roots = [a.name.split(".")[0] for a in node.names] if isinstance(node, ast.Import) else [(node.module or "").split(".")[0]] if isinstance(node, ast.ImportFrom) else []
            assert not {"nbdev", "fastcore", "execnb", "papermill", "pytest"} & set(roots), p


def test_pages_have_output_files_of_their_own():
    "nbdev strips a chapter's number: 12_train and train would both become train.html."
    pages = [f"{p.parent.relative_to(ROOT)}/{re.sub(r'^[0-9]+[a-zA-Z0-9]*_', '', p.stem)}" for p in [*ROOT.glob("nbs/**/*.ipynb"), *RUNS, *ROOT.glob("*.qmd"), *ROOT.glob("runs/*.qmd")]
             if ".ipynb_checkpoints" not in p.parts]
    assert len(pages) == len(set(pages)), sorted(pages)


def test_in_step(tmp_path):
    "Notebooks are clean, and the package is what they export."
    shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".git", ".venv", "_proc", "_docs", ".pytest_cache", "model", "checkpoints", "__pycache__", "*.egg-info"))
    watched = lambda root: {str(p.relative_to(root)): p.read_text() for g in ("nbs/**/*.ipynb", "runs/*.ipynb", "embedlab/*.py") for p in root.glob(g)}
    before = watched(ROOT)
    for tool in ("nbdev_clean", "nbdev_export"):
        p = subprocess.run([sys.executable, "-c", f"from nbdev.{'clean' if tool == 'nbdev_clean' else 'doclinks'} import {tool}; {tool}()"], cwd=tmp_path / "tree", capture_output=True, text=True)
        assert p.returncode == 0, p.stderr
    after = watched(tmp_path / "tree")
    assert sorted(before) == sorted(after)
    assert [k for k in before if before[k] != after[k]] == []


@pytest.mark.parametrize("path", [*CHAPTERS, *DRIVERS, *RUNS], ids=lambda p: p.stem)
def test_committed_notebooks(path):
    "No error output, no path of somebody's machine, light enough for the repository; sources are lists of lines, as nbdev needs them."
    raw = path.read_text()
    assert path.stat().st_size < 1_500_000
    assert not re.search(r"/(home|root|Users)/\w|[A-Z]:\\\\Users", raw) and f"{HERE}/" not in raw
    assert not any(str(v).startswith("/") for k, v in json.loads(raw)["metadata"].get("papermill", {}).items() if k.endswith("_path")), "papermill keeps the paths it is given"
    for cell in json.loads(raw)["cells"]:
        assert isinstance(cell["source"], list)
        assert not any(o["output_type"] == "error" for o in cell.get("outputs", []))
    if path in CHAPTERS:
        cells = [c for c in json.loads(raw)["cells"] if c["cell_type"] == "code" and c["source"]]
        assert any(c["outputs"] for c in cells), "chapters are committed with their outputs: the site executes nothing"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_imports_stand_alone(path):
    "nbdev runs cells that import when it makes the pages: such a cell must do nothing else."
    for source in code(path):
        if source.startswith("#| export"): continue
        kinds = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body]
        assert all(kinds) or not re.search(r"^\s*(import|from) ", source, re.M), source


def test_every_run_has_a_record():
    "A comparison is told apart by an output of its own, and has no record."
    import embedlab
    assert {r.path for r in embedlab.runs(ROOT / "runs")} == {str(p) for p in RUNS if keeps_record(p)}


def test_readme_shows_the_demos_figures():
    "The README's table is the committed demo's, to the last digit."
    from embedlab.records import read_record, rows_of
    text = (ROOT / "README.md").read_text()
    for name, verdict, before, after, mean, low, high, n in rows_of(read_record(ROOT / "runs/demo.ipynb")):
        assert f"| {name} | **{verdict}** | {before:.3f} | {after:.3f} | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | {n} |" in text
    scifact = {x[0]: x for x in rows_of(read_record(ROOT / "runs/scifact.ipynb"))}
    for key in ("scifact/ndcg@10", "scifact-clean/ndcg@10"):
        _, verdict, before, after, mean, low, high, n = scifact[key]
        assert f"{before:.3f} → {after:.3f} ({mean:+.3f} [{low:+.3f}, {high:+.3f}], {verdict})" in text
