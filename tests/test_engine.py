"Faults while training: what is killed, starved, torn or told to stop ends as described, and the same call continues to the same weights."
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, write_beir

from embedlab import engine
from embedlab.checkpoints import SEAL, checkpoints, fault_of, last_checkpoint, step_of
from embedlab.collections import TrainingSet, training_sets
from embedlab.config import InputError, RunConfig, make_config
from embedlab.encoding import unit
from embedlab.evaluation import evaluate
from embedlab.losses import ContrastiveLoss
from embedlab.models import load_model, weights_hash
from embedlab.trainer import Interrupted, fit, fit_once
from embedlab.watching import Diverged, FitLog

BASE = dict(batch_size=8, epochs=2, train_tokens=32, lr=1e-3, checks=5, dropout=0.1, attention="packed")
VARIANTS = {
    "plain": {},
    "lora, two sets, accumulation, early stopping": dict(tune="lora", lora_rank=4, lora_dropout=0.1, accumulate=2, patience=3, checks=8, final="best", mix="temperature"),
    "average, micro-batches, head, Matryoshka": dict(ema=0.9, micro_batch=2, head=16, matryoshka=[8], head_lr=5e-3, schedule="cosine"),
    "SIGReg and a head that keeps its length": dict(isotropy="sigreg", isotropy_slices=16, head=16, unit_length=False, similarity="euclidean", temperature=1.0),
    "negatives mined anew": dict(negatives=2, mine_from=1, mine_to=30, remine=True, epochs=3),
    "a frozen base that reads once": dict(tune="head", head=16, dropout=0.0)}
SERVER = multiprocessing.get_context("forkserver")   # children are real processes, forked from one that has only imported
SERVER.set_forkserver_preload(["embedlab.trainer", "embedlab.collections"])


def job(folder, model, data, settings, limit=None):
    "Train as a run's cell does, in a process of its own, and write down what came out."
    torch.set_num_threads(1)
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    folder = Path(folder)
    out = open(folder.with_suffix(".log"), "a", buffering=1)
    os.dup2(out.fileno(), 1); os.dup2(out.fileno(), 2)
    cfg = make_config(**BASE | settings)
    sets = training_sets([str(d) for d in data])
    m = load_model(str(model))
    try: log = fit(m, sets, cfg, folder, [s.dev for s in sets], "same run")
    except InputError as e:
        folder.with_suffix(".error").write_text(f"{type(e).__name__}: {e}")
        raise SystemExit(1)
    folder.with_suffix(".json").write_text(json.dumps({"weights": weights_hash(m), **asdict(log)}))


def start(folder, *args) -> multiprocessing.Process:
    p = SERVER.Process(target=job, args=(str(folder), *args)); p.start()
    return p


def run(folder, *args) -> dict:
    p = start(folder, *args); p.join()
    assert p.exitcode == 0, Path(folder).with_suffix(".log").read_text()[-2000:]
    return json.loads(Path(folder).with_suffix(".json").read_text())


SAME = ("weights", "loss", "by_set", "regular", "norm", "dev", "dev_loss", "rate", "stopped", "engine", "micro_batch")


@pytest.fixture
def two(toy, tmp_path) -> list[Path]:
    "The toy, and a smaller set of other words."
    rng = random.Random(1)
    corpus = {f"d{i}": " ".join(rng.sample([f"{a}{b}" for a in "big cold deep new old red soft" .split() for b in "bag cup dog egg fan hat".split()], 9)) for i in range(60)}
    queries = {f"q{i}": " ".join(rng.sample(corpus[f"d{i}"].split(), 5)) for i in range(60)}
    return [toy, write_beir(tmp_path / "second", corpus, queries, {s: {f"q{i}": {f"d{i}": 1} for i in r} for s, r in (("train", range(40)), ("dev", range(40, 50)), ("test", range(50, 60)))})]


