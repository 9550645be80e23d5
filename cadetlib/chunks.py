"""A folder's images, a chunk at a time: decoded by threads while the encoder works on the chunk before, and what CADet says.

What `score` and `ray_score` have in common.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from cadetlib import cadet, embed, image_files
from cadetlib.cadet import CADet

_CHUNK = 256  # images held at a time, about
_SILENT = 2.0  # seconds of looking for images before it is said how far one is


class Listing(NamedTuple):
    """What is below a folder: see `listing`.

    >>> found = Listing(10, Counter({".txt": 2}), "digest of ten paths")
    >>> found.n_images, found.others[".txt"]
    (10, 2)
    """

    n_images: int
    others: Counter[str]  # files that are no images, by their ending
    digest: str  # sha256 of the images' paths, in their order: other files, another digest


def listing(folder: str | Path) -> Listing:
    """Count what is below a folder, without reading it; FileNotFoundError without an image. Says how far it is after a while.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("1.png", "2.png", "notes.txt"):
    ...         Path(folder, name).touch()
    ...     found = listing(folder)
    >>> found.n_images, found.others
    (2, Counter({'.txt': 1}))
    """
    n_images, others, digest = 0, Counter[str](), hashlib.sha256()
    every = image_files.files_below(folder)
    for path in tqdm(every, "looking for images", unit=" files", delay=_SILENT, leave=False, file=sys.stderr, dynamic_ncols=True):
        if image_files.is_image(path):
            n_images += 1
            digest.update(os.fsencode(path) + b"\0")
        else:
            others[os.path.splitext(path)[1].lower() or os.path.basename(path)] += 1
    if not n_images:
        raise FileNotFoundError(f"found no image below {folder}, expected files ending in {image_files.KINDS}")
    return Listing(n_images, others, digest.hexdigest())


class Decoded(NamedTuple):
    """One file: its path from the folder on, and its image (3, S, S) uint8 or the reason why there is none.

    >>> Decoded("cat.jpg", None, "found no readable image").error
    'found no readable image'
    """

    path: str
    image: Tensor | None
    error: str = ""


def decode(folder: str | Path, path: str, size: int) -> Decoded:
    """One image file, read and resized. Whatever a decoder says of a damaged file becomes the file's error.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "cut.png").write_bytes(b"PNG")
    ...     found = decode(folder, "cut.png", size=32)
    >>> found.image is None, found.error.partition(" (")[0]
    (True, 'found no readable image')
    """
    try:
        return Decoded(path, image_files.read_image(Path(folder, path), size))
    except Exception as error:  # decoders raise anything, from struct.error to DecompressionBombError
        reason = str(error).replace(f"{Path(folder, path)}: ", "").replace(f"{folder}{os.sep}", "")
        return Decoded(path, None, reason or type(error).__name__)


def chunks_of(folder: str | Path, paths: Iterable[str], size: int, chunk: int, workers: int) -> Iterator[list[Decoded]]:
    """The files decoded by `workers` threads, `chunk` at a time; the next chunk is read while this one is used.

    >>> chunks = chunks_of("nowhere", ["1.png", "2.png", "3.png"], size=32, chunk=2, workers=1)
    >>> [[item.path for item in chunk] for chunk in chunks]
    [['1.png', '2.png'], ['3.png']]
    """
    paths = iter(paths)
    with ThreadPoolExecutor(workers) as pool:

        def ask() -> list[Any]:
            return [pool.submit(decode, folder, path, size) for path in islice(paths, chunk)]

        pending = ask()
        while pending:
            following = ask()
            yield [future.result() for future in pending]
            pending = following


def images_per_step(detector: CADet) -> int:
    """How many images' views fill one forward pass.

    >>> images_per_step(CADet(torch.nn.Flatten(), n_views=50, image_size=8, batch_size=1024))
    20
    """
    return max(1, detector.batch_size // detector.n_views)


def images_per_chunk(detector: CADet) -> int:
    """How many images are held at a time: about 256, in whole forward passes.

    >>> images_per_chunk(CADet(torch.nn.Flatten(), n_views=50, image_size=8, batch_size=1024))
    240
    """
    step = images_per_step(detector)
    return step * max(1, _CHUNK // step)


def view_sums(detector: CADet, images: Tensor) -> embed.ViewSums:
    """The view sums of images (N, 3, S, S), each forward pass filled up to the same size.

    Convolutions round differently in batches of different sizes: filled up, an image's score is the same to the last bit,
    whichever files it is read with.

    >>> from torch import nn
    >>> detector, images = CADet(nn.Flatten(), n_views=4, image_size=8), torch.rand(3, 3, 8, 8)
    >>> alone, together = view_sums(detector, images[:1]), view_sums(detector, images)
    >>> torch.equal(alone.means[0], together.means[0])
    True
    """
    lacking = -len(images) % images_per_step(detector)
    filled = torch.cat([images, images[:1].expand(lacking, -1, -1, -1)]) if lacking else images
    return detector.view_sums(filled)[: len(images)]


def sums_of_chunk(
    detector: CADet, chunk: Sequence[Decoded], none_before: bool = False
) -> tuple[list[Decoded], embed.ViewSums | None]:
    """The chunk with its errors, and the view sums of the images without one, in their order; None where all have one.

    An image that the encoder has no finite features for gets an error of its own. `none_before`: no image had features yet, so
    that it is the encoder which is wrong when it has none for any of several: ValueError.

    >>> from torch import nn
    >>> detector = CADet(nn.Flatten(), n_views=4, image_size=8)
    >>> chunk = [Decoded("1.png", torch.rand(3, 8, 8)), Decoded("2.png", torch.zeros(3, 8, 8))]
    >>> chunk, sums = sums_of_chunk(detector, chunk)  # nn.Flatten sees no direction in black
    >>> len(sums), chunk[1].error.partition(", ")[0]
    (1, "encoder's features: found a zero vector")
    """
    good = [item.image for item in chunk if item.image is not None]
    if not good:
        return list(chunk), None
    try:
        return list(chunk), view_sums(detector, torch.stack(good))
    except ValueError:
        tried = [_alone(detector, item) for item in chunk]
        parts = [sums for _, sums in tried if sums is not None]
        if none_before and len(good) > 1 and not parts:
            raise
        return [item for item, _ in tried], embed.concatenate(parts) if parts else None


def _alone(detector: CADet, item: Decoded) -> tuple[Decoded, embed.ViewSums | None]:
    if item.image is None:
        return item, None
    try:
        return item, view_sums(detector, item.image[None])
    except ValueError as error:
        return Decoded(item.path, None, str(error)), None


def progress(total: int, what: str) -> Any:
    """A bar on stderr that counts images.

    >>> with progress(2, "score") as bar:
    ...     _ = bar.update(2)
    """
    return tqdm(total=total, desc=what, unit="image", file=sys.stderr, dynamic_ncols=True)


def rows_of_chunk(detector: CADet, chunk: Sequence[Decoded], threshold: float, none_before: bool = False) -> list[list[str]]:
    """A line for each file of a chunk, in its order: numbers with every digit, and an error where there are none.

    `none_before`: as in `sums_of_chunk`.

    >>> from torch import nn
    >>> detector = CADet(nn.Flatten(), n_views=4, image_size=8).fit(torch.rand(9, 3, 8, 8), torch.rand(9, 3, 8, 8))
    >>> chunk = [Decoded("1.png", torch.rand(3, 8, 8)), Decoded("2.png", None, "found no readable image")]
    >>> good, bad = rows_of_chunk(detector, chunk, threshold=0.1)
    >>> float(good[4]) in [i / 10 for i in range(1, 11)]  # nine calibration images, so ten p-values are possible
    True
    >>> bad
    ['2.png', '', '', '', '', '', 'found no readable image']
    """
    chunk, sums = sums_of_chunk(detector, chunk, none_before)
    numbers: Iterator[tuple[float, ...]] = iter(())
    if sums is not None:
        m_in, m_out = detector.similarities_of_sums(sums)
        scores = m_in + detector.gamma_ * m_out
        p_values = cadet.p_values(detector.calibration_scores_, scores, detector.ties)
        numbers = zip(*(values.tolist() for values in (scores, m_in, m_out, p_values)), strict=True)
    rows = []
    for item in chunk:
        values = next(numbers) if not item.error else None
        fields = [*map(repr, values), str(values[3] <= threshold)] if values else [""] * 5
        rows.append([item.path, *fields, item.error])
    return rows
