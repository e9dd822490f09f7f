"Choosing among options, from a file to the record."
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from embedlab import choosing
from embedlab.choosing import control, folds, hits, new_chooser, overlap, parts_of, places, scored, train_on, tuned
from embedlab.config import ChooseConfig, InputError, make_config
from embedlab.leaks import normalise
from embedlab.models import machine
from embedlab.questions import folds_of, load_questions, published_folds, read_questions, rest_of, shuffled
from embedlab.records import mark, read_record

COLOURS, THINGS = "red blue green black white".split(), "door house tree boat stone lamp".split()


@pytest.fixture
def asked(tmp_path):
    "Thirty questions whose answer holds both words of the question; the others one of them."
    path = tmp_path / "colours.csv"
    with open(path, "w", newline="") as f:
        w = csv.writer(f); w.writerow(["question", "option_1", "option_2", "option_3", "answer", "type"])
        for c in COLOURS:
            for t in THINGS:
                other = THINGS[(THINGS.index(t) + 1) % len(THINGS)]
                right = f"a {c} {t}, number {len(c) * len(t)} {c}{t}"
                w.writerow([f"{c} {t}", right, f"a {c} {other} of {c}{t}", f"a {other} and a {t} by {c}{t}", right, "doors, things" if t == "door" else "things"])
    return path


def test_recipes_by_what_knows_nothing():
    "The answer stands first in all 500 as published; in a recorded order, place and length tell next to nothing."
    q = load_questions("recipe-mpr")
    assert hits(q, control(q, "first")).mean() == 1
    for seed in range(3):
        mixed = shuffled(q, seed)
        assert 0.15 < hits(mixed, control(mixed, "first")).mean() < 0.26 and 0.15 < hits(mixed, control(mixed, "longest")).mean() < 0.30
        assert sorted(mixed.options[3]) == sorted(q.options[3]) and mixed.fingerprint == shuffled(q, seed).fingerprint
    assert len({shuffled(q, s).fingerprint for s in range(3)}) == 3


def test_recipes_without_training():
    "MiniLM's cosine, whatever the options' order: 209 of 500 in float32 (211 were counted elsewhere in bfloat16, where eight near ties fall otherwise)."
    cfg = make_config(ChooseConfig)
    on = machine(cfg)
    model = new_chooser(cfg, on)
    q, other = (shuffled(load_questions("recipe-mpr"), s) for s in (0, 1))
    right, some = hits(q, scored(model, q, on)), list(range(60))
    assert right.sum() == 209 and (hits(other.part(some), scored(model, other.part(some), on)) == right[:60]).all()


def test_no_answer_crosses_a_fold():
    q = load_questions("recipe-mpr")
    cut = folds_of(q)
    assert sorted(np.concatenate(cut).tolist()) == list(range(500)) == sorted(np.concatenate(published_folds()).tolist())
    answer = lambda i: normalise(q.options[i][q.answers[i]])
    options = lambda rows: {normalise(t) for i in rows for t in q.options[i]}
    for fold in cut:
        rest = rest_of(q, fold)
        assert not {answer(i) for i in fold} & options(rest) and not {answer(i) for i in rest} & options(fold)
        assert not options(rest_of(q, fold, strict=True)) & options(fold)
    for split in ("dev", "test"):
        for f in folds(q, make_config(ChooseConfig, method="bi-encoder", split=split)):
            assert not {*f.train} & {*f.judged} and not {*f.train} & {*f.held}
            assert not {answer(i) for i in f.train} & options(f.judged) and not {answer(i) for i in f.held} & options(f.train)
            assert (f.judged.tolist() == f.held.tolist()) == (split == "dev")
    dev = make_config(ChooseConfig, method="bi-encoder", split="dev")
    held = [f.held for f in folds(q, dev)]
    assert sorted(np.concatenate(held).tolist()) == places(q, dev) == list(range(500)) and np.isin(cut[0], held[1]).all(), "each question is held out once"
    for f in folds(q, dev.model_copy(update={"strict": True})): assert not options(f.train) & options(f.judged)
    assert places(q, make_config(ChooseConfig, method="first", split="dev", only="1")) == cut[0].tolist(), "a control judges what the others judge"
    wrong, = folds(q, make_config(ChooseConfig, method="multiple-choice", folds="wrong"))
    assert len(wrong.train) == 450 and len(wrong.judged) == 500