def writing(folder: Path) -> bool: return any(folder.glob("*.part"))


def kill_somewhere(p, folder: Path, after: int, seconds: float, inside: bool, rng) -> str:
    "Send signal 9 once the checkpoint of step `after` is sealed: within so many seconds, or inside the next one's writing; say what stood on disk."
    while p.is_alive() and max(map(step_of, checkpoints(folder)), default=0) < after: time.sleep(0.0005)
    if inside:
        while p.is_alive() and not writing(folder): time.sleep(0.0002)
        time.sleep(rng.random() * 0.01)
    else: p.join(rng.random() * seconds)
    torn = writing(folder)
    p.kill(); p.join()   # signal 9
    return f"killed {'while writing a checkpoint' if torn else 'between checkpoints'}, {len(checkpoints(folder))} whole on disk"


def killed_and_continued(tmp_path, model, data, settings, times: int, seed: int = 0) -> list[str]:
    "Kill a run, each time another, and continue it by the same call; every one must end like the one that was left alone."
    rng, lines = random.Random(seed), []
    tmp_path.mkdir(exist_ok=True)
    warm = SERVER.Process(target=len, args=("",)); warm.start(); warm.join()   # the server's imports are no part of a run
    began = time.time()
    whole = run(tmp_path / "whole", model, data, settings)
    sealed = sorted((step_of(c), (c / SEAL).stat().st_mtime) for c in checkpoints(tmp_path / "whole"))   # the newest two at least
    if len(data) > 1:   # each step's loss is the mean of those of its sets
        steps = {}
        for points in whole["by_set"].values(): [steps.setdefault(s, []).append(x) for s, x in points]
        assert len(whole["by_set"]) == len(data) and [(s, pytest.approx(sum(steps[s]) / len(steps[s]), abs=1e-4)) for s in sorted(steps)] == list(map(tuple, whole["loss"]))
    every, gap = sealed[-1][0] - sealed[-2][0], sealed[-1][1] - sealed[-2][1]
    for i in range(times):
        folder, after = tmp_path / f"cut{i}", every * rng.randrange(len(whole["loss"]) // every)
        p = start(folder, model, data, settings)
        said = kill_somewhere(p, folder, after, gap if after else sealed[0][1] - began, inside=i % 3 == 2, rng=rng)
        done = folder.with_suffix(".json").exists()
        again = run(folder, model, data, settings)
        differ = [k for k in SAME if again[k] != whole[k]]
        lines.append(f"{i + 1:2}: {'finished before the kill' if done else said}; continued from step {again['resumed_from']} of {again['steps']}; " + (f"DIFFERS in {', '.join(differ)}" if differ else f"weights {again['weights'][:12]} and {len(again['loss'])} losses equal"))
        shutil.rmtree(folder)
    return lines


@pytest.mark.parametrize("name, times", [*zip(VARIANTS, (3, 3, 1, 1, 1, 1))])
def test_killed(name, times, tmp_path, tiny_model, two):
    lines = killed_and_continued(tmp_path, tiny_model, two if "sets" in name else two[:1], VARIANTS[name], times, seed=len(name))
    assert all("equal" in x for x in lines), "\n".join(lines)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, tiny_model, two):
    "The log that is committed: tests/killed.log."
    out = []
    for name, settings in VARIANTS.items():
        lines = killed_and_continued(tmp_path / str(len(out)), tiny_model, two if "sets" in name else two[:1], settings, 20, seed=7)
        out += [name, *lines, f"{sum('equal' in x for x in lines)} of {len(lines)}", ""]
        assert sum("while writing" in x for x in lines) >= 2, "no kill fell into a checkpoint's writing"
        assert len({x.split("continued from")[1].split(";")[0] for x in lines}) >= 3, "all were killed in one place"
    (ROOT / "tests" / "killed.log").write_text("\n".join(out))
    assert not any("DIFFERS" in x for x in out), "\n".join(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "interrupt"])
