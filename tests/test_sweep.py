"Sweeps: every combination once, whatever happens on the way."
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import yaml

from conftest import ROOT
from embedlab.comparison import COMPARISON, read_outputs
from embedlab.config import InputError, make_config
from embedlab.records import MIME, Record, read_record
from embedlab.sweeping import Job, SweepConfig, _left, collect, conclude, execute, finished, next_step, plan, places, run_jobs


def sweep_of(**params): return plan(make_config(SweepConfig, **params))


def executions(home, name) -> dict[str, int]:
    "Count how often papermill was started for each run of a sweep, by the logs."
    return {p.stem: p.read_text().count("Input Notebook:") for p in sorted((home / name).glob("*.log"))}


@pytest.fixture
def fixed(small) -> str:
    "The small run's settings as a sweep takes them; one epoch, one check."
    return json.dumps({k: v if isinstance(v, (int, float)) else str(v) for k, v in small.items() if k not in ("lr", "epochs")} | {"checks": 1})


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty folder of runs, which sweeps in this process use."
    (tmp_path / "runs").mkdir(exist_ok=True)
    monkeypatch.setenv("EMBEDLAB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def write(path, job, status="completed", end="now", exception=None, **params):
    "Write the notebook that a run of this job leaves."
    r = Record(job.run, status, params=job.settings.model_dump(mode="json") | params, error="InputError: no" if status == "failed" else None)
    cell = nbformat.v4.new_code_cell("r", outputs=[nbformat.v4.new_output("display_data", data={MIME: r.to_dict()})])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"end_time": end, "exception": exception}}), path)


class Ended:
    "A process that is over."
    def poll(self): return 0
    def kill(self): pass
    def wait(self): pass


class Toy:
    "In the place of `execute`: notes what was started, and where; leaves a finished notebook unless told otherwise."
    def __init__(self, **how): self.started, self.how = [], how
    def __call__(self, job, out, place):
        self.started.append(job.run)
        how = self.how.get(job.run, {})
        if isinstance(how, BaseException): raise how
        if isinstance(how, str): out.write_text(how)
        else: write(out, job, **how)
        return Ended()


