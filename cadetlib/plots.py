"""Every figure, as a pure function of saved results: rows in, matplotlib figure out. Nothing is computed or read here.

One style: colours of Okabe and Ito (2008), which colour-blind readers tell apart; names written at the lines; the paper's
number, where there is one, as a hollow marker or a dashed line.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

Row = Mapping[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
GREY = "#6B6B6B"
_STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


@contextmanager
def _figure(columns: int = 1, width: float = 5.4, height: float = 3.6, **options: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `columns` panels in the project's style, laid out when the block ends and not shown by itself."""
    with sns.axes_style("ticks"), plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained", **options)
        yield figure, list(axes[0])
        plt.close(figure)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.055) -> None:
    """Names at the right ends of lines (x, y, name, colour), pushed apart so that none covers another."""
    low, high = axes.get_ylim()
    position = -np.inf
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        position = max((y - low) / (high - low), position + gap)
        axes.annotate(
            name,
            (x, y),
            xytext=(1.02, position),
            textcoords=("axes fraction", "axes fraction"),
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def _plain_log(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with the values that were tried as its ticks."""
    axes.set_xscale("log")
    axes.set_xticks(list(values), [f"{v:g}" for v in values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def training(logs: Mapping[str, Sequence[Row]]) -> Figure:
    """Loss and learning rate over epochs, and kNN accuracy where it was measured. logs: run -> lines of its log."""
    with _figure(3, 4.2, 3.2) as (figure, (loss, rate, knn)):
        for (name, lines), colour in zip(logs.items(), COLOURS, strict=False):
            steps = [line for line in lines if "loss" in line]
            accuracy = [line for line in lines if "knn_accuracy" in line]
            loss.plot([line["epoch"] for line in steps], [line["loss"] for line in steps], color=colour, label=name)
            rate.plot([line["epoch"] for line in steps], [line["learning_rate"] for line in steps], color=colour)
            knn.plot([line["epoch"] for line in accuracy], [line["knn_accuracy"] for line in accuracy], "o-", ms=3, color=colour)
        loss.set(title="Training loss per image", xlabel="epoch", ylabel="loss (nats)", yscale="log")
        rate.set(title="Learning rate", xlabel="epoch", ylabel="learning rate")
        knn.set(title="Nearest-neighbour accuracy, held out", xlabel="epoch", ylabel="accuracy", ylim=(None, 1))
        loss.legend(frameon=False)
        return figure


def rejection_rates(rows: Sequence[Row], alpha: float = 0.05) -> Figure:
    """Rejection rate of MMD and MMD-CC against sample size, a panel per shift, a colour per encoder (Table 1)."""
    shifts = list(dict.fromkeys(row["shift"] for row in rows))
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    with _figure(len(shifts), 4.6, 3.4, sharey=True) as (figure, panels):
        for axes, shift in zip(panels, shifts, strict=True):
            ends = []
            for encoder, colour in zip(encoders, COLOURS, strict=False):
                for test, dash in (("MMD", "-"), ("MMD-CC", "--")):
                    line = sorted(
                        (r for r in rows if (r["shift"], r["encoder"], r["test"]) == (shift, encoder, test)), key=lambda r: r["n"]
                    )
                    n, rate = [r["n"] for r in line], [r["rate"] for r in line]
                    axes.plot(n, rate, dash, marker="o", ms=4, color=colour)
                    axes.fill_between(n, [r["low"] for r in line], [r["high"] for r in line], color=colour, alpha=0.1, lw=0)
                    ends.append((n[-1], rate[-1], f"{test}, {encoder}", colour))
            axes.axhline(alpha, color=GREY, lw=1, ls=":")
            axes.set(title=shift, xlabel="samples per set, n", ylim=(-0.03, 1.03))
            _plain_log(axes, sorted({r["n"] for r in rows}))
            _label_ends(axes, ends)
        panels[0].set_ylabel(f"rejection rate at α = {alpha:g}")
        return figure


def p_value_roc(rows: Sequence[Row], test: str = "MMD-CC") -> Figure:
    """Figure 1a: rejection rate against the threshold on the p-value, a line per sample size. rows with `p_values`."""
    with _figure(1, 5.2, 3.8) as (figure, (axes,)):
        chosen = sorted((r for r in rows if r["test"] == test), key=lambda r: r["n"])
        ends = []
        for row, colour in zip(chosen, COLOURS, strict=False):
            p = np.sort(np.append(row["p_values"], [0, 1]))
            detected = np.append(np.arange(len(p) - 2 + 1) / (len(p) - 2), 1)
            axes.step(p, detected, where="post", color=colour)
            ends.append((1.0, float(np.interp(0.5, p, detected)), f"n = {row['n']}", colour))
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
        axes.set(xlabel="threshold on the p-value", ylabel="share of tests rejected", xlim=(0, 1), ylim=(0, 1.01))
        _label_ends(axes, ends)
        return figure


def small_samples(rows: Sequence[Row]) -> Figure:
    """Table 2: AUROC of the tests' p-values against the number of samples, a panel per anomaly, a colour per encoder."""
    anomalies = list(dict.fromkeys(row["anomaly"] for row in rows))
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    with _figure(len(anomalies), 4.4, 3.4, sharey=True) as (figure, panels):
        for axes, anomaly in zip(panels, anomalies, strict=True):
            ends = []
            for encoder, colour in zip(encoders, COLOURS, strict=False):
                for test, dash in (("MMD", "-"), ("MMD-CC", "--")):
                    line = [r for r in rows if (r["anomaly"], r["encoder"], r["test"]) == (anomaly, encoder, test)]
                    axes.plot([r["n"] for r in line], [r["auroc"] for r in line], dash, marker="o", ms=4, color=colour)
                    ends.append((line[-1]["n"], line[-1]["auroc"], f"{test}, {encoder}", colour))
            axes.axhline(0.5, color=GREY, lw=1, ls=":")
            axes.set(title=anomaly, xlabel="samples per set, n", ylim=(None, 1.02))
            _plain_log(axes, sorted({r["n"] for r in rows}))
            _label_ends(axes, ends)
        panels[0].set_ylabel("AUROC of the p-value")
        return figure


def detection(rows: Sequence[Row]) -> Figure:
    """Tables 3 and 4 as dots with intervals: AUROC per anomaly set, a colour per detector and encoder."""
    anomalies = list(dict.fromkeys(row["anomaly"] for row in rows))
    systems = list(dict.fromkeys((row["detector"], row["encoder"]) for row in rows))
    with _figure(1, 7.2, 0.9 + 0.24 * len(anomalies) * max(2, len(systems))) as (figure, (axes,)):
        step = 0.8 / len(systems)
        for k, (system, colour) in enumerate(zip(systems, COLOURS * 4, strict=False)):
            for row in (r for r in rows if (r["detector"], r["encoder"]) == system):
                y = anomalies.index(row["anomaly"]) + step * (k - (len(systems) - 1) / 2)
                axes.plot([row["low"], row["high"]], [y, y], color=colour, lw=2, alpha=0.6, solid_capstyle="butt")
                axes.plot(row["auroc"], y, "o", color=colour, ms=5)
                axes.annotate(f"{row['auroc']:.2f}", (row["high"], y), xytext=(4, 0), textcoords="offset points", va="center",
                              fontsize=8, color=colour)  # fmt: skip
            axes.plot([], [], "o-", color=colour, label=f"{system[0]}, {system[1]}")
        axes.axvline(0.5, color=GREY, lw=1, ls=":")
        axes.set(yticks=range(len(anomalies)), yticklabels=anomalies, xlabel="AUROC (mean over splits, 95 % interval)")
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)
        return figure


def roc_curves(curves: Sequence[Row]) -> Figure:
    """Figure 1b: detection rate against false alarms; curves with `anomaly`, `false_alarm_rate`, `detection_rate`, `auroc`."""
    with _figure(1, 4.6, 4.0) as (figure, (axes,)):
        for curve, colour in zip(curves, COLOURS, strict=False):
            label = f"{curve['anomaly']}  {curve['auroc']:.2f}"
            axes.plot(curve["false_alarm_rate"], curve["detection_rate"], color=colour, lw=1.6, label=label)
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
        axes.set(xlabel="false alarms: share of in-distribution images flagged", ylabel="share of anomalies flagged")
        axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        axes.legend(frameon=False, loc="lower right", fontsize=9, title="anomaly  AUROC", title_fontsize=9, alignment="left")
        return figure


def sweep(rows: Sequence[Row], x: str, xlabel: str, log: bool = False, mark: float | None = None) -> Figure:
    """AUROC of CADet against one setting `x`, a line per anomaly set; `mark` is the value used elsewhere (Figure 2)."""
    anomalies = list(dict.fromkeys(row["anomaly"] for row in rows))
    with _figure(1, 5.6, 3.5) as (figure, (axes,)):
        for anomaly, colour in zip(anomalies, COLOURS, strict=False):
            line = sorted((r for r in rows if r["anomaly"] == anomaly), key=lambda r: r[x])
            values = [r[x] for r in line]
            axes.plot(values, [r["auroc"] for r in line], "o-", ms=4, color=colour)
            axes.fill_between(values, [r["low"] for r in line], [r["high"] for r in line], color=colour, alpha=0.12, lw=0)
        axes.axhline(0.5, color=GREY, lw=1, ls=":")
        if mark is not None:
            axes.axvline(mark, color=GREY, lw=1, ls="--")
        if log:
            _plain_log(axes, sorted({r[x] for r in rows}))
        axes.set(xlabel=xlabel, ylabel="AUROC")
        last = {r["anomaly"]: r for r in sorted(rows, key=lambda r: r[x])}
        _label_ends(axes, [(last[a][x], last[a]["auroc"], a, c) for a, c in zip(anomalies, COLOURS, strict=False)])
        return figure


def parts(rows: Sequence[Row]) -> Figure:
    """AUROC of m_in alone, m_out alone and the score, per anomaly set: which similarity sees what."""
    names = ("m_in alone", "m_out alone", "score")
    anomalies = list(dict.fromkeys(row["anomaly"] for row in rows))
    with _figure(1, 6.4, 0.9 + 0.55 * len(anomalies)) as (figure, (axes,)):
        for name, colour, marker in zip(names, COLOURS, "^vo", strict=False):
            for row in (r for r in rows if r["score"] == name):
                y = anomalies.index(row["anomaly"]) + 0.18 * (names.index(name) - 1)
                axes.plot([row["low"], row["high"]], [y, y], color=colour, lw=2, alpha=0.6)
                axes.plot(row["auroc"], y, marker, color=colour, ms=6)
            axes.plot([], [], marker, color=colour, label=name)
        axes.axvline(0.5, color=GREY, lw=1, ls=":")
        axes.set(yticks=range(len(anomalies)), yticklabels=anomalies, xlabel="AUROC (95 % interval)")
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=9)
        return figure


