"""cadetlib.metrics against fractions, loops, scikit-learn and known distributions."""

from __future__ import annotations

import doctest
import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from cadetlib import metrics

STATISTICS = (metrics.auroc, metrics.aupr, metrics.fpr_at_tpr)
scores = st.lists(st.integers(-4, 4).map(lambda k: k / 4), min_size=1, max_size=25).map(np.array)  # few values: many ties
steady = settings(deadline=None, derandomize=True)  # the same examples on every machine, however busy
tprs = st.integers(1, 100).map(lambda k: Fraction(k, 100))


def fraction_auroc(in_scores, out_scores) -> Fraction:
    wins = [Fraction(int(a > b)) + Fraction(int(a == b), 2) for a in in_scores for b in out_scores]
    return sum(wins, Fraction(0)) / len(wins)


def fraction_fpr(in_scores, out_scores, tpr: Fraction) -> Fraction:
    """The definition, with exact shares: the largest of all thresholds that accepts enough."""
    accepts = [t for t in in_scores if Fraction(sum(int(a >= t) for a in in_scores), len(in_scores)) >= tpr]
    return Fraction(sum(int(b >= max(accepts)) for b in out_scores), len(out_scores))


def sklearn_auroc(in_scores, out_scores) -> float:
    labels = np.repeat([1, 0], [len(in_scores), len(out_scores)])
    return roc_auc_score(labels, np.concatenate([in_scores, out_scores]))


def sklearn_aupr(in_scores, out_scores, positive="out") -> float:
    labels = np.repeat([1, 0], [len(in_scores), len(out_scores)])
    values = np.concatenate([in_scores, out_scores])
    return average_precision_score(labels, values) if positive == "in" else average_precision_score(1 - labels, -values)


def binormal(rng: np.random.Generator, n: int, m: int, shift: float = 1.0):
    """Scores whose AUROC is Phi(shift / sqrt 2)."""
    return rng.normal(shift, size=n), rng.normal(size=m)


@steady
@given(scores, scores, tprs)
def test_statistics_equal_their_definitions(a, b, tpr):
    assert metrics.auroc(a, b) == float(fraction_auroc(a, b))
    assert metrics.fpr_at_tpr(a, b, float(tpr)) == float(fraction_fpr(a, b, tpr))
    for positive in ("in", "out"):
        assert metrics.aupr(a, b, positive) == pytest.approx(sklearn_aupr(a, b, positive), abs=1e-12)


@steady
@given(scores, scores)
def test_swapping_kinds_and_monotone_transforms(a, b):
    assert metrics.auroc(a, b) == pytest.approx(1 - metrics.auroc(b, a), abs=1e-15)
    for statistic in STATISTICS:
        assert statistic(np.exp(3 * a), np.exp(3 * b)) == statistic(a, b)


@steady
@given(scores, scores)
def test_roc_curve_is_what_its_thresholds_do_and_has_the_area(a, b):
    curve = metrics.roc_curve(a, b)
    for x, y, t in zip(*curve, strict=True):
        assert (x, y) == ((a < t).mean(), (b < t).mean())
    assert (curve.false_alarm_rate[0], curve.detection_rate[-1], curve.false_alarm_rate[-1]) == (0, 1, 1)
    assert len(curve.threshold) == len(set(a) | set(b)) + 1
    assert np.trapezoid(curve.detection_rate, curve.false_alarm_rate) == pytest.approx(metrics.auroc(a, b), abs=1e-14)


@pytest.mark.parametrize(("tpr", "n", "accepted"), [(0.07, 100, 7), (0.1 + 0.2, 10, 3), (0.95, 20, 19), (0.951, 1000, 951)])
def test_fpr_at_tpr_is_not_moved_by_rounding_of_the_share(tpr, n, accepted):
    assert metrics.fpr_at_tpr(np.arange(n), np.arange(n) + 0.5, tpr) == accepted / n


