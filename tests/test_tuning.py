"What is trained is what was asked for, and what leaves is a plain model."
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import nn

from conftest import ROOT
from embedlab.config import InputError, make_config
from embedlab.losses import ContrastiveLoss
from embedlab.models import describe, load_model, set_dropout
from embedlab.checkpoints import save_model
from embedlab.tuning import interpolate, linear_layers, load_adapter, merge, parameter_groups, prepare

TEXTS = ["split a string into words", "open a file for reading", "fit a line", "sort a list in place"]
ANSWERS = ["return the words of a text", "give a stream of a path", "least squares regression", "order the items"]
LORA = {"tune": "lora", "lora_rank": 4, "lora_alpha": 8, "lr": 1e-2}
FLAGS = [{}, {"lora_rs": True}, {"lora_dora": True}, {"lora_rs": True, "lora_dora": True}]


def tuned(folder, steps: int = 3, **settings):
    "A prepared model after a few steps of AdamW, and its settings."
    cfg = make_config(**settings)
    model = prepare(load_model(str(folder)), cfg)
    set_dropout(model, cfg.dropout)
    opt, loss = torch.optim.AdamW(parameter_groups(model, cfg)), ContrastiveLoss(model)
    model.train()
    for _ in range(steps):
        loss([model.preprocess(TEXTS), model.preprocess(ANSWERS)]).backward()
        opt.step(); opt.zero_grad()
    return model.eval(), cfg


def test_a_head_of_two_layers_and_embeddings_that_keep_their_length(tiny_model, tmp_path):
    SentenceTransformer(modules=[*load_model(str(tiny_model)), Normalize()]).save(str(tmp_path))
    base = load_model(str(tmp_path))
    model, cfg = tuned(tmp_path, tune="head", head=8, head_hidden=24, unit_length=False, similarity="euclidean", lr=1e-2)
    assert [(m.in_features, m.out_features) for m in model if isinstance(m, Dense)] == [(32, 24), (24, 8)] and not any(isinstance(m, Normalize) for m in model)
    assert sum(p.numel() for g in parameter_groups(model, cfg) for p in g["params"]) == 32 * 24 + 24 + 24 * 8 + 8
    x = torch.from_numpy(base.encode(TEXTS))                       # of length 1 no more, but what two layers make of the base's
    x = x * load_model(str(tiny_model)).encode(TEXTS, convert_to_tensor=True).norm(dim=1, keepdim=True).cpu()
    one, two = [m for m in model if isinstance(m, Dense)]
    assert torch.allclose(two.linear(nn.functional.gelu(one.linear(x))), model.encode(TEXTS, convert_to_tensor=True), atol=1e-5)
    model.save(str(tmp_path / "out"))
    assert np.array_equal(SentenceTransformer(str(tmp_path / "out")).encode(TEXTS), model.encode(TEXTS))
    with pytest.raises(InputError, match="head_hidden: there is no head"): make_config(head_hidden=24)
    with pytest.raises(InputError, match="count_on: no token is weighed"): make_config(count_on="pydocs")


def state(model) -> dict: return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def normalised(tiny_model, tmp_path_factory):
    "The tiny model with a normalisation at its end."
    model, out = SentenceTransformer(str(tiny_model), device="cpu"), tmp_path_factory.mktemp("norm") / "tiny"
    SentenceTransformer(modules=[*model, Normalize()], device="cpu").save(str(out), create_model_card=False)
    return out


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("head", [None, 16])
def test_the_merged_model_is_the_adapted_one(tiny_model, tmp_path, flags, head):
    settings = LORA | flags | {"head": head}
    model, cfg = tuned(tiny_model, **settings)
    adapted = model.encode(TEXTS)
    assert abs(adapted - prepare(load_model(str(tiny_model)), cfg).encode(TEXTS)).max() > 1e-2    # training did something
    trained_head = state(model[2]) if head else None
    save_model(model, tmp_path / "model")
    assert np.allclose(model.encode(TEXTS), adapted, atol=1e-5)                                    # in memory
    assert np.allclose(SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS), adapted, atol=1e-5)
    again = prepare(load_model(str(tiny_model)), cfg)
    load_adapter(again, tmp_path / "adapter")
    if head: again[2].load_state_dict(trained_head)
    assert np.allclose(again.encode(TEXTS), adapted, atol=1e-5)
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]


