"Solving puzzles, from tasks to the record: what is trained on, what is set back, and what a kill leaves."
import json
import multiprocessing
import os
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from embedlab.adapting import Answering, adapt, changes_of, figures_of, greedy, own_example, puzzle_sets, ready, set_back, solve_sets, solve_task
from embedlab.comparison import settings
from embedlab.config import InputError, SolveConfig, make_config
from embedlab.examples import Examples, same
from embedlab.families import FAMILIES, HELD_OUT, SEEN, make_task, make_tasks
from embedlab.models import machine, weights_hash
from embedlab.puzzles import Task, grid_text, leave_one_out, load_tasks, text_grid
from embedlab.records import mark
from embedlab.solvers import add_adapter, begin, chain_of, fit_solver, fit_solver_once, refuse_learned, trained
from embedlab.wording import Wording, grid_tokenizer, load_solver, new_solver

TINY = dict(puzzles="families", families="seen", test_steps=0, size=4, demos=3, tasks=4, width=32, layers=2, heads=2, steps=8, batch_size=4, lr=3e-3, precision="fp32", predictions=3)
QWEN = dict(puzzles="families", families="seen", test_steps=0, size=4, demos=3, tasks=3, steps=6, batch_size=4, lr=3e-3, precision="fp32", predictions=2, tune="lora", lora_rank=4)
SERVER = multiprocessing.get_context("forkserver")   # children are real processes, forked from one that has only imported
SERVER.set_forkserver_preload(["embedlab.adapting"])


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Path:
    "A Qwen2 of two layers with the real architecture's files: grouped heads, a byte-level tokenizer, ChatML, and a generation_config that asks for sampling."
    from tokenizers.trainers import BpeTrainer
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel
    raw = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    raw.backend_tokenizer.train_from_iterator(["You are a helpful assistant.\nInput and Output 10 20 300\n\n"] * 4, BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    got = json.loads(raw.backend_tokenizer.to_str())["model"]
    tok = Qwen2Tokenizer(vocab=got["vocab"], merges=[tuple(m) for m in got["merges"]], eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None, additional_special_tokens=["<|im_start|>"])
    tok.chat_template = ("{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
                         "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tok) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=600, tie_word_embeddings=True, initializer_range=0.3))
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=1.3, temperature=0.7)
    out = tmp_path_factory.mktemp("models") / "tiny-qwen"
    model.save_pretrained(out); tok.save_pretrained(out)
    return out


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EMBEDLAB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def write_tasks(path: Path, tasks: list[Task]) -> Path:
    rows = lambda pairs: [{"input": x.tolist()} | ({} if y is None else {"output": y.tolist()}) for x, y in pairs]
    path.write_text(json.dumps({t.name: {"train": rows(t.demos), "test": rows(t.tests)} for t in tasks}))
    return path


def run_stage(home: Path, run: str, **params):
    "Train as the driver does."
    cfg = make_config(SolveConfig, **params)
    on, start = machine(cfg), begin(cfg, machine(cfg))
    return cfg, on, start, fit_solver_once(start, cfg, home / run, [], on, run, run)


def test_a_tokenizer_like_qwens(qwen):
    "A grid's tokens are those that the tokenizer itself would give; the frame is its chat template; what only merges digits is refused."
    model, w = load_solver(str(qwen))
    task = make_task("recolour", 3, size=5)
    text = "".join(f"I\n{grid_text(x)}\nO\n{grid_text(y)}\n" for x, y in task.demos) + f"I\n{grid_text(task.tests[0][0])}\nO\n"
    chat = [{"role": "user", "content": text}]
    assert w.prompt(task) == w.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    ids, learn = w.example(task)
    assert w.tokenizer.decode(ids) + "\n" == w.tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": grid_text(task.tests[0][1]) + "\n"}], tokenize=False)
    assert w.tokenizer.decode([i for i, on in zip(ids, learn) if on]) == grid_text(task.tests[0][1]) + "\n<|im_end|>"
    x = torch.tensor([w.prompt(task)])
    by_library = model.generate(x, attention_mask=torch.ones_like(x), do_sample=False, repetition_penalty=1.0, temperature=None, max_new_tokens=4)[0, x.shape[1]:].tolist()   # as the folder's files have it, it would sample
    ours = greedy(model, w, [w.prompt(task)], 4, machine(make_config(precision="fp32")))[0]
    assert ours == by_library[:len(ours)]

    bad = grid_tokenizer(); bad.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InputError, match="chat template does not show"): Wording(bad, 100)
    from transformers import AutoTokenizer
    from embedlab.models import minilm_folder
    with pytest.raises(InputError, match="has no token for '.n' alone"): Wording(AutoTokenizer.from_pretrained(minilm_folder()), 100)


