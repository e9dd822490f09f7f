"Any model on any set: the evaluate driver, sets of every kind, the clean part, and the cache of embeddings."
import os
import random
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT, write_beir
from datasets import Dataset

from embedlab.collections import GROUPS, clean_parts, documents_of, evaluation_suites, find_overlap, load, training_sets
from embedlab.config import EvaluateConfig, InputError, make_config
from embedlab.data import check
from embedlab.encoding import EmbeddingCache, encode
from embedlab.evaluation import evaluate, gains_of, judged_of, rank, ranking_metrics
from embedlab.models import load_model
from embedlab.running import model_named, start
from embedlab.significance import score


@pytest.fixture
def pairs(tmp_path, toy):
    "Scored pairs as a user has them, in one file."
    rng, lines = random.Random(1), (toy / "corpus.jsonl").read_text().splitlines()[:40]
    texts = [x.split('"text": "')[1].rstrip('"}') for x in lines]
    rows = [f"{t}\t{' '.join(t.split()[:k])} extra\t{k / 3:.2f}" for t in texts for k in [rng.randint(1, 11)]]
    path = tmp_path / "mine.tsv"
    path.write_text("sentence1\tsentence2\tscore\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def topics(tmp_path):
    "Labelled texts with a train and a test split."
    rng, words = random.Random(2), {"sea": "wave boat fish salt shore".split(), "sky": "cloud wind bird star rain".split()}
    home = tmp_path / "topics"
    home.mkdir()
    for split, n in (("train", 40), ("test", 24)):
        rows = [f"{k}\t{' '.join(rng.choices(words[k], k=5))} {i}" for i in range(n) for k in [rng.choice([*words])]]
        (home / f"{split}.tsv").write_text("label\ttext\n" + "\n".join(rows) + "\n")
    return home


def test_documents_are_the_same_in_every_split(toy):
    every = documents_of([str(toy)])
    (toy / "qrels" / "train.tsv").unlink()
    assert len(every) == 120 and documents_of([str(toy)]) == every


def test_any_model_on_any_set(papermill, small, tiny_model, toy, pairs, topics, monkeypatch):
    common = {"model": tiny_model, "evaluate": f"{toy},{pairs},{topics}", "precision": "fp32"}
    ran = papermill("base", driver="evaluate", run="base", **common)
    assert ran.code == 0, ran.text
    r = ran.record()
    assert r.kind == "evaluate" and r.status == "completed" and not r.before and not r.delta
    assert {"toy/ndcg@10", "toy/map@100", "mine/spearman", "mine/pearson-euclidean", "topics/accuracy", "topics/v-measure"} <= set(r.after) == set(r.interval)
    for key, (low, high) in r.interval.items():
        assert low <= r.after[key] <= high, key
        assert score(r.items(key), key, r.truth(key)) == pytest.approx(r.after[key], abs=1e-5), "the kept scores give the figure again"
    assert {(d["name"], d["rows"], d["role"]) for d in r.data} == {("toy", 20, "evaluate"), ("mine", 40, "evaluate"), ("topics", 24, "evaluate")}
    assert r.speed["encoded_texts"] > 0

    # again: nothing is encoded, and the figures are the same; anew on request
    again = papermill("again", driver="evaluate", **common)
    assert again.record().after == r.after and again.record().speed["encoded_texts"] == 0
    assert papermill("anew", driver="evaluate", fresh=True, **common).record().speed["encoded_texts"] >= r.speed["encoded_texts"]

    # a control that needs no training: the mean of the training texts' embeddings taken away
    centred = papermill("centred", driver="evaluate", **common | {"control": "center", "counted_on": toy, "evaluate": toy, "also_ranked_by": "euclidean"})
    assert centred.code == 0, centred.text
    rows, = (t.rows for t in training_sets([str(toy)]))
    base, data = load_model(str(tiny_model)), load(str(toy), "test")
    mean = base.encode([*{*rows["anchor"], *rows["positive"]}]).mean(0)
    q, d = (base.encode([*x.values()]) - mean for x in (data.queries, data.documents))
    ndcg = lambda similarity: ranking_metrics(gains_of(data, rank(data, q, d, similarity=similarity)), judged_of(data))["ndcg@10"].mean()
    got = centred.record().after
    assert got["toy/ndcg@10"] == pytest.approx(ndcg("cosine"), abs=1e-6) != r.after["toy/ndcg@10"] and got["toy/ndcg@10-euclidean"] == pytest.approx(ndcg("euclidean"), abs=1e-6)
    # and that of what is searched
    own = papermill("own", driver="evaluate", **common | {"control": "center", "counted_on": toy, "count_documents": True, "evaluate": toy})
    assert own.code == 0, own.text
    assert f"counted on {len({*data.documents.values()})} documents" in own.path.read_text()
    mean = base.encode([*{*data.documents.values()}]).mean(0)
    q, d = (base.encode([*x.values()]) - mean for x in (data.queries, data.documents))
    assert own.record().after["toy/ndcg@10"] == pytest.approx(ndcg("cosine"), abs=1e-6)
    with pytest.raises(InputError, match="control: there are no texts to count on"): start({"control": "center"}, EvaluateConfig)
    with pytest.raises(InputError, match="nothing is counted"): start({"counted_on": "pydocs"}, EvaluateConfig)

    # a run's model by the run's name; a run whose model did not travel says how to have it
    trained = papermill("trained", run="trained", max_steps=2, **small)
    assert trained.code == 0, trained.text
    mine = papermill("measured", driver="evaluate", **common | {"model": "trained"})
    assert mine.record().after["toy/ndcg@10"] == pytest.approx(trained.record().after["toy/ndcg@10"], abs=1e-6)
    shutil.rmtree(papermill.home / "trained" / "model")
    monkeypatch.setenv("EMBEDLAB_RUNS", str(papermill.home))
    with pytest.raises(InputError, match="train it again: papermill nbs/train.ipynb runs/trained.ipynb"): model_named("trained")

    # side by side with the trained run, by the base model's and the run's kept scores
    both = papermill("side", driver="compare", runs="base,trained", baseline="base.ipynb", sets="toy")
    assert both.code == 0, both.text


def test_training_is_measured_on_pairs_and_classes_too(papermill, small, toy, pairs, topics):
    ran = papermill("kinds", max_steps=2, **small | {"evaluate": f"{pairs},{topics},{toy}", "also_ranked_by": "cosine,euclidean"})
    assert ran.code == 0, ran.text
    d = ran.record().delta
    assert d["toy/ndcg@10-cosine"]["mean"] == d["toy/ndcg@10"]["mean"] != d["toy/ndcg@10-euclidean"]["mean"]   # the tiny model's embeddings have lengths of their own
    assert d["mine/spearman"]["test"] == "bootstrap over pairs" and d["topics/accuracy"]["test"] == "McNemar" and d["mine/spearman"]["n"] == 40
    only = papermill("pairs", max_steps=2, **small | {"evaluate": pairs})
    assert "no ranking was measured" in only.path.read_text()


def test_bad_settings(papermill, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDLAB_RUNS", str(tmp_path))
    for params, line in (({"modell": "x"}, "unknown parameter 'modell'; did you mean 'model'"), ({"similarity": "cos"}, "similarity must be")):
        with pytest.raises(InputError, match=line): start(params, EvaluateConfig)
    with pytest.raises(InputError, match="data set 'nowhere' is not known"): evaluation_suites(["nowhere"])
    (tmp_path / "empty.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    with pytest.raises(InputError, match="run 'empty' is here as a page, but its model is not"): model_named("empty")
    ran = papermill("bad", driver="evaluate", model="./nowhere", evaluate="pydocs", split="dev")
    assert ran.code != 0 and "base './nowhere': no such folder" in ran.errors()[0].evalue
    assert ran.record().status == "failed" and ran.record().kind == "evaluate"


@pytest.mark.parametrize("rows, line", [
    (["a b\tc d\tnan", "e f\tg h\t1"], "line 2: 'score' is nan"), (["a b\tc d\t1", "e f\tg h\t1"], "all 2 gold scores are equal"),
    (["a b\tc d\thigh"], "'score' must be a number"), (["a b\t \t1", "a\tb\t2"], "line 2: 'sentence2' is empty")])
def test_bad_pairs(tmp_path, rows, line):
    path = tmp_path / "bad.tsv"
    path.write_text("sentence1\tsentence2\tscore\n" + "\n".join(rows) + "\n")
    with pytest.raises(InputError, match=line): evaluation_suites([str(path)])


def test_groups_name_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDLAB_DATA", str(tmp_path)); monkeypatch.setenv("EMBEDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("embedlab.collections.http_get", lambda *a, **kw: (_ for _ in ()).throw(ConnectionError("no network")))
    assert len(GROUPS["beir18"]) == 17 + 12 and len(GROUPS["nanobeir"]) == 13, "eighteen sets, of which cqadupstack has twelve parts"
    with pytest.raises(InputError, match="none of beir18 can be had; the first says: trec-covid is not here"): evaluation_suites(["beir18"])
    write_beir(tmp_path / "scifact", {"1": "a text"}, {"q": "a query"}, {"test": {"q": {"1": 1}}})
    suites, missing = evaluation_suites(["beir18"])
    assert [s.name for s in suites] == ["scifact"] and len(missing) == 28 and "licensed" in missing["bioasq"]
    with pytest.raises(InputError, match="scifact stands twice"): evaluation_suites(["scifact", "scifact"])


def test_the_clean_part(toy):
    "Half of the test queries share their document with training: the other half is the clean part, under one name everywhere."
    import json
    qrels = toy / "qrels" / "train.tsv"
    qrels.write_text(qrels.read_text() + "".join(f"q{i}\td{i + 100}\t1\n" for i in range(10)))
    whole, part = evaluation_suites([str(toy), f"{toy}-clean"])[0]
    assert part.name == "toy-clean" and list(part.queries) == [f"q{i}" for i in range(110, 120)] and "(10 of 20)" in part.notes[0]
    assert part.fingerprint != whole.fingerprint and json.dumps(part.qrels)


def test_near_repeats_alone_make_no_part():
    "Near repeats are reported and stay in: a part that is the whole would only be a second figure for one thing."
    s = check("t", "test", {"1": {"text": "alpha beta"}}, {"a": "one two three four five six seven"}, {"a": {"1": 1}})
    rows = Dataset.from_dict({"anchor": ["one two three four five six eight"], "positive": ["other text"]})
    found = find_overlap(rows, [s])
    assert (found["t"].near, found["t"].exact) == (1, 0) and clean_parts(found, [s], rows) == []


def test_dev_is_ranked_as_the_test_is(tiny_model, toy, tmp_path, monkeypatch):
    import embedlab.trainer as t
    seen, plain = [], t.evaluate
    monkeypatch.setattr(t, "evaluate", lambda *a, similarity="cosine", **kw: (seen.append(similarity), plain(*a, similarity=similarity, **kw))[1])
    cfg = make_config(batch_size=16, max_steps=2, similarity="euclidean", precision="fp32")
    one, = training_sets([str(toy)])
    t.fit(load_model(str(tiny_model)), [one], cfg, tmp_path / "fit", [one.dev], "x")
    assert len(seen) >= 2 and {*seen} == {"euclidean"}


def test_clean_part_stands_beside_the_whole_in_a_run(papermill, small, toy):
    qrels = toy / "qrels" / "train.tsv"
    qrels.write_text(qrels.read_text() + "".join(f"q{i}\td{i + 100}\t1\n" for i in range(10)))
    r = papermill("shared", max_steps=2, **small).record()
    assert r.leaks["shared_documents"] == 10 and {d["n"] for k, d in r.delta.items() if k.startswith("toy-clean/")} == {10}
    assert next(d for d in r.data if d["name"] == "toy-clean")["part"].endswith("(10 of 20)")
    whole, part = r.both("toy/ndcg@10")[1], r.both("toy-clean/ndcg@10")[1]
    assert part.tolist() == whole[10:].tolist()


def test_two_processes_share_one_cache(tiny_model, tmp_path):
    script = f"""
import sys, numpy as np
from embedlab.encoding import EmbeddingCache, encode
from embedlab.models import load_model
model = load_model({str(tiny_model)!r})
cache = EmbeddingCache(model, path={str(tmp_path / 'shared.sqlite')!r})
np.save(sys.argv[1], encode(model, [f"text number {{i}}" for i in range(1500)], batch=2, cache=cache))
"""
    both = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / f"{k}.npy")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for k in "ab"]
    for p in both:
        out, err = p.communicate()
        assert p.returncode == 0 and "damaged" not in out and "can't be used" not in out, out + err
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), atol=1e-6)
    with sqlite3.connect(tmp_path / "shared.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",) and db.execute("SELECT count(*) FROM embeddings").fetchone() == (1500,)


