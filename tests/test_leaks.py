"Overlap: what is planted is found, what is clean is left alone, and a million rows take less than two minutes."
import os
import random
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from embedlab import pydocs
from embedlab.config import InputError
from embedlab.leaks import (apply_policy, find_leaks, find_pair_leaks, known_overlap, leaks_table, near_pairs, normalise,
                            words)


class Text:
    "Texts of words drawn at random with the frequencies they have in the docstring collection."
    def __init__(self, rows):
        seen = Counter(w for r in rows for t in (r["summary"], r["body"]) for w in words(t))
        self.words, count = zip(*seen.items())
        self.share, self.rng = np.array(count) / sum(count), np.random.default_rng(0)
    def __call__(self, n: int, low: int, high: int) -> list[str]:
        sizes = self.rng.integers(low, high + 1, n)
        drawn, ends = self.rng.choice(len(self.words), sizes.sum(), p=self.share), np.cumsum(sizes)
        return [" ".join(self.words[k] for k in drawn[e - s:e]) for s, e in zip(sizes, ends)]


@pytest.fixture(scope="module")
def rows(): return pydocs.pydocs().rows


@pytest.fixture(scope="module")
def clean(rows):
    "100,000 training rows and 2,000 queries of 8 to 20 words that have nothing to do with them: real sentences, and words recombined."
    make = Text(rows)
    part = lambda s: [r for r in rows if r["split"] == s]
    real = [r["summary"] for r in part("test") if len(words(r["summary"])) >= 8][:400]
    queries = [t + w for t, w in zip(real + make(1600, 8, 20), [" café", " naïve fluff", " Straße", ""] * 500)]
    anchors = [r["summary"] for r in part("train")] + make(100_000 - len(part("train")), 8, 20)
    positives = [r["body"] for r in part("train")] + make(100_000 - len(part("train")), 20, 40)
    return anchors, positives, {f"q{k}": t for k, t in enumerate(queries)}


WIDE = {k: k + 0xfee0 for k in range(0x21, 0x7f)} | {0x20: 0x3000}
EXACT = [str.upper, str.title, lambda t: f"“{t}”?!", lambda t: t.replace(" ", " \u00a0\t"), lambda t: t.replace(" ", ", "), lambda t: t.translate(WIDE),
         lambda t: t.replace("fi", "ﬁ").replace("fl", "ﬂ"), lambda t: unicodedata.normalize("NFD", t), lambda t: unicodedata.normalize("NFD", t.upper()),
         lambda t: f"\ufeff{t[:3]}\u00ad{t[3:]}", lambda t: t.replace(" ", "\u2009–\u2009")]


def changed(text: str, rng: random.Random, times: int) -> str:
    "Replace, insert or delete one or two words, then swap two."
    w, kinds = text.split(), ["replace", "insert", "delete"]
    for _ in range(times):
        k, kind = rng.randrange(len(w)), rng.choice(kinds)
        w[k:k + 1] = {"replace": [f"new{k}"], "insert": [w[k], f"new{k}"], "delete": []}[kind]
    k = rng.randrange(len(w) - 1)
    w[k:k + 2] = w[k + 1], w[k]
    return " ".join(w)


def planted(clean, texts: list[str]):
    "Put texts among the clean rows, in turn as anchor, positive and negative."
    anchors, positives, queries = list(clean[0]), list(clean[1]), clean[2]
    negatives = [f"nothing {k}" for k in range(len(anchors))]
    at = random.Random(1).sample(range(len(anchors)), len(texts))
    for k, (row, t) in enumerate(zip(at, texts)): (anchors, positives, negatives)[k % 3][row] = t
    rest = np.ones(len(anchors), bool)
    rest[at] = False
    return find_leaks(anchors, positives, queries, {}, negatives=negatives), at, rest


def test_every_exact_repeat_is_found(clean):
    texts = [EXACT[k % len(EXACT)](t) for k, t in enumerate(clean[2].values())]
    found, at, rest = planted(clean, texts)
    assert found.touched["exact"] == list(clean[2]) and found.rows[at].all()
    assert found.rows[rest].mean() <= 0.001 and found.clean == []


@pytest.mark.parametrize("times", [1, 2])
def test_near_repeats_are_found(clean, times):
    rng = random.Random(times)
    found, at, rest = planted(clean, [changed(t, rng, times) for t in clean[2].values()])
    assert found.rows[at].mean() >= 0.95 and found.near >= 0.95 * found.queries
    assert found.rows[rest].mean() <= 0.001


def test_clean_rows_are_left_alone(clean):
    found, _, _ = planted(clean, [])
    assert (found.exact, found.checked) == (0, 100_000) and found.rows.mean() <= 0.001


