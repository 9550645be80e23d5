"""How well scores tell anomalies from in-distribution images, and how sure one can be: AUROC, AUPR, FPR@95, intervals, tests.

Knows nothing of images, files or devices. A score is larger for an image that looks more in-distribution; `in_scores` (n,) and
`out_scores` (m,) are tensors or arrays, in any order. Each statistic reads no more than how many images of either kind lie on
each distinct score, ascending: counts of shape (..., n_values). So ties are exact, and all replicates of a bootstrap are one
more dimension of the counts instead of a loop.

paired: anomaly i was made from in-distribution image i, as attacks are. The two scores go together, often closely, and intervals
and tests that draw such an image and its anomaly apart are too wide, up to several times; so here they are drawn together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cadetlib import checks

Array = NDArray[Any]
Statistic = Callable[..., float]
Kernel = Callable[..., Array]  # the same of counts: (..., n_values), (..., n_values) -> (...)
Images = tuple[Any, Any]  # which image each in-distribution score is of, and each anomaly's: whole numbers (n,), (m,)
Pairs = Sequence[tuple[Array, Array]]  # in-distribution scores and anomalies' of each split
Group = tuple[list[Pairs], Sequence[Images]]  # splits that are drawn at once: the pairs of each system, and their images

_ROUNDING = 1e-12  # 0.07 * 100 = 7.000000000000001 is meant to be 7: relative errors below this are rounding, not intention
_MAX_BYTES = 2**24  # of one chunk of replicates: more would fall out of the cache before it would save time


class Interval(NamedTuple):
    """Both ends belong to the interval.

    >>> interval = binomial_interval(5, 10)
    >>> interval.low < 0.5 < interval.high
    True
    """

    low: float
    high: float


class RocCurve(NamedTuple):
    """Each (n_thresholds,), ascending: see `roc_curve`.

    >>> roc_curve([2.0], [1.0]).detection_rate.tolist()
    [0.0, 1.0, 1.0]
    """

    false_alarm_rate: Array
    detection_rate: Array
    threshold: Array


class SplitsInterval(NamedTuple):
    """Mean of a statistic over splits, its interval over draws of images, and the spread of the splits: see `splits_interval`.

    >>> result = splits_interval([([3.0, 2.0], [1.0, 0.0]), ([3.0, 2.0], [4.0, 0.0])])
    >>> result.minimum, result.mean, result.maximum
    (0.5, 0.75, 1.0)
    """

    mean: float
    low: float
    high: float
    standard_deviation: float
    minimum: float
    maximum: float


class PairedDifference(NamedTuple):
    """Statistic of detector a minus that of detector b, its interval and two-sided p-value: see `paired_difference`.

    >>> paired_difference([3.0, 2.0], [1.0, 0.0], [3.0, 2.0], [4.0, 0.0], n_boot=200).difference
    0.5
    """

    difference: float
    low: float
    high: float
    p_value: float


class DeLong(NamedTuple):
    """AUROC of detector a minus that of detector b and its two-sided p-value: see `delong_test`.

    >>> round(delong_test([3.0, 2.0, 1.0], [0.0, 1.5], [3.0, 2.0, 1.0], [0.0, 0.5]).difference, 4)
    -0.1667
    """

    difference: float
    p_value: float


class FalsePositiveRate(NamedTuple):
    """Where the true false positive rate of a calibrated threshold lies: see `beta_false_positive_interval`.

    >>> rate = beta_false_positive_interval(99, 0.05)
    >>> rate.expected, rate.low < 0.05 < rate.high
    (0.05, True)
    """

    expected: float
    low: float
    high: float


def _vector(values: Any, name: str, at_least: int = 1) -> Array:
    """`values` as a float64 array (n,): finite, at least `at_least` of them. float64 keeps the order of every narrower type."""
    tensor = checks.as_tensor(values, name).detach()
    if tensor.ndim != 1 or tensor.is_complex():
        raise ValueError(
            f"{name}: found shape {tuple(tensor.shape)} of {tensor.dtype}, expected (n,) real numbers, one per image"
        )
    if len(tensor) < at_least:
        raise ValueError(f"{name}: found {len(tensor)} values, expected at least {at_least}")
    return checks.finite(tensor.double(), name).cpu().numpy()


def _pair(in_scores: Any, out_scores: Any, suffix: str = "", at_least: int = 1) -> tuple[Array, Array]:
    return _vector(in_scores, "in" + (suffix or "_scores"), at_least), _vector(
        out_scores, "out" + (suffix or "_scores"), at_least
    )


def _bins(in_scores: Array, out_scores: Array) -> tuple[Array, Array, Array]:
    """The distinct scores, ascending (n_values,), and for each image the number of its score among them: (n,), (m,)."""
    values, bins = np.unique(np.concatenate([in_scores, out_scores]), return_inverse=True)
    return values, bins[: len(in_scores)], bins[len(in_scores) :]


def _count(bins: Array, n_values: int, weights: Array | None = None) -> Array:
    """How often each value occurs in each row, or the sum of its weights: (B, n), (B, n) -> (B, n_values)."""
    rows = n_values * np.arange(len(bins))[:, None]
    flat = None if weights is None else weights.ravel()
    return np.bincount((bins + rows).ravel(), flat, minlength=len(bins) * n_values).reshape(len(bins), n_values)


def _of_counts(kernel: Kernel, in_scores: Any, out_scores: Any) -> float:
    values, in_bins, out_bins = _bins(*_pair(in_scores, out_scores))
    return float(kernel(_count(in_bins[None], len(values)), _count(out_bins[None], len(values)))[0])


def _auroc(in_counts: Array, out_counts: Array) -> Array:
    n, m = in_counts.sum(-1), out_counts.sum(-1)
    twice_wins = (in_counts * (2 * out_counts.cumsum(-1) - out_counts)).sum(-1)  # whole numbers: nothing is rounded up to here
    return twice_wins / (2 * n * m)


def _aupr(in_counts: Array, out_counts: Array, positive: str = "out") -> Array:
    if positive not in ("in", "out"):
        raise ValueError(f'positive: found {positive!r}, expected "out" (anomalies) or "in"')
    if positive == "in":  # the surest in-distribution image has the largest score, the surest anomaly the smallest
        in_counts, out_counts = out_counts[..., ::-1], in_counts[..., ::-1]
    found = out_counts.cumsum(-1)
    precision = found / np.maximum(found + in_counts.cumsum(-1), 1)
    return (out_counts * precision).sum(-1) / out_counts.sum(-1)


def _fpr_at_tpr(in_counts: Array, out_counts: Array, tpr: float = 0.95) -> Array:
    tpr = 1.0 if tpr == 1 else checks.in_open_interval(tpr, "tpr")
    needed = np.ceil(tpr * in_counts.sum(-1, keepdims=True) * (1 - _ROUNDING))
    in_accepted, out_accepted = (c[..., ::-1].cumsum(-1)[..., ::-1] for c in (in_counts, out_counts))
    threshold = (in_accepted >= needed).sum(-1, keepdims=True) - 1
    return np.take_along_axis(out_accepted, threshold, -1)[..., 0] / out_counts.sum(-1)


def auroc(in_scores: Any, out_scores: Any) -> float:
    """Area under the ROC curve, P(in > out) + P(in = out) / 2: the chance to order an image of each kind rightly, in [0, 1].

    in_scores: (n,), out_scores: (m,), larger = more in-distribution. ValueError when empty, not finite or not one-dimensional.

    >>> auroc([0.9, 0.8, 0.5], [0.5, 0.1])
    0.9166666666666666
    """
    return _of_counts(_auroc, in_scores, out_scores)


def aupr(in_scores: Any, out_scores: Any, positive: str = "out") -> float:
    """Average precision, sum over thresholds of (R_k - R_(k-1)) P_k, equal scores being one threshold (as scikit-learn).

    `positive` names what is to be found: "out", the anomalies, which the smallest scores point to, or "in". Chance level is the
    share of the positive kind, hence depends on how many images of each kind there are: state it beside the number.

    >>> aupr([0.9, 0.8, 0.5], [0.4, 0.1])
    1.0
    """
    return _of_counts(functools.partial(_aupr, positive=positive), in_scores, out_scores)


def fpr_at_tpr(in_scores: Any, out_scores: Any, tpr: float = 0.95) -> float:
    """Share of anomalies accepted when at least a share `tpr`, in (0, 1], of in-distribution images is accepted ("FPR@95").

    Accepted: score >= threshold, with the largest threshold that accepts enough. In-distribution is the positive kind here, as
    in the literature of out-of-distribution detection; 0 is best.

    >>> fpr_at_tpr([4.0, 3.0, 2.0, 1.0], [2.5, 1.5, 0.5, 0.0], tpr=0.75)
    0.25
    """
    return _of_counts(functools.partial(_fpr_at_tpr, tpr=tpr), in_scores, out_scores)


def roc_curve(in_scores: Any, out_scores: Any) -> RocCurve:
    """The ROC curve of "anomaly when score < threshold", from (0, 0) to (1, 1), for plotting.

    false_alarm_rate (x): share of in-distribution images called anomalies; detection_rate (y): share of anomalies called so;
    threshold: the distinct scores, ascending, then infinity. Equal scores are one step, so the trapezoids' area is `auroc`.

    >>> curve = roc_curve([2.0, 1.0], [1.0, 0.0])
    >>> curve.false_alarm_rate.tolist(), curve.detection_rate.tolist(), curve.threshold.tolist()
    ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0], [0.0, 1.0, 2.0, inf])
    """
    values, *bins = _bins(*_pair(in_scores, out_scores))
    false_alarm_rate, detection_rate = (np.append(0, _count(b[None], len(values))[0].cumsum()) / len(b) for b in bins)
    return RocCurve(false_alarm_rate, detection_rate, np.append(values, np.inf))


_KERNELS: dict[Statistic, Kernel] = {auroc: _auroc, aupr: _aupr, fpr_at_tpr: _fpr_at_tpr}


def _kernel(statistic: Statistic) -> Kernel | None:
    """The statistic on counts, when it is one of ours, bare or with keywords bound by functools.partial."""
    if isinstance(statistic, functools.partial) and not statistic.args and statistic.func in _KERNELS:
        return functools.partial(_KERNELS[statistic.func], **statistic.keywords)
    return _KERNELS.get(statistic)


def _as_images(n: int, m: int, paired: bool) -> Images:
    """Which image each score of a pair is of, when anomaly i was made from in-distribution image i (`paired`) or from none."""
    if paired and n != m:
        raise ValueError(f"paired: found {n} in-distribution images and {m} anomalies, expected one made from each")
    return np.arange(n), np.arange(m) + (0 if paired else n)


def _replicates(statistic: Statistic, pairs: Pairs, images: Sequence[Images], n_boot: int, seed: int) -> Array:
    """`statistic` of each pair of scores on `n_boot` resamplings of images, the same for all -> (len(pairs), n_boot) float64.

    images: for each pair (in (n,), out (m,)), which image each score is of. Those that are in-distribution in some pair are one
    sample, all others a second one; each is drawn by itself. NaN where none of a pair's images of a kind was drawn.
    """
    sample = np.unique(np.concatenate([ins for ins, _ in images]))
    others = np.setdiff1d(np.concatenate([outs for _, outs in images]), sample)
    every = np.concatenate([sample, others])
    order = np.argsort(every)
    places = [[order[np.searchsorted(every, some, sorter=order)] for some in both] for both in images]
    kernel = _kernel(statistic)
    binned = [_bins(*pair) for pair in pairs]
    # One generator a sample, so that the draws do not depend on the size of a chunk.
    draws = [np.random.default_rng([checks.at_least(seed, "seed", 0), kind]) for kind in (0, 1)]
    step = max(1, _MAX_BYTES // (8 * len(every)))
    found = np.full((len(pairs), checks.at_least(n_boot, "n_boot", 1)), math.nan)
    for start in range(0, n_boot, step):
        rows = min(step, n_boot - start)
        sizes = [(rng, len(some)) for rng, some in zip(draws, (sample, others), strict=True) if len(some)]
        times = np.concatenate([_count(rng.integers(n, size=(rows, n)), n) for rng, n in sizes], axis=1)
        for k, (values, *bins) in enumerate(binned):
            drawn = [times[:, place] for place in places[k]]
            there = np.flatnonzero(drawn[0].any(axis=1) & drawn[1].any(axis=1))
            if kernel is None:
                for row in there:
                    found[k, start + row] = statistic(*(np.repeat(x, some[row]) for x, some in zip(pairs[k], drawn, strict=True)))
            else:
                counts = (
                    _count(np.broadcast_to(of, (len(there), len(of))), len(values), some[there])
                    for of, some in zip(bins, drawn, strict=True)
                )
                found[k, start + there] = kernel(*counts)
    return found


def _percentiles(replicates: Array, level: float) -> Interval:
    tail = (1 - checks.in_open_interval(level, "level")) / 2
    return Interval(*(float(v) for v in np.quantile(replicates, [tail, 1 - tail])))


def _interval(replicates: Array, value: float, level: float, paired: bool) -> Interval:
    """The percentile interval; of `paired` scores the bias-corrected one (Efron 1981), around `value`.

    An image that is drawn twice meets its own anomaly four times: in replicates, twice as many comparisons are of an image with
    its own anomaly as in the sample, which moves them all to one side. With ten images that cost 4 points of coverage.
    """
    if not paired:
        return _percentiles(replicates, level)
    bias, tail = _bias(replicates, value), stats.norm.ppf((1 - checks.in_open_interval(level, "level")) / 2)
    return Interval(*(float(v) for v in np.quantile(replicates, stats.norm.cdf([2 * bias + tail, 2 * bias - tail]))))


def _bias(replicates: Array, value: float) -> float:
    """Where `value` lies among its replicates, in standard deviations from their median."""
    below, least = ((replicates < value).mean() + (replicates <= value).mean()) / 2, 0.5 / len(replicates)
    return float(stats.norm.ppf(np.clip(below, least, 1 - least)))


def bootstrap_interval(
    in_scores: Any,
    out_scores: Any,
    statistic: Statistic = auroc,
    level: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
    paired: bool = False,
) -> Interval:
    """Percentile bootstrap interval of a statistic over images, in-distribution and anomalous resampled separately.

    paired: out_scores[i] is of an anomaly that was made from the image of in_scores[i]; the two are drawn together, and the
    percentiles corrected for bias. The interval covers the draw of the test images, the fitted detector held fixed.
    statistic(in_scores, out_scores) -> float: `auroc`, `aupr`, `fpr_at_tpr` (also with keywords bound by functools.partial) run
    as tensor operations, any other callable in a loop.
    Where every replicate agrees, as with perfect separation, the interval has no width: that says nothing of images not seen.

    >>> bootstrap_interval([3.0, 2.0, 4.0], [1.0, 0.0], n_boot=200)
    Interval(low=1.0, high=1.0)
    """
    pair = _pair(in_scores, out_scores)
    images = _as_images(len(pair[0]), len(pair[1]), paired)
    return _interval(_replicates(statistic, [pair], [images], n_boot, seed)[0], statistic(*pair), level, paired)


def splits_interval(
    pairs: Sequence[tuple[Any, Any]],
    statistic: Statistic = auroc,
    level: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
    paired: bool = False,
    images: Sequence[Images] | None = None,
    fitted: float | None = None,
) -> SplitsInterval:
    """Mean of a statistic over S random splits of one pool into fitting and test images, with an interval for both draws.

    pairs: (in_scores, out_scores) of each split.
    images: for each split, which image each score is of, as whole numbers: (n,), (m,). The splits test the same images again and
    again, so an image is drawn for all of them at once, together with the anomalies that have its number: those made from it.
    Without `images`, the mean of the splits' own intervals, `paired` as in `bootstrap_interval`, which is never too narrow (the
    deviation of a mean is at most the mean of the deviations), and too wide by what further splits tell.
    fitted: the share of the pool that each split fits on, in [0, 1), of several kinds of fitting images the mean of their shares;
    0: nothing is fitted on it; None: each split has fitting images of its own. With s the deviation from split to split, what the
    draw of fitting images adds to the variance of the mean is at most s^2 (1 / S + fitted / (1 - fitted)) on average: splits of
    one pool share fitting images, and s, which does not show what they have in common, understates it (Nadeau and Bengio 2003,
    for test sets). It is added to the variance of the bootstrap, and the interval stretched accordingly, with Student's t at the
    degrees of freedom that Satterthwaite (1946) gives such a sum. With a single split, nothing is known of the fitting images,
    and the interval is that of the test images. The encoder is held fixed. All this supposes a statistic that is nearly linear in
    what is fitted: in simulations ten splits then cover 91 to 98 times in 100 at a level of 95, below 90 where it saturates.
    standard_deviation has S - 1 in the divisor and is NaN for a single split; minimum and maximum are over the splits.

    >>> result = splits_interval([([3.0, 2.0], [1.0, 0.0]), ([5.0, 4.0], [1.0, 2.0])], n_boot=200)
    >>> result.mean, result.standard_deviation
    (1.0, 0.0)
    """
    if not len(pairs):
        raise ValueError("pairs: found no split, expected at least one (in_scores, out_scores)")
    checked = [_pair(a, b, f"_scores of split {k}") for k, (a, b) in enumerate(pairs)]
    values = np.array([statistic(a, b) for a, b in checked])
    groups = _drawn_together([checked], images, paired)
    replicates = [_replicates(statistic, some, of, n_boot, seed) for (some,), of in groups]
    found = _over_splits(values, replicates, level, _some_paired(groups), fitted)
    if _kernel(statistic) is None:
        return found
    return found._replace(low=max(0.0, found.low), high=min(1.0, found.high))  # ours are shares


def splits_difference(
    pairs_a: Sequence[tuple[Any, Any]],
    pairs_b: Sequence[tuple[Any, Any]],
    statistic: Statistic = auroc,
    level: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
    paired: bool = False,
    images: Sequence[Images] | None = None,
    fitted: float | None = None,
) -> SplitsInterval:
    """Mean over splits of the statistic of a minus that of b, which are scores of the same images, image by image, in each split.

    Two detectors; or one detector and two attacks on the same images, with the in-distribution scores in both. Intervals as in
    `splits_interval`, of replicates that draw the same images for a and b.

    >>> clean, attacked, noisy = [3.0, 2.0, 1.0], [0.0, 1.5, 0.5], [2.5, 1.8, 0.9]
    >>> round(splits_difference([(clean, attacked)], [(clean, noisy)], n_boot=200, paired=True).mean, 4)
    0.2222
    """
    if not len(pairs_a) or len(pairs_a) != len(pairs_b):
        raise ValueError(f"found {len(pairs_a)} and {len(pairs_b)} splits, expected at least one and as many of a as of b")
    same = [_same_images(*a, *b) for a, b in zip(pairs_a, pairs_b, strict=True)]
    both = [[a for a, _ in same], [b for _, b in same]]
    values = np.array([statistic(*a) - statistic(*b) for a, b in same])
    groups, replicates = _drawn_together(both, images, paired), []
    for (some_a, some_b), of in groups:
        found = _replicates(statistic, [*some_a, *some_b], [*of, *of], n_boot, seed)
        replicates.append(found[: len(of)] - found[len(of) :])
    return _over_splits(values, replicates, level, _some_paired(groups), fitted)


def _drawn_together(scores: Sequence[Pairs], images: Sequence[Images] | None, paired: bool) -> list[Group]:
    """Splits whose images are drawn at once, each with these images: all of them, or without `images` every split by itself.

    scores: for each of one or two systems, its pair in each split.
    """
    if images is None:
        alone = [_as_images(len(ins), len(outs), paired) for ins, outs in scores[0]]
        return [([pairs[k : k + 1] for pairs in scores], [of]) for k, of in enumerate(alone)]
    if paired:
        raise ValueError("paired: found True beside images, which say what was made from what; expected one of the two")
    if len(images) != len(scores[0]):
        raise ValueError(f"images: found those of {len(images)} splits, expected those of {len(scores[0])}")
    checked: list[Images] = []
    for k, (both, pair) in enumerate(zip(images, scores[0], strict=True)):
        numbers = tuple(np.asarray(checks.as_tensor(some, "images").cpu()) for some in both)
        for name, found, wanted in zip(("in", "out"), numbers, pair, strict=True):
            if found.shape != wanted.shape or found.dtype.kind not in "iu" or len(np.unique(found)) < len(found):
                raise ValueError(
                    f"images of split {k}, {name}: found {found.dtype}, {len(np.unique(found))} different ones, of shape "
                    f"{found.shape}; expected a whole number for each of {len(wanted)} scores, none twice"
                )
        checked.append((numbers[0], numbers[1]))
    return [(list(scores), checked)]


def _some_paired(groups: Sequence[Group]) -> bool:
    """Whether some anomaly was made from an image that is in-distribution in the same split."""
    return any(bool(np.isin(outs, ins).any()) for _, images in groups for ins, outs in images)


def _over_splits(values: Array, replicates: Sequence[Array], level: float, paired: bool, fitted: float | None) -> SplitsInterval:
    """Of a statistic's `values` (S,) and, for splits that are drawn together, their bootstrap replicates (some of S, n_boot)."""
    intervals, first = [], 0
    for some in replicates:
        there = some[:, ~np.isnan(some).all(axis=0)]
        value = float(values[first : first + len(some)].mean())
        intervals.append(_interval(np.nanmean(there, axis=0), value, level, paired))
        first += len(some)
    low, high = _stretched(Interval(*np.mean(intervals, axis=0).tolist()), values, level, fitted)
    deviation = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return SplitsInterval(float(values.mean()), low, high, deviation, float(values.min()), float(values.max()))


