"Figures on real collections equal the field's own tools and the published ones."
import os

import numpy as np
import pytest
import torch

from embedlab.collections import evaluation_suites, load
from embedlab.evaluation import evaluate, gains_of, judged_of, rank, ranking_metrics
from embedlab.models import load_model

needs_data = pytest.mark.skipif(not os.environ.get("EMBEDLAB_DATA"), reason="EMBEDLAB_DATA is not set; point it at a folder that holds scifact, cisi, cranfield and stsb")
DEPTHS = [1, 3, 5, 10, 100]
METRICS = [f"{m}@{k}" for m in ("ndcg", "recall", "map", "mrr") for k in DEPTHS]


def beirs(data, q, d, k=1000) -> tuple[dict, dict]:
    "BEIR's search and averages (rounded by it to five digits), and trec_eval's figures of the same rankings, unrounded."
    import pytrec_eval
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.search.dense import DenseRetrievalExactSearch
    row = {n: i for i, n in enumerate(data.corpus)}

    class Given:
        def encode_queries(self, queries, **kw): return torch.from_numpy(q)
        def encode_corpus(self, corpus, **kw): return torch.from_numpy(d[[row[c["id"]] for c in corpus]])
    corpus = {n: {"id": n, **x} for n, x in data.corpus.items()}
    qrels = {f"q:{i}": r for i, r in data.qrels.items()}   # ids made disjoint: BEIR drops a document that has its query's id
    search = EvaluateRetrieval(DenseRetrievalExactSearch(Given()), k_values=[k], score_function="cos_sim")
    found = search.retrieve(corpus, {f"q:{i}": t for i, t in data.queries.items()})
    ndcg, mapping, recall, _ = search.evaluate(qrels, found, DEPTHS)
    rounded = {m.lower(): v for m, v in (ndcg | mapping | recall | search.evaluate_custom(qrels, found, DEPTHS, metric="mrr")).items()}
    names = {f"{ours}@{k}": f"{theirs}_{k}" for ours, theirs in (("ndcg", "ndcg_cut"), ("recall", "recall"), ("map", "map_cut")) for k in DEPTHS}
    by_query = pytrec_eval.RelevanceEvaluator(qrels, {f"{m}.{','.join(map(str, DEPTHS))}" for m in ("ndcg_cut", "recall", "map_cut")}).evaluate(found)
    return rounded, {m: np.mean([x[t] for x in by_query.values()]) for m, t in names.items()}


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name, ndcg", [("scifact", 0.645), ("cisi", None), ("cranfield", None)])
def test_retrieval_equals_beirs(name, ndcg):
    data = load(name, "test")
    scores = evaluate(load_model("minilm"), [data])[0]
    if ndcg: assert scores.mean("ndcg@10") == pytest.approx(ndcg, abs=0.003)
    ours = {m: v.mean() for m, v in ranking_metrics(gains_of(data, rank(data, scores.q, scores.d, 1000)), judged_of(data), METRICS).items()}
    rounded, exact = beirs(data, scores.q, scores.d)
    assert len(exact) == 15 and {m: ours[m] for m in exact} == pytest.approx(exact, abs=1e-6)
    assert ours == pytest.approx({m: rounded[m] for m in METRICS}, abs=6e-6), "what BEIR prints, rounded to five digits"


@needs_data
@pytest.mark.slow
def test_stsb_equals_sentence_transformers():
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
    from embedlab.models import machine
    from embedlab.config import make_config
    suite, = evaluation_suites(["stsb"], "test")[0]
    on = machine(make_config(precision="fp32"))
    model = load_model("minilm", on=on)
    ours = evaluate(model, [suite], on)[0]
    theirs = EmbeddingSimilarityEvaluator(suite.a, suite.b, suite.gold, similarity_fn_names=["cosine", "dot", "euclidean"])(model)
    assert ours.mean("spearman") == pytest.approx(0.820, abs=0.003)
    for kind in ("spearman", "pearson"):
        for mine, name in (("", "cosine"), ("-dot", "dot"), ("-euclidean", "euclidean")):
            assert ours.mean(kind + mine) == pytest.approx(theirs[f"{kind}_{name}"], abs=1e-6), (kind, name)


@needs_data
@pytest.mark.parametrize("name, lost", [("cisi", 7), ("cranfield", 1)])
def test_judgements_of_a_documents_own_id_are_kept(name, lost):
    "Query ids are document ids here, which says nothing: such a document is found, unless the collection declares otherwise."
    from dataclasses import replace
    data = load(name, "test")
    row = {d: i for i, d in enumerate(data.corpus)}
    own = [q for q in data.queries if data.qrels[q].get(q, 0) > 0]
    assert len(own) == lost and not data.own_ids
    d = np.random.default_rng(0).normal(size=(len(data.corpus), 32)).astype(np.float32)
    q = np.stack([d[row[i]] if i in own else -d[0] for i in data.queries])   # those queries are their own document's twin
    at = [k for k, i in enumerate(data.queries) if i in own]
    assert rank(data, q, d, 10)[at, 0].tolist() == [row[i] for i in own] and (gains_of(data, rank(data, q, d, 10))[at, 0] > 0).all()
    declared = rank(replace(data, own_ids=True), q, d, len(data.corpus))
    assert not any(row[i] in declared[k] for k, i in zip(at, own))
