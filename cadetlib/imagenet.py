"""The image sets of the imagenet profiles: what is expected in which folder, where it comes from, and published lists of names.

A description of files, which reads none of them: `data` does. Where a publisher gives no checksum, that is what is said.

    python -m cadetlib.imagenet FILE    write which images are X_val(1), X_val(2) and test in the profile `imagenet`, as a CSV

That of the profile as it is: params/imagenet/lists.csv.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cadetlib import parameters, record


@dataclass(frozen=True)
class Folder:
    """A set of image files below the data root: so many of them, in so many sub-folders that are labels (0: none).

    >>> SETS["imagenet-val"].n_images
    50000
    """

    path: str
    n_images: int
    n_classes: int
    get: str  # the step that brings it
    checksum: str  # as its publisher gives it
    streamed: bool = False  # does not fit in memory: pretraining reads it as it goes
    by_name: bool = False  # in the order of the files' names alone, which does not depend on how folders are called


_UNPACK = (
    "register at image-net.org, put {archive} and ILSVRC2012_devkit_t12.tar.gz into imagenet/ of the data root, and there run "
    "`python -c \"from torchvision.datasets import ImageNet; ImageNet('imagenet', '{part}')\"`, which compares their md5 and "
    "unpacks them into imagenet/{part}/n01440764/ and so on"
)
FLOWERS64 = (
    "take data/flowers/ of github.com/JoelOscarsson/dl-assignment (commit 05bf18b) without its files aug_*, bring the first 200 "
    "by name of each of its five kinds to 64 x 64 (shorter side bicubic, centre crop, JPEG of quality 75), and put them into "
    "flowers64/KIND/"
)
SETS: dict[str, Folder] = {
    "imagenet-train": Folder(
        "imagenet/train",
        1_281_167,
        1000,
        _UNPACK.format(archive="ILSVRC2012_img_train.tar", part="train"),
        "md5 1d675b47d978889d74fa0da5fadfb00e of ILSVRC2012_img_train.tar, fa75699e90414af021442c21a62c3abf of the devkit",
        streamed=True,
    ),
    "imagenet-val": Folder(
        "imagenet/val",
        50_000,
        1000,
        _UNPACK.format(archive="ILSVRC2012_img_val.tar", part="val"),
        "md5 29b22e2961454d5413ddabcf34fc5622 of ILSVRC2012_img_val.tar, fa75699e90414af021442c21a62c3abf of the devkit",
        by_name=True,
    ),
    "imagenet-o": Folder(
        "imagenet-o",
        2000,
        200,
        "take imagenet-o.tar from github.com/hendrycks/natural-adv-examples (Hendrycks et al. 2021) and unpack it in the data "
        "root: it brings imagenet-o/ with its 200 folders of 2,000 images; or put these there by hand",
        "none published",
    ),
    "inaturalist-plants": Folder(
        "iNaturalist/images",
        10_000,
        0,
        "take iNaturalist.tar.gz from github.com/deeplearning-wisc/large_scale_ood (10,000 plants that Huang and Li 2021 chose "
        "from iNaturalist) and unpack it in the data root, so as to put its 10,000 files into iNaturalist/images/",
        "none published",
    ),
    "imagenet-sample": Folder(
        "imagenet-sample",
        63,
        63,
        "take every 16th image, from the first on, of github.com/EliSchwartz/imagenet-sample-images (commit bc69043), which has "
        "one of each class, in the order of their WordNet ids, and put each into imagenet-sample/ID/, such as "
        "imagenet-sample/n01440764/; for trying, far too few for a result",
        "none published",
    ),
    "flowers64-daisies": Folder(
        "flowers64/daisy",
        200,
        0,
        f"{FLOWERS64}; for trying",
        "none published",
    ),
}

PARTS = ("x_val_1", "x_val_2", "test")  # of a split
_NAMES = ("data", "knn_data", "reference", "in_distribution", "training")  # parameters that name a set, and ...
_LISTS = ("shifted", "trained_shifted", "unseen", "data_sets", "data_required", "other_normal")  # ... those that name several


def profiles() -> list[str]:
    """Names of the profiles: the folders of params/.

    >>> "digits" in profiles()
    True
    """
    return sorted(path.name for path in (record.checkout() / "params").glob("*") if path.is_dir())


def sets_of(profile: str) -> dict[str, list[str]]:
    """Every image set that the parameters of a profile name -> numbers of the notebooks that do, in their order.

    >>> sets_of("digits")["digits-7-to-9"]
    ['00', '03', '04']
    """
    found: dict[str, list[str]] = {}
    for file in sorted((record.checkout() / "params" / profile).glob("*.yaml")):
        given = parameters.read_yaml(file)
        names = [given[key] for key in _NAMES if given.get(key)] + [name for key in _LISTS for name in given.get(key, [])]
        for name in dict.fromkeys(names):
            found.setdefault(name, []).append(file.name[:2])
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under their heads, in columns as wide as they need.

    >>> print(table(("set", "images"), [("digits", "1797")]))
    set     images
    digits  1797
    """
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return "\n".join(lines)


