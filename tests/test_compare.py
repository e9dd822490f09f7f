"Comparing runs: what may stand side by side, what is refused, and what is written down."
import json
import re
import shutil
import subprocess

import nbformat
import numpy as np
import pytest

from conftest import ROOT
from embedlab.comparison import COMPARISON, CompareConfig, Group, chosen_keys, compare_runs, find_runs, is_comparison, read_outputs
from embedlab.config import InputError, make_config
from embedlab.records import MIME, Record, pack, runs
from embedlab.report import as_latex, as_markdown, bundle, frame, leaderboard, leaderboard_html, sentence, tex, write, write_leaderboard

N = 120
HARD = np.random.default_rng(0).beta(.6, .6, N)
IDS = [f"q{i}" for i in range(N)]


def notebook(path, *outputs):
    "Write an executed notebook with these outputs and nothing else."
    cell = nbformat.v4.new_code_cell("run", outputs=[nbformat.v4.new_output("display_data", data=o) for o in outputs])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)


def write_run(folder, name, gain=0., sets=("toy",), seed=0, sha="a" * 64, order=None, metrics=("ndcg@10",), before=True, role=None, start=0., **more) -> Record:
    "Write a run that ends with every query moved by about `gain`, without training anything."
    rng = np.random.default_rng([seed, *map(ord, name)])
    params = {"seed": seed, "run": name, "lr": 5e-5} | more.pop("params", {})
    r = Record(name, "completed", seed=seed, params=params, model=more.pop("model", {"base": "minilm", "sha256": "b" * 64}), **more)
    r.data = [{"name": "toy", "split": "train", "rows": 9, "sha256": f"{seed}" * 64}]   # another choice of pairs by every seed
    r.data += [{"name": s, "split": r.split, "rows": N, "sha256": sha} | ({"role": role} if role else {}) for s in sets]
    order = list(range(N)) if order is None else order
    for s in sets:
        r.scores.setdefault("ids", {})[s] = pack([IDS[i] for i in order])
        for m in metrics:
            after = (HARD + gain + rng.normal(0, .02, N))[order]
            if before: r.before[f"{s}/{m}"] = float(HARD.mean() + start)
            r.after[f"{s}/{m}"] = float(after.mean())
            r.scores[f"{s}/{m}"] = pack(np.concatenate([HARD[order] + start, after]) if before else after)
    r.speed, r.environment = {"train_pairs_per_s": 40., "encode_texts_per_s": 99., "seconds": 61., "peak_rss_bytes": 2e9}, {"device": "cpu", "python": "3.11"}
    notebook(folder / f"{name}.ipynb", {MIME: r.to_dict()})
    return r


LEAKY = {"policy": "allow", "exact": 1, "near": 101, "shared_documents": 168, "allowed": True}


@pytest.fixture
def folder(tmp_path):
    "Three seeds of one method, a better run, an equal one, a leaky one and a failed one."
    home = tmp_path / "runs"
    home.mkdir(exist_ok=True)
    for seed in range(3): write_run(home, f"seeds-{seed}", .05, seed=seed)
    write_run(home, "up", .1, params={"lr": 1e-4})
    write_run(home, "same", .0, params={"lr": 1e-6})
    write_run(home, "leaky", .2, params={"lr": 2e-4}, leaks=LEAKY)
    notebook(home / "broken.ipynb", {MIME: Record("broken", "failed", error="DivergedError: the loss is not finite").to_dict()})
    return home


def go(folder, runs="*", **params): return compare_runs(make_config(CompareConfig, runs=runs, **params), folder)


def test_the_driver(papermill, folder):
    "A page with the verdict first, one table of at most eight rows, then a figure; both files written."
    for i in range(6): write_run(folder, f"more{i}", .01 * i, params={"lr": i})
    ran = papermill("comparison", driver="compare", baseline="up")
    assert ran.code == 0, ran.text
    outputs = read_outputs(ran.path)
    kinds = [set(o.get("data", {})) for o in outputs]
    assert COMPARISON in kinds[0] and "image/png" in kinds[1], "the table, then the figure"
    page = "".join(outputs[0]["data"]["text/html"])
    assert page.startswith("<p><b>1 of 9 is better than up on toy (ndcg@10): leaky ⚠, +0.") and len(re.findall(r"<tr>", page.split("<tbody>")[1])) == 8
    assert outputs[0]["data"][COMPARISON]["failed"] == {"broken": "DivergedError: the loss is not finite"}
    assert "comparison_report.md" in str(outputs) and (folder / "comparison/comparison.tex").is_file()
    # the page is a notebook among the runs and none itself
    assert is_comparison(ran.path) and "comparison" not in find_runs(["*"], folder)[0] and "comparison" not in [r.run for r in runs(folder)]
    assert find_runs(["*"], folder)[1] == []
    with pytest.raises(InputError, match="comparison.ipynb is a comparison, not a run"): go(folder, "comparison")


