"Prompts go the same way everywhere: evaluation, training, the saved model."
import shutil

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from embedlab.config import make_config
from embedlab.collections import TrainingSet, training_sets
from embedlab.data import as_retrieval, as_table, training_pairs
from embedlab.encoding import encode
from embedlab.engine import Pairs
from embedlab.models import load_model
from embedlab.checkpoints import save_model
from embedlab.trainer import fit


@pytest.fixture
def e5(tiny_model, tmp_path): return shutil.copytree(tiny_model, tmp_path / "e5-small-v2")


def test_evaluation_and_saved_model(e5, tmp_path):
    model = load_model(str(e5))
    texts = ["split a string", "open a file"]
    for kind, prompt in (("query", "query: "), ("document", "passage: ")):
        plain = model.encode([prompt + t for t in texts], prompt="", normalize_embeddings=True)
        assert np.allclose(encode(model, texts, kind), plain, atol=2e-2)
        assert not np.allclose(encode(model, texts, kind), model.encode(texts, prompt="", normalize_embeddings=True), atol=2e-2)
    save_model(model, tmp_path / "saved")
    saved = SentenceTransformer(str(tmp_path / "saved"))
    assert np.allclose(saved.encode_query(texts), model.encode([f"query: {t}" for t in texts], prompt=""), atol=1e-5)


def test_training(e5, toy, tmp_path):
    "Every row that is trained on begins with its column's prompt."
    model = load_model(str(e5))
    one, = training_sets([str(toy)])
    data, tok = Pairs(model, [(one.rows, one.known, 0)]), model.tokenizer
    for ids, column, prompt in zip(data.columns[0], ("anchor", "positive"), ("query: ", "passage: ")):
        assert [list(i) for i in ids] == tok([prompt + t for t in one.rows[column]], truncation=True, max_length=model.max_seq_length)["input_ids"]
        assert all(tok.decode(i).split()[1] == prompt.strip(": ") for i in ids)
    fit(model, [one], make_config(batch_size=16, max_steps=2, precision="fp32", checks=1), tmp_path / "c", [one.dev], "f")


def test_own_prompts_are_kept(e5):
    model = SentenceTransformer(str(e5), prompts={"query": "ask: ", "document": "text: "})
    model.save(str(e5 / "own"), create_model_card=False)
    assert {k: load_model(str(e5 / "own")).prompts[k] for k in ("query", "document")} == {"query": "ask: ", "document": "text: "}


def test_given_negatives_reach_the_loss(tiny_model, toy, tmp_path, monkeypatch):
    import embedlab.trainer as t
    table = [(i, {"query": f"word{i} here", "positive": f"answer {i} word{i}", "negative": f"nothing {i}"}) for i in range(32)]
    pairs, sizes = training_pairs(as_table(table, "toy")), []
    plain = t.TrainingLoss.forward
    monkeypatch.setattr(t.TrainingLoss, "forward", lambda self, features, labels=None: (sizes.append(len(list(features))), plain(self, features, labels))[1])
    dev = as_retrieval(pairs, "toy", "dev")
    fit(load_model(str(tiny_model)), [TrainingSet("toy", pairs, pairs, dev, 32)], make_config(batch_size=16, max_steps=2, precision="fp32", checks=1), tmp_path / "c", [dev], "f")
    assert sizes == [3, 3], "anchor, positive and negative"
