"""A threshold on the p-value as something to decide, to defend and to keep: what it promises, what it does, and its file.

Everything here is a look-up in sorted p-values. A curve is a mapping with `name`, `kind` ("in": in-distribution images; else
anomalies) and `p_values`, sorted; the threshold explorer's curves also carry `scores` and `images`, in the same order.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from cadetlib import checks, metrics, record

Row = Mapping[str, Any]
_FORMAT = "cadetlib.threshold"


def calibration_needed(alpha: float) -> int:
    """The least number of calibration images with which a p-value can be as small as `alpha`: 1 / (n + 1) <= alpha.

    >>> calibration_needed(0.05), calibration_needed(0.001)
    (19, 999)
    """
    n = max(1, math.ceil(1 / checks.in_open_interval(alpha, "alpha")) - 1)
    return n - 1 if n > 1 and 1 / n <= alpha else n  # 1 / alpha rounds: 1 / (1 / 49) is a little more than 49


def reachable(alpha: float, n_calibration: int) -> float:
    """`alpha`, unless so few calibration images could never give so small a p-value: ValueError says how many would.

    >>> reachable(0.05, n_calibration=19)
    0.05
    >>> reachable(0.01, n_calibration=19)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: alpha: found 0.01 with 19 calibration images, whose smallest p-value is 0.05, so nothing ...
    """
    if checks.in_open_interval(alpha, "alpha") < 1 / (n_calibration + 1):
        raise ValueError(
            f"alpha: found {alpha} with {n_calibration} calibration images, whose smallest p-value is "
            f"{1 / (n_calibration + 1):.3g}, so nothing could ever be flagged; expected a larger alpha, or at least "
            f"{calibration_needed(alpha)} calibration images"
        )
    return float(alpha)


def promised(n_calibration: int, threshold: float, level: float = 0.95) -> metrics.FalsePositiveRate:
    """Expected false positive rate of "p <= threshold" and its interval over draws of the calibration images (Beta).

    >>> promised(99, 1.0)
    FalsePositiveRate(expected=1.0, low=1.0, high=1.0)
    """
    if threshold == 1:  # every p-value is at most 1
        return metrics.FalsePositiveRate(1.0, 1.0, 1.0)
    return metrics.beta_false_positive_interval(n_calibration, threshold, level)


def n_flagged(curve: Row, threshold: float) -> int:
    """How many of a curve's images have a p-value of at most `threshold`.

    >>> n_flagged(dict(p_values=[0.1, 0.2, 0.6, 1.0]), 0.2)
    2
    """
    return int(np.searchsorted(np.asarray(curve["p_values"]), threshold, side="right"))


def operating_point(curves: Sequence[Row], n_calibration: int, threshold: float) -> dict[str, Any]:
    """What a threshold does -> `expected` (see `promised`), `flagged`: name -> share, and `intervals`: name -> Clopper-Pearson's.

    >>> curve = dict(name="test", kind="in", p_values=[0.1, 0.2, 0.6, 1.0])
    >>> operating_point([curve], 9, 0.2)["flagged"]
    {'test': 0.5}
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: found {threshold}, expected a number in (0, 1]")
    names = [curve["name"] for curve in curves]
    k = np.array([n_flagged(curve, threshold) for curve in curves])
    n = np.array([len(curve["p_values"]) for curve in curves])
    return {
        "expected": promised(n_calibration, threshold),
        "flagged": dict(zip(names, (k / n).tolist(), strict=True)),
        "intervals": dict(zip(names, _clopper_pearson(k, n), strict=True)),
    }


