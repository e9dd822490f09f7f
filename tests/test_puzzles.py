"Grid puzzles: from a file to a changed task and back, and the families that make them."
import hashlib
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedlab import puzzles
from embedlab.config import InputError
from embedlab.data import digest
from embedlab.families import FAMILIES, HELD_OUT, SEEN, Family, fitting, make_task, make_tasks, verify, well_posed
from embedlab.puzzles import IDENTITY, Change, as_task, draw_grids, draw_task, grid_text, leave_one_out, load_tasks, random_change, read_task, solved_needed, text_grid

ROW = {"train": [{"input": [[1, 2, 3], [0, 0, 4]], "output": [[3, 2, 1], [4, 0, 0]]}, {"input": [[5, 0]], "output": [[0, 5]]}],
       "test": [{"input": [[7, 7, 0], [8, 0, 0], [0, 0, 9]], "output": [[0, 7, 7], [0, 0, 8], [9, 0, 0]]}]}
any_grid = lambda rng: rng.integers(0, rng.integers(1, 11), rng.integers(1, 31, 2), np.uint8)
same = lambda a, b: a.dtype == b.dtype == np.uint8 and np.array_equal(a, b)


@pytest.fixture(scope="module")
def arc():
    folder = Path(os.environ.get("EMBEDLAB_DATA", "missing")) / "arc-agi-1" / "training"
    if not folder.is_dir(): pytest.skip("set EMBEDLAB_DATA to a folder that holds arc-agi-1/training, from https://github.com/fchollet/ARC-AGI")
    return load_tasks("arc-agi-1")


def test_changes_are_undone():
    "Every turn, any colours, any grid: undone exactly, in memory as in text; no two turns of a grid without symmetry are alike."
    rng = np.random.default_rng(0)
    for n in range(2000):
        g, c = any_grid(rng), replace(random_change(rng, 3, keep_black=bool(n % 2)), turn=n % 8)
        assert same(c.undo(c.grid(g)), g) and same(c.grid(c.undo(g)), g) and same(text_grid(grid_text(g)), g)
        assert same(c.undo(text_grid(grid_text(c.grid(g)))), g) and same(IDENTITY.grid(g), g)
        if n % 2: assert (c.grid(g) == 0).sum() == (g == 0).sum(), "black stays"
    lone = np.array([[1, 2], [3, 4], [5, 6]], np.uint8)
    assert len({grid_text(Change(t).grid(lone)) for t in range(8)}) == 8
    assert len({random_change(rng, 3) for _ in range(300)}) == 300 and any(c.colours[0] for c in (random_change(rng, 3, keep_black=False) for _ in range(30)))
    made = Change(1).grid(lone); made[0, 0] = 9
    assert lone[0, 1] == 2, "a change gives a grid of its own"


def test_a_changed_task():
    "Grids change alike everywhere; demonstrations take their new order; a test without an output stays without."
    t = as_task(ROW | {"test": ROW["test"] + [{"input": [[1]]}]}, "flip")
    c = Change(5, (0, 2, 3, 4, 5, 6, 7, 8, 9, 1), (1, 0))
    changed = c.task(t)
    assert [same(c.undo(a), b) for p, q in zip(changed.demos, t.demos[::-1]) for a, b in zip(p, q)] == [True] * 4
    assert same(c.undo(changed.tests[0][1]), t.tests[0][1]) and changed.tests[1][1] is None and changed.name == t.name
    assert changed != t and IDENTITY.task(t) == t and hash(IDENTITY.task(t)) == hash(t) and changed.fingerprint != t.fingerprint


@pytest.mark.parametrize("change, said", [({"turn": 8}, "from 0 to 7, not 8"), ({"turn": -1}, "not -1"), ({"colours": (0,) * 10}, "each of 0 to 9 once"), ({"colours": (0, 1, 2)}, "each of 0 to 9 once"),
                                          ({"order": (0, 2)}, "each of 0 to 1 once"), ({"order": (2, 1, 0)}, "task 'flip' has 2 demonstrations; the change orders 3")])
def test_no_change(change, said):
    with pytest.raises(InputError, match=said): Change(**change).task(as_task(ROW, "flip"))


