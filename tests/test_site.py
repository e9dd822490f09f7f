"The site's sources: pages are processed without Quarto, and its absence is said."
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from conftest import ROOT, looks_at_the_machine


def of_kind(run: str) -> str: return re.sub(r"(-[a-z_]+(\d[\d.e-]*|True|False))*-s\d+$", "", run)   # without the values of a grid, and the seed
RUNS = [*{of_kind(p.stem): p for p in sorted(ROOT.glob("runs/*.ipynb"), reverse=True)}.values()]   # the first of each kind: its other seeds have the same page


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    "What nbdev hands to Quarto."
    tree = tmp_path_factory.mktemp("site") / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "_proc", "_docs", "model", "checkpoints", "__pycache__", "*.egg-info", "tests"))
    from embedlab.report import write_leaderboard
    write_leaderboard(tree / "runs")
    for p in {*ROOT.glob("runs/*.ipynb")} - {*RUNS}: (tree / p.relative_to(ROOT)).unlink()
    script = "from nbdev.serve import proc_nbs\nfrom nbdev.quarto import refresh_quarto_yml\nif __name__ == '__main__':\n    refresh_quarto_yml(); print(proc_nbs(n_workers=0))"
    p = subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return tree / "_proc"


def test_pages_are_processed(processed):
    for p in [*ROOT.glob("nbs/**/*.ipynb"), *RUNS]:
        page = json.loads((processed / p.relative_to(ROOT)).read_text())
        assert page["cells"][0]["cell_type"] == "raw" and "title:" in "".join(page["cells"][0]["source"]), p
        shown = "".join("".join(c["source"]) for c in page["cells"])
        assert "default_exp" not in shown and "#| export" not in shown and "#| hide\n" not in shown
    for name in ("index.qmd", "README.md", "runs/index.qmd", "runs/leaderboard.md", "_quarto.yml", "nbdev.yml", "styles.css"): assert (processed / name).is_file(), name


def test_runs_keep_their_record_and_pictures(processed):
    from embedlab.comparison import COMPARISON, is_comparison, read_outputs
    from embedlab.records import MIME, read_record
    for p in RUNS:
        if looks_at_the_machine(p):
            for mime in ("image/png", "text/html"): assert len(read_outputs(processed / p.relative_to(ROOT), mime)) == len(read_outputs(p, mime)) >= (0 if "preflight" in p.stem and mime == "image/png" else 2)
            continue
        page, r = processed / p.relative_to(ROOT), None if is_comparison(p) else read_record(p)
        kind, pictures = (MIME, 1 if r.kind == "evaluate" or not r.model["trainable"] else 4 if any(k.endswith("/ndcg@10") for k in r.after) else 2) if r else (COMPARISON, 2)   # without a ranking there are no queries and no map to draw
        assert read_outputs(page, kind) == read_outputs(p, kind) != []
        assert len(read_outputs(page, "image/png")) >= pictures


def test_everything_named_exists(processed):
    site = yaml.safe_load((processed / "_quarto.yml").read_text())
    for pattern in site["project"]["render"]: assert list(processed.glob(pattern)), pattern
    for item in site["website"]["navbar"]["left"]: assert (processed / item["href"]).is_file(), item
    sections = {x["section"]: x["contents"] for x in site["website"]["sidebar"][0]["contents"] if isinstance(x, dict)}
    assert sections["Chapters"] == [f"nbs/{p.name}" for p in sorted(ROOT.glob("nbs/[0-9]*.ipynb"))], "every chapter is in the sidebar, in order"
    assert sections["Labs"] == [f"nbs/labs/{p.name}" for p in sorted(ROOT.glob("nbs/labs/*.ipynb"))]
    included = re.findall(r"{{< include (\S+) >}}", (processed / "runs/index.qmd").read_text())
    assert included == ["leaderboard.md"] and (processed / "runs" / included[0]).is_file()


def test_leaderboard_holds_every_run(processed):
    "Made by `make site` before the pages are; a link for each run, to a page that will be there."
    text = (processed / "runs/leaderboard.md").read_text()
    assert text.startswith("```{=html}\n") and text.count("```") == 2
    index = (processed / "runs/index.qmd").read_text()
    for p in ROOT.glob("runs/*.ipynb"): assert f"[{p.stem}]({p.name})" in index if looks_at_the_machine(p) else f'href="{p.stem}.html"' in text or f"[{p.stem}]({p.name})" in text
    steps = subprocess.run(["make", "-n", "-o", "setup", "site"], cwd=ROOT, capture_output=True, text=True).stdout
    assert 0 < steps.index("write_leaderboard('runs')") < steps.index("nbdev_docs")


def test_make_site_says_what_is_missing():
    p = subprocess.run(["make", "-s", "-o", "setup", "site"], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PATH": "/usr/bin:/bin"})
    if shutil.which("quarto", path="/usr/bin:/bin"): pytest.skip("Quarto is installed in /usr/bin; this test wants it absent")
    assert p.returncode != 0 and "make site needs Quarto" in p.stdout and "Traceback" not in p.stderr
