"Figures on a real collection equal the field's own tools and the published ones."
import os

import numpy as np
import pytest

from embedlab.evaluation import MAP, MRR, NDCG, RECALL, evaluate
from embedlab.models import load_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not os.environ.get("EMBEDLAB_DATA"), reason="EMBEDLAB_DATA is not set; point it at a folder that holds scifact")]


def test_scifact_with_minilm():
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    from embedlab.data import load
    data = load("scifact", "test")
    scores = evaluate(load_model("minilm"), data)
    assert scores.mean(NDCG) == pytest.approx(0.645, abs=0.003)

    row = {n: i for i, n in enumerate(data.corpus)}

    class Given:
        def encode_queries(self, queries, **kw): return scores.q
        def encode_corpus(self, corpus, **kw): return np.stack([scores.d[row[c["id"]]] for c in corpus])
    corpus = {n: {"id": n, **d} for n, d in data.corpus.items()}
    queries, qrels = {f"q:{q}": t for q, t in data.queries.items()}, {f"q:{q}": r for q, r in data.qrels.items()}   # ids made disjoint
    search = EvaluateRetrieval(DenseRetrievalExactSearch(Given()), k_values=[10, 100], score_function="dot")
    found = search.retrieve(corpus, queries)
    ndcg, mapping, recall, _ = search.evaluate(qrels, found, [10, 100])
    mrr = search.evaluate_custom(qrels, found, [10], metric="mrr")
    for metric, value in ((NDCG, ndcg["NDCG@10"]), (MAP, mapping["MAP@100"]), (RECALL, recall["Recall@100"]), (MRR, mrr["MRR@10"])):
        assert scores.mean(metric) == pytest.approx(value, abs=1e-5), "BEIR rounds to five digits"