@pytest.mark.parametrize("text", ["", "\n", "12\n3", "12\n34\n", "\n12", "12\n\n34", "1 2", "12\r\n34", "1a", "-1", "²", "٣", "0" * 31, "\n".join("0" * 31), "[[1, 2]]"])
def test_no_grid(text): assert text_grid(text) is None


def spoilt(part: str = "train", whole: dict | None = None, **pair): return ROW | (whole or {part: [ROW[part][0] | pair]})


WRONG = [
    (spoilt(output=[[1, 2], [3]]), "train[0].output: row 2 is 1 wide and row 1 is 2; make all rows"),
    (spoilt(input=[[1], []]), "train[0].input: row 2 is 0 wide"),
    (spoilt("test", input=[[1, 10]]), "test[0].input: 10 in row 1, column 2 is no colour; colours are the whole numbers 0 to 9"),
    (spoilt(input=[[-1]]), "-1 in row 1, column 1 is no colour"),
    (spoilt(input=[[1.0]]), "1.0 in row 1, column 1 is no colour"),
    (spoilt(input=[["1"]]), "'1' in row 1, column 1 is no colour"),
    (spoilt(input=[[True]]), "True in row 1, column 1 is no colour"),
    (spoilt(input=[[None, 1]]), "None in row 1, column 1 is no colour"),
    (spoilt(input=[["long\n" * 40]]), "is no colour"),
    (spoilt(input=[]), "train[0].input: the grid is empty; give it one row"),
    (spoilt(input=[[]]), "the grid is empty"),
    (spoilt(input=[[0] * 31]), "1 × 31 cells; a grid has 30 × 30 at most; cut it or leave the task out"),
    (spoilt(input=[[0]] * 31), "31 × 1 cells"),
    (spoilt(input="12"), "a grid is a list of rows, each a list of colours; got '12'"),
    (spoilt(input=[1, 2]), "a grid is a list of rows, each a list of colours; got [1, 2]"),
    (spoilt(output=None), "train[0].output: missing; give the grid, or leave the demonstration out"),
    (spoilt("test", input=None), "test[0].input: missing; give the grid, or leave the test out"),
    (spoilt(whole={"train": ["x"]}), "train[0].input: missing"),
    (spoilt(whole={"train": []}), "no demonstration; list one at least under \"train\""),
    (spoilt(whole={"test": []}), "no test input; list one at least under \"test\""),
    ({"train": ROW["train"]}, "no test input"),
    ([ROW], "an object with train and test is needed, not list"),
]


@pytest.mark.parametrize("row, said", WRONG, ids=[s[:40] for _, s in WRONG])
def test_no_task(row, said):
    with pytest.raises(InputError) as e: as_task(row, "mine")
    assert str(e.value).startswith("task 'mine'") and said in str(e.value) and "\n" not in str(e.value)


def test_scoring_needs_solutions():
    t, open_ = as_task(ROW, "a"), as_task(spoilt("test", output=None), "b")
    assert open_.tests[0][1] is None and open_.largest == 3 and solved_needed([t]) is None
    with pytest.raises(InputError, match=r"task 'b', test\[0\].output: missing, as in 2 of 3 tests; scoring needs solutions"): solved_needed([t, open_, open_])