def test_another_model_prompt_or_length_is_another_embedding(tiny_model, tmp_path):
    file, texts = tmp_path / "c.sqlite", ["one two three four five six"] * 2 + ["seven"]
    model = load_model(str(tiny_model))
    first = EmbeddingCache(model, path=file)
    plain = encode(model, texts, cache=first)
    assert first.hits == 0
    model.prompts = {"query": "query: ", "document": ""}
    asked = EmbeddingCache(model, path=file)
    assert not np.allclose(encode(model, texts, "query", cache=asked), plain)
    model.max_seq_length = 4
    assert not np.allclose(encode(model, texts, cache=EmbeddingCache(model, path=file)), plain)
    model.max_seq_length = 48
    with __import__("torch").no_grad(): next(model.parameters()).add_(0.1)
    changed = EmbeddingCache(model, path=file)
    encode(model, texts, cache=changed)
    assert asked.hits == changed.hits == 0


def test_a_cache_that_can_not_be_used_is_no_obstacle(tiny_model, tmp_path, capsys):
    model, texts = load_model(str(tiny_model)), ["a b", "c d"]
    right = encode(model, texts)
    torn = tmp_path / "torn.sqlite"
    torn.write_bytes(b"SQLite format 3\x00" + os.urandom(5000))
    np.testing.assert_allclose(encode(model, texts, cache=EmbeddingCache(model, path=torn)), right, atol=1e-6)
    assert "is damaged" in capsys.readouterr().out and torn.with_suffix(".broken").exists()
    cache = EmbeddingCache(model, path=torn)
    encode(model, texts, cache=cache)
    assert cache.hits == 2, "a new file took its place"
    (tmp_path / "file").write_text("")
    np.testing.assert_allclose(encode(model, texts, cache=EmbeddingCache(model, path=tmp_path / "file" / "c.sqlite")), right, atol=1e-6)
    assert "can't be used" in capsys.readouterr().out


def test_one_query_sets_have_documented_values(tiny_model, tmp_path):
    from embedlab.significance import compare, interval
    folder = write_beir(tmp_path / "one", {"1": "a text", "2": "another"}, {"q": "a query"}, {"test": {"q": {"1": 1}}})
    s = evaluate(load_model(str(tiny_model)), str(folder), cache=False)[0]
    assert len(s) == 1 and s.mean("recall@100") == 1, "both documents are ranked, though 100 were asked for"
    d = compare(s.values["ndcg@10"], s.values["ndcg@10"] * 0 + 1)
    assert d.p == 1 and d.verdict == "within noise" and interval(s.values["ndcg@10"])[0] == s.mean()
