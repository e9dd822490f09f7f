"Shared by the tests: a tiny model, a tiny collection, and a way to run a driver as a user does."
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

import kernels

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    "A BERT of two layers with random weights and MiniLM's tokenizer: the real files of a real architecture, and fast."
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    from embedlab.models import minilm_folder
    torch.manual_seed(0)
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("models") / "tiny"
    tok = AutoTokenizer.from_pretrained(minilm_folder())
    BertModel(BertConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64)).save_pretrained(raw)
    tok.save_pretrained(raw)
    body = Transformer(str(raw), max_seq_length=48)
    SentenceTransformer(modules=[body, Pooling(32, "mean")]).save(str(out), create_model_card=False)
    return out


def write_beir(folder: Path, corpus: dict, queries: dict, qrels: dict) -> Path:
    "Write a BEIR folder; `qrels` is {split: {query: {document: score}}}."
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": k, "title": "", "text": v}) + "\n" for k, v in corpus.items()))
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": k, "text": v}) + "\n" for k, v in queries.items()))
    for split, rows in qrels.items():
        lines = [f"{q}\t{d}\t{s}\n" for q, r in rows.items() for d, s in r.items()]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.fixture
def toy(tmp_path) -> Path:
    "A BEIR folder of 120 documents with 80 train, 20 dev and 20 test queries, each answered by one document."
    rng = random.Random(0)
    vocab = [f"{a}{b}" for a in "bold calm dark fast green loud odd pale quick warm".split() for b in "bird boat city door fish hill lamp road tree wave".split()]
    corpus = {f"d{i}": " ".join(rng.sample(vocab, 12)) for i in range(120)}
    queries = {f"q{i}": " ".join(rng.sample(corpus[f"d{i}"].split(), 6)) for i in range(120)}
    part = lambda a, b: {f"q{i}": {f"d{i}": 1} for i in range(a, b)}
    return write_beir(tmp_path / "toy", corpus, queries, {"train": part(0, 80), "dev": part(80, 100), "test": part(100, 120)})


@dataclass
class Ran:
    "What a driver left behind."
    code: int
    text: str         # all that papermill printed
    path: Path
    def notebook(self): return nbformat.read(self.path, 4)
    def errors(self) -> list: return [o for c in self.notebook().cells for o in c.get("outputs", []) if o.output_type == "error"]
    def record(self):
        from embedlab.records import read_record
        return read_record(self.path)


@pytest.fixture(scope="session")
def forked(tmp_path_factory) -> dict:
    "Environment in which a notebook begins with everything imported, in two seconds instead of ten; an empty JUPYTER_PATH gives a test kernels as users have them."
    return {"JUPYTER_PATH": kernels.start(tmp_path_factory.mktemp("kernels"))} if sys.platform == "linux" else {}


@pytest.fixture
def papermill(tmp_path, forked):
    "Run a driver as a user does, from the project's root, with its artefacts in a folder of the test's own."
    home = tmp_path / "runs"
    home.mkdir()

    def start(out: str = "out", driver: str = "train", env: dict | None = None, **params) -> subprocess.Popen:
        args = [x for k, v in params.items() for x in ("-p", k, str(v))]
        return subprocess.Popen([sys.executable, "-m", "papermill", f"nbs/{driver}.ipynb", str(home / f"{out}.ipynb"), *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=os.environ | {"EMBEDLAB_RUNS": str(home), "HF_HUB_OFFLINE": "1", "EMBEDLAB_CACHE": str(tmp_path / "cache"), "EMBEDLAB_MIN_FREE": str(2**20)} | forked | (env or {}))

    def go(out: str = "out", driver: str = "train", env: dict | None = None, **params) -> Ran:
        p = start(out, driver, env, **params)
        text, _ = p.communicate()
        return Ran(p.returncode, text, home / f"{out}.ipynb")
    go.start = start
    go.home = home
    return go


@pytest.fixture
def small(tiny_model, toy) -> dict:
    "Settings of a run that takes a second."
    return {"base": tiny_model, "train": toy, "evaluate": toy, "epochs": 2, "batch_size": 16, "precision": "fp32", "lr": 1e-3}


def looks_at_the_machine(page: Path) -> bool: # an executed bench.ipynb or preflight.ipynb, which compares no models and so keeps no record
    return any(x in page.read_text() for x in ("BenchConfig", "PreflightConfig"))


def keeps_record(page: Path) -> bool: # the executed notebook of a run, neither of a comparison nor of a look at the machine
    from embedlab.comparison import is_comparison
    return not (is_comparison(page) or looks_at_the_machine(page))
