"Hard negatives: never a known answer, within ranks and margin, the same every time, and no row lost."
import random

import numpy as np
import pytest
import torch
from datasets import Dataset

from embedlab.collections import load, training_sets
from embedlab.config import InputError, make_config
from embedlab.encoding import encode
from embedlab.mining import Candidates, WordIndex, mine
from embedlab.models import Machine, load_model

ON = Machine("cpu", False, "eager", 1)
N = 60


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/embeddings.sqlite"


@pytest.fixture(scope="module")
def model(tiny_model): return load_model(str(tiny_model), on=ON)


@pytest.fixture(scope="module")
def known() -> Dataset:
    "60 documents of 12 words out of 40; each query is 5 words of its document, each second query has the next document as another answer."
    rng = random.Random(0)
    vocab = [f"{a}{b}" for a in ("red", "old", "wet", "big") for b in "ant bat cow dog elk fox gnu hen owl pig".split()]
    docs = [" ".join(rng.sample(vocab, 12)) for _ in range(N)]
    asked = [" ".join(rng.sample(d.split(), 5)) for d in docs]
    rows = [(i, i) for i in range(N)] + [(i, (i + 1) % N) for i in range(0, N, 2)]
    return Dataset.from_dict({"anchor": [asked[i] for i, _ in rows], "positive": [docs[j] for _, j in rows], "label": [[i, j] for i, j in rows]})


def settings(**kw): return make_config(**{"mine_from": 1, "mine_to": 20, "mine_margin": 0, "negatives": 3} | kw)


def negatives(mined: Dataset) -> list[list[str]]: return [[r[f"negative_{j}"] for j in (1, 2, 3)] for r in mined]


@pytest.mark.parametrize("miner", ["model", "bm25", "both"])
def test_known_answers_are_never_negatives(model, known, miner):
    "Neither those of other rows, nor under another wording's letters, nor the query itself."
    pairs = known.select(range(N))
    spelt = [t.upper() + "!" for t in known["positive"]] + known["anchor"][:]
    mined = mine(pairs, known, model, settings(miner=miner, mine_to=6), ON, documents=known["positive"][:] + spelt)
    answers = {}
    for r in known: answers.setdefault(r["anchor"], {r["anchor"]}).add(r["positive"])
    for r, got in zip(pairs, negatives(mined)):
        assert len(set(got)) == 3 and not {t.lower().rstrip("!") for t in got} & answers[r["anchor"]]
    forgotten = mine(pairs, pairs, model, settings(miner=miner, mine_to=6), ON)
    if miner != "model": assert any(set(got) & answers[r["anchor"]] for r, got in zip(pairs, negatives(forgotten))), "what is not known is taken: the test has something to find"


def test_rows_columns_and_order(model, known):
    pairs = known.select(range(10, 40)).add_column("negative_4", ["given"] * 30)
    mined = mine(pairs, known, model, settings(), ON)
    assert mined.column_names == [*pairs.column_names, "negative_5", "negative_6", "negative_7"]
    assert mined.remove_columns(mined.column_names[-3:]).to_dict() == pairs.to_dict()
    assert mine(pairs, known, model, settings(negatives=0), ON) is pairs


@pytest.mark.parametrize("miner", ["model", "bm25", "both"])
def test_the_same_every_time(model, known, miner):
    pairs = known.select(range(N))
    a, b, c = (mine(pairs, known, model, settings(miner=miner, seed=s), ON).to_dict() for s in (1, 1, 2))
    assert a == b != c


def ranking(model, miner, query: str, docs: list[str]) -> list[str]:
    if miner == "bm25": score = WordIndex(docs).scores(query)
    else:
        q, d = (encode(model, t, kind, ON) for t, kind in (([query], "query"), (docs, "document")))
        score = d @ q[0]
    return [docs[i] for i in np.argsort(-score, kind="stable")], np.sort(score)[::-1]


@pytest.mark.parametrize("miner", ["model", "bm25"])
def test_ranks_and_margin(model, known, miner):
    "Ranks count documents that are no known answer; the margin is a share of the row's own answer's score."
    pairs, docs = known.select(range(N)), known["positive"][:N]
    c = Candidates(pairs, known, model, settings(miner=miner, mine_from=2, mine_to=9, mine_margin=0.5), ON)
    cut = 0
    for r in range(0, N, 7):
        order, scores = ranking(model, miner, pairs[r]["anchor"], docs)
        answers = {x["positive"] for x in known if x["anchor"] == pairs[r]["anchor"]}
        at = dict(zip(order, scores))
        window = [d for d in order if d not in answers][1:9]
        wanted = [d for d in window if at[d] <= 0.5 * at[pairs[r]["positive"]] and (miner == "model" or at[d] > 0)]
        cut += len(window) - len(wanted)
        assert {c.docs[i] for i in c.of(r)[0]} == set(wanted)
    assert cut > 0, "the margin took something"


