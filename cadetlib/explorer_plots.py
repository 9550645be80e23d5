"""The threshold explorer's figures: each is drawn once, and marks move over it as an SVG of a few hundred bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cadetlib import thresholds
from cadetlib.plots import COLOURS, GREY, STYLE, Row, new_figure, percent


class Mark(NamedTuple):
    """What moves with a threshold, in the data coordinates of a panel: a dot (one point), a line through several, or, with
    None for y, a vertical line through the panel.

    >>> dot, line = Mark(1, [(0.05, 0.8)], "#0072B2"), Mark(0, [(0.05, None)])
    >>> line.dashed
    False
    """

    panel: int
    points: Sequence[tuple[float, float | None]]
    colour: str = "#000000"
    dashed: bool = False


def colour_of(curve: Row, k: int) -> str:
    """A set's own colour, which stays when other sets come and go; else that of its place.

    >>> colour_of(dict(name="PGD", colour="#D55E00"), 0), colour_of(dict(name="PGD"), 0)
    ('#D55E00', '#0072B2')
    """
    return curve.get("colour") or COLOURS[k % len(COLOURS)]


def _dash(curve: Row) -> str:
    return "--" if curve["kind"] == "in" else "-"


def _spots(axes: Axes, mark: Mark) -> list[tuple[float, float]]:
    """A mark's points, those of a vertical line from the bottom of the panel to its top."""
    low, high = axes.get_ylim()
    return [(x, end) for x, y in mark.points for end in ((low, high) if y is None else (y,))]


def _draw_marks(panels: Sequence[Axes], marks: Sequence[Mark]) -> None:
    for mark in marks:
        spots = _spots(panels[mark.panel], mark)
        look: Any = dict(marker="o", ms=7, mec="white") if len(spots) == 1 else dict(ls="--" if mark.dashed else "-", lw=1.3)
        panels[mark.panel].plot(*zip(*spots, strict=True), color=mark.colour, zorder=5, scaley=False, clip_on=False, **look)


def _flagged_panel(axes: Axes, curves: Sequence[Row]) -> None:
    for k, curve in enumerate(curves):
        p = np.asarray(curve["p_values"])
        axes.step(np.append(p, 1), np.append(np.arange(1, len(p) + 1), len(p)) / len(p), where="post",
                  color=colour_of(curve, k), ls=_dash(curve), label=curve["name"])  # fmt: skip
    low = min(float(np.min(curve["p_values"])) for curve in curves)
    axes.set(xscale="log", xlim=(low, 1), ylim=(0, 1.01), xlabel="threshold on the p-value", ylabel="share of images flagged")
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.set_title("What is flagged")


def _roc_panel(axes: Axes, normal: Row, others: Sequence[Row]) -> None:
    scores = np.asarray(normal["scores"])
    alarms = np.arange(len(scores) + 1) / len(scores)
    for k, curve in enumerate(others, 1):
        found = np.searchsorted(np.asarray(curve["scores"]), scores, side="right") / len(curve["scores"])
        axes.plot(alarms, np.append(found, 1), color=colour_of(curve, k))
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="share of normal images flagged", ylabel="share of anomalies flagged")
    axes.xaxis.set_major_formatter(FuncFormatter(percent))
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.set_title("ROC")


def _histogram_panel(axes: Axes, curves: Sequence[Row], key: str, edges: Any) -> None:
    for k, curve in enumerate(curves):
        counts, _ = np.histogram(np.clip(curve[key], edges[0], edges[-1]), edges)
        axes.stairs(counts / len(curve[key]), edges, color=colour_of(curve, k), ls=_dash(curve), lw=1.4)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, None), ylabel="share of images")
    axes.yaxis.set_major_formatter(FuncFormatter(percent))


