"""Does CADet see an attack in the features of the very network that was attacked? On CIFAR-10, and nothing to train.

    python benchmarks/own_features.py [--network cifar:resnet20 | contrastive] [--params params/cifar10-cpu/04_cadet_tables.yaml]

The public ResNet-20, or the contrastive encoder that the project keeps with a linear probe on its features for a classifier.
Area and number of views are varied together, on all held-out images of notebook 04, with its attacks and its splits; notebook 05
asks the same of fewer images. Seven minutes on two cores, for the contrastive encoder ten; twice that without bfloat16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cadetlib import attack_sets, attack_study, comparison, data, embed, encoders, experiments, parameters, questions, record
from cadetlib.experiments import IN_DISTRIBUTION, Row
from cadetlib.views import EvalViews

SCALES, GRID = (0.5, 0.75, 0.9, 0.97), (2, 5, 10, 20, 50)
PARAMS = record.checkout() / "params" / "cifar10-cpu" / "04_cadet_tables.yaml"


def held_out(given: Mapping[str, Any]) -> data.ImageSet:
    """The in-distribution images of notebook 04 with these parameters."""
    images = experiments.labelled(given["in_distribution"], [], given["n_held_out"], given["seed"])
    return images.resized(given["image_size"])


def attacked(victim: nn.Module, images: data.ImageSet, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """FGSM and PGD of notebook 04, and the control: random signs as large as FGSM's."""
    moved = attack_sets.attack_all(["fgsm", "pgd"], victim, images.images, images.labels, given)
    return moved | {attack_study.CONTROL: attack_study.random_signs(images.images, given["fgsm_eps"])}


def rows_at(
    encoder: nn.Module,
    sets: Mapping[str, Tensor],
    paired: Mapping[str, bool],
    scale: float,
    grid: Sequence[int],
    given: Mapping[str, Any],
    **about: Any,
) -> Iterator[Row]:
    """AUROC of the score, of m_in and of m_out against each set, with views of one area and each number of the grid."""
    views = EvalViews(given["image_size"], scale, given["flip"], given["seed"])
    dtype = embed.resolved_dtype(given["dtype"])
    sums = experiments.view_sums_of_sets(encoder, sets, views, grid, dtype=dtype, say=lambda _: None)
    n = len(sets[IN_DISTRIBUTION])
    divisions = experiments.splits(n, given["n_splits"], given["n_reference"], given["n_calibration"], seed=given["seed"])
    ask = questions.Asker(sums, paired, divisions)
    for n_views in grid:
        found = []
        for name in ask.anomalies:
            parts = {"m_in": experiments.m_in_only, "m_out": experiments.m_out_only}
            halves = {part: ask.auroc(name, n_views, score) for part, score in parts.items()}
            over = attack_study.over_signs(ask, name, n_views) if paired[name] else {}
            found.append(about | dict(crop_scale=scale, n_views=n_views) | ask(name, n_views) | halves | over)
        told = ", ".join(f"{r['anomaly']} {r['auroc']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in found)
        print(*(f"{key} {value}," for key, value in about.items()), f"area {scale}, {n_views} views: {told}", flush=True)
        yield from found


def write(file: Path, given: Mapping[str, Any], rows: Sequence[Row], **about: Any) -> None:
    """What was asked and found, and on what."""
    about |= dict(parameters=given, hardware=record.hardware(), versions=record.versions())
    about |= dict(commit=record.git_state(record.checkout()))
    record.write_atomically(file, json.dumps(about | dict(rows=list(rows)), indent=1))
    print(f"written: {file}")


def classifier(network: str, given: Mapping[str, Any]) -> encoders.Classifier:
    """The public network of that name, or the profile's kept contrastive encoder with a linear probe on notebook 04's images."""
    if network != "contrastive":
        return experiments.load_victim(Path(), {}, network)
    file = record.checkout() / "outputs" / "reference" / given["profile"] / "pretraining" / network / "encoder.safetensors"
    encoder = encoders.placed(encoders.load_encoder(file))
    training = experiments.labelled(given["training"], [], given["n_training"], given["seed"])
    return comparison.known(encoder, file, training, given["image_size"]).classifier


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", default="cifar:resnet20", help='"cifar:resnet20", "cifar:resnet56" or "contrastive"')
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="areas of a view")
    parser.add_argument("--params", type=Path, default=PARAMS)
    parser.add_argument("--out", type=Path, help="default: outputs/bench/own_features-<network>.json")
    options = parser.parse_args()
    given = parameters.read_yaml(options.params)
    victim, images = classifier(options.network, given), held_out(given)
    moved = attacked(victim, images, given)
    strength = attack_sets.attack_strength(victim, images.images, images.labels, moved)
    sets, paired = {IN_DISTRIBUTION: images.images} | moved, dict.fromkeys(moved, True)
    rows = [row for s in options.scales for row in rows_at(victim.encoder, sets, paired, s, GRID, given)]
    out = options.out or record.output_folder("bench") / f"own_features-{options.network.replace(':', '-')}.json"
    write(out, given, rows, network=options.network, attacks=strength)


if __name__ == "__main__":
    main()