def test_half_of_each(model, known):
    pairs = known.select(range(N))
    cfg = settings(miner="both", negatives=1, mine_to=5)
    c = Candidates(pairs, known, model, cfg, ON)
    got = mine(pairs, known, model, cfg, ON)["negative_1"][:]
    from_model = [got[r] in {c.docs[i] for i in c.of(r)[0]} for r in range(N)]
    from_words = [got[r] in {c.docs[i] for i in c.of(r)[1]} for r in range(N)]
    full = [r for r in range(N) if all(c.of(r))]
    assert len(full) > N / 4 and all((from_model if r % 2 else from_words)[r] for r in full), "rows take turns with an odd one"
    assert not all(from_model[r] for r in full) and not all(from_words[r] for r in full)


def test_too_few_candidates(model, known, capsys):
    "A row without candidates is kept: random documents stand in, none of them an answer."
    lost = Dataset.from_dict({"anchor": ["nothing like it"], "positive": known["positive"][:1], "label": [[99, 0]]})
    mined = mine(lost, known, model, settings(miner="bm25"), ON)
    assert "1 pairs had too few candidates and got 3 random documents" in capsys.readouterr().out
    assert len(set(negatives(mined)[0])) == 3 and known["positive"][0] not in negatives(mined)[0]
    mine(known.select(range(5)), known, model, settings(miner="bm25", negatives=1), ON)
    assert "0 pairs had too few candidates and got 0 random documents" in capsys.readouterr().out


def test_what_can_not_be_mined(model, known):
    few = known.select(range(12))
    with pytest.raises(InputError, match="12 documents are too few to mine 3 negatives from rank 10 on; lower mine_from or give more documents"): mine(few, few, model, settings(mine_from=10), ON)
    with pytest.raises(InputError, match="BM25 finds no word in 2 documents"): WordIndex(["?", "!"])


def test_another_model_mines_anew(model, tiny_model, known, cache):
    "Embeddings are kept by the weights, not by the model's name; and they are not kept where it is said so."
    pairs = known.select(range(N))
    mine(pairs, known, model, settings(), ON, cache=False)
    assert not cache.exists()
    first = mine(pairs, known, model, settings(), ON).to_dict()
    assert cache.exists()
    other = load_model(str(tiny_model), on=ON)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in other.parameters(): p.add_(0.1 * torch.randn_like(p))
    assert mine(pairs, known, other, settings(), ON).to_dict() != first


def test_negatives_come_from_the_whole_corpus_where_that_is_asked_for(toy, tiny_model, tmp_path, monkeypatch):
    "The toy's training queries have 80 answers among its 120 documents."
    import embedlab.trainer as t
    plain, mined = t.mine, {}
    for among in ("answers", "corpus"):
        one, = training_sets([str(toy)], corpus=among == "corpus")
        monkeypatch.setattr(t, "mine", lambda *a, **kw: mined.setdefault(among, plain(*a, **kw)))
        cfg = make_config(batch_size=16, max_steps=2, precision="fp32", checks=1, negatives=3, mine_from=1, mine_among=among, mine_margin=0)
        t.fit(load_model(str(tiny_model)), [one], cfg, tmp_path / among, [one.dev], "f")
    answers = {x for x in one.known["positive"]}
    every = {k: {d for r in negatives(m) for d in r} for k, m in mined.items()}
    assert every["answers"] <= answers and len(every["corpus"] - answers) > 20
    bare, = training_sets([str(toy)], corpus=True, titles=False)
    assert {*bare.documents} == {d["text"] for d in load(str(toy), "train").corpus.values()}


def test_the_model_ranks_as_the_loss_compares(known, tiny_model):
    "Embeddings that have lengths of their own stand in another order by distance; no negative is nearer than the margin allows."
    model, pairs = load_model(str(tiny_model)), known.select(range(N))
    ranked = {s: Candidates(pairs, known, model, settings(similarity=s), ON, cache=False) for s in ("cosine", "euclidean")}
    c = ranked["euclidean"]
    q, d = model.encode(pairs["anchor"][:]), model.encode(c.docs)
    away = np.linalg.norm(q[:, None] - d[None], axis=2)
    for r in range(N):
        window, = c.of(r)
        assert all(away[r, j] >= away[r, c.own[r]] * (1 + c.cfg.mine_margin) - 1e-4 for j in window)
        assert np.all(np.diff(away[r, window]) >= -1e-4), "nearest first"
    assert any(ranked["cosine"].of(r) != c.of(r) for r in range(N))
