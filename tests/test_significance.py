"Verdicts and intervals keep the rates they promise: 2,000 trials each, from the exported functions."
import json
import math

import numpy as np
import pytest
from scipy import stats

from embedlab.config import InputError
from embedlab.significance import (Delta, compare, correct, holm, leave_out, mean_interval, mean_of, over_seeds, resample, score, sign_flip,
                                   smallest_difference, wilson)

STEPS = np.r_[0, 1 / np.log2(np.arange(2, 12))]   # what one relevant document gives at each place


def steps(rng, n, trials, moved=0.35):
    "nDCG-like differences of two models that are equally good."
    before, after = STEPS[rng.integers(0, 11, (2, n, trials))]
    return np.where(rng.random((n, trials)) < moved, after - before, 0)


def ps_of(x, resamples=999):
    "p of each column; signs are shared in blocks of 50 only."
    return np.concatenate([sign_flip(b, resamples, i) for i, b in enumerate(np.array_split(x, 40, axis=1))])


def verdicts(trials, make, metric, **options):
    rng = np.random.default_rng(0)
    return np.mean([compare(b, a, metric, truth, **options).verdict != "within noise" for b, a, truth in (make(rng) for _ in range(trials))])


def pairs(n, metric):
    def make(rng):
        truth = rng.normal(size=n)
        b, a = truth + rng.normal(0, 0.7, (2, n))
        return b, a, (truth > 0.5).astype(int) if metric == "average-precision" else truth
    return make


def clusters(rng, n=300, classes=20):
    truth = rng.integers(0, classes, n)
    b, a = (np.where(rng.random(n) < 0.6, truth, rng.integers(0, classes, n)) for _ in range(2))
    return b, a, truth


@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("draw", ["normal", "standard_t"])
def test_no_difference_continuous(n, draw):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 2000)) if draw == "normal" else rng.standard_t(3, (n, 2000))
    assert abs(np.mean(ps_of(x) < 0.05) - 0.05) <= 0.015


@pytest.mark.parametrize("make", [lambda r, n: steps(r, n, 2000), lambda r, n: steps(r, n, 2000, moved=0.1), lambda r, n: r.choice([-1, 0, 1], (n, 2000), p=[0.1, 0.8, 0.1]),
                                  lambda r, n: np.subtract(*r.beta(0.5, 3, (2, n, 2000)))], ids=["steps", "rare steps", "0/1", "two skewed scores"])
def test_no_difference_ties_and_skew(make):
    "Two equal models differ symmetrically, however skewed and discrete their scores are."
    for n in (10, 30, 100): assert np.mean(ps_of(make(np.random.default_rng(n), n)) < 0.05) <= 0.06


def test_one_comparison_is_a_column_of_many():
    x = steps(np.random.default_rng(1), 12, 20)
    assert [compare(np.zeros(12), c).p for c in x.T] == pytest.approx(sign_flip(x).tolist(), abs=1e-12)


