"""Training images that do not fit in memory: decoded by other processes while the device computes.

A worker cuts a step's random crops out of the original image and sends them as uint8; flip, colours and blur follow on the
device, batched (`TrainViews.after_crop`). Crop and all else are the same function of (seed, image, view) as for images in
memory, and the steps' images come in the same order, so that a run can stop and go on anywhere. Knows nothing of encoders.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from cadetlib import data, image_files, losses
from cadetlib.views import TrainViews

_LAST_SECONDS = 20  # of a worker that is told to end; torchrun gives its processes 30
RECORD = "files.json"  # in a run's folder: which files it reads
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
Share = tuple[int, Tensor]  # epoch and the images (n,) of one step on one process


def shares(n_images: int, batch_size: int, seed: int, first: int, last: int, rank: int = 0, world: int = 1) -> Iterator[Share]:
    """The steps first .. last - 1 of a run: their epoch, and which images of the batch are this process's.

    An order per epoch, the same on every process, cut into whole batches and these into equal ranges; nothing comes twice.

    >>> [(epoch, len(index)) for epoch, index in shares(5, 2, seed=0, first=1, last=4)]
    [(0, 2), (1, 2), (1, 2)]
    """
    steps_per_epoch, share = n_images // batch_size, batch_size // world
    if not steps_per_epoch:
        raise ValueError(f"batch_size: found {batch_size} with {n_images} images, expected at most one batch an epoch")
    order, order_epoch = torch.empty(0), -1
    for step in range(first, last):
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != order_epoch:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order, order_epoch = torch.randperm(n_images, generator=generator), epoch
        begin = position * batch_size + rank * share
        yield epoch, order[begin : begin + share]


def view_numbers(epoch: int, n_views: int) -> list[int]:
    """The numbers of an epoch's views, one or two of each image: no view comes in two epochs.

    >>> view_numbers(epoch=3, n_views=2)
    [6, 7]
    """
    return [2 * epoch + i for i in range(n_views)]


# --- one image ----------------------------------------------------------------------------------------------------------


def _upright_size(opened: Image.Image) -> tuple[int, int]:
    """Height and width of an image as it is to be looked at, from its file's header alone."""
    width, height = opened.size
    return (width, height) if opened.getexif().get(0x0112) in _SIDEWAYS else (height, width)


