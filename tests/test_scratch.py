"An encoder from nothing: the same everywhere, saved for every library, taught by scores and by a teacher, and kind to bad input."
import json
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from sentence_transformers import SentenceTransformer

from conftest import ROOT
from test_engine import BASE, killed_and_continued

from embedlab.collections import load, texts_of, training_sets
from embedlab.config import InputError, make_config
from embedlab.engine import Engine
from embedlab.experts import experts_of
from embedlab.models import keep_blocks, load_model, new_model, set_dropout, weights_hash
from embedlab.teaching import TrainingLoss
from embedlab.trainer import fit

SMALL = dict(base="scratch", width=32, layers=1, heads=2, vocabulary=300)


@pytest.fixture
def judged(tmp_path) -> tuple:
    "Sentences of a few words: a file of scored pairs, and one of labelled pairs."
    rng = random.Random(0)
    words = "red blue old young cat dog man bird runs sleeps eats sings".split()
    say = lambda: " ".join(rng.sample(words, 5))
    rows = []
    for _ in range(120):
        a = say(); n = rng.randint(0, 5)
        rows.append((n, a, " ".join(a.split()[:n] + rng.sample(words, 5 - n))))
    scored, labelled = tmp_path / "scored.tsv", tmp_path / "labelled.tsv"
    scored.write_text("score\tsentence1\tsentence2\n" + "".join(f"{n}\t{a}\t{b}\n" for n, a, b in rows))
    kinds = ("entailment", "contradiction", "neutral")
    labelled.write_text("label\tpremise\thypothesis\n" + "".join(f"{kinds[k]}\t{p}\t{' '.join(p.split()[k:])} {k}\n" for p in (say() for _ in range(80)) for k in range(3)))
    return scored, labelled


MAKE = """from embedlab.config import make_config
from embedlab.models import new_model, weights_hash
for experts in (0, 4):
    m = new_model(make_config(base="scratch", width=32, layers=1, heads=2, vocabulary=300, experts=experts), ["the cat sat on the mat", "a dog sat on the log", "cats and dogs sit"] * 3)
    print(weights_hash(m), sorted(m.tokenizer.vocab.items(), key=lambda x: x[1])[-3:])"""


