"""Named image sets and deterministic splits.

A set is found under the data root (the environment variable CADET_DATA, else data/ in the checkout); what is missing is said
with the step that gets it, and nothing is ever put in its place. `digits` needs no files: scikit-learn carries it.

A colon adds a corruption and its severity: `cifar10-test:jpeg-1` is the set made from `cifar10-test`, image by image.

    python -m cadetlib.data check cifar10-test svhn-test    what is there, what is missing, what to do
    python -m cadetlib.data check imagenet                  the same for all sets that a profile names
    python -m cadetlib.data download cifar10-test           torchvision's downloads, checksummed
"""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cadetlib import checks, corruptions, image_files, imagenet, processes, record
from cadetlib.views import resize_to

if TYPE_CHECKING:
    pass

MNIST_MD5 = {  # of the official files, unpacked, since some packed them again
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}


@dataclass(frozen=True)
class ImageSet:
    """Images (N, 3, H, W) uint8 with labels (N,) int64 where there are any, under the name of what they are.

    >>> digits = load("digits")
    >>> sevens = digits.of_classes([7])[:10].resized(32)
    >>> sevens.name, sevens.images.shape, sevens.labels.unique().tolist()
    ('digits', torch.Size([10, 3, 32, 32]), [7])
    """

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

    def blocks(self, size: int, n: int = 1024) -> Iterator[ImageSet]:
        """All images brought to `size` x `size`, n at a time: of a folder no more than that are in memory."""
        yield from (self[start : start + n].resized(size) for start in range(0, len(self), n))

    def of_classes(self, classes: Sequence[int]) -> ImageSet:
        """The images whose label is one of `classes`, in their order; all images when `classes` is empty."""
        if not classes:
            return self
        if self.labels is None:
            raise ValueError(f"{self.name}: found no labels, expected some to choose classes {list(classes)} by")
        return self[torch.isin(self.labels, torch.tensor(list(classes)))]


@dataclass(frozen=True)
class FolderSet(ImageSet):
    """Image files of any size, not read before `resized` asks for them; `images` is (N, 3, 0, 0) and holds no pixel.

    `files` (N,) are paths from `folder` on, as bytes in one block: a million of them cost little, also in forked processes.
    Chosen from like any ImageSet, so that what is not chosen is never read. `folder_set` makes one.

    >>> files = np.array([b"cat/1.jpg", b"cat/2.jpg", b"dog/1.jpg"])
    >>> pets = FolderSet("pets", torch.empty(3, 3, 0, 0), torch.tensor([0, 0, 1]), Path("pets"), files)
    >>> dogs = pets.of_classes([1])
    >>> len(dogs), str(dogs.path(0))
    (1, 'pets/dog/1.jpg')
    """

    folder: Path = Path()
    files: np.ndarray = field(default_factory=lambda: np.empty(0, np.bytes_))
    allow_unreadable: int = 0  # so many damaged files are left out when the images are read

    def __getitem__(self, index: Any) -> FolderSet:
        where = index if isinstance(index, slice) else torch.as_tensor(index).numpy()
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=self.images[index], labels=labels, files=self.files[where])

    def path(self, index: int) -> Path:
        """The file of one image."""
        return self.folder / os.fsdecode(self.files[index])

    def resized(self, size: int) -> ImageSet:
        """All images read and brought to `size` x `size`, as uint8, but for `allow_unreadable` damaged files, which are named.

        ValueError lists every file that cannot be read when they are more.
        """
        (whole,) = self.blocks(size, max(len(self), 1))
        return whole

    def blocks(self, size: int, n: int = 1024) -> Iterator[ImageSet]:
        """As `resized`, n files at a time; the ValueError comes after the last, and lists those of all blocks."""
        errors = []
        for start in range(0, max(len(self), 1), n):
            block, unreadable = self[start : start + n]._read(size)
            errors += unreadable
            yield block
        if len(errors) > self.allow_unreadable:
            raise ValueError(too_many_unreadable(self.name, errors, self.allow_unreadable))
        if errors:
            text = "\n".join([f"{self.name}: LEFT OUT {len(errors)} unreadable images:", *errors])
            print(processes.printable(text), flush=True)

    def _read(self, size: int) -> tuple[ImageSet, list[str]]:
        """What can be read, and what is wrong with each of the other files."""
        pixels = torch.empty(len(self), 3, size, size, dtype=torch.uint8)

        def read(index: int) -> str:
            try:
                pixels[index] = image_files.read_image(self.path(index), size)
            except ValueError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            errors = list(pool.map(read, range(len(self))))
        unreadable = [error for error in errors if error]
        if not unreadable:
            return ImageSet(self.name, pixels, self.labels), []
        readable = torch.tensor([not error for error in errors])
        return ImageSet(self.name, pixels[readable], None if self.labels is None else self.labels[readable]), unreadable


