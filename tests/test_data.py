"Data by name, from folders and over the wire (a server on this machine)."
import hashlib
import http.server
import io
import json
import os
import threading
import zipfile

import pytest

from conftest import write_beir
from embedlab import collections, data
from embedlab.config import InputError


@pytest.fixture
def archive(toy) -> bytes:
    "BEIR's archive of a set: a folder of the set's name inside a zip."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for p in toy.rglob("*"): z.write(p, f"scifact/{p.relative_to(toy)}")
    return out.getvalue()


@pytest.fixture
def server(archive):
    "Serves scifact.zip with ranges; `cut` bytes of the next whole answer are sent before the line goes dead."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self): self.do_GET(head=True)
        def do_GET(self, head=False):
            if not self.path.endswith("/scifact.zip"): return self.send_error(404)
            asked = self.headers.get("Range")
            start = int(asked.split("=")[1].split("-")[0]) if asked else 0
            s.ranges.append(start)
            body = s.body[start:]
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body)))
            if asked: self.send_header("Content-Range", f"bytes {start}-{len(s.body) - 1}/{len(s.body)}")
            self.end_headers()
            if not head: self.wfile.write(body)
        def log_message(self, *a): pass
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.body, s.ranges = archive, []
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()


@pytest.fixture
def online(server, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(collections, "BEIR_URL", f"http://127.0.0.1:{server.server_address[1]}/{{}}.zip")
    monkeypatch.setitem(collections.BEIR, "scifact", hashlib.md5(archive).hexdigest())
    monkeypatch.setenv("EMBEDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EMBEDLAB_DATA", raising=False)
    return server


def test_download_unpack_and_keep(online, tmp_path):
    got = collections.load("scifact", "test")
    assert (len(got.corpus), len(got.queries)) == (120, 20)
    asked = len(online.ranges)
    assert collections.load("scifact", "dev").split == "dev" and len(online.ranges) == asked, "the second time it comes from the cache"
    assert not list((tmp_path / "cache").rglob("*.zip*"))


def test_download_continues(online, archive, tmp_path):
    part = tmp_path / "cache/data/scifact.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(archive[:1000])
    assert len(collections.load("scifact", "test").queries) == 20
    assert online.ranges == [1000], "only the rest was asked for"


def test_wrong_checksum(online, tmp_path):
    online.body = online.body[:-1] + b"x"
    with pytest.raises(InputError, match="MD5 is .*, not .* as published"): collections.load("scifact", "test")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()], "nothing half-right stays behind"


def test_absent_and_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(collections, "BEIR_URL", "http://127.0.0.1:9/{}.zip")   # nobody listens on the discard port
    monkeypatch.setattr("time.sleep", lambda s: None)                    # the client waits between tries
    monkeypatch.setenv("EMBEDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EMBEDLAB_DATA", str(tmp_path / "mine"))
    with pytest.raises(InputError) as e: collections.load("nfcorpus")
    text = str(e.value)
    assert "\n" not in text and text.startswith("nfcorpus is not here and could not be downloaded")
    for needed in (str(tmp_path / "mine/nfcorpus"), str(tmp_path / "cache/data/nfcorpus"), "corpus.jsonl, queries.jsonl and qrels/"): assert needed in text

    def unreachable(*a, **kw): raise ConnectionError("Couldn't reach the hub")
    monkeypatch.setattr(collections, "load_dataset", unreachable)
    with pytest.raises(InputError, match="stsb is not here and could not be downloaded .ConnectionError: Couldn't reach the hub"): collections.load("stsb")


