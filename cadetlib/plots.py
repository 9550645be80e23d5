"""Every figure of a notebook, as a pure function of saved results: rows in, matplotlib figure out. Nothing is computed here.

The threshold explorer's are in `explorer_plots`.

One style: colours of Okabe and Ito (2008), which colour-blind readers tell apart; names written at the lines; the paper's
number, where there is one, as a hollow marker or a dashed line.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

Row = Mapping[str, Any]
Thing = TypeVar("Thing")
COLOURS = (  # Okabe and Ito's, then Tol's muted ones: told apart by readers who do not see all colours
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F",
    "#882255", "#44AA99", "#332288", "#999933", "#AA4499", "#661100", "#117733", "#88CCEE",
)  # fmt: skip
GREY = "#6B6B6B"
STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


@contextmanager
def new_figure(panels: int = 1, width: float = 5.4, height: float = 3.6, **options: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `panels` in the project's style, laid out when the block ends and not shown.

    Up to four stand side by side; more in rows of three, so that their words stay readable on a page.

    >>> with new_figure(panels=5) as (figure, axes):
    ...     len(axes)
    5
    """
    columns = panels if panels <= 4 else 3
    rows = -(-panels // columns)
    with sns.axes_style("ticks"), plt.rc_context(STYLE):
        size = (width * columns, height * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
        for spare in axes.flat[panels:]:
            spare.set_visible(False)
        yield figure, list(axes.flat[:panels])
        plt.close(figure)


def _coloured(things: Iterable[Thing], first: int = 0) -> list[tuple[Thing, str]]:
    """Each thing with its colour, from the first on, which come again after all have been used: nothing is left out of a figure.

    >>> len(_coloured(range(40)))
    40
    """
    return list(zip(things, itertools.islice(itertools.cycle(COLOURS), first, None), strict=False))


def _luminance(colour: str) -> float:
    """Relative luminance of a colour, as WCAG 2 defines it: 0 black, 1 white."""
    red, green, blue = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _ink(colour: str) -> str:
    """A line's colour for its name on white: darkened until the contrast is the 4.5 : 1 that text needs (WCAG 2, AA).

    >>> _ink("#0072B2"), _ink("#E69F00")
    ('#0072b2', '#9d6d00')
    """
    red, green, blue = to_rgb(colour)
    while 1.05 / (_luminance(to_hex((red, green, blue))) + 0.05) < 4.5:
        red, green, blue = 0.99 * red, 0.99 * green, 0.99 * blue
    return to_hex((red, green, blue))


End = tuple[float, float, str, str]  # of a line: x, y, name, colour


def _label_ends(axes: Axes, ends: Sequence[End], gap: float = 0.055) -> None:
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
            color=_ink(colour),
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
    """Loss, learning rate and images a second over epochs, and kNN accuracy where it was measured. logs: run -> its log.

    >>> log = [dict(epoch=1.0, loss=5.0, learning_rate=0.1, images_per_second=900.0), dict(epoch=1.0, knn_accuracy=0.5)]
    >>> [axes.get_ylabel() for axes in training({"contrastive": log}).axes]
    ['loss (nats)', 'learning rate', 'images per second', 'accuracy']
    """
    with new_figure(4, 3.8, 3.2) as (figure, (loss, rate, speed, knn)):
        for (name, lines), colour in _coloured(logs.items()):
            steps, accuracy = ([line for line in lines if key in line] for key in ("loss", "knn_accuracy"))
            epochs = [line["epoch"] for line in steps]
            loss.plot(epochs, [line["loss"] for line in steps], color=colour, label=name)
            rate.plot(epochs, [line["learning_rate"] for line in steps], color=colour)
            speed.plot(epochs, [line["images_per_second"] for line in steps], color=colour)
            knn.plot([line["epoch"] for line in accuracy], [line["knn_accuracy"] for line in accuracy], "o-", ms=3, color=colour)
        loss.set(title="Training loss per image", xlabel="epoch", ylabel="loss (nats)", yscale="log")
        rate.set(title="Learning rate", xlabel="epoch", ylabel="learning rate")
        speed.set(title="Speed", xlabel="epoch", ylabel="images per second", ylim=(0, None))
        knn.set(title="kNN accuracy, held out", xlabel="epoch", ylabel="accuracy", ylim=(None, 1))
        loss.legend(frameon=False)
        return figure


def rejection_rates(rows: Sequence[Row], alpha: float = 0.05) -> Figure:
    """Rejection rate of MMD and MMD-CC against sample size, a panel per shift, a colour per encoder (Table 1).

    >>> row = dict(encoder="contrastive", shift="CIFAR-10.1", n=50, rate=0.4, low=0.3, high=0.5)
    >>> rejection_rates([row | dict(test="MMD"), row | dict(test="MMD-CC")]).axes[0].get_ylabel()
    'rejection rate at α = 0.05'
    """
    rows = [row for row in rows if row["test"] in ("MMD", "MMD-CC")]
    shifts = list(dict.fromkeys(row["shift"] for row in rows))
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    with new_figure(len(shifts), 4.6, 3.4, sharey=True) as (figure, panels):
        for axes, shift in zip(panels, shifts, strict=True):
            ends = []
            for encoder, colour in _coloured(encoders):
                for test, dash in (("MMD", "-"), ("MMD-CC", "--")):
                    line = [r for r in rows if (r["shift"], r["encoder"], r["test"]) == (shift, encoder, test)]
                    ends.append(_rates_line(axes, line, dash, colour, f"{test}, {encoder}"))
            _finish_rates(axes, rows, shift, alpha, ends)
        return figure


def trained_rejection_rates(rows: Sequence[Row], alpha: float = 0.05) -> Figure:
    """The tests that learn, beside MMD and MMD-CC with the contrastive encoder at the same sample sizes: a panel per shift.

    >>> row = dict(test="ME", encoder="none", shift="CIFAR-10.1", n=50, rate=0.4, low=0.3, high=0.5)
    >>> beside = [row | dict(encoder="contrastive", test=test, rate=0.9) for test in ("MMD", "MMD-CC")]
    >>> [text.get_text() for text in trained_rejection_rates([row, *beside]).axes[0].texts]
    ['ME', 'MMD', 'MMD-CC']
    >>> [text.get_text() for text in trained_rejection_rates(beside).axes[0].texts]
    ['no test that learns was asked for (trained_tests)']
    """
    trained = [row for row in rows if row["encoder"] == "none"]
    if not trained:
        with new_figure(1, 5.4, 0.6) as (figure, (axes,)):
            axes.set_axis_off()
            axes.text(0.5, 0.5, "no test that learns was asked for (trained_tests)", ha="center", va="center")
            return figure
    shifts, sizes = list(dict.fromkeys(row["shift"] for row in trained)), {row["n"] for row in trained}
    beside = [row for row in rows if row["encoder"] == "contrastive" and row["n"] in sizes and row["shift"] in shifts]
    with new_figure(len(shifts), 4.6, 3.4, sharey=True) as (figure, panels):
        for axes, shift in zip(panels, shifts, strict=True):
            ends = []
            for k, (test, colour) in enumerate(_coloured(dict.fromkeys(row["test"] for row in trained), first=1)):
                line = [row for row in trained if (row["shift"], row["test"]) == (shift, test)]
                ends.append(_rates_line(axes, line, "-", colour, test, apart=1 + 0.02 * (k - 1.5)))
            for test, dash in (("MMD", "-"), ("MMD-CC", "--")):
                line = [row for row in beside if (row["shift"], row["test"]) == (shift, test)]
                ends += [_rates_line(axes, line, dash, COLOURS[0], test)] if line else []
            _finish_rates(axes, trained, shift, alpha, ends)
        return figure


def _rates_line(axes: Axes, line: Sequence[Row], dash: str, colour: str, name: str, apart: float = 1.0) -> End:
    """Rejection rates of one test over sample sizes, with their intervals -> the line's end and name, for `_label_ends`.

    apart: a factor on the sizes, by which lines of wide intervals stand apart; their intervals are bars then and not bands.
    """
    line = sorted(line, key=lambda r: r["n"])
    n, rate = [apart * r["n"] for r in line], [r["rate"] for r in line]
    low, high = [r["low"] for r in line], [r["high"] for r in line]
    axes.plot(n, rate, dash, marker="o", ms=4, color=colour)
    if apart == 1:
        axes.fill_between(n, low, high, color=colour, alpha=0.1, lw=0)
    else:
        axes.vlines(n, low, high, color=colour, alpha=0.5)
    return n[-1], rate[-1], name, colour


def _finish_rates(axes: Axes, rows: Sequence[Row], shift: str, alpha: float, ends: Sequence[End]) -> None:
    axes.axhline(alpha, color=GREY, lw=1, ls=":")
    axes.set(title=shift, xlabel="samples per set, n", ylim=(-0.03, 1.03))
    _plain_log(axes, sorted({r["n"] for r in rows}))
    if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel(f"rejection rate at α = {alpha:g}")
    _label_ends(axes, ends)


def p_value_roc(rows: Sequence[Row], test: str = "MMD-CC") -> Figure:
    """Figure 1a: rejection rate against the threshold on the p-value, a line per sample size. rows with `p_values`.

    >>> row = dict(test="MMD-CC", shift="CIFAR-10.1", n=50, p_values=[0.01, 0.2, 0.9])
    >>> p_value_roc([row]).axes[0].get_xlabel()
    'threshold on the p-value'
    """
    with new_figure(1, 5.2, 3.8) as (figure, (axes,)):
        chosen = sorted((r for r in rows if r["test"] == test), key=lambda r: r["n"])
        ends = []
        for row, colour in _coloured(chosen):
            p = np.sort(np.append(row["p_values"], [0, 1]))
            detected = np.append(np.arange(len(p) - 2 + 1) / (len(p) - 2), 1)
            axes.step(p, detected, where="post", color=colour)
            ends.append((1.0, float(np.interp(0.5, p, detected)), f"n = {row['n']}", colour))
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
        axes.set(title=", ".join(dict.fromkeys(row["shift"] for row in chosen)), xlabel="threshold on the p-value")
        axes.set(ylabel="share of tests rejected", xlim=(0, 1), ylim=(0, 1.01))
        _label_ends(axes, ends)
        return figure


def small_samples(rows: Sequence[Row]) -> Figure:
    """Table 2: AUROC of the tests' p-values against the number of samples, a panel per anomaly, a colour per encoder.

    >>> row = dict(encoder="contrastive", anomaly="PGD", n=3, auroc=0.7)
    >>> small_samples([row | dict(test="MMD"), row | dict(test="MMD-CC")]).axes[0].get_ylabel()
    'AUROC of the p-value'
    """
    anomalies = list(dict.fromkeys(row["anomaly"] for row in rows))
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    with new_figure(len(anomalies), 4.4, 3.4, sharey=True) as (figure, panels):
        for axes, anomaly in zip(panels, anomalies, strict=True):
            ends = []
            for encoder, colour in _coloured(encoders):
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
    """Tables 3 and 4 as dots with intervals: AUROC per anomaly set, a colour per detector and encoder.

    >>> row = dict(detector="CADet", encoder="contrastive", anomaly="PGD", auroc=0.95, low=0.9, high=0.99)
    >>> [text.get_text() for text in detection([row]).axes[0].texts]
    ['0.95']
    """
    anomalies = list(dict.fromkeys(row["anomaly"] for row in rows))
    systems = list(dict.fromkeys((row["detector"], row["encoder"]) for row in rows))
    groups = {f"{d}, {e}": [r for r in rows if (r["detector"], r["encoder"]) == (d, e)] for d, e in systems}
    with new_figure(1, 7.2, 0.9 + 0.24 * len(anomalies) * max(2, len(systems))) as (figure, (axes,)):
        _dots(axes, anomalies, groups, "o" * len(groups), height=0.8, numbers=True)
        axes.set(xlabel="AUROC (mean over splits, 95 % interval)")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)
        return figure


def _dots(
    axes: Axes, anomalies: Sequence[str], groups: Mapping[str, Sequence[Row]], markers: str, height: float, numbers: bool = False
) -> None:
    """AUROC as dots with intervals: a line per anomaly, whose `height` the groups of rows share, each with colour and marker."""
    step = height / len(groups)
    for k, (((name, rows), colour), marker) in enumerate(zip(_coloured(groups.items()), markers, strict=True)):
        for row in rows:
            y = anomalies.index(row["anomaly"]) + step * (k - (len(groups) - 1) / 2)
            axes.plot([row["low"], row["high"]], [y, y], color=colour, lw=2, alpha=0.6, solid_capstyle="butt")
            axes.plot(row["auroc"], y, marker, color=colour, ms=5)
            if numbers:
                axes.annotate(f"{row['auroc']:.2f}", (row["high"], y), xytext=(4, 0), textcoords="offset points", va="center",
                              fontsize=8, color=_ink(colour))  # fmt: skip
        axes.plot([], [], f"{marker}-", color=colour, label=name)
    axes.axvline(0.5, color=GREY, lw=1, ls=":")
    axes.set(yticks=range(len(anomalies)), yticklabels=anomalies)
    axes.invert_yaxis()


def comparison(rows: Sequence[Row]) -> Figure:
    """Tables 3 and 4 at a glance: AUROC (%) of every system against every kind of anomaly, the best on top; CADet in bold.

    >>> row = dict(detector="CADet", encoder="contrastive", anomaly="PGD", auroc=0.95)
    >>> [label.get_text() for label in comparison([row, row | dict(detector="MSP", auroc=0.97)]).axes[0].get_yticklabels()]
    ['MSP, contrastive', 'CADet, contrastive']
    """
    systems = list(dict.fromkeys((row["detector"], row["encoder"]) for row in rows))
    anomalies = list(dict.fromkeys(row["anomaly"] for row in rows))
    auroc = {((row["detector"], row["encoder"]), row["anomaly"]): 100 * row["auroc"] for row in rows}
    mean = {s: np.mean([auroc[s, a] for a in anomalies if (s, a) in auroc]) for s in systems}
    systems.sort(key=lambda s: -mean[s])
    grid = np.array([[auroc.get((s, a), np.nan) for a in anomalies] for s in systems])
    with new_figure(1, 3.4 + 0.95 * len(anomalies), 1.0 + 0.26 * len(systems)) as (figure, (axes,)):
        names = [f"{detector}, {encoder}" for detector, encoder in systems]
        sns.heatmap(
            grid, vmin=0, vmax=100, center=50, cmap="vlag", annot=True, fmt=".0f", annot_kws={"fontsize": 8}, ax=axes,
            xticklabels=anomalies, yticklabels=names, linewidths=0.5,
            cbar_kws={"label": "AUROC (%): 50 is a coin toss", "shrink": 0.4},
        )  # fmt: skip
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        for label, (detector, _) in zip(axes.get_yticklabels(), systems, strict=True):
            label.set(fontsize=9, fontweight="bold" if detector == "CADet" else "normal")
        for label in axes.get_xticklabels():
            label.set(rotation=25, ha="left", fontsize=9)
        return figure


def roc_curves(curves: Sequence[Row]) -> Figure:
    """Figure 1b: detection rate against false alarms; curves with `anomaly`, `false_alarm_rate`, `detection_rate`, `auroc`.

    >>> curve = dict(anomaly="PGD", false_alarm_rate=[0, 1], detection_rate=[0.5, 1], auroc=0.75)
    >>> roc_curves([curve]).axes[0].get_legend().get_texts()[0].get_text()
    'PGD  0.75'
    """
    with new_figure(1, 6.6, 4.2) as (figure, (axes,)):
        for curve, colour in _coloured(curves):
            label = f"{curve['anomaly']}  {curve['auroc']:.2f}"
            axes.plot(curve["false_alarm_rate"], curve["detection_rate"], color=colour, lw=1.6, label=label)
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
        axes.set(xlabel="false alarms: share of in-distribution images flagged", ylabel="share of anomalies flagged")
        axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        where: Any = dict(loc="center left", bbox_to_anchor=(1.02, 0.5), alignment="left")
        axes.legend(frameon=False, fontsize=9, title="anomaly  AUROC", title_fontsize=9, **where)
        return figure


def sweep(rows: Sequence[Row], x: str, xlabel: str, log: bool = False, mark: float | None = None) -> Figure:
    """AUROC of CADet against one setting `x`, a line per anomaly set; `mark` is the value used elsewhere (Figure 2).

    >>> rows = [dict(anomaly="PGD", n_views=n, auroc=0.9, low=0.8, high=1.0) for n in (10, 50)]
    >>> sweep(rows, "n_views", "views per image", mark=50).axes[0].get_xlabel()
    'views per image'
    """
    anomalies = list(dict.fromkeys(row["anomaly"] for row in rows))
    with new_figure(1, 5.6, 3.5) as (figure, (axes,)):
        for anomaly, colour in _coloured(anomalies):
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
        _label_ends(axes, [(last[a][x], last[a]["auroc"], a, c) for a, c in _coloured(anomalies)])
        return figure


def parts(rows: Sequence[Row]) -> Figure:
    """AUROC of m_in alone, m_out alone and the score, per anomaly set: which similarity sees what.

    >>> row = dict(anomaly="PGD", auroc=0.9, low=0.8, high=1.0)
    >>> rows = [row | dict(score=name) for name in ("m_in alone", "m_out alone", "score")]
    >>> parts(rows).axes[0].get_xlabel()
    'AUROC (95 % interval)'
    """
    names = ("m_in alone", "m_out alone", "score")
    anomalies = list(dict.fromkeys(row["anomaly"] for row in rows))
    groups = {name: [r for r in rows if r["score"] == name] for name in names}
    with new_figure(1, 6.4, 0.9 + 0.55 * len(anomalies)) as (figure, (axes,)):
        _dots(axes, anomalies, groups, "^vo"[: len(groups)], height=0.54)
        axes.set(xlabel="AUROC (95 % interval)")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=9)
        return figure


