"The train driver, run by papermill as a user runs it."
import hashlib
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from embedlab.config import InputError, make_config
from embedlab.running import Run


def test_a_whole_run(papermill, small, tmp_path):
    ran = papermill("first", run="first", **small)
    assert ran.code == 0, ran.text
    r = ran.record()

    # the record: schema 1, as the design lists it
    d = r.to_dict()
    assert d["schema"] == 1 and d["status"] == "completed" and d["run"] == "first" and d["split"] == "test" and d["seed"] == 0
    assert d["params"]["epochs"] == 2 and set(d["leaks"]) >= {"policy", "checked", "exact", "near", "shared_documents", "allowed"}
    assert [(x["name"], x["split"], x["rows"]) for x in d["data"]] == [(small["train"].as_posix(), "train", 80), ("toy", "test", 20)] and all(len(x["sha256"]) == 64 for x in d["data"])
    assert d["model"]["parameters"] == d["model"]["trainable"] > 0 and len(d["model"]["sha256"]) == 64
    assert set(d["before"]) == set(d["after"]) == set(d["delta"]) == {f"toy/{m}" for m in ("ndcg@10", "recall@100", "mrr@10", "map@100")}
    for v in d["delta"].values():
        assert set(v) >= {"mean", "ci95", "p", "n", "verdict", "smallest", "test"} and v["n"] == 20 and v["ci95"][0] <= v["mean"] <= v["ci95"][1]
    assert {"train_pairs_per_s", "encode_texts_per_s", "seconds", "peak_rss_bytes"} <= set(d["speed"])
    assert {"embedlab", "git", "python", "torch", "device", "threads"} <= set(d["environment"])
    assert d["after"]["toy/ndcg@10"] > d["before"]["toy/ndcg@10"], "eight steps on the words themselves must teach something"

    # how even the clouds of documents are, beside a Gaussian one of the same size
    cloud = d["isotropy"]
    assert (cloud["set"], cloud["n"], cloud["d"]) == ("toy", 120, 32) and all(0 < cloud[k]["isoscore"] < 1 for k in ("before", "after", "gaussian"))
    assert cloud["before"] != cloud["after"] and cloud["gaussian"]["isoscore"] == pytest.approx(1 / (1 + 32 / 120), abs=0.05)

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


def opened(tmp_path, monkeypatch, sha: str, **settings) -> Run:
    monkeypatch.setenv("EMBEDLAB_RUNS", str(tmp_path)); monkeypatch.setenv("EMBEDLAB_MIN_FREE", "1")
    r = Run(make_config(**settings))
    try: r.open([{"name": "toy", "sha256": sha}], "base")
    finally: r.close()
    return r


def test_no_name_gives_a_fingerprint(tmp_path, monkeypatch):
    r = opened(tmp_path, monkeypatch, "a")
    assert r.record.run == r.record.fingerprint == r.folder.name and (tmp_path / r.record.fingerprint).is_dir()
    assert opened(tmp_path, monkeypatch, "a", keep="every", report_to="wandb", resume_from="checkpoint-3").folder == r.folder, "what is kept and reported changes no weight"
    assert opened(tmp_path, monkeypatch, "b").folder != r.folder


def test_changed_data_under_the_same_name(tmp_path, monkeypatch):
    opened(tmp_path, monkeypatch, "a", run="one")
    opened(tmp_path, monkeypatch, "a", run="one")
    with pytest.raises(InputError, match="holds a run with other settings, data or base model; give another name with run, or fresh=True"): opened(tmp_path, monkeypatch, "b", run="one")
    opened(tmp_path, monkeypatch, "b", run="one", fresh=True)


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


