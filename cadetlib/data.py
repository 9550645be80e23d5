"""Named image sets and deterministic splits.

A set is found under the data root (the environment variable CADET_DATA, else data/ in the checkout); what is missing is said
with the step that gets it, and nothing is ever put in its place. `digits` needs no files: scikit-learn carries it.

A colon adds a corruption and its severity: `cifar10-test:jpeg-1` is the set made from `cifar10-test`, image by image.

    python -m cadetlib.data check cifar10-test svhn-test    what is there, what is missing, what to do
    python -m cadetlib.data download cifar10-test           torchvision's downloads, checksummed
"""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadetlib import checks, corruptions
from cadetlib.views import resize_to

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
MNIST_MD5 = "2646ac647ad5339dbf082846283269ea"  # of t10k-images-idx3-ubyte, uncompressed


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, H, W) uint8 with labels (N,) int64 where there are any, under the name of what they are."""

    name: str
    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ValueError(
                f"{self.name}: found {len(self.labels)} labels for {len(self.images)} images, expected equal numbers"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> ImageSet:
        """The images of `index` (slice, mask or indices), in that order."""
        return replace(self, images=self.images[index], labels=None if self.labels is None else self.labels[index])

    def resized(self, size: int) -> ImageSet:
        """All images brought to `size` x `size`, as uint8."""
        if tuple(self.images.shape[-2:]) == (size, size):
            return self
        parts = [(resize_to(part, size) * 255).round().to(torch.uint8) for part in self.images.split(1000)]
        return replace(self, images=torch.cat(parts))

    def of_classes(self, classes: Sequence[int]) -> ImageSet:
        """The images whose label is one of `classes`, in their order; all images when `classes` is empty."""
        if not classes:
            return self
        if self.labels is None:
            raise ValueError(f"{self.name}: found no labels, expected some to choose classes {list(classes)} by")
        return self[torch.isin(self.labels, torch.tensor(list(classes)))]


def root() -> Path:
    """The data root: CADET_DATA, else data/ beside the package."""
    return Path(os.environ.get("CADET_DATA") or Path(__file__).resolve().parents[1] / "data").expanduser()


def _rgb(images: np.ndarray) -> Tensor:
    """(N, H, W) or (N, H, W, 3) uint8 -> (N, 3, H, W) uint8."""
    x = torch.from_numpy(np.ascontiguousarray(images))
    return x[:, None].expand(-1, 3, -1, -1).contiguous() if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()


def _digits(_: Path, name: str, __: bool) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return ImageSet(name, _rgb(grey), torch.from_numpy(digits.target).long())


DIGITS_TRAIN = 797  # of 1,797, drawn once; the other 1,000 are never trained on


def _digits_part(part: str) -> Callable[[Path, str, bool], ImageSet]:
    """A fixed random part of the digits, in the set's own order, which is by writer."""

    def load(folder: Path, name: str, _: bool) -> ImageSet:
        digits = _digits(folder, name, False)
        parts = split(len(digits), {"train": DIGITS_TRAIN, "test": len(digits) - DIGITS_TRAIN}, seed=0)
        return digits[parts[part].sort().values]

    return load


def _digits_writers(first: bool) -> Callable[[Path, str, bool], ImageSet]:
    """The test digits of the first or of the last writers: the set is in the order of its writers."""

    def load(folder: Path, name: str, _: bool) -> ImageSet:
        test = _digits_part("test")(folder, name, False)
        half = len(test) // 2
        return test[:half] if first else test[-half:]

    return load


def _digits_unseen(folder: Path, name: str, _: bool) -> ImageSet:
    return _digits(folder, name, False).of_classes([7, 8, 9])


def _torchvision_set(class_name: str, split: Mapping[str, Any]) -> Callable[[Path, str, bool], ImageSet]:
    """A set read by torchvision, which compares every file with its official md5 before it opens it."""

    def load(folder: Path, name: str, download: bool) -> ImageSet:
        from torchvision import datasets

        try:
            found = getattr(datasets, class_name)(folder, **split, download=download)
        except RuntimeError as error:
            raise FileNotFoundError(f"{error}".splitlines()[0]) from error
        images = found.data if class_name != "SVHN" else found.data.transpose(0, 2, 3, 1)
        labels = found.targets if hasattr(found, "targets") else found.labels
        return ImageSet(name, _rgb(np.asarray(images)), torch.as_tensor(np.asarray(labels)).long())

    return load