def test_a_run_over_folds(papermill, asked, tiny_model):
    "Tuned on the others it chooses better than before; an interrupted run goes on with the next fold; two runs add up."
    settings = dict(questions=asked, base=tiny_model, method="bi-encoder", epochs=8, lr=2e-3, fold_count=3, precision="fp32")
    ran = papermill("one", "choose", run="one", **settings)
    assert ran.code == 0, ran.text[-3000:]
    r = ran.record()
    assert r.kind == "choose" and r.delta["colours/accuracy"]["mean"] > 0.2 and r.delta["colours/accuracy"]["test"] == "McNemar"
    assert [r.delta[f"colours{k}/accuracy"]["n"] for k in ("", ":doors", ":things")] == [30, 5, 30]
    assert len(r.engine["folds"]) == 3 and sorted(r.engine["judged"]) == list(range(30)) and r.model["trainable"] > 0

    kept = papermill.home / "one" / "folds"
    (kept / "2.json").unlink()
    first = json.loads((kept / "0.json").read_text()); first["scores"] = [[9.0, 0.0, 0.0] for _ in first["scores"]]; (kept / "0.json").write_text(json.dumps(first))
    again = papermill("one", "choose", run="one", **settings)
    assert again.path.read_text().count("was finished before") == 2 and again.record().engine["judged"] == r.engine["judged"]
    assert again.record().engine["options"] != r.engine["options"], "a finished fold is taken as it is"
    assert "other settings" in papermill("one", "choose", run="one", **settings | {"seed": 1}).text
    assert papermill("one", "choose", run="one", fresh=True, **settings).record().engine["options"] == r.engine["options"], "the same again, from nothing"

    both = papermill("both", "choose", run="both", questions=asked, base=tiny_model, method="ensemble", members="one,one", precision="fp32")
    assert both.record().after == r.after
    assert "none is no finished run" in papermill("x", "choose", questions=asked, base=tiny_model, method="ensemble", members="one,none").text


def test_a_run_that_saw_what_it_judges_is_marked(papermill, asked, tiny_model):
    "Guide 003's way is marked on its page and stays out of an ensemble; ours has nothing to mark."
    settings = dict(questions=asked, base=tiny_model, method="bi-encoder", epochs=1, precision="fp32")
    r = papermill("wrong", "choose", run="wrong", folds="wrong", **settings).record()
    assert r.leaks["exact"] == 27 and r.leaks["allowed"] and mark(r).startswith("27 evaluation queries repeated in training")
    assert "wrong has seen in training what it judged (27 evaluation" in papermill("x", "choose", questions=asked, base=tiny_model, method="ensemble", members="wrong").text
    q = load_questions("recipe-mpr")
    for way, shared in (("apart", 0), ("published", 157)):
        found = overlap(q, folds(q, make_config(ChooseConfig, method="bi-encoder", folds=way)))
        assert (found["shared_documents"], found["allowed"]) == (shared, shared > 0)


def test_a_sweep_over_presets_and_seeds(papermill, asked, tiny_model, tmp_path):
    "Each preset is a run, judged on what is held out, and the runs are compared."
    for name, lr in (("slow", "1.0e-3"), ("fast", "1.0e-2")): (tmp_path / f"{name}.yaml").write_text(f"method: bi-encoder\nlr: {lr}\n")
    ran = papermill("s", "sweep", run="s", notebook="choose", presets=",".join(str(tmp_path / f"{n}.yaml") for n in ("slow", "fast")), seeds=1, at_once=1,
                    fixed=f"questions={asked}; base={tiny_model}; epochs=1; batch_size=4; fold_count=3; only=0; precision=fp32")
    assert ran.code == 0, ran.text[-3000:]
    runs = {p.stem: read_record(p) for p in papermill.home.glob("s-*.ipynb")}
    assert sorted(runs) == ["s-fast-s0", "s-slow-s0"] and {r.split for r in runs.values()} == {"dev"}
    assert [runs[f"s-{n}-s0"].params["lr"] for n in ("slow", "fast")] == [0.001, 0.01]
    assert runs["s-slow-s0"].engine["options"] != runs["s-fast-s0"].engine["options"]
    assert "colours" in ran.path.read_text()