def test_told_to_stop(number, tmp_path, tiny_model, two):
    "The step is finished, a checkpoint is written, one line says so, and the same call continues."
    whole = run(tmp_path / "whole", tiny_model, two[:1], {})
    folder = tmp_path / "cut"
    p = start(folder, tiny_model, two[:1], {})
    while p.is_alive() and not checkpoints(folder): time.sleep(0.002)
    os.kill(p.pid, number); p.join()
    error = folder.with_suffix(".error").read_text()
    newest = checkpoints(folder)[0]
    assert p.exitcode == 1 and error.startswith(f"Interrupted: {number.name} stopped the run after step {step_of(newest)} of {whole['steps']}; {newest.name} is complete"), error
    assert step_of(newest) < whole["steps"] and fault_of(newest, "same run") is None
    again = run(folder, tiny_model, two[:1], {})
    assert again["resumed_from"] == step_of(newest) and not [k for k in SAME if again[k] != whole[k]]


def test_full_disk(tmp_path, tiny_model, two):
    "Files may grow to a size that the optimiser's state exceeds: what a full disk does to a write, done to one process by the system."
    folder = tmp_path / "cut"
    whole = run(tmp_path / "whole", tiny_model, two[:1], {"checks": 2})
    p = start(folder, tiny_model, two[:1], {"checks": 2})
    while p.is_alive() and not checkpoints(folder): time.sleep(0.002)
    p.kill(); p.join()
    good = checkpoints(folder)[0]
    p = start(folder, tiny_model, two[:1], {"checks": 2}, good.joinpath("model.safetensors").stat().st_size + 4096); p.join()
    error = folder.with_suffix(".error").read_text()
    assert p.exitcode == 1 and error.startswith("InputError: ") and "could not be written (" in error and "free some space" in error, error
    assert [x.name for x in folder.glob("checkpoint*")] == [good.name] and fault_of(good, "same run") is None
    assert run(folder, tiny_model, two[:1], {"checks": 2})["weights"] == whole["weights"]


@pytest.fixture
def here(tiny_model, two, tmp_path):
    "Train in this process."
    sets = training_sets([str(two[0])])

    def go(folder="run", fingerprint="same run", **settings) -> tuple[FitLog, str, torch.nn.Module]:
        m = load_model(str(tiny_model))
        log = fit(m, sets, make_config(**BASE | settings), tmp_path / folder, [s.dev for s in sets], fingerprint)
        return log, weights_hash(m), m
    go.path = tmp_path
    return go


def test_torn_checkpoints(here, capsys):
    log, want, _ = here(keep="every")
    folder = here.path / "run"
    c = checkpoints(folder)
    shutil.rmtree(c[0])                                                  # or else the run is over
    with open(c[1] / "optimizer.pt", "r+b") as f: f.truncate(1000)       # damaged
    (c[2] / SEAL).unlink()                                               # not finished
    seal = json.loads((c[3] / SEAL).read_text()); (c[3] / SEAL).write_text(json.dumps(seal | {"fingerprint": "another"}))
    (folder / "checkpoint-99.part").mkdir()
    again, got, _ = here(keep="every")
    said = capsys.readouterr().out
    assert again.resumed_from == step_of(c[4]) and got == want and again.loss == log.loss
    for text in (f"{c[1].name} is damaged (optimizer.pt); passed over", f"{c[2].name} was not finished; passed over",
                 f"{c[3].name} belongs to a run with other settings, data or base model; passed over", "checkpoint-99.part was not finished; removed", f"continuing from {c[4].name}"):
        assert text in said, said