@pytest.mark.parametrize("params, expected", [
    ({"baselin": "up"}, "unknown parameter 'baselin'; did you mean 'baseline'?"),
    ({"runs": "upp"}, "did you mean 'up'? there are: broken, leaky, same, seeds-0"),
], ids=["parameter", "run"])
def test_a_fault_is_one_line(papermill, folder, params, expected):
    ran = papermill("comparison", driver="compare", **params)
    assert ran.code != 0
    error, = ran.errors()
    assert error.ename == "InputError" and expected in error.evalue and len(error.traceback) == 1 and "\n" not in error.traceback[0].strip()


def test_parameters_are_the_defaults():
    cell = next(c for c in nbformat.read(ROOT / "nbs/compare.ipynb", 4).cells if "parameters" in c.metadata.get("tags", []))
    values = {}
    exec(cell.source, {}, values)
    assert list(values) == list(CompareConfig.model_fields) and make_config(CompareConfig, **values) == CompareConfig()


def test_seeds_are_one_row(folder):
    c = go(folder)
    assert [(g.name, list(g.runs)) for g in c.groups] == [("leaky", ["leaky"]), ("same", ["same"]), ("seeds", ["seeds-0", "seeds-1", "seeds-2"]), ("up", ["up"])]
    row, = [x for x in c.rows if x.group.name == "seeds"]
    assert len(row.after) == 3 and row.verdict == "better" and row.mean == pytest.approx(np.mean(row.after))
    shown = frame(c.rows, "base").set_index("run")
    assert shown.loc["seeds (3 seeds)", "score"] == f"{row.mean:.3f} ({min(row.after):.3f}–{max(row.after):.3f})"
    shutil.copy(folder / "up.ipynb", folder / "again.ipynb")   # the same seed twice is no second draw
    assert sorted(len(g.runs) for g in go(folder, "up, again").groups) == [1, 1]


def test_seeds_of_new_encoders_are_one_row(folder):
    "Their first weights follow the seed, so no two have the same base."
    for seed in range(3): write_run(folder, f"new-{seed}", .05, seed=seed, model={"base": "scratch", "sha256": f"{seed}" * 64})
    assert [list(g.runs) for g in go(folder, "new-*").groups] == [["new-0", "new-1", "new-2"]]
    for seed in range(2): write_run(folder, f"old-{seed}", .05, seed=seed, model={"base": "minilm", "sha256": f"{seed}" * 64})
    assert [list(g.runs) for g in go(folder, "old-*").groups] == [["old-0"], ["old-1"]]


@pytest.mark.parametrize("place, groups", [("small", [["lora-0", "lora-1"]]), ("earlier", [["lora-0"], ["lora-1"]])], ids=["new", "continued"])
def test_seeds_of_a_new_adapter_are_one_row(folder, place, groups):
    "It follows the seed and the weights beside it don't; an adapter that a run continues is part of what it came with."
    for seed in range(2):
        write_run(folder, f"lora-{seed}", .05, seed=seed, kind="solve", params={"continue_from": "small"}, model={"base": "small", "sha256": f"{seed}" * 64},
                  engine={"stages": [{"run": "small", "tune": "all", "place": None, "base_sha256": "c" * 64}, {"run": f"lora-{seed}", "tune": "LoRA 8", "place": place, "base_sha256": "d" * 64}]})
    assert [list(g.runs) for g in go(folder, "lora-*").groups] == groups


def test_verdicts(folder):
    by = {x.group.name: x for x in go(folder).rows}
    assert {n: x.verdict for n, x in by.items()} == {"leaky": "better", "same": "within noise", "seeds": "better", "up": "better"}
    against = {x.group.name: x for x in go(folder, baseline="up").rows}
    assert against["same"].verdict == "worse" and against["same"].gain == pytest.approx(-.1, abs=.01) and against["same"].before == by["up"].mean
    assert against["seeds"].verdict == "worse"
    assert sentence(go(folder, "same, up")).startswith("1 of 2 is better than base on toy (ndcg@10): up, +0.")
    assert sentence(go(folder, "same")).startswith("None of 1 is better than base on toy (ndcg@10)")