def canonical(g) -> str: # the same for all turned and recoloured forms that keep black
    def recoloured(h):
        names = {0: 0}
        return grid_text(np.array([[names.setdefault(int(v), len(names)) for v in row] for row in h], np.uint8))
    return min(recoloured(np.rot90(h, k)) for h in (g, g.T) for k in range(4))


def grids_in(wording: Wording, ids: list[int]) -> list: # all that stand in a token stream
    text = "".join(wording.characters.get(i, " ") for i in ids)
    return [g for part in text.replace("O", "I").replace(" ", "I").split("I") if (g := text_grid(part.strip("\n"))) is not None]


@pytest.mark.parametrize("settings", [{}, {"answers": "last"}, {"inputs": 1.0}, {"augment": False}])
def test_the_answer_is_in_no_example(settings):
    "In no example of its own task, turned and recoloured or not, unless a demonstration holds that very grid."
    cfg, w = make_config(SolveConfig, **TINY | settings), Wording(grid_tokenizer(), 2048)
    tasks = make_tasks([*SEEN, *HELD_OUT], 24, 5, size=6)
    rng, random_grid = np.random.default_rng(0), lambda: np.random.default_rng(rng.integers(10**9)).integers(0, 10, (5, 5)).astype(np.uint8)
    tasks += [Task(f"random-{n}", [(random_grid(), random_grid()) for _ in range(3)], [(random_grid(), random_grid()), (random_grid(), random_grid())]) for n in range(3)]
    checked = 0
    for t in tasks:
        answers, held = {canonical(y) for _, y in t.tests}, {canonical(g) for d in t.demos for g in d}
        assert answers & {canonical(g) for g in grids_in(w, w.example(t)[0])}, "what is looked for can be found"
        found = {canonical(g) for i in range(16) for g in grids_in(w, own_example(t, w, cfg, i)[0])}
        assert found <= held and found, "nothing but demonstrations"
        checked += not answers & held
    assert checked >= 20


def test_what_is_solved_is_not_trained_on(tmp_path):
    "Neither from families, nor from a file that holds it, be it as a demonstration; families that are held out don't come up."
    cfg, w = make_config(SolveConfig, **TINY | {"size": 3, "families": "border,majority", "steps": 40}), Wording(grid_tokenizer(), 2048)
    draw = lambda d, i: d.task(np.random.default_rng([0, i]))
    plain = Examples(cfg, w)
    some = [draw(plain, i) for i in range(60)]
    assert {t.family for t in some} == {"border", "majority"}
    apart = Examples(cfg, w, [replace(t, demos=t.demos[::-1]) for t in some])
    assert not {same(t) for t in some} & {same(draw(apart, i)) for i in range(60)}
    tasks = make_tasks(["recolour"], 8, 0, 4)
    path = write_tasks(tmp_path / "mine.json", tasks + [Task("more", [tasks[0].tests[0], *tasks[5].demos], tasks[6].tests), Task("open", tasks[7].demos[:1], [(tasks[7].tests[0][0], None)])])
    mine = Examples(cfg.model_copy(update={"train": [str(path)]}), w, tasks[:2])
    assert (mine.tasks, mine.solved, mine.bare, mine.long) == (6, 3, 1, 0)   # two solved and one that holds a solved pair; one with a single pair
    with pytest.raises(InputError, match="none of the 10 tasks of .* is left"): Examples(cfg.model_copy(update={"train": [str(path)]}), w, tasks)
    with pytest.raises(InputError, match="of 1,000 tasks none was shorter than 40 tokens"): Examples(cfg, Wording(grid_tokenizer(), 40))[0]