def test_files(tmp_path):
    "A folder, a file, Kaggle's pair of files; what is wrong is named with its file."
    for n in "cab": (tmp_path / f"{n}.json").write_text(json.dumps(ROW))
    assert [t.name for t in load_tasks(str(tmp_path))] == ["a", "b", "c"] and load_tasks(str(tmp_path / "a.json")) == [read_task(tmp_path / "a.json")]
    many = tmp_path / "many"; many.mkdir()
    challenges, solutions = many / "x_challenges.json", many / "x_solutions.json"
    open_ = spoilt("test", output=None)
    challenges.write_text(json.dumps({"t2": open_, "t1": open_}))
    assert [(t.name, t.tests[0][1]) for t in load_tasks(str(challenges))] == [("t1", None), ("t2", None)]
    solutions.write_text(json.dumps({"t2": [ROW["test"][0]["output"]]}))
    first, second = load_tasks(str(challenges))
    assert first.tests[0][1] is None and second.tests[0][1].tolist() == ROW["test"][0]["output"]
    for content, said in [({"t2": []}, "x_solutions.json, task 't2': a list of 1 grids is needed"), ({"t2": [[[11]]]}, r"task 't2', test\[0\].output: 11 in row 1"), ([], "x_solutions.json: an object is needed")]:
        solutions.write_text(json.dumps(content))
        with pytest.raises(InputError, match=said): load_tasks(str(challenges))
    challenges.write_text(json.dumps({"t2": open_ | {"test": ["x"]}})); solutions.write_text(json.dumps({"t2": [[[1]]]}))
    with pytest.raises(InputError, match=r"task 't2', test\[0\].input: missing"): load_tasks(str(challenges))
    (bad := many / "bad.json").write_text("{")
    (empty := tmp_path / "empty").mkdir(); (none := tmp_path / "none.json").write_text("{}")
    for name, said in [(bad, "bad.json: not valid JSON"), (empty, "holds no .json file"), (none, "none.json: holds no task"), (tmp_path / "gone.json", "gone.json': no such file or folder .looked from"), ("arc-agi-9", "known by name is arc-agi-1")]:
        with pytest.raises(InputError, match=said) as e: load_tasks(str(name))
        assert "\n" not in str(e.value)