@pytest.mark.parametrize("grid, seeds, cut", [("lr=1e-3", "0,1", 1), pytest.param("lr=1e-3,1e-2; epochs=1,2", "0,1,2", 5, marks=pytest.mark.slow)], ids=["small", "whole"])
def test_killed_and_started_again(papermill, fixed, grid, seeds, cut):
    "Signal 9 half-way; the same command executes what is missing, and nothing twice but the run that was cut."
    params = {"run": "grid", "grid": grid, "seeds": seeds, "fixed": fixed, "at_once": 1}
    args = [x for k, v in params.items() for x in ("-p", k, str(v))]
    env = os.environ | {"EMBEDLAB_RUNS": str(papermill.home), "EMBEDLAB_CACHE": str(papermill.home.parent / "cache"), "EMBEDLAB_MIN_FREE": str(2**20), "HF_HUB_OFFLINE": "1"}
    jobs = [j.run for j in sweep_of(**params)]
    first = subprocess.Popen([sys.executable, "-m", "papermill", "nbs/sweep.ipynb", str(papermill.home / "grid.ipynb"), *args], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (papermill.home / jobs[cut] / "fingerprint").exists():   # this run has begun, and locked its folder
        assert first.poll() is None, "the sweep ended before it was killed"
        time.sleep(0.05)
    ours = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    _, alive = psutil.wait_procs(ours, timeout=20)
    assert len(ours) >= 3 and not alive, "the sweep's kernel, the run and the run's kernel end with the sweep"
    kept = {n: (papermill.home / f"{n}.ipynb").stat().st_mtime_ns for n in jobs[:cut]}
    assert not (papermill.home / f"{jobs[cut]}.ipynb").exists()

    again = papermill("grid", driver="sweep", **params)
    assert again.code == 0, again.text
    assert executions(papermill.home, "grid") == {n: 2 if n == jobs[cut] else 1 for n in jobs}
    assert {n: (papermill.home / f"{n}.ipynb").stat().st_mtime_ns for n in kept} == kept
    assert all(read_record(papermill.home / f"{n}.ipynb").status == "completed" for n in jobs)
    c, = read_outputs(again.path, COMPARISON)
    assert {len(g) for g in c["groups"].values()} == {len(seeds.split(","))} and c["failed"] == {} and {n for g in c["groups"].values() for n in g} == set(jobs)
    text = again.path.read_text()
    assert f"{len(jobs)} runs, {cut} finished earlier, 1 at a time" in text and f"{len(jobs) - cut}/{len(jobs) - cut} {jobs[-1]} completed after" in text
    assert (papermill.home / "grid/comparison_report.md").is_file()
    r = read_record(papermill.home / f"{jobs[0]}.ipynb")
    assert r.split == "dev" and (r.params["lr"], r.params["epochs"], r.params["batch_size"]) == (1e-3, 1, 16)


def test_two_at_a_time_and_one_that_fails(papermill, fixed):
    "A combination that can't be trained is listed; the rest and the page are complete."
    ran = papermill("pair", driver="sweep", run="pair", grid="batch_size=16,200", seeds=1, fixed=fixed, at_once=2)
    assert ran.code == 0, ran.text
    c, = read_outputs(ran.path, COMPARISON)
    assert c["groups"] == {"pair-batch_size16-s0": ["pair-batch_size16-s0"]}
    (name, why), = c["failed"].items()
    assert name == "pair-batch_size200-s0" and why.startswith("InputError: ") and "80 rows don't fill one batch of 200" in why
    assert read_record(papermill.home / "pair-batch_size200-s0.ipynb").status == "failed"
    text = ran.path.read_text()
    assert "2 at a time" in text and re.search(r"1/2 pair-\S+ (completed|failed: .*) after \d+ s · about 0:\d\d:\d\d left", text)
    starts = [[nbformat.read(papermill.home / f"pair-batch_size{b}-s0.ipynb", 4).metadata.papermill[k] for k in ("start_time", "end_time")] for b in (16, 200)]
    assert max(s for s, _ in starts) < min(e for _, e in starts), "the first two overlap"


@pytest.mark.parametrize("params, expected", [
    ({"grid": "epoch=1,2"}, "unknown parameter 'epoch'; did you mean 'epochs'?"),
    ({"gird": "epochs=1,2"}, "unknown parameter 'gird'; did you mean 'grid'?"),
], ids=["in the grid", "of the sweep"])
def test_refused_before_anything_runs(papermill, params, expected):
    ran = papermill("bad", driver="sweep", run="bad", **params)
    assert ran.code != 0
    error, = ran.errors()
    assert error.ename == "InputError" and expected in error.evalue and len(error.traceback) == 1
    assert [p.name for p in papermill.home.iterdir()] == ["bad.ipynb"]


@pytest.mark.parametrize("params, expected", [
    ({}, "nothing to sweep"),
    ({"grid": "lr=1e-5,5"}, "lr must be at most 1, not 5"),
    ({"grid": "lr"}, "'lr' is no name=value"),
    ({"grid": "{"}, "grid: "),
    ({"grid": 5}, "valid dictionary"),
    ({"grid": {"lr": []}}, "lr has no values"),
    ({"grid": "seed=0,1"}, "seed: the sweep sets this itself"),
    ({"fixed": "run=x", "seeds": 2}, "run: the sweep sets this itself"),
    ({"grid": "epochs=1,1"}, "both called sweep-epochs1"),
    ({"seeds": "0,0"}, "both called sweep-s0"),
    ({"seeds": [-1]}, "seeds must be at least 0, not -1"),
    ({"seeds": 2, "notebook": "trian"}, "'trian' is neither a file nor a trian.ipynb"),
    ({"seeds": 2, "notebook": "compare"}, "begins no run"),
    ({"seeds": 2, "notebook": "evaluate"}, "unknown parameter 'seed'"),
    ({"presets": "absent"}, "'absent' is neither a file"),
    ({"seeds": 2, "run": "a/b"}, "may hold letters"),
])
def test_bad_settings_are_one_line(params, expected):
    with pytest.raises(InputError, match=re.escape(expected)) as e: sweep_of(**params)
    assert "\n" not in str(e.value)


def test_names_are_the_same_tomorrow():
    names = lambda **kw: [j.run for j in sweep_of(run="x", **kw)]
    assert names(grid="lr=1e-5,5e-5; epochs=1,2", seeds=[3]) == [f"x-lr{a}-epochs{b}-s3" for a in ("1e-05", "5e-05") for b in (1, 2)]
    assert names(grid={"lr": ["1e-5", 5e-5]}) == names(grid='{"lr": [1e-5, 5e-5]}') == ["x-lr1e-05", "x-lr5e-05"]
    assert names(grid={"train": [["pydocs", "snli"]]}) == ["x-trainpydocs_snli"]
    a, b = names(grid={"base": ["./some where/model", "./some_where/model"]})
    assert a != b and all(re.fullmatch(r"x-base[\w.-]+", n) for n in (a, b))
    assert names(grid="similarity=cosine,dot", notebook="evaluate") == ["x-similaritycosine", "x-similaritydot"]


def test_presets(tmp_path):
    one, two, bad = (tmp_path / f"{n}.yaml" for n in ("small-rate", "large-rate", "bad"))
    one.write_text(yaml.safe_dump({"lr": 1e-5, "epochs": 3})); two.write_text("lr: 1e-4\nsplit: test\n"); bad.write_text("- 1\n")
    jobs = sweep_of(run="p", presets=[str(one), str(two)], grid="dropout=0.1", fixed="epochs=2", seeds="7")
    assert [(j.run, j.settings.lr, j.settings.epochs, j.settings.dropout, j.settings.seed, j.settings.split, j.settings.preset) for j in jobs] == [
        ("p-small-rate-dropout0.1-s7", 1e-5, 2, 0.1, 7, "dev", "small-rate"), ("p-large-rate-dropout0.1-s7", 1e-4, 2, 0.1, 7, "test", "large-rate")]
    with pytest.raises(InputError, match="a preset holds name: value"): sweep_of(presets=[str(bad)])
    bad.write_text("a: [")
    with pytest.raises(InputError, match="not YAML"): sweep_of(presets=[str(bad)])


def test_what_is_finished(home):
    a, b, c, d = jobs = sweep_of(grid="lr=1e-5,2e-5,3e-5,4e-5")
    cfg = make_config(SweepConfig, grid="lr=1e-5,2e-5,3e-5,4e-5", at_once=1)
    write(home / f"{a.run}.ipynb", a)
    (home / f"{b.run}.ipynb").write_text('{"cells": [')                     # torn
    write(home / f"{c.run}.ipynb", c, "failed")
    (home / "sweep").mkdir()
    write(home / "sweep" / f"{d.run}.json", d)                              # killed before it was moved
    toy = Toy()
    assert run_jobs(cfg, jobs, toy) == {} and toy.started == [b.run, c.run]
    assert run_jobs(cfg, jobs, toy) == {} and len(toy.started) == 2
    fresh = make_config(SweepConfig, **cfg.model_dump() | {"fresh": True})
    assert run_jobs(fresh, plan(fresh), toy) == {} and len(toy.started) == 6
    # a record that is older than a setting, and one of other settings
    old = json.loads((home / f"{a.run}.ipynb").read_text())
    del old["cells"][0]["outputs"][0]["data"][MIME]["params"]["ema"]
    (home / f"{a.run}.ipynb").write_text(json.dumps(old))
    assert finished(a, home)
    write(home / f"{d.run}.ipynb", d, max_pairs=7)
    with pytest.raises(InputError, match=r"sweep-lr4e-05.ipynb is a finished run of other settings \(max_pairs is 7, not 2400\).*fresh=True"): run_jobs(cfg, jobs, toy)
    assert len(toy.started) == 6 and read_record(home / f"{d.run}.ipynb").params["max_pairs"] == 7


@pytest.mark.parametrize("left, why", [
    ({"end": None}, "the last line"), ({"exception": True}, "the last line"), ("{", "the last line"), ({"status": "failed", "exception": True}, "InputError: no"),
], ids=["killed after its record", "failed after its record", "torn", "failed"])
def test_what_did_not_end_is_not_finished(home, left, why):
    "A completed record in a notebook that broke off later is no finished run."
    job, other = sweep_of(grid="lr=1e-5,2e-5")
    cfg = make_config(SweepConfig, grid="lr=1e-5,2e-5", at_once=1)
    (home / "sweep").mkdir()
    (home / "sweep" / f"{job.run}.log").write_text("first\nthe last line\n\n")
    toy = Toy(**{job.run: left})
    assert run_jobs(cfg, [job, other], toy) == {job.run: why} and finished(other, home) and not finished(job, home)
    toy.how = {}
    assert run_jobs(cfg, [job, other], toy) == {} and toy.started == [job.run, other.run, job.run]


def test_nothing_completed(home):
    jobs = sweep_of(grid="lr=1e-5,2e-5")
    with pytest.raises(InputError, match="none of the runs completed: sweep-lr1e-05: no; sweep-lr2e-05: neither"):
        conclude(make_config(SweepConfig), jobs, {"sweep-lr1e-05": "no", "sweep-lr2e-05": "neither"})


def test_an_interrupted_sweep_ends_its_runs(home):
    job, other = sweep_of(grid="lr=1e-5,2e-5")
    cfg = make_config(SweepConfig, grid="lr=1e-5,2e-5", at_once=2)
    begun = []

    def go(j, out, place):
        if begun: raise KeyboardInterrupt
        begun.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return begun[0]
    with pytest.raises(KeyboardInterrupt): run_jobs(cfg, [job, other], go)
    assert begun[0].poll() is not None
    assert run_jobs(cfg, [job, other], Toy()) == {}, "the lock is given back"


def test_one_sweep_at_a_time(home, monkeypatch):
    from filelock import FileLock, Timeout
    job, = sweep_of(grid="lr=1e-5")
    monkeypatch.setattr("embedlab.sweeping.FileLock", lambda path, timeout: FileLock(path, timeout=0))
    with FileLock(home / "sweep.lock"), pytest.raises(InputError, match="sweep sweep is under way in another process"):
        run_jobs(make_config(SweepConfig, grid="lr=1e-5"), [job], Toy())


def test_execute_ends_with_its_parent(tmp_path, home):
    "The pipe is closed when the sweep is gone, and the run goes too."
    note = tmp_path / "sleep.ipynb"
    cell = nbformat.v4.new_code_cell("run = None", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell(f"open({str(tmp_path / 'begun')!r}, 'w').close(); import time; time.sleep(60)")],
                                            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), note)
    job, = sweep_of(grid="lr=1e-5")
    p = execute(type(job)("x", note, {"run": "x"}, job.settings), home / "x.json", {"OMP_NUM_THREADS": "1"})
    while not (tmp_path / "begun").exists(): assert p.poll() is None; time.sleep(0.05)
    below = psutil.Process(p.pid).children(recursive=True)
    p.stdin.close()
    assert p.wait(20) == 1 and not psutil.wait_procs(below, timeout=20)[1]
    assert collect(job, home / "x.json", home)