def test_what_is_trained_follows_the_settings(asked, tiny_model):
    "LoRA trains few weights and moves no other; merged by half, weights lie between the base's and the tuned ones; hints are read."
    q, on = read_questions(asked), machine(make_config(ChooseConfig, precision="fp32"))
    q = q.part([*range(12)])
    q = replace(q, hints=[{x.split()[0]: o[a].split()[1]} for x, o, a in zip(q.queries, q.options, q.answers)])
    def trained(**settings):
        cfg = make_config(ChooseConfig, base=str(tiny_model), method="bi-encoder", epochs=2, lr=1e-2, precision="fp32", **settings)
        model = new_chooser(cfg, on)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        return train_on(model, q, None, cfg, on), before, model.state_dict()
    log, before, after = trained(tune="lora", lora_rank=2)
    assert log.engine["trainable"] < 5000 and [k for k in before if not torch.equal(before[k], after[k])] and all("lora_" in k or k == "weights" for k in before if not torch.equal(before[k], after[k]))
    (whole, before, after), (_, _, half) = trained(), trained(interpolate=0.5)
    name = next(k for k in after if "query.weight" in k)
    assert torch.allclose(half[name], (before[name] + after[name]) / 2, atol=1e-6) and not torch.equal(before[name], after[name])
    turned, before, after = trained(tune="head", dropout=0.1)
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["head.weight"] and turned.engine["trainable"] == after["head.weight"].numel()
    cfg = make_config(ChooseConfig, base=str(tiny_model), method="bi-encoder", epochs=2, precision="fp32", tune="parts", clauses=True, center=True)
    model = new_chooser(cfg, on)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weighed = train_on(model, q, None, cfg, on)
    assert {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)} == {"weights", "middle"} and weighed.engine["trainable"] == 3
    options = [*{t for o in q.options for t in o}]
    assert torch.allclose(model.middle, torch.tensor(model.model.encode(options, prompt=model.tell, normalize_embeddings=True)).mean(0), atol=1e-5), "the mean of what is trained on, each option once"
    folded, before, merged = trained(tune="lora", lora_rank=2, interpolate=0.5)
    assert folded.engine["trainable"] == log.engine["trainable"], "counted before the matrices are folded in"
    assert not [k for k in merged if "lora_" in k] and not torch.equal(merged[name], before[name.replace("query.", "query.base_layer.")])
    hinted, _, other = trained(hints=1.0)
    assert hinted.loss[0][1] > whole.loss[0][1] and not torch.equal(other[name], after[name])
    _, _, other = trained(both_ways=True)
    assert not torch.equal(other[name], after[name])
    again, _, other = trained(reworded=True)
    assert again.steps == 2 * whole.steps


@pytest.mark.parametrize("method", ["cross-encoder", "multiple-choice"])
def test_question_and_option_read_together(papermill, asked, tiny_model, method):
    ran = papermill("x", "choose", run="x", questions=asked, base=str(tiny_model), method=method, epochs=2, lr=1e-3, fold_count=6, only="1", precision="fp32", hold_out=False)
    assert ran.code == 0, ran.text[-3000:]
    fold, = ran.record().engine["folds"]
    assert ran.record().missing == {"colours:doors": "none of the 5 judged questions is of this kind"} and "5 judged; no doors among them" in ran.path.read_text()
    assert len(ran.record().engine["judged"]) == 5 and fold["last_loss"] != fold["first_loss"] and "best_epoch" not in fold


def test_a_blind_model_never_reads_the_question(asked, tiny_model):
    cfg = make_config(ChooseConfig, method="bi-encoder", clauses=True, blind=True)
    assert parts_of("soup without leeks", cfg) == parts_of("a red door", cfg)
    assert parts_of("Can I have soup without leeks?", cfg.model_copy(update={"blind": False})) == ["Can I have soup without leeks?", "Can I have soup", "leeks?"]


def fitted(q, rows, cfg, lr, on):
    model = new_chooser(cfg, on)
    train_on(model, q.part(rows.tolist()), None, cfg.model_copy(update={"lr": lr, "tries": {}}), on)
    return model