def _stretched(interval: Interval, values: Array, level: float, fitted: float | None) -> Interval:
    """The interval of the mean of `values` (S,), one for each split, from the `interval` for the draw of test images alone."""
    share = 0.0 if fitted is None else checks.not_negative(fitted, "fitted")
    if share >= 1:
        raise ValueError(f"fitted: found {fitted}, expected a share of the pool below 1")
    if len(values) == 1 or fitted == 0:
        return interval
    of_fitting = float(values.var(ddof=1)) * (1 / len(values) + share / (1 - share))
    if of_fitting == 0:
        return interval
    mean, half = float(values.mean()), (interval.high - interval.low) / 2
    total = (half / stats.norm.ppf((1 + level) / 2)) ** 2 + of_fitting
    freedom = (len(values) - 1) * (total / of_fitting) ** 2
    wanted = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(total)
    if half == 0:
        return Interval(mean - wanted, mean + wanted)
    return Interval(mean - (mean - interval.low) * wanted / half, mean + (interval.high - mean) * wanted / half)


def _same_images(in_a: Any, out_a: Any, in_b: Any, out_b: Any, at_least: int = 1) -> list[tuple[Array, Array]]:
    a, b = _pair(in_a, out_a, "_a", at_least), _pair(in_b, out_b, "_b", at_least)
    for kind, x, y in zip(("in", "out"), a, b, strict=True):
        if len(x) != len(y):
            raise ValueError(f"found {len(x)} {kind}_a and {len(y)} {kind}_b, expected scores of the same images in one order")
    return [a, b]


