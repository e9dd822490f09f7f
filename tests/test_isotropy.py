"Regularisers on one process and on two, in training, and what they refuse."
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from embedlab.collections import training_sets
from embedlab.config import InputError, make_config
from embedlab.isotropy import figures, measure, spectrum
from embedlab.models import load_model
from embedlab.regularising import KINDS, IsotropyLoss, sigreg
from embedlab.teaching import TrainingLoss
from embedlab.trainer import _regulariser, fit
from embedlab.tuning import add_head

WORKER = """
import sys, torch, torch.distributed as dist
from torch import nn
from embedlab.regularising import IsotropyLoss
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
class Model(nn.Sequential):
    def get_embedding_dimension(self): return 16
columns, out = torch.load(f"{folder}/columns.pt"), {}
for kind in ("sigreg", "covariance", "orthogonal"):
    mine = [c[rank * 8:rank * 8 + 8].clone().requires_grad_() for c in columns]
    torch.manual_seed(5); torch.rand(3 * rank)   # as all processes of a run are seeded; one has drawn more since, as dropout does
    loss = IsotropyLoss(Model(), kind, 1.0, std_weight=0.1, gather=True).compute_loss_from_embeddings(mine)
    loss.backward()
    out[kind] = loss.item(), torch.stack([m.grad for m in mine])
torch.save(out, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


class Model(torch.nn.Sequential):
    def get_embedding_dimension(self): return 16


def test_two_processes_see_one_batch(tmp_path):
    "Each holds half of it; the value is that of the whole, and so is the gradient, which each process has of its own texts."
    columns = [torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) + i for i in range(2)]
    torch.save(columns, tmp_path / "columns.pt")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", WORKER, str(r), str(tmp_path)], env=env, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    for p in both: assert p.wait(timeout=300) == 0, p.stderr.read()
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in (0, 1)]
    for kind in KINDS:
        whole = [c.clone().requires_grad_() for c in columns]
        torch.manual_seed(5)
        loss = IsotropyLoss(Model(), kind, 1.0, std_weight=0.1).compute_loss_from_embeddings(whole)
        loss.backward()
        for r in ranks: assert r[kind][0] == pytest.approx(loss.item(), rel=1e-5)
        want = torch.stack([w.grad for w in whole])
        got = torch.cat([r[kind][1] for r in ranks], 1)
        assert torch.allclose(got / 2, want, rtol=1e-4, atol=1e-7), kind   # gathered losses stand on both; the trainer averages them


def test_a_resumed_run_draws_the_same_directions():
    x = torch.randn(32, 16)
    torch.manual_seed(3); sigreg(x); kept = torch.get_rng_state(); want = sigreg(x)
    torch.manual_seed(9); torch.set_rng_state(kept)
    assert sigreg(x) == want != sigreg(x), "drawn anew at each call, and from the state that a checkpoint keeps"


def test_half_precision_does_not_overflow():
    x = torch.full((8, 16), 300.0, dtype=torch.float16) + torch.randn(8, 16).half()
    for kind in KINDS:
        loss = IsotropyLoss(Model(), kind, 1.0, std_weight=1.0).compute_loss_from_embeddings([x.requires_grad_()])
        assert loss.dtype == torch.float32 and torch.isfinite(loss), kind
        assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all(), kind


def test_what_overflowed_and_weights_that_are_none():
    x = torch.full((8, 16), float("inf"), dtype=torch.float16)
    with pytest.raises(InputError, match="an embedding is not finite: half precision overflows at 65,504; give precision=bf16 or fp32"): IsotropyLoss(Model()).compute_loss_from_embeddings([x])
    for weight, convex, says in ((-1.0, True, "from 0 to 1, not -1"), (1.5, True, "from 0 to 1, not 1.5"), (-1.0, False, "0 or more, not -1")):
        with pytest.raises(InputError, match=says): IsotropyLoss(Model(), weight=weight, convex=convex)


def test_training_in_bfloat16_leaves_the_sums_in_float32():
    x = torch.randn(32, 16)
    for kind in KINDS:
        loss = IsotropyLoss(Model(), kind, 1.0)
        torch.manual_seed(2); want = loss.compute_loss_from_embeddings([x])
        with torch.autocast("cpu", torch.bfloat16): torch.manual_seed(2); assert loss.compute_loss_from_embeddings([x]) == want, kind


@pytest.mark.parametrize("settings, says", [
    (dict(isotropy="sigreg", isotropy_weight=-0.1), "isotropy_weight must be at least 0, not -0.1"),
    (dict(isotropy="sigreg", isotropy_weight=1.2), "in the convex form λ is a share, from 0 to 1, not 1.2"),
    (dict(isotropy="sigreg", batch_size=3), "the shape of 3 texts says nothing"),
    (dict(std_weight=0.1, batch_size=2), "the shape of 2 texts says nothing"),
    (dict(isotropy_weight=0.1), "isotropy_weight: no regulariser reads it; give isotropy"),
    (dict(head_lr=1e-3), "head_lr: there is no head; give head"),
    (dict(isotropy="sigred"), "isotropy must be 'sigreg', 'covariance' or 'orthogonal'"),
])
def test_settings_that_make_no_sense(settings, says):
    with pytest.raises(InputError, match=says): make_config(**settings)


def test_a_head_wider_than_its_base_is_refused():
    model = load_model("minilm")
    add_head(model, 512)
    with pytest.raises(InputError, match="512 dimensions can't be filled from the 384 that its last layer reads"): _regulariser(model, make_config(head=512, isotropy="sigreg"))
    assert _regulariser(model, make_config(head=512)) is None
    assert _regulariser(load_model("minilm"), make_config(isotropy="sigreg")).scale == pytest.approx(384 ** 0.5), "MiniLM's embeddings have length 1"


def test_the_task_and_the_regulariser_see_the_same_embeddings():
    model, columns = Model(), [torch.randn(8, 16) for _ in range(2)]
    task = TrainingLoss(model).calculate_loss([[c] for c in columns])
    regulariser = IsotropyLoss(model, "covariance", 0.3)
    both = TrainingLoss(model, isotropy=regulariser)
    assert both.calculate_loss([[c] for c in columns]) == pytest.approx(0.7 * task.item() + 0.3 * regulariser.terms(columns)[0].item(), rel=1e-5)
    assert both.calculate_loss([[c[:4], c[4:]] for c in columns]) == pytest.approx(both.calculate_loss([[c] for c in columns]).item(), rel=1e-6), "a batch in pieces is the same batch"


def test_a_run_logs_task_and_regulariser_apart_and_starts_them_alike(tiny_model, toy, tmp_path):
    "With a regulariser or without, a head's embeddings start with a spread of 1, so that the first batch's task loss is the same; what is held against chance is that one."
    logs = {}
    for name, more in {"baseline": {}, "isotropic": dict(isotropy="sigreg", isotropy_form="added", isotropy_weight=1.0), "spread": dict(std_weight=0.1)}.items():
        cfg = make_config(batch_size=8, max_steps=3, head=16, head_hidden=48, unit_length=False, similarity="euclidean", temperature=1.0, precision="fp32", dropout=0.0, checks=1, lr=1e-4, **more)
        model = load_model(str(tiny_model))
        logs[name] = fit(model, training_sets([str(toy)]), cfg, tmp_path / name, [])
        assert np.std(model.encode(["a text", "another one", "and a third"])) > 0.3, "embeddings as they come"
    base, pushed, spread = logs.values()
    (_, task), = [points[0] for points in pushed.by_set.values()]
    assert task == pytest.approx(base.loss[0][1], rel=1e-4) and not base.by_set and not base.regular
    assert pushed.loss[0][1] == pytest.approx(task + pushed.regular[0][1], rel=1e-4) and len(pushed.regular) == 3
    assert spread.regular[0][1] < 0.1, "a standard deviation of 1, about"
    assert pushed.chance == base.chance > 0 and pushed.course()["regulariser"][0] == pytest.approx(pushed.regular[0][1], abs=1e-3)


def test_a_record_holds_the_rates_that_the_optimiser_used(tiny_model, toy, tmp_path):
    "The warm-up counts optimiser steps, for the base and for the head: the fault that let guide 001's runs stay at a tenth of their rate shows in the record."
    cfg = make_config(batch_size=8, max_steps=8, epochs=50, head=16, lr=1e-5, head_lr=5e-4, warmup=4, schedule="constant", precision="fp32", dropout=0.0, checks=1)
    course = fit(load_model(str(tiny_model)), training_sets([str(toy)]), cfg, tmp_path, []).course()
    for points, peak in ((course["rate"], 1e-5), (course["head_rate"], 5e-4)):
        assert [s for s, _ in points] == [*range(1, 9)]
        assert [v for _, v in points] == pytest.approx([peak * min(1, s / 4) for s in range(8)], rel=1e-2, abs=1e-12)


def test_figures_of_a_model_that_broke():
    x = np.ones((8, 4)); x[3, 1] = np.nan
    with pytest.raises(InputError, match="1 of 8 embeddings are not finite"): spectrum(x)
    flat = figures(np.ones((8, 4)))   # a collapse is measured, not an error
    assert flat["isoscore"] == 0 and flat["mean_cosine"] == pytest.approx(1) and flat["eigenvalue_ratio"] == 0
    rng = np.random.default_rng(1)
    got = measure(after=rng.standard_normal((50, 4)), before=rng.standard_normal((50, 8)), most=40)
    assert (got["n"], got["d"], {*got}) == (40, 4, {"before", "after", "gaussian", "gaussian_before", "n", "d"})
    assert got["gaussian_before"]["participation"] > got["gaussian"]["participation"], "a wider cloud has a ceiling of its own"