def test_each_fold_chooses_its_settings_by_the_others(asked, tiny_model, monkeypatch):
    "Each other fold is held out in turn, the best in all is trained on all of them, and what is judged is neither trained on nor counted; folds share the models of their common parts."
    q, on = read_questions(asked), machine(make_config(ChooseConfig, precision="fp32"))
    cfg = make_config(ChooseConfig, base=str(tiny_model), method="bi-encoder", epochs=4, precision="fp32", fold_count=3, tries="lr=1e-9,2e-3")
    cut = folds(q, cfg)
    for n, f in enumerate(cut):
        assert not len(f.held) and not {*f.train} & {*f.judged} and sorted(np.concatenate(f.inner)) == [*f.train] and [{*x} for x in f.inner] == [{*c.judged} for m, c in enumerate(cut) if m != n]
    trained, tried = [], {}
    monkeypatch.setattr(choosing, "train_on", lambda model, part, *a: trained.append({*part.ids}) or train_on(model, part, *a))
    model, log = tuned(q, cut[0], cfg, on, tried)
    nothing, some = log.engine["held_out_accuracy"]
    assert log.engine["chosen"] == {"lr": 2e-3} and some > nothing
    at = [q.ids[i] for i in cut[0].train]
    assert trained[-1] == {*at} and all(len(x) < len(at) and x < {*at} for x in trained[:-1]) and len(trained) == 2 * 2 + 1
    by_hand = [sum(hits(q.part(g.tolist()), scored(by(g, lr), q.part(g.tolist()), on)).sum() for g in cut[0].inner) / len(at) for by in [lambda g, lr: fitted(q, np.setdiff1d(cut[0].train, g), cfg, lr, on)] for lr in (1e-9, 2e-3)]
    assert by_hand == pytest.approx([nothing, some], abs=1e-4)
    again = fitted(q, cut[0].train, cfg, 2e-3, on)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    trained.clear(); tuned(q, cut[1], cfg, on, tried)
    assert len(trained) == 2 + 1, "the third fold alone was trained on before, for the first"
    for params, said in (({"split": "dev"}, "give split=test"), ({"method": "zero-shot"}, "a method that is trained"), ({"tries": "lr=7"}, "tries: lr Input should be less"), ({"tries": "lrr=1"}, "tries: lrr Extra"), ({"patience": 2}, "with tries and on dev the last epoch is taken")):
        with pytest.raises(InputError, match=said): make_config(ChooseConfig, **{"method": "bi-encoder", "tries": "lr=1e-5,2e-5"} | params)


def test_a_fold_that_stops_early_or_breaks(asked, tiny_model):
    q, on = read_questions(asked), machine(make_config(ChooseConfig, precision="fp32"))
    cfg = make_config(ChooseConfig, base=str(tiny_model), method="bi-encoder", epochs=5, precision="fp32", lr=1e-9, patience=1)
    log = train_on(new_chooser(cfg, on), q.part([*range(12)]), q.part([*range(12, 24)]), cfg, on)
    assert log.stopped == "the held-out accuracy did not rise for 1 epochs; stopped at step 2 of 5"
    model = new_chooser(cfg, on)
    with torch.no_grad(): model.weights.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan at step 1"): train_on(model, q.part([*range(12)]), None, cfg, on)


def test_prompts_stand_in_front(asked, tiny_model):
    "A base that was trained with prompts gets them: its question's in front of what asks, its document's in front of options."
    cfg, on = make_config(ChooseConfig, base=str(tiny_model), precision="fp32"), machine(make_config(ChooseConfig, precision="fp32"))
    for tune in ("all", "head"):
        model = new_chooser(cfg.model_copy(update={"method": "bi-encoder", "tune": tune}), on)
        model.ask, model.tell = "query: ", "passage: "
        rows = [("red door", ["a door", "a house"], 0, [])]
        texts = model.batch(rows)["texts"]
        if tune == "head": assert [*model.vectors] == ["query: red door", "passage: a door", "passage: a house"]
        else: assert model.model.tokenizer.convert_ids_to_tokens(texts["input_ids"].reshape(-1)[:4].tolist())[1:3] == model.model.tokenizer.tokenize("query:")


def test_a_model_that_is_broken_fails(asked, tiny_model):
    cfg = make_config(ChooseConfig, base=str(tiny_model), method="bi-encoder")   # untouched, an encoder is refused where it embeds
    on, q = machine(cfg), read_questions(asked)
    model = new_chooser(cfg, on)
    with torch.no_grad(): model.model[0].auto_model.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="scores of question '0' are not numbers"): scored(model, q, on)
    with torch.no_grad(): model.model[0].auto_model.embeddings.LayerNorm.weight.fill_(0.0); model.model[0].auto_model.embeddings.word_embeddings.weight.fill_(0.0)
    for p in model.parameters(): p.data.zero_()
    with pytest.raises(InputError, match="have the same score"): scored(model, q, on)


