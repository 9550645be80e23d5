"""Image files: those below a folder, in an order of their own, and each decoded, upright, in 8-bit RGB.

What is damaged, no image, or of a kind whose white nobody knows is a ValueError with the file's name, never a wrong pixel.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cadetlib.views import resize_to

if TYPE_CHECKING:
    import PIL.Image

KINDS = ".png, .jpg or another ending of images that Pillow reads"
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")  # what Pillow reads from these as 32-bit integers, mode I, has 16 bits
_TURNS = {  # the EXIF orientation of an image -> what puts it upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_LONGEST = 64  # times its shorter side: of a longer image the middle is looked at
_NO_DECODER = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows their names and cannot read them by itself


@functools.cache
def suffixes() -> frozenset[str]:
    """The endings of the files that Pillow reads, in lower case.

    >>> {".png", ".jpeg", ".tif", ".webp", ".jp2"} <= suffixes(), ".mp4" in suffixes()
    (True, False)
    """
    from PIL import Image

    Image.init()
    readable = set(Image.OPEN) - _NO_DECODER
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in readable)


def is_image(path: str) -> bool:
    """Whether a file's name ends as that of an image; hidden files, as macOS leaves beside each file, do not count.

    >>> [is_image(path) for path in ("cats/1.JPG", "cats/._1.JPG", "cats/notes.txt")]
    [True, False, False]
    """
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes()


def files_below(folder: str | Path, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Paths, from `folder` on, of all files below it, sorted folder by folder: the same order on every machine.

    Links to folders are followed, but not in a circle. `inside` and `above` are for its own use: where it is, and the folders
    (device, inode) on the way there. FileNotFoundError when there is no such folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for path in ("b.png", "a/2.png", "a/10.png"):
    ...         Path(folder, path).parent.mkdir(exist_ok=True)
    ...         Path(folder, path).touch()
    ...     list(files_below(folder))
    ['a/10.png', 'a/2.png', 'b.png']
    """
    if not above and not os.path.isdir(folder):
        raise FileNotFoundError(f"found no folder {folder}, expected one with images, in sub-folders or not")
    place = os.stat(folder)
    here = (place.st_dev, place.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        found = sorted((entry.name, _is_folder(entry)) for entry in entries)
    for name, is_folder in found:
        if is_folder:
            yield from files_below(os.path.join(folder, name), f"{inside}{name}/", above | {here})
        else:
            yield inside + name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A link that leads nowhere, in a circle or where nobody may look is a file, of which reading says what is wrong."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def images_below(folder: str | Path) -> Iterator[str]:
    """Those of `files_below` that are images by their names.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("b.png", "a.jpg", "notes.txt"):
    ...         Path(folder, name).touch()
    ...     list(images_below(folder))
    ['a.jpg', 'b.png']
    """
    return (path for path in files_below(folder) if is_image(path))


@contextmanager
def opened_image(path: Path) -> Iterator[PIL.Image.Image]:
    """An image file, opened and not yet decoded; ValueError when it turns out to be damaged or no image.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as file, opened_image(Path(file.name)) as opened:
    ...     opened.size  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...: found no readable image ...
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            yield opened
    except Exception as error:  # of a damaged file Pillow says anything, from struct.error to DecompressionBombError
        raise ValueError(
            f"{path}: found no readable image ({error}), expected a whole image file; replace or remove it"
        ) from error


def upright_rgb(opened: PIL.Image.Image) -> PIL.Image.Image:
    """The image decoded: turned as its EXIF tells, RGB, 16-bit greys scaled to 8 bits.

    ValueError for 32 bits, whose white may be anything.

    >>> from PIL import Image
    >>> upright_rgb(Image.new("I;16", (1, 1), 514)).getpixel((0, 0))  # 514 of 65,535 is 2 of 255
    (2, 2, 2)
    """
    from PIL import ExifTags, Image

    if opened.mode == "F" or (opened.mode == "I" and opened.format not in _SIXTEEN_BITS):
        raise ValueError(f"found 32-bit pixels ({opened.format}, mode {opened.mode}), expected 8 or 16 bits: convert it")
    # Not ImageOps.exif_transpose, which also writes the rest of the EXIF anew and fails where a camera wrote it wrongly.
    turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    upright = opened.transpose(Image.Transpose[turn]) if turn else opened
    if upright.mode.startswith("I"):
        upright = Image.fromarray((np.asarray(upright, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    return upright.convert("RGB")


def read_image(path: Path, size: int) -> Tensor:
    """One image file as (3, size, size) uint8: upright, RGB, 16-bit greys scaled; shorter side resized, centre crop.

    ValueError for a file that is damaged or no image.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
    ...     Image.new("L", (60, 40), 255).save(file.name)
    ...     image = read_image(Path(file.name), size=32)
    >>> image.shape, image.unique().tolist()
    (torch.Size([3, 32, 32]), [255])
    """
    with opened_image(path) as opened:
        image = upright_rgb(opened)
    width, height = image.size
    most = _LONGEST * min(width, height)
    if max(width, height) > most:  # brought to size as a whole, a line of 10,000 pixels would take gigabytes
        left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
        image = image.crop((left, top, left + min(width, most), top + min(height, most)))
    return (resize_to(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], size)[0] * 255).round().to(torch.uint8)