def test_scipys_exact_p():
    x = np.random.default_rng(2).normal(0.2, 0.5, (11, 8)).round(1)
    scipys = [stats.permutation_test((c,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue for c in x.T]
    assert sign_flip(x) == pytest.approx(scipys, abs=1e-12)


def test_float32_keeps_ties():
    "Scores read back from a record are float32; sums that tie must still tie."
    d = np.array([1 / 3, 1 / 3, -2 / 3, 1, 0.2, -0.2, 0.4, 0.1])
    b = np.random.default_rng(3).random(8)
    assert sign_flip((b + d).astype(np.float32).astype(float) - b.astype(np.float32)) == sign_flip(d)


@pytest.mark.parametrize("draw", ["normal", "laplace", "standard_t", "steps"])
def test_intervals_cover(draw):
    for n in (30, 100) if draw == "steps" else (30,):
        rng = np.random.default_rng(n)
        x = steps(rng, n, 2000) if draw == "steps" else rng.standard_t(3, (n, 2000)) if draw == "standard_t" else getattr(rng, draw)(size=(n, 2000))
        boots, jacks = resample(mean_of(x), n, 999), leave_out(mean_of(x), n)
        ends = np.array([mean_interval(x[:, i], boots[:, i], jacks[:, i]) for i in range(2000)])
        assert np.mean((ends[:, 0] <= 0) & (ends[:, 1] >= 0)) >= 0.93, n


def test_mcnemar_and_its_interval():
    rng, held, wrong = np.random.default_rng(4), 0, 0
    for _ in range(2000):
        easy = rng.random(100) < 0.7
        d = compare(*(np.where(rng.random(100) < 0.1, ~easy, easy) for _ in range(2)), "banking77/accuracy")
        held, wrong = held + (d.ci95[0] <= 0 <= d.ci95[1]), wrong + (d.verdict != "within noise")
    assert held >= 0.93 * 2000 and wrong <= 0.06 * 2000
    published = compare(np.r_[np.ones(36), np.zeros(12), np.ones(2)], np.r_[np.ones(48), np.zeros(2)], "accuracy")   # 36, 12, 2 and 0 of 50 (Newcombe 1998)
    assert published.ci95 == pytest.approx((0.0569, 0.3404), abs=1e-4)
    gained = compare(np.r_[np.zeros(9), np.ones(2), np.ones(10)], np.r_[np.ones(9), np.zeros(2), np.ones(10)], "accuracy")
    assert gained.test == "McNemar" and gained.p == pytest.approx(stats.binomtest(2, 11).pvalue) and gained.n == 21


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1] and holm([]) == []
    p = ps_of(np.random.default_rng(5).normal(size=(40, 36_000)), 1999).reshape(2000, 18)
    assert np.mean((p < 0.05).any(1)) > 0.5 and np.mean([min(holm(row)) < 0.05 for row in p]) <= 0.05
    got = correct({"a": Delta(0.1, (0.0, 0.2), 0.03, 50, "better"), "b": Delta(-0.1, (-0.2, 0.0), 0.001, 50, "worse"), "c": Delta(0, (-1.0, 1.0), 0.8, 50, "within noise")})
    assert [(d.verdict, round(d.p_holm, 3)) for d in got.values()] == [("within noise", 0.06), ("worse", 0.003), ("within noise", 0.8)]


def test_wilson():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4) and wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_the_smallest_difference_shows():
    rng = np.random.default_rng(6)
    for n in (30, 300):
        x = rng.normal(0, 0.2, (n, 2000)) + 0.2 * smallest_difference(np.r_[-1.0, 1.0]) / math.sqrt(n)
        assert 0.74 < np.mean((ps_of(x) < 0.05) & (x.mean(0) > 0)) < 0.85


@pytest.mark.parametrize("metric, library", [("stsb/spearman-dot", lambda t, x: stats.spearmanr(t, x)[0]), ("stsb/pearson", lambda t, x: stats.pearsonr(t, x)[0]),
                                             ("p/average-precision", "average_precision_score"), ("b/v-measure", "v_measure_score")])
def test_figures_that_are_no_means(metric, library):
    import sklearn.metrics
    rng = np.random.default_rng(7)
    f = getattr(sklearn.metrics, library) if isinstance(library, str) else library
    truth = rng.integers(0, 2 if "average" in metric else 6, 400)
    b, a = (np.round(truth + rng.normal(0, sd, 400), 0 if "v-" in metric else 1) for sd in (1.5, 0.5))
    d = compare(b, a, metric, truth)
    assert score(a, metric, truth) == pytest.approx(f(truth, a), abs=1e-9)
    assert d.mean == pytest.approx(f(truth, a) - f(truth, b), abs=1e-9) and d.ci95[0] < d.mean < d.ci95[1]
    assert d.verdict == "better" and compare(a, b, metric, truth).verdict == "worse" and compare(a, a, metric, truth).verdict == "within noise"


def test_a_correlations_p_and_interval_agree():
    rng, make = np.random.default_rng(8), pairs(60, "spearman")
    found = [compare(b, a + 0.3 * t, "spearman", t, resamples=499) for b, a, t in (make(rng) for _ in range(60))]
    clear = [d for d in found if abs(d.p - 0.05) > 0.01]
    assert {d.verdict for d in clear} == {"better", "within noise"}
    assert all((d.p < 0.05) == (not d.ci95[0] <= 0 <= d.ci95[1]) for d in clear)