def test_any_kind_of_input_gives_the_same_number():
    a, b = torch.tensor([0.5, 0.25, 1.0], dtype=torch.bfloat16, requires_grad=True), torch.tensor([0.25, 0.0])
    expected = metrics.auroc([0.5, 0.25, 1.0], [0.25, 0.0])
    assert type(expected) is float and expected == 5.5 / 6
    assert metrics.auroc(a, b) == metrics.auroc(a.detach().double().numpy()[::-1], b.numpy()) == expected


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (metrics.auroc, sklearn_auroc),
        (metrics.aupr, sklearn_aupr),
        (functools.partial(metrics.aupr, positive="in"), functools.partial(sklearn_aupr, positive="in")),
        (functools.partial(metrics.fpr_at_tpr, tpr=0.8), lambda a, b: float(fraction_fpr(a, b, Fraction(4, 5)))),
    ],
)
@pytest.mark.parametrize("paired", [False, True])
def test_batched_bootstrap_equals_a_loop_over_replicates(ours, reference, paired, monkeypatch):
    rng = np.random.default_rng(0)
    a, b = (np.round(s, 1) for s in binormal(rng, 40, 40 if paired else 25))
    arguments = {"level": 0.8, "n_boot": 60, "seed": 3, "paired": paired}
    batched = metrics.bootstrap_interval(a, b, ours, **arguments)
    assert metrics._kernel(ours) is not None and metrics._kernel(reference) is None
    assert batched == pytest.approx(metrics.bootstrap_interval(a, b, reference, **arguments), abs=1e-12)
    monkeypatch.setattr(metrics, "_MAX_BYTES", 8 * 65 * 7)
    assert metrics.bootstrap_interval(a, b, ours, **arguments) == batched
    assert metrics.bootstrap_interval(a, b, ours, **{**arguments, "seed": 4}) != batched


def test_bootstrap_interval_covers_a_known_auroc():
    rng = np.random.default_rng(1)
    truth, n_runs = stats.norm.cdf(1 / math.sqrt(2)), 400
    intervals = [metrics.bootstrap_interval(*binormal(rng, 80, 60), level=0.9, n_boot=300, seed=k) for k in range(n_runs)]
    covered = sum(low <= truth <= high for low, high in intervals)
    assert 0.85 < covered / n_runs < 0.95  # 90 %, with a standard error of 1.5 %


def attacked(rng, n, together, shift):
    """Scores of images and of their attacks, which go together, and the AUROC of an image and another one's attack."""
    clean = rng.normal(size=n)
    moved = together * clean + math.sqrt(1 - together**2) * rng.normal(size=n) - shift
    return clean, moved, stats.norm.cdf(shift / math.sqrt(2))


@pytest.mark.parametrize(("n", "narrower"), [(10, 0.7), (60, 0.5)])
def test_a_paired_interval_covers_and_is_narrow(n, narrower):
    """Drawn apart, the interval would always cover. Without its correction, the one of ten images covers 86 in 100."""
    rng, n_runs = np.random.default_rng(6), 800
    covered, apart_covered, width, apart_width = 0, 0, 0.0, 0.0
    for run in range(n_runs):
        clean, moved, truth = attacked(rng, n, together=0.9, shift=0.4)
        low, high = metrics.bootstrap_interval(clean, moved, level=0.9, n_boot=200, seed=run, paired=True)
        apart = metrics.bootstrap_interval(clean, moved, level=0.9, n_boot=200, seed=run)
        covered, apart_covered = covered + (low <= truth <= high), apart_covered + (apart.low <= truth <= apart.high)
        width, apart_width = width + high - low, apart_width + apart.high - apart.low
    assert 0.87 < covered / n_runs < 0.95  # 90 %, with a standard error of 1.1 %
    assert apart_covered / n_runs > 0.99
    assert width < narrower * apart_width


@pytest.mark.parametrize("fitting", [0.0, 0.2])
def test_splits_interval_covers_the_draw_of_fitting_images_too(fitting):
    """What is fitted moves all anomalies of a split, by so many standard deviations of the scores."""
    rng, n_runs, n_splits = np.random.default_rng(8), 300, 3
    truth = stats.norm.cdf(0.1 / math.sqrt(2 + fitting**2))
    covered, of_images, width = 0, 0, 0.0
    for run in range(n_runs):
        clean, moved, _ = attacked(rng, 250, together=0.9, shift=0.1)
        tested = [rng.permutation(250)[:200] for _ in range(n_splits)]
        pairs = [(clean[i], moved[i] - fitting * rng.normal()) for i in tested]
        found = metrics.splits_interval(pairs, n_boot=100, seed=run, paired=True)
        covered, width = covered + (found.low <= truth <= found.high), width + found.high - found.low
        alone = metrics.bootstrap_interval(*pairs[0], n_boot=100, seed=run, paired=True)
        of_images += abs(found.mean - truth) < (alone.high - alone.low) / 2
    assert 0.88 < covered / n_runs  # 95 %, three splits tell that little, with a standard error of 1.3 %
    assert (of_images / n_runs < 0.6) == (fitting > 0)  # what the draw of test images alone would do: the simulation can tell
    assert fitting or width / n_runs < 0.06  # 0.11 when images and attacks are drawn apart