def too_many_unreadable(name: str, errors: Sequence[str], allow: int, more: str = "") -> str:
    """What a set is refused with that has more unreadable images than are allowed: all of them, and what to do.

    >>> print(too_many_unreadable("pets", ["dog/1.jpg: found no readable image"], allow=0))
    pets: found 1 unreadable images, expected at most allow_unreadable = 0: replace or remove them, or allow so many
    dog/1.jpg: found no readable image
    """
    found, expected = f"found {len(errors)} unreadable images", f"expected at most allow_unreadable = {allow}"
    return "\n".join([f"{name}: {found}, {expected}: replace or remove them, or allow so many{more}", *errors])


def folder_set(folder: str | Path, name: str = "") -> FolderSet:
    """The image files below a folder, in the order of `files_below`; labels are the numbers of its sub-folders, if there are any.

    FileNotFoundError when there is no image.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "cat.jpg").touch()  # empty, and no error: it is not read yet
    ...     folder_set(folder, "pets").files.tolist()
    [b'cat.jpg']
    """
    found = list(image_files.images_below(folder))
    if not found:
        raise FileNotFoundError(f"found no image files below {folder}, expected files ending in {image_files.KINDS}")
    tops = [path.partition("/")[0] if "/" in path else "" for path in found]
    number = {top: i for i, top in enumerate(dict.fromkeys(tops))}
    labels = torch.tensor([number[top] for top in tops]) if len(number) > 1 else None
    files = np.array([os.fsencode(path) for path in found])
    placeholder = torch.empty(len(found), 3, 0, 0, dtype=torch.uint8)
    return FolderSet(name or Path(folder).name, placeholder, labels, Path(folder), files)


def root() -> Path:
    """The data root: `record.data_root`.

    >>> root() == record.data_root()
    True
    """
    return record.data_root()


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


def _torchvision_set(class_name: str, split: Mapping[str, Any], place: str) -> Callable[[Path, str, bool], ImageSet]:
    """A set read by torchvision, which compares every file with its official md5 before it opens it.

    Of missing files and of damaged ones it says the same; `place` below the data root tells them apart.
    """

    def load(folder: Path, name: str, download: bool) -> ImageSet:
        from torchvision import datasets

        try:
            found = getattr(datasets, class_name)(folder, **split, download=download)
        except RuntimeError as error:
            if (folder / place).exists():
                raise ValueError(f"{place}: found files of another md5 than the official ones") from error
            why = f" ({str(error).splitlines()[0]})" if download else ""
            raise FileNotFoundError(f"found no {folder / place}{why}") from error
        images = found.data if class_name != "SVHN" else found.data.transpose(0, 2, 3, 1)
        labels = found.targets if hasattr(found, "targets") else found.labels
        return ImageSet(name, _rgb(np.asarray(images)), torch.as_tensor(np.asarray(labels)).long())

    return load


def _cifar10_1(version: str, n_images: int) -> Callable[[Path, str, bool], ImageSet]:
    def load(folder: Path, name: str, download: bool) -> ImageSet:
        files = [folder / "cifar10.1" / f"cifar10.1_{version}_{part}.npy" for part in ("data", "labels")]
        images, labels = (np.load(_published(file, download), allow_pickle=False) for file in files)
        if images.shape != (n_images, 32, 32, 3) or images.dtype != np.uint8 or labels.shape != (n_images,):
            raise ValueError(
                f"found {images.shape} {images.dtype} and {len(labels)} labels, expected ({n_images}, 32, 32, 3) uint8"
            )
        return ImageSet(name, _rgb(images), torch.from_numpy(labels).long())

    return load


CIFAR10_1 = "https://github.com/modestyachts/CIFAR-10.1/raw/master/datasets/"
CIFAR10_1_SHA256 = {  # as TensorFlow Datasets publishes them
    "cifar10.1_v4_data.npy": "5aaedc268df8f4cffca2ac0cf9e608ae1897a8cddb630c7a850a2ea8f6558e75",
    "cifar10.1_v4_labels.npy": "1f9544300ded199539b6662364ce7fe6c2e1ea9f87408f06db4b1a6184cffb18",
    "cifar10.1_v6_data.npy": "2997188e5816f5bd545dc77771b6227828c28146049fcecf3fa10775474cacc6",
    "cifar10.1_v6_labels.npy": "ae40beda001693674edc94d925ee8268cfe68905f8f9aff800c8dcdfcd6c9448",
}