def test_examples_are_functions_of_their_number():
    cfg, w = make_config(SolveConfig, **TINY | {"steps": 100, "inputs": 0.5}), Wording(grid_tokenizer(), 2048)
    a, b = Examples(cfg, w), Examples(cfg, w)
    backwards = [b[i] for i in range(70, -1, -1)][::-1]
    assert [a[i] for i in range(71)] == backwards and a[3] != Examples(cfg.model_copy(update={"seed": 1}), w)[3]
    assert Examples(cfg, w, first=40).made(2) == a.made(42)
    began = time.perf_counter(); Examples(cfg.model_copy(update={"steps": 10**6}), w)[3_999_999]
    assert time.perf_counter() - began < 5, "the last of four million examples takes no longer than the first"
    modelled = sum(w.ids["O"] not in a.made(i)[0] for i in range(200))
    assert 70 < modelled < 130


@pytest.mark.parametrize("variant", [{}, {"lora_rs": True}, {"lora_dora": True, "lora_dropout": 0.1}], ids=["lora", "rank-stabilised", "DoRA"])
def test_lora(variant, qwen, home):
    "The base keeps its bits; merged and unmerged answer the same; the adapter loads by peft alone and the model by transformers alone."
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base = weights_hash(load_solver(str(qwen))[0])
    cfg, on, start, log = run_stage(home, "one", base=str(qwen), **QWEN | variant)
    e = log.engine
    assert start.base_sha256 == base and e["frozen_sha256"]["before"] == e["frozen_sha256"]["after"] and weights_hash(load_solver(str(qwen))[0]) == base
    assert e["lora"] == {"rank": 4, "alpha": 64.0, "dropout": cfg.lora_dropout, "rs": cfg.lora_rs, "dora": cfg.lora_dora, "targets": ["k_proj", "o_proj", "q_proj", "v_proj"]} and e["trainable"] < 5000
    assert log.loss[-1][1] != log.loss[0][1] and e["chat_template"]
    task = make_task("flip", 0, 4)
    prompts = [start.wording.prompt(c.task(task)) for c in changes_of(task, cfg.model_copy(update={"predictions": 4}))]
    plain = AutoModelForCausalLM.from_pretrained(home / "one" / "model").eval()
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen, attn_implementation="eager"), home / "one" / "adapter").eval()
    x = torch.tensor(prompts[:1])
    with torch.inference_mode(): a, b, c = (m(input_ids=x).logits for m in (start.model, by_peft, plain))
    untouched = AutoModelForCausalLM.from_pretrained(qwen)(input_ids=x).logits
    assert torch.equal(a, b) and torch.allclose(a, c, atol=1e-4) and not torch.allclose(a, untouched, atol=1e-3)
    assert greedy(start.model, start.wording, prompts, 30, on) == greedy(plain, start.wording, prompts, 30, on)


@pytest.mark.parametrize("adapter", ["new", "continued", "none"])
def test_set_back_between_tasks(adapter, qwen, home):
    "To the last bit, and a task's answers do not depend on those before it; a failed task is counted, and nothing falls back."
    cfg, on, start, _ = run_stage(home, "one", base=str(qwen), **QWEN | {"test_steps": 4, "test_lr": 0.02, "test_adapter": adapter} | ({"test_rank": 4} if adapter == "new" else {}))
    model = ready(start, cfg, home / "one", on)
    assert sum(p.numel() for p in trained(model).values()) == {"none": sum(p.numel() for p in model.parameters())}.get(adapter, 2 * 4 * (64 + 48 + 48 + 64))   # blocks, rank, in and out of q, k, v and o
    bits, sets = weights_hash(model), {"toy": make_tasks(["recolour", "flip"], 4, 0, 4)}
    got, = solve_sets(model, start.wording, sets, cfg, on, home / "all", tune=True).values()
    assert weights_hash(model) == bits
    alone = solve_task(Answering(model, start.wording, cfg, on), sets["toy"][3], tune=True)
    assert {k: v for k, v in alone.items() if k != "seconds"} == {k: v for k, v in got[3].items() if k != "seconds"}
    assert all(r["loss"][1] < r["loss"][0] for r in got)
    untuned = greedy(model, start.wording, [start.wording.prompt(sets["toy"][0])], 20, on)
    with set_back(model):
        adapt(model, start.wording, sets["toy"][0], cfg, on)
        assert weights_hash(model) != bits
    assert greedy(model, start.wording, [start.wording.prompt(sets["toy"][0])], 20, on) == untuned