def test_places(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False); monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = lambda gpus, cores, memory: [monkeypatch.setattr("torch.cuda.device_count", lambda: gpus), monkeypatch.setattr("torch.backends.mps.is_available", lambda: False),
                                           monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False),
                                           monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": memory * 2**30}))]
    machine(0, 16, 64)
    assert places(None, 100) == [{"OMP_NUM_THREADS": "1"}] * 16 and places(None, 3) == [{"OMP_NUM_THREADS": "5"}] * 3
    assert places(4, 100) == [{"OMP_NUM_THREADS": "4"}] * 4
    machine(0, 16, 9); assert len(places(None, 100)) == 2
    machine(0, 2, 1); assert places(None, 100) == [{"OMP_NUM_THREADS": "2"}]
    machine(1, 16, 64); assert places(None, 100) == [{"OMP_NUM_THREADS": "16"}]
    machine(2, 16, 64)
    assert places(None, 100) == [{"OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": g} for g in "01"]
    assert places(1, 100) == [{"OMP_NUM_THREADS": "16"}], "a run that has the machine for itself has all GPUs"
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places(3, 100)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places(None, 100)] == ["5", "7"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert {p["OMP_NUM_THREADS"] for p in places(None, 100)} == {"3"}


def test_what_is_left_and_what_is_worth_confirming():
    "Two at a time halve what is left, and a gain on the second set is a gain."
    assert _left([60.0], [50.0], waiting=0, places=2).seconds == 10
    assert _left([50.0, 70.0], [30.0], waiting=3, places=2).seconds == (3 * 60 + 30) / 2
    group = SimpleNamespace(name="g", label="g", runs={"g-s0": None})
    row = lambda name, verdict: SimpleNamespace(set=name, mean=0.5, verdict=verdict, group=group)
    job = Job("g-s0", ROOT / "nbs/train.ipynb", {"lr": 1e-4, "run": "g-s0"}, make_config(split="dev"))
    c = lambda *rows: SimpleNamespace(rows=rows, sets=[x.set for x in rows], baseline="base")
    assert "Best on b (dev): g" in next_step(None, [job], c(row("a", "within noise"), row("b", "better")))
    assert next_step(None, [job], c(row("a", "within noise"), row("b", "worse"))) == "g has the highest score on a and is within noise beside base; on b the highest is not better either: there is nothing to confirm on the test split."