@pytest.mark.parametrize("fitted", [None, 0.25])
def test_the_draw_of_fitting_images_adds_what_the_docstring_says(fitted):
    """Worked out again from the interval of test images alone: variances add, and Satterthwaite's t takes the normal's place."""
    rng = np.random.default_rng(11)
    pairs = [binormal(rng, 30, 30) for _ in range(4)]
    values = np.array([metrics.auroc(*pair) for pair in pairs])
    of_test, found = (metrics.splits_interval(pairs, n_boot=200, fitted=f) for f in (0.0, fitted))
    added = sum((v - values.mean()) ** 2 for v in values) / 3 * (1 / 4 + (1 / 3 if fitted else 0))
    variance = ((of_test.high - of_test.low) / 2 / 1.959964) ** 2 + added
    half = stats.t(3 * (variance / added) ** 2).ppf(0.975) * variance**0.5
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-6)
    above, below = of_test.high - of_test.mean, of_test.mean - of_test.low
    assert (found.high - found.mean) / (found.mean - found.low) == pytest.approx(above / below)  # as lopsided as it was


def test_splits_interval_covers_where_independence_of_splits_would_not():
    rng = np.random.default_rng(2)
    truth, n_runs, n_splits = stats.norm.cdf(1 / math.sqrt(2)), 200, 5
    covered, narrow_covered = 0, 0
    for run in range(n_runs):
        pool, out_scores = binormal(rng, 100, 60)
        pairs = [(rng.permutation(pool)[:70], out_scores) for _ in range(n_splits)]
        found = metrics.splits_interval(pairs, n_boot=200, seed=run)
        covered += found.low <= truth <= found.high
        half = (found.high - found.low) / 2 / math.sqrt(n_splits)
        narrow_covered += abs(found.mean - truth) <= half
    assert covered / n_runs > 0.91
    assert narrow_covered / n_runs < 0.8  # what an interval of independent splits would do: the simulation can tell


def pool_of_splits(rng, n_pool, n_fitted, n_splits):
    """Splits of one pool of images with two features, and their attacks; scores weigh the second by the fitting images' mean.

    So a few fitting images decide how well a whole split does, as X_val(1) does for CADet with some encoders.
    """
    clean = rng.normal([0, 1], 1, size=(n_pool, 2))
    moved = 0.99 * clean + math.sqrt(1 - 0.99**2) * rng.normal(size=(n_pool, 2)) - [-0.3, 0.8]
    pairs, images = [], []
    for _ in range(n_splits):
        order = rng.permutation(n_pool)
        fitted, tested = order[:n_fitted], order[n_fitted:]
        scores = [x[tested] @ [1, 0.7 * clean[fitted, 1].mean()] for x in (clean, moved)]
        pairs.append(tuple(scores))
        images.append((tested, tested))
    return pairs, images


def test_splits_of_one_pool_share_fitting_images_and_the_interval_knows():
    """Ten splits that fit on a fifth of one pool each. Taken for ten draws of their own, they would seem to tell much more."""
    rng, n_runs = np.random.default_rng(13), 300
    truth = np.mean([metrics.auroc(*pool_of_splits(rng, 2020, 20, 1)[0][0]) for _ in range(600)])
    covered, as_if_apart = 0, 0
    for run in range(n_runs):
        pairs, images = pool_of_splits(rng, 100, 20, 10)
        low, high = metrics.splits_interval(pairs, n_boot=100, seed=run, images=images, fitted=0.2)[1:3]
        covered += low <= truth <= high
        low, high = metrics.splits_interval(pairs, n_boot=100, seed=run, images=images)[1:3]
        as_if_apart += low <= truth <= high
    assert 0.91 < covered / n_runs  # 95 %
    assert as_if_apart / n_runs < 0.85