def paired_difference(
    in_a: Any,
    out_a: Any,
    in_b: Any,
    out_b: Any,
    statistic: Statistic = auroc,
    level: float = 0.95,
    n_boot: int = 1000,
    seed: int = 0,
    paired: bool = False,
) -> PairedDifference:
    """Statistic of detector a minus that of detector b on the same images, by a bootstrap that draws the same images for both.

    in_a, in_b: (n,) and out_a, out_b: (m,), image by image; paired: anomaly i was made from in-distribution image i, and is drawn
    with it. p_value, two-sided, for no difference: twice the smaller share of replicates on either side of 0, counted as
    (1 + k) / (1 + n_boot), hence never 0. For AUROC, `delong_test` needs no draws.

    >>> same = [3.0, 2.0], [1.0, 2.5]
    >>> paired_difference(*same, *same, n_boot=200).p_value
    1.0
    """
    pairs = _same_images(in_a, out_a, in_b, out_b)
    images = _as_images(len(pairs[0][0]), len(pairs[0][1]), paired)
    a, b = _replicates(statistic, pairs, [images] * 2, n_boot, seed)
    difference = float(statistic(*pairs[0]) - statistic(*pairs[1]))
    shares = np.array([1 + int((a - b <= 0).sum()), 1 + int((a - b >= 0).sum())]) / (1 + n_boot)
    if paired:  # the level at which the interval ends at 0
        shares = stats.norm.cdf(stats.norm.ppf(np.minimum(shares, 1)) + 2 * _bias(a - b, difference) * np.array([-1, 1]))
    p_value = min(1.0, 2 * float(shares.min()))
    return PairedDifference(difference, *_interval(a - b, difference, level, paired), p_value)