def published_lists(given: Mapping[str, Any]) -> list[dict[str, list[str]]]:
    """For each split of notebook 04 with these parameters, the file names of X_val(1), X_val(2) and the test images.

    The same names for the same seed wherever the set is whole; the notebook draws the very same images.

    >>> given = dict(in_distribution="digits", classes=[], n_held_out=0)
    >>> published_lists(given)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: in_distribution: found digits, expected a set of image files, one of ...
    """
    from cadetlib import data  # which reads this file for what it knows of the sets

    whole = data.load(given["in_distribution"]).of_classes(given["classes"])
    if not isinstance(whole, data.FolderSet):
        raise ValueError(f"in_distribution: found {whole.name}, expected a set of image files, one of {list(SETS)}")
    return drawn([os.fsdecode(file) for file in whole.files], given)


def drawn(files: Sequence[str], given: Mapping[str, Any]) -> list[dict[str, list[str]]]:
    """`published_lists` of a set with these files, in their order.

    >>> [lists] = drawn("abcdefghij", dict(n_held_out=7, n_splits=1, n_reference=2, n_calibration=3, seed=0))
    >>> {part: len(names) for part, names in lists.items()}
    {'x_val_1': 2, 'x_val_2': 3, 'test': 2}
    """
    import torch

    from cadetlib import data, experiments

    numbered = data.ImageSet("numbered", torch.empty(len(files), 3, 0, 0), torch.arange(len(files)))
    chosen = experiments.some_of(numbered, given["n_held_out"], given["seed"]).labels
    sizes = given["n_splits"], given["n_reference"], given["n_calibration"]
    assert chosen is not None
    return [
        {
            part: [files[i] for i in chosen[indices].tolist()]
            for part, indices in zip(PARTS, (division.reference, division.calibration, division.test), strict=True)
        }
        for division in experiments.splits(len(chosen), *sizes, seed=given["seed"])
    ]


def one_table(lists: Sequence[Mapping[str, Sequence[str]]]) -> str:
    """The lists of all splits as one CSV: a line an image, by its file's name without folders, and what it is in each split.

    >>> print(one_table([dict(x_val_1=["b"], x_val_2=["a"]), dict(x_val_1=["a"], x_val_2=["b"])]), end="")
    file,split-0,split-1
    a,x_val_2,x_val_1
    b,x_val_1,x_val_2
    """
    part_of = [{os.path.basename(name): part for part, names in one.items() for name in names} for one in lists]
    head = ",".join(["file", *(f"split-{i}" for i in range(len(lists)))])
    return "".join(f"{line}\n" for line in [head, *(",".join([n, *(parts[n] for parts in part_of)]) for n in sorted(part_of[0]))])


def main(arguments: Sequence[str]) -> int:
    """The command line of this module."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m cadetlib.imagenet FILE", file=sys.stderr)
        return 2
    notebook = record.checkout() / "notebooks" / "04_cadet_tables.ipynb"
    defaults = {name: parameter.value for name, parameter in parameters.declared(notebook).items()}
    file = record.checkout() / "params" / "imagenet" / f"{notebook.stem}.yaml"
    try:
        lists = published_lists(parameters.validate(defaults, parameters.read_yaml(file), file))
        written = record.write_atomically(arguments[0], one_table(lists))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