@pytest.mark.parametrize("settings", [LORA | {"lora_dora": True, "head": 16}, {"tune": "head", "head": 16}], ids=["lora", "head"])
def test_the_saved_folder_needs_no_peft(tiny_model, tmp_path, settings):
    model, cfg = tuned(tiny_model, **settings)
    save_model(model, tmp_path / "model")
    code = ("import sys; sys.modules['peft'] = None\nfrom sentence_transformers import SentenceTransformer\nimport numpy as np\n"
            f"np.save({str(tmp_path / 'out.npy')!r}, SentenceTransformer({str(tmp_path / 'model')!r}, device='cpu').encode({TEXTS!r}))")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True)
    assert np.allclose(np.load(tmp_path / "out.npy"), model.encode(TEXTS), atol=1e-5)


def test_flags_reach_peft(tiny_model):
    for flags in FLAGS:
        cfg = make_config(**LORA | flags | {"lora_dropout": 0.25, "lora_targets": "query,attention.output.dense"})
        model = prepare(load_model(str(tiny_model)), cfg)
        set_dropout(model, 0.5)                                                                    # of the encoder, not LoRA's
        live = model.transformers_model.peft_config["default"]
        assert (live.r, live.lora_alpha, live.lora_dropout, live.use_rslora, live.use_dora) == (4, 8, 0.25, cfg.lora_rs, cfg.lora_dora)
        layer = model.transformers_model.encoder.layer[1].attention.self.query
        assert layer.scaling["default"] == pytest.approx(8 / (2 if cfg.lora_rs else 4))
        assert layer.lora_dropout["default"].p == 0.25 and model.transformers_model.embeddings.dropout.p == 0.5
        assert ("default" in layer.lora_magnitude_vector) == cfg.lora_dora
        adapted = {n for n, m in model.transformers_model.named_modules() if hasattr(m, "lora_A")}
        assert adapted == {f"encoder.layer.{i}.attention.{t}" for i in (0, 1) for t in ("self.query", "output.dense")}


def test_without_targets_every_linear_layer_but_the_pooler_is_adapted(tiny_model):
    model = load_model(str(tiny_model))
    every = linear_layers(model)
    assert len(every) == 2 * 6 and isinstance(model.transformers_model.pooler.dense, nn.Linear)
    prepare(model, make_config(**LORA))
    assert {n for n, m in model.transformers_model.named_modules() if hasattr(m, "lora_A")} == set(every)


@pytest.mark.parametrize("targets", ["q_proj", "query,q_proj", "uery", "pooler.dense"])
def test_a_target_that_fits_nothing_is_named(tiny_model, targets):
    with pytest.raises(InputError, match=rf"no linear layer is called '{targets.split(',')[-1]}'; there are attention.output.dense, attention.self.key, .*output.dense"):
        prepare(load_model(str(tiny_model)), make_config(**LORA | {"lora_targets": targets}))


def test_a_base_without_linear_layers_is_refused():
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    from embedlab.models import minilm_folder
    static = SentenceTransformer(modules=[StaticEmbedding(AutoTokenizer.from_pretrained(minilm_folder()), embedding_dim=8)], device="cpu")
    with pytest.raises(InputError, match="no linear layers"): prepare(static, make_config(**LORA))
    with pytest.raises(InputError, match="gradient_checkpointing"): prepare(static, make_config(gradient_checkpointing=True))