def test_killed_and_continued(papermill, small):
    "Signal 9 to papermill and its kernel after a checkpoint; the same command ends with the scores of a run that was left alone."
    import psutil
    settings = small | {"epochs": 12, "checks": 12, "dropout": 0.1}
    whole = papermill("whole", run="whole", **settings)
    assert whole.code == 0, whole.text
    p = papermill.start("cut", env={"JUPYTER_PATH": ""}, run="cut", **settings)
    kept = papermill.home / "cut" / "checkpoints"
    while p.poll() is None and not [*kept.glob("checkpoint-*[0-9]")]: time.sleep(0.02)
    for child in psutil.Process(p.pid).children(recursive=True): child.kill()
    p.kill(); p.wait()
    assert not (papermill.home / "cut" / "model").exists()
    again = papermill("cut", run="cut", **settings)
    assert again.code == 0, again.text
    assert "continuing from checkpoint-" in again.path.read_text()
    a, b = whole.record(), again.record()
    assert b.engine["resumed_from"] and a.engine["resumed_from"] is None, "the record says that seconds and tokens are those of the last process"
    assert b.after == a.after and b.scores == a.scores and b.engine | {"resumed_from": None} == a.engine
    sha = lambda run: hashlib.sha256((papermill.home / run / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert sha("cut") == sha("whole") and not kept.exists()


def test_several_training_sets_and_the_record_of_the_engine(papermill, small, toy, tmp_path):
    rows = "".join(f"word{i} query{i}\tanswer{i} text{i}\tnothing{i} like{i}\n" for i in range(60))
    (tmp_path / "mine.tsv").write_text("query\tpositive\tnegative\n" + rows)
    ran = papermill("both", run="both", **small | {"train": f"{toy},{tmp_path / 'mine.tsv'}", "mix": "round_robin", "tune": "lora", "lora_rank": 4, "max_per_set": 50, "batch_size": 8, "epochs": 1})
    assert ran.code == 0, ran.text
    r = ran.record()
    assert [(d["rows"], d["role"]) for d in r.data] == [(50, "train"), (50, "train"), (20, "evaluate")]
    assert r.engine["mix"] == "round_robin" and r.engine["rows"] == 100 and r.engine["columns"] == [2, 3] and r.engine["batch"] == 8
    assert r.model["trainable"] == r.engine["trainable"] < r.model["parameters"]
    assert (papermill.home / "both" / "adapter" / "adapter_model.safetensors").exists()
    # continued by name: the second run starts from what the first one made
    more = papermill("more", run="more", **small | {"base": "both", "max_steps": 2})
    assert more.code == 0, more.text
    assert more.record().before == r.after


def test_tokens_weigh_in_the_mean_as_scikit_learn_counts_them(papermill, small, tiny_model, tmp_path):
    "The base is measured as it came, texts that lie end to end give what padded ones give, and the weights don't move in training or merging."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import WordWeights
    from sklearn.feature_extraction.text import TfidfVectorizer
    from embedlab.collections import evaluation_suites, load, training_sets
    from embedlab.evaluation import evaluate
    from embedlab.models import append_words, describe, load_model, weigh_tokens
    from embedlab.packing import packs
    from embedlab.tuning import prepare

    small["base"] = tmp_path / "of unit length"
    SentenceTransformer(modules=[*load_model(str(tiny_model)), Normalize()]).save(str(small["base"]))
    ran = papermill(run="weighed", token_weights=0.5, interpolate=0.7, attention="packed", **small)
    assert ran.code == 0, ran.text[-3000:]
    r, model = ran.record(), SentenceTransformer(str(papermill.home / "weighed" / "model"), device="cpu")
    assert isinstance(model[1], WordWeights) and r.engine["attention"] == "packed"
    rows, = (t.rows for t in training_sets([str(small["train"])]))
    idf = TfidfVectorizer(analyzer=lambda t: model.tokenizer(t, truncation=True)["input_ids"]).fit([*{*rows["anchor"], *rows["positive"]}])
    want = {i: w ** 0.5 for i, w in zip(idf.vocabulary_, idf.idf_[[*idf.vocabulary_.values()]])}
    np.testing.assert_allclose(model[1].emb_layer.weight[[*want], 0].detach(), [*want.values()], rtol=1e-6)
    base = load_model(str(small["base"]))
    assert r.before == pytest.approx({f"{s.name}/{m}": s.mean(m) for s in evaluate(base, evaluation_suites([str(small["evaluate"])], "test")[0], cache=False) for m in s.values})
    assert r.model["trainable"] == r.model["parameters"] == sum(p.numel() for p in base.parameters())
    assert "tokens weigh by their inverse document frequency to the power 0.5" in (papermill.home / "weighed" / "model" / "README.md").read_text()

    assert packs(base) and packs(model)
    bare = SentenceTransformer(modules=[*model][:-1])      # not brought to unit length: packed, the sum is divided by another number
    assert packs(bare), "packed or padded, the sum is divided by the tokens' weights"
    assert describe(model, "x")["pooling"] == describe(base, "x")["pooling"] == "mean"
    assert not any(p.requires_grad for p in prepare(model, make_config())[1].parameters())
    saved = str(papermill.home / "weighed" / "model")
    ran = papermill(run="words", token_weights=0.5, lexical_dims=64, lexical_weight=0.5, interpolate=0, attention="packed", count_on=str(small["evaluate"]), **small)
    assert ran.code == 0, ran.text[-3000:]
    words, bare = SentenceTransformer(str(papermill.home / "words" / "model"), device="cpu"), load_model(str(tiny_model))
    counted = [*rows["anchor"], *rows["positive"], *load(str(small["evaluate"]), "train").documents.values()]
    assert {*counted} > {*rows["anchor"], *rows["positive"]}, "count_on changes the counts"
    with_words = append_words(weigh_tokens(bare, counted, 0.5), counted, 64, 0.5, 0.5)
    np.testing.assert_allclose(words.encode(rows["anchor"][:5]), with_words.encode(rows["anchor"][:5]), atol=1e-6)   # none of the tuned weights
    assert packs(words) and words.get_embedding_dimension() == base.get_embedding_dimension() + 64
    parts = SentenceTransformer(modules=[*words][:-1], device="cpu").encode([*{*rows["anchor"], *rows["positive"]}])   # before all is brought to length 1
    lexical, dense = np.square(parts[:, :64]).sum(1), np.square(parts[:, 64:]).sum(1)
    assert lexical.mean() / dense.mean() == pytest.approx(0.5, rel=0.1), "directions are nearly at right angles"
    assert lexical.std() / lexical.mean() < 0.5, "long texts and short ones have as much of words"
    card = (papermill.home / "words" / "model" / "README.md").read_text()
    assert f"{sum(p.numel() for p in words.parameters()):,} parameters, {words.get_embedding_dimension()} dimensions" in card and "64 of the dimensions hold the words" in card
    assert "holds its texts' words already" in papermill("twice", run="twice", lexical_dims=64, **small | {"base": str(papermill.home / "words" / "model")}).text
    assert "this base weighs its tokens already" in papermill("more", run="more", token_weights=1, **small | {"base": saved}).text