def _placements(in_scores: Array, out_scores: Array) -> tuple[Array, Array]:
    """For each image the share of the other kind that it is ordered rightly against, ties half: (n,), (m,), by midranks."""
    n, m = len(in_scores), len(out_scores)
    ranks = stats.rankdata(np.concatenate([in_scores, out_scores]))
    return (ranks[:n] - stats.rankdata(in_scores)) / m, 1 - (ranks[n:] - stats.rankdata(out_scores)) / n


def delong_test(in_a: Any, out_a: Any, in_b: Any, out_b: Any, paired: bool = False) -> DeLong:
    """Difference in AUROC of two detectors on the same images, with DeLong's two-sided p-value (DeLong et al. 1988).

    in_a, in_b: (n,) and out_a, out_b: (m,), image by image, n, m >= 2. By midranks in O((n + m) log(n + m)) (Sun and Xu 2014).
    paired: anomaly i was made from in-distribution image i; the two are one observation then (Obuchowski 1997).
    Normal approximation: meant for tens of images of each kind or more. Where all images that are placed differently are placed
    differently by the same amount, the estimated variance can be 0: the p-value is then that of a sign test on these images.

    >>> delong_test([3.0, 2.0, 1.0], [0.0, 1.5], [3.0, 2.0, 1.0], [0.0, 1.5])
    DeLong(difference=0.0, p_value=1.0)
    """
    (in_x, out_x), (in_y, out_y) = (_placements(*pair) for pair in _same_images(in_a, out_a, in_b, out_b, at_least=2))
    # The variance of the difference is that of differences of placements: DeLong's 2 x 2 covariance, contrasted by (1, -1).
    difference = float(in_x.mean() - in_y.mean())
    of_in, of_out = in_x - in_y, out_x - out_y
    if paired:
        if len(of_in) != len(of_out):
            raise ValueError(f"paired: found {len(of_in)} in-distribution images and {len(of_out)} anomalies, expected as many")
        deviation = math.sqrt((of_in + of_out).var(ddof=1) / len(of_in))
        n_differ = int(((of_in != 0) | (of_out != 0)).sum())
    else:
        deviation = math.sqrt(of_in.var(ddof=1) / len(of_in) + of_out.var(ddof=1) / len(of_out))
        n_differ = int((of_in != 0).sum() + (of_out != 0).sum())
    if deviation <= _ROUNDING:  # differences of placements, all the same
        return DeLong(difference, min(1.0, 2.0 ** (1 - n_differ)) if difference else 1.0)
    return DeLong(difference, float(2 * stats.norm.sf(abs(difference) / deviation)))