def test_chosen_checkpoint(here):
    log, want, _ = here(keep="every")
    folder = here.path / "run"
    names = [p.name for p in checkpoints(folder)][::-1]
    assert names == [f"checkpoint-{s}" for s, _ in log.dev[1:]] and len(names) == 5
    for name in (names[1], names[1].split("-")[1], str(folder / names[1])):
        again, got, _ = here(keep="every", resume_from=name)
        assert again.resumed_from == step_of(folder / names[1]) and got == want and again.loss == log.loss
    with pytest.raises(InputError, match="there is no checkpoint 'checkpoint-3'; this run has checkpoint-4, checkpoint-8"): here(resume_from="checkpoint-3")
    with pytest.raises(InputError, match="checkpoint-8 belongs to a run with other settings, data or base model"): here(resume_from="8", fingerprint="another run")


def test_newest_two_and_the_best_stay(here, monkeypatch):
    "Where the best check comes early is given: rounding, which differs between processors, is not to decide it."
    from embedlab import trainer
    curve = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6])
    monkeypatch.setattr(trainer._Dev, "__call__", lambda self, model, *a, **kw: {"dev": next(curve)})
    log, _, _ = here(keep="last,best", epochs=3, checks=6)
    steps, best = [s for s, _ in log.dev[1:]], max(log.dev[1:], key=lambda c: (c[1], -c[0]))[0]
    assert (best, len(steps)) == (steps[1], 6)
    assert {step_of(p) for p in checkpoints(here.path / "run")} == {best, *steps[-2:]}


def test_best_and_early_stopping(here):
    "The weights that leave are those of the best check, and the run ends when it was not beaten."
    log, want, m = here(lr=0.3, epochs=6, checks=12, patience=2, final="best", keep="every")
    best = max(log.dev[1:], key=lambda c: (c[1], -c[0]))[0]
    ran = log.dev[-1][0]
    assert ran < log.steps and f"not better in 2 checks than at step {best}" in log.stopped and len([s for s, _ in log.dev if s > best]) == 2
    from safetensors.torch import load_file
    kept = load_file(here.path / "run" / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(p, kept[n]) for n, p in m.named_parameters() if p.requires_grad)
    again, got, _ = here(lr=0.3, epochs=6, checks=12, patience=2, final="best", keep="every")   # killed after the last checkpoint, before the model was saved
    assert (got, again.dev, again.loss, again.stopped) == (want, log.dev, log.loss, log.stopped) and again.pairs_per_s == 0


def test_max_steps_within_an_epoch(here):
    "A checkpoint at the last step is the end, though the epoch has batches left."
    log, want, _ = here(max_steps=7)
    again, got, _ = here(max_steps=7)
    assert log.steps == 7 and got == want and again.loss == log.loss


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_not_a_number(here, monkeypatch, what):
    plain, calls = ContrastiveLoss.forward, []

    def poisoned(self, features, labels=None):
        loss = plain(self, features, labels); calls.append(1)
        if len(calls) != 11: return loss
        if what == "loss": return loss * math.nan
        loss.register_hook(lambda g: g * math.inf)
        return loss
    monkeypatch.setattr(ContrastiveLoss, "forward", poisoned)
    with pytest.raises(Diverged, match=rf"the {what} is (nan|inf) at step 11, in a batch of rows (\d+, ){{7}}\d+; the weights before are in .*checkpoint-8\."): here()
    assert last_checkpoint(here.path / "run", "same run").name == "checkpoint-8"
    monkeypatch.setattr(ContrastiveLoss, "forward", plain)
    again, got, _ = here()
    assert again.resumed_from == 8 and got == here("whole")[1]


@pytest.mark.parametrize("settings, at", [({}, 6), (dict(accumulate=4), 6), (dict(accumulate=4), 11), (dict(micro_batch=4, tune="lora", lora_rank=2), 6)],
                         ids=["plain", "accumulated", "first batch of an epoch", "LoRA"])