def test_splits_that_test_the_same_images_tell_as_much_as_their_images():
    """Nothing fitted. Twenty splits have tested all hundred images; each alone knows thirty, and so does the mean of theirs."""
    rng, n_runs, covered, width, apart = np.random.default_rng(14), 200, 0, 0.0, 0.0
    truth = stats.norm.cdf(0.3 / math.sqrt(2))
    for run in range(n_runs):
        clean, moved, _ = attacked(rng, 100, together=0.9, shift=0.3)
        tested = [rng.permutation(100)[:30] for _ in range(20)]
        pairs, images = [(clean[i], moved[i]) for i in tested], [(i, i) for i in tested]
        found = metrics.splits_interval(pairs, n_boot=100, seed=run, images=images, fitted=0)
        covered, width = covered + (found.low <= truth <= found.high), width + found.high - found.low
        one_by_one = metrics.splits_interval(pairs, n_boot=100, seed=run, paired=True, fitted=0)
        apart += one_by_one.high - one_by_one.low
    assert 0.9 < covered / n_runs
    assert width < 0.7 * apart


@pytest.mark.parametrize("statistic", [metrics.auroc, metrics.aupr, metrics.fpr_at_tpr])
def test_images_drawn_for_all_splits_equal_a_loop_over_replicates(statistic):
    """Two splits with an image of each other and one they share, an attack made from each, and an anomaly of neither."""
    rng = np.random.default_rng(15)
    images = [(np.array([4, 0, 2]), np.array([4, 0, -1])), (np.array([7, 4]), np.array([-1, 7, 4]))]
    pairs = [tuple(np.round(rng.normal(size=len(some)), 1) for some in both) for both in images]
    found = metrics._replicates(statistic, pairs, images, 200, seed=3)
    sample, others = [0, 2, 4, 7], [-1]
    draws = [np.random.default_rng([3, kind]).integers(n, size=(200, n)) for kind, n in ((0, 4), (1, 1))]
    for b in range(200):
        drawn = [sample[i] for i in draws[0][b]] + [others[i] for i in draws[1][b]]
        for k, (pair, of) in enumerate(zip(pairs, images, strict=True)):
            chosen = [[x for i in drawn for x, image in zip(scores, some, strict=True) if image == i]
                      for scores, some in zip(pair, of, strict=True)]  # fmt: skip
            expected = statistic(*chosen) if all(chosen) else math.nan
            assert found[k, b] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(found).any() and not np.isnan(found).all(axis=0).all()
    low, high = metrics.splits_interval(pairs, statistic, n_boot=200, seed=3, images=images, fitted=0)[1:3]
    assert low <= np.mean([statistic(*pair) for pair in pairs]) <= high


def test_one_split_with_its_images_is_the_bootstrap_of_its_pair():
    rng = np.random.default_rng(16)
    for paired in (True, False):
        a, b = binormal(rng, 30, 30)
        images = [(np.arange(30), np.arange(30) + (0 if paired else 30))]
        found = metrics.splits_interval([(a, b)], n_boot=90, images=images, fitted=0.2)
        assert (found.low, found.high) == metrics.bootstrap_interval(a, b, n_boot=90, paired=paired)


def test_splits_interval_reports_the_mean_and_the_spread():
    rng = np.random.default_rng(3)
    pairs = [binormal(rng, 30, 20) for _ in range(4)]
    values = [sklearn_auroc(*pair) for pair in pairs]
    found = metrics.splits_interval(pairs, n_boot=50)
    expected = (np.mean(values), np.std(values, ddof=1), min(values), max(values))
    assert (found.mean, found.standard_deviation, found.minimum, found.maximum) == pytest.approx(expected)
    alone = metrics.splits_interval(pairs[:1], n_boot=50)
    assert (alone.low, alone.high) == metrics.bootstrap_interval(*pairs[0], n_boot=50)
    assert math.isnan(alone.standard_deviation)


def direct_delong(in_a, out_a, in_b, out_b, paired=False):
    """DeLong et al. 1988, Eqs. 4 to 7, written out over all pairs; paired: Obuchowski 1997, an image and its attack a cluster."""
    kernels = [
        np.array([[float(x > y) + 0.5 * float(x == y) for y in outs] for x in ins])
        for ins, outs in ((in_a, out_a), (in_b, out_b))
    ]
    n, m = kernels[0].shape
    s10 = np.cov([k.mean(axis=1) for k in kernels])
    s01 = np.cov([k.mean(axis=0) for k in kernels])
    s = s10 / n + s01 / m
    if paired:
        both = [np.cov(k.mean(axis=1), other.mean(axis=0))[0, 1] for k in kernels for other in kernels]
        s11 = np.array(both).reshape(2, 2)
        s = s + (s11 + s11.T) / n
    difference = kernels[0].mean() - kernels[1].mean()
    return difference, math.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])