def test_seeds():
    rng = np.random.default_rng(9)
    queries = rng.normal(0, 0.15, 300)
    runs = lambda gain, spread: gain + queries + rng.permutation(np.linspace(-spread, spread, 3))[:, None] + rng.normal(0, 0.05, (3, 300))
    wide, steady = over_seeds(np.zeros(300), runs(0.04, 0.06)), over_seeds(np.zeros((3, 300)), runs(0.04, 0.005))
    assert compare(np.zeros(300), runs(0.04, 0.06).mean(0)).verdict == "better", "by the queries alone"
    assert (wide.verdict, steady.verdict, steady.seeds, steady.n) == ("within noise", "better", 3, 300) and wide.smallest > 3 * steady.smallest
    assert wide.ci95[0] < 0 < steady.ci95[0] and wide.p > 0.05
    one = over_seeds(np.zeros(300), runs(0.04, 0.005)[:1])
    assert one.seeds == 1 and "spread is unknown" in one.test


def test_records_are_json():
    t = np.arange(20) % 5
    for d in (compare([0.1], [0.9]), compare(np.zeros(20), np.full(20, 0.1)), compare(t, t, "a/spearman", t), compare(t > 2, t > 1, "a/accuracy"), over_seeds(np.zeros(20), np.ones((3, 20)))):
        text = json.dumps(d.record(), allow_nan=False)
        assert set(json.loads(text)) == {"mean", "ci95", "p", "n", "verdict", "smallest", "test", "p_holm", "seeds"}
    assert compare([0.1], [0.9]).record() == {"mean": 0.8, "ci95": [0.8, 0.8], "p": 1.0, "n": 1, "verdict": "within noise", "smallest": None, "test": "none: one query", "p_holm": None, "seeds": 1}
    assert compare(np.zeros(20), np.zeros(20)).verdict == "within noise" and compare(np.zeros(20), np.full(20, 0.1)).verdict == "better"


@pytest.mark.parametrize("call, line", [
    (lambda: compare([0.1, math.nan], [0.2, 0.3]), "1 of 2 scores are not finite; a failed run can't be compared"),
    (lambda: compare([0.1, 0.2, 0.3], [0.2]), "got 3 and 1 scores"),
    (lambda: compare([], []), "of one query at least are needed"),
    (lambda: compare(["x"], ["y"]), "must be numbers"),
    (lambda: compare([1, 2], [2, 1], "stsb/spearman"), "spearman needs the gold values"),
    (lambda: compare([1, 2], [2, 1], "stsb/spearman", [1, 2, 3]), "2 values and 3 gold values"),
    (lambda: compare([1, 2], [1, 1], "stsb/pearson", [1, 2]), "a constant answer is a failed run"),
    (lambda: compare([1, 2], [2, 1], "p/average-precision", [1, 2]), "the gold labels 0 and 1, both of them; got [1.0, 2.0]"),
    (lambda: compare([1, 0.5], [1, 0], "a/accuracy"), "1 where right and 0 where wrong"),
    (lambda: score([0.1, math.inf]), "1 of 2 scores are not finite"),
    (lambda: over_seeds(np.zeros((2, 5)), np.zeros((3, 5))), "got (seeds, queries) (2, 5) and (3, 5)"),
    (lambda: wilson(3, 2), "3 of 2 is not a share"),
    (lambda: holm([0.1, math.nan]), "p-values lie between 0 and 1"),
])
def test_bad_input(call, line):
    with pytest.raises(InputError) as e: call()
    assert line in str(e.value) and "\n" not in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["spearman", "pearson", "average-precision"])
def test_no_difference_of_correlations(metric):
    assert verdicts(2000, pairs(100, metric), metric, resamples=499) <= 0.07


@pytest.mark.slow
def test_no_difference_of_clusters():
    assert verdicts(2000, clusters, "v-measure") <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("seeds, spread", [(3, 0), (3, 0.02), (10, 0.03)])
def test_no_difference_over_seeds(seeds, spread):
    "Where seeds and queries weigh alike, the larger of two p-values alone is wrong in 12 % with ten seeds."
    rng = np.random.default_rng(10)
    runs = lambda: rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.15, 300) + rng.normal(0, 0.1, (seeds, 300))
    found = [over_seeds(np.zeros(300), runs(), resamples=499) for _ in range(2000)]
    assert np.mean([d.p < 0.05 for d in found]) <= 0.06
    assert np.mean([d.ci95[0] <= 0 <= d.ci95[1] for d in found]) >= 0.93
