"""The threshold explorer's numbers and images as HTML: what a threshold promises and does, for a widget."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cadetlib import thresholds
from cadetlib.explorer_plots import EXAMPLES, colour_of
from cadetlib.plots import Row


def share_text(share: float) -> str:
    """A share in percent, with as many digits as it takes to tell it from none and from all.

    >>> share_text(0.0512), share_text(0.00031), share_text(0.0)
    ('5.1 %', '0.03 %', '0 %')
    """
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.{1 if 0.005 <= share <= 0.995 else 2}f} %"


def _between(interval: Sequence[float]) -> str:
    return f"[{share_text(interval[0])}, {share_text(interval[1])}]"


def operating_html(curves: Sequence[Row], point: Row, threshold: float, n_calibration: int) -> str:
    """What a threshold promises and does, as a table; `point` as `thresholds.operating_point` gives it.

    >>> curves = [dict(name="test", kind="in", p_values=[0.1, 0.2, 0.6, 1.0])]
    >>> table = operating_html(curves, thresholds.operating_point(curves, 9, 0.2), 0.2, 9)
    >>> "false alarms: test" in table, "<b>50.0 %</b>" in table
    (True, True)
    """
    expected = point["expected"]
    cells = [
        ("threshold", "#000000", f"flag when p ≤ {threshold:.4g}", "", f"{n_calibration} calibration images"),
        (
            "promised",
            "#000000",
            "false alarms promised",
            share_text(expected.expected),
            f"{_between(expected[1:])} in 95 of 100 calibrations",
        ),
    ]
    for k, curve in enumerate(curves):
        name, kind = curve["name"], "false alarms" if curve["kind"] == "in" else "found"
        interval = f"{_between(point['intervals'][name])} for {len(curve['p_values'])} images"
        cells.append((name, colour_of(curve, k), f"{kind}: {name}", share_text(point["flagged"][name]), interval))
    rows = "".join(
        f'<tr><td style="border-left:.5em solid {colour};padding-left:.5em">{html.escape(words)}</td>'
        f'<td data-set="{html.escape(name)}" style="text-align:right;padding:0 1em"><b>{share}</b></td><td>{interval}</td></tr>'
        for name, colour, words, share, interval in cells
    )
    return f'<table class="cadet-numbers" style="line-height:1.5">{rows}</table>'


def batch_html(rows: Sequence[Row], q: float) -> str:
    """Two rules on one batch, as a table; rows as `thresholds.batch_decision` gives them.

    >>> rows = thresholds.batch_decision(normal=[0.5, 0.8], odd=[0.01, 0.02], threshold=0.05, q=0.1)
    >>> "2 of 4" in batch_html(rows, 0.1)
    True
    """
    heads = ("", "flagged", "false among the flagged", "anomalies found", "normal images flagged", "largest p flagged")
    lines = ["".join(f'<th style="text-align:right;padding:0 .8em">{head}</th>' for head in heads)]
    for row in rows:
        shares = [share_text(row[key]) for key in ("false_discovery_rate", "found", "false_alarms")]
        cells = [f"{row['flagged']} of {row['n']}", *shares, "none" if row["cut"] is None else f"{row['cut']:.4g}"]
        numbers = "".join(f'<td style="text-align:right;padding:0 .8em">{cell}</td>' for cell in cells)
        lines.append(f"<td><b>{html.escape(row['rule'])}</b></td>{numbers}")
    note = f"Benjamini–Hochberg keeps the second column at or below q = {q:.3g} on average; a plain threshold does not bound it."
    return f'<table class="cadet-batch">{"".join(f"<tr>{line}</tr>" for line in lines)}</table><p>{note}</p>'


def image_uri(image: Any, side: int = 72) -> str:
    """An image (3, H, W), uint8 or [0, 1], as the data URI of a PNG of at most `side` pixels.

    >>> image_uri(np.zeros((3, 8, 8), dtype=np.uint8))[:22]
    'data:image/png;base64,'
    """
    pixels = np.asarray(image)
    pixels = pixels if pixels.dtype == np.uint8 else (255 * pixels).round().astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def examples_html(found: Mapping[str, Sequence[thresholds.Example]], uri: Callable[[str, int], str]) -> str:
    """Images nearest the threshold with their p-values, a row of each kind; `uri` gives the image of a set and position.

    >>> found = {"flagged": [thresholds.Example("PGD", 3, 0.012)], "missed": [], "falsely flagged": []}
    >>> "p = 0.012<br>PGD" in examples_html(found, lambda name, i: image_uri(np.zeros((3, 8, 8))))
    True
    """
    rows = []
    for kind, title in EXAMPLES.items():
        images = "".join(
            f'<figure style="margin:0;width:72px"><img width="72" height="72" alt="{html.escape(e.set)} {e.image}" '
            f'src="{uri(e.set, e.image)}" style="image-rendering:pixelated;object-fit:contain"><figcaption style="font-size:11px;'
            f'line-height:1.2">p = {e.p_value:.3g}<br>{html.escape(e.set)}</figcaption></figure>'
            for e in found[kind]
        )
        rows.append(f'<h4 style="margin:.6em 0 .2em">{title}</h4><div style="display:flex;gap:8px">{images or "none"}</div>')
    return f'<div class="cadet-examples">{"".join(rows)}</div>'
