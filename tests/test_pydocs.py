"The docstring collection: the same twice, quiet, and without a family on both sides."
import subprocess
import sys

import pytest

from conftest import ROOT
from embedlab import pydocs
from embedlab.leaks import near_pairs, normalise


@pytest.fixture(scope="module")
def made(): return pydocs.pydocs(cache=False)


def test_same_under_other_hash_seeds(made):
    "Two interpreters under other hash seeds, each collecting from scratch."
    script = "from embedlab.pydocs import pydocs; print(pydocs(cache=False).fingerprint)"
    for seed in ("1", "4242"):
        p = subprocess.run([sys.executable, "-c", script], env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}, capture_output=True, text=True, cwd=ROOT)
        assert p.stdout.strip() == made.fingerprint, p.stderr


def test_what_varies_is_dropped(made):
    "Collected under seeds never used before, every kept text is there unchanged."
    docs, _ = pydocs.collect(seeds=(11, 12))
    rows = {n: (s, b) for n, s, b in pydocs.first_of_each(docs)}
    for r in made.rows: assert rows[r["name"]] == (r["summary"], r["body"])


def test_importing_is_quiet(tmp_path):
    "No print, no browser, no display, no demo; failures are counted."
    opened = tmp_path / "opened"
    browser = tmp_path / "browser.sh"
    browser.write_text(f"#!/bin/sh\ntouch {opened}\n")
    browser.chmod(0o755)
    script = f"import os; os.environ['BROWSER'] = {str(browser)!r}; from embedlab.pydocs import collect; d, f = collect(); assert len(d) > 5000; assert f; print('only this')"
    p = subprocess.run([sys.executable, "-c", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin", "DISPLAY": ":97"}, capture_output=True, text=True, cwd=ROOT)
    assert (p.returncode, p.stdout, p.stderr) == (0, "only this\n", "")
    assert not opened.exists()


def test_no_family_straddles(made):
    by = {s: [r for r in made.rows if r["split"] == s] for s in ("train", "dev", "test")}
    assert len(by["test"]) >= 500 and len(by["dev"]) >= 200 and len(made.corpus) >= 2000
    for key in ("summary", "body"):
        for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
            assert len(near_pairs([r[key] for r in by[a]], [r[key] for r in by[b]])[0]) == 0, (key, a, b)
    for key in ("summary", "body"):
        texts = [normalise(r[key]) for r in made.rows]
        assert len(texts) == len(set(texts)), f"equal {key}"


def test_first_name_wins():
    doc = "Do the same thing as ever.\n\n" + "It does so in many words. " * 4
    rows = pydocs.first_of_each({"b.alias": doc, "a.original": doc, "c.copy": doc.replace("thing", "Thing!")})
    assert [r[0] for r in rows] == ["a.original"]


def test_fingerprint_changes_with_a_version(made):
    docs = {r["name"]: f"{r['summary']}\n\n{r['body']}" for r in made.rows[:300]}
    one = pydocs.assemble(docs, [], made.versions)
    assert one.fingerprint == pydocs.assemble(docs, [], made.versions).fingerprint
    assert one.fingerprint != pydocs.assemble(docs, [], made.versions | {"numpy": "0.0"}).fingerprint


def test_torn_cache_is_built_again(made, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDLAB_CACHE", str(tmp_path))
    assert pydocs.pydocs().fingerprint == made.fingerprint
    kept, = (tmp_path / "pydocs").iterdir()
    kept.write_text(kept.read_text()[:1000])
    assert pydocs.pydocs().fingerprint == made.fingerprint
