"""The paper's tables from our rows, ours beside the paper's: data frames of text, for notebooks and for the report.

The images differ from the paper's except in the imagenet profile, so a table says what stands where, and a verdict compares
kinds of anomaly and not the same images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from cadetlib import paper

Row = Mapping[str, Any]
PAPER_ATTACKS = {"FGSM": "FGSM", "PGD": "PGD", "CW-L2": "CW", "CW-L2-ball": "CW", "CW-Linf": "CW"}
UNSEEN = ("iNaturalist", "ImageNet-O")


def percent(row: Row) -> str:
    """AUROC in percent with its interval: "94.3 [92.1, 96.0]"."""
    return f"{100 * row['auroc']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def share(row: Row) -> str:
    """A rejection rate with its interval: "0.32 [0.23, 0.42]"."""
    return f"{row['rate']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _wide(cells: Iterable[tuple[Any, Any, str]], index: Sequence[str]) -> pd.DataFrame:
    """(row key, column, text) in order of appearance -> a data frame with empty text where there is no cell."""
    listed = list(cells)
    rows, columns = list(dict.fromkeys(c[0] for c in listed)), list(dict.fromkeys(c[1] for c in listed))
    frame = pd.DataFrame("", index=pd.MultiIndex.from_tuples(rows, names=list(index)), columns=columns)
    for row, column, text in listed:
        frame.loc[row, column] = text
    return frame


def table_1(rows: Sequence[Row]) -> pd.DataFrame:
    """Rejection rates by test, encoder and shift over sample sizes; the paper's below ours."""
    ours = [((r["test"], r["encoder"], r["shift"]), f"n = {r['n']}", share(r)) for r in rows]
    theirs = [
        ((r["test"], r["encoder"], "paper: CIFAR-10.1"), f"n = {r['size']}", f"{r['value']:.3g}")
        for r in paper.TABLE_1.records()
        if r["value"] is not None
    ]
    return _wide([*ours, *theirs], ("test", "encoder", "S_Q"))


def table_2(rows: Sequence[Row]) -> pd.DataFrame:
    """AUROC (%) of the tests' p-values by test and encoder, over anomalies and sample sizes; the paper's below ours."""
    ours = [((r["test"], r["encoder"], r["anomaly"]), f"n = {r['n']}", percent(r)) for r in rows]
    theirs = [
        ((r["test"], r["encoder"], f"paper: {r['distribution']}"), f"n = {r['size']}", f"{r['value']:.1f}")
        for r in paper.TABLE_2.records()
    ]
    return _wide([*ours, *theirs], ("test", "encoder", "anomaly"))


def paper_value(detector: str, encoder: str, anomaly: str) -> tuple[float | None, str]:
    """The paper's AUROC (%) for the nearest kind of anomaly, and what it is of; None where the paper has no such cell.

    Attacks are compared by name; every other set is one of unseen classes, beside the mean of the paper's two.
    """
    attack = PAPER_ATTACKS.get(anomaly)
    table = paper.TABLE_4 if attack else paper.TABLE_3
    found = [
        r["value"]
        for r in table.records()
        if r["detector"] == detector and r["encoder"] == encoder and r["distribution"] in ((attack,) if attack else UNSEEN)
    ]
    return (sum(found) / len(found), attack or " and ".join(UNSEEN)) if found else (None, "")


def table_3_and_4(rows: Sequence[Row]) -> pd.DataFrame:
    """AUROC (%) by detector and encoder over anomaly sets; below each of ours the paper's for the nearest kind of anomaly."""
    cells: list[tuple[Any, Any, str]] = []
    for detector, encoder in dict.fromkeys((r["detector"], r["encoder"]) for r in rows):
        own = [r for r in rows if (r["detector"], r["encoder"]) == (detector, encoder)]
        cells += [((detector, encoder, "ours"), r["anomaly"], percent(r)) for r in own]
        theirs = [(r["anomaly"], paper_value(detector, encoder, r["anomaly"])[0]) for r in own]
        cells += [((detector, encoder, "paper"), name, f"{value:.1f}") for name, value in theirs if value is not None]
    return _wide(cells, ("detector", "encoder", ""))


def table_5(columns: Mapping[str, Row]) -> pd.DataFrame:
    """Mean and variance of m_in and m_out for each set, in the paper's layout; set -> moments."""
    frame = pd.DataFrame(columns)
    lines = {
        ("mean", "m_in"): ("mean_m_in", "{:.3f}"),
        ("mean", "m_out"): ("mean_m_out", "{:.3f}"),
        ("mean", "γ m_out"): ("mean_gamma_m_out", "{:.3f}"),
        ("variance", "m_in"): ("variance_m_in", "{:.1e}"),
        ("variance", "m_out"): ("variance_m_out", "{:.1e}"),
    }
    body = [[form.format(value) for value in frame.loc[key]] for key, form in lines.values()]
    return pd.DataFrame(body, index=pd.MultiIndex.from_tuples(lines), columns=frame.columns)


def verdict(row: Row, value: float | None) -> str:
    """How our AUROC stands to the paper's: "above", "below", "agrees" (inside our interval), or "no counterpart"."""
    if value is None:
        return "no counterpart"
    if row["low"] <= value / 100 <= row["high"]:
        return "agrees"
    return "above" if row["auroc"] > value / 100 else "below"