def test_other_data_are_refused(folder):
    write_run(folder, "other", .3, sha="c" * 64)
    with pytest.raises(InputError, match=r"^toy is not the same data in up \(sha256 aaaaaaaa\) and other \(cccccccc\)"): go(folder, "up, other")
    write_run(folder, "dev", .3, split="dev")
    with pytest.raises(InputError, match="up was measured on test, dev on dev"): go(folder, "up, dev")
    write_run(folder, "wide", .1, sets=("toy", "far"), params={"lr": 3.})
    write_run(folder, "far", .1, sets=("far",), sha="d" * 64)
    assert [x.key for x in go(folder, "up, wide, far", sets="toy").rows] == ["toy/ndcg@10"] * 2, "sets that are left out may differ"


def test_distances_are_not_mixed(folder):
    "One name stands for what a run ranked by; a name that says which is the same in all of them, and pairs follow the ranking."
    metrics = ("ndcg@10", "ndcg@10-cosine", "spearman", "spearman-euclidean")
    for name, how in (("round", "cosine"), ("flat", "euclidean")): write_run(folder, f"dist-{name}", metrics=metrics[:2], params={"similarity": how})
    with pytest.raises(InputError, match="dist-flat ranks by euclidean, dist-round by cosine; compare what both were ranked by, such as metric=ndcg@10-cosine"): go(folder, "dist-*")
    c = go(folder, "dist-*", metric="ndcg@10-cosine")
    assert {x.key for x in c.rows + c.others} == {"toy/ndcg@10-cosine"}
    for name, first in (("round", "spearman"), ("flat", "spearman-euclidean")):
        r = write_run(folder, f"pairs-{name}", metrics=metrics[2:], params={"similarity": {"round": "cosine", "flat": "euclidean"}[name]})
        assert chosen_keys(Group("pairs", {"pairs": r}), None, "leading")[0] == [f"toy/{first}"]


def test_queries_are_aligned_by_id(folder):
    turned = write_run(folder, "turned", .1, order=list(range(N))[::-1], params={"lr": 9.})
    a, = go(folder, "turned", baseline="up").rows
    b, = go(folder, "up", baseline="turned").rows
    assert a.delta.mean == pytest.approx(-b.delta.mean) == pytest.approx(turned.after["toy/ndcg@10"] - go(folder, "up").rows[0].mean, abs=1e-6)
    assert a.delta.ci95[1] - a.delta.ci95[0] < .02, "unaligned queries would give an interval of about 0.2"
    turned.scores["ids"]["toy"] = pack([f"x{i}" for i in range(N)])
    notebook(folder / "turned.ipynb", {MIME: turned.to_dict()})
    with pytest.raises(InputError, match="other queries"): go(folder, "turned", baseline="up")


def test_failed_and_leaky_are_listed(folder):
    c = go(folder)
    page = bundle(c)["text/html"]
    assert "broken failed: DivergedError: the loss is not finite" in page and "broken" not in {x.group.name for x in c.rows}
    assert "leaky is marked: 1 evaluation query repeated in training, near 101, shared documents 168" in page and "leaky ⚠" in page
    with pytest.raises(InputError, match="none of these runs completed: broken: DivergedError"): go(folder, "broken")
    with pytest.raises(InputError, match="baseline broken failed"): go(folder, baseline="broken")
    with pytest.raises(InputError, match="nothing is left to compare with up"): go(folder, "up", baseline="up")
    write_run(folder, "cleaned", .1, leaks=LEAKY | {"policy": "drop", "allowed": False})
    assert "cleaned is marked" not in bundle(go(folder, "cleaned"))["text/html"]


def test_runs_without_a_record(folder):
    notebook(folder / "bare.ipynb", {"text/plain": "no record here"})
    (folder / "begun.ipynb").write_text(json.dumps({"cells": []}))
    (folder / "torn.ipynb").write_text("{")
    with pytest.raises(InputError, match="bare.ipynb holds no record"): go(folder, "bare")
    with pytest.raises(InputError, match="torn.ipynb: not a notebook"): go(folder, "torn")
    lines = go(folder).lines
    assert lines[0] == "bare.ipynb holds no record" and "torn.ipynb: not a notebook" in lines[1] and len(lines) == 2