def test_out_of_memory_changes_micro_batch_only(here, monkeypatch, capsys, settings, at):
    "Memory runs out in one batch; 11 is the first after an epoch whose last step had fewer batches than `accumulate`."
    settings = settings | {"dropout": 0.0}
    log, _, m = here("whole", **settings)
    plain, calls, now = ContrastiveLoss.calculate_loss, [], settings.get("micro_batch")

    def starved(self, reps, labels=None, *, with_backward=False):
        calls.append(1)
        if len(calls) == at: raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return plain(self, reps, labels, with_backward=with_backward)
    monkeypatch.setattr(ContrastiveLoss, "calculate_loss", starved)
    tight, _, n = here("tight", **settings)
    half = (now or 8) // 2
    assert f"out of memory; going on with micro_batch {half}, the batch stays 8" in capsys.readouterr().out
    assert (tight.micro_batch, tight.batch, log.micro_batch) == (half, 8, now)
    assert [s for s, _ in tight.loss] == [s for s, _ in log.loss] and torch.allclose(torch.tensor([x for _, x in tight.loss]), torch.tensor([x for _, x in log.loss]), atol=1e-3)
    for (k, a), (_, b) in zip(m.named_parameters(), n.named_parameters()): assert torch.allclose(a, b, atol=2e-3), k
    assert {k: v for k, v in tight.engine.items() if v != log.engine[k]} == {"micro_batch": half}


def test_no_memory_at_all(here, monkeypatch):
    def never(self, *a, **kw): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(ContrastiveLoss, "calculate_loss", never)
    with pytest.raises(InputError, match="out of memory at step 1 with micro_batch 1; lower micro_batch, train_tokens"): here()


def test_freed_memory_goes_back_to_the_system(here, monkeypatch):
    "Tensors too small to be mapped on their own, of which every fiftieth is kept: glibc would hold what lies between."
    if not engine._trim: pytest.skip("no malloc_trim: this needs Linux with glibc")
    now = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    tensors = [torch.ones(24_000) for _ in range(4000)]
    tensors, held = tensors[::50], now()
    engine.return_memory()
    assert held - now() > 150e6   # of 384 MB
    calls = []
    monkeypatch.setattr("embedlab.trainer.return_memory", lambda: calls.append(1))
    log, *_ = here(checks=1)
    assert len(calls) == log.engine["ran"] // 10 > 0


def test_other_errors_are_not_taken_for_memory(here, monkeypatch):
    def broken(self, *a, **kw): raise RuntimeError("shapes differ")
    monkeypatch.setattr(ContrastiveLoss, "calculate_loss", broken)
    with pytest.raises(RuntimeError, match="shapes differ"): here()


