"What a run is watched with: its log, its warnings, its live curve, and other tools that get its figures."
import importlib.util
import json
import math
import os
import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from conftest import ROOT
from embedlab.config import InputError
from embedlab.plots import plot_training
from embedlab.watching import FitLog, Watch, at_chance, chance_level, diverged, live_picture, overfit, plateau, reporters, spike, warn

kinds = lambda log: [text.split(":")[0] for _, text in log.warnings]


def noisy(curve, steps=200, sd=0.05, upto=1.0, seed=0):
    "A log whose loss follows `curve` (of the share of the run) with noise."
    rng = random.Random(seed)
    return FitLog(steps=steps, chance=chance_level(32), loss=[(i, curve(i / steps) + rng.gauss(0, sd)) for i in range(1, round(steps * upto) + 1)])


def test_log_survives_json():
    log = FitLog(steps=3, loss=[(1, 2.0), (2, 1.5)], norm=[(1, 3.0)], dev_loss=[(2, 1.7)], warnings=[(2, "spike: x")], batch=8, micro_batch=4, tokens=900, stopped="patience")
    assert FitLog(**json.loads(json.dumps(asdict(log)))) == log
    assert FitLog(**{"steps": 3, "loss": [[1, 2.0]], "rate": [], "dev": [[0, 0.5]], "chance": 3.4, "seconds": 1.0, "pairs_per_s": 9.0, "resumed_from": None}).dev == [(0, 0.5)], "as version 0.1 wrote it"


def test_chance_counts_documents():
    import torch
    from embedlab.losses import info_nce
    for columns in (1, 2, 4):
        assert info_nce(torch.ones(16, 4), torch.ones(16 * columns, 4)).item() == pytest.approx(chance_level(16, columns), abs=1e-5)


@pytest.mark.parametrize("norms, fires", [
    ([1.3, 4.8, 14.3], True),                  # guide 003's own
    ([7, 8, 6, 7, 9, 60, 7, 8], True),         # in the middle of a log that goes on
    ([12, 13, 11, 16, 14, 12, 17], False),     # above 10 throughout: what InfoNCE at 0.05 does
    ([1, 1.2, 1.1, 9.5], False),               # stands out, but is short
    ([40], False), ([], False)])
def test_spike(norms, fires):
    log = FitLog(steps=100, norm=[(i, float(n)) for i, n in enumerate(norms, 1)])
    assert bool(spike(log)) == fires
    assert spike(log, since=len(norms)) is None


def test_spike_says_where():
    assert "gradient norm 60.0 at step 50, against 7.0" in spike(FitLog(steps=100, norm=[(s, 7.0) for s in range(10, 50, 10)] + [(50, 60.0)]))


@pytest.mark.parametrize("curve, upto, fires", [
    (lambda t: 2.5, 0.5, True),
    (lambda t: 2.5, 0.45, False),                               # too early: two quarters are not over
    (lambda t: 1.5 + 2 * math.exp(-20 * t), 1, True),           # falls, then stops
    (lambda t: 2.5 + t, 1, True),                               # rises
    (lambda t: 3.5 - 1.5 * t, 1, False),
    (lambda t: 1 + 2.5 * math.exp(-3 * t), 1, False),
    (lambda t: 0.3, 1, False)])                                 # below ln 2: nothing to complain of
def test_plateau(curve, upto, fires):
    assert [bool(plateau(noisy(curve, upto=upto, seed=s))) for s in range(5)] == [fires] * 5


@pytest.mark.parametrize("at, norm, fires", [(37, 40.0, True), (36, 40.0, False), (36, 170.0, True)])
def test_a_spike_is_one_in_its_own_set(at, norm, fires):
    turns = {s: 40.0 if s % 4 == 0 else 8.0 for s in range(1, 41)}
    by_set = {"pairs": [(s, 3.0) for s, n in turns.items() if n == 8], "scores": [(s, 5.0) for s, n in turns.items() if n == 40]}
    assert bool(spike(FitLog(steps=40, norm=list({**turns, at: norm}.items()), by_set=by_set))) == fires