def _published(file: Path, download: bool) -> Path:
    """A file of CIFAR-10.1, brought first if asked for; refused when it is not the published one, byte for byte."""
    expected = CIFAR10_1_SHA256[file.name]
    if download and not (file.exists() and _sha256(file) == expected):
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(CIFAR10_1 + file.name, str(file), hash_prefix=expected)
    if (found := _sha256(_existing(file))) != expected:
        raise ValueError(f"{file.name}: found sha256 {found[:16]}…, expected {expected[:16]}…")
    return file


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _archive(path: str, labels: str | None) -> Callable[[Path, str, bool], ImageSet]:
    def load(folder: Path, name: str, _: bool) -> ImageSet:
        with np.load(_existing(folder / path), allow_pickle=False) as file:
            return ImageSet(name, _rgb(file["images"]), torch.from_numpy(file[labels]).long() if labels else None)

    return load


def _first(
    n: int, whole: Callable[[Path, str, bool], ImageSet], path: str, labels: str | None
) -> Callable[[Path, str, bool], ImageSet]:
    """The first n images of a whole set: cut from it, or from a small file at `path` that has these alone."""
    small = _archive(path, labels)

    def load(folder: Path, name: str, download: bool) -> ImageSet:
        if (folder / path).exists():
            return small(folder, name, download)
        found = whole(folder, name, download)[:n]
        return found if labels else replace(found, labels=None)

    return load


def _mnist(folder: Path, name: str, download: bool) -> ImageSet:
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    packed = dict(datasets.MNIST.resources[2:])  # the test set's images and labels -> md5
    raw = {}
    for file, expected in MNIST_MD5.items():
        path = folder / "mnist" / file
        if download and not (path.exists() and _md5_unpacked(path) == expected):
            download_url(datasets.MNIST.mirrors[0] + file, path.parent, md5=packed[file])
        raw[file] = gzip.decompress(_existing(path).read_bytes())
        if (found := hashlib.md5(raw[file]).hexdigest()) != expected:
            raise ValueError(f"{file}: found md5 {found} unpacked, expected {expected}")
    images, labels = (
        torch.from_numpy(np.frombuffer(raw[file], np.uint8, offset=n).copy()) for file, n in zip(raw, (16, 8), strict=True)
    )
    padded = np.pad(images.numpy().reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return ImageSet(name, _rgb(padded), labels.long())


def _md5_unpacked(path: Path) -> str:
    """Of a gzip's content; "" when it is no whole gzip."""
    try:
        return hashlib.md5(gzip.decompress(path.read_bytes())).hexdigest()
    except (OSError, EOFError, zlib.error):
        return ""


def folder_images(folder: str | Path, size: int, name: str = "", allow_unreadable: int = 0) -> ImageSet:
    """All images below a folder, brought to `size`; labels are the numbers of their sub-folders, if there are any.

    FileNotFoundError when there is no image; ValueError names the unreadable ones when they are more than allowed.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for kind in ("cats", "dogs"):
    ...         Path(folder, kind).mkdir()
    ...         Image.new("RGB", (40, 30)).save(Path(folder, kind, "1.png"))
    ...     pets = folder_images(folder, size=16)
    >>> pets.images.shape, pets.labels.tolist()
    (torch.Size([2, 3, 16, 16]), [0, 1])
    """
    return replace(folder_set(folder, name), allow_unreadable=allow_unreadable).resized(size)


def _folder(path: str, size: int) -> Callable[[Path, str, bool], ImageSet]:
    return lambda root_folder, name, _: folder_images(_existing(root_folder / path), size, name)


def _files(expected: imagenet.Folder) -> Callable[[Path, str, bool], ImageSet]:
    """A whole set of image files: not one more or less than its publisher says, and none of them read."""

    def load(root_folder: Path, name: str, _: bool) -> ImageSet:
        found = folder_set(_existing(root_folder / expected.path), name)
        n_classes = 0 if found.labels is None else int(found.labels.max()) + 1
        if (len(found), n_classes) != (expected.n_images, expected.n_classes):
            raise ValueError(
                f"found {len(found)} images in {n_classes or 'no'} sub-folders of {root_folder / expected.path}, "
                f"expected {expected.n_images} in {expected.n_classes or 'none'}"
            )
        return found[np.argsort([os.path.basename(file) for file in found.files.tolist()])] if expected.by_name else found

    return load


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"found no {path}")
    return path