def binomial_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Clopper-Pearson interval of a probability, from `successes` in `n` independent trials: rejection rates, type-I errors.

    Exact: it covers the probability at least a share `level` of the time. Trials that share data are not independent.

    >>> [round(v, 4) for v in binomial_interval(0, 20)]
    [0.0, 0.1684]
    """
    n, successes = checks.at_least(n, "n", 1), checks.at_least(successes, "successes", 0)
    if successes > n:
        raise ValueError(f"successes: found {successes} of n = {n}, expected at most n")
    found = stats.binomtest(successes, n).proportion_ci(checks.in_open_interval(level, "level"), method="exact")
    return Interval(float(found.low), float(found.high))


def beta_false_positive_interval(n_calibration: int, alpha: float, level: float = 0.95) -> FalsePositiveRate:
    """True false positive rate of "anomaly when p <= alpha", p from `n_calibration` scores (Eq. 8): its mean and interval.

    p = (rank + 1) / (n + 1) <= alpha means that the score is at most the k-th smallest calibration score, with
    k = floor(alpha (n + 1)). The share of in-distribution images that lies there is Beta(k, n + 1 - k) over draws of the
    calibration images, whatever the detector, when scores have no ties. With k = 0 no image is ever called an anomaly: all are 0.

    >>> beta_false_positive_interval(2000, 0.05).expected == 100 / 2001
    True
    """
    return _false_positives(n_calibration, alpha, level, stats.beta)


@functools.cache  # asked again for each split, and not quick
def flagged_interval(n: int, n_calibration: int, alpha: float, level: float = 0.95) -> FalsePositiveRate:
    """What share of n fresh in-distribution images is flagged by "p <= alpha": its mean, and where it lies `level` of the time.

    Wider than `beta_false_positive_interval`, which is of the true rate: n images scatter around it (beta-binomial).

    >>> flagged_interval(150, 250, 0.05).high > beta_false_positive_interval(250, 0.05).high
    True
    """
    n = checks.at_least(n, "n", 1)
    found = _false_positives(n_calibration, alpha, level, lambda a, b: stats.betabinom(n, a, b))
    return found._replace(low=found.low / n, high=found.high / n)


def _false_positives(n_calibration: int, alpha: float, level: float, distribution: Callable[..., Any]) -> FalsePositiveRate:
    """The mean rate k / (n + 1), and quantiles of the distribution with these parameters of the Beta."""
    n = checks.at_least(n_calibration, "n_calibration", 1)
    tail = (1 - checks.in_open_interval(level, "level")) / 2
    k = min(n, math.floor(checks.in_open_interval(alpha, "alpha") * (n + 1) * (1 + _ROUNDING)))
    if k == 0:
        return FalsePositiveRate(0.0, 0.0, 0.0)
    low, high = distribution(k, n + 1 - k).ppf([tail, 1 - tail])
    return FalsePositiveRate(k / (n + 1), float(low), float(high))


def benjamini_hochberg(p_values: Any, q: float) -> NDArray[np.bool_]:
    """Which of many p-values (N,) to reject so that the expected share of false ones among the rejected is at most `q`.

    Benjamini and Hochberg (1995) -> bool (N,), True = rejected. Holds for CADet's p-values although they share one calibration
    set, whose dependence is positive (Bates et al. 2023). A p-value on its bound, up to rounding, is rejected.

    >>> benjamini_hochberg([0.01, 0.04, 0.03, 0.9], q=0.05).tolist()
    [True, False, False, False]
    """
    p = _vector(p_values, "p_values")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"p_values: found values in [{p.min():.4g}, {p.max():.4g}], expected [0, 1]")
    return stats.false_discovery_control(p, method="bh") <= checks.in_open_interval(q, "q") * (1 + _ROUNDING)