@pytest.mark.parametrize("slopes, alarms", [((300, 300), 0), ((math.inf, 300), 0), ((math.inf, math.inf), 101)])
def test_a_plateau_is_one_in_every_set(slopes, alarms):
    "The set with the higher loss comes more often near the end, so the mean over both rises in any case."
    rng, sets = np.random.default_rng(0), {"scores": 7.0, "pairs": 3.0}
    taken = np.where(rng.random(200) < np.linspace(0.2, 0.8, 200), *sets)
    slope = dict(zip(sets, slopes))
    loss = [(s, float(sets[n] * math.exp(-s / slope[n]) + rng.normal(0, 0.1))) for s, n in enumerate(taken, 1)]
    upto = lambda n: {name: [p for p, m in zip(loss[:n], taken) if m == name] for name in sets}
    known, mean = ([plateau(FitLog(steps=200, loss=loss[:n], by_set=upto(n) if by else {})) for n in range(100, 201)] for by in (True, False))
    assert sum(map(bool, known)) == alarms != sum(map(bool, mean))
    assert all("on scores" in said and "on pairs" in said for said in known if said)

def test_plateau_wants_to_be_sure():
    "Noise as large as the loss, or a handful of losses: hardly a warning, though half of the time the means stand the wrong way round."
    assert sum(bool(plateau(noisy(lambda t: 2.2 - 0.2 * t, sd=2.0, seed=s))) for s in range(40)) <= 3
    assert plateau(FitLog(steps=80, loss=[(s, 2.0) for s in range(10, 81, 10)])) is None


@pytest.mark.parametrize("train, held, fires", [(1.0, 1.6, True), (1.0, 1.4, False), (2.0, 1.0, False)])
def test_overfit(train, held, fires):
    log = FitLog(steps=100, loss=[(s, train) for s in range(1, 51)], dev_loss=[(0, 3.4), (50, held)])
    assert bool(overfit(log)) == fires
    if fires: assert f"validation loss {held:.2f} at step 50 is 0.60 above the training loss of {train:.2f}" in overfit(log)


def test_overfit_compares_with_the_losses_since_the_check_before():
    log = FitLog(steps=100, loss=[(s, 3.0 if s <= 50 else 0.5) for s in range(1, 101)], dev_loss=[(50, 2.0), (100, 1.5)])
    assert "training loss of 0.50" in overfit(log)
    assert overfit(FitLog(steps=100, dev_loss=[(0, 3.4)])) is None


@pytest.mark.parametrize("loss, held, fires", [
    (3.46, [], True), (3.0, [], False), (5.0, [], True),
    (0.8, [(100, 3.6)], True), (0.8, [(100, 3.3)], False),
    (0.8, [(0, 3.6)], False)])                                   # before the first step a model may know nothing
def test_chance(loss, held, fires):
    log = FitLog(steps=400, chance=chance_level(32), loss=[(s, loss) for s in range(1, 101)], dev_loss=held)
    assert bool(at_chance(log)) == fires
    if fires: assert "3.47 of a model that gives each of 32 documents the same score" in at_chance(log)
    assert held or at_chance(FitLog(steps=400, chance=log.chance, loss=log.loss[:99])) is None, "a run may start at chance"


def test_guide_004_is_warned_at_its_first_check():
    log = FitLog(steps=8290, chance=chance_level(64), loss=[(829, 2.8571)], dev_loss=[(829, 7.4524)])
    assert [w.split(":")[0] for w in warn(log)] == ["overfit", "chance"]