BRIEF = dict(epochs=1, checks=1)
# a value that is not the default, and what the live objects must say of it
SEEN = {
    "seed": (3, lambda e: e["seed"] == e["order_seed"] == 3), "epochs": (3, lambda e: e["steps"] == 3 * e["batches"] == e["ran"]), "max_steps": (5, lambda e: e["steps"] == e["ran"] == 5),
    "batch_size": (16, lambda e: e["batch"] == 16), "micro_batch": (4, lambda e: e["micro_batch"] == 4), "accumulate": (3, lambda e: e["accumulate"] == 3 and e["steps"] == math.ceil(e["batches"] / 3)),
    "gradient_checkpointing": (True, lambda e: e["gradient_checkpointing"]), "sort_window": (2, lambda e: e["sort_window"] == 2),
    "lr": (2e-4, lambda e: {g["peak_lr"] for g in e["groups"]} == {2e-4}), "schedule": ("cosine", lambda e: e["schedule"] == "cosine"), "warmup": (7, lambda e: e["warmup_steps"] == 7),
    "weight_decay": (0.02, lambda e: {g["weight_decay"] for g in e["groups"]} == {0.02, 0.0}), "max_grad_norm": (0.5, lambda e: e["max_grad_norm"] == 0.5),
    "temperature": (0.1, lambda e: e["temperature"] == 0.1), "score_temperature": (0.3, lambda e: e["score_temperature"] == 0.3), "dropout": (0.2, lambda e: e["dropout"] == [0.2]), "similarity": ("euclidean", lambda e: e["similarity"] == "euclidean"), "train_tokens": (16, lambda e: e["tokens"] == 16),
    "matryoshka": ([16, 8], lambda e: e["widths"] == [16, 8]), "ema": (0.8, lambda e: e["average"] == 0.8), "attention": ("eager", lambda e: e["attention"] == "eager"),
    "precision": ("fp32", lambda e: e["precision"] == "no"), "negatives": (2, lambda e: e["columns"] == [4]), "isotropy": ("covariance", lambda e: e["isotropy"] == "covariance"), "std_weight": (0.5, lambda e: (e["isotropy"], e["std_weight"]) == (None, 0.5)), "compile": (True, lambda e: e["compiled"]),
}
TOGETHER = {   # settings that only show beside another one
    "head": (dict(head=16), lambda e: sum(g["numbers"] for g in e["groups"] if g["name"] == "head") == 32 * 16 + 16),
    "head_hidden": (dict(head=16, head_hidden=24), lambda e: sum(g["numbers"] for g in e["groups"] if g["name"] == "head") == 32 * 24 + 24 + 24 * 16 + 16),
    "head_lr": (dict(head=16, head_lr=5e-3), lambda e: {g["name"]: g["peak_lr"] for g in e["groups"]} == {"base": 1e-3, "head": 5e-3}),
    "tune": (dict(tune="head", head=16), lambda e: e["trainable"] == 32 * 16 + 16),
    "lora_rank": (dict(tune="lora", lora_rank=3, lora_targets="query"), lambda e: e["trainable"] == 2 * 3 * (32 + 32)),
    "lora_dropout": (dict(tune="lora", lora_dropout=0.3), lambda e: e["dropout"] == [0.1, 0.3]),
    "lora_dora": (dict(tune="lora", lora_rank=3, lora_targets="query", lora_dora=True), lambda e: e["trainable"] == 2 * 3 * (32 + 32) + 2 * 32),
    "isotropy_weight": (dict(isotropy="sigreg", isotropy_weight=0.3), lambda e: (e["isotropy"], e["isotropy_weight"]) == ("sigreg", 0.3)),
    "isotropy_form": (dict(isotropy="orthogonal", isotropy_form="added"), lambda e: (e["isotropy"], e["isotropy_convex"]) == ("orthogonal", False)),
    "isotropy_slices": (dict(isotropy="sigreg", isotropy_slices=8), lambda e: (e["slices"], e["scale"]) == (8, 1.0)),
    "mix": (dict(mix="temperature", mix_temperature=3.0), lambda e: (e["mix"], e["mix_temperature"]) == ("temperature", 3.0)),
}
ELSEWHERE = {   # where the rest is tested
    "test_train.py": {"run", "preset", "evaluate", "split", "also_ranked_by", "max_tokens", "base", "train", "leaks", "max_pairs", "max_per_set", "fresh", "checks", "token_weights", "count_on", "lexical_dims", "lexical_weight"},
    "test_engine.py": {"set_lr", "patience", "final", "keep", "resume_from", "processes"}, "test_tuning.py": {"unit_length", "interpolate", "lora_alpha", "lora_rs", "lora_targets"},
    "test_mining.py": {"miner", "mine_among", "mine_from", "mine_to", "mine_margin", "remine"}, "test_watching.py": {"report_to"},
    "test_data.py": {"dev_share"}, "test_ranksaga.py": {"prompts", "titles", "push_to_hub"},
    "test_scratch.py": {"blocks", "width", "layers", "heads", "vocabulary", "tokenizer", "experts", "experts_per_token", "capacity", "balance", "init",
                        "texts", "words", "contradictions", "positive_from", "guard", "teacher", "teacher_weight", "choose"}}


def test_every_setting_is_looked_at():
    assert {*SEEN, *TOGETHER, "mix_temperature"} | set().union(*ELSEWHERE.values()) == set(RunConfig.model_fields)