def two_detectors(seed: int, n: int, m: int, digits: int):
    rng = np.random.default_rng(seed)
    in_a, out_a = binormal(rng, n, m)
    in_b, out_b = in_a + rng.normal(0.1, 0.8, n), out_a + rng.normal(0, 0.8, m)
    return [np.round(s, digits) for s in (in_a, out_a, in_b, out_b)]


@steady
@given(st.integers(0, 2**32), st.integers(3, 30), st.integers(3, 30), st.integers(0, 3), st.booleans())
def test_delong_equals_the_formula_over_all_pairs(seed, n, m, digits, paired):
    samples = two_detectors(seed, n, n if paired else m, digits)
    difference, deviation = direct_delong(*samples, paired)
    found = metrics.delong_test(*samples, paired=paired)
    assert found.difference == pytest.approx(difference, abs=1e-12)
    if deviation > 1e-9:
        assert found.p_value == pytest.approx(math.erfc(abs(difference) / deviation / math.sqrt(2)), abs=1e-9)


def test_delong_without_variance_is_a_sign_test():
    """Of three images of each kind all are placed differently by a third: 1 - 2/3 and 2/3 - 1/3 are the same but for rounding."""
    samples = [1.5, 2.5, 3.5], [1.0, 2.0, 3.0], [0.5, 1.5, 2.5], [1.0, 2.0, 3.0]
    assert metrics.delong_test(*samples) == (pytest.approx(1 / 3), 2.0**-5)
    assert metrics.delong_test(*samples, paired=True) == (pytest.approx(1 / 3), 2.0**-2)


def test_paired_difference_agrees_with_delong():
    samples = two_detectors(7, 150, 120, 1)
    difference, deviation = direct_delong(*samples)
    found = metrics.paired_difference(*samples, n_boot=2000)
    assert found.difference == pytest.approx(difference)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.08)  # unpaired draws would give twice this
    assert found.low < difference < found.high
    assert found.p_value == pytest.approx(metrics.delong_test(*samples).p_value, abs=0.03)
    swapped = metrics.paired_difference(*samples[2:], *samples[:2], n_boot=2000)
    assert (swapped.low, swapped.p_value) == pytest.approx((-found.high, found.p_value))


def test_a_difference_of_paired_scores_is_as_sure_as_paired_delong_says():
    rng = np.random.default_rng(9)
    clean, moved, _ = attacked(rng, 200, together=0.9, shift=0.3)
    of_image = rng.normal(0, 0.5, 200)  # what detector b makes of an image, and of its attack
    samples = [clean, moved, clean + of_image, moved + of_image + rng.normal(0.1, 0.1, 200)]
    difference, deviation = direct_delong(*samples, paired=True)
    assert deviation < 0.7 * direct_delong(*samples)[1]
    found = metrics.paired_difference(*samples, n_boot=2000, paired=True)
    assert (found.high - found.low, found.difference) == pytest.approx((2 * 1.96 * deviation, difference), rel=0.08)
    assert found.p_value == pytest.approx(metrics.delong_test(*samples, paired=True).p_value, abs=0.03)
    assert (found.low > 0 or found.high < 0) == (found.p_value < 0.05)


def test_a_difference_over_splits_is_of_the_same_images_and_covers():
    """Two attacks on the same images: their AUROCs differ by so much that intervals of each alone would hardly tell."""
    rng, n_runs, covered, width, apart = np.random.default_rng(11), 300, 0, 0.0, 0.0
    truth = stats.norm.cdf(0.5 / math.sqrt(2)) - stats.norm.cdf(0.3 / math.sqrt(2))
    for run in range(n_runs):
        clean, moved, _ = attacked(rng, 250, together=0.9, shift=0.3)
        other = moved + rng.normal(0, 0.01, 250) - 0.2
        tested = [rng.permutation(250)[:200] for _ in range(3)]
        a, b = [[(clean[i], out[i]) for i in tested] for out in (other, moved)]
        found = metrics.splits_difference(a, b, n_boot=100, seed=run, paired=True)
        covered, width = covered + (found.low <= truth <= found.high), width + found.high - found.low
        apart += sum(x.high - x.low for x in (metrics.splits_interval(p, n_boot=100, seed=run, paired=True) for p in (a, b)))
    assert covered / n_runs > 0.91
    assert width < 0.3 * apart
    one = metrics.splits_difference(a[:1], b[:1], n_boot=100, paired=True)
    both = metrics.paired_difference(*a[0], *b[0], n_boot=100, paired=True)
    assert (one.mean, one.low, one.high) == pytest.approx(both[:3])