def read_crops(path: Path, boxes: Callable[[int, int], Tensor], size: int) -> Tensor:
    """Crops of one image file, resized to `size`, antialiased as Pillow and torchvision do -> (V, 3, size, size) uint8.

    boxes: (height, width) of the image -> (V, 4) top, left, height, width. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size
    when every crop still has `size` pixels then, which takes a fraction of the time. ValueError for a damaged file.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "red.png"
    >>> Image.new("RGB", (40, 20), "red").save(file)
    >>> read_crops(file, lambda height, width: torch.tensor([[0, 0, height, width]]), size=8)[0, :, 0, 0]
    tensor([255,   0,   0], dtype=torch.uint8)
    """
    with image_files.opened_image(path) as opened:
        height, width = _upright_size(opened)
        found = boxes(height, width)
        smallest = int(found[:, 2:].amin())
        divisor = next((d for d in (8, 4, 2) if d * size <= smallest), 1)
        whole = opened.size[0]
        drafted = opened.draft(None, (opened.size[0] // divisor, opened.size[1] // divisor))  # None: no JPEG
        scale = drafted[1][2] / whole if drafted else 1.0
        image = image_files.upright_rgb(opened)
        crops = [_crop(image, [scale * value for value in box], size) for box in found.tolist()]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def _crop(image: Image.Image, box: Iterable[float], size: int) -> np.ndarray:
    """The part of an image as (size, size, 3): first cut out, so that nothing beyond its border is mixed in."""
    top, left, height, width = box
    x, y = math.floor(left), math.floor(top)
    part = image.crop((x, y, min(image.size[0], math.ceil(left + width)), min(image.size[1], math.ceil(top + height))))
    inside = (left - x, top - y, min(part.size[0], left - x + width), min(part.size[1], top - y + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR, box=inside))


# --- all images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crops(Dataset[tuple[int, int, Tensor]]):
    """(epoch, index) -> that image's index, label and crops (V, 3, S, S) uint8, as TrainViews draws them.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (40, 20), "red").save(folder / "red.png")
    >>> index, label, pixels = Crops(data.folder_set(folder), TrainViews(8), n_views=2)[0, 0]
    >>> pixels.shape
    torch.Size([2, 3, 8, 8])
    """

    images: data.FolderSet
    views: TrainViews
    n_views: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int, Tensor]:
        epoch, index = key
        numbers = view_numbers(epoch, self.n_views)

        def boxes(height: int, width: int) -> Tensor:
            return self.views.boxes(torch.tensor([index]), numbers, height, width)[0]

        label = 0 if self.images.labels is None else int(self.images.labels[index])
        return index, label, read_crops(self.images.path(index), boxes, self.views.image_size)


@dataclass(frozen=True)
class _Steps:
    """A batch sampler over all steps that are left, not over one epoch: workers never stop to wait for the next."""

    of: tuple[int, int, int]  # n_images, batch_size, seed
    first: int
    last: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, index in shares(*self.of, self.first, self.last, self.rank, self.world):
            yield [(epoch, i) for i in index.tolist()]

    def __len__(self) -> int:
        return self.last - self.first


def batches(
    crops: Crops, batch_size: int, seed: int, first: int, last: int, device: torch.device, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Crops (n, V, 3, S, S) float in [0, 1], labels (n,) and image numbers (n,) of the steps first .. last - 1, on `device`.

    `workers` processes decode, 0: as many as there are cores for this one. Each is two steps ahead.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for i in range(4):
    ...     Image.new("RGB", (40, 20), (i, i, i)).save(folder / f"{i}.png")
    >>> crops = Crops(data.folder_set(folder), TrainViews(8), n_views=2)
    >>> [x.shape for x, _, _ in batches(crops, batch_size=2, seed=0, first=0, last=2, device=torch.device("cpu"), workers=1)]
    [torch.Size([2, 2, 3, 8, 8]), torch.Size([2, 2, 3, 8, 8])]
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if losses.is_distributed() else (0, 1)
    loader = _loader(
        crops,
        workers or _own_cores(),
        batch_sampler=_Steps((len(crops.images), batch_size, seed), first, last, rank, world),
        pin_memory=device.type == "cuda",
    )
    for index, label, pixels in loader:
        moved = pixels.to(device, non_blocking=True)
        yield moved.float() / 255, label.to(device, non_blocking=True), index.to(device, non_blocking=True)


def _loader(dataset: Dataset[Any], workers: int, **settings: Any) -> DataLoader[Any]:
    # Its own generator: the loader would draw a seed, which nothing here uses, from the global one.
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        dataset, num_workers=workers, worker_init_fn=_outlive_signals, generator=generator, prefetch_factor=2, **settings
    )


def _outlive_signals(_: int) -> None:
    """Signals that end a job reach its whole group: a worker goes on for a while, since the training process saves first.

    Not for ever: a process that ends by an error terminates the workers it still has, and waits for them.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_LAST_SECONDS))  # SIGALRM ends it


def _own_cores() -> int:
    """How many cores there are for this process, among those that torchrun started on this machine."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if distributed.is_torchelastic_launched() else 1
    return max(1, len(os.sched_getaffinity(0)) // beside)


# --- unreadable files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Errors(Dataset[str]):
    """index -> what is wrong with that image file; empty when it can be decoded."""

    images: data.FolderSet

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        try:
            with image_files.opened_image(self.images.path(index)) as opened:
                opened.draft(None, (1, 1))  # a JPEG's every byte is read all the same
                image_files.upright_rgb(opened)
        except ValueError as error:
            return str(error)
        return ""


def _unreadable(images: data.FolderSet, workers: int = 0, say: Callable[[str], None] = print) -> dict[str, str]:
    """File -> what is wrong with it, for all images that cannot be decoded. Each of several processes looks at its range."""
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if losses.is_distributed() else (0, 1)
    first, last = (len(images) * i // world for i in (rank, rank + 1))
    own, done = images[first:last], 0
    found: dict[str, str] = {}
    say(f"decoding {len(images)} image files once, to find what cannot be read")
    for errors in _loader(_Errors(own), workers or _own_cores(), batch_size=64, collate_fn=list):
        found |= {os.fsdecode(own.files[done + i]): error for i, error in enumerate(errors) if error}
        if done * 10 // len(own) != (done := done + len(errors)) * 10 // len(own):
            say(f"  {done * 100 // len(own)} % of this process's files decoded, {len(found)} unreadable")
    parts: list[dict[str, str]] = [found]
    if losses.is_distributed():
        parts = [{} for _ in range(world)]
        distributed.all_gather_object(parts, found)
    return {file: error for part in parts for file, error in part.items()}


def digest(images: data.FolderSet) -> str:
    """sha256 of the names of a set's files.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (4, 4)).save(folder / "a.png")
    >>> digest(data.folder_set(folder)) == hashlib.sha256(b"a.png").hexdigest()
    True
    """
    return hashlib.sha256(b"\n".join(images.files.tolist())).hexdigest()


def readable(
    images: data.FolderSet, folder: Path, allow: int = 0, workers: int = 0, say: Callable[[str], None] = print
) -> data.FolderSet:
    """The images of a run without those that cannot be decoded, of which `allow` are put up with.

    Looked for once: what is left out stands in RECORD of the run's folder, so that a run which goes on reads the same images.
    ValueError lists the unreadable files when there are more than allowed, and refuses other files than the run began with.

    >>> import tempfile
    >>> images, run = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (4, 4)).save(images / "a.png")
    >>> _ = (images / "b.png").write_text("no image")
    >>> len(readable(data.folder_set(images), run, allow=1, workers=1, say=lambda line: None))
    1
    """
    names, record = digest(images), _recorded(folder)
    every = [(names, record)]
    if losses.is_distributed():
        every = every * distributed.get_world_size()
        distributed.all_gather_object(every, (names, record))
    if any(other != names for other, _ in every):
        raise ValueError(f"{images.name}: found other files below {images.folder} on some processes, expected the same on all")
    record = every[0][1]  # the first process's, whose checkpoints count too
    if record is not None and record["files"] != names:
        raise ValueError(
            f"{images.name}: found other files below {images.folder} than this run began with, expected the same: "
            "put them back, or choose another output folder"
        )
    left_out: dict[str, str] = _unreadable(images, workers, say) if record is None else record["left_out"]
    _refuse(images.name, left_out, allow, folder / RECORD if record else None)
    if record is None and (not losses.is_distributed() or distributed.get_rank() == 0):
        _write(folder / RECORD, dict(files=names, left_out=left_out))
    for file, error in left_out.items():
        say(f"LEFT OUT {file}: {error}")
    gone = np.isin(images.files, np.array([os.fsencode(file) for file in left_out], dtype=images.files.dtype))
    return images[torch.from_numpy(~gone)]


def _recorded(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    return json.loads(path.read_text()) if path.is_file() else None


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def _refuse(name: str, left_out: dict[str, str], allow: int, record: Path | None) -> None:
    if len(left_out) > allow:
        again = f"; remove {record} to look at the files again" if record else ""
        raise ValueError(data.too_many_unreadable(name, list(left_out.values()), allow, again))