def test_licensed(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDLAB_DATA", str(tmp_path))
    for name in collections.LICENSED:
        with pytest.raises(InputError, match="ask at http"): collections.load(name)
    write_beir(tmp_path / "robust04", {"d": "text"}, {"q": "query"}, {"test": {"q": {"d": 1}}})
    assert collections.load("robust04").name == "robust04"


def test_hub_layouts(tmp_path, monkeypatch):
    "`datasets` reads the hub's layouts from local parquet files as it reads the downloaded ones."
    from datasets import Dataset, load_dataset
    files = {
        ("sentence-transformers/stsb", None, "validation"): {"sentence1": ["a b"], "sentence2": ["a c"], "score": [0.8]},
        ("stanfordnlp/snli", None, "train"): {"premise": ["A man runs.", "x y", "z w"], "hypothesis": ["Someone moves.", "no", "so"], "label": [0, 2, -1]},
        ("sentence-transformers/all-nli", "triplet", "train"): {"anchor": ["a"], "positive": ["b"], "negative": ["c"]},
        ("sentence-transformers/msmarco-bm25", "triplet", "train"): {"query": ["a"], "positive": ["b"], "negative": ["c"]},
        ("RobZamp/sick", None, "test"): {"sentence_A": ["a"], "sentence_B": ["b"], "label": [1], "relatedness_score": [3.2]},
        ("sentence-transformers/NanoBEIR-en", "corpus", "NanoSciFact"): {"_id": ["d1", "d2"], "text": ["one", "two"]},
        ("sentence-transformers/NanoBEIR-en", "queries", "NanoSciFact"): {"_id": ["q1"], "text": ["first?"]},
        ("sentence-transformers/NanoBEIR-en", "qrels", "NanoSciFact"): {"query-id": ["q1"], "corpus-id": ["d1"]},
    }
    for i, (key, table) in enumerate(files.items()): Dataset.from_dict(table).to_parquet(tmp_path / f"{i}.parquet")

    def local(repo, config=None, split=None, revision=None):
        if (repo, config, split) not in files: raise ValueError(f'Unknown split "{split}".')
        return load_dataset("parquet", data_files=str(tmp_path / f"{list(files).index((repo, config, split))}.parquet"), split="train", cache_dir=str(tmp_path / "hf"))
    monkeypatch.setattr(collections, "load_dataset", local)
    monkeypatch.setenv("EMBEDLAB_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("EMBEDLAB_DATA", raising=False)
    assert collections.load("stsb", "dev")[0] == {"anchor": "a b", "positive": "a c", "score": 0.8}
    snli = collections.load("snli", "train")
    assert snli["relation"] == ["entailment", "contradiction", "disagreed"]
    assert [r["positive"] for r in data.training_pairs(snli)] == ["Someone moves."]
    assert collections.load("all-nli", "train")[0] == collections.load("msmarco-triples", "train")[0] == {"anchor": "a", "positive": "b", "negative": "c"}
    assert collections.load("sick", "test")[0] == {"anchor": "a", "positive": "b", "score": 3.2, "relation": "neutral"}
    nano = collections.load("nano-scifact")
    assert (nano.qrels, len(nano.corpus)) == ({"q1": {"d1": 1}}, 2)
    with pytest.raises(InputError, match="no split 'test' on the hub"): collections.load("stsb", "test")


def test_dev_never_touches_test_or_train(toy):
    (toy / "qrels/dev.tsv").unlink()
    rows, known, dev = collections.training_data(str(toy))
    test = collections.load(str(toy), "test")
    assert dev.split == "dev" and dev.queries and not set(dev.queries) & set(test.queries)
    assert not set(dev.queries.values()) & set(rows["anchor"]) and len(rows) < len(known)
    assert collections.evaluation_suites([str(toy)], "dev")[0][0].fingerprint == dev.fingerprint
    again = collections.training_data(str(toy))
    assert again[2].fingerprint == dev.fingerprint and again[0].to_dict() == rows.to_dict()
    some, _, larger = collections.training_data(str(toy), dev_share=0.5)
    assert set(larger.queries) > set(dev.queries) and len(larger.queries) == len(set(known["anchor"])) // 2
    assert not set(larger.queries.values()) & set(some["anchor"]) and collections.evaluation_suites([str(toy)], "dev", 0.5)[0][0].fingerprint == larger.fingerprint
    own, = collections.training_sets([str(toy)], dev_share=0.5)
    assert own.dev.fingerprint == larger.fingerprint and own.rows["anchor"][:] == some["anchor"][:]


real = pytest.mark.skipif(not os.environ.get("EMBEDLAB_DATA"), reason="EMBEDLAB_DATA is not set; point it at a folder that holds scifact, cranfield, cisi, stsb, snli and sick")


@real
@pytest.mark.parametrize("name, split, documents, queries, relevant", [("scifact", "test", 5183, 300, 339), ("scifact", "train", 5183, 809, 919), ("cisi", "test", 1460, 76, 3114), ("cranfield", "test", 1400, 225, 1612)])
def test_real_retrieval_sets(name, split, documents, queries, relevant):
    got = collections.load(name, split)
    assert (len(got.corpus), len(got.queries), sum(len(got.relevant(q)) for q in got.queries)) == (documents, queries, relevant)


@real
def test_real_pair_sets():
    assert {(n, s): len(collections.load(n, s)) for n, s in (("stsb", "train"), ("stsb", "dev"), ("stsb", "test"), ("snli", "dev"), ("sick", "train"), ("sick", "dev"))} == {
        ("stsb", "train"): 5749, ("stsb", "dev"): 1500, ("stsb", "test"): 1379, ("snli", "dev"): 9842, ("sick", "train"): 4500, ("sick", "dev"): 500}


@real
def test_scifacts_own_overlap():
    "By word-set Jaccard 116 of the 300 test claims have a near twin among the train claims, and 196 share a relevant document."
    from embedlab.leaks import find_leaks
    train, test = data.training_pairs(collections.load("scifact", "train")), collections.load("scifact", "test")
    found = find_leaks(train["anchor"], train["positive"], test.queries, {q: [test.documents[d] for d in test.relevant(q)] for q in test.queries})
    assert (found.near, found.shared_documents) == (116, 196) and found.exact > 0


def write_pairs(path, n: int, word: str, columns=("query", "positive")) -> str:
    "A file of n rows whose texts have no word in common."
    path.write_text("\t".join(columns) + "\n" + "".join("\t".join(f"{word}{c}{i} {word}{c}more{i}" for c in columns) + "\n" for i in range(n)))
    return str(path)


@pytest.mark.parametrize("columns", [("query", "positive", "negative"), ("anchor", "positive", "negative_1", "Negative_2")])
def test_given_negatives_stay_with_their_rows(tmp_path, columns):
    rows, known, dev = collections.training_data(write_pairs(tmp_path / "mine.tsv", 50, "w", columns))
    names = [c.lower() for c in columns[2:]]
    assert rows.column_names == ["anchor", "positive", *names, "label"] and 0 < len(rows) < len(known) == 50
    for r in rows:
        i = r["anchor"].removeprefix(f"w{columns[0]}").split()[0]
        assert [r[n] for n in names] == [f"w{c}{i} w{c}more{i}" for c in columns[2:]]
    leaky = data.check("eval", "test", {"d": {"text": rows[3][names[-1]]}}, {"q": "something else"}, {"q": {"d": 1}})
    assert collections.find_overlap(rows, [leaky])["eval"].negative_documents == 1, "the last column of negatives is looked at too"


def test_one_training_set_is_what_it_was(toy):
    rows, known, dev = collections.training_data(str(toy))
    one, = collections.training_sets([str(toy)], max_pairs=30, seed=5)
    assert data.digest(one.rows) == data.digest(data.first_pairs(rows, 30, 5)) and data.digest(one.known) == data.digest(known)
    assert (one.total, one.dev.fingerprint) == (80, dev.fingerprint)
    assert data.digest(collections.training_sets([str(toy)])[0].rows) == data.digest(rows)


def test_training_sets_share_the_cap(tmp_path, toy):
    names = [str(toy), write_pairs(tmp_path / "b.tsv", 300, "b"), write_pairs(tmp_path / "c.tsv", 20, "c", ("query", "positive", "negative"))]
    sizes = lambda **kw: [len(s.rows) for s in collections.training_sets(names, **kw)]
    assert sizes() == [80, 270, 18] and sizes(max_per_set=50) == [50, 50, 18]
    assert sizes(max_pairs=101) == [22, 74, 5] and sizes(max_pairs=10, max_per_set=50) == [4, 4, 2], "largest remainders"
    a, b, c = (collections.training_sets(names, max_pairs=101, seed=s) for s in (1, 1, 2))
    assert [data.digest(s.rows) for s in a] == [data.digest(s.rows) for s in b] != [data.digest(s.rows) for s in c]
    for one in a: assert set(map(tuple, one.rows["label"])) <= set(map(tuple, one.known["label"])) and one.total == {"toy": 80, "b.tsv": 270, "c.tsv": 18}[one.name.split("/")[-1]]
    for part in (0, 1):
        numbers = [{x[part] for x in s.known["label"]} for s in a]
        assert len(set().union(*numbers)) == sum(map(len, numbers)), "no number of one set is another's"
    with pytest.raises(InputError, match="twice"): collections.training_sets(names + names[:1])


def test_no_set_trains_on_anothers_dev(tmp_path, toy):
    dev = collections.load(str(toy), "dev")
    asked = list(dev.queries)[:5]
    path = tmp_path / "b.jsonl"
    path.write_text("".join(f'{{"query": "{q}", "positive": "{d}"}}\n' for q, d in [(f"w{i} v{i}", f"x{i} y{i}") for i in range(40)]
                            + [(dev.queries[q].upper(), f"z{q} u{q}") for q in asked] + [(f"s{q} t{q}", dev.answers[q][0]) for q in asked]))
    alone, = collections.training_sets([str(path)])
    beside = collections.training_sets([str(toy), str(path)])[1]
    touched = set(dev.queries.values()) | {a for x in dev.answers.values() for a in x}
    hits = lambda s: sum(r["anchor"].lower() in touched or r["positive"] in touched for r in s.rows)
    assert hits(alone) > 0 == hits(beside) and len(beside.rows) == len(alone.rows) - hits(alone) == beside.total


def test_a_test_document_is_overlap_with_its_title_and_without(tmp_path):
    "Its title as a question, or its text without the title, shows what the test asks for."
    folder = write_beir(tmp_path / "titled", {f"d{i}": f"body{i} of{i} words{i}" for i in range(40)}, {f"q{i}": f"ask{i} for{i}" for i in range(40)},
                        {"train": {f"q{i}": {f"d{i}": 1} for i in range(30)}, "test": {f"q{i}": {f"d{i - 5}": 1} for i in range(30, 40)}})
    corpus = (folder / "corpus.jsonl").read_text().splitlines()
    (folder / "corpus.jsonl").write_text("".join(json.dumps(json.loads(x) | {"title": f"heading{n} over{n}"}) + "\n" for n, x in enumerate(corpus)))
    suite, name = collections.load(str(folder), "test"), str(folder)
    for rows in (data.training_pairs(collections.load(name, "train")), data.training_pairs(collections.load(name, "train"), titles=False), data.training_pairs(collections.load(name + ":titles", "train"))):
        leaks = collections.find_overlap(rows, [suite], "drop")["titled"]
        texts = {suite.corpus[d]["text"] for q in suite.queries for d in suite.relevant(q)}
        assert {r for r, p in enumerate(rows["positive"]) if any(p.endswith(t) for t in texts)} == {*leaks.rows.nonzero()[0]} and leaks.rows.sum() >= 5
    assert len(data.title_pairs(suite)) == 40
    with pytest.raises(collections.MissingSplit, match="is a training set only"): collections.load(name + ":titles", "test")
    with pytest.raises(InputError, match="none of its .* documents has a title"): collections.load("pydocs:titles", "train")


def test_a_sentence_asks_for_its_document(tmp_path):
    "The documents are those of the set, so that overlap, masks and mining know them; a test document's sentence goes."
    text = lambda i: f"Start{i} of{i} the text{i} is{i} here{i}. Then{i} comes{i} a{i} second{i} one{i}! Short."
    folder = write_beir(tmp_path / "told", {f"d{i}": text(i) for i in range(60)} | {"d60": "Only one sentence stands here, which would find itself."}, {f"q{i}": f"ask{i} for{i}" for i in range(60)},
                        {"train": {f"q{i}": {f"d{i}": 1} for i in range(40)}, "test": {f"q{i}": {f"d{i}": 1} for i in range(40, 60)}})
    name, suite = str(folder), collections.load(str(folder), "test")
    asked = collections.load(f"{name}:sentences", "train")
    assert len(asked.queries) == 60 and all(asked.queries[q] in asked.documents[d] and asked.queries[q] != "Short." for q, r in asked.qrels.items() for d in r)
    assert asked.queries == collections.load(f"{name}:sentences", "train").queries, "the choice of sentences is the same each time"
    own, told = collections.training_sets([name, f"{name}:sentences"], corpus=True)
    assert len(told.documents) == 61 and told.dev.name == "told:sentences" and len(told.dev.corpus) == 61
    held = {told.dev.answers[q][0] for q in told.dev.queries} | {own.dev.answers[q][0] for q in own.dev.queries}
    assert not held & {*told.rows["positive"]}, "no set trains on another's dev documents"
    leaks = collections.find_overlap(told.rows, [suite], "drop")["told"]
    test = {suite.documents[d] for q in suite.queries for d in suite.relevant(q)}
    assert [p in test for p in told.rows["positive"]] == leaks.rows.tolist() and 10 < leaks.rows.sum() <= 20
    for bad in ("test", "dev"):
        with pytest.raises(collections.MissingSplit, match="sentences of .* documents ask for them"): collections.load(f"{name}:sentences", bad)
    with pytest.raises(InputError, match="several sentences of which one holds 5 to 40 words"): data.sentence_set(data.check("bare", "test", {"a": {"text": "One two three. Four."}}, {"q": "x"}, {"q": {"a": 1}}))
