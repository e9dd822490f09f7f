"Batches: no text twice, full, the same in every process, the same number in every epoch, and fast where texts repeat."
import subprocess
import sys

import numpy as np
import pytest
from torch.utils.data import DataLoader

from conftest import ROOT
from embedlab import batches as batches_module
from embedlab.batches import Batches, text_codes
from embedlab.config import InputError


def own(n: int, columns: int = 2) -> np.ndarray: return np.arange(n * columns).reshape(n, columns)   # no text twice


def hot(n: int, share: float) -> np.ndarray: return np.stack([np.arange(n), n + np.where(np.arange(n) < share * n, 0, np.arange(n))], 1)


def sets_of(batches: Batches, epoch: int) -> np.ndarray: return np.searchsorted(batches.starts[1:], [b[0] for b in batches.plan(epoch)], "right")


def check(batches: Batches, codes: list, epoch: int) -> np.ndarray:
    "Every promise about one epoch; returns its rows."
    rows, at = np.concatenate(codes), np.repeat(np.arange(len(codes)), [len(c) for c in codes])
    plan = batches.plan(epoch)
    for b in plan:
        assert len(b) == len(set(b.tolist())) == batches.batch_size and len(set(at[b])) == 1
        texts = [t for i in b for t in set(rows[i].tolist())]
        assert len(texts) == len(set(texts)), "a text stands in two rows of a batch"
    return np.concatenate(plan)


def test_texts_are_numbered_by_their_wording():
    a, b = text_codes(["A man runs.", "a MAN, runs", "no"], ["x", "No!", "no"]), text_codes(["no", "y"])
    assert a.shape == (3, 2) and a.dtype == np.int64
    assert a[0, 0] == a[1, 0] and a[1, 1] == a[2, 0] == a[2, 1] == b[0, 0], "across columns and calls"
    assert len(set(a.ravel().tolist()) | set(b.ravel().tolist())) == 4