def archive_of(files: dict):
    "Stand in for the download: an archive laid out as GitHub's."
    def download(url, path, md5=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as z:
            for n, content in files.items(): z.writestr(f"ARC-AGI-{puzzles.COMMIT}/data/{n}", content)
        return path
    return download


def test_the_published_tasks_are_checked(tmp_path, monkeypatch):
    "Without a folder they are downloaded; other content, no archive or no network leaves nothing behind, and the line says what to do."
    monkeypatch.setenv("EMBEDLAB_DATA", str(tmp_path / "none")); monkeypatch.setenv("EMBEDLAB_CACHE", str(tmp_path / "cache"))
    text, home = json.dumps(ROW), tmp_path / "cache/data/arc-agi-1/training"
    def broken(*a): raise OSError("unreachable")
    def no_archive(url, path, md5=None): path.parent.mkdir(parents=True, exist_ok=True); path.write_text("not found"); return path
    for way, said in [(broken, r"could not be downloaded \(OSError\); looked for .*none/arc-agi-1/training.*; clone https://github.com/fchollet/ARC-AGI and put"), (no_archive, "BadZipFile"),
                      (archive_of({"training/a.json": text}), "its 1 training files have SHA-256 .*; clone")]:
        monkeypatch.setattr(puzzles, "download", way)
        with pytest.raises(InputError, match=said): load_tasks("arc-agi-1")
        assert not home.exists() and not [*tmp_path.rglob("*.zip")]
    monkeypatch.setattr(puzzles, "download", archive_of({"training/a.json": text, "evaluation/b.json": text}))
    monkeypatch.setattr(puzzles, "ARC_SHA256", digest([["a.json", hashlib.sha256(text.encode()).hexdigest()]]))
    assert [t.name for t in load_tasks("arc-agi-1")] == ["a"]
    monkeypatch.setattr(puzzles, "download", broken)
    assert [t.name for t in load_tasks("arc-agi-1")] == ["a"], "from the cache"


def test_the_real_tasks(arc, tmp_path, monkeypatch):
    "All 400 load, go through text and back, and are those of the pinned commit; 220 have no side over 12."
    assert len(arc) == 400 and [t.name for t in arc] == sorted(t.name for t in arc) and len({t.fingerprint for t in arc}) == 400
    assert all(same(text_grid(grid_text(g)), g) for t in arc for g in t.grids)
    assert sum(t.largest <= 12 for t in arc) == 220 and max(t.cells for t in arc) == 900
    folder = Path(os.environ["EMBEDLAB_DATA"]) / "arc-agi-1" / "training"
    monkeypatch.setenv("EMBEDLAB_DATA", str(tmp_path)); monkeypatch.setenv("EMBEDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(puzzles, "download", archive_of({f"training/{p.name}": p.read_bytes() for p in folder.glob("*.json")}))
    assert load_tasks("arc-agi-1") == arc


def held_back(t, rng) -> bool:
    "No stream of text for tuning on a task, its changes undone, holds a test's output that no demonstration shows."
    shown = {grid_text(g) for pair in t.demos for g in pair}
    secret = {grid_text(y) for _, y in t.tests} - shown
    stream = []
    for part in leave_one_out(t):
        c = random_change(rng, len(part.demos))
        stream += [grid_text(c.undo(text_grid(grid_text(g)))) for g in c.task(part).grids]
    return not secret & {*stream} and {*stream} == shown


def test_the_test_is_held_back():
    rng = np.random.default_rng(0)
    tasks = make_tasks([*FAMILIES], 96)
    assert all(held_back(t, rng) for t in tasks) and sum(grid_text(t.tests[0][1]) not in {grid_text(y) for _, y in t.demos} for t in tasks) > 60
    t = as_task(ROW, "a")
    assert [(p.name, len(p.demos), p.tests == [pair]) for p, pair in zip(leave_one_out(t), t.demos)] == [("a-without-0", 1, True), ("a-without-1", 1, True)]
    with pytest.raises(InputError, match="task 'a-without-0' has 1 demonstration; leaving one out needs two at least"): leave_one_out(leave_one_out(t)[0])


def test_the_real_tests_are_held_back(arc):
    rng = np.random.default_rng(0)
    assert all(held_back(t, rng) for t in arc if t.largest <= 15)


def test_pictures():
    "A column a pair or an answer; cells have one size."
    t = as_task(ROW, "a")
    fig = draw_task(t, [[t.tests[0][1], t.tests[0][0], None]])
    assert len(fig.axes) == 2 * 6 and [a.get_title() for a in fig.axes] == ["demo 1", "demo 2", "test 1", "", "", "", "", "", "solution", "right", "wrong", "answer"]
    fig = draw_grids([np.zeros((2, 9), np.uint8), np.zeros((9, 2), np.uint8), None, *t.grids], columns=4)
    fig.canvas.draw()
    assert len(fig.axes) == 12 and len({round(float(a.bbox.width / np.ptp(a.get_xlim())), 2) for a in fig.axes if a.collections}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    "Fifty tasks pass the verifier, keep to their size, are not trivial, settle their rule and come out the same again; a wrong output is found."
    f, rng = FAMILIES[family], np.random.default_rng(1)
    for seed in range(50):
        size = (3, 4, 6, 6, 9, 12)[seed % 6]
        t = make_task(family, seed, size)
        pairs = t.demos + t.tests
        assert verify(t, family) == "" and t == make_task(family, seed, size) and t.family == family and (len(t.demos), len(t.tests)) == (3, 1)
        assert t.largest <= max(size, 4) and all(g.dtype == np.uint8 and g.flags.c_contiguous and g.base is None for g in t.grids) and as_task(json.loads(json.dumps(
            {k: [{"input": x.tolist(), "output": y.tolist()} for x, y in p] for k, p in (("train", t.demos), ("test", t.tests))})), t.name).fingerprint == t.fingerprint
        assert len({grid_text(x) for x, _ in pairs}) == 4 and len({grid_text(y) for _, y in t.demos}) > 1 and not any(np.array_equal(x, y) for x, y in pairs)
        rules = fitting(f, t.demos)
        assert rules and {grid_text(f.solve(t.tests[0][0], r)) for r in rules} == {grid_text(t.tests[0][1])}
        if f.known_colours: assert {*t.tests[0][0].flat} <= {v for x, _ in t.demos for v in x.flat}
        k = seed % 4
        x, y = pairs[k]
        wrong = y.copy(); at = rng.integers(y.size); wrong.flat[at] = (wrong.flat[at] + rng.integers(1, 10)) % 10
        for bad in (wrong, np.vstack([y, y[:1]]), np.hstack([y, y[:, :1]]), pairs[k - 1][1] if not np.array_equal(y, pairs[k - 1][1]) else wrong):
            some = [*pairs]; some[k] = (x, bad)
            assert f"{t.name}, " in verify(replace(t, demos=some[:3], tests=some[3:]), family)


def test_families_are_different():
    "No held-out task of these is answered by a rule that was trained on, nor passes as one of those families."
    assert (len(FAMILIES), len(SEEN), len(HELD_OUT)) == (24, 18, 6) and {*SEEN} | {*HELD_OUT} == {*FAMILIES}
    for t in make_tasks(HELD_OUT, 60, seed=2):
        assert [n for n in SEEN if fitting(FAMILIES[n], t.demos + t.tests)] == [] and all(verify(t, n) for n in SEEN)


def test_open_demonstrations_are_refused():
    "One to the right and two to the left are alike on grids three wide; a colour that was never shown may become anything."
    shift, recolour = FAMILIES["shift"], FAMILIES["recolour"]
    three = [(x, np.roll(x, 1, 1)) for x in (np.array([[1, 0, 2]], np.uint8), np.array([[0, 4, 4]], np.uint8))]
    assert fitting(shift, three) == [(0, 1), (0, -2)] and not well_posed(shift, three, np.array([[6, 0, 0, 7]], np.uint8)) and well_posed(shift, three, np.array([[6, 0, 7]], np.uint8))
    grid = lambda *row: np.array([row], np.uint8)
    demos = [(grid(1, 4, 2), grid(2, 4, 3)), (grid(1, 1, 4), grid(2, 2, 4))]
    assert well_posed(recolour, demos, grid(2, 1, 1)) and not well_posed(recolour, demos, grid(2, 1, 5)), "nobody knows that 5 stays"
    t = make_task("shift", 0)
    assert "leave the rule open" in verify(replace(t, demos=three, tests=[(grid(6, 0, 0, 7), grid(7, 6, 0, 0))]), "shift")
    assert "no output" in verify(replace(t, tests=[(t.tests[0][0], None)]), "shift") and "the output is the input" in verify(replace(t, tests=[(t.tests[0][0],) * 2]), "shift")


def test_tasks_of_a_seed():
    "Different tasks, in turn of the families; the same on every machine; those to avoid never come up."
    tasks = make_tasks(SEEN, 200, seed=3, size=4)
    prints = [t.fingerprint for t in tasks]
    assert len({*prints}) == len({t.name for t in tasks}) == 200 and [t.family for t in tasks[:36]] == [*SEEN] * 2
    assert not {*prints} & {t.fingerprint for t in make_tasks(SEEN, 200, seed=4, size=4)} and tasks[7] == make_task(tasks[7].family, int(tasks[7].name.split("-")[-1]), 4)
    rest = make_tasks(SEEN, 200, seed=3, size=4, avoid={*prints[:50]})
    assert not {t.fingerprint for t in rest} & {*prints[:50]} and len({t.fingerprint for t in rest}) == 200
    assert digest([t.fingerprint for t in make_tasks([*FAMILIES], 240)]) == "3c80c613bbae6c3480325b1f80979764859729186b32a58ee1cb7908f349655a", "records name seeds: what a seed gives may not change unnoticed"
    for call, said in [(lambda: make_task("flop", 0), "family 'flop' is not known; known are flip"), (lambda: make_task("flip", 0, 2), "between 3 and 12, not 2"), (lambda: make_task("flip", 0, 13), "not 13"),
                       (lambda: make_task("flip", 0, 6, 0), "demos must be at least 1 .*, not 0 and 0"), (lambda: make_task("flip", -1), "seed at least 0, not 3 and -1"), (lambda: make_tasks([], 3), "no family is named; known are flip")]:
        with pytest.raises(InputError, match=said): call()


def test_families_that_give_no_task(monkeypatch):
    "A rule that changes nothing, one whose outputs are all alike, and one with too few inputs: refused, not tried for ever."
    few = lambda rng, size, rule: np.array([[rng.integers(1, 5), 0, 0]], np.uint8)
    for name, solve in (("same", lambda x, rule: x), ("alike", lambda x, rule: np.ones_like(x)), ("few", lambda x, rule: np.fliplr(x)), ("black", lambda x, rule: np.zeros_like(x))):
        monkeypatch.setitem(FAMILIES, name, Family("", (None,), few, solve, lambda x, y, rule: True))
    for name in ("same", "alike", "black"):
        with pytest.raises(InputError, match=f"family '{name}': no 3 demonstrations with sides up to 6 that settle the rule"): make_task(name, 0)
    with pytest.raises(InputError, match="30 different tasks of few with sides up to 6 can't be had; 24 can"): make_tasks(["few"], 30)