def attack_study(rows: Sequence[Row]) -> Figure:
    """What makes CADet see an attack: a panel per factor, its values in their order; score solid, m_in alone dotted.

    >>> row = dict(factor="layer read", anomaly="PGD", auroc=0.9, low=0.8, high=1.0, m_in=0.7)
    >>> figure = attack_study([row | dict(value=value) for value in ("layer3", "layer4")])
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['layer3', 'layer4']
    """
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    names = list(dict.fromkeys(row["anomaly"] for row in rows))
    colours = {name: GREY if "random" in name else colour for name, colour in _coloured(names)}
    with new_figure(len(factors), 4.4, 3.6, sharey=True) as (figure, panels):
        figure.get_layout_engine().set(hspace=0.06)  # type: ignore[call-arg, union-attr]
        for axes, factor in zip(panels, factors, strict=True):
            values = list(dict.fromkeys(row["value"] for row in rows if row["factor"] == factor))
            ends = []
            for name in names:
                line = [row for row in rows if (row["factor"], row["anomaly"]) == (factor, name)]
                x = [values.index(row["value"]) for row in line]
                axes.plot(x, [row["auroc"] for row in line], "o-", ms=4, color=colours[name])
                axes.plot(x, [row["m_in"] for row in line], ":", color=colours[name])
                low, high = ([row[key] for row in line] for key in ("low", "high"))
                axes.fill_between(x, low, high, color=colours[name], alpha=0.12, lw=0)
                ends += [(x[-1], line[-1]["auroc"], name, colours[name])] if line else []
            axes.axhline(0.5, color=GREY, lw=1, ls=":")
            ticks = [value if isinstance(value, str) else f"{value:g}" for value in values]
            long = any(len(tick) > 6 for tick in ticks)
            axes.set_xticks(range(len(values)), ticks, rotation=25 if long else 0, ha="right" if long else "center")
            axes.set(title=textwrap.fill(factor, 44), ylim=(0, 1.02))
            if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
                axes.set_ylabel("AUROC")
            _label_ends(axes, ends)
        return figure