def test_a_failed_adaptation_is_counted(qwen, monkeypatch, tmp_path, capsys):
    "One demonstration, a text that is too long, a loss that is no number, memory that runs out: unsolved, with the reason."
    import embedlab.adapting as adapting
    cfg = make_config(SolveConfig, **TINY | {"test_steps": 2, "test_rank": 4})
    on = machine(cfg)
    model, tokenizer = new_solver(32, 2, 2)
    model, w = add_adapter(model, cfg, 4, 0).eval(), Wording(tokenizer, 200)
    fine, nan, dear = make_tasks(["recolour"], 3, 0, 4)
    sets = {"toy": [fine, replace(fine, name="one", demos=fine.demos[:1]), make_task("recolour", 0, 12), replace(nan, name="nan"), replace(dear, name="dear")]}
    loss, tuned = adapting.answer_loss, adapting.adapt
    def played(model, wording, task, cfg, on):
        if task.name == "dear": raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        monkeypatch.setattr(adapting, "answer_loss", (lambda *a: loss(*a) * float("nan")) if task.name == "nan" else loss)
        return tuned(model, wording, task, cfg, on)
    monkeypatch.setattr(adapting, "adapt", played)
    bits = weights_hash(model)
    got = solve_sets(model, w, sets, cfg, on, tmp_path / "t", tune=True)
    why = [r["failed"] for r in got["toy"]]
    assert why[0] is None and "leaving one out needs two" in why[1] and "more than the 200 tokens" in why[2] and "loss is nan" in why[3] and "out of memory" in why[4]
    assert weights_hash(model) == bits and [r["attempts"] for r in got["toy"][1:]] == [[]] * 4
    s, = figures_of(sets, got)
    assert len(s) == 5 and s.values["solved@2"][1:].tolist() == [0] * 4

    # memory that runs out while answers are written halves how many there are at once, and is said
    monkeypatch.setattr(adapting, "greedy", lambda model, wording, prompts, *a: (_ for _ in ()).throw(RuntimeError("can't allocate memory")) if len(prompts) > 2 else greedy(model, wording, prompts, *a))
    answer, whole = Answering(model, w, cfg, on), Answering(model, w, cfg, on)
    said = answer([fine, nan])
    assert answer.at_once <= 2 and "out of memory; going on with" in capsys.readouterr().out
    monkeypatch.setattr(adapting, "greedy", greedy)
    text = lambda a: [[[None if g is None else grid_text(g) for g in k] for k in t] for t in a]
    assert text(whole([fine, nan])) == text(said)


def test_what_was_learned_solves(home, tmp_path):
    "Tasks of a file whose answer is always one seven: nothing is solved before, all of another file's after forty steps."
    rng = np.random.default_rng(0)
    grid = lambda: rng.integers(0, 10, (3, 3)).astype(np.uint8)
    seven = lambda n, k: write_tasks(tmp_path / f"{n}.json", [Task(f"{n}{i}", [(grid(), np.array([[7]], np.uint8)) for _ in range(3)], [(grid(), np.array([[7]], np.uint8))]) for i in range(k)])
    params = {k: v for k, v in TINY.items() if k not in ("size", "demos", "families")} | dict(train=str(seven("some", 20)), puzzles=str(seven("other", 6)), tasks=None, steps=40, lr=1e-2, augment=False, predictions=1)
    cfg = make_config(SolveConfig, **params)
    sets, on, start = puzzle_sets(cfg)[0], machine(cfg), begin(cfg, machine(cfg))
    start.model.train()
    before = solve_sets(start.model, start.wording, sets, cfg, on, home / "before", tune=False)
    assert not start.model.training, "measured without dropout"
    _, _, start, _ = run_stage(home, "one", **params)
    after = solve_sets(start.model, start.wording, sets, cfg, on, home / "after", tune=False)
    assert [figures_of(sets, x)[0].mean() for x in (before, after)] == [0, 1] and after["other"][0]["attempts"] == [[["7", 1]]]


