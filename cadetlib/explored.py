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

from cadetlib import cadet, data, embed, experiments, questions

Row = dict[str, Any]


def detector(
    encoder: nn.Module, held_out: embed.ViewSums, division: experiments.Split, settings: Mapping[str, Any]
) -> cadet.CADet:
    """CADet with its encoder, calibrated on one split of view sums that are there already.

    settings: `n_views`, `crop_scale`, `view_size`, `seed`, `flip`, `dtype`, those the sums were made with, among others.

    >>> settings = dict(n_views=4, crop_scale=0.75, view_size=8, seed=0, flip=False, dtype="float32")
    >>> images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> sums = cadet.CADet(nn.Flatten(), n_views=4, image_size=8, flip=False).view_sums(images)
    >>> made = detector(nn.Flatten(), sums, experiments.splits(30, 1, 5, 19)[0], settings)
    >>> len(made.calibration_scores_), made.n_views
    (19, 4)
    """
    names = ("n_views", "crop_scale", "seed", "flip", "dtype")
    made = cadet.CADet(encoder, image_size=settings["view_size"], **{name: settings[name] for name in names})
    return made.fit_sums(held_out[division.reference], held_out[division.calibration])


def save(made: cadet.CADet, path: Path, encoder_file: Path) -> Path:
    """Keep a detector for the command line, with its encoder's file as seen from there.

    >>> from tempfile import mkdtemp
    >>> folder, images = Path(mkdtemp()), torch.rand(30, 3, 8, 8)
    >>> made = cadet.CADet(nn.Flatten(), n_views=4, image_size=8).fit(images[:5], images[5:])
    >>> save(made, folder / "detectors" / "mine.safetensors", folder / "encoder.safetensors").name
    'mine.safetensors'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path, encoder_name=os.path.relpath(encoder_file, path.parent))
    return path


def scores(name: str, made: cadet.CADet, tested: Mapping[str, embed.ViewSums], normal: Collection[str]) -> Row:
    """Scores of some sets by one detector, to be saved: ascending, with the position of each image in its set.

    tested: name -> view sums of images that the detector was not calibrated on; normal: which of the sets are in-distribution.

    >>> images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> made = cadet.CADet(nn.Flatten(), n_views=4, image_size=8).fit(images[:5], images[5:24])
    >>> row = scores("mine", made, {"test": made.view_sums(images[24:])}, normal=["test"])
    >>> row["sets"][0]["kind"], len(row["sets"][0]["scores"])
    ('in', 6)
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
    """What the explorer shows of a saved row of `scores`: each set with its p-values.

    >>> one = dict(name="test", kind="in", scores=[0.2, 0.6], images=[1, 0])
    >>> shown = curves(dict(name="mine", ties="paper", calibration_scores=[0.1, 0.3, 0.5], sets=[one]))
    >>> shown["curves"][0]["p_values"].tolist()  # one, and all three, of the calibration scores lie below
    [0.5, 1.0]
    """
    calibration = torch.tensor(row["calibration_scores"], dtype=torch.float64)
    found = []
    for one in row["sets"]:
        ascending = torch.tensor(one["scores"], dtype=torch.float64)
        found.append(
            {**one, "p_values": cadet.p_values(calibration, ascending, row["ties"]).numpy(), "scores": ascending.numpy()}
        )
    return {**row, "calibration_scores": calibration.numpy(), "curves": found}


def other_sets(
    names: Sequence[str], classes: Sequence[int], n: int, size: int, seed: int, allow_unreadable: int = 0
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """At most n images of each of some named sets, and of those that are not there, why.

    >>> found, missing = other_sets(["digits-train"], classes=[0, 1], n=5, size=8, seed=0)
    >>> {name: tuple(images.shape) for name, images in found.items()}, missing
    ({'digits-train': (5, 3, 8, 8)}, {})
    """
    found, missing = data.available(names, allow_unreadable)
    chosen = [images.of_classes(classes) for images in found]
    images = {one.name: experiments.some_of(one, min(n, len(one)), seed).resized(size).images for one in chosen}
    return images, missing


def tested_images(asker: questions.Asker, sets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The images behind `Asker.tested` on the first split, for those who look at them.

    >>> division = experiments.Split(torch.tensor([0]), torch.tensor([1]), test=torch.tensor([3, 2]))
    >>> asker = questions.Asker({}, {"in-distribution": False, "unseen": False}, [division])
    >>> {name: images.tolist() for name, images in tested_images(asker, {name: torch.arange(4) for name in asker.paired}).items()}
    {'in-distribution': [3, 2], 'unseen': [0, 1, 2, 3]}
    """
    test = asker.divisions[0].test
    return {
        name: images[test] if name == experiments.IN_DISTRIBUTION or asker.paired[name] else images
        for name, images in sets.items()
    }