def test_same_as_comparing_every_pair():
    "For thresholds at which rounding could bite, on sets so small that many indices equal the threshold."
    rng = random.Random(0)
    text = lambda: " ".join(rng.choices("abcdefghij", weights=range(1, 11), k=rng.choice([0, 1, 2, 3, 5, 8, 12])))
    a, b = [text() for _ in range(300)], [text() for _ in range(200)]
    A, B = ([set(words(t)) for t in x] for x in (a, b))
    for t in (0, 0.1, 0.25, 1 / 3, 0.5, 0.55, 0.6, 2 / 3, 0.7, 0.8, 0.9, 1):
        expected = {(i, j): len(x & y) / len(x | y) for i, x in enumerate(A) for j, y in enumerate(B) if x & y and len(x & y) / len(x | y) >= t}
        i, j, s = near_pairs(a, b, t)
        assert dict(zip(zip(i.tolist(), j.tolist()), s.tolist())) == expected, t


def test_same_in_small_steps(rows, monkeypatch):
    "Blocks and steps bound the memory and change nothing."
    import embedlab.leaks as m
    text = [r["body"] for r in rows[:600]]
    whole = near_pairs(text, text, 0.3)
    monkeypatch.setattr(m, "_BLOCK", 7); monkeypatch.setattr(m, "_STEP", 50)
    assert len(whole[0]) > 600 and all((x == y).all() for x, y in zip(whole, near_pairs(text, text, 0.3)))


def test_texts_without_a_word_match_nothing():
    assert len(near_pairs(["", "…", "a"], ["", "?!"])[0]) == len(near_pairs([], ["a"])[0]) == len(near_pairs(["a"], [])[0]) == 0
    found = find_leaks(["?!", "a"], ["…", ""], {"q": "…", "r": ""}, {"q": ["!"], "r": [""]})
    assert (found.exact, found.near, found.shared_documents, found.near_documents, found.clean) == (0, 0, 0, 0, ["q", "r"])


def test_unlike_texts_stay_unlike():
    "Vowel signs and accents are part of a word."
    assert len({normalise(t) for t in ("कि", "की", "resume", "résumé")}) == 4
    ascii = "".join(map(chr, range(128)))
    assert words(ascii) == words(ascii + "…"), "the shorter way for ASCII is the same"


def test_degrees_and_roles():
    queries = {"q1": "How do plants make sugar?", "q2": "Who wrote the first dictionary?", "q3": "Why is the sky blue?", "q4": "What do owls eat?"}
    doc = {q: f"{q} " + " ".join(f"{q}word{k}" for k in range(20)) for q in queries}
    found = find_leaks(["Other things", "WHY IS the sky BLUE", "c", doc["q4"]], [doc["q1"].upper(), "b", doc["q2"] + " more", "e"], queries, {q: [d] for q, d in doc.items()},
                       negatives=[[doc["q3"], "n"], [], ["How do many plants make sugar"], "m"])
    assert found.touched == {"exact": ["q3"], "near": ["q1", "q3"], "near_documents": ["q1", "q2"], "shared_documents": ["q1"], "anchor_documents": ["q4"], "negative_documents": ["q3"]}
    assert found.rows.tolist() == [True, True, True, False] and found.clean == ["q2", "q4"]
    assert found.examples == [("WHY IS the sky BLUE", queries["q3"]), ("How do many plants make sugar", queries["q1"])]
    assert found.record() == {"policy": "fail", "checked": 4, "queries": 4, "exact": 1, "near": 2, "shared_documents": 1, "near_documents": 2, "anchor_documents": 1,
                              "negative_documents": 1, "dropped": 0, "allowed": False, "clean": 2}
    assert dict(leaks_table(found))["repeated word for word"] == 1


def test_policies():
    go = lambda policy, positives=("WHY is it?", "b"): find_leaks(["a", "c"], list(positives), {"q": "Why is it"}, {}, policy)
    with pytest.raises(InputError, match="repeats 1 evaluation queries word for word, such as 'Why is it'; give leaks=drop"): apply_policy(go("fail"))
    dropped, allowed, none = go("drop"), go("allow"), go("allow", "xy")
    assert apply_policy(dropped).tolist() == [False, True] and (dropped.dropped, dropped.allowed) == (1, False)
    assert apply_policy(allowed).all() and allowed.allowed and apply_policy(none).all() and not none.allowed
    pairs = find_pair_leaks(["a", "c", "b a"], ["b", "d", "e"], ["b", "c", "x"], ["A!", "y", "z"], "drop")
    assert (pairs.exact, pairs.one_sentence, pairs.both_sentences, pairs.clean.tolist()) == (1, 2, 1, [False, False, True])
    assert apply_policy(pairs).tolist() == [False, False, True] and pairs.record()["dropped"] == 2


