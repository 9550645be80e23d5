"""What a profile costs before it is run: passes through the network and bytes on disk for each table, from its parameters.

    python -m cadetlib.costs imagenet [--rates throughput.json]

Passes are counted, not timed: time follows from rates that `benchmarks/throughput.py` measures on the machine in question.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cadetlib import attack_sets, checks, data, encoders, hu, imagenet, pretrain, profiles, recipes, training_settings

COUNTS = {"cifar10-train": 50_000, "cifar10-test": 10_000, "cifar10.1-v6": 2000, "cifar10.1-v4": 2021, "mnist-test": 10_000}
KINDS = ("trained", "forward", "attacked")  # what a rate is about
_FLOAT = 4  # bytes
_N_ENCODERS = 2  # the contrastive and the supervised one


@dataclass(frozen=True)
class Cost:
    """Passes and bytes of one piece of work.

    >>> Cost("a table", forward=3600).hours({"forward": 2.0})
    0.5
    """

    what: str
    trained: int = 0  # views that go forward and backward through all weights
    forward: int = 0  # views that go forward
    attacked: int = 0  # images that go forward and backward to their pixels: an iteration of an attack, or of a walk
    disk: int = 0  # bytes written

    def hours(self, rates: Mapping[str, float]) -> float:
        """Time at so many passes a second of each of KINDS."""
        return sum(getattr(self, kind) / rates[kind] for kind in KINDS if getattr(self, kind)) / 3600


def n_images(name: str, at_most: int = 0) -> int:
    """How many images a set has, known without its files where its publisher says so; with `at_most`, no more than that.

    >>> n_images("imagenet-val"), n_images("imagenet-val", at_most=7300), n_images("cifar10-test:jpeg-1")
    (50000, 7300, 10000)
    """
    name = name.partition(":")[0]
    known = {k: folder.n_images for k, folder in imagenet.SETS.items()} | COUNTS
    n = known[name] if name in known else len(data.load(name))
    return min(n, at_most) if at_most else n


def _iterations(given: Mapping[str, Any]) -> int:
    """Passes that the attacks of a notebook take for one image."""
    return sum(int(given.get(f"{name}_n_steps", 1)) for name in given["attacks"])


def of_profile(profile: str) -> list[Cost]:
    """The passes through the encoders' network that a profile asks for; upper bounds where the work may end early.

    Sets restricted to some classes count whole. Table 1's tests that learn have networks of their own, which are not counted.
    ValueError for an unknown profile.

    >>> largest = max(of_profile("imagenet"), key=lambda cost: cost.trained)
    >>> largest.what, largest.trained
    ('01 contrastive', 2049867200)
    """
    p1, p2, p3, p4, p5 = (dict(notebook.parameters) for notebook in profiles.notebooks_of(profile)[1:6])
    pixels, n_train = 3 * p4["image_size"] ** 2, n_images(p1["data"])
    held_out, taught = n_images(p4["in_distribution"], p4["n_held_out"]), n_images(p4["training"], p4["n_training"])
    unseen = sum(n_images(name, p4["n_unseen"]) for name in p4["unseen"])
    scored = held_out * (1 + len(p4["attacks"])) + unseen  # images of all sets of 04
    pools = n_images(p2["reference"]) + sum(map(n_images, p2["shifted"]))
    samples = n_images(p3["in_distribution"], p3["n_held_out"])
    compared = samples * (1 + len(p3["attacks"])) + sum(map(n_images, p3["unseen"]))
    attacked = attack_sets.ATTACK_NAMES.values()
    crops = held_out + sum(held_out if name in attacked else n_images(name, p4["n_unseen"]) for name in p5["crop_sets"])
    features = _FLOAT * _features(p1)
    study, attacked_sets = p5["study_n_images"], len(p5["study_attacks"]) + 1
    settings = (
        len(p1["snapshots"]) + 2 + _N_ENCODERS + len(p5["study_layers"]) + len(p5["study_crop_scales"]) + len(p5["study_sizes"])
    )
    own = p5["study_n_views"] * len(p5["own_crop_scales"]) + sum(p5["own_n_views"])  # in the victim's features
    moved = (len(p5["study_victims"]) + 2) * (attacked_sets - 1) + len(p5["study_strengths"]) * attacked_sets
    return [
        Cost("01 contrastive") if p1["pretrained"] else _training(p1, "contrastive", n_train),
        Cost("01 supervised") if p1["supervised_pretrained"] else _training(p1, "supervised", n_train),
        *_other_recipes(p1, n_train),
        Cost("02, Table 1: MMD, MMD-CC", forward=_N_ENCODERS * pools),
        Cost(
            "03, Table 2",
            forward=_N_ENCODERS * compared,
            attacked=samples * _iterations(p3),
            disk=_FLOAT * pixels * samples * len(p3["attacks"]),
        ),
        Cost(
            "04 attacks",
            attacked=held_out * _iterations(p4),
            disk=2 * _FLOAT * pixels * held_out * len(p4["attacks"]) + pixels * (held_out + unseen),  # in the cache and as sets
        ),
        Cost(
            "04 CADet, two encoders",
            forward=_N_ENCODERS * p4["n_views"] * scored,
            disk=_N_ENCODERS * scored * len(p4["view_grid"]) * features,
        ),
        Cost(
            "04 compared detectors",
            forward=_N_ENCODERS * (taught + 3 * scored),  # features; ODIN's first and last pass
            attacked=_N_ENCODERS * scored,
        ),
        Cost("04 Hu et al., at most", attacked=_N_ENCODERS * hu_steps(p4, held_out)),
        Cost("05 areas of a view", forward=len(p5["crop_scales"]) * p5["crop_n_views"] * crops),
        Cost("05 other backbones", forward=len(p5["other_backbones"]) * p5["crop_n_views"] * scored),
        Cost(
            "05 when an attack is seen",
            forward=study * (p5["study_n_views"] * (settings * (1 + attacked_sets) + moved) + own * (1 + attacked_sets)),
            attacked=study * p4["pgd_n_steps"] * (len(p5["study_victims"]) + 3 + len(p5["study_strengths"])),
        ),
    ]


def hu_steps(given: Mapping[str, Any], n_held_out: int) -> int:
    """The most steps that the walks of Hu et al.'s rows can take, of one encoder in a notebook 04 with these parameters.

    >>> hu_steps(dict(n_hu=10, n_tuning=0, attacks=["pgd"], hu_cap_targeted=2, hu_cap_untargeted=3), n_held_out=100)
    250
    """
    n, caps = min(given["n_hu"], n_held_out), {"lr": given["hu_cap_targeted"], "lr_untargeted": given["hu_cap_untargeted"]}
    once = n * sum(caps.values())  # of as many images as are tested: the calibration images; then clean and attacked ones, twice
    tuning = 2 * given["n_tuning"] * sum(len(hu.GRID[key]) * cap for key, cap in caps.items())  # each step size of either walk
    return once * (1 + 2 * (1 + len(given["attacks"]))) + tuning if n else 0


def _training(given: Mapping[str, Any], objective: str, n_train: int) -> Cost:
    """Two views of each image or one; two checkpoints of weights and momentum, and the encoder."""
    settings, views = training_settings.settings_from(given, objective), {"contrastive": 2, "supervised": 1}[objective]
    with torch.device("meta"):
        n_weights = encoders.n_parameters(pretrain.Model(settings, n_classes=1000))
    return Cost(f"01 {objective}", trained=views * settings.epochs * n_train, disk=_FLOAT * n_weights * (2 * 2 + 1))


def _other_recipes(given: Mapping[str, Any], n_train: int) -> list[Cost]:
    """What a profile trains besides, for notebook 05."""
    if not given["train_other_recipes"] or not given["other_recipes"]:
        return []
    each = [_training(recipes.changed(given, recipe), "contrastive", n_train) for recipe in given["other_recipes"]]
    return [Cost("01 other recipes", trained=sum(cost.trained for cost in each), disk=sum(cost.disk for cost in each))]


def _features(trained: Mapping[str, Any]) -> int:
    """Dimension of the features of a profile's encoder."""
    return int(trained["width"]) * (32 if trained["arch"] in ("resnet50", "resnet101") else 8)