def similarities(points: Sequence[Row]) -> Figure:
    """m_in against gamma m_out, a colour per set; points with `set`, `m_in`, `gamma_m_out`. Lines of equal score are dashed."""
    with _figure(1, 5.8, 4.4) as (figure, (axes,)):
        for point, colour in zip(points, COLOURS, strict=False):
            axes.scatter(point["gamma_m_out"], point["m_in"], s=7, alpha=0.45, lw=0, color=colour, label=point["set"])
        x, y = np.array(axes.get_xlim()), np.array(axes.get_ylim())
        for total in np.linspace(x[0] + y[0], x[1] + y[1], 9)[1:-1]:
            axes.plot(x, total - x, color=GREY, lw=0.6, ls="--", zorder=0)
        axes.set(xlabel="γ · out-similarity", ylabel="intra-similarity, m_in", xlim=x, ylim=y)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2.5, fontsize=9)
        return figure


def _percent(value: float, _: Any = None) -> str:
    return f"{100 * value:g} %"


def operating_point(curves: Sequence[Row], threshold: float, expected: Row) -> Figure:
    """What a threshold on the p-value does: flagged share of each set, and the false positives promised and found.

    curves: per set `name`, `kind` ("in" or other) and sorted `p_values`; expected: `expected`, `low`, `high` of the false
    positive rate at this threshold.
    """
    with _figure(2, 4.9, 3.6) as (figure, (left, right)):
        ends = []
        for curve, colour in zip(curves, COLOURS, strict=False):
            p = np.asarray(curve["p_values"])
            flagged = np.arange(1, len(p) + 1) / len(p)
            dash = "--" if curve["kind"] == "in" else "-"
            left.step(p, flagged, where="post", color=colour, ls=dash)
            ends.append((1.0, float(np.interp(0.3, p, flagged)), curve["name"], colour))
        left.axvline(threshold, color=GREY, lw=1)
        low = min(float(np.min(curve["p_values"])) for curve in curves)
        left.set(xscale="log", xlim=(low, 1), ylim=(0, 1.01), xlabel="threshold on the p-value", ylabel="share of images flagged")
        left.yaxis.set_major_formatter(FuncFormatter(_percent))
        _label_ends(left, ends)
        shares = [float(np.searchsorted(curve["p_values"], threshold, side="right")) / len(curve["p_values"]) for curve in curves]
        bars = right.barh(range(len(curves)), shares, color=[c for c, _ in zip(COLOURS, curves, strict=False)])
        right.bar_label(bars, labels=[f"{100 * share:.1f} %" for share in shares], padding=3, fontsize=9)
        right.axvspan(expected["low"], expected["high"], color=GREY, alpha=0.25, lw=0)
        right.axvline(expected["expected"], color=GREY, lw=1)
        right.set(yticks=range(len(curves)), yticklabels=[curve["name"] for curve in curves], xlim=(0, 1.15))
        right.set(xlabel="share flagged; grey: false positives promised", title=f"at p ≤ {threshold:.4g}")
        right.xaxis.set_major_formatter(FuncFormatter(_percent))
        right.invert_yaxis()
        return figure