@dataclass(frozen=True)
class _Source:
    load: Callable[[Path, str, bool], ImageSet]
    get: str  # the step that brings it
    downloads: bool = False


def _part(whole: str, part: slice, merged: int = 1) -> _Source:
    """Some images of a set of files; merged: so many classes that are neighbours in it become one."""

    def load(root_folder: Path, name: str, download: bool) -> ImageSet:
        found = SOURCES[whole].load(root_folder, name, download)[part]
        return replace(found, labels=None if found.labels is None else found.labels // merged)

    return _Source(load, imagenet.SETS[whole].get)


FOLDER = "folder"  # "folder:PATH" names the images below any folder
_DOWNLOAD = "run `python -m cadetlib.data download {name}`"
_CIFAR100 = _torchvision_set("CIFAR100", {"train": False}, "cifar-100-python")
_SVHN = _torchvision_set("SVHN", {"split": "train"}, "train_32x32.mat")
SOURCES: dict[str, _Source] = {
    "digits": _Source(_digits, "install scikit-learn"),
    "digits-train": _Source(_digits_part("train"), "install scikit-learn"),
    "digits-test": _Source(_digits_part("test"), "install scikit-learn"),
    "digits-first-writers": _Source(_digits_writers(True), "install scikit-learn"),
    "digits-last-writers": _Source(_digits_writers(False), "install scikit-learn"),
    "digits-7-to-9": _Source(_digits_unseen, "install scikit-learn"),
    "cifar10-train": _Source(_torchvision_set("CIFAR10", {"train": True}, "cifar-10-batches-py"), _DOWNLOAD, True),
    "cifar10-test": _Source(_torchvision_set("CIFAR10", {"train": False}, "cifar-10-batches-py"), _DOWNLOAD, True),
    "cifar10.1-v6": _Source(_cifar10_1("v6", 2000), _DOWNLOAD, True),
    "cifar10.1-v4": _Source(_cifar10_1("v4", 2021), _DOWNLOAD, True),
    "cifar100-test": _Source(_CIFAR100, _DOWNLOAD, True),
    "cifar100-first2000": _Source(
        _first(2000, _CIFAR100, "cifar100/cifar100_test_first2000.npz", "fine_labels"), _DOWNLOAD, True
    ),
    "svhn-test": _Source(_torchvision_set("SVHN", {"split": "test"}, "test_32x32.mat"), _DOWNLOAD, True),
    "svhn-first1083": _Source(_first(1083, _SVHN, "svhn/svhn_train_first1083.npz", None), _DOWNLOAD, True),
    "mnist-test": _Source(_mnist, _DOWNLOAD, True),
    "flowers64": _Source(_folder("flowers64", 64), imagenet.FLOWERS64),
    **{name: _Source(_files(expected), expected.get) for name, expected in imagenet.SETS.items()},
    # For the dry run of the profile imagenet; the sample has one image of each of its classes.
    "imagenet-sample-first57": _part("imagenet-sample", slice(57), merged=3),
    "imagenet-sample-last6": _part("imagenet-sample", slice(57, 63), merged=3),
    "flowers64-daisies-first24": _part("flowers64-daisies", slice(24)),
}


def load(name: str, download: bool = False, allow_unreadable: int = 0) -> ImageSet:
    """The image set of that name: one of SOURCES, after a colon with a corruption, or "folder:PATH", the images below a folder.

    A relative PATH begins at the data root; sub-folders are labels. Of a set of image files, `allow_unreadable` damaged ones are
    left out, aloud, when they are read. FileNotFoundError says where a set was looked for and how to get it, ValueError what is
    wrong with the files that are there.

    >>> len(load("digits"))
    1797
    >>> load("digits:gaussian_blur-2").name
    'digits:gaussian_blur-2'
    """
    checks.at_least(allow_unreadable, "allow_unreadable", 0)
    name, _, shift = name.partition(":")
    if name == FOLDER:
        found = folder_set(root() / Path(shift).expanduser(), f"{FOLDER}:{shift}")
        return replace(found, allow_unreadable=allow_unreadable)
    if shift:
        return _corrupted(load(name, download), shift)
    if name not in SOURCES:
        raise ValueError(f"data: found no set named {name!r}, expected one of {list(SOURCES)} or folder:PATH")
    source = SOURCES[name]
    step = source.get.format(name=name)
    try:
        images = source.load(root(), name, download and source.downloads)
        return replace(images, allow_unreadable=allow_unreadable) if isinstance(images, FolderSet) else images
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error} (data root {root()}; CADET_DATA names another); to get it, {step}") from error
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
    if isinstance(images, FolderSet):
        raise ValueError(f"data: found {images.name}:{shift}, expected a set of one image size: corruptions are made in memory")
    made = corruptions.corrupt(images.images, kind, int(severity))
    return replace(images, name=f"{images.name}:{shift}", images=made)