def similarities(points: Sequence[Row]) -> Figure:
    """m_in against gamma m_out, a colour per set; points with `set`, `m_in`, `gamma_m_out`. Lines of equal score are dashed.

    >>> similarities([dict(set="PGD", m_in=[0.9, 0.8], gamma_m_out=[0.1, 0.2])]).axes[0].get_ylabel()
    'intra-similarity, m_in'
    """
    with new_figure(1, 5.8, 4.4) as (figure, (axes,)):
        for point, colour in _coloured(points):
            axes.scatter(point["gamma_m_out"], point["m_in"], s=7, alpha=0.45, lw=0, color=colour, label=point["set"])
        x, y = np.array(axes.get_xlim()), np.array(axes.get_ylim())
        for total in np.linspace(x[0] + y[0], x[1] + y[1], 9)[1:-1]:
            axes.plot(x, total - x, color=GREY, lw=0.6, ls="--", zorder=0)
        axes.set(xlabel="γ · out-similarity", ylabel="intra-similarity, m_in", xlim=x, ylim=y)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2.5, fontsize=9)
        return figure


def percent(value: float, _: Any = None) -> str:
    """A share as an axis writes it.

    >>> percent(0.25)
    '25 %'
    """
    return f"{100 * value:g} %"


def operating_point(curves: Sequence[Row], threshold: float, expected: Row) -> Figure:
    """What a threshold on the p-value does: flagged share of each set, and where that of in-distribution images may lie.

    curves: per set `name`, `kind` ("in" or other) and sorted `p_values`; expected: `expected`, `low`, `high` of the share of so
    many in-distribution images that is flagged at this threshold, see `metrics.flagged_interval`.

    >>> curve = dict(name="PGD", kind="out", p_values=[0.01, 0.02, 0.5, 0.6])
    >>> figure = operating_point([curve], 0.05, dict(expected=0.05, low=0.02, high=0.1))
    >>> figure.axes[1].texts[0].get_text()
    '50.0 %'
    """
    with new_figure(2, 4.9, 3.6) as (figure, (left, right)):
        ends = []
        for curve, colour in _coloured(curves):
            p = np.asarray(curve["p_values"])
            flagged = np.arange(1, len(p) + 1) / len(p)
            dash = "--" if curve["kind"] == "in" else "-"
            left.step(p, flagged, where="post", color=colour, ls=dash)
            ends.append((1.0, float(np.interp(0.3, p, flagged)), curve["name"], colour))
        left.axvline(threshold, color=GREY, lw=1)
        low = min(float(np.min(curve["p_values"])) for curve in curves)
        left.set(xscale="log", xlim=(low, 1), ylim=(0, 1.01), xlabel="threshold on the p-value", ylabel="share of images flagged")
        left.yaxis.set_major_formatter(FuncFormatter(percent))
        _label_ends(left, ends)
        shares = [float(np.searchsorted(curve["p_values"], threshold, side="right")) / len(curve["p_values"]) for curve in curves]
        bars = right.barh(range(len(curves)), shares, color=[colour for _, colour in _coloured(curves)])
        right.bar_label(bars, labels=[f"{100 * share:.1f} %" for share in shares], padding=3, fontsize=9)
        right.axvspan(expected["low"], expected["high"], color=GREY, alpha=0.25, lw=0)
        right.axvline(expected["expected"], color=GREY, lw=1)
        right.set(yticks=range(len(curves)), yticklabels=[curve["name"] for curve in curves], xlim=(0, 1.15))
        right.set(xlabel="share flagged; grey: 95 % range for in-distribution", title=f"at p ≤ {threshold:.4g}")
        right.xaxis.set_major_formatter(FuncFormatter(percent))
        right.invert_yaxis()
        return figure