def test_same_order_is_no_difference_and_a_clear_one_is_found():
    a, b = binormal(np.random.default_rng(5), 60, 50, shift=3)
    assert metrics.paired_difference(a, b, np.exp(a), np.exp(b), n_boot=99) == (0, 0, 0, 1)
    assert metrics.delong_test(a, b, np.exp(a), np.exp(b)) == (0, 1)
    assert metrics.paired_difference(a, b, -a, -b, n_boot=99).p_value == 2 / 100
    assert metrics.delong_test([1, 2], [0, 0], [0, 0], [1, 2]) == (1, 2 * 2**-4)  # no variance: four signs that agree


@steady
@given(st.integers(1, 60), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95]))
def test_binomial_interval_inverts_the_tails(n, share, level):
    k = round(share * n)
    low, high = metrics.binomial_interval(k, n, level)
    tail = (1 - level) / 2
    assert (k > 0 or low == 0) and (k < n or high == 1)
    if k > 0:
        assert stats.binom.sf(k - 1, n, low) == pytest.approx(tail, rel=1e-6)
    if k < n:
        assert stats.binom.cdf(k, n, high) == pytest.approx(tail, rel=1e-6)


@pytest.mark.parametrize(("n", "alpha"), [(4, 0.5), (40, 0.05), (99, 0.29)])
def test_false_positive_rate_of_the_conformal_threshold(n, alpha):
    rng = np.random.default_rng(n)
    calibration = np.sort(rng.random((3000, n)), axis=1)
    test_scores = (np.arange(400) + 0.5) / 400  # uniform, as the calibration scores are: their share flagged is the true rate
    rank = (calibration[:, :, None] < test_scores).sum(axis=1)
    rates = np.mean((rank + 1) / (n + 1) <= alpha, axis=1)
    found = metrics.beta_false_positive_interval(n, alpha, level=0.9)
    assert rates.mean() == pytest.approx(found.expected, abs=4 * rates.std() / math.sqrt(len(rates)))
    assert [np.mean(rates <= found.low), np.mean(rates <= found.high)] == pytest.approx([0.05, 0.95], abs=0.02)


@pytest.mark.parametrize(("n", "n_calibration", "alpha"), [(40, 30, 0.1), (400, 60, 0.3)])
def test_what_share_of_fresh_images_is_flagged(n, n_calibration, alpha):
    """Rank by rank: the calibration and the fresh scores are in any order alike."""
    rng = np.random.default_rng(5)
    k = math.floor(alpha * (n_calibration + 1) + 1e-9)
    fresh = np.argsort(rng.random((20_000, n_calibration + n)), axis=1) < n  # sorted scores: which of them are fresh
    below_kth = np.where(np.cumsum(~fresh, axis=1) < k, fresh, False).sum(axis=1) / n
    found = metrics.flagged_interval(n, n_calibration, alpha, level=0.9)
    assert below_kth.mean() == pytest.approx(found.expected, abs=4 * below_kth.std() / math.sqrt(len(below_kth)))
    for end, share in ((found.low, 0.05), (found.high, 0.95)):
        assert np.mean(below_kth < end - 1e-9) <= share + 0.01 and np.mean(below_kth <= end + 1e-9) >= share - 0.01


def test_too_small_a_calibration_set_never_flags():
    assert metrics.beta_false_positive_interval(19, 0.049) == (0, 0, 0)
    assert metrics.beta_false_positive_interval(19, 0.05).expected == 1 / 20


@steady
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=30), st.sampled_from([Fraction(1, 20), Fraction(3, 20), Fraction(3, 10)])
)
@example([1, 20, 20], Fraction(3, 20))  # 0.05 * 3 > 0.15 in floating point
def test_benjamini_hochberg_is_the_step_up_rule(twentieths, q):
    p = [Fraction(k, 20) for k in twentieths]  # conformal p-values are such fractions, and often lie on their bound
    bounds = [v for i, v in enumerate(sorted(p), start=1) if v <= q * i / len(p)]
    expected = [bool(bounds) and v <= bounds[-1] for v in p]
    assert metrics.benjamini_hochberg([float(v) for v in p], float(q)).tolist() == expected