def test_same_everywhere():
    "Two processes that hash strings differently make one model, dense and with experts."
    said = {subprocess.run([sys.executable, "-c", MAKE], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": h}, capture_output=True, text=True, check=True).stdout for h in "12"}
    assert len(said) == 1 and len({*said.pop().splitlines()}) == 2


TEXTS = ["the cat sat on the mat", "a dog sat on the log", "cats and dogs sit", "nobody sat", "ein Hund", "東京 へ"] * 3
SIZES = {"width": (64, lambda m: m.get_embedding_dimension() == 64), "layers": (3, lambda m: len(m[0].auto_model.encoder.layer) == 3), "heads": (4, lambda m: m[0].auto_model.config.num_attention_heads == 4),
         "vocabulary": (120, lambda m: len(m.tokenizer) <= 120), "tokenizer": ("minilm", lambda m: len(m.tokenizer) == 30522), "experts": (4, lambda m: len(experts_of(m)[0].up) == 4),
         "init": ("tfidf", lambda m: m[0].auto_model.embeddings.position_embeddings.weight.abs().max() == 0),
         "seed": (5, lambda m: weights_hash(m) != weights_hash(new_model(make_config(**SMALL), TEXTS))), "max_tokens": (16, lambda m: m.max_seq_length == 16)}
MORE = {"experts_per_token": (4, lambda e, c: e.k == 4 and e.up[0].out_features == 4 * 32 // 4), "capacity": (2.5, lambda e, c: e.capacity == 2.5), "balance": (0.5, lambda e, c: c.balance == 0.5)}


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_what_is_made(name):
    value, holds = SIZES[name]
    cfg = make_config(**SMALL | {name: value})
    assert holds(new_model(cfg, TEXTS[:9], cfg.max_tokens))


@pytest.mark.parametrize("name", MORE)
def test_every_setting_of_experts_is_what_is_made(name):
    value, holds = MORE[name]
    cfg = make_config(**SMALL | {"experts": 8, name: value})
    assert holds(experts_of(new_model(cfg, TEXTS))[0], cfg)


@pytest.mark.parametrize("experts", [0, 4])
def test_a_start_as_tfidf(experts):
    "A rare word in common counts more than a frequent one; dropout leaves gradients that a deep encoder survives."
    frequent, rare = ["the cat", "the dog", "the bird", "the cow", "the man"] * 20, ["quartz dust", "quartz ring"]   # pieces of a word are joined that were seen twice
    texts = frequent + rare * 2
    m = new_model(make_config(base="scratch", width=192, layers=6, heads=4, vocabulary=400, experts=experts, init="tfidf"), texts)
    cos = lambda m, a, b: m.similarity(*m.encode([a, b])).item()
    assert cos(m, "the cat", "the dog") < 0.3 and cos(m, *rare) > 0.3 and cos(m, "the cat", "cat the") > 0.999
    plain = new_model(make_config(base="scratch", width=192, layers=6, heads=4, vocabulary=400, experts=experts), texts)
    assert cos(plain, "the cat", "the dog") > 0.6
    set_dropout(m, 0.1)
    m.train()
    torch.manual_seed(0)
    out = m(m.preprocess(texts))["sentence_embedding"]
    (out[::2] * out[1::2]).sum().backward()
    largest = max(p.grad.abs().max().item() for p in m.parameters() if p.grad is not None)
    assert largest < 1e4, f"{largest}: a state lost all its length to dropout, and the norm layers blew up what was left"


def test_a_whole_run(papermill, judged, toy, tiny_model):
    "Scored pairs, triples of entailment and contradiction, texts and words alone, a teacher; chosen on scored pairs; without embedlab the model loads."
    scored, labelled = judged
    ran = papermill(**SMALL, init="tfidf", train=f"{scored},{labelled}", texts=scored, words=True, teacher=tiny_model, contradictions=True, evaluate=toy, choose=toy, split="dev", epochs=1, batch_size=16, max_tokens=32, dropout=0.1, precision="fp32", lr=1e-3, run="new")
    assert ran.code == 0, ran.text[-3000:]
    r = ran.record()
    assert r.model["base"] == "scratch" and r.engine["columns"] == [2, 3, 1, 1] and r.engine["scored"] == [True, False, False, False] and r.engine["taught"] and r.engine["trainable"] == r.model["parameters"]
    *_, texts, words = [d["name"] for d in r.data if d["role"] == "train"]
    assert texts.endswith("(texts)") and words == "words" and list(r.engine["by_set"])[-1] == "words" and len(r.engine["by_set"]) == 4
    texts = ["a cat runs", "the old dog sleeps", ""]
    alone = "import sys, json; sys.modules['embedlab'] = None; from sentence_transformers import SentenceTransformer; print(json.dumps(SentenceTransformer(sys.argv[1], device='cpu').encode(json.loads(sys.argv[2])).tolist()))"
    out = subprocess.run([sys.executable, "-c", alone, str(papermill.home / "new" / "model"), json.dumps(texts)], capture_output=True, text=True, check=True).stdout
    ours = load_model(str(papermill.home / "new" / "model"))
    assert torch.allclose(torch.tensor(json.loads(out.splitlines()[-1])), torch.tensor(ours.encode(texts)), atol=1e-5)
    assert {p.suffix for p in (papermill.home / "new" / "model").rglob("*") if p.is_file()} <= {".json", ".safetensors", ".md", ".txt"}, "nothing is pickled"


@pytest.fixture
def sets(judged):
    load_sets = lambda *which, **how: training_sets([str(judged[i]) for i in which or (0, 1)], **how)
    load_sets.paths = judged
    return load_sets


def test_what_is_configured_is_what_runs(sets, judged, tiny_model, tmp_path):
    def engine(name, these, **settings):
        m = new_model(make_config(**SMALL), [t for s in these for c in ("anchor", "positive") if c in s.rows.column_names for t in s.rows[c]], 32)
        return fit(m, these, make_config(**SMALL | BASE | dict(checks=1, epochs=1) | settings), tmp_path / name, [], "same run")
    plain = engine("plain", sets(1))
    assert plain.engine["known_positives"] > 0 and plain.engine["scored"] == [False] and not plain.engine["taught"] and plain.engine["teacher_weight"] == 0 and plain.chance > 1
    assert engine("unguarded", sets(1), guard=False).engine["known_positives"] == 0
    taught = engine("taught", sets(0), teacher=str(tiny_model), teacher_weight=3.0)
    assert taught.engine["taught"] and taught.engine["teacher_weight"] == 3 and taught.engine["scored"] == [True] and not taught.chance
    assert engine("positives", sets(0, positive_from=4)).engine["scored"] == [False]
    assert engine("triples", sets(1, contradictions=True)).engine["columns"] == [3]
    assert engine("texts", texts_of([str(judged[0])], []), dropout=0.1).engine["columns"] == [1]


def test_a_teacher_is_followed(sets, tmp_path):
    "The same width, its place; another width, its cosines. Either way the distance between the cosines falls."
    texts = sorted({t for c in ("anchor", "positive") for t in sets(0)[0].rows[c]})
    teacher = new_model(make_config(**SMALL | {"layers": 0, "seed": 1}), texts, 32)   # word vectors: each text lies elsewhere
    teacher.save(str(tmp_path / "teacher"), create_model_card=False)
    wanted = teacher.encode(texts)
    for width in (32, 16):
        m = new_model(make_config(**SMALL | {"width": width, "layers": 0}), texts, 32)
        def far(): x = m.encode(texts); return float(((x @ x.T - wanted @ wanted.T) ** 2).mean())
        before = far()
        settings = dict(epochs=30, checks=1, dropout=0.0, teacher=str(tmp_path / "teacher"), teacher_weight=10.0, lr=1e-2)
        fit(m, texts_of([str(sets.paths[0])], []), make_config(**SMALL | {"width": width} | BASE | settings | {"texts": "x"}), tmp_path / str(width), [], "same run")
        assert far() < before / 4, (before, far())


def test_a_model_is_held_where_it_was(sets, tiny_model, tmp_path):
    "Its own teacher is the model before the first step: of that alone next to nothing is learned, and pairs move it less."
    texts = sorted({t for c in ("anchor", "positive") for t in sets(1)[0].rows[c]})
    start, alone = load_model(str(tiny_model)), texts_of([str(sets.paths[1])], [])
    def moved(name, these, **settings):
        m = load_model(str(tiny_model))
        fit(m, these, make_config(**BASE | dict(checks=1, epochs=3, lr=1e-3, precision="fp32", dropout=0.0) | settings), tmp_path / name, [], "same run")
        return float(((m.encode(texts) - start.encode(texts)) ** 2).sum(1).mean())
    still, free, held = moved("alone", alone, teacher="start", texts="x"), moved("free", sets(1)), moved("held", sets(1), teacher="start", teacher_weight=100.0)
    assert free > 100 * still and held < free / 4, (still, free, held)   # still: AdamW takes rounding for a gradient
    with pytest.raises(InputError, match="remine: .* is gone"): make_config(**BASE | dict(teacher="start", negatives=1, remine=True))


def test_a_student_begins_as_part_of_its_teacher(papermill, toy, tiny_model):
    settings = dict(base=tiny_model, blocks="1", teacher=tiny_model, teacher_weight=3, train=toy, evaluate=toy, split="dev", epochs=1, batch_size=16, precision="fp32", run="part")
    ran = papermill(**settings)
    assert ran.code == 0, ran.text[-3000:]
    whole, student, r = load_model(str(tiny_model)), SentenceTransformer(str(papermill.home / "part" / "model"), device="cpu"), ran.record()
    sizes = [sum(p.numel() for p in block.parameters()) for block in whole[0].auto_model.encoder.layer]
    assert len(sizes) == 2 and len(student[0].auto_model.encoder.layer) == 1
    assert r.model["parameters"] == sum(p.numel() for p in whole.parameters()) - sizes[0] == sum(p.numel() for p in student.parameters())
    begun = keep_blocks(load_model(str(tiny_model)), [1])
    assert weights_hash(begun) == r.model["sha256"] and begun.encode("a text").tolist() != whole.encode("a text").tolist()
    assert f"Trained from blocks 1 of {tiny_model}" in (papermill.home / "part" / "model" / "README.md").read_text()
    assert "the base has the blocks 0 to 1, and none with the number 2" in papermill(**settings | {"blocks": "0,2", "run": "more"}).text


@pytest.mark.parametrize("teacher", ["another", "start"])
def test_killed_with_teacher_scores_and_experts(teacher, tmp_path, tiny_model, judged, toy):
    m = new_model(make_config(**SMALL | {"experts": 4}), load(str(judged[0]), "train")["anchor"][:], 32)
    m.save(str(tmp_path / "moe"), create_model_card=False)
    lines = killed_and_continued(tmp_path, tmp_path / "moe", [judged[0], toy], dict(teacher={"another": str(tiny_model)}.get(teacher, teacher), balance=0.05), 1, seed=3)
    assert all("equal" in x for x in lines), "\n".join(lines)


def test_bad_input(judged, tiny_model, tmp_path):
    bad = lambda says, **settings: pytest.raises(InputError, match=says)
    for says, settings in {"heads: 3 heads can't share a width of 32": {"heads": 3}, "visit 9 of 8 experts": {"experts": 8, "experts_per_token": 9}, "no place for them": {"experts": 4, "layers": 0},
                           "micro_batch: the balance": {"experts": 4, "micro_batch": 4}, "texts: .*dropout": {"texts": "x"}, "words: where .* only a teacher knows": {"words": True}}.items():
        with bad(says): make_config(**SMALL | settings)
    with bad("width: this is for a new encoder"): make_config(width=64)
    with bad("blocks: a new encoder has as many as layers says"): make_config(**SMALL | {"blocks": "0"})
    with bad("blocks: 2,0 is out of order"): make_config(blocks="2,0")
    experts = new_model(make_config(**SMALL | {"experts": 4}), TEXTS)
    with bad("micro_batch: the balance of experts"): TrainingLoss(experts, balance=0.01, micro_batch=2)   # a base that has experts already
    starved = object.__new__(Engine)   # an engine in the middle of its fifth step
    starved.__dict__ |= dict(loss=TrainingLoss(experts, balance=0.01), cfg=make_config(), args=SimpleNamespace(world_size=1), state=SimpleNamespace(global_step=4))
    with bad("out of memory at step 5, and the balance of experts needs the whole batch"): starved._halved()
    with bad("can't share the dense layer's width"): new_model(make_config(**SMALL | {"experts": 8, "experts_per_token": 3}), TEXTS)
    with bad("vocabulary: 110 entries can't hold"): new_model(make_config(**SMALL | {"vocabulary": 110}), [chr(0x4e00 + i) for i in range(200)])
    with bad("does not know .* of .* words: it was made from other text"): new_model(make_config(**SMALL | {"tokenizer": "minilm"}), ["여기는 어디 입니까"] * 5)
    with bad("there is no word in the 2 texts"): new_model(make_config(**SMALL), ["", "  "])
    # a checkpoint of another size
    for name, width in (("a", 32), ("b", 64)): new_model(make_config(**SMALL | {"width": width}), TEXTS, 32).save(str(tmp_path / name), create_model_card=False)
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    with bad("size|shape|mismatch"): load_model(str(tmp_path / "a"))
    # a tokenizer of another model
    big = new_model(make_config(**SMALL | {"tokenizer": "minilm"}), TEXTS[:2], 32); big.save(str(tmp_path / "c"), create_model_card=False)
    shutil.copy(tmp_path / "c" / "tokenizer.json", tmp_path / "b" / "tokenizer.json")
    with bad("its tokenizer has 30,522 entries, its table of word vectors"): load_model(str(tmp_path / "b"))


def test_bad_scores(judged):
    scored, _ = judged
    lines = scored.read_text().splitlines()
    for says, line in (("score", "nan\ta cat\ta dog"), ("empty", "3\t\ta dog")):
        scored.write_text("\n".join([*lines[:3], line, *lines[4:]]) + "\n")
        with pytest.raises(InputError, match=says) as e: training_sets([str(scored)])
        assert "4" in str(e.value) and "\n" not in str(e.value)