def calibration(p_values: Sequence[float], n_calibration: int) -> Figure:
    """Are p-values of fresh in-distribution images uniform? Their distribution against the diagonal, with a 95 % band."""
    p = np.sort(p_values)
    share = np.arange(1, len(p) + 1) / len(p)
    grid = np.linspace(0, 1, 200)
    # Both the calibration and the test images are drawn, so both contribute to the deviation from the diagonal.
    width = 1.96 * np.sqrt(grid * (1 - grid) * (1 / len(p) + 1 / n_calibration))
    with _figure(1, 4.4, 4.0) as (figure, (axes,)):
        axes.fill_between(grid, grid - width, grid + width, color=GREY, alpha=0.2, lw=0)
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
        axes.step(p, share, where="post", color=COLOURS[0])
        axes.set(xlabel="p-value threshold α", ylabel="share of fresh in-distribution images flagged", xlim=(0, 1), ylim=(0, 1))
        axes.set_aspect("equal")
        return figure


def gallery(images: Any, titles: Sequence[str], columns: int = 8) -> Figure:
    """Images (N, 3, H, W) uint8 or [0, 1] in a grid, a short title over each."""
    pixels = np.asarray(images).transpose(0, 2, 3, 1)
    rows = -(-len(pixels) // columns)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.5 * rows), squeeze=False, layout="constrained")
        for place in axes.flat:
            place.axis("off")
        for place, image, title in zip(axes.flat, pixels, titles, strict=False):
            place.imshow(image, interpolation="nearest")
            place.set_title(title, fontsize=8, loc="center")
        plt.close(figure)
        return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, for a widget."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", dpi=110)
    return buffer.getvalue()


def speed(rows: Sequence[Row]) -> Figure:
    """How many times as fast as what it is compared with; rows with `what`, `against`, `ours` and `other` in seconds."""
    ratios = [row["other"] / row["ours"] for row in rows]
    with _figure(1, 8.6, 0.8 + 0.62 * len(rows)) as (figure, (axes,)):
        bars = axes.barh(range(len(rows)), ratios, color=COLOURS[0], height=0.45, left=0)
        axes.bar_label(bars, labels=[f"{ratio:.3g}×" for ratio in ratios], padding=3)
        axes.axvline(1, color=GREY, lw=1, ls="--")
        names = [f"{row['what']}\nagainst {row['against']}" for row in rows]
        axes.set(yticks=range(len(rows)), xscale="log", xlabel="speed, as a multiple of what it is compared with")
        axes.set_yticklabels(names, fontsize=8)
        axes.set_xlim(min(0.5, *ratios), 3 * max(ratios))
        axes.invert_yaxis()
        return figure