@pytest.mark.parametrize("name", [n for n in SEEN if n != "compile"] + [pytest.param("compile", marks=pytest.mark.slow)])
def test_what_is_configured_is_what_runs(name, here):
    value, says = SEEN[name]
    plain = BASE.get(name, RunConfig.model_fields[name].default)
    assert value != plain
    assert says(here(**BRIEF | {name: value})[0].engine)


@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_configured_together_is_what_runs(name, here):
    settings, says = TOGETHER[name]
    assert says(here(**BRIEF | settings)[0].engine)


def test_the_rates_are_the_schedule(here):
    "Every step's rate as the optimiser used it: rising over the warm-up, then falling linearly to zero."
    log, _, _ = here(warmup=5, checks=1)
    n = log.steps
    want = [1e-3 * (k / 5 if k < 5 else (n - k) / (n - 5)) for k in range(n)]
    assert [r for _, r in log.rate] == pytest.approx(want)
    flat = here("flat", warmup=5, checks=1, schedule="constant")[0]
    assert [r for _, r in flat.rate] == pytest.approx([1e-3 * min(k / 5, 1) for k in range(n)])
    assert not log.head_rate
    headed = here("headed", warmup=5, checks=1, head=16, head_lr=5e-3)[0]
    assert [r for _, r in headed.rate] == pytest.approx(want) and [r for _, r in headed.head_rate] == pytest.approx([5 * r for r in want])


@pytest.mark.parametrize("tune", ["head", "all"])
def test_a_frozen_encoder_is_shown_not_to_have_moved(tiny_model, two, tmp_path, tune, monkeypatch):
    sets = training_sets([str(two[0])])
    cfg = make_config(**BASE | {"train": [str(two[0])], "max_steps": 3, "tune": tune, "head": 16})
    model, log = fit_once(load_model(str(tiny_model)), sets, cfg, tmp_path / tune, [sets[0].dev], "x")
    h = log.engine["encoder_sha256"]
    assert h["before"] == weights_hash(load_model(str(tiny_model))[0]) and h["after"] == weights_hash(model[0])
    assert (h["before"] == h["after"]) == (tune == "head")
    if tune == "head":   # so that what the base has encoded is not encoded again: the head is all that differs
        monkeypatch.setenv("EMBEDLAB_CACHE", str(tmp_path))
        base = evaluate(load_model(str(tiny_model)), [sets[0].dev], cache=True)[0]
        after = evaluate(model, [sets[0].dev], cache=True)[0]
        assert base.encoded > 0 == after.encoded and not np.array_equal(base.d, after.d)
        assert np.allclose(after.d, unit(model.encode([*sets[0].dev.documents.values()], prompt=(model.prompts or {}).get("document"))), atol=1e-2)


def test_a_frozen_base_reads_each_text_once(tiny_model, two, tmp_path, monkeypatch):
    "Steps are the same as where it reads them again and again, and a run that is continued asks it for nothing."
    monkeypatch.setenv("EMBEDLAB_CACHE", str(tmp_path / "cache"))
    sets, logs, read = training_sets([str(d) for d in two]), {}, []
    for name, more in {"once": {}, "each time": dict(micro_batch=8)}.items():   # a micro-batch of the whole batch changes nothing else
        cfg = make_config(**BASE | dict(tune="head", head=16, dropout=0.0, precision="fp32", negatives=2, mine_from=1, mine_to=20, max_steps=8) | more)
        model = load_model(str(tiny_model))
        model[0].register_forward_pre_hook(lambda *a: read.append(name) if model.training else None)
        logs[name] = fit(model, sets, cfg, tmp_path / name, [], "x")
        logs[name].engine["head"] = model[-1].linear.weight.detach().clone()
    once, again = logs.values()
    assert {*read} == {"each time"} and (once.engine["read_once"], again.engine["read_once"]) == (True, False)
    assert [x for _, x in once.loss] == pytest.approx([x for _, x in again.loss], rel=1e-3) and torch.allclose(once.engine["head"], again.engine["head"], atol=1e-3)
    assert len({x for _, x in once.loss}) == 8 and not torch.allclose(once.engine["head"], torch.nn.init.zeros_(torch.empty(16, 32)))
    read.clear(); shutil.rmtree(tmp_path / "cache")
    checkpoints(tmp_path / "once")[0].rename(tmp_path / "gone")
    model = load_model(str(tiny_model))
    model[0].register_forward_pre_hook(lambda *a: read.append("resumed"))
    log = fit(model, sets, make_config(**BASE | dict(tune="head", head=16, dropout=0.0, precision="fp32", negatives=2, mine_from=1, mine_to=20, max_steps=8)), tmp_path / "once", [], "x")
    assert 0 < log.resumed_from < 8 and torch.equal(model[-1].linear.weight, once.engine["head"]) and not read