@pytest.mark.parametrize("size, repeats", [(2, 3), (32, 3), (100, 5), (32, 38)])
def test_no_text_twice_and_all_full(size, repeats):
    rng = np.random.default_rng(0)
    codes = np.stack([np.arange(5000) // repeats, 10_000 + rng.integers(0, 3000, 5000), 10_000 + rng.integers(0, 3000, 5000)], 1)
    batches = Batches([codes], size)
    rows = check(batches, [codes], 1)
    assert len(rows) == len(set(rows.tolist())) and len(rows) > 0.95 * len(codes), "each row once, few left out"


def test_a_row_may_repeat_its_own_text():
    codes = np.stack([np.arange(64)] * 2, 1)
    assert len(Batches([codes], 32)) == 2


def test_a_frequent_text_is_spread():
    "One document in half of the rows: once in each batch is all that can be had, and all that can be is had."
    codes = hot(2000, 0.5)
    assert len(Batches([codes], 32)) == 1000 // 31
    twins = np.stack([np.arange(640), 640 + np.arange(640) % 320], 1)
    assert [len(Batches([twins], s)) for s in (32, 128, 320)] == [20, 5, 2]


def test_left_over_rows_change():
    codes = own(1000)
    batches = Batches([codes], 64)
    left = [set(range(1000)) - set(check(batches, [codes], e).tolist()) for e in range(3)]
    assert [len(x) for x in left] == [1000 % 64] * 3 and left[0] != left[1] != left[2]


def test_every_epoch_has_as_many_batches():
    rng = np.random.default_rng(1)
    codes = np.stack([np.arange(400) // 8, 1000 + rng.integers(0, 60, 400)], 1)
    for seed in range(10):
        batches = Batches([codes], 32, seed)
        filled = {len(batches._pass(0, e, 0)) for e in range(10)}
        if len(filled) > 1: break
    else: raise AssertionError("shuffles that fill different numbers of batches are what is tested here")
    for e in range(10): check(batches, [codes], e)
    assert {len(batches.plan(e)) for e in range(10)} == {len(batches)}


def test_a_plan_depends_on_nothing_but_its_numbers():
    batches = Batches([hot(500, 0.3), own(200)], 16, seed=3)
    late = [b.tolist() for b in batches.plan(7)]
    batches.plan(0); np.random.seed(1)
    assert [b.tolist() for b in Batches([hot(500, 0.3), own(200)], 16, seed=3).plan(7)] == late
    others = [Batches([hot(500, 0.3), own(200)], 16, seed=s).plan(e) for s, e in ((3, 6), (4, 7))]
    assert all([b.tolist() for b in p] != late for p in others)
    script = "import sys; sys.path.insert(0, 'tests'); from test_batches import *; print([b.tolist() for b in Batches([hot(500, 0.3), own(200)], 16, seed=3).plan(7)])"
    p = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert p.stdout.strip() == str(late), p.stderr


def test_a_plan_stays_what_it_was():
    "An interrupted run is resumed with newer versions too: the order must not change with NumPy's or this package's."
    assert [b.tolist() for b in Batches([own(6)], 2, seed=1).plan(2)] == [[3, 1], [0, 4], [5, 2]]
    assert [b.tolist() for b in Batches([own(6), own(4)], 2, mix="temperature").plan(0)] == [[4, 5], [9, 8], [7, 6], [2, 0], [3, 1]]


def test_proportional():
    codes = [own(n) for n in (640, 320, 70)]
    batches = Batches(codes, 32)
    assert len(batches) == 20 + 10 + 2
    for e in (0, 1):
        rows = check(batches, codes, e)
        assert len(set(rows.tolist())) == len(rows) and np.bincount(sets_of(batches, e)).tolist() == [20, 10, 2]
    assert (sets_of(batches, 0) != np.sort(sets_of(batches, 0))).any() and (sets_of(batches, 0) != sets_of(batches, 1)).any()


def test_round_robin():
    codes = [own(n) for n in (640, 320, 70)]
    batches = Batches(codes, 32, mix="round_robin")
    assert sets_of(batches, 1).tolist() == [0, 1, 2] * 2 and len(batches) == 6
    check(batches, codes, 1)
    seen = {int(i) for e in range(30) for b in batches.plan(e) for i in b if i < 640}
    assert len(seen) > 600, "other rows of the large sets in each epoch"


def test_in_order():
    codes = [own(n) for n in (640, 320, 70)]
    batches = Batches(codes, 32, mix="in_order")
    assert sets_of(batches, 1).tolist() == [0] * 20 + [1] * 10 + [2] * 2
    check(batches, codes, 1)


def test_temperature():
    sizes = [6400, 1600, 100]
    codes = [own(n) for n in sizes]
    for t in (1, 2, 50):
        batches = Batches(codes, 10, mix="temperature", temperature=t)
        assert len(batches) == 640 + 160 + 10
        share = np.mean([np.bincount(sets_of(batches, e), minlength=3) / 810 for e in range(10)], 0)
        wanted = np.array(sizes) ** (1 / t) / (np.array(sizes) ** (1 / t)).sum()
        assert np.abs(share - wanted).max() < 0.03
    rows = check(batches, codes, 0)
    small = rows[rows >= 8000]
    assert len(small) > 1000 and set(np.bincount(small - 8000).tolist()) <= {len(small) // 100, len(small) // 100 + 1}, "starts over only when it has run out"
    assert small[:100].tolist() != small[100:200].tolist(), "in another order"


def test_windows_sort_by_length():
    rng = np.random.default_rng(0)
    codes, lengths = own(960), rng.integers(5, 100, 960)
    spread = {w: np.mean([np.ptp(lengths[b]) for b in Batches([codes], 32, lengths=[lengths], window=w).plan(0)]) for w in (1, 5, 30)}
    assert spread[1] > 2 * spread[5] > 4 * spread[30]
    for e in (0, 1): assert len(set(check(Batches([codes], 32, lengths=[lengths], window=5), [codes], e).tolist())) == 960
    longest = [lengths[b].max() for b in Batches([codes], 32, lengths=[lengths], window=30).plan(0)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True), "lengths are sorted within batches, not over the epoch"
    with pytest.raises(InputError, match="sort_window is 5, but"): Batches([codes], 32, window=5)


def test_what_can_not_be_filled():
    with pytest.raises(InputError, match="^mine: 20 rows don't fill one batch of 32; lower batch_size or give more rows$"): Batches([own(64), own(20)], 32, names=["big", "mine"])
    with pytest.raises(InputError, match="^training set 1: its 100 rows don't fill one batch of 32 without a text that stands twice .the most frequent stands in 90."): Batches([hot(100, 0.9)], 32)


def test_as_a_batch_sampler():
    batches = Batches([own(100)], 10)
    loader = DataLoader(list(range(100)), batch_sampler=batches)
    first = [b.tolist() for b in loader]
    batches.set_epoch(1)
    assert len(loader) == len(first) == 10 and first == [b.tolist() for b in batches.plan(0)]
    assert [b.tolist() for b in loader] == [b.tolist() for b in batches.plan(1)] != first


@pytest.mark.parametrize("codes", [hot(20_000, 0.5), np.stack([np.arange(20_000), 20_000 + np.arange(20_000) % 100], 1), np.stack([np.arange(20_000) // 50, 20_000 + np.arange(20_000) * 7919 % 300], 1)], ids=["half", "a hundred", "both columns"])
def test_waiting_rows_are_not_looked_at_again_and_again(codes, monkeypatch):
    "With one list of waiting rows each batch would look at all of them: thousands of times as many looks as there are rows."
    held, looks = batches_module._held, []
    def counted(*args):
        for x in held(*args): looks.append(x); yield x
    monkeypatch.setattr(batches_module, "_held", counted)
    assert len(Batches([codes], 64)) > 100
    assert 0 < len(looks) < 3 * len(codes)