def test_each_kind_once():
    log = FitLog(steps=100, chance=chance_level(32), loss=[(s, 3.5) for s in range(1, 101)], norm=[(1, 1.0), (2, 50.0), (3, 1.0), (4, 1.0), (5, 70.0)], dev_loss=[(100, 9.0)])
    first = warn(log)
    assert sorted(w.split(":")[0] for w in first) == ["chance", "overfit", "plateau", "spike"]
    log.warnings = [(100, w) for w in first]
    assert warn(log) == []


class Trainer:
    "Calls a callback as transformers' trainer does, with figures that are made up."
    def __init__(self, watch, steps, start=0, history=(), front=True, accumulate=1):
        self.watch, self.args = watch, SimpleNamespace(gradient_accumulation_steps=accumulate)
        self.state = SimpleNamespace(max_steps=steps, global_step=start, log_history=list(history), is_world_process_zero=front)
        self.event("train_begin")
    def event(self, name, **kw): getattr(self.watch, f"on_{name}")(self.args, self.state, SimpleNamespace(), **kw)
    def log(self, **figures):
        self.state.log_history.append(figures | {"step": self.state.global_step})
        self.event("log", logs=figures)
    def run(self, until, loss=lambda s: 1 / s, norm=lambda s: 1.0, held={}):
        for s in range(self.state.global_step + 1, until + 1):
            self.event("step_begin"); self.state.global_step = s; self.event("step_end")
            self.log(loss=loss(s), grad_norm=norm(s), learning_rate=1e-4)
            if s in held: self.log(eval_dev=0.6, eval_loss=held[s])
        return self
    def end(self): self.event("train_end"); return self


def test_watch_fills_the_log_and_prints_a_line_each_tenth(capsys):
    log = FitLog(steps=40, batch=8, chance=chance_level(8))
    Trainer(Watch(log), 40).run(40, held={20: 0.1, 40: 0.1}).end()
    out = capsys.readouterr().out
    assert [p[0] for p in log.loss] == [p[0] for p in log.norm] == [p[0] for p in log.rate] == list(range(1, 41))
    assert log.dev == [(20, 0.6), (40, 0.6)] and log.dev_loss == [(20, 0.1), (40, 0.1)] and log.warnings == []
    lines = [x for x in out.splitlines() if x.startswith("step ")]
    assert [x.split(" ")[1] for x in lines] == [f"{s}/40" for s in range(4, 41, 4)]
    assert "loss 0.521" in lines[0], "the mean since the line before"   # (1 + 1/2 + 1/3 + 1/4) / 4
    assert "pairs/s" in lines[0] and "min left" in lines[0] and "training steps: 40 in" in out
    assert log.pairs_per_s == pytest.approx(40 * 8 / log.seconds)


def test_pairs_of_accumulated_batches_are_counted():
    log = FitLog(steps=4, batch=8)
    Trainer(Watch(log), 4, accumulate=3).run(4)
    assert log.pairs_per_s == pytest.approx(4 * 8 * 3 / log.seconds)


def test_watch_warns_once_of_each_kind(capsys):
    log = FitLog(steps=100, batch=32, chance=chance_level(32))
    Trainer(Watch(log), 100).run(100, loss=lambda s: 3.5 + 0.01 * (s % 2), norm=lambda s: 80.0 if s in (30, 60) else 2.0, held={50: 9.0, 100: 9.5}).end()
    assert sorted(kinds(log)) == ["chance", "overfit", "plateau", "spike"]
    assert dict((k, s) for (s, _), k in zip(log.warnings, kinds(log))) == {"chance": 25, "spike": 30, "plateau": 50, "overfit": 50}
    out = capsys.readouterr().out
    assert out.count("· warning ·") == 4 and "step 30 · warning · spike: gradient norm 80.0" in out