def test_names_paths_and_globs(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for names in (["up"], ["runs/up.ipynb"], [str(folder / "up.ipynb")], ["u*"], ["up.ipynb"]): assert list(find_runs(names, folder)[0]) == ["up"]
    shutil.copy(folder / "up.ipynb", folder / "renamed.ipynb")
    (folder / "up.ipynb").unlink()
    assert list(find_runs(["up"], folder)[0]) == ["renamed"], "by the name in its record"
    with pytest.raises(InputError, match="none of these runs has the set 'toi'; there are: toy"): go(folder, sets="toi")
    with pytest.raises(InputError, match="none of these runs has the metric 'mrr'; there are: leading, ndcg@10"): go(folder, metric="mrr")


def test_the_best_score_stands_first(folder):
    "Where runs start from different bases, the largest gain is not the best model."
    write_run(folder, "late", .1, start=.08, params={"lr": 1.}, model={"base": "a", "sha256": "1" * 64})
    write_run(folder, "early", .02, start=-.2, params={"lr": 2.}, model={"base": "b", "sha256": "2" * 64})
    c = go(folder, "early, late")
    best, second = c.top()
    assert (best.group.name, second.group.name) == ("late", "early") and best.gain < second.gain
    assert re.search("better than base on toy .*: late, .*, early, ", sentence(c)) and as_latex(c).index("late") < as_latex(c).index("early")


def test_eight_rows_and_the_rest(folder):
    for i in range(7): write_run(folder, f"two{i}", .01 * i, sets=("toy", "second"), metrics=("mrr@10", "ndcg@10"), params={"lr": i})
    c = go(folder, "two*")
    top, rest = c.top(), c.rest()
    assert [x.set for x in top] == ["toy"] * 4 + ["second"] * 4 and {x.metric for x in top} == {"ndcg@10"}
    assert [x.group.name for x in top[:4]] == ["two6", "two5", "two4", "two3"], "the best of each set"
    assert len(rest) == 6 + 14 and {x.metric for x in rest[6:]} == {"mrr@10"}
    assert {x.metric for x in go(folder, "two*", metric="mrr@10").rows} == {"mrr@10"}


def test_sets_that_only_some_have(folder):
    write_run(folder, "wide", .1, sets=("toy", "far"), params={"lr": 3.})
    c = go(folder, "up, wide")
    assert [(x.group.name, x.set) for x in c.rows] == [("up", "toy"), ("wide", "toy"), ("wide", "far")] and c.lines == ["far was not measured by up"]
    c = go(folder, "wide", baseline="up")
    assert [(x.set, x.verdict == "not compared") for x in c.rows] == [("toy", False), ("far", True)]
    assert c.lines == ["far: wide can't be compared, for up didn't measure it"]


def test_measured_only(folder):
    "A record without scores before: compared with a run, not with a base model it doesn't hold."
    write_run(folder, "measured", .3, before=False, role="evaluate", params={"lr": 7.})
    c = go(folder, "measured, up")
    assert [x.verdict for x in c.rows] == ["not compared", "better"] and "measured can't be compared" in c.lines[0]
    assert [x.verdict for x in go(folder, "measured", baseline="up").rows] == ["better"]
    assert [x.verdict for x in go(folder, "same", baseline="measured").rows] == ["worse"]


def test_markdown(folder):
    write_run(folder, "50%_a&b|c", .1, params={"lr": 8.})
    c = go(folder, "same, leaky, broken, 50*")
    text = as_markdown(c)
    assert text.split("\n\n")[1] == sentence(c), "the verdict stands first"
    for part in ("a" * 64, "## Environment", "- broken failed: DivergedError", "- ⚠ leaky is marked", "| lr |"): assert part in text
    for block in text.split("\n\n"):
        rows = block.splitlines() if block.startswith("|") else []
        assert len({len(re.findall(r"(?<!\\)\|", r)) for r in rows}) <= 1, "the same number of cells in every row"


def test_latex(folder, tmp_path):
    write_run(folder, "50%_a&b #1 $x^2~{é}", .1, params={"lr": 8.})
    write_run(folder, "数", -.1, params={"lr": 9.})
    one, none = as_latex(go(folder, "same, 50*, 数*, seeds*")), as_latex(go(folder, "same"))
    assert one.count(r"\textbf") == 1 and r"\textbf" in next(x for x in one.splitlines() if x.startswith(r"50\%\_a\&b \#1 \$x"))
    assert none.count(r"\textbf") == 0 and r"\toprule" in none and r"\bottomrule" in none
    assert tex("a_b%c&d") == r"a\_b\%c\&d"
    for text in (one, none):
        bare = re.sub(r"\\.", "", text)
        assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and text.count(r"\begin") == text.count(r"\end")
        for line in text.splitlines()[5:-4]:
            if line.endswith(r"\\") and "multicolumn" not in line: assert len(re.findall(r"(?<!\\)&", line)) == 4, line
    if not shutil.which("pdflatex"): pytest.skip("pdflatex is not on the PATH; have it with `apt-get install texlive-latex-recommended`")
    (tmp_path / "t.tex").write_text("\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}\\begin{document}" + one + none + "\\end{document}")
    p = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0 and (tmp_path / "t.pdf").stat().st_size > 1000, p.stdout[-2000:]


def test_files_that_cannot_be_written(folder):
    (folder / "comparison").write_text("in the way")
    with pytest.raises(InputError, match="can't be written to"): write(go(folder, "up"), folder)


def test_leaderboard(folder):
    for r, d in (("up", "better"), ("leaky", "better")):
        raw = json.loads((folder / f"{r}.ipynb").read_text())
        raw["cells"][0]["outputs"][0]["data"][MIME]["delta"] = {"toy/ndcg@10": {"mean": .1, "ci95": [.05, .15], "p": .001, "n": N, "verdict": d}}
        (folder / f"{r}.ipynb").write_text(json.dumps(raw))
    write_run(folder, "newer", .1, sha="c" * 64)
    board = leaderboard(folder).set_index("run")
    assert set(board.index) == {"broken", "leaky", "newer", "same", "seeds-0", "seeds-1", "seeds-2", "up"}
    old, new = "toy/ndcg@10 (test, aaaaaaaa)", "toy/ndcg@10 (test, cccccccc)"
    assert board[[old, new]].notna().sum().tolist() == [6, 1], "scores on different data never share a column"
    assert board.loc["broken", ["status", "remarks"]].tolist() == ["failed", "DivergedError: the loss is not finite"] and board.loc["broken"].notna()[[old, new]].sum() == 0
    assert "near 101" in board.loc["leaky", "remarks"] and board.loc["up", ["verdict", "remarks"]].tolist() == ["toy better", ""]
    page = leaderboard_html(board.reset_index())
    assert page.count('<tr class="failed"') == 1 and page.count('<tr class="marked"') == 1 and page.count("<button>") == page.count("<th>") == len(board.columns) + 1
    assert f'data-v="{board.loc["up", old]}"' in page and '<a href="up.html">' in page


def test_leaderboard_file(folder, tmp_path):
    notebook(folder / "<b>.ipynb", {"text/plain": "x"})
    write_run(folder, "a<i>b", .1, params={"lr": 5.})
    c = go(folder, "up")
    notebook(folder / "comparison.ipynb", {COMPARISON: bundle(c)[COMPARISON]})
    text = write_leaderboard(folder).read_text()
    assert "<i>" not in text and f"- [comparison](comparison.ipynb): {sentence(c)}" in text and ".ipynb holds no record" in text
    (tmp_path / "empty").mkdir()
    assert write_leaderboard(tmp_path / "empty").read_text() == "No runs yet.\n"


def test_a_single_run_against_several_seeds(folder):
    "The spread of the baseline's seeds counts as well: the same test, seen from the other side."
    many, = go(folder, "up, seeds-*", baseline="seeds-0").rows
    turned, = go(folder, "up, seeds-*", baseline="up").rows
    assert many.delta.seeds == turned.delta.seeds == 3 and many.verdict == "better" and turned.verdict == "worse"
    assert many.delta.mean == pytest.approx(-turned.delta.mean) and many.delta.ci95 == pytest.approx([-x for x in turned.delta.ci95[::-1]])


def test_correlations_take_their_gold_values_along(folder, monkeypatch):
    "A rank correlation is no mean of its items: pairs and gold values are put in one order before it is worked out."
    gold = np.random.default_rng(1).permutation(N) + HARD
    def write_sts(name, noise, order):
        r = write_run(folder, name, sets=("sts",), metrics=("spearman",), order=order, params={"lr": noise})
        x = [(gold + np.random.default_rng(s).normal(0, n, N))[order] for s, n in ((2, 60), (3, noise))]
        r.scores["sts/spearman"] = pack(np.concatenate(x))
        notebook(folder / f"{name}.ipynb", {MIME: r.to_dict()})
    write_sts("sts", 5., list(range(N)))
    write_sts("turned", 30., list(range(N))[::-1])
    monkeypatch.setattr(Record, "truth", lambda r, key: gold[::-1] if r.run == "turned" else gold, raising=False)
    a, b = go(folder, "sts, turned").rows
    assert a.key == "sts/spearman" and a.verdict == "better" and a.gain > b.gain > 0
    assert go(folder, "sts", baseline="turned").rows[0].delta.mean == pytest.approx(a.gain - b.gain, abs=1e-6)
