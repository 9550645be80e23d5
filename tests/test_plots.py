"""Figures show the rows they are given, in the open and in order."""

import io

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from cadetlib import plots


def row(**values):
    return dict(auroc=0.8, low=0.7, high=0.9, rate=0.4) | values


ANOMALIES = ("unseen", "FGSM")
RATES = [
    row(test=t, encoder=e, shift=s, n=n, p_values=[0.01, 0.2, 0.9])
    for t in ("MMD", "MMD-CC")
    for e in ("contrastive", "supervised")
    for s in ("no shift", "other")
    for n in (50, 10)
]
TRAINED = RATES + [r | dict(test=test, encoder="none") for r in RATES if r["test"] == "MMD" for test in ("ME", "C2ST-L")]
STUDY = [
    row(factor=factor, value=value, anomaly=anomaly, m_in=0.6, m_out=0.5)
    for factor, values in (("layer read", ["layer1", "layer2"]), ("area of a view", [0.5, 0.9]))
    for value in values
    for anomaly in ("FGSM", "random signs")
]
SMALL = [row(test=r["test"], encoder=r["encoder"], anomaly="PGD", n=r["n"]) for r in RATES]
DETECTION = [row(detector="CADet", encoder=e, anomaly=a) for e in ("contrastive", "supervised") for a in ANOMALIES]
CURVES = [
    dict(name="in-distribution", kind="in", p_values=np.linspace(0.01, 1, 100).tolist()),
    dict(name="FGSM", kind="out", p_values=sorted([0.01] * 30 + [0.5] * 70)),
]
EXPECTED = dict(expected=0.05, low=0.01, high=0.1)


def texts(figure):
    found = set()
    for axes in figure.axes:
        found |= {text.get_text() for text in [*axes.texts, axes.xaxis.label, axes.yaxis.label]}
        found |= {axes.get_title(loc) for loc in ("left", "center")}
        found |= {text.get_text() for text in axes.get_legend().get_texts()} if axes.get_legend() else set()
    return found


FIGURES = {
    "training": (
        lambda: plots.training(
            {
                "contrastive": [
                    dict(epoch=1.0, loss=5.0, learning_rate=0.1, images_per_second=100.0),
                    dict(epoch=1.0, knn_accuracy=0.5),
                    dict(epoch=2.0, loss=4.0, learning_rate=0.05, images_per_second=100.0),
                ]
            }
        ),
        {"contrastive", "epoch"},
    ),
    "rejection_rates": (lambda: plots.rejection_rates(RATES), {"MMD, contrastive", "MMD-CC, supervised", "samples per set, n"}),
    "p_value_roc": (lambda: plots.p_value_roc(RATES[:2] + RATES[-2:]), {"n = 10", "n = 50", "threshold on the p-value"}),
    "small_samples": (lambda: plots.small_samples(SMALL), {"MMD-CC, contrastive", "PGD", "AUROC of the p-value"}),
    "detection": (lambda: plots.detection(DETECTION), {"CADet, contrastive", "0.80"}),
    "comparison": (lambda: plots.comparison(DETECTION), {"80", "AUROC (%): 50 is a coin toss"}),
    "trained_rejection_rates": (lambda: plots.trained_rejection_rates(TRAINED), {"C2ST-L", "MMD-CC", "other"}),
    "attack_study": (lambda: plots.attack_study(STUDY), {"FGSM", "random signs", "layer read"}),
    "roc_curves": (
        lambda: plots.roc_curves([dict(anomaly="FGSM", false_alarm_rate=[0, 1], detection_rate=[0.5, 1], auroc=0.75)]),
        {"FGSM  0.75", "share of anomalies flagged"},
    ),
    "sweep": (
        lambda: plots.sweep(
            [row(anomaly=a, n_views=n) for a in ANOMALIES for n in (2, 50)], "n_views", "views", log=True, mark=50
        ),
        {"unseen", "FGSM", "views", "AUROC"},
    ),
    "parts": (
        lambda: plots.parts([row(anomaly=a, score=s) for a in ANOMALIES for s in ("m_in alone", "m_out alone", "score")]),
        {"m_in alone", "m_out alone", "score"},
    ),
    "similarities": (
        lambda: plots.similarities([dict(set="FGSM", m_in=[0.9, 0.8], gamma_m_out=[0.1, 0.2])]),
        {"FGSM", "intra-similarity, m_in"},
    ),
    "operating_point": (lambda: plots.operating_point(CURVES, 0.05, EXPECTED), {"FGSM", "30.0 %", "5.0 %", "at p ≤ 0.05"}),
    "calibration": (lambda: plots.calibration([0.1, 0.5, 0.9], 100), {"p-value threshold α"}),
    "gallery": (lambda: plots.gallery(np.zeros((3, 3, 8, 8)), ["p = 0.1", "p = 0.2", "p = 0.3"], 2), {"p = 0.1", "p = 0.3"}),
    "speed": (lambda: plots.speed([dict(what="MMD", against="a loop", ours=0.1, other=1.0)]), {"10×"}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_what_it_shows(name):
    draw, expected = FIGURES[name]
    figure = draw()
    assert expected <= texts(figure), f"missing: {expected - texts(figure)}"
    assert not plt.get_fignums(), "the figure was left open: a notebook would show it twice"
    image = np.asarray(Image.open(io.BytesIO(plots.png(figure))).convert("L"))
    assert image.std() > 10 and min(image.shape) > 100


def test_names_at_line_ends_do_not_cover_one_another():
    figure = plots.rejection_rates(RATES)
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 4
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_no_set_is_left_out_of_a_figure_however_many_there_are():
    names = [f"set {i}" for i in range(20)]
    curves = [dict(anomaly=name, false_alarm_rate=[0, 1], detection_rate=[0, 1], auroc=0.5) for name in names]
    assert [text.get_text() for text in plots.roc_curves(curves).axes[0].get_legend().get_texts()] == [
        f"{n}  0.50" for n in names
    ]
    rows = [dict(anomaly=name, n_views=n, auroc=0.9, low=0.8, high=1.0) for name in names for n in (10, 50)]
    assert {text.get_text() for text in plots.sweep(rows, "n_views", "views").axes[0].texts} == set(names)
    shares = [dict(name=name, kind="out", p_values=[0.01, 0.5]) for name in names]
    left, right = plots.operating_point(shares, 0.05, dict(expected=0.05, low=0.02, high=0.1)).axes
    assert (
        len(left.lines) == len(names) + 1
        and {t.get_text() for t in left.texts} == set(names)
        and len(right.patches) >= len(names)
    )
    points = [dict(set=name, m_in=[0.9], gamma_m_out=[0.1]) for name in names]
    assert len(plots.similarities(points).axes[0].get_legend().get_texts()) == len(names)
