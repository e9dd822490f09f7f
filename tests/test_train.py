"The train driver, run by papermill as a user runs it."
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT


def test_a_whole_run(papermill, small, tmp_path):
    ran = papermill("first", run="first", **small)
    assert ran.code == 0, ran.text
    r = ran.record()

    # the record: schema 1, as the design lists it
    d = r.to_dict()
    assert d["schema"] == 1 and d["status"] == "completed" and d["run"] == "first" and d["split"] == "test" and d["seed"] == 0 and d["isotropy"] is None
    assert d["params"]["epochs"] == 2 and set(d["leaks"]) >= {"policy", "checked", "exact", "near", "shared_documents", "allowed"}
    assert [(x["name"], x["split"], x["rows"]) for x in d["data"]] == [(small["train"].as_posix(), "train", 80), ("toy", "test", 20)] and all(len(x["sha256"]) == 64 for x in d["data"])
    assert d["model"]["parameters"] == d["model"]["trainable"] > 0 and len(d["model"]["sha256"]) == 64
    assert set(d["before"]) == set(d["after"]) == set(d["delta"]) == {f"toy/{m}" for m in ("ndcg@10", "recall@100", "mrr@10", "map@100")}
    for v in d["delta"].values():
        assert set(v) >= {"mean", "ci95", "p", "n", "verdict", "smallest", "test"} and v["n"] == 20 and v["ci95"][0] <= v["mean"] <= v["ci95"][1]
    assert {"train_pairs_per_s", "encode_texts_per_s", "seconds", "peak_rss_bytes"} <= set(d["speed"])
    assert {"embedlab", "git", "python", "torch", "device", "threads"} <= set(d["environment"])
    assert d["after"]["toy/ndcg@10"] > d["before"]["toy/ndcg@10"], "eight steps on the words themselves must teach something"

    # per-query scores give the same means and the same verdicts, from the notebook alone, elsewhere, under another name
    import embedlab
    from embedlab.significance import compare
    away = tmp_path / "elsewhere"
    away.mkdir()
    shutil.copy(ran.path, away / "renamed.ipynb")
    found, = embedlab.runs(away)
    assert found.to_dict() == d
    before, after = found.both("toy/ndcg@10")
    assert before.mean() == pytest.approx(d["before"]["toy/ndcg@10"], abs=1e-6)
    assert compare(before, after).verdict == d["delta"]["toy/ndcg@10"]["verdict"]

    # the saved model gives the run's embeddings where embedlab can't be imported
    from embedlab.collections import load
    from embedlab.encoding import encode
    from embedlab.models import load_model
    model = papermill.home / "first" / "model"
    texts = list(load(str(small["train"]), "test").documents.values())
    script = ("import sys, json, numpy as np; sys.modules['embedlab'] = None\nfrom sentence_transformers import SentenceTransformer\n"
              f"np.save({str(tmp_path / 'plain.npy')!r}, SentenceTransformer({str(model)!r}).encode(json.load(sys.stdin), normalize_embeddings=True))")
    subprocess.run([sys.executable, "-c", script], input=json.dumps(texts), text=True, check=True, cwd=tmp_path, capture_output=True)
    ours = encode(load_model(str(model)), texts)
    assert (ours * np.load(tmp_path / "plain.npy")).sum(1).min() >= 0.9999

    # the same command again: the finished model is measured, not trained, and the scores are the same
    again = papermill("again", run="first", **small)
    assert again.code == 0 and "this run is finished" in again.path.read_text()
    assert again.record().after == r.after
    assert again.record().tested_before == 1

    # other settings under the same name: refused, and nothing is lost
    kept = {p.name: p.stat().st_mtime_ns for p in model.iterdir()}
    other = papermill("other", run="first", **small | {"epochs": 3})
    assert other.code != 0 and "other settings" in other.errors()[0].evalue
    assert {p.name: p.stat().st_mtime_ns for p in model.iterdir()} == kept
    assert other.record().status == "failed"


def test_no_name_gives_a_fingerprint(papermill, small):
    ran = papermill("unnamed", max_steps=2, **small)
    assert ran.code == 0, ran.text
    r = ran.record()
    assert r.run == r.fingerprint and (papermill.home / r.fingerprint / "model" / "model.safetensors").exists()


def test_dev_split_and_several_sets(papermill, small, toy, tmp_path):
    shutil.copytree(toy, tmp_path / "second")
    ran = papermill("dev", split="dev", max_steps=2, **small | {"evaluate": f"{toy},{tmp_path / 'second'}"})
    assert ran.code == 0, ran.text
    assert ran.record().split == "dev" and {k.split("/")[0] for k in ran.record().before} == {"toy", "second"}
    assert ran.record().tested_before == 0


def test_overlap_stops_drops_or_marks(papermill, small, toy):
    lines = (toy / "queries.jsonl").read_text().splitlines()
    rows = [json.loads(x) for x in lines]
    test = {r["_id"]: r["text"] for r in rows if int(r["_id"][1:]) >= 100}
    rows[0]["text"] = test["q100"].upper() + "!"            # a training query repeats a test query, in capitals
    (toy / "queries.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stopped = papermill("stopped", max_steps=2, **small)
    assert stopped.code != 0 and "repeats 1 evaluation queries word for word" in stopped.errors()[0].evalue
    dropped = papermill("dropped", max_steps=2, leaks="drop", **small)
    assert dropped.code == 0 and dropped.record().leaks["dropped"] >= 1 and dropped.record().leaks["allowed"] is False
    allowed = papermill("allowed", max_steps=2, leaks="allow", **small)
    assert allowed.code == 0 and allowed.record().leaks["allowed"] is True and "Marked" in allowed.path.read_text()


def test_killed_and_continued(tiny_model, toy, tmp_path):
    "SIGKILL between two checkpoints; the same call again ends with the weights of the uninterrupted run."
    script = f"""
import os, signal, sys
from pathlib import Path
from embedlab.config import make_config
from embedlab.collections import training_data
from embedlab.models import load_model, weights_hash
from embedlab.trainer import fit
import embedlab.trainer as t
cfg = make_config(batch_size=16, epochs=4, lr=1e-3, precision="fp32", checks=5, dropout=0.1)
rows, known, dev = training_data({str(toy)!r})
if sys.argv[2] == "kill":
    plain = t._Watch.on_step_end
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 11: os.kill(os.getpid(), signal.SIGKILL)
        plain(self, args, state, control, **kw)
    t._Watch.on_step_end = on_step_end
model = load_model({str(tiny_model)!r})
log = fit(model, rows, cfg, Path(sys.argv[1]), dev, "same", known)
print("RESULT", log.resumed_from, weights_hash(model), log.loss)
"""
    go = lambda folder, how: subprocess.run([sys.executable, "-c", script, str(tmp_path / folder), how], capture_output=True, text=True, cwd=ROOT)
    result = lambda p: next(x for x in p.stdout.splitlines() if x.startswith("RESULT")).split(maxsplit=2)
    whole, cut = go("whole", "run"), go("cut", "kill")
    assert whole.returncode == 0, whole.stderr
    assert cut.returncode == -9
    continued = go("cut", "run")
    assert continued.returncode == 0, continued.stderr
    assert result(whole)[1] == "None" and result(continued)[1] == "8"
    assert result(continued)[2] == result(whole)[2]