def job(home: str, steps: list[tuple]):
    "Train stages and solve, each as a run's cells do, and write down what came out."
    torch.set_num_threads(1)
    os.environ["EMBEDLAB_RUNS"] = home
    out = open(f"{home}.log", "a", buffering=1); os.dup2(out.fileno(), 1); os.dup2(out.fileno(), 2)
    for run, params in steps:
        cfg, on, start, log = run_stage(Path(home), run, **params)
        got = solve_sets(ready(start, cfg, Path(home) / run, on), start.wording, puzzle_sets(cfg)[0], cfg, on, Path(home) / run / "tasks", tune=cfg.test_steps > 0)
        kept = {name: [{k: v for k, v in r.items() if k != "seconds"} for r in rs] for name, rs in got.items()}
        Path(home, run, "end.json").write_text(json.dumps({"weights": weights_hash(start.model), "loss": log.loss, "rate": log.rate, "norm": log.norm, "results": kept, "engine": log.engine}))


def test_killed_and_continued(tmp_path):
    "In a first training, in a LoRA stage with dropout, and in the middle of the task list: the same weights and answers, and no finished task again."
    first = {**TINY, "steps": 30, "accumulate": 2, "checks": 6, "tasks": 2}
    second = {k: v for k, v in first.items() if k not in ("width", "layers", "heads")} | dict(continue_from="one", tune="lora", lora_rank=4, lora_dropout=0.2, inputs=0.3, stage="continued", test_steps=6, test_adapter="continued", test_batch=2, tasks=8)
    def start(home, *steps):
        p = SERVER.Process(target=job, args=(str(home), [*steps])); p.start()
        return p
    def finish(home, *steps):
        p = start(home, *steps); p.join()
        assert p.exitcode == 0, Path(f"{home}.log").read_text()[-2000:]
    def kill_when(p, there, softly=False):
        while p.is_alive() and not there(): time.sleep(0.001)
        p.terminate() if softly else p.kill()   # signals 15 and 9
        p.join()
        assert there(), "it ended before it was killed"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for h in (whole, cut): h.mkdir()
    finish(whole, ("one", first), ("two", second))
    checkpoint = lambda run, n: lambda: any((cut / run / "checkpoints" / f"checkpoint-{k}").is_dir() for k in n)
    kill_when(start(cut, ("one", first)), checkpoint("one", (10, 15)))
    finish(cut, ("one", first))
    kill_when(start(cut, ("two", second)), checkpoint("two", (10, 15)), softly=True)
    solved = lambda: [*(cut / "two" / "tasks").glob("*.json")]
    kill_when(start(cut, ("two", second)), lambda: len(solved()) >= 3)
    before = {p.name: p.stat().st_mtime_ns for p in solved()}
    assert 3 <= len(before) < 16
    finish(cut, ("two", second))
    assert {n: (cut / "two" / "tasks" / n).stat().st_mtime_ns for n in before} == before, "a finished task was solved again"
    for run in ("one", "two"):
        a, b = (json.loads((h / run / "end.json").read_text()) for h in (whole, cut))
        assert a == b, [k for k in a if a[k] != b[k]]
    log = Path(f"{cut}.log").read_text()
    assert log.count("continuing from checkpoint-") == 2 and "SIGTERM stopped the run after step" in log and "of 16 tasks were finished before" in log