def test_a_continued_run_has_the_same_log(capsys):
    "The trainer's history comes with the checkpoint; the log is as if nothing had happened."
    figures = dict(loss=lambda s: 3.5 - s / 50, norm=lambda s: 50.0 if s == 8 else 1.0, held={10: 3.4, 20: 9.0})
    whole, first, second = (FitLog(steps=20, batch=4, chance=1.0) for _ in range(3))
    Trainer(Watch(whole), 20).run(20, **figures).end()
    cut = Trainer(Watch(first), 20).run(10, **figures)
    capsys.readouterr()
    Trainer(Watch(second), 20, 10, cut.state.log_history).run(20, **figures).end()
    for name in ("loss", "rate", "norm", "dev", "dev_loss", "warnings"): assert getattr(second, name) == getattr(whole, name) != []
    out = capsys.readouterr().out
    assert "training steps: 10 in" in out, "what this process did"
    assert [x.split(" ")[1] for x in out.splitlines() if x.startswith("step ") and "warning" not in x] == [f"{s}/20" for s in range(12, 21, 2)]


def test_a_run_that_stops_early_says_so(capsys):
    log = FitLog(steps=40, batch=4, stopped="no better dev score in 2 checks")
    Trainer(Watch(log), 40).run(12).end()
    out = capsys.readouterr().out
    assert "training steps: 12 in" in out and "stopped at step 12 of 40: no better dev score in 2 checks" in out


def test_other_processes_are_silent(capsys):
    log = FitLog(steps=20, batch=4, chance=0.1)
    Trainer(Watch(log), 20, front=False).run(20, loss=lambda s: 3.0).end()
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err == "" and len(log.loss) == 20 and log.warnings


def test_with_the_real_trainer(tiny_model, tmp_path, capsys):
    "Names and order of the events are transformers' own."
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    model = SentenceTransformer(str(tiny_model), device="cpu")
    rows = Dataset.from_dict({"anchor": [f"word {i}" for i in range(40)], "positive": [f"word {i} again" for i in range(40)]})
    args = SentenceTransformerTrainingArguments(output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=4, logging_steps=1, save_strategy="no", eval_strategy="steps", eval_steps=5,
                                                use_cpu=True, report_to="none", disable_tqdm=True)
    log = FitLog(steps=10, batch=4, chance=chance_level(4))
    SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows.select(range(8)), loss=MultipleNegativesRankingLoss(model), callbacks=[Watch(log)]).train()
    assert [s for s, _ in log.loss] == [s for s, _ in log.norm] == list(range(1, 11)) and [s for s, _ in log.dev_loss] == [5, 10]
    assert "step 10/10 · loss" in capsys.readouterr().out


def test_diverged_names_step_rows_and_checkpoint():
    text = str(diverged(math.nan, 37, 5e-5, list(range(100, 132)), Path("runs/a/checkpoints/checkpoint-30")))
    assert "the loss is nan at step 37, in a batch of rows 100, 101," in text and "24 more" in text and "checkpoint-30" in text and "now 5e-05" in text
    text = str(diverged(math.inf, 1, 1.0, [3, 5], what="gradient norm"))
    assert "the gradient norm is inf at step 1, in a batch of rows 3, 5; no checkpoint was written before" in text
    assert isinstance(diverged(math.nan, 1, 1.0), InputError)


def test_reporters(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in ("trackio", "wandb", "tensorboard") else real(name, *a))
    assert reporters([], tmp_path) == []
    for name in ("trackio", "wandb", "tensorboard"):
        with pytest.raises(InputError, match=f"{name}, which is not installed; run `pip install {name}`"): reporters([name], tmp_path)
    with pytest.raises(InputError, match="'mlflow'; known are trackio, wandb, tensorboard"): reporters(["mlflow"], tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: real("json") if name in ("trackio", "wandb", "tensorboard") else real(name, *a))
    assert reporters(["trackio", "wandb", "tensorboard"], tmp_path) == ["trackio", "wandb", "tensorboard"]
    out = capsys.readouterr().out
    assert "trackio: figures stay on this machine" in out and "WANDB_MODE=offline" in out and f"--logdir {tmp_path}" in out
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path), "beside the checkpoints, which are removed in the end, they would be lost"
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")