def calibration(p_values: Sequence[float], n_calibration: int) -> Figure:
    """Are p-values of fresh in-distribution images uniform? Their distribution against the diagonal, with a 95 % band.

    >>> calibration([0.1, 0.5, 0.9], n_calibration=100).axes[0].get_xlabel()
    'p-value threshold α'
    """
    p = np.sort(p_values)
    share = np.arange(1, len(p) + 1) / len(p)
    grid = np.linspace(0, 1, 200)
    # Both the calibration and the test images are drawn, so both contribute to the deviation from the diagonal.
    width = 1.96 * np.sqrt(grid * (1 - grid) * (1 / len(p) + 1 / n_calibration))
    with new_figure(1, 4.4, 4.0) as (figure, (axes,)):
        axes.fill_between(grid, grid - width, grid + width, color=GREY, alpha=0.2, lw=0)
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
        axes.step(p, share, where="post", color=COLOURS[0])
        axes.set(xlabel="p-value threshold α", ylabel="share of fresh in-distribution images flagged", xlim=(0, 1), ylim=(0, 1))
        axes.set_aspect("equal")
        return figure


def gallery(images: Any, titles: Sequence[str], columns: int = 8) -> Figure:
    """Images (N, 3, H, W) uint8 or [0, 1] in a grid, a short title over each.

    >>> figure = gallery(np.zeros((2, 3, 8, 8)), ["p = 0.1", "p = 0.2"])
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['p = 0.1', 'p = 0.2']
    """
    pixels = np.asarray(images).transpose(0, 2, 3, 1)
    rows = -(-len(pixels) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.5 * rows), squeeze=False, layout="constrained")
        for place in axes.flat:
            place.axis("off")
        for place, image, title in zip(axes.flat, pixels, titles, strict=False):
            place.imshow(image, interpolation="nearest")
            place.set_title(title, fontsize=8, loc="center")
        plt.close(figure)
        return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, for a widget.

    >>> png(Figure((1, 1)))[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", dpi=110)
    return buffer.getvalue()


def speed(rows: Sequence[Row]) -> Figure:
    """How many times as fast as what it is compared with; rows with `what`, `against`, `ours` and `other` in seconds.

    >>> speed([dict(what="MMD", against="a loop", ours=0.1, other=1.0)]).axes[0].texts[0].get_text()
    '10×'
    """
    ratios = [row["other"] / row["ours"] for row in rows]
    with new_figure(1, 8.6, 0.8 + 0.62 * len(rows)) as (figure, (axes,)):
        bars = axes.barh(range(len(rows)), ratios, color=COLOURS[0], height=0.45, left=0)
        axes.bar_label(bars, labels=[f"{ratio:.2f}×" if ratio < 10 else f"{ratio:,.0f}×" for ratio in ratios], padding=3)
        axes.axvline(1, color=GREY, lw=1, ls="--")
        names = [f"{row['what']}\nagainst {row['against']}" for row in rows]
        axes.set(yticks=range(len(rows)), xscale="log", xlabel="speed, as a multiple of what it is compared with")
        axes.set_yticklabels(names, fontsize=8)
        axes.set_xlim(min(0.5, *ratios), 3 * max(ratios))
        axes.invert_yaxis()
        return figure


def disturbances(rows: Sequence[Row]) -> Figure:
    """AUROC between normal images and the same disturbed, drawn as `detection`; rows as in `suitability.judge`, of one split.

    >>> row = dict(detector="CADet", encoder="mine", anomaly="blur", auroc=0.8, low=0.7, high=0.9)
    >>> disturbances([row]).axes[0].get_xlabel()
    'AUROC (95 % interval over images)'
    """
    figure = detection(rows)
    figure.axes[0].set_xlabel("AUROC (95 % interval over images)")
    return figure