def test_stages_by_name(home):
    "Weights, examples and the schedule go on; another shape of adapter starts from the merged model; a stage of a run that isn't there is refused."
    run_stage(home, "one", **TINY)
    more = {k: v for k, v in TINY.items() if k not in ("width", "layers", "heads")}
    _, _, two, log = run_stage(home, "two", continue_from="one", **more | {"steps": 4, "stage": "continued", "warmup": 0})
    assert [s["run"] for s in chain_of("two")] == ["one", "two"] and log.engine["first_example"] == 32 and log.engine["families"] == list(SEEN)
    assert [v for _, v in log.rate] == pytest.approx([3e-3 * (1 - k / 12) for k in range(8, 12)])
    _, _, three, log = run_stage(home, "three", continue_from="two", **more | {"steps": 2, "tune": "lora", "lora_rank": 4})
    assert three.base_sha256 == weights_hash(two.model) and log.engine["first_example"] == 48 and log.rate[0][1] == 0
    cfg = make_config(SolveConfig, continue_from="three", **more | {"tune": "lora", "lora_rank": 4})
    again = begin(cfg, machine(cfg))
    assert again.place == "two" and again.sha256 == weights_hash(three.model), "the adapter goes on beside the same base"
    other = begin(cfg.model_copy(update={"lora_rank": 8}), machine(cfg))
    assert other.place == "three" and other.base_sha256 == weights_hash(load_solver(str(home / "three" / "model"))[0])
    base = home / "two" / "model" / "model.safetensors"
    base.write_bytes((home / "one" / "model" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="base 'two' is not what the adapter of 'three' was trained beside"): begin(cfg, machine(cfg))
    other = make_config(SolveConfig, continue_from="three", tune="lora", lora_rank=8, steps=0, test_steps=2, test_adapter="continued")
    with pytest.raises(InputError, match="test_adapter: three has no trained adapter like this: its rank is 4, alpha .* give lora_rank"): begin(other, machine(other))
    with pytest.raises(InputError, match="run 'none' has no finished training"): begin(cfg.model_copy(update={"continue_from": "none"}), machine(cfg))


def test_a_run_from_nothing_and_its_next_stage(papermill):
    "By papermill: the untrained model is measured, the record compares, a stage is one line, and the same command again repeats nothing."
    small = TINY | {"steps": 12, "tasks": 5, "run": "one"}
    ran = papermill("one", "solve", **small)
    assert ran.code == 0, ran.text[-3000:]
    r = ran.record()
    assert r.kind == "solve" and r.engine["before_is"] == "the untrained model as it came" and r.engine["ran"] == 12 and not mark(r)
    assert set(r.after) == {f"families:{p}/{m}" for p in ("seen", "held-out") for m in ("solved@2", "solved@1", "cells@1")} == set(r.before)
    assert r.delta["families:seen/solved@2"]["test"] == "McNemar" and r.delta["families:seen/solved@2"]["n"] == 5 and len(r.ids("families:seen/solved@2")) == 5
    assert [(x["name"], x["rows"], x["role"]) for x in r.data] == [("families", 48, "train"), ("families:seen", 5, "evaluate"), ("families:held-out", 5, "evaluate")]
    assert settings(r)["lora_rank"] == 64 and r.model["architecture"] == "qwen2" and r.speed["train_tokens_per_s"] > 0
    card = (papermill.home / "one" / "model" / "README.md").read_text()
    assert "library_name: transformers" in card and "A token's position is its place in the grids" in card
    again = papermill("one", "solve", **small)
    assert again.record().after == r.after and again.path.read_text().count("10 of 10 tasks were finished before") == 2 and "its saved model is taken" in again.path.read_text()
    two = papermill("two", "solve", run="two", continue_from="one", steps=0, test_steps=3, test_adapter="none", tasks=3, size=4, predictions=2, precision="fp32")
    assert two.code == 0, two.text[-3000:]
    r = two.record()
    assert r.engine["before_is"] == "the trained model, not tuned at test time" and [s["run"] for s in r.engine["stages"]] == ["one"] and r.engine["test_trainable"] == r.model["parameters"]
    assert not (papermill.home / "two" / "model").exists() and r.leaks is None


def test_what_an_earlier_stage_has_learned_is_not_solved(home, tmp_path):
    "A family that a stage was trained on can't be called held out later, nor are a file's own tests solved by who was trained on them, under whatever name the run begins."
    on, path = machine(make_config(precision="fp32")), write_tasks(tmp_path / "mine.json", make_tasks(["flip", "recolour"], 8, 3, 4))
    small = TINY | {"steps": 2, "families": "flip,recolour", "precision": "fp32"}
    cfg = make_config(SolveConfig, **small | {"train": f"families,{path}"})
    fit_solver_once(begin(cfg, on), cfg, home / "one", [], on, "f", "one")
    later = {"continue_from": "one", "steps": 0, "precision": "fp32"}, {"base": "one", "steps": 0, "precision": "fp32"}
    for params in later:
        for what, said in ({"puzzles": "families:held-out", "held_out": "flip,largest"}, "flip would be called held out, and stage 'one' was trained on it"), ({"puzzles": str(path)}, "stage 'one' was trained on the tests of 8 of 8 tasks of mine"):
            cfg = make_config(SolveConfig, **params | what)
            with pytest.raises(InputError, match=said): refuse_learned(cfg, begin(cfg, on), puzzle_sets(cfg)[0])
    cfg = make_config(SolveConfig, base="one", steps=2, families="border", precision="fp32", batch_size=4)
    fit_solver_once(begin(cfg, on), cfg, home / "two", [], on, "f", "two")
    cfg = make_config(SolveConfig, continue_from="two", steps=0, puzzles="families:held-out", held_out="flip", precision="fp32")
    with pytest.raises(InputError, match="stage 'one' was trained on it"): refuse_learned(cfg, begin(cfg, on), puzzle_sets(cfg)[0])   # two stages back, by another way
    cfg = make_config(SolveConfig, **later[0] | {"puzzles": "families:held-out", "held_out": "largest"})
    refuse_learned(cfg, begin(cfg, on), puzzle_sets(cfg)[0])


def test_positions_end_where_their_table_ends(qwen):
    model, wording = load_solver(str(qwen))
    assert wording.positions(torch.zeros(1, wording.limit + 5, dtype=torch.long)).max() == wording.limit - 1, "rows that have ended are written on beside others"


def test_dev_and_test_of_a_file_are_apart(tmp_path):
    path = write_tasks(tmp_path / "mine.json", make_tasks(["flip", "recolour"], 40, 3, 6) + make_tasks(["flip", "recolour"], 40, 4, 4))
    names = lambda **kw: {t.name for t in puzzle_sets(make_config(SolveConfig, puzzles=str(path), **kw))[0]["mine"]}
    dev = names(tasks=12, split="dev")
    for side, n in ((None, 12), (None, 40), (4, 12)): assert len(some := names(tasks=n, max_side=side)) == n and not some & dev, "whatever is left out as too large"
    assert len(names(tasks=None)) == 80
    with pytest.raises(InputError, match="split dev takes mine's second half, which has 40 tasks; give a number up to that"): names(tasks=50, split="dev")


def test_a_folder_takes_the_same_path(papermill, qwen, tmp_path):
    "A Qwen2 by its folder, on tasks of a file: LoRA, tuning at test time, tasks that can't be encoded listed, too large ones left out and counted."
    tasks = make_tasks(["flip", "recolour"], 4, 3, 4)
    path = write_tasks(tmp_path / "mine.json", tasks + [make_task("recolour", 1, 12), replace(make_task("flip", 1, 8, demos=2), name="wide"), make_task("count", 1, 5, 1)])
    ran = papermill("q", "solve", run="q", base=qwen, max_side=11, max_tokens=240, test_rank=4, **QWEN | {"tasks": None, "puzzles": path, "test_steps": 2})
    assert ran.code == 0, ran.text[-3000:]
    r = ran.record()
    assert r.delta["mine/solved@2"]["n"] == 6 and r.data[-1]["part"] == "1 tasks with sides above 11 are left out"
    failed = {t: why for _, t, why in r.engine["failed"]}
    assert set(failed) == {"wide", "count-5-1"} and "can't be encoded" in failed["wide"] and "needs two at least" in failed["count-5-1"]
    assert r.model["trainable"] < r.model["parameters"] and r.engine["limit"] == 240 and r.engine["test_loss"]
    assert (papermill.home / "q" / "adapter" / "adapter_config.json").exists()


def test_inputs_that_can_not_be_used(tmp_path, qwen, home):
    on = machine(make_config(precision="fp32"))
    task = make_task("flip", 0, 4)
    cfg = lambda **kw: make_config(SolveConfig, **TINY | kw)
    open_ = write_tasks(tmp_path / "open.json", [replace(task, tests=[(task.tests[0][0], None)])])
    with pytest.raises(InputError, match=r"test\[0\].output: missing, as in 1 of 1 tests; scoring needs solutions"): puzzle_sets(cfg(puzzles=str(open_)))
    one = write_tasks(tmp_path / "one.json", [task])
    for params, said in [({"puzzles": one, "max_side": 2}, "none of the 1 tasks of one has sides up to 2"), ({"puzzles": one, "split": "dev"}, "second half, which has 1 tasks; give a number"), ({"puzzles": f"{one},{one}"}, "two sets are called one"), ({"puzzles": "families:heldout"}, "families:heldout' is no part of the families; there are families:seen and families:held-out"),
                         ({"puzzles": "nowhere"}, "no such file or folder"), ({"families": "flop"}, "family 'flop' is not known"), ({"families": ",".join(FAMILIES)}, "families:held-out has no families left"), ({"tasks": None}, "give a number with tasks")]:
        with pytest.raises(InputError, match=said): puzzle_sets(cfg(**{k: str(v) if k == "puzzles" else v for k, v in params.items()}))
    with pytest.raises(InputError, match="matrix_lr: Muon moves matrices of a model that was made here"): begin(make_config(SolveConfig, base=str(qwen), matrix_lr=0.01), on)
    for params, said in [({"base": str(qwen), "max_tokens": 5000}, "max_tokens 5000 is more than the 600 tokens"), ({"base": str(tmp_path)}, "no weights in this folder"), ({"base": "/none"}, "no such folder")]:
        with pytest.raises(InputError, match=said): begin(make_config(SolveConfig, **params), on)
    with pytest.raises(InputError, match="no linear layer is called 'query'"): begin(make_config(SolveConfig, base=str(qwen), tune="lora", lora_targets="query"), on)
    for params, said in [({"tune": "lora"}, "tune: LoRA beside weights that are random"), ({"base": "x", "width": 64}, "width: this is for a new model"), ({"continue_from": "a", "base": "b"}, "base: run 'a'"), ({"stage": "continued"}, "stage: there is no run"),
                         ({"test_steps": 1, "test_adapter": "continued"}, "test_adapter: there is no trained adapter"), ({"test_steps": 1, "demos": 1}, "demos: tuning at test time"), ({"lora_dora": True, "test_steps": 0}, "lora_dora: no adapter is trained"), ({"heads": 3}, "heads: 3 heads can't share"),
                         ({"continue_from": "a", "tune": "lora", "matrix_lr": 0.01}, "matrix_lr: Muon moves"), ({"run": "a", "continue_from": "a"}, "run: 'a' would take the place of the run it begins from"), ({"steps": 0, "lr": 1e-4}, "lr: nothing is trained with steps 0"),
                         ({"test_lr": 1e-4, "test_steps": 0}, "test_lr: nothing is tuned at test time"), ({"test_steps": 1, "test_adapter": "none", "test_rank": 4}, "test_rank: this is for test_adapter=new"), ({"sample": 3}, "sample: nothing is drawn from a file"), ({"puzzles": "x", "train": "y", "size": 4}, "size: no generated task"), ({"families": "flip", "held_out": "flip"}, "held_out: flip would be trained on"), ({"warmup": 1.5}, "warmup: below 1 it is a share")]:
        with pytest.raises(InputError, match=said): make_config(SolveConfig, **params)