@pytest.mark.parametrize("settings", [{"tune": "head", "head": 16}, LORA, LORA | {"head": 16, "lora_dora": True}, {"head": 16}], ids=["head", "lora", "dora and head", "all"])
def test_only_what_is_trained_changes(tiny_model, settings):
    settings = settings | {"weight_decay": 0.1, "lr": 1e-2}
    start = state(prepare(load_model(str(tiny_model)), make_config(**settings)))
    model, cfg = tuned(tiny_model, **settings)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, start[n])}
    unread = {n for n in trained if "pooler" in n}                                                # mean pooling reads no pooler
    assert changed == trained - unread
    if settings.get("tune") == "head": assert trained == {"2.linear.weight", "2.linear.bias"}
    if settings.get("tune") == "lora": assert all("lora_" in n or n.startswith("2.linear.") for n in trained)
    if "tune" not in settings: assert trained == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("settings", [{"head": 16}, {"tune": "head", "head": 16}, LORA | {"head": 16}, LORA, {}], ids=["all", "head", "lora and head", "lora", "no head"])
def test_groups_hold_each_parameter_once_with_its_rate(tiny_model, settings):
    cfg = make_config(**settings | {"lr": 2e-5, "weight_decay": 0.1} | ({"head_lr": 1e-3} if "head" in settings else {}))
    model = prepare(load_model(str(tiny_model)), cfg)
    groups, names = parameter_groups(model, cfg), {id(p): n for n, p in model.named_parameters()}
    held = [names[id(p)] for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == {n for n, p in model.named_parameters() if p.requires_grad}
    for g in groups:
        for n in (names[id(p)] for p in g["params"]):
            head = n.startswith("2.linear.")
            assert (g["name"], g["lr"]) == (("head", 1e-3) if head else ("base", 2e-5)), n
            assert g["weight_decay"] == (0.0 if n.endswith("bias") or "LayerNorm" in n else 0.1), n
    assert parameter_groups(model, cfg.model_copy(update={"head_lr": None}))[-1]["lr"] == 2e-5


def test_a_head_keeps_the_cosines_and_stands_before_the_normalisation(tiny_model, normalised, tmp_path):
    for folder, kinds in ((tiny_model, [Dense]), (normalised, [Dense, Normalize])):
        base, model = load_model(str(folder)), prepare(load_model(str(folder)), make_config(head=48, seed=3))
        assert [type(m) for m in model][2:] == kinds and isinstance(model[2].activation_function, nn.Identity)
        assert model.encode(TEXTS).shape == (4, 48) and describe(model, "x")["width"] == 48
        assert torch.allclose(model.similarity(*[model.encode(TEXTS)] * 2), base.similarity(*[base.encode(TEXTS)] * 2), atol=1e-5)
        same, other = (prepare(load_model(str(folder)), make_config(head=48, seed=s)) for s in (3, 4))
        assert torch.equal(same[2].linear.weight, model[2].linear.weight) and not torch.equal(other[2].linear.weight, model[2].linear.weight)
        save_model(model, tmp_path / "m")
        again = SentenceTransformer(str(tmp_path / "m"), device="cpu")
        assert [type(m) for m in again] == [type(m) for m in model] and np.allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    narrow = prepare(load_model(str(tiny_model)), make_config(head=8))[2].linear.weight
    assert torch.allclose(narrow @ narrow.T, torch.eye(8), atol=1e-5)


def test_prepare_leaves_the_random_numbers_alone(tiny_model):
    draws = []
    for cfg in (None, make_config(**LORA | {"head": 16})):
        model = load_model(str(tiny_model))
        torch.manual_seed(5)
        if cfg: prepare(model, cfg)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


@pytest.mark.parametrize("settings", [LORA | {"lora_dora": True, "head": 16}, {"tune": "head", "head": 16}], ids=["dora and head", "head"])
def test_a_state_goes_into_a_model_built_anew(tiny_model, tmp_path, settings):
    model, cfg = tuned(tiny_model, **settings)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = prepare(load_model(str(tiny_model)), cfg)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert np.array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_describe_tells_the_truth(tiny_model):
    plain = describe(load_model(str(tiny_model)), "x")
    lora = describe(prepare(load_model(str(tiny_model)), make_config(**LORA)), "x")
    matrices = 2 * (4 * 2 * 4 * 32 + 2 * 4 * (32 + 64))                                            # layers x (four square layers, two of 32 and 64), rank 4
    assert (lora["trainable"], lora["parameters"]) == (matrices, plain["parameters"] + matrices)
    assert describe(prepare(load_model(str(tiny_model)), make_config(tune="head", head=16)), "x")["trainable"] == 32 * 16 + 16
    model = prepare(load_model(str(tiny_model)), make_config(**LORA)); merge(model)
    assert describe(model, "x")["parameters"] == plain["parameters"]


def test_gradient_checkpointing_gives_the_same_gradients_for_a_second_pass(tiny_model):
    for settings in ({}, LORA):
        grads, passes = [], []
        for on in (False, True):
            model = prepare(load_model(str(tiny_model)), make_config(gradient_checkpointing=on, **settings)).train()
            set_dropout(model, 0.0)
            for n, p in model.named_parameters():
                if "lora_B" in n: nn.init.ones_(p)
            ran = []
            model.transformers_model.encoder.layer[0].output.dense.register_forward_hook(lambda *a: ran.append(1))
            ContrastiveLoss(model)([model.preprocess(TEXTS), model.preprocess(ANSWERS)]).backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            passes.append(len(ran))
        assert torch.allclose(*grads, atol=1e-6) and passes == [2, 4]
    frozen = prepare(load_model(str(tiny_model)), make_config(tune="head", head=16, gradient_checkpointing=True)).train()
    assert not frozen(frozen.preprocess(TEXTS))["token_embeddings"].requires_grad                  # nothing to go back through
    assert load_model(str(tiny_model)).encode(TEXTS).shape == prepare(load_model(str(tiny_model)), make_config(gradient_checkpointing=True)).encode(TEXTS).shape


@pytest.mark.parametrize("settings", [{"head": 16}, LORA], ids=["all", "lora"])
def test_interpolation_is_a_mean_of_weights(tiny_model, tmp_path, settings):
    base = state(load_model(str(tiny_model)))
    model, cfg = tuned(tiny_model, **settings | {"interpolate": 0.25})
    head = state(model[2]) if "head" in settings else {}
    whole = tuned(tiny_model, **settings)[0]; merge(whole)
    save_model(model, tmp_path / "model", cfg.interpolate, base)
    saved = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    for n, v in saved.state_dict().items():
        if n in base: assert torch.allclose(v, 0.75 * base[n] + 0.25 * whole.state_dict()[n], atol=1e-6), n
    for n, v in head.items(): assert torch.equal(saved[2].state_dict()[n], v)


def test_the_whole_share_is_the_tuned_model(tiny_model):
    model, start = load_model(str(tiny_model)), state(prepare(load_model(str(tiny_model)), make_config()))
    with torch.no_grad(): model.transformers_model.embeddings.word_embeddings.weight += 1
    want = state(model)
    interpolate(start, model, 1.0)
    assert all(torch.equal(v, want[n]) for n, v in model.state_dict().items()) and not all(torch.equal(v, want[n]) for n, v in start.items())


def test_a_failed_save_leaves_what_was_there(tiny_model, tmp_path, monkeypatch):
    model, cfg = tuned(tiny_model, steps=1, **LORA)
    save_model(load_model(str(tiny_model)), tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir() if p.is_file()}
    def full(*a, **kw): raise OSError(28, "No space left on device")
    monkeypatch.setattr(SentenceTransformer, "save", full)
    with pytest.raises(InputError, match=r"No space left on device\); free some space"): save_model(model, tmp_path / "model")
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir() if p.is_file()} == before