def sheet(costs: list[Cost], rates: Mapping[str, float] | None = None) -> pd.DataFrame:
    """The costs as a table: passes, GB, and with rates (passes a second of each of KINDS) the hours.

    >>> sheet([Cost("a table", forward=7200, disk=10**9)], dict(trained=1.0, forward=2.0, attacked=1.0))["hours"].tolist()
    [1.0]
    """
    rows = []
    for cost in costs:
        row: dict[str, Any] = {
            "what": cost.what,
            **{kind: getattr(cost, kind) for kind in KINDS},
            "GB": round(cost.disk / 1e9, 1),
        }
        if rates is not None:
            row["hours"] = round(cost.hours(rates), 2)
        rows.append(row)
    return pd.DataFrame(rows).set_index("what")


def main(arguments: list[str] | None = None) -> int:
    """The command line: prints the sheet of a profile."""
    parser = argparse.ArgumentParser(prog="python -m cadetlib.costs", description="What a profile costs, before it is run.")
    parser.add_argument("profile")
    parser.add_argument("--rates", type=Path, help="JSON of benchmarks/throughput.py, for hours")
    options = parser.parse_args(arguments)
    try:
        rates = None
        if options.rates:
            found = json.loads(options.rates.read_text())
            rates = {kind: checks.in_open_interval(found["rates"][kind], f"rates: {kind}", 0, float("inf")) for kind in KINDS}
        print(sheet(of_profile(options.profile), rates).to_string())
        if rates is not None:
            print(f"\nhours at the rates of {found['what']} on {found['hardware']}")
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
