"The loss across a batch, its pieces, its processes and its widths: always the gradients of the whole batch."
import json
import os
import subprocess
import sys

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import DataCollatorWithFlattening

from conftest import ROOT
from embedlab.config import InputError
from embedlab.losses import ContrastiveLoss, info_nce, join

BATCH = 32
LABELS = torch.tensor([[i // 2, i // 3] for i in range(BATCH)])                # neighbours share queries and documents
KNOWN = LABELS.tolist() + [[i, i + 1] for i in range(10)]
COLLATE = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)


class Bag(nn.Module):
    "Averages the vectors of a text's tokens; reads padded and packed columns, and counts its passes."
    def __init__(self, p=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.drop, self.mix, self.pool, self.passes = nn.Embedding(60, 16), nn.Dropout(p), nn.Linear(16, 16), Pooling(16, "mean"), 0
    def forward(self, f):
        self.passes += 1
        return self.pool({**f, "token_embeddings": self.mix(self.drop(self.words(f["input_ids"])))})
    def get_embedding_dimension(self): return 16


def texts(columns: int) -> list[list[list[int]]]:
    "Texts of 1 to 9 tokens, `BATCH` in each column."
    g = torch.Generator().manual_seed(7)
    return [[torch.randint(1, 60, (int(torch.randint(1, 10, (), generator=g)),), generator=g).tolist() for _ in range(BATCH)] for _ in range(columns)]


def features(col: list[list[int]], packed: bool) -> dict:
    if packed: return {k: v for k, v in COLLATE([{"input_ids": t} for t in col]).items() if k != "labels"}
    longest = max(map(len, col))
    return {"input_ids": torch.tensor([t + [0] * (longest - len(t)) for t in col]),
            "attention_mask": torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in col])}


def gradient(model: nn.Module, make) -> torch.Tensor:
    model.zero_grad()
    torch.manual_seed(3)
    make().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def off(got, want) -> float: return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("micro", [4, 8, 32])
def test_pieces_give_the_gradient_of_the_whole_batch(columns, packed, micro):
    bag, cols = Bag(), texts(columns)
    batch = lambda: [features(c, packed) for c in cols]
    want = gradient(bag, lambda: ContrastiveLoss(bag, labels=KNOWN, widths=[8])(batch(), LABELS))
    plain = bag.passes
    assert plain == (1 if packed else columns)                                 # packed columns are read in one pass
    loss = ContrastiveLoss(bag, labels=KNOWN, widths=[8], micro_batch=micro)
    assert off(gradient(bag, lambda: loss(batch(), LABELS)), want) < 1e-4
    assert bag.passes - plain == (plain if micro == BATCH else 2 * columns * BATCH // micro)
    assert loss.masked > 0 and off(gradient(bag, lambda: ContrastiveLoss(bag, widths=[8])(batch(), LABELS)), want) > 1e-2   # the mask is part of it


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("micro", [4, 8])
def test_dropout_is_replayed(packed, micro):
    bag, cols = Bag(p=0.3), texts(3)
    loss = ContrastiveLoss(bag, labels=KNOWN, micro_batch=micro)
    def kept():   # the same pieces in the same order, with all activations in memory
        reps = [[bag(features(c[i:i + micro], packed))["sentence_embedding"] for i in range(0, BATCH, micro)] for c in cols]
        return loss.calculate_loss(reps, LABELS)
    want = gradient(bag, kept)
    assert off(gradient(bag, lambda: loss([features(c, packed) for c in cols], LABELS)), want) < 1e-4
    bag.drop.p = 0.0
    assert off(gradient(bag, kept), want) > 1e-2                               # dropout did something


def test_a_real_encoder_in_pieces(tiny_model):
    model = SentenceTransformer(str(tiny_model), device="cpu").train()
    words = "bold calm dark fast green loud odd pale quick warm bird boat city door fish hill".split()
    cols = [[" ".join(words[(i * k + j) % 16] for j in range(2 + (i + k) % 7)) for i in range(BATCH)] for k in (1, 3)]
    batch = lambda: [model.preprocess(c) for c in cols]
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.0
    want = gradient(model, lambda: ContrastiveLoss(model)(batch()))
    for micro in (4, 8, 32):
        assert off(gradient(model, lambda: ContrastiveLoss(model, micro_batch=micro)(batch())), want) < 1e-4


def test_a_scaled_loss_scales_the_gradients_and_pieces_may_shrink_between_steps():
    bag, cols = Bag(), texts(2)
    loss = ContrastiveLoss(bag, micro_batch=16)
    batch = lambda: [features(c, False) for c in cols]
    want = gradient(bag, lambda: loss(batch()))
    loss.micro_batch = 4
    assert loss.get_config_dict()["micro_batch"] == 4
    assert off(gradient(bag, lambda: loss(batch()) / 4), want / 4) < 1e-4


def test_evaluation_in_pieces_needs_no_gradient():
    bag, batch = Bag(), [features(c, False) for c in texts(2)]
    with torch.no_grad(): got = ContrastiveLoss(bag, micro_batch=4)(batch)
    assert got.item() == pytest.approx(ContrastiveLoss(bag)(batch).item(), rel=1e-6) and not got.requires_grad


def test_widths_are_matryoshka():
    bag, cols = Bag(), texts(3)
    batch = lambda: [features(c, False) for c in cols]
    lib = MatryoshkaLoss(bag, MultipleNegativesRankingLoss(bag), [16, 8, 4])
    want = gradient(bag, lambda: lib(batch(), None)) / 3                        # the library sums
    assert off(gradient(bag, lambda: ContrastiveLoss(bag, widths=[8, 4])(batch())), want) < 1e-5
    wrapped = [MatryoshkaLoss(bag, ContrastiveLoss(bag, micro_batch=m), [16, 8, 4]) for m in (None, 8)]   # and takes ours for one of its own
    for w in wrapped: assert off(gradient(bag, lambda: w(batch(), None)), want * 3) < 1e-5
    with pytest.raises(InputError, match="width 17 is more than the model's 16"): ContrastiveLoss(bag, widths=[4, 17])


def test_joined_columns_are_one_column():
    a, b, c = texts(3)
    got, want = join([features(x, True) for x in (a, b, c)]), features(a + b + c, True)
    assert got.keys() == want.keys()
    for k, v in want.items():
        assert torch.equal(got[k], v) and got[k].dtype == v.dtype if isinstance(v, torch.Tensor) else got[k] == v


def test_columns_with_prompts_to_leave_out_are_read_one_by_one():
    bag = Bag()
    ContrastiveLoss(bag)([{**features(c, True), "prompt_length": n} for n, c in enumerate(texts(2))])
    assert bag.passes == 2


def test_mask_knows_every_pair_and_no_other():
    g = torch.Generator().manual_seed(0)
    known, labels = torch.randint(40, (300, 2), generator=g), torch.randint(45, (64, 2), generator=g)   # some numbers are in no known pair
    relevant = {tuple(p) for p in known.tolist()}
    got = ContrastiveLoss(Bag(), labels=known.tolist()).mask(labels, labels[:, 1])
    assert got.tolist() == [[(q, d) in relevant for d in labels[:, 1].tolist()] for q in labels[:, 0].tolist()]
    assert len(ContrastiveLoss(Bag(), labels=known.tolist() * 2).known) == len(relevant)


def test_positives_may_stand_anywhere_in_line():
    q, d = torch.randn(2, 8, 16)
    mask = torch.eye(8, dtype=torch.bool).roll(3, 1) | torch.eye(8, dtype=torch.bool)
    want = torch.stack([info_nce(q[i:i + 4], d.roll(-i, 0), mask=mask[i:i + 4].roll(-i, 1)) for i in (0, 4)])
    assert torch.allclose(torch.stack([info_nce(q[i:i + 4], d, mask=mask[i:i + 4], first=i) for i in (0, 4)]), want)


WORKER = """
import json, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from embedlab.losses import ContrastiveLoss
from test_losses import BATCH, Bag, KNOWN, LABELS, features, texts
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mine, out = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2), {}
for name, packed, columns, micro in json.loads(sys.argv[3]):
    model = DDP(Bag())
    loss = ContrastiveLoss(model, labels=KNOWN, micro_batch=micro, gather=True)
    got = loss([features(c[mine], packed) for c in texts(columns)], LABELS[mine])
    got.backward()
    mean = got.detach().clone(); dist.all_reduce(mean)
    out[name] = (mean / 2).item(), torch.cat([p.grad.flatten() for p in model.parameters()]), loss.masked
torch.save(out, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path):
    cases = [(f"{packed}-{columns}-{micro}", packed, columns, micro) for packed, columns, micro in ((False, 2, None), (False, 4, 4), (True, 3, None), (True, 2, 8))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    both = [subprocess.Popen([sys.executable, "-c", WORKER, str(r), str(tmp_path), json.dumps(cases)], env=env, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    for p in both: assert p.wait(timeout=300) == 0, p.stderr.read()
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in (0, 1)]
    for name, packed, columns, _ in cases:
        bag = Bag()
        loss = ContrastiveLoss(bag, labels=KNOWN)
        whole = []
        want = gradient(bag, lambda: whole.append(loss([features(c, packed) for c in texts(columns)], LABELS)) or whole[0])
        for got, grad, _ in (r[name] for r in ranks):
            assert got == pytest.approx(whole[0].item(), rel=1e-5) and off(grad, want) < 1e-5, name
        assert sum(r[name][2] for r in ranks) == loss.masked


def test_a_batch_is_left_as_it_was(tiny_model):
    "Modules write into what they are given; a batch that is tried again must not hold what the first try left."
    from embedlab.losses import ContrastiveLoss
    from embedlab.models import load_model
    model = load_model(str(tiny_model))
    features = [dict(model.preprocess(t)) for t in (["red door", "blue house"], ["a door that is red", "a house that is blue"])]
    before = [{*f} for f in features]
    loss = ContrastiveLoss(model)
    first = float(loss(features))
    assert [{*f} for f in features] == before and float(loss(features)) == first
