"""The p-value threshold explorer: controls over what `thresholds` looks up and `plots` draws. Nothing is computed here.

A move of the slider sends numbers, a few images and an SVG of marks; the curves below are drawn when detector or sets change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np

from cadetlib import explorer_html, explorer_plots, plots, thresholds

Row = Mapping[str, Any]
_STEP = 0.01  # of the sliders, in powers of ten
SHARES = (0.5, 0.2, 0.1, 0.05, 0.01)  # of anomalies in a batch


def _slider(name: str, value: float, low: float, high: float) -> ipywidgets.FloatLogSlider:
    """A slider from 10 to the power of `low` to 10 to the power of `high`."""
    width = ipywidgets.Layout(width="40em")
    return ipywidgets.FloatLogSlider(
        value=value, base=10, min=low, max=high, step=_STEP, description=name, readout_format=".4f", layout=width
    )


def _start(alpha: float, n_calibration: int) -> float:
    """Where the slider begins: whole steps below alpha, so that the browser does not move it, at or below 1 / (n + 1)."""
    steps = math.ceil(math.log10(alpha * (n_calibration + 1)) / _STEP - 1e-6)
    return math.log10(alpha) - steps * _STEP


class Layers:
    """A figure drawn once with marks that move over it: `draw` when the curves change, `move` when the threshold does.

    >>> layers = Layers()
    >>> layers.draw(explorer_plots.batch(normal=[0.2, 0.6, 1.0], odd=[0.01, 0.02, 0.3]))
    >>> layers.move([explorer_plots.Mark(0, [(0.5, 0.05)])])
    >>> bytes(layers.picture.value[1:4]), layers.marks.value.count("<circle")
    (b'PNG', 1)
    """

    def __init__(self) -> None:
        same_place = dict(grid_area="1 / 1 / 2 / 2", margin="0")
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(**same_place))
        self.marks = ipywidgets.HTML(layout=ipywidgets.Layout(**same_place))
        one_cell = ipywidgets.Layout(grid_template_columns="max-content", overflow="visible")
        self.widget = ipywidgets.GridBox([self.picture, self.marks], layout=one_cell)

    def draw(self, figure: Any) -> None:
        self.figure = figure
        self.picture.value = explorer_plots.freeze(figure)
        width, height = (f"{side * figure.dpi:.0f}px" for side in figure.get_size_inches())
        for layer in (self.picture, self.marks):
            layer.layout.width = layer.layout.min_width = width
            layer.layout.height = height

    def move(self, marks: Sequence[explorer_plots.Mark]) -> None:
        self.marks.value = explorer_plots.overlay(self.figure, marks)


class ThresholdExplorer:
    """The controls and what they show. `.widget` is what a notebook displays; `.threshold` what is chosen now.

    detectors: rows with `name`, `fingerprint`, `calibration_scores` (ascending) and `curves` (see `thresholds`), of which the
    kind "in" marks in-distribution sets; sets: name -> images (N, 3, H, W); save_to: the file that "Save" proposes.

    >>> normal = dict(name="test", kind="in", p_values=[0.1, 0.5, 1.0], scores=[0.2, 0.5, 0.9], images=[0, 2, 1])
    >>> odd = dict(name="PGD", kind="out", p_values=[0.1, 0.1, 0.5], scores=[0.0, 0.1, 0.5], images=[1, 0, 2])
    >>> row = dict(name="mine", fingerprint="of mine", calibration_scores=np.arange(9) / 9, curves=[normal, odd])
    >>> pictures = {name: np.zeros((3, 3, 8, 8)) for name in ("test", "PGD")}
    >>> explorer = ThresholdExplorer([row], pictures, alpha=0.1, q=0.1, save_to="threshold.json")
    >>> explorer.slider.value = 0.5  # as by hand
    >>> explorer.threshold, "<b>66.7 %</b>" in explorer.numbers.value  # of the normal images
    (0.5, True)
    """

    def __init__(self, detectors: Sequence[Row], sets: Mapping[str, Any], alpha: float, q: float, save_to: str | Path) -> None:
        if not detectors:
            raise ValueError("detectors: found none, expected at least one")
        self.detectors = {row["name"]: row for row in detectors}
        self.uri = functools.lru_cache(maxsize=4096)(lambda name, i: explorer_html.image_uri(sets[name][i]))
        first = detectors[0]
        names = {kind: [c["name"] for c in first["curves"] if (c["kind"] == "in") == (kind == "in")] for kind in ("in", "out")}
        self.detector = ipywidgets.Dropdown(options=list(self.detectors), description="detector")
        self.normal = ipywidgets.Dropdown(options=names["in"], description="normal")
        self.anomalies = ipywidgets.SelectMultiple(options=names["out"], value=names["out"], description="anomalies")
        self.anomalies.rows = min(6, len(names["out"]))
        self.alpha = min(max(alpha, 1 / (len(first["calibration_scores"]) + 1)), 1.0)
        self.slider = _slider("p ≤", self.alpha, _start(self.alpha, len(first["calibration_scores"])), 0.0)
        self.q = _slider("q =", q, float(np.log10(q)) - 2, float(np.log10(0.5)))
        self.share = ipywidgets.Dropdown(options=[(f"{s:.0%}", s) for s in SHARES], value=0.5, description="share of these")
        self.file = ipywidgets.Text(value=str(save_to), description="file", layout=ipywidgets.Layout(width="40em"))
        self.numbers, self.images, self.decision, self.saved = (ipywidgets.HTML() for _ in range(4))
        self.curves, self.batch = Layers(), Layers()
        self.widget = self._arranged()
        self._connect()
        self.select()

    def _arranged(self) -> ipywidgets.Widget:
        button = ipywidgets.Button(description="Save", tooltip="Keep this threshold for the command line and CADet.predict")
        button.on_click(lambda _: self.save())
        one = ipywidgets.VBox([self.numbers, self.curves.widget, self.images])
        many = ipywidgets.VBox([ipywidgets.HBox([self.q, self.share]), self.decision, self.batch.widget])
        tabs = ipywidgets.Tab([one, many], titles=["One image", "A batch"])
        choice = ipywidgets.HBox([ipywidgets.VBox([self.detector, self.normal]), self.anomalies])
        keep = ipywidgets.HBox([self.file, button, self.saved])
        return ipywidgets.VBox([choice, self.slider, tabs, keep]).add_class("cadet-explorer")

    def _connect(self) -> None:
        for control in (self.detector, self.normal, self.anomalies):
            control.observe(lambda _: self.select(), names="value")
        self.slider.observe(lambda _: self.move(), names="value")
        self.q.observe(lambda _: self.move_batch(), names="value")
        self.share.observe(lambda _: self.select_batch(), names="value")

    @property
    def threshold(self) -> float:
        """The chosen threshold, on the grid of p-values k / (n + 1) where it is meant to be: the browser counts in logarithms."""
        n = len(self.detectors[self.detector.value]["calibration_scores"])
        value = float(f"{self.slider.value:.8g}")
        k = min(n + 1, max(1, round(value * (n + 1))))
        return k / (n + 1) if value * (n + 1) < 1 or abs(value * (n + 1) / k - 1) < 1e-6 else value

    def select(self) -> None:
        """Another detector or other sets: everything is drawn anew."""
        row = self.detectors[self.detector.value]
        self.calibration = row["calibration_scores"]
        self.slider.min = _start(self.alpha, len(self.calibration))
        colours = {c["name"]: plots.COLOURS[k % len(plots.COLOURS)] for k, c in enumerate(row["curves"])}
        named = self.anomalies.value or self.anomalies.options[:1]
        picked = thresholds.chosen(row["curves"], self.normal.value, named)
        self.shown = [{**curve, "colour": colours[curve["name"]]} for curve in picked]
        self.curves.draw(explorer_plots.explorer(self.shown))
        self.select_batch()
        self.move()

    def select_batch(self) -> None:
        """Another batch: as many normal images and anomalies, of all sets shown, as the share asks for."""
        odd: Any = np.sort(np.concatenate([curve["p_values"] for curve in self.shown[1:]]))
        self.normal_p, self.odd_p = thresholds.batch_parts(self.shown[0]["p_values"], odd, self.share.value)
        self.batch.draw(explorer_plots.batch(self.normal_p, self.odd_p))
        self.move_batch()

    def move(self) -> None:
        """Another threshold: look-ups, marks and a few images."""
        n, value = len(self.calibration), self.threshold
        self.saved.value = ""  # what was saved is not what is shown
        point = thresholds.operating_point(self.shown, n, value)
        self.numbers.value = explorer_html.operating_html(self.shown, point, value, n)
        self.curves.move(explorer_plots.threshold_marks(self.shown, self.calibration, value))
        self.images.value = explorer_html.examples_html(thresholds.examples(self.shown, value), self.uri)
        self.move_batch()

    def move_batch(self) -> None:
        """Another threshold or level for the batch."""
        rows = thresholds.batch_decision(self.normal_p, self.odd_p, self.threshold, self.q.value)
        self.decision.value = explorer_html.batch_html(rows, self.q.value)
        smallest = min(self.normal_p[0], self.odd_p[0])
        self.batch.move(explorer_plots.batch_marks(rows[0]["n"], self.threshold, self.q.value, smallest))

    def save(self) -> None:
        """Write the threshold with its guarantees, and what it found here, to the file that is named."""
        row = self.detectors[self.detector.value]
        kept = thresholds.guaranteed(self.threshold, row["fingerprint"], len(self.calibration))
        found = thresholds.operating_point(self.shown, len(self.calibration), self.threshold)["flagged"]
        try:
            path = thresholds.write(self.file.value, kept, detector_name=row["name"], flagged=found)
            self.saved.value = f"saved: {path.name}, p ≤ {kept.threshold:.4g}"
        except (OSError, ValueError) as error:  # ValueError: of an empty name
            self.saved.value = f"not saved: {getattr(error, 'strerror', None) or error}"


def threshold_explorer(
    detectors: Sequence[Row], sets: Mapping[str, Any], alpha: float = 0.05, q: float = 0.1, save_to: str | Path = "threshold.json"
) -> ipywidgets.Widget:
    """The explorer as a widget: see `ThresholdExplorer`.

    >>> normal = dict(name="test", kind="in", p_values=[0.1, 0.5, 1.0], scores=[0.2, 0.5, 0.9], images=[0, 2, 1])
    >>> odd = dict(name="PGD", kind="out", p_values=[0.1, 0.1, 0.5], scores=[0.0, 0.1, 0.5], images=[1, 0, 2])
    >>> row = dict(name="mine", fingerprint="of mine", calibration_scores=np.arange(9) / 9, curves=[normal, odd])
    >>> pictures = {name: np.zeros((3, 3, 8, 8)) for name in ("test", "PGD")}
    >>> [type(part).__name__ for part in threshold_explorer([row], pictures, alpha=0.1).children]
    ['HBox', 'FloatLogSlider', 'Tab', 'HBox']
    """
    return ThresholdExplorer(detectors, sets, alpha, q, save_to).widget
