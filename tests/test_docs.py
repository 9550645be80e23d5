"""What a newcomer reads: every public name of the package is shown in use, by an example that runs as a doctest."""

from __future__ import annotations

import ast
import doctest
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cadetlib
from cadetlib import costs, metrics

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "outputs" / "reference"
FINDINGS = REFERENCE / "README.md"  # what stands behind the README's own table
FILES = sorted(Path(cadetlib.__file__).parent.glob("*.py"))
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(tree: ast.Module) -> Iterator[Documented]:
    """Functions and classes of a module without a leading underscore; a command line's `main` is shown by its own help."""
    for node in tree.body:
        if isinstance(node, Documented) and not node.name.startswith("_") and node.name != "main":
            yield node


def is_shown(node: Documented) -> bool:
    """Whether its docstring has an example: of a function, one that calls it; of a class, one that may have it made by others.

    A class's own example covers its methods.
    """
    examples = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
    return bool(examples) and (isinstance(node, ast.ClassDef) or any(node.name in example.source for example in examples))


def without_example(source: str) -> list[str]:
    return [node.name for node in public(ast.parse(source)) if not is_shown(node)]


def test_what_counts_as_an_example():
    source = '''
def shown(x):
    """Twice x.

    >>> shown(2)
    4
    """

def told(x):
    """Twice x, as `told(2)` would give."""

def other(x):
    """Twice x.

    >>> shown(2)
    4
    """

class Shown:
    """What `shown` might return.

    >>> shown(1).first()
    1
    """

    def first(self):
        """Covered by the class."""

class Bare:
    def first(self):
        """Does not cover the class.

        >>> Bare().first()
        """

def _inside(x): ...
def main(): ...
'''
    assert without_example(source) == ["told", "other", "Bare"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_public_name_has_an_example(file):
    missing = without_example(file.read_text())
    assert not missing, f"{file.name}: found no example of {', '.join(missing)}, expected one in each docstring"


ATTACKS = ("FGSM", "PGD", "random signs")
OF_CIFAR = {"svhn-first1083": "SVHN", "cifar100-first2000": "CIFAR-100"}
OF_THE_TABLE = {
    "unseen classes": "",
    "SVHN": "svhn-first1083",
    "MNIST": "mnist-test",
    "CIFAR-100": "cifar100-first2000",
    "flowers": "flowers64",
    "FGSM": "FGSM",
    "PGD": "PGD",
    "CW-Linf": "CW-Linf",
    "CW-L2": "CW-L2",
    "CW-L2-ball": "CW-L2-ball",
    "contrast-5": "cifar10-test:contrast-5",
}


def of_profile(profile: str, notebook: str):
    return json.loads((REFERENCE / profile / f"{notebook}.json").read_text())["results"]


@pytest.mark.parametrize(
    ("file", "network", "scales", "labels"),
    [
        ("own_features", "cifar:resnet20", [0.5, 0.75, 0.9, 0.97], ("FGSM, ε = 0.05", "PGD, ε = 0.02", "random signs, 0.05")),
        ("own_features_contrastive", "contrastive", [0.75, 0.9, 0.97], [f"its probe: {name}" for name in ATTACKS]),
    ],
)
def test_the_tables_of_own_features_are_what_was_kept(file, network, scales, labels):
    kept = json.loads((REFERENCE / "cifar10-cpu" / f"{file}.json").read_text())
    given, page = kept["parameters"], FINDINGS.read_text()
    assert (given["fgsm_eps"], given["pgd_eps"], kept["network"]) == (0.05, 0.02, network)
    for label, name in zip(labels, ATTACKS, strict=True):
        rows = [row for row in kept["rows"] if (row["anomaly"], row["n_views"]) == (name, 50)]
        assert [row["crop_scale"] for row in rows] == scales
        assert " | ".join(["", label, *map(cell, rows), ""]).strip() in page
    over = {row["crop_scale"]: row for row in kept["rows"] if (row["anomaly"], row["n_views"]) == ("PGD", 50)}
    said = {
        "own_features": [f"{points(over[0.9])} points at 0.9 and {points(over[0.97])} at 0.97", f"by {points(over[0.75], -1)}."],
        "own_features_contrastive": [f"by {points(over[0.97])} points on the same", f"at 0.9 no better, by {points(over[0.9])}."],
    }
    assert all(words in " ".join(page.split()) for words in said[file])


def test_the_table_of_the_training_curve_is_what_was_kept():
    kept = json.loads((REFERENCE / "cifar10-cpu" / "training_curve.json").read_text())
    page, asked = FINDINGS.read_text(), [(16, 0), (16, 4), (16, 12), (16, 20), (16, 40), (32, 0), (32, 40)]
    assert not kept["commit"]["dirty"] and {trained["epochs"] for trained in kept["trained"]} == {40}
    for name in [*OF_CIFAR, *ATTACKS]:
        found = {(row["width"], row["epoch"]): row for row in kept["rows"] if row["anomaly"] == name}
        assert " | ".join(["", OF_CIFAR.get(name, name), *(cell(found[key]) for key in asked), ""]).strip() in page
        if name == "FGSM":
            said = f"by {points(found[16, 40])} points at width 16 and {points(found[32, 40])} at 32;"
            assert said in " ".join(page.split())


def test_what_is_said_of_the_gpus_encoder_is_what_was_kept():
    page = " ".join(FINDINGS.read_text().split())
    kept = of_profile("cifar10", "04_cadet_tables")["rows"]
    best = {name: max(row["auroc"] for row in kept if row["anomaly"] == name) for name in OF_CIFAR | {"flowers64": "", "PGD": ""}}
    told = [f"{100 * best[name]:.0f}" for name in ("cifar100-first2000", "flowers64", "PGD")]
    assert "the best have {} and {} on CIFAR-100 and flowers and {} on PGD".format(*told) in page
    (cadet,) = [r for r in kept if (r["detector"], r["encoder"], r["anomaly"]) == ("CADet", "contrastive", "FGSM")]
    assert cadet["auroc"] == max(row["auroc"] for row in kept if row["anomaly"] == "FGSM")

    (sets,) = [one["sets"] for one in of_profile("cifar10", "06_thresholds")["detectors"] if one["name"] == "contrastive"]
    scores = {one["name"]: dict(zip(one["images"], one["scores"], strict=True)) for one in sets}
    told = []
    for name in ("PGD", "CW-L2"):
        clean, odd = ([of[i] for i in sorted(of)] for of in (scores["in-distribution"], scores[name]))
        interval = metrics.bootstrap_interval(clean, odd, paired=True)
        told.append(cell(dict(auroc=metrics.auroc(clean, odd), low=interval.low, high=interval.high)))
    assert "PGD is at {} and CW-L2 at {}.".format(*told) in page

    curve = json.loads((REFERENCE / "cifar10" / "training_curve.json").read_text())
    assert not curve["commit"]["dirty"] and {row["n_views"] for row in curve["rows"]} == {10}
    for name in ATTACKS:
        found = [row for row in curve["rows"] if (row["anomaly"], row["epoch"]) == (name, 150)]
        assert [row["crop_scale"] for row in found] == [0.75, 0.9, 0.97]
        assert " | ".join(["", f"width 64, 150 epochs: {name}", *map(cell, found), ""]).strip() in page
    untrained = [round(100 * row["auroc"]) for row in curve["rows"] if row["epoch"] == 0]
    assert f"the untrained network has {min(untrained)} to {max(untrained)} everywhere" in page


def test_the_readmes_table_is_what_was_kept():
    """Rows of the table of findings: the paper's number first, then the digits', then those of the two encoders of CIFAR-10."""
    page, found = (ROOT / "README.md").read_text(), {}
    for profile in ("digits", "cifar10-cpu", "cifar10"):
        rows = of_profile(profile, "04_cadet_tables")["rows"]
        found |= {(profile, r["anomaly"]): r for r in rows if (r["detector"], r["encoder"]) == ("CADet", "contrastive")}
    shown = re.findall(r"^\| ([^|]+) \|(?: \d\d)? \|([^|]*)\|([^|]*)\|([^|]*)\|$", page, re.MULTILINE)
    told = {label.split(",")[0]: [text.split(":")[-1].strip() for text in cells] for label, *cells in shown}
    for label, name in OF_THE_TABLE.items():
        of_digits = found.get(("digits", "digits-7-to-9" if label == "unseen classes" else name))
        expected = [of_digits, found.get(("cifar10-cpu", name)), found.get(("cifar10", name))]
        assert told.pop(label) == [cell(row) if row else "" for row in expected], label
    assert not told

    def mean(profile, name):
        return f"{100 * found[profile, name]['auroc']:.0f}"

    near = [mean("cifar10-cpu", OF_THE_TABLE[label]) for label in ("MNIST", "SVHN", "CIFAR-100", "flowers")]
    short = "(AUROC {} and {}), CIFAR-100 and flowers less well ({} and {}).".format(*near)
    attacked = f"({mean('cifar10', 'FGSM')}; paper 98). PGD made for another network it hardly sees in a single image"
    assert all(words in " ".join(page.split()) for words in (short, f"{attacked} ({mean('cifar10', 'PGD')}; paper 95)"))

    cpu = of_profile("cifar10-cpu", "04_cadet_tables")["rows"]
    (svhn,) = [r for r in cpu if (r["detector"], r["encoder"], r["anomaly"]) == ("CADet", "supervised", "svhn-first1083")]
    assert f"supervised encoder wide: SVHN {cell(svhn)} in" in page
    best = [100 * max(row["auroc"] for row in cpu if row["anomaly"] == name) for name in ("cifar100-first2000", "flowers64")]
    assert "the best have {:.0f} and {:.0f} on CIFAR-100 and flowers".format(*best) in " ".join(page.split())


def test_what_the_readme_says_of_sets_is_what_was_kept():
    """Section 4: sets of 20 attacked images, and mild shifts."""
    page = " ".join((ROOT / "README.md").read_text().split())
    small = {}
    for profile in ("cifar10-cpu", "cifar10"):
        for row in of_profile(profile, "03_small_samples")["rows"]:
            if (row["test"], row["anomaly"], row["n"], row["n_perm"]) == ("MMD-CC", "PGD", 20, 500):
                small[profile, row["encoder"]] = cell(row)
    told = "MMD-CC has {} with the contrastive encoder of width 32 ({} with the supervised one), and {} with that of width 64"
    keys = [("cifar10-cpu", "contrastive"), ("cifar10-cpu", "supervised"), ("cifar10", "contrastive")]
    assert told.format(*(small[key] for key in keys)) in page

    rows = [row for row in of_profile("cifar10-cpu", "02_cifar10_vs_cifar10_1")["rows"] if row["test"] == "MMD-CC"]
    rate = {(row["encoder"], row["shift"].split(":")[-1], row["n"]): round(100 * row["rate"]) for row in rows}
    level = [value for (_, shift, _), value in rate.items() if shift == "no shift"]
    assert f"it rejects {min(level)} to {max(level)} of 100 times" in page
    for words, shift, n in [
        ("JPEG compression of 50 images in {} of 100 cases (supervised: {})", "jpeg-1", 50),
        ("noise in {} ({})", "gaussian_noise-1", 50),
        ("blur of 2,000 images in {} ({})", "gaussian_blur-1", 2000),
        ("less contrast in 500 images in {} ({})", "contrast-1", 500),
    ]:
        assert words.format(rate["contrastive", shift, n], rate["supervised", shift, n]) in page


def test_what_the_readme_says_of_pgd_in_own_features_is_what_was_kept():
    page, pgd = " ".join((ROOT / "README.md").read_text().split()), {}
    for file in ("own_features", "own_features_contrastive"):
        for row in json.loads((REFERENCE / "cifar10-cpu" / f"{file}.json").read_text())["rows"]:
            if (row["anomaly"], row["n_views"]) == ("PGD", 50):
                pgd[file, row["crop_scale"]] = cell(row)
    at = [pgd[file, area] for area in (0.97, 0.75) for file in ("own_features_contrastive", "own_features")]
    assert "{} at area 0.97 in the contrastive encoder's, {} in the attacked ResNet-20's;".format(*at[:2]) in page
    assert "the paper's area of 0.75 leaves {} and {}.".format(*at[2:]) in page


def test_what_is_said_of_notebook_05_is_what_was_kept():
    folder = REFERENCE / "cifar10-cpu"
    kept = json.loads((folder / "05_ablations.json").read_text())["results"]
    by_epoch = json.loads((folder / "training_epochs.json").read_text())["rows"]
    found = {(row["factor"], row["value"], row["anomaly"]): row for row in kept["seen"] + by_epoch}
    area, side, victim = "area of a view", "side of the input", "victim"

    def percent(kind, asked, values, name):
        return [f"{100 * found[kind, value, name][asked]:.0f}" for value in values]

    sides = [32, 40, 48, 56]
    fgsm, signs = (percent(side, "auroc", sides, name) for name in ("FGSM", "random signs"))
    knn = {
        row["side"]: {"auroc": row["knn_accuracy"], "low": row["knn_accuracy_low"], "high": row["knn_accuracy_high"]}
        for row in kept["by_side"]
    }
    trained, epochs, shown = "epochs of 40, width 32", [4, 8, 12, 16, 20, 26, 32, 40], {}
    for name in ("FGSM", "random signs"):
        shown[name] = percent(trained, "auroc", epochs, name)
    pgd_trained = [100 * row["auroc"] for (factor, _, name), row in found.items() if (factor, name) == (trained, "PGD")]
    of_pgd = percent(victim, "auroc", ["supervised", "cifar:resnet20", "cifar:resnet56", "own probe"], "PGD")
    said = [
        f"FGSM needs: {', '.join(shown['FGSM'][:-1])} and {cell(found[trained, 40, 'FGSM'])} after ",
        f"after {', '.join(map(str, epochs[:-1]))} and {epochs[-1]} epochs",
        f"random signs {', '.join(shown['random signs'][:-1])} and {shown['random signs'][-1]}, PGD between",
        f"PGD between {min(pgd_trained):.0f} and {max(pgd_trained):.0f}.",
        "FGSM {} at area 0.9 and {} at 0.97 ({} and {} for *m_in* alone), {} at area 0.3".format(
            *(cell(found[area, scale, "FGSM"]) for scale in (0.9, 0.97)),
            *percent(area, "m_in", (0.9, 0.97), "FGSM"),
            cell(found[area, 0.3, "FGSM"]),
        ),
        f"FGSM {', '.join(fgsm[:3])} and {cell(found[side, 56, 'FGSM'])} at 32, 40, 48 and 56 pixels",
        f"random signs {', '.join(signs[:3])} and {signs[3]}",
        f"(kNN {cell(knn[32])} at 32, {cell(knn[48])} at 48)",
        f"the encoder's own probe, FGSM is at {cell(found[victim, 'own probe', 'FGSM'])}",
        f"({min(of_pgd)} to {max(of_pgd)}), nor at any side ({cell(found[side, 56, 'PGD'])} at most), and everywhere less",
    ]
    spreads = {
        (kind, encoder): sorted(100 * row[kind] for row in kept["by_draw"] if row["encoder"] == encoder)
        for kind in ("reference", "test")
        for encoder in ("contrastive", "supervised")
    }
    between = {key: f"by {values[0]:.1f} to {values[-1]:.1f}" for key, values in spreads.items()}
    ten = {row["anomaly"]: row for row in kept["by_views"] if row["n_views"] == 10}
    lost = {
        name: "{:.1f} [{:.1f}, {:.1f}]".format(*(-100 * ten[name][f"over_most_views{end}"] for end in ("", "_high", "_low")))
        for name in ("FGSM", "cifar100-first2000", "CW-Linf")
    }
    said += [
        f"with another 200, AUROCs differ {between['reference', 'contrastive']} points",
        f"with other test images {between['test', 'contrastive']})",
        f"in the supervised encoder's features {between['reference', 'supervised']}.",
        "FGSM {} points, CIFAR-100 {}, CW-Linf {}.".format(*lost.values()),
    ]
    assert max(-row["over_most_views"] for row in ten.values()) == -ten["CW-Linf"]["over_most_views"]
    page = " ".join(FINDINGS.read_text().split())
    assert [words for words in said if words not in page] == []
    assert max(sides, key=lambda size: found[side, size, "PGD"]["auroc"]) == 56
    assert all(found[side, size, "PGD"]["over_signs_high"] < 0 for size in sides)
    signs_here = found["encoder", "contrastive", "random signs"]["low"]  # of all victims, for they have none
    assert all(row["high"] < signs_here for (factor, _, name), row in found.items() if (factor, name) == (victim, "PGD"))


def points(row, sign=1):
    """By how many points an attack's AUROC exceeds that of random signs; of sign -1, the other way round."""
    low, high = sorted(sign * row[key] for key in ("over_signs_low", "over_signs_high"))
    return f"{100 * sign * row['over_signs']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def cell(row):
    """A row's AUROC as the README writes it."""
    return f"{100 * row['auroc']:.0f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def test_the_readmes_hours_are_those_of_the_measured_rates():
    """The cost sheet's column of hours, against the profile's passes over what was measured on an H100."""
    measured = json.loads((REFERENCE / "throughput.json").read_text())
    sheet = costs.sheet(costs.of_profile("imagenet"), measured["rates"])["hours"]
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (0[1-5][^|]*?)(?:, \d+ epochs)? \|[^|]*\|[^|]*\| (?:at most )?([\d.,]+) \|", readme, re.MULTILINE)
    told = {name: float(hours.replace(",", "")) for name, hours in rows}
    assert len(told) == len(sheet) == 11
    for name, hours in told.items():
        (found,) = (value for what, value in sheet.items() if what.startswith(name))
        assert hours == pytest.approx(found, rel=0.03, abs=0.005), name
    for kind in ("1,174 images/s", "143 images/s", "2,093 steps/s"):
        assert kind in readme
    assert [round(row["images_per_second"]) for row in measured["rows"][:2]] == [1174, 143]
