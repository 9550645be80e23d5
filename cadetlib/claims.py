"""What the paper claims, judged from our results: one function a claim, rows in, verdict with its numbers out.

A claim has parts, one for each set or setting that can speak to it; a part has an interval, and the claim a break-even, the
value at which the claim would be neither true nor false. Nothing is typed in: verdicts follow from intervals alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cadetlib import metrics, paper, tables

Row = Mapping[str, Any]
CONFIRMED, IN_PART, NOT, UNDECIDED, UNTESTED = (
    "confirmed here",
    "confirmed in part",
    "not confirmed here",
    "undecided",
    "not tested here",
)
NO_VERDICT = "dry run: no verdict"
FEW_VIEWS = 0.2  # share of the views that counts as few
NEAREST = "its nearest set, or for one like none the mean of its two"
PAPER_SHIFT = "cifar10.1"  # with which names of the sets begin that Table 1 is of
SMALL_LOSS = 2.0  # percentage points of AUROC that few views may cost


@dataclass(frozen=True)
class Part:
    """One set's or setting's number, its 95 % interval and, where there is one, the paper's; all in percent.

    >>> part = Part("PGD", value=70.0, low=60.0, high=80.0)
    >>> part.side(50.0), part.side(65.0), part.side(90.0)
    ('above', 'around', 'below')
    """

    name: str
    value: float
    low: float
    high: float
    paper: float | None = None

    def side(self, break_even: float) -> str:
        """Where the interval lies: "above" or "below" the break-even, or "around" it."""
        return "above" if self.low > break_even else "below" if self.high < break_even else "around"


@dataclass(frozen=True)
class Claim:
    """A claim with its verdict: `anchor` is the page's section on it; `measure`, and in a word `unit`, what the numbers are.

    >>> parts = (Part("PGD", 70.0, 60.0, 80.0),)
    >>> claim = Claim("table-4", "CADet sees attacks", "AUROC", "AUROC in %", "Table 4", 50.0, parts, overall(parts, 50.0))
    >>> claim.verdict
    'confirmed here'
    """

    anchor: str
    text: str
    unit: str
    measure: str
    source: str
    break_even: float
    parts: tuple[Part, ...]
    verdict: str
    signed: bool = False  # whether the numbers are differences

    def in_brief(self, most: int = 5) -> tuple[Part, ...]:
        """The parts; of more than `most`, the two lowest and the two highest, between which the others lie."""
        if len(self.parts) <= most:
            return self.parts
        ordered = sorted(self.parts, key=lambda part: part.value)
        return (*ordered[:2], *ordered[-2:])


def overall(parts: Sequence[Part], break_even: float) -> str:
    """The verdict that follows from the parts: confirmed when all lie above the break-even, in part when some do.

    >>> seen, unseen = Part("PGD", 70.0, 60.0, 80.0), Part("CW", 40.0, 35.0, 45.0)
    >>> overall([seen], 50.0), overall([seen, unseen], 50.0), overall([], 50.0)
    ('confirmed here', 'confirmed in part', 'not tested here')
    """
    sides = [part.side(break_even) for part in parts]
    if not sides:
        return UNTESTED
    if "above" in sides:
        return CONFIRMED if set(sides) == {"above"} else IN_PART
    return NOT if "below" in sides else UNDECIDED


def difference(a: Row, b: Row, name: str, paper_value: float | None = None, over: str = "") -> Part:
    """AUROC of a minus AUROC of b in percentage points, with its interval.

    over: the name under which a's row holds its difference to b on the same images (`experiments.difference_over`). Rows without,
    of samples of their own or of older results, are compared by both intervals (MOVER, Zou and Donner 2008), which is made for
    independent estimates: where they go together the true interval is narrower, and where they go apart, as m_in and m_out may,
    wider, by at most sqrt(2).

    >>> difference(dict(auroc=0.8, over_b=0.1, over_b_low=0.09, over_b_high=0.12), dict(auroc=0.7), "PGD", over="b")
    Part(name='PGD', value=10.0, low=9.0, high=12.0, paper=None)
    >>> part = difference(dict(auroc=0.8, low=0.77, high=0.83), dict(auroc=0.7, low=0.66, high=0.74), "PGD")
    >>> round(part.low, 6), round(part.value, 6), round(part.high, 6)  # 10 and sqrt(3^2 + 4^2) on either side
    (5.0, 10.0, 15.0)
    """
    if f"over_{over}_low" in a:
        value, low, high = (100 * a[f"over_{over}{end}"] for end in ("", "_low", "_high"))
        return Part(name, value, low, high, paper_value)
    d = a["auroc"] - b["auroc"]
    low = d - math.hypot(a["auroc"] - a["low"], b["high"] - b["auroc"])
    high = d + math.hypot(a["high"] - a["auroc"], b["auroc"] - b["low"])
    return Part(name, 100 * d, 100 * low, 100 * high, paper_value)


def _part(row: Row, name: str, key: str = "auroc", paper_value: float | None = None) -> Part:
    return Part(name, 100 * row[key], 100 * row["low"], 100 * row["high"], paper_value)


def shifts_detected(rows: Sequence[Row], alpha: float) -> Claim:
    """Section 4.1: MMD on contrastive features rejects under a shift, more often than it does without one.

    >>> row = dict(test="MMD", encoder="contrastive", n=50, shift="no shift", rate=0.05, low=0.02, high=0.11)
    >>> claim = shifts_detected([row, row | dict(shift="jpeg", rate=0.4, low=0.3, high=0.5)], alpha=0.05)
    >>> claim.verdict, claim.break_even
    ('confirmed here', 11.0)
    """
    own = [r for r in rows if (r["test"], r["encoder"]) == ("MMD", "contrastive")]
    n = max((r["n"] for r in own), default=0)
    largest = {r["shift"]: r for r in own if r["n"] == n}
    control = largest.get("no shift", dict(low=0.0, high=alpha))
    break_even = 100 * max(alpha, control["high"])
    theirs = {r["size"]: r["value"] for r in paper.TABLE_1.records() if (r["test"], r["encoder"]) == ("MMD", "contrastive")}
    parts = tuple(
        _part(r, shift, "rate", 100 * theirs[n] if n in theirs and shift.startswith(PAPER_SHIFT) else None)
        for shift, r in largest.items()
        if shift != "no shift"
    )
    ours = "" if any(shift.startswith(PAPER_SHIFT) for shift in largest) else " under other shifts than the paper's CIFAR-10.1"
    found = overall(parts, break_even)
    ends = (f"{100 * theirs[size]:.0f} % at n = {size}" for size in (max(theirs), min(theirs)))
    return Claim(
        "table-1",
        "Contrastive similarity detects shifts",
        f"rejection rate at n = {n}{ours}; without a shift at most {break_even:.1f}",
        f"Rejection rate of MMD at n = {n}, in %; break-even: what it may reject without a shift ({break_even:.1f} %)",
        f"Table 1: {', '.join(ends)}",
        break_even,
        parts,
        # Below what the control may reject is no evidence against the claim before it is below what the control does reject.
        UNDECIDED if found == NOT and all(part.high >= 100 * control["low"] for part in parts) else found,
    )


def small_samples_helped(rows: Sequence[Row]) -> Claim:
    """Section 4.2: at the smallest n, MMD-CC has a higher AUROC than MMD.

    >>> row = dict(test="MMD", encoder="contrastive", anomaly="PGD", n=3, n_perm=100, auroc=0.4, low=0.35, high=0.45)
    >>> claim = small_samples_helped([row, row | dict(test="MMD-CC", auroc=0.7, low=0.65, high=0.75)])
    >>> claim.verdict, round(claim.parts[0].value, 4), round(claim.parts[0].paper, 4)  # points gained, here and in the paper
    ('confirmed here', 30.0, 35.3)
    """
    rows = tables.paper_n_perm(rows)
    n = min((r["n"] for r in rows), default=0)
    cells = {(r["encoder"], r["anomaly"], r["test"]): r for r in rows if r["n"] == n}

    def printed(encoder: str, anomaly: str) -> float | None:
        names = tables.counterparts(anomaly)
        found = {
            test: [
                r["value"]
                for r in paper.TABLE_2.records()
                if (r["test"], r["encoder"], r["size"]) == (test, encoder, n) and r["distribution"] in names
            ]
            for test in ("MMD", "MMD-CC")
        }
        return (sum(found["MMD-CC"]) - sum(found["MMD"])) / len(found["MMD"]) if found["MMD"] else None

    parts = tuple(
        difference(row, cells[encoder, anomaly, "MMD"], f"{anomaly} ({encoder})", printed(encoder, anomaly))
        for (encoder, anomaly, test), row in cells.items()
        if test == "MMD-CC"
    )
    return Claim(
        "table-2",
        "MMD-CC helps with few images",
        f"AUROC gained over MMD, n = {n}",
        f"AUROC of MMD-CC minus that of MMD at n = {n}, in percentage points; break-even: 0",
        f"Table 2 at n = {n}, {NEAREST}",
        0.0,
        parts,
        overall(parts, 0.0),
        signed=True,
    )


def _cadet(rows: Sequence[Row], encoder: str, attacks: Collection[str], attacked: bool) -> dict[str, Row]:
    own = [r for r in rows if (r["detector"], r["encoder"]) == ("CADet", encoder) and tables.counterparts(r["anomaly"])]
    return {r["anomaly"]: r for r in own if (r["anomaly"] in attacks) == attacked}


def _printed(encoder: str, anomaly: str) -> float | None:
    return tables.paper_value("CADet", encoder, anomaly)[0]


def anomalies_seen(rows: Sequence[Row], attacks: Collection[str], attacked: bool) -> Claim:
    """Section 5: CADet on contrastive features sees attacks, or unseen classes: AUROC above that of a coin.

    >>> row = dict(detector="CADet", encoder="contrastive", anomaly="PGD", auroc=0.51, low=0.46, high=0.56)
    >>> claim = anomalies_seen([row], {"PGD"}, attacked=True)
    >>> claim.verdict, claim.parts[0].paper
    ('undecided', 94.88)
    """
    own = _cadet(rows, "contrastive", attacks, attacked)
    parts = tuple(_part(row, name, paper_value=_printed("contrastive", name)) for name, row in own.items())
    return Claim(
        "table-4" if attacked else "table-3",
        "CADet sees attacks" if attacked else "CADet sees unseen classes",
        "AUROC",
        "AUROC in %, contrastive encoder; break-even: 50, a coin"
        + ("; seen as attacks or as noise: see below" if attacked else ""),
        "Table 4" if attacked else f"Table 3, {NEAREST}",
        50.0,
        parts,
        overall(parts, 50.0),
    )


def contrastive_better(rows: Sequence[Row], attacks: Collection[str]) -> Claim:
    """Section 6.1: on attacks, CADet does better on contrastive features than on supervised ones.

    >>> row = dict(detector="CADet", encoder="contrastive", anomaly="PGD", auroc=0.9, low=0.85, high=0.95)
    >>> contrastive_better([row, row | dict(encoder="supervised", auroc=0.7, low=0.65, high=0.75)], {"PGD"}).verdict
    'confirmed here'
    """
    ours, others = (_cadet(rows, encoder, attacks, True) for encoder in ("contrastive", "supervised"))
    parts = []
    for name in (name for name in ours if name in others):
        mine, theirs = _printed("contrastive", name), _printed("supervised", name)
        gain = mine - theirs if mine is not None and theirs is not None else None
        lost = difference(others[name], ours[name], name, over="cadet")
        parts.append(Part(name, -lost.value, -lost.high, -lost.low, gain))
    return Claim(
        "table-4",
        "Contrastive beats supervised on attacks",
        "AUROC gained",
        "AUROC of CADet with the contrastive minus with the supervised encoder, in percentage points; break-even: 0",
        "Table 4",
        0.0,
        tuple(parts),
        overall(parts, 0.0),
        signed=True,
    )


def similarities_divide_the_work(by_part: Sequence[Row], attacks: Collection[str]) -> Claim:
    """Section 6.2: the intra-similarity tells attacks better, the out-similarity unseen classes.

    >>> row = dict(anomaly="PGD", score="m_in alone", auroc=0.9, low=0.85, high=0.95)
    >>> similarities_divide_the_work([row, row | dict(score="m_out alone", auroc=0.5, low=0.45, high=0.55)], {"PGD"}).verdict
    'confirmed here'
    """
    cells = {(r["anomaly"], r["score"]): r for r in by_part}
    parts = []
    for name in dict.fromkeys(r["anomaly"] for r in by_part if tables.counterparts(r["anomaly"])):
        better, other = ("m_in alone", "m_out alone") if name in attacks else ("m_out alone", "m_in alone")
        parts.append(difference(cells[name, better], cells[name, other], name, over="other"))
    return Claim(
        "table-5",
        "m_in tells attacks, m_out unseen classes",
        "AUROC of the one minus that of the other",
        "AUROC of the similarity said to be the better one minus that of the other, in percentage points; break-even: 0",
        "Section 6.2, in words",
        0.0,
        tuple(parts),
        overall(parts, 0.0),
        signed=True,
    )


def few_views_suffice(by_views: Sequence[Row]) -> Claim:
    """Figure 2: a fifth of the views costs at most two points of AUROC, on the sets that CADet sees with all of them.

    >>> rows = [dict(anomaly="PGD", n_views=n, auroc=v, low=v - 0.005, high=v + 0.005) for n, v in ((10, 0.89), (50, 0.9))]
    >>> few_views_suffice(rows).verdict
    'confirmed here'
    """
    cells = {(r["anomaly"], r["n_views"]): r for r in by_views}
    grid = sorted({r["n_views"] for r in by_views})
    most = max(grid, default=0)
    few = max((n for n in grid if n <= FEW_VIEWS * most), default=min(grid, default=0))
    seen = [name for name, n in cells if n == most and few < most and cells[name, n]["low"] > 0.5]
    parts = tuple(difference(cells[name, few], cells[name, most], name, over="most_views") for name in seen)
    return Claim(
        "figure-2",
        "Few views suffice",
        f"AUROC with {few} views minus that with {most}; at most {SMALL_LOSS:g} points lost",
        f"AUROC with {few} views minus that with {most}, in percentage points, where CADet sees the anomaly with {most}; "
        f"break-even: {SMALL_LOSS:g} points lost",
        "Figure 2, drawn only",
        -SMALL_LOSS,
        parts,
        overall(parts, -SMALL_LOSS),
        signed=True,
    )


def p_values_calibrated(rates: Sequence[Row], n_calibration: int, alpha: float) -> Claim:
    """Eq. 8: of fresh in-distribution images, as many are flagged as calibrated p-values flag.

    The range holds all splits' rates at once 95 times in 100 or more (Bonferroni). Undecided when it reaches 0, since then a
    detector that never flags would pass.

    >>> claim = p_values_calibrated([dict(split=0, n=200, measured=0.06)], n_calibration=999, alpha=0.05)
    >>> claim.verdict, claim.parts[0].low < 5 < claim.parts[0].high
    ('confirmed here', True)
    """
    parts = []
    for row in rates:
        found = metrics.flagged_interval(row["n"], n_calibration, alpha, 1 - 0.05 / len(rates))
        parts.append(Part(f"split {row['split'] + 1}", 100 * row["measured"], 100 * found.low, 100 * found.high))
    promised = 100 * metrics.beta_false_positive_interval(n_calibration, alpha).expected
    inside = all(part.low <= part.value <= part.high for part in parts)
    verdict = NOT if not inside else UNDECIDED if any(part.low == 0 for part in parts) else CONFIRMED
    return Claim(
        "thresholds",
        "p-values are calibrated",
        f"false alarms at p ≤ {alpha:g}; promised {promised:.1f}; in brackets the range of calibrated p-values",
        f"In-distribution images flagged at p ≤ {alpha:g}, in %; promised: {promised:.1f}; in brackets: where calibrated "
        "p-values stay on all splits at once, 95 times in 100; 5 times in 100 one lies outside by chance alone",
        "Eq. 8; not tested",
        promised,
        tuple(parts),
        verdict if parts else UNTESTED,
    )
