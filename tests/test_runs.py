"What the committed runs have to show."
import pytest

from conftest import ROOT, keeps_record
from embedlab.comparison import Group, chosen_keys
from embedlab.records import read_record
from embedlab.significance import compare


def test_demo():
    r = read_record(ROOT / "runs/demo.ipynb")
    d = r.delta["pydocs/ndcg@10"]
    assert r.status == "completed" and d["verdict"] == "better" and d["mean"] >= 0.05 and d["n"] >= 500
    assert (r.leaks["exact"], r.leaks["near"], r.leaks["allowed"]) == (0, 0, False)
    assert r.speed["seconds"] <= 300


def test_five_epochs():
    r = read_record(ROOT / "runs/out.ipynb")
    assert r.status == "completed" and r.params["epochs"] == 5 and r.speed["seconds"] <= 600


def test_scifact():
    r = read_record(ROOT / "runs/scifact.ipynb")
    assert r.before["scifact/ndcg@10"] == pytest.approx(0.645, abs=0.003)
    assert [(d["name"], d["split"]) for d in r.data] == [("scifact", "train"), ("scifact", "test"), ("scifact-clean", "test")] and r.data[1]["rows"] == 300
    assert r.leaks["policy"] == "allow" and r.leaks["allowed"] and r.leaks["exact"] > 0 and r.leaks["near"] > 50
    assert r.data[2]["part"].startswith("queries of scifact/test whose text is not repeated") and r.delta["scifact-clean/ndcg@10"]["n"] == r.data[2]["rows"] == 104


@pytest.mark.parametrize("path", sorted(p for p in ROOT.glob("runs/*.ipynb") if keeps_record(p)), ids=lambda p: p.stem)
def test_verdicts_follow_from_the_scores(path):
    "Recomputed from the packed scores of single queries, the record's figures come out again: of each set the leading metric, of the demo all."
    r = read_record(path)
    for key in r.delta if path.stem == "demo" else r.delta.keys() & chosen_keys(Group(path.stem, {path.stem: r}), None, "leading")[0]:
        d = r.delta[key]
        got = compare(*r.both(key), metric=key, truth=r.truth(key)).record()
        if (d.get("p_holm") or 0) >= 0.05: got["verdict"] = "within noise"   # corrected for the number of sets
        assert (got["verdict"], got["n"]) == (d["verdict"], d["n"]) and got["mean"] == pytest.approx(d["mean"], abs=1e-5) and got["p"] == pytest.approx(d["p"], abs=0.02), "packing rounds to single precision, which ties ranks; other random signs move p by less"


def test_kills():
    "The README counts the kills of the committed log, not the runs that had ended before theirs; all ended alike."
    lines = [x for x in (ROOT / "tests/killed.log").read_text().splitlines() if "losses" in x]
    assert all(x.endswith("equal") for x in lines)
    assert f"[{sum('killed' in x for x in lines)} kills](tests/killed.log)" in (ROOT / "README.md").read_text()
