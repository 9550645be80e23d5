"""The main job on real images: the whole digits profile through papermill, its numbers, and the second call that does nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cadetlib import record

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "digits"
pytestmark = pytest.mark.slow


def reproduce(*options):
    command = [sys.executable, "-m", "cadetlib.reproduce", "digits", *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CADET_ROOT": str(ROOT)}, timeout=3000)


@pytest.fixture(scope="module")
def first_run():
    """In the profile's own folder, so that what is done and unchanged is not done again."""
    done = reproduce()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def auroc(encoder, anomaly):
    rows = record.load(FOLDER / "04_cadet_tables.json")[0]["rows"]
    (row,) = [r for r in rows if (r["detector"], r["encoder"], r["anomaly"]) == ("CADet", encoder, anomaly)]
    return row


def test_everything_is_on_disk(first_run):
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))]
    for name in names:
        results, provenance = record.load(FOLDER / f"{name}.json")
        assert results and provenance["parameters"]["profile"] == "digits"
    assert (FOLDER / "report.html").stat().st_size > 50_000
    assert str(FOLDER / "report.html") in first_run.stdout


def test_a_second_call_skips_everything(first_run):
    again = reproduce()
    assert again.returncode == 0
    assert again.stdout.count("skipped, unchanged") >= 9


def test_cadet_sees_attacks_and_unseen_classes(first_run):
    """Well beyond chance, with the whole interval. Training amplifies rounding: on other processors these move by some points."""
    assert auroc("contrastive", "FGSM")["low"] > 0.93
    assert auroc("contrastive", "PGD")["low"] > 0.80
    assert auroc("contrastive", "digits-7-to-9")["low"] > 0.50
    assert len(auroc("contrastive", "PGD")["splits"]) >= 3


def test_two_sample_tests_keep_their_level_and_find_the_writers(first_run):
    rows = record.load(FOLDER / "02_cifar10_vs_cifar10_1.json")[0]["rows"]
    assert all(r["low"] <= 0.05 for r in rows if r["shift"] == "no shift" and r["test"] == "MMD")
    most = max(r["n"] for r in rows)
    (found,) = [
        r for r in rows if (r["shift"], r["encoder"], r["test"], r["n"]) == ("digits-last-writers", "contrastive", "MMD", most)
    ]
    assert found["rate"] > 0.15, "the tests should see that other hands wrote the last digits"


def test_more_images_make_the_tests_surer(first_run):
    """Twice as many images or more: beyond both intervals, whatever the training. With twenty, unseen classes are nearly certain.

    For PGD the bound is lower: in trainings that differ by a processor's rounding alone, its AUROC at n = 20 was 0.82 to 0.89.
    """
    rows = record.load(FOLDER / "03_small_samples.json")[0]["rows"]
    for test in ("MMD", "MMD-CC"):
        for anomaly in ("digits-7-to-9", "PGD"):
            line = [r for r in rows if (r["test"], r["anomaly"], r["encoder"]) == (test, anomaly, "contrastive")]
            line.sort(key=lambda r: r["n"])
            assert [r["auroc"] for r in line] == sorted(r["auroc"] for r in line)
            assert all(more["low"] > fewer["high"] for fewer in line for more in line if more["n"] >= 2 * fewer["n"])
            assert line[-1]["auroc"] > (0.85 if anomaly == "digits-7-to-9" else 0.75)


def test_p_values_keep_their_promise(first_run):
    results, _ = record.load(FOLDER / "06_thresholds.json")
    rates = [row["measured"] for row in results["false_positive_rates"]]
    assert abs(sum(rates) / len(rates) - results["alpha"]) < 0.03


def test_figures_are_there_with_their_alternative_texts(first_run):
    figures = sorted((FOLDER / "figures").glob("*.png"))
    assert len(figures) >= 12
    for figure in figures:
        assert figure.stat().st_size > 5_000
        assert len(json.loads(figure.with_suffix(".json").read_text())["alt"]) > 20