def _clopper_pearson(k: Any, n: Any, level: float = 0.95) -> list[metrics.Interval]:
    """`metrics.binomial_interval` of many counts at once, by the inverse of the incomplete beta function: no search."""
    tail = (1 - level) / 2
    low = np.where(k > 0, special.betaincinv(np.maximum(k, 1), n - k + 1, tail), 0.0)
    high = np.where(k < n, special.betaincinv(k + 1, np.maximum(n - k, 1), 1 - tail), 1.0)
    return [metrics.Interval(*pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]


def score_at(calibration_scores: Sequence[float], threshold: float) -> float | None:
    """The largest score that is flagged at `threshold` (Eq. 8 as printed); None where nothing is, infinity where everything is.

    p <= threshold means that fewer than k calibration scores lie strictly below, when k of the p-values 1 / (n + 1), ..., 1 are
    at most the threshold: counted and not computed, so that rounding decides as it does for p-values. Sorted ascending.

    >>> calibration_scores = [0.1, 0.3, 0.5, 0.7, 0.9]
    >>> score_at(calibration_scores, 2 / 6), score_at(calibration_scores, 0.1), score_at(calibration_scores, 1.0)
    (0.3, None, inf)
    """
    n = len(calibration_scores)
    k = int(np.searchsorted(np.arange(1, n + 2) / (n + 1), threshold, side="right"))
    return None if k < 1 else math.inf if k > n else float(calibration_scores[k - 1])


def nearest(p_values: Sequence[float], threshold: float, most: int) -> tuple[list[int], list[int]]:
    """Positions in sorted p-values of at most `most` flagged and as many not flagged, nearest the threshold first.

    >>> nearest([0.1, 0.2, 0.3, 0.4], 0.25, 2)
    ([1, 0], [2, 3])
    """
    cut = int(np.searchsorted(np.asarray(p_values), threshold, side="right"))
    return list(range(cut - 1, max(-1, cut - 1 - most), -1)), list(range(cut, min(len(p_values), cut + most)))


def thinned(p_values: Sequence[float], n: int) -> Any:
    """n of the sorted p-values, evenly spread: the same distribution, fewer images.

    >>> thinned([0.1, 0.2, 0.3, 0.4, 0.5], 3).tolist()
    [0.1, 0.3, 0.5]
    """
    return np.asarray(p_values)[np.linspace(0, len(p_values) - 1, n).round().astype(int)]


def batch_parts(normal: Sequence[float], odd: Sequence[float], share: float = 0.5) -> tuple[Any, Any]:
    """p-values of a batch with a `share` of anomalies, as large as the images allow: sorted normal ones, sorted odd ones.

    >>> [len(part) for part in batch_parts([0.1] * 90, [0.1] * 50, 0.1)]
    [90, 10]
    """
    checks.in_open_interval(share, "share")
    size = min(len(normal) / (1 - share), len(odd) / share)
    return thinned(normal, max(1, round(size * (1 - share)))), thinned(odd, max(1, round(size * share)))


def batch_decision(normal: Sequence[float], odd: Sequence[float], threshold: float, q: float) -> list[Row]:
    """One batch decided twice: p <= threshold, and Benjamini and Hochberg's rule at level q.

    normal, odd: p-values of the batch's in-distribution images and anomalies. -> two rows with `rule`, `flagged`,
    `false_discovery_rate` (realised: false ones among the flagged, 0 when there are none), `found` and `false_alarms` (shares
    of the anomalies and of the normal images flagged), `cut` (the largest p-value flagged, or None).

    >>> plain, bh = batch_decision(normal=[0.04, 0.6], odd=[0.01, 0.02], threshold=0.05, q=0.04)
    >>> (plain["flagged"], plain["false_alarms"]), (bh["flagged"], bh["found"], bh["cut"])
    ((3, 0.5), (2, 1.0, 0.02))
    """
    p, n = np.concatenate([normal, odd]), len(normal)
    rules = {"p ≤ threshold": p <= threshold, "Benjamini–Hochberg": metrics.benjamini_hochberg(p, q)}
    return [
        dict(
            rule=rule,
            n=len(p),
            flagged=int(flagged.sum()),
            false_discovery_rate=float(flagged[:n].sum() / max(1, flagged.sum())),
            found=float(flagged[n:].mean()),
            false_alarms=float(flagged[:n].mean()),
            cut=float(p[flagged].max()) if flagged.any() else None,
        )
        for rule, flagged in rules.items()
    ]


# --- a threshold that is kept -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """A threshold on one detector's p-values and what it guarantees, as it is written to a file.

    >>> kept = guaranteed(0.05, detector="fingerprint", n_calibration=199)
    >>> kept.threshold, round(kept.low, 3), round(kept.high, 3)
    (0.05, 0.024, 0.084)
    """

    threshold: float  # flag when p <= threshold
    detector: str  # fingerprint of the detector whose p-values it is about
    n_calibration: int
    expected: float  # false positive rate, the mean over draws of the calibration images
    low: float  # its interval
    high: float
    level: float  # of the interval


def guaranteed(threshold: float, detector: str, n_calibration: int, level: float = 0.95) -> Threshold:
    """A threshold with its guarantees; ValueError when no image could ever be flagged at it.

    >>> round(guaranteed(0.05, "fingerprint", n_calibration=199).expected, 3)
    0.05
    """
    if threshold != 1:
        reachable(threshold, n_calibration)
    return Threshold(float(threshold), detector, n_calibration, *promised(n_calibration, threshold, level), level)


def write(path: str | Path, threshold: Threshold, **about: Any) -> Path:
    """Keep a threshold as JSON, atomically; `about` is kept with it for those who read it, such as what it found.

    >>> from tempfile import mkdtemp
    >>> write(Path(mkdtemp()) / "threshold.json", guaranteed(0.05, "fingerprint", 199), chosen_by="hand").name
    'threshold.json'
    """
    document = {"format": _FORMAT, **dataclasses.asdict(threshold), **record.plain(about)}
    return record.write_atomically(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def read(source: str | Path | Mapping[str, Any] | Threshold, detector: str) -> Threshold:
    """A kept threshold (file, its content, or a Threshold) for the detector with this fingerprint.

    ValueError for another detector's, whose p-values are others, and for what is no threshold.

    >>> kept = guaranteed(0.05, "fingerprint", 199)
    >>> read(kept, "fingerprint") == kept
    True
    >>> read(kept, "another")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: threshold: found a threshold of the detector fingerprint, expected one of another: ...
    """
    name = str(source) if isinstance(source, str | Path) else "threshold"
    try:
        document = json.loads(Path(source).read_text()) if isinstance(source, str | Path) else source
        if isinstance(document, Threshold):
            document = {"format": _FORMAT, **dataclasses.asdict(document)}
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']!r}")
        found = Threshold(**{field.name: document[field.name] for field in dataclasses.fields(Threshold)})
        if not 0 < found.threshold <= 1:
            raise ValueError(f"threshold {found.threshold}")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{name}: found {error!r}, expected a threshold written by cadetlib.thresholds.write") from error
    if found.detector != detector:
        raise ValueError(
            f"{name}: found a threshold of the detector {found.detector[:12]}, expected one of {detector[:12]}: p-values of "
            "another detector mean something else; choose and save the threshold again with this one"
        )
    return found


# --- what a reader is shown ---------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """One image beside its p-value: `image` is its position in the set of that name.

    >>> Example("PGD", image=3, p_value=0.012).set
    'PGD'
    """

    set: str
    image: int
    p_value: float


def examples(curves: Sequence[Row], threshold: float, most: int = 8) -> dict[str, list[Example]]:
    """Images on either side of a threshold, nearest first: anomalies flagged and missed, normal images falsely flagged.

    Among equal p-values the one whose score lies nearer to the threshold comes first. curves with `scores` and `images`.

    >>> odd = dict(name="PGD", kind="out", p_values=[0.01, 0.04, 0.3], scores=[0.1, 0.2, 0.6], images=[7, 2, 5])
    >>> found = examples([odd], 0.05)
    >>> [example.image for example in found["flagged"]], [example.image for example in found["missed"]]
    ([2, 7], [5])
    """
    found: dict[str, list[tuple[float, Example]]] = {"flagged": [], "missed": [], "falsely flagged": []}
    for curve in curves:
        below, above = nearest(curve["p_values"], threshold, most)
        kinds = {"falsely flagged": below} if curve["kind"] == "in" else {"flagged": below, "missed": above}
        for kind, positions in kinds.items():
            shown = [Example(curve["name"], int(curve["images"][i]), float(curve["p_values"][i])) for i in positions]
            found[kind] += [(curve["scores"][i], example) for i, example in zip(positions, shown, strict=True)]
    return {
        kind: [example for _, example in sorted(items, key=lambda item: item[0], reverse=kind != "missed")[:most]]
        for kind, items in found.items()
    }


def chosen(curves: Sequence[Row], normal: str, anomalies: Sequence[str]) -> list[Row]:
    """The curves of one in-distribution set and of some sets of anomalies, in that order.

    >>> curves = [dict(name=name) for name in ("test", "PGD", "FGSM")]
    >>> [curve["name"] for curve in chosen(curves, "test", ["FGSM"])]
    ['test', 'FGSM']
    """
    by_name = {curve["name"]: curve for curve in curves}
    unknown = [name for name in (normal, *anomalies) if name not in by_name]
    if unknown:
        raise ValueError(f"sets: found {unknown}, expected some of {list(by_name)}")
    return [by_name[name] for name in (normal, *anomalies)]