def _cifar10_1(version: str, n_images: int) -> Callable[[Path, str, bool], ImageSet]:
    def load(folder: Path, name: str, _: bool) -> ImageSet:
        files = [folder / "cifar10.1" / f"cifar10.1_{version}_{part}.npy" for part in ("data", "labels")]
        images, labels = (np.load(_existing(file), allow_pickle=False) for file in files)
        if images.shape != (n_images, 32, 32, 3) or images.dtype != np.uint8 or labels.shape != (n_images,):
            raise ValueError(
                f"found {images.shape} {images.dtype} and {len(labels)} labels, expected ({n_images}, 32, 32, 3) uint8"
            )
        return ImageSet(name, _rgb(images), torch.from_numpy(labels).long())

    return load


def _archive(path: str, labels: str | None) -> Callable[[Path, str, bool], ImageSet]:
    def load(folder: Path, name: str, _: bool) -> ImageSet:
        with np.load(_existing(folder / path), allow_pickle=False) as file:
            return ImageSet(name, _rgb(file["images"]), torch.from_numpy(file[labels]).long() if labels else None)

    return load


def _mnist(folder: Path, name: str, _: bool) -> ImageSet:
    raw = gzip.decompress(_existing(folder / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress(_existing(folder / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    if hashlib.md5(raw).hexdigest() != MNIST_MD5:
        raise ValueError(f"found images whose md5 is not the official {MNIST_MD5}")
    images = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return ImageSet(name, _rgb(padded), torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).copy()).long())


def image_files(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted by relative path."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"found no image files below {folder}, expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return files


def read_image(path: Path, size: int) -> Tensor:
    """One image file as (3, size, size) uint8: upright, RGB, 16-bit greys scaled; shorter side resized, centre crop.

    ValueError for a file that is damaged or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):
                upright = Image.fromarray((np.asarray(upright, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
            array = np.array(upright.convert("RGB"))
    except (OSError, SyntaxError) as error:  # what Pillow says of a damaged file
        raise ValueError(
            f"{path}: found no readable image ({error}), expected a whole image file; replace or remove it"
        ) from error
    return (resize_to(_rgb(array[None]), size)[0] * 255).round().to(torch.uint8)


def folder_images(folder: str | Path, size: int, name: str = "") -> ImageSet:
    """All images below a folder, brought to `size`; labels are the numbers of their sub-folders, if there are any."""
    files = image_files(folder)
    parents = sorted({p.parent for p in files})
    labels = torch.tensor([parents.index(p.parent) for p in files]) if len(parents) > 1 else None
    return ImageSet(name or Path(folder).name, torch.stack([read_image(p, size) for p in files]), labels)


def _folder(path: str, size: int) -> Callable[[Path, str, bool], ImageSet]:
    return lambda root_folder, name, _: folder_images(_existing(root_folder / path), size, name)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"found no {path}")
    return path


@dataclass(frozen=True)
class _Source:
    load: Callable[[Path, str, bool], ImageSet]
    get: str  # the step that brings it
    downloads: bool = False


_TORCHVISION = "run `python -m cadetlib.data download {name}`"
_GITHUB = "take datasets/{file}_data.npy and {file}_labels.npy of github.com/modestyachts/CIFAR-10.1 and put them into cifar10.1/"
_BY_HAND = "put it there; it is a small cut of a public set, and the full set goes by another name"
SOURCES: dict[str, _Source] = {
    "digits": _Source(_digits, "install scikit-learn"),
    "digits-train": _Source(_digits_part("train"), "install scikit-learn"),
    "digits-test": _Source(_digits_part("test"), "install scikit-learn"),
    "digits-first-writers": _Source(_digits_writers(True), "install scikit-learn"),
    "digits-last-writers": _Source(_digits_writers(False), "install scikit-learn"),
    "digits-7-to-9": _Source(_digits_unseen, "install scikit-learn"),
    "cifar10-train": _Source(_torchvision_set("CIFAR10", {"train": True}), _TORCHVISION, True),
    "cifar10-test": _Source(_torchvision_set("CIFAR10", {"train": False}), _TORCHVISION, True),
    "cifar10.1-v6": _Source(_cifar10_1("v6", 2000), _GITHUB.format(file="cifar10.1_v6")),
    "cifar10.1-v4": _Source(_cifar10_1("v4", 2021), _GITHUB.format(file="cifar10.1_v4")),
    "cifar100-test": _Source(_torchvision_set("CIFAR100", {"train": False}), _TORCHVISION, True),
    "cifar100-first2000": _Source(_archive("cifar100/cifar100_test_first2000.npz", "fine_labels"), _BY_HAND),
    "svhn-test": _Source(_torchvision_set("SVHN", {"split": "test"}), _TORCHVISION, True),
    "svhn-first1083": _Source(_archive("svhn/svhn_train_first1083.npz", None), _BY_HAND),
    "mnist-test": _Source(_mnist, "put t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz into mnist/"),
    "flowers64": _Source(_folder("flowers64", 64), _BY_HAND),
}


def load(name: str, download: bool = False) -> ImageSet:
    """The image set of that name, one of SOURCES, after a colon with a corruption. FileNotFoundError says where it was looked
    for and how to get it, ValueError what is wrong with the files that are there.

    >>> len(load("digits"))
    1797
    >>> load("digits:gaussian_blur-2").name
    'digits:gaussian_blur-2'
    """
    name, _, shift = name.partition(":")
    if shift:
        return _corrupted(load(name, download), shift)
    if name not in SOURCES:
        raise ValueError(f"data: found no set named {name!r}, expected one of {list(SOURCES)}")
    source = SOURCES[name]
    step = source.get.format(name=name)
    try:
        return source.load(root(), name, download and source.downloads)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error} (data root {root()}, set by CADET_DATA); to get it, {step}") from error
    except (ValueError, OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{name}: found no readable files ({error}), expected whole ones below {root()}; to get them, {step}"
        ) from error


def _corrupted(images: ImageSet, shift: str) -> ImageSet:
    """The set after the corruption "name-severity"."""
    kind, _, severity = shift.rpartition("-")
    if kind not in corruptions.SEVERITIES or severity not in list("12345"):
        known = ", ".join(corruptions.SEVERITIES)
        raise ValueError(
            f"data: found {images.name}:{shift}, expected a corruption ({known}) and its severity, as in {images.name}:jpeg-1"
        )
    made = corruptions.corrupt(images.images, kind, int(severity))
    return replace(images, name=f"{images.name}:{shift}", images=made)


def _tried(names: Sequence[str]) -> dict[str, ImageSet | FileNotFoundError]:
    found: dict[str, ImageSet | FileNotFoundError] = {}
    for name in names:
        try:
            found[name] = load(name)
        except FileNotFoundError as error:
            found[name] = error
    return found


def available(names: Sequence[str]) -> tuple[list[ImageSet], dict[str, str]]:
    """The sets that are there, and for each that is not the reason why: its row is left out, never filled by another.

    The reasons go into results, and so name the data root as <data root> and not by its place.
    """
    tried = _tried(names)
    reasons = {k: str(v).replace(str(root()), "<data root>") for k, v in tried.items() if isinstance(v, FileNotFoundError)}
    return [found for found in tried.values() if isinstance(found, ImageSet)], reasons


def missing(names: Sequence[str]) -> list[str]:
    """For each of the sets that is not there, one line that says so, where it was looked for, and what to do."""
    return [str(found) for found in _tried(names).values() if isinstance(found, FileNotFoundError)]


def split(n: int, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Disjoint random parts of range(n): name -> indices (size,) int64. The same for the same n, sizes and seed.

    >>> {name: len(part) for name, part in split(10, {"reference": 3, "test": 7}, seed=0).items()}
    {'reference': 3, 'test': 7}
    """
    wanted = sum(checks.at_least(size, f"size of {name}", 0) for name, size in sizes.items())
    if wanted > n:
        raise ValueError(f"split: found {n} images for {dict(sizes)}, expected at least {wanted}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return dict(zip(sizes, order[:wanted].split(list(sizes.values())), strict=True))


def main(arguments: Sequence[str]) -> int:
    """The command line of this module; 0 when every named set is there."""
    if not arguments or arguments[0] not in ("check", "download"):
        print(f"usage: python -m cadetlib.data check|download [NAME ...]   names: {' '.join(SOURCES)}", file=sys.stderr)
        return 2
    complete = True
    for name in arguments[1:] or list(SOURCES):
        try:
            print(f"{name:20} {len(load(name, arguments[0] == 'download'))} images")
        except (FileNotFoundError, ValueError) as error:
            complete = False
            print(f"{name:20} MISSING: {error}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