def test_settings_that_do_not_go_together(asked):
    for params, said in [({"method": "ensemble"}, "members: an ensemble adds up other runs"), ({"method": "multiple-choice", "clauses": True}, "clauses: multiple-choice reads a question as it is"),
                         ({"patience": 2, "hold_out": False}, "patience: nothing is held out"), ({"method": "bert"}, "method must be"), ({"method": "cross-encoder", "in_batch": False}, "in_batch: this is for method=bi-encoder"), ({"method": "bi-encoder", "lora_rank": 4}, "lora_rank: no adapter is trained"),
                         ({"method": "bi-encoder", "blind": True, "hints": 1.0}, "a blind model reads nothing"), ({"method": "bi-encoder", "dropout": 0.1}, "dropout: this is for tune=head"), ({"method": "bi-encoder", "tune": "parts"}, "tune: without clauses a question has one part"), ({"method": "bi-encoder", "tune": "parts", "clauses": True, "lr": 1e-3}, "lr: with tune=parts nothing is trained"), ({"method": "bi-encoder", "center": True}, "center: this is for embeddings that stay as they are"), ({"method": "multiple-choice", "tune": "lora"}, "tune: this is for method=bi-encoder, not multiple-choice"), ({"warmup": 1.5}, "warmup: below 1 it is a share")]:
        with pytest.raises(InputError, match=said): make_config(ChooseConfig, **params)
    q = read_questions(asked)
    with pytest.raises(InputError, match="no question is left to train on; give fold_count=3, or hold_out=False"): folds(q, make_config(ChooseConfig, method="bi-encoder", fold_count=2))
    with pytest.raises(InputError, match="there are the folds 0 to 4; none of 7"): folds(q, make_config(ChooseConfig, only="7"))
    with pytest.raises(InputError, match="recipe-mpr's 500 questions, .* has 30"): folds(q, make_config(ChooseConfig, folds="published"))


@pytest.mark.parametrize("row, said", [
    ({"hints": "red: door"}, "the hints 'red: door' are no object of texts"), ({"hints": ["red"]}, "are no object of texts"), ({"type": 3}, "the kinds 3 are no texts"), ({"answer": "²"}, "the answer '²' is not among the 2 options"),
    ({"options": None, "option_1": "", "option_2": "tea", "option_3": "milk", "answer": 0}, "the option '' is no text")])
def test_a_malformed_question(tmp_path, row, said):
    (tmp_path / "q.json").write_text(json.dumps([{"question": "what?", "options": ["tea", "milk"], "answer": "tea"} | row]))
    with pytest.raises(InputError, match=f"question 0: .*{said}"): read_questions(tmp_path / "q.json")


def test_questions_whose_answers_are_everybodys_options(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([{"question": f"is {n} odd?", "options": ["yes", "no"], "answer": ["no", "yes"][n % 2]} for n in range(9)]))
    q = read_questions(tmp_path / "q.json")
    with pytest.raises(InputError, match="each one's answer is an option of others, as yes and no are"): folds_of(q)
    assert places(q, make_config(ChooseConfig)) == [*range(9)], "what is not trained needs no folds"
    (tmp_path / "q.json").write_text(json.dumps([{"question": f"{n}?", "options": [f"word{n}", "none of these"], "answer": 0} for n in range(9)]))
    with pytest.raises(InputError, match="no question is left to train on; give strict=False"): folds(read_questions(tmp_path / "q.json"), make_config(ChooseConfig, method="bi-encoder", strict=True, hold_out=False))
    apart = folds_of(read_questions(tmp_path / "q.json"), 3)[0]
    (tmp_path / "q.json").write_text(json.dumps([{"question": f"{n}?", "options": [f"word{n}", "none" if n in apart else "neither"], "answer": 0} for n in range(9)]))
    tried = lambda strict: folds(read_questions(tmp_path / "q.json"), make_config(ChooseConfig, method="bi-encoder", strict=strict, fold_count=3, only="0", tries="lr=1e-5,2e-5"))
    assert len(tried(False)[0].inner) == 2
    with pytest.raises(InputError, match="held out, no question is left to train on; give strict=False, or leave out tries"): tried(True)