def _tried(names: Sequence[str], allow_unreadable: int = 0) -> dict[str, ImageSet | FileNotFoundError]:
    found: dict[str, ImageSet | FileNotFoundError] = {}
    for name in names:
        try:
            found[name] = load(name, allow_unreadable=allow_unreadable)
        except FileNotFoundError as error:
            found[name] = error
    return found


def size_of(images: ImageSet) -> str:
    """The size of a set's images in words; "any" for files that are not read yet.

    >>> size_of(load("digits"))
    '8 x 8'
    """
    return "any" if isinstance(images, FolderSet) else f"{images.images.shape[-1]} x {images.images.shape[-2]}"


def available(names: Sequence[str], allow_unreadable: int = 0) -> tuple[list[ImageSet], dict[str, str]]:
    """The sets that are there, and for each that is not the reason why: its row is left out, never filled by another.

    The reasons go into results, and so name the data root as <data root> and not by its place.

    >>> found, reasons = available(["digits"])
    >>> [images.name for images in found], reasons
    (['digits'], {})
    """
    tried = _tried(names, allow_unreadable)
    reasons = {k: str(v).replace(str(root()), "<data root>") for k, v in tried.items() if isinstance(v, FileNotFoundError)}
    return [found for found in tried.values() if isinstance(found, ImageSet)], reasons


def missing(names: Sequence[str]) -> list[str]:
    """For each of the sets that is not there, one line that says so, where it was looked for, and what to do.

    >>> missing(["digits"])  # scikit-learn carries it
    []
    """
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


def _state(error: Exception) -> str:
    return "MISSING" if isinstance(error, FileNotFoundError) else "NOT RIGHT"


def check_profile(profile: str, download: bool = False) -> bool:
    """Print one table of all sets that a profile's parameters name, and how to get what is missing; True when all are there.

    Sets of files are counted and not read. `download`: first bring those that can be.

    >>> check_profile("digits")  # doctest: +ELLIPSIS
    sets of the profile digits below ..., the data root (CADET_DATA):
    <BLANKLINE>
    ...
    True
    """
    rows, steps = [], []
    for name, notebooks in imagenet.sets_of(profile).items():
        expected = imagenet.SETS.get(name.partition(":")[0])
        try:
            state, n = "there", str(len(load(name, download)))
        except (FileNotFoundError, ValueError) as error:
            state, n = _state(error), "-"
            steps.append(f"{error}" + (f"\n  checksum: {expected.checksum}" if expected else ""))
        counts = (n, str(expected.n_images) if expected else "", str(expected.n_classes or "") if expected else "")
        rows.append((name, state, *counts, " ".join(notebooks)))
    print(f"sets of the profile {profile} below {root()}, the data root (CADET_DATA):\n")
    print(imagenet.table(("set", "state", "images", "expected", "classes", "notebooks"), rows))
    for step in steps:
        print(f"\n{step}")
    return not steps


def main(arguments: Sequence[str]) -> int:
    """The command line of this module; 0 when every named set is there."""
    if not arguments or arguments[0] not in ("check", "download"):
        names = f"names: {' '.join(SOURCES)}; or a profile: {' '.join(imagenet.profiles())}"
        print(f"usage: python -m cadetlib.data check|download [NAME ...]   {names}", file=sys.stderr)
        return 2
    complete = True
    for name in arguments[1:] or list(SOURCES):
        if name not in SOURCES and name in imagenet.profiles():
            complete &= check_profile(name, arguments[0] == "download")
            continue
        try:
            print(f"{name:20} {len(load(name, arguments[0] == 'download'))} images")
        except (FileNotFoundError, ValueError) as error:
            complete = False
            print(f"{name:20} {_state(error)}: {error}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
