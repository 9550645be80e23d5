"""What the threshold explorer holds: detectors as they would be deployed, with their scores of sets of images, saved and read.

Only scores are saved; p-values follow from them and from the calibration scores.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadetlib import cadet, data, embed, experiments

Row = dict[str, Any]


def detector(
    encoder: nn.Module, held_out: embed.ViewSums, division: experiments.Split, settings: Mapping[str, Any]
) -> cadet.CADet:
    """CADet with its encoder, calibrated on one split of view sums that are there already.

    settings: `n_views`, `crop_scale`, `image_size`, `seed`, `flip`, `dtype`, those the sums were made with, among others.
    """
    names = ("n_views", "crop_scale", "image_size", "seed", "flip", "dtype")
    made = cadet.CADet(encoder, **{name: settings[name] for name in names})
    return made.fit_sums(held_out[division.reference], held_out[division.calibration])


def save(made: cadet.CADet, path: Path, encoder_file: Path) -> Path:
    """Keep a detector for the command line, with its encoder's file as seen from there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path, encoder_name=os.path.relpath(encoder_file, path.parent))
    return path


def scores(name: str, made: cadet.CADet, tested: Mapping[str, embed.ViewSums], normal: Collection[str]) -> Row:
    """Scores of some sets by one detector, to be saved: ascending, with the position of each image in its set.

    tested: name -> view sums of images that the detector was not calibrated on; normal: which of the sets are in-distribution.
    """
    sets = []
    for set_name, sums in tested.items():
        ascending = made.score_sums(sums).sort()
        kind = "in" if set_name in normal else "out"
        sets.append(dict(name=set_name, kind=kind, scores=ascending.values, images=ascending.indices))
    return dict(
        name=name,
        fingerprint=made.fingerprint(),
        ties=made.ties,
        calibration_scores=made.calibration_scores_.sort().values,
        sets=sets,
    )


def curves(row: Mapping[str, Any]) -> Row:
    """What the explorer shows of a saved row of `scores`: each set with its p-values."""
    calibration = torch.tensor(row["calibration_scores"], dtype=torch.float64)
    found = []
    for one in row["sets"]:
        ascending = torch.tensor(one["scores"], dtype=torch.float64)
        found.append(
            {**one, "p_values": cadet.p_values(calibration, ascending, row["ties"]).numpy(), "scores": ascending.numpy()}
        )
    return {**row, "calibration_scores": calibration.numpy(), "curves": found}


def other_sets(
    names: Sequence[str], classes: Sequence[int], n: int, size: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """At most n images of each of some named sets, and of those that are not there, why."""
    found, missing = data.available(names)
    chosen = [images.of_classes(classes) for images in found]
    images = {one.name: experiments.some_of(one, min(n, len(one)), seed).resized(size).images for one in chosen}
    return images, missing


def tested_images(asker: experiments.Asker, sets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The images behind `Asker.tested` on the first split, for those who look at them."""
    test = asker.divisions[0].test
    return {
        name: images[test] if name == experiments.IN_DISTRIBUTION or asker.paired[name] else images
        for name, images in sets.items()
    }