def test_each_set_has_its_own_rate(tiny_model, two, tmp_path):
    "Steps of the second set go at a fifth of the schedule, the others as it says, and a step at rate r is a step at rate r."
    names = [*map(str, two)]
    sets = training_sets(names)
    cfg = make_config(**BASE | {"train": names, "mix": "in_order", "set_lr": "1e-3,2e-4", "warmup": 5, "checks": 2, "epochs": 1, "keep": "every"})
    whole = load_model(str(tiny_model))
    log = fit(whole, sets, cfg, tmp_path / "own", [sets[0].dev], "x")
    n = log.steps
    slow = {s for s, _ in log.by_set[sets[1].name]}
    want = [(2e-4 if k + 1 in slow else 1e-3) * (k / 5 if k < 5 else (n - k) / (n - 5)) for k in range(n)]
    assert 0 < len(slow) < n and [r for _, r in log.rate] == pytest.approx(want)
    assert log.engine["set_lr"] == pytest.approx({sets[0].name: 1e-3, sets[1].name: 2e-4})
    shutil.rmtree(checkpoints(tmp_path / "own")[0])   # the last: from the one before it the run goes on to the same weights
    again = load_model(str(tiny_model))
    assert fit(again, sets, cfg, tmp_path / "own", [sets[0].dev], "x").resumed_from and weights_hash(again) == weights_hash(whole)
    alone, all_slow = (load_model(str(tiny_model)) for _ in range(2))   # one set: a rate of its own is that rate
    fit(alone, sets[1:], make_config(**BASE | {"train": names[1:], "set_lr": [2e-4], "checks": 1}), tmp_path / "a", [sets[1].dev], "x")
    fit(all_slow, sets[1:], make_config(**BASE | {"train": names[1:], "lr": 2e-4, "checks": 1}), tmp_path / "b", [sets[1].dev], "x")
    for p, q in zip(alone.parameters(), all_slow.parameters()): assert torch.allclose(p, q, atol=1e-6)
    for bad, line in ((dict(set_lr="1e-3"), "1 rates for 2 training sets"), (dict(set_lr="1e-3,1e-4", accumulate=2), "averages batches of several sets"), (dict(set_lr="1e-3,1e-4"), "give mix in_order")):
        with pytest.raises(InputError, match=line): make_config(train=names, **bad)


@pytest.mark.slow
def test_two_processes_train_as_one(here):
    one, _, a = here("one", dropout=0.0)
    two, _, b = here("two", dropout=0.0, processes=2)
    assert two.engine["processes"] == 2 and two.engine["batch"] == 8
    assert torch.allclose(torch.tensor([x for _, x in one.loss]), torch.tensor([x for _, x in two.loss]), atol=1e-4)
    for (k, p), (_, q) in zip(a.named_parameters(), b.named_parameters()): assert torch.allclose(p, q, atol=1e-3), k