def explorer(curves: Sequence[Row], marks: Sequence[Mark] = ()) -> Figure:
    """Four panels on what a detector does: shares flagged, ROC, scores, p-values; `marks` as `threshold_marks` gives them.

    curves: the in-distribution set first, then sets of anomalies, with `p_values` and `scores`, each ascending.

    >>> normal = dict(name="test", kind="in", p_values=[0.1, 0.5, 1.0], scores=[0.2, 0.5, 0.9])
    >>> odd = dict(name="PGD", kind="out", p_values=[0.1, 0.1, 0.5], scores=[0.0, 0.1, 0.5])
    >>> [axes.get_title("left") for axes in explorer([normal, odd]).axes[:3]]
    ['What is flagged', 'ROC', 'Scores']
    """
    every = np.concatenate([curve["scores"] for curve in curves])
    low, high = np.quantile(every, [0.005, 1])
    with sns.axes_style("ticks"), plt.rc_context(STYLE | {"figure.dpi": 100}):
        figure, grid = plt.subplots(2, 2, figsize=(9.4, 6.4), layout="constrained")
        panels = list(grid.flat)
        _flagged_panel(panels[0], curves)
        _roc_panel(panels[1], curves[0], curves[1:])
        _histogram_panel(panels[2], curves, "scores", np.linspace(low, high, 41))
        panels[2].set(title="Scores", xlabel="score (left: anomalous)")
        _histogram_panel(panels[3], curves, "p_values", np.linspace(0, 1, 21))
        panels[3].set(title="p-values (of normal images: even)", xlabel="p-value (left: anomalous)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False, fontsize=9)
        _draw_marks(panels, marks)
        plt.close(figure)
        return figure


def threshold_marks(curves: Sequence[Row], calibration_scores: Sequence[float], threshold: float) -> list[Mark]:
    """A threshold in the panels of `explorer`: lines at the p-value and at the score that it stands for, and dots on curves.

    >>> normal = dict(name="test", kind="in", p_values=[0.1, 0.5, 1.0], scores=[0.2, 0.5, 0.9])
    >>> marks = threshold_marks([normal], np.arange(9) / 9, 0.5)
    >>> [mark.panel for mark in marks], marks[-1].points  # the last is the dot on the curve of `test`
    ([0, 1, 3, 2, 0], [(0.5, 0.6666666666666666)])
    """
    shares = [thresholds.n_flagged(curve, threshold) / len(curve["p_values"]) for curve in curves]
    colours = [colour_of(curve, k) for k, curve in enumerate(curves)]
    score = thresholds.score_at(calibration_scores, threshold)
    lines = [(0, threshold), (1, shares[0]), (3, threshold)]
    lines += [(2, score)] if score is not None and np.isfinite(score) else []
    marks = [Mark(panel, [(x, None)]) for panel, x in lines]
    marks += [Mark(0, [(threshold, share)], colour) for share, colour in zip(shares, colours, strict=True)]
    return marks + [Mark(1, [(shares[0], y)], colour) for y, colour in zip(shares[1:], colours[1:], strict=True)]


def batch(normal: Sequence[float], odd: Sequence[float], marks: Sequence[Mark] = ()) -> Figure:
    """A batch of images, p-values by rank, as Benjamini and Hochberg look at them; `marks` as `batch_marks` gives them.

    normal, odd: the p-values of the in-distribution images and of the anomalies in the batch.

    >>> figure = batch(normal=[0.2, 0.6, 1.0], odd=[0.01, 0.02, 0.3], marks=batch_marks(6, 0.05, 0.1, smallest=0.01))
    >>> figure.axes[0].get_ylabel()
    'p-value'
    """
    p = np.concatenate([normal, odd])
    order = np.argsort(p, kind="stable")
    rank = np.arange(1, len(p) + 1) / len(p)
    with new_figure(1, 6.4, 3.8) as (figure, (axes,)):
        for name, colour, chosen in (("anomaly", COLOURS[1], order >= len(normal)), ("normal", COLOURS[0], order < len(normal))):
            axes.plot(rank[chosen], p[order][chosen], "o", ms=4, color=colour, alpha=0.7, mew=0, label=name)
        axes.plot([], [], color=COLOURS[6], label="the threshold")
        axes.plot([], [], color=COLOURS[3], ls="--", label="q × rank: Benjamini–Hochberg")
        axes.set(xscale="log", yscale="log", xlim=(rank[0], 1), ylim=(p.min() / 1.5, 1.2))
        axes.set(xlabel="rank of the image, as a share of the batch", ylabel="p-value")
        axes.legend(frameon=False, loc="upper left", fontsize=9)
        _draw_marks([axes], marks)
        return figure


def batch_marks(n: int, threshold: float, q: float, smallest: float) -> list[Mark]:
    """The two rules in `batch`: p = threshold, level; p = q k / n, rising (dashed) from the `smallest` p-value.

    >>> plain, rising = batch_marks(100, threshold=0.05, q=0.1, smallest=0.001)
    >>> plain.points, rising.points[-1]
    ([(0.01, 0.05), (1, 0.05)], (1, 0.1))
    """
    first = min(1.0, max(1 / n, smallest / q / 1.5))
    return [Mark(0, [(1 / n, threshold), (1, threshold)]), Mark(0, [(first, q * first), (1, q)], COLOURS[3], dashed=True)]


def freeze(figure: Figure) -> bytes:
    """Lay a figure out for good and draw it at twice its pixels: the PNG over which `overlay` puts marks.

    >>> figure = batch(normal=[0.2, 0.6, 1.0], odd=[0.01, 0.02, 0.3])
    >>> freeze(figure)[1:4]
    b'PNG'
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=2 * figure.dpi)
    figure.draw_without_rendering()  # savefig leaves the transforms of its own resolution behind
    return buffer.getvalue()


def overlay(figure: Figure, marks: Sequence[Mark]) -> str:
    """Marks as an SVG of the size of a frozen figure, to lie over it. A few hundred bytes, made in well under a millisecond.

    >>> figure = batch(normal=[0.2, 0.6, 1.0], odd=[0.01, 0.02, 0.3])
    >>> picture = freeze(figure)
    >>> overlay(figure, batch_marks(6, 0.05, 0.1, smallest=0.01)).count("<polyline")
    2
    """
    width, height = figure.get_size_inches() * figure.dpi
    shapes = []
    for mark in marks:
        axes = figure.axes[mark.panel]
        shapes.append(_shape(axes.transData.transform(_spots(axes, mark)), height, mark))
    size = f'width="{width:.0f}" height="{height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="display:block" aria-hidden="true">{"".join(shapes)}</svg>'


def _shape(pixels: Any, height: float, mark: Mark) -> str:
    spots = [(x, height - y) for x, y in pixels]
    if len(spots) == 1:
        return f'<circle cx="{spots[0][0]:.1f}" cy="{spots[0][1]:.1f}" r="4.5" fill="{mark.colour}" stroke="white"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    dash = ' stroke-dasharray="5 3"' if mark.dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{mark.colour}" stroke-width="1.5"{dash}/>'


EXAMPLES = {
    "flagged": "Flagged, rightly",
    "missed": "Missed anomalies",
    "falsely flagged": "Falsely flagged normal images",
}


def examples(found: Mapping[str, Sequence[thresholds.Example]], sets: Mapping[str, Any]) -> Figure:
    """The same as a figure: sets holds the images (N, 3, H, W) of each set.

    >>> found = {"flagged": [thresholds.Example("PGD", 0, 0.012)], "missed": [], "falsely flagged": []}
    >>> examples(found, {"PGD": np.zeros((1, 3, 8, 8))}).axes[0].get_title()
    'p = 0.012\\nPGD'
    """
    columns = max(1, *(len(items) for items in found.values()))
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(1.15 * columns, 5.0), layout="constrained")
        parts: Any = figure.subfigures(3, 1)
        for part, (kind, title) in zip(parts, EXAMPLES.items(), strict=True):
            part.suptitle(title if found[kind] else f"{title}: none", fontsize=11, x=0.01, ha="left")
            places = part.subplots(1, columns, squeeze=False)[0]
            for place in places:
                place.axis("off")
            for place, example in zip(places, found[kind], strict=False):
                place.imshow(np.asarray(sets[example.set][example.image]).transpose(1, 2, 0), interpolation="nearest")
                place.set_title(f"p = {example.p_value:.3g}\n{example.set}", fontsize=7, loc="center")
        plt.close(figure)
        return figure