@pytest.mark.parametrize("call, expected", [
    (lambda: find_leaks(["a", "b"], ["c"], {}, {}), "positives: 1 texts for 2 rows"),
    (lambda: find_leaks(["a"], ["b"], {}, {}, negatives=["c", "d"]), "negatives: 2 entries for 1 rows"),
    (lambda: find_leaks(["a"], ["b"], {}, {}, "stop"), "leaks must be 'fail', 'drop' or 'allow', not 'stop'"),
    (lambda: find_leaks(["a", None], ["b", "c"], {}, {}), "anchors: row 1 is None, not text"),
    (lambda: find_leaks(["a"], [float("nan")], {}, {}), "positives: row 0 is nan, not text"),
    (lambda: find_leaks(["a"], ["b"], {"q": 7}, {}), "queries: row 0 is 7, not text"),
    (lambda: find_leaks(["a"], ["b"], {"q": "c"}, {"q": [None]}), "relevant documents of query q: row 0 is None, not text"),
    (lambda: find_leaks(["a"], ["b"], {}, {}, negatives=[None]), "negatives of row 0: row 0 is None, not text"),
    (lambda: find_pair_leaks(["a"], [], [], []), "train_b: 0 texts for 1 rows"),
    (lambda: near_pairs(["a"], ["a"], 60), "threshold must lie between 0 and 1, not 60"),
])
def test_bad_input(call, expected):
    with pytest.raises(InputError) as e: call()
    assert expected in str(e.value) and "\n" not in str(e.value)


def real(name: str) -> Path:
    folder = Path(os.environ.get("EMBEDLAB_DATA", "missing")) / name
    if not folder.is_dir(): pytest.skip(f"set EMBEDLAB_DATA to a folder that holds {name}/")
    return folder


def test_scifact():
    "The standing case: the official split, and its clean part."
    real("scifact")
    from embedlab.collections import load
    from embedlab.data import training_pairs
    train, test = training_pairs(load("scifact", "train")), load("scifact", "test")
    found = find_leaks(train["anchor"], train["positive"], test.queries, {q: [test.documents[d] for d in test.relevant(q)] for q in test.queries})
    assert (found.exact, found.near, found.shared_documents, len(found.clean), found.queries) == (2, 116, 196, 104, 300)
    assert set(found.touched["exact"]) < set(found.touched["shared_documents"]), "the clean part is the claims that share no document"


def test_stsb():
    real("stsb")
    from embedlab.collections import load
    train, test = load("stsb", "train"), load("stsb", "test")
    found = find_pair_leaks(train["anchor"], train["positive"], test["anchor"], test["positive"])
    assert (found.pairs, found.one_sentence, found.both_sentences, found.exact, found.clean.sum()) == (1379, 249, 62, 12, 1130)


def test_known_overlap():
    "Every set a base is known to have seen, under all the names a set has; nothing is claimed of an unknown base."
    got = known_overlap("sentence-transformers/all-MiniLM-L6-v2", ["quora", "nano-quoraretrieval", "cqadupstack-unix", "scifact", "nfcorpus"])
    assert known_overlap("minilm", ["scifact-clean"])["scifact-clean"] == got["scifact"]
    assert got == known_overlap("minilm", list(got)) and got["nfcorpus"] is None
    assert got["quora"] == got["nano-quoraretrieval"] and got["quora"].startswith("trained on quora (model card")
    assert "stack-exchange" in got["cqadupstack-unix"] and "s2orc" in got["scifact"]
    assert known_overlap("intfloat/multilingual-e5-small", ["hotpotqa"])["hotpotqa"] and known_overlap("intfloat/e5-small-v2", ["hotpotqa"])["hotpotqa"] is None
    assert set(known_overlap("nobody/nothing", ["msmarco", "nq"]).values()) == {None}


@pytest.mark.slow
def test_a_million_rows_in_two_minutes(rows):
    "Anchors of 8 to 20 words, positives of 20 to 60; 10,000 queries with a relevant document each."
    make = Text(rows)
    anchors, positives, queries, documents = make(1_000_000, 8, 20), make(1_000_000, 20, 60), make(10_000, 8, 20), make(10_000, 20, 60)
    anchors[::100_000], positives[5::100_000] = [t.upper() for t in queries[:10]], [f"“{t}”" for t in documents[20:30]]
    start = time.process_time()   # one core does it all: this is what a machine with nothing else to do takes
    found = find_leaks(anchors, positives, dict(enumerate(queries)), {k: [d] for k, d in enumerate(documents)})
    seconds = time.process_time() - start
    assert (found.exact, found.shared_documents) == (10, 10)
    assert seconds < 120
    print(f"{seconds:.0f} s")