GOOD = [0.1, 0.2, 0.3]
NUMBERS = np.arange(3)


@pytest.mark.parametrize("function", [*STATISTICS, metrics.roc_curve, metrics.bootstrap_interval])
@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]], 1.0, [1j], ["a"], None])
def test_scores_that_are_none_are_named(function, bad):
    with pytest.raises(ValueError, match=r"in_scores: found .*expected"):
        function(bad, GOOD)
    with pytest.raises(ValueError, match=r"out_scores: found .*expected"):
        function(GOOD, bad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.fpr_at_tpr(GOOD, GOOD, tpr=0), "tpr: found 0, expected"),
        (lambda: metrics.fpr_at_tpr(GOOD, GOOD, tpr=1.01), "tpr: found 1.01"),
        (lambda: metrics.aupr(GOOD, GOOD, positive="anomaly"), "positive: found 'anomaly', expected"),
        (lambda: metrics.bootstrap_interval(GOOD, GOOD, level=95), "level: found 95"),
        (lambda: metrics.bootstrap_interval(GOOD, GOOD, n_boot=0), "n_boot: found 0"),
        (lambda: metrics.bootstrap_interval(GOOD, GOOD, seed=-1), "seed: found -1"),
        (
            lambda: metrics.bootstrap_interval(GOOD, GOOD[:2], paired=True),
            "paired: found 3 in-distribution images and 2 anomalies",
        ),
        (lambda: metrics.delong_test(GOOD, GOOD[:2], GOOD, GOOD[:2], True), "paired: found 3 in-distribution images and 2"),
        (lambda: metrics.splits_interval([]), "pairs: found no split"),
        (lambda: metrics.splits_difference([(GOOD, GOOD)], []), "found 1 and 0 splits, expected at least one"),
        (lambda: metrics.splits_difference([(GOOD, GOOD)], [(GOOD[:2], GOOD)]), "found 3 in_a and 2 in_b, expected"),
        (lambda: metrics.splits_interval([(GOOD, GOOD), (GOOD, [])]), "out_scores of split 1: found 0 values"),
        (lambda: metrics.splits_interval([(GOOD, GOOD)], fitted=1), "fitted: found 1, expected a share of the pool below 1"),
        (lambda: metrics.splits_interval([(GOOD, GOOD)], images=[]), "images: found those of 0 splits, expected those of 1"),
        (
            lambda: metrics.splits_interval([(GOOD, GOOD)], images=[(NUMBERS, NUMBERS[:2])]),
            r"of split 0, out: found int64, 2 different ones, of shape \(2,\); expected a whole number for each of 3 scores",
        ),
        (lambda: metrics.splits_interval([(GOOD, GOOD)], images=[(NUMBERS * 0, NUMBERS)]), "in: found int64, 1 different ones"),
        (lambda: metrics.splits_interval([(GOOD, GOOD)], images=[(NUMBERS * 0.5, NUMBERS)]), "in: found float64"),
        (
            lambda: metrics.splits_difference([(GOOD, GOOD)], [(GOOD, GOOD)], images=[(NUMBERS, NUMBERS)], paired=True),
            "paired: found True beside images",
        ),
        (lambda: metrics.paired_difference(GOOD, GOOD, GOOD[:2], GOOD), "found 3 in_a and 2 in_b, expected"),
        (lambda: metrics.delong_test(GOOD, GOOD, GOOD, GOOD[:2]), "found 3 out_a and 2 out_b, expected"),
        (lambda: metrics.delong_test([1.0], GOOD, [1.0], GOOD), "in_a: found 1 values, expected at least 2"),
        (lambda: metrics.binomial_interval(4, 3), "successes: found 4 of n = 3"),
        (lambda: metrics.binomial_interval(0, 0), "n: found 0"),
        (lambda: metrics.beta_false_positive_interval(0, 0.05), "n_calibration: found 0"),
        (lambda: metrics.beta_false_positive_interval(10, 1), "alpha: found 1"),
        (lambda: metrics.benjamini_hochberg([0.5, 1.5], 0.1), "p_values: found values in"),
        (lambda: metrics.benjamini_hochberg([], 0.1), "p_values: found 0 values"),
        (lambda: metrics.benjamini_hochberg([0.5], 0), "q: found 0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples_in_docstrings():
    assert doctest.testmod(metrics).failed == 0
