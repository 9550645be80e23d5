"""The p-value threshold explorer: a slider over what `plots.operating_point` draws. Nothing is computed but look-ups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np

from cadetlib import checks, metrics, plots

Row = Mapping[str, Any]


def operating_point(curves: Sequence[Row], n_calibration: int, threshold: float) -> dict[str, Any]:
    """What a threshold on the p-value does: the false positive rate it promises and the share of each set it flags.

    curves: per set `name`, `kind` ("in" or other) and sorted `p_values` -> {"expected": rate, "flagged": name -> share}.
    """
    checks.in_open_interval(threshold, "threshold", 0.0, 1.0 + 1e-12)
    shares = {c["name"]: float(np.searchsorted(c["p_values"], threshold, side="right")) / len(c["p_values"]) for c in curves}
    return {"expected": metrics.beta_false_positive_interval(n_calibration, min(threshold, 1 - 1e-12)), "flagged": shares}


def sentence(point: Mapping[str, Any], threshold: float) -> str:
    """An operating point in words."""
    expected = point["expected"]
    flagged = ", ".join(f"{name} {share:.1%}" for name, share in point["flagged"].items())
    promise = f"promises {expected.expected:.1%} false positives [{expected.low:.1%}, {expected.high:.1%}]"
    return f"p ≤ {threshold:.4g} {promise}; flags {flagged}"


def threshold_explorer(curves: Sequence[Row], n_calibration: int, alpha: float = 0.05) -> ipywidgets.Widget:
    """A slider for the threshold, logarithmic from 1 / (n_calibration + 1) to 1, over the figure and numbers it stands for."""
    slider = ipywidgets.FloatLogSlider(
        value=alpha,
        base=10,
        min=float(np.log10(1 / (n_calibration + 1))),
        max=0.0,
        step=0.01,
        description="p ≤",
        readout_format=".4f",
        continuous_update=False,
        layout=ipywidgets.Layout(width="34em"),
    )
    words, picture = ipywidgets.HTML(), ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))

    def show(change: Any = None) -> None:
        point = operating_point(curves, n_calibration, slider.value)
        words.value = sentence(point, slider.value)
        picture.value = plots.png(plots.operating_point(curves, slider.value, point["expected"]._asdict()))

    slider.observe(show, names="value")
    show()
    return ipywidgets.VBox([slider, words, picture])