SETUP = """
import embedlab.watching as w
from types import SimpleNamespace as N
w.LiveCurve.pause, w.LiveCurve.share, drawn, picture = 0, 0, [], w.live_picture
w.live_picture = lambda log: drawn.append(log) or picture(log)
def run():
    watch, state = w.Watch(w.FitLog(steps=20, batch=4, chance=1.4)), N(max_steps=20, global_step=0, log_history=[], is_world_process_zero=True)
    go = lambda e: getattr(watch, "on_" + e)(N(gradient_accumulation_steps=1), state, None)
    go("train_begin")
    for s in range(1, 11):
        go("step_begin"); state.global_step = s; go("step_end"); state.log_history.append({"step": s, "loss": 1 / s}); go("log")
    return go
"""


def test_a_notebook_keeps_one_picture_at_most():
    "While a run goes on there is one, redrawn in place; a finished run takes it away, a failed one leaves it."
    cells = [SETUP, "run()('train_end'); print('drawn', len(drawn))", "run(); raise ValueError('cut')"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(nb, timeout=300, allow_errors=True, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [c.outputs for c in nb.cells]
    assert outputs[0] == [] and "drawn 10" in "".join(o.get("text", "") for o in outputs[1]) and outputs[2][-1].evalue == "cut"
    assert ["image/png" in o.data for out in outputs for o in out if o.output_type == "display_data"] == [False, False, False, True], "twice a bar and a curve"


def test_in_a_terminal_nothing_is_drawn(monkeypatch):
    import embedlab.watching as w
    monkeypatch.setattr(w, "live_picture", lambda log: pytest.fail("drawn"))
    Trainer(Watch(FitLog(steps=4, batch=4)), 4).run(4).end()


@pytest.mark.parametrize("log", [FitLog(), FitLog(steps=5, chance=1.0, loss=[(1, math.nan)], dev=[(0, 0.5)]),
                                 FitLog(steps=5, chance=1.0, loss=[(1, 2.0)], norm=[(1, 3.0)], dev_loss=[(1, 2.0)], rate=[(1, 1e-5)], warnings=[(1, "spike: x"), (1, "chance: y")])])
def test_pictures_of_any_log(log, tmp_path):
    fig = live_picture(log)
    fig.savefig(tmp_path / "live.png")
    assert [t.get_text().strip() for t in fig.axes[0].texts] == (["spike, chance"] if log.warnings else [])


def test_the_finished_picture_shows_norms_and_warnings(tmp_path):
    log = FitLog(steps=5, chance=1.0, loss=[(1, 2.0)], norm=[(1, 3.0)], rate=[(1, 1e-5)], warnings=[(1, "spike: x")])
    fig = plot_training(log)
    fig.savefig(tmp_path / "all.png")
    assert [t.get_text().strip() for t in fig.axes[0].texts] == ["spike"] and [t.get_text() for t in fig.axes[1].texts] == ["not measured"]
    assert fig.axes[2].get_title() == "gradient norm" and fig.axes[2].lines[0].get_ydata().tolist() == [3.0]


def test_a_regulariser_is_no_part_of_what_is_held_against_chance():
    "The sum is above chance and the task far below it; a task that is at chance is still found, whatever the regulariser."
    steps = range(1, 41)
    made = lambda task: FitLog(steps=40, chance=2.77, loss=[(s, task + 1.6) for s in steps], by_set={"pydocs": [(s, task) for s in steps]}, regular=[(s, 1.6) for s in steps], dev_loss=[(20, task), (40, task)])
    assert at_chance(made(1.5)) is None and "no better than" in at_chance(made(2.75)) and overfit(made(1.5)) is None
    worse = made(0.5); worse.dev_loss = [(20, 0.6), (40, 2.7)]
    assert "above the training loss of 0.50" in overfit(worse)
