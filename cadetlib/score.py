"""p-values for folders of images, from the command line; in constant memory, with a line for every file.

    python -m cadetlib.score fit --encoder torchvision:resnet50 --reference DIR --calibration DIR --out detector.safetensors
    python -m cadetlib.score score --detector detector.safetensors --images DIR --out p_values.csv --alpha 0.05 [--gpus 0,1]

Images are read a chunk at a time by a few threads while the encoder works on the chunk before. The table grows chunk by chunk,
and the same command goes on where an earlier one was stopped. Exit codes: 0 all files scored; 3 some could not be (each has
its line, with the reason); 1 wrong input, or a process of several failed; 2 wrong arguments; 130 stopped by the user.

Several processes: --gpus 0,1 (or --parts N, without GPUs) starts one each and merges their tables. Machines that share a file
system run the same line with --part I/N, and then one of them with --merge N. As an image's score depends on its pixels alone,
the table is that of a single process, byte for byte where they compute alike: on GPUs of one kind, or CPUs with as many threads.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import heapq
import html
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cadetlib import cadet, checks, data, embed, encoders, foreign, processes, record, thresholds
from cadetlib.cadet import CADet
from cadetlib.data import files_below, images_below, is_image

COLUMNS = ("path", "score", "m_in", "m_out", "p_value", "flagged", "error")
SOME_FAILED = 3
RETRY = "when they can be read: the same command with --retry, in a single process"
_FORMAT = "cadetlib.p_values"
_CHUNK = 256  # images held at a time, about


# --- files --------------------------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """What is below a folder: see `listing`.

    >>> found = Listing(10, Counter({".txt": 2}), "digest of ten paths")
    >>> [Part(i, 4).span(found.n_images) for i in (1, 4)]  # the first and the last of four processes
    [(0, 2), (7, 10)]
    """

    n_images: int
    others: Counter[str]  # files that are no images, by their ending
    digest: str  # sha256 of the images' paths, in their order: other files, another digest


def listing(folder: str | Path) -> Listing:
    """Count what is below a folder, without reading it; FileNotFoundError without an image.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("1.png", "2.png", "notes.txt"):
    ...         Path(folder, name).touch()
    ...     found = listing(folder)
    >>> found.n_images, found.others
    (2, Counter({'.txt': 1}))
    """
    n_images, others, digest = 0, Counter[str](), hashlib.sha256()
    for path in files_below(folder):
        if is_image(path):
            n_images += 1
            digest.update(os.fsencode(path) + b"\0")
        else:
            others[os.path.splitext(path)[1].lower() or os.path.basename(path)] += 1
    if not n_images:
        raise FileNotFoundError(f"found no image below {folder}, expected files ending in {data.KINDS}")
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
        return Decoded(path, data.read_image(Path(folder, path), size))
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


# --- images -> similarities ---------------------------------------------------------------------------------------------


def _images_per_step(detector: CADet) -> int:
    """How many images' views fill one forward pass."""
    return max(1, detector.batch_size // detector.n_views)


def _images_per_chunk(detector: CADet) -> int:
    """About _CHUNK images, in whole forward passes."""
    step = _images_per_step(detector)
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
    lacking = -len(images) % _images_per_step(detector)
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


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, desc=what, unit="image", file=sys.stderr, dynamic_ncols=True)


# --- fit ----------------------------------------------------------------------------------------------------------------


def _each_chunk(detector: CADet, folder: Path, what: str, workers: int, failed: list[Decoded]) -> Iterator[embed.ViewSums]:
    none_yet = True
    with _bar(listing(folder).n_images, what) as bar:
        for chunk in chunks_of(folder, images_below(folder), detector.image_size, _images_per_chunk(detector), workers):
            found, sums = sums_of_chunk(detector, chunk, none_yet)
            failed += [Decoded(f"{folder}/{item.path}", None, item.error) for item in found if item.error]
            if sums is not None:
                none_yet = False
                yield sums
            bar.update(len(chunk))


def fit_folders(detector: CADet, reference: str | Path, calibration: str | Path, workers: int = 2) -> list[Decoded]:
    """Algorithm 2 on two folders, whatever their size -> the files that could not be read, left out.

    The images of one must not be in the other: X_val(2) stands for images that mu has not seen. ValueError for one folder twice
    or inside the other.

    >>> from torch import nn
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     for part, seed in (("reference", 1), ("calibration", 2)):
    ...         Path(home, part).mkdir()
    ...         for i, pixels in enumerate(np.random.default_rng(seed).integers(256, size=(9, 8, 8, 3), dtype=np.uint8)):
    ...             Image.fromarray(pixels).save(Path(home, part, f"{i}.png"))
    ...     detector = CADet(nn.Flatten(), n_views=4, image_size=8)
    ...     failed = fit_folders(detector, Path(home, "reference"), Path(home, "calibration"))
    >>> len(failed), len(detector.calibration_scores_)
    (0, 9)
    """
    places = [Path(folder).resolve() for folder in (reference, calibration)]
    if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
        raise ValueError(
            f"found the reference images {reference} and the calibration images {calibration}, one folder within the other, "
            "expected two folders without a common image"
        )
    failed: list[Decoded] = []
    total, n = torch.zeros(()), 0
    for sums in _each_chunk(detector, Path(reference), "reference", workers, failed):
        total, n = total + sums.at(detector.n_views)[1].double().sum(dim=0), n + len(sums)
    if not n:
        raise ValueError(f"found no readable image below {reference}, expected a few hundred")
    parts = []
    for sums in _each_chunk(detector, Path(calibration), "calibration", workers, failed):
        m_in, means = sums.at(detector.n_views)
        parts.append((m_in, cadet.out_similarity(means, total / n)))
    if not parts:
        raise ValueError(f"found no readable image below {calibration}, expected a few hundred")
    detector.fit_similarities(total / n, *(torch.cat(values) for values in zip(*parts, strict=True)))
    return failed


# --- the table of p-values ----------------------------------------------------------------------------------------------


def line(fields: Sequence[str]) -> bytes:
    """One line of the table; fields with commas, quotes or line ends are quoted (RFC 4180).

    >>> line(["a,b.png", "0.5"])
    b'"a,b.png",0.5\\n'
    """
    quoted = ['"' + field.replace('"', '""') + '"' if re.search('[",\r\n]', field) else field for field in fields]
    return (",".join(quoted) + "\n").encode("utf-8", "surrogateescape")


def lines_of(path: str | Path) -> Iterator[tuple[dict[str, str], int]]:
    """The whole lines of a table, each with the position where it ends; a last line that was cut short is left out.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(line(COLUMNS) + line(["1.png", "1.5", "0.9", "0.8", "0.25", "False", ""]) + b"2.png,1.4")
    ...     file.flush()
    ...     [(row["path"], end) for row, end in lines_of(file.name)]
    [('path', 44), ('1.png', 74)]
    """
    with open(path, "rb") as file:
        kept = b""
        for part in file:
            kept += part
            if kept.count(b'"') % 2 == 0 and kept.endswith(b"\n"):  # else the line end belongs to a file's name
                fields = next(csv.reader([kept.decode("utf-8", "surrogateescape")]))
                if len(fields) != len(COLUMNS):
                    raise ValueError(f"{path}: found a line of {len(fields)} fields, expected {len(COLUMNS)}: {kept[:80]!r}")
                yield dict(zip(COLUMNS, fields, strict=True)), file.tell()
                kept = b""


class Settings(NamedTuple):
    """What the lines of one table have in common; kept beside it, so that another command's table is told from this one's.

    >>> whole = Settings("detector's fingerprint", 0.05, "folder's digest")
    >>> sorted(whole.stated())
    ['detector', 'folder', 'format', 'threshold']
    >>> whole.of_part(Part(2, 8), "listing's digest").stated()["part"]
    '2/8'
    """

    detector: str  # fingerprint
    threshold: float
    folder: str  # sha256 of the images' place
    listing: str = ""  # of a part: sha256 of the paths of all images of the folder
    part: str = ""  # of a part: which one

    def of_part(self, part: Part, listing: str) -> Settings:
        """The same for one part of the folder."""
        return self._replace(listing=listing, part=str(part))

    def stated(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": _FORMAT} | {key: value for key, value in self._asdict().items() if value != ""}

    def file(self, table: Path) -> Path:
        """Where it is written."""
        return table.with_name(f"{table.name}.settings.json")

    def write(self, table: Path) -> None:
        """Write it beside a table."""
        record.write_atomically(self.file(table), json.dumps(self.stated(), indent=2) + "\n")

    def differing(self, table: Path) -> list[str]:
        """What is written otherwise beside a table; everything when nothing is."""
        found = {}
        with suppress(OSError, ValueError):
            found = json.loads(self.file(table).read_text())
        return [key for key, value in self.stated().items() if found.get(key) != value]


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big")


def _holds_something(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _held(path: Path) -> IO[bytes]:
    """A table opened to append, and locked until it is closed; ValueError when another process writes it.

    Each of the two would add every row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab")
    if not processes.locks(file) or os.fstat(file.fileno()).st_ino != os.stat(path).st_ino:  # or it was replaced meanwhile
        file.close()
        raise ValueError(f"{path}: found another process at work on it, expected none; wait for it or end it")
    return file


class Table:
    """The CSV file that grows: begun, or taken up again where an earlier run was stopped. Eight bytes a file are kept in memory.

    ValueError for a file that another detector, threshold or folder of images, or something else altogether, has written.

    >>> import tempfile
    >>> settings = Settings("detector's fingerprint", 0.05, "folder's digest")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Table(Path(folder, "p.csv"), settings).append([["1.png", "1.5", "0.9", "0.8", "0.25", "False", ""]])
    ...     again = Table(Path(folder, "p.csv"), settings)
    >>> again.has("1.png"), again.has("2.png")
    (True, False)
    """

    def __init__(self, path: str | Path, settings: Settings) -> None:
        self.path = Path(path)
        self.done = np.empty(0, np.uint64)
        self.file = _held(self.path)
        if _holds_something(self.path):
            other = settings.differing(self.path)
            if other:
                raise ValueError(
                    f"{self.path}: found a file of another {', '.join(other)}, expected an unfinished table of this very "
                    "command; choose another --out, or remove it"
                )
            self._take_up()
        else:
            settings.write(self.path)
            self._write([COLUMNS])

    def _take_up(self) -> None:
        end, hashes = 0, array("Q")
        for number, (row, position) in enumerate(lines_of(self.path)):
            if number == 0 and tuple(row.values()) != COLUMNS:
                raise ValueError(f"{self.path}: found the columns {list(row.values())}, expected {list(COLUMNS)}")
            if number:
                hashes.append(_hash(row["path"]))
            end = position
        os.truncate(self.path, end)
        self.done = np.sort(np.array(hashes, np.uint64))
        if not end:
            self._write([COLUMNS])

    def has(self, path: str) -> bool:
        """Whether the file has its line from an earlier run."""
        value = np.uint64(_hash(path))
        at = np.searchsorted(self.done, value)
        return bool(at < len(self.done) and self.done[at] == value)

    def append(self, rows: Iterable[Sequence[str]]) -> None:
        """Write lines, and wait until they are on the disk."""
        self._write(rows)

    def replace(self, lines: Iterable[bytes]) -> None:
        """Write all lines anew, at once or not at all."""
        temporary = self.path.with_name(f".{self.path.name}.replacing")
        temporary.unlink(missing_ok=True)
        file = _held(temporary)
        try:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(self.path)
        except BaseException:
            file.close()
            temporary.unlink()
            raise
        self.file.close()
        self.file = file  # locked since before it had the table's name

    def _write(self, rows: Iterable[Sequence[str]]) -> None:
        self.file.write(b"".join(line(row) for row in rows))
        self.file.flush()
        os.fsync(self.file.fileno())


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


class Summary(NamedTuple):
    """What a table holds: see `summary`.

    >>> found = Summary(n=200, flagged=9, failed=20, first_failed=[], most_anomalous=[])
    >>> found.flagged / (found.n - found.failed)  # of the files that could be read
    0.05
    """

    n: int
    flagged: int
    failed: int
    first_failed: list[dict[str, str]]  # at most ten
    most_anomalous: list[dict[str, str]]  # smallest score first


def summary(table: str | Path, most: int = 0) -> Summary:
    """Counts over a table, its first failures and its `most` most anomalous lines.

    >>> import tempfile
    >>> rows = [["1.png", "1.5", "", "", "0.7", "False", ""], ["2.png", "0.5", "", "", "0.1", "True", ""]]
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(b"".join(map(line, [COLUMNS, *rows])))
    ...     file.flush()
    ...     found = summary(file.name, most=1)
    >>> found.n, found.flagged, found.failed, found.most_anomalous[0]["path"]
    (2, 1, 0, '2.png')
    """
    n = flagged = failed = 0
    first: list[dict[str, str]] = []

    def scored() -> Iterator[dict[str, str]]:
        nonlocal n, flagged, failed
        for row, _ in islice(lines_of(table), 1, None):
            n, flagged, failed = n + 1, flagged + (row["flagged"] == "True"), failed + bool(row["error"])
            if not row["error"]:
                yield row
            elif len(first) < 10:
                first.append(row)

    chosen = heapq.nsmallest(max(1, most), scored(), key=lambda row: float(row["score"]))
    return Summary(n, flagged, failed, first, chosen[:most])


def settings_of(detector: CADet, folder: str | Path, threshold: float) -> Settings:
    """What the lines of a folder's table have in common.

    >>> from torch import nn
    >>> detector = CADet(nn.Flatten(), n_views=4, image_size=8).fit(torch.rand(9, 3, 8, 8), torch.rand(9, 3, 8, 8))
    >>> settings_of(detector, "images", 0.05) == settings_of(detector, "./images", 0.05)
    True
    """
    place = hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()
    return Settings(detector.fingerprint(), threshold, place)


def score_folder(
    detector: CADet,
    folder: str | Path,
    table: str | Path,
    threshold: float,
    workers: int = 2,
    part: Part | None = None,
    retry: bool = False,
) -> Counter[str]:
    """Write the p-value of every image below a folder -> how many other files were left out, by ending.

    An unfinished table of the same detector, threshold and folder is gone on with. `part`: only that range of the images, into a
    table of its own beside `table` (see `Part.table`). `retry`: read files again that an earlier run could not read.

    >>> from torch import nn
    >>> import tempfile
    >>> detector = CADet(nn.Flatten(), n_views=4, image_size=8).fit(torch.rand(9, 3, 8, 8), torch.rand(9, 3, 8, 8))
    >>> with tempfile.TemporaryDirectory() as home:
    ...     Path(home, "images").mkdir()
    ...     Image.new("RGB", (8, 8), "red").save(Path(home, "images", "red.png"))
    ...     others = score_folder(detector, Path(home, "images"), Path(home, "p.csv"), threshold=0.1)
    ...     [row["path"] for row, _ in lines_of(Path(home, "p.csv"))]
    ['path', 'red.png']
    """
    found, settings, table = listing(folder), settings_of(detector, folder, threshold), Path(table)
    first, last = part.span(found.n_images) if part else (0, found.n_images)
    if part:
        table, settings = part.table(table), settings.of_part(part, found.digest)
    written = Table(table, settings)
    paths = (path for path in islice(images_below(folder), first, last) if not written.has(path))
    none_yet = not len(written.done)
    if retry:
        _read_again(detector, folder, written, threshold, workers)
    with _bar(last - first, f"part {part}" if part else "score") as bar:
        bar.update(min(last - first, len(written.done)))
        for chunk in chunks_of(folder, paths, detector.image_size, _images_per_chunk(detector), workers):
            rows = rows_of_chunk(detector, chunk, threshold, none_yet)
            none_yet &= all(row[-1] for row in rows)
            written.append(rows)
            bar.update(len(chunk))
    return found.others


def _read_again(detector: CADet, folder: str | Path, written: Table, threshold: float, workers: int) -> None:
    """Read once more the files whose line is an error. Lines keep their place, as if they had never failed."""
    failed = (row["path"] for row, _ in islice(lines_of(written.path), 1, None) if row["error"])
    chunks = chunks_of(folder, failed, detector.image_size, _images_per_chunk(detector), workers)
    again = {row[0]: row for chunk in chunks for row in rows_of_chunk(detector, chunk, threshold)}
    if again:
        written.replace(line(again.get(row["path"], list(row.values()))) for row, _ in lines_of(written.path))


# --- parts --------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Number I of N consecutive ranges of a folder's images, which together are all of them, each once.

    >>> [Part(i, 3).span(10) for i in (1, 2, 3)]
    [(0, 3), (3, 6), (6, 10)]
    >>> Part.read("2/3").table("p_values.csv").name
    'p_values.csv.part-2-of-3'
    """

    number: int  # from 1 on
    of: int

    @classmethod
    def read(cls, text: str) -> Part:
        """The part that "I/N" names; ValueError when it names none."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"--part: found {text!r}, expected I/N with I from 1 to N, such as 1/4")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def span(self, n: int) -> tuple[int, int]:
        """Where it begins and ends among n images."""
        return n * (self.number - 1) // self.of, n * self.number // self.of

    def table(self, out: str | Path) -> Path:
        """Its table, beside that of all parts."""
        return Path(out).with_name(f"{Path(out).name}.part-{self.number}-of-{self.of}")


def parts_of(n: int) -> list[Part]:
    """All of n parts, in order.

    >>> [str(part) for part in parts_of(3)]
    ['1/3', '2/3', '3/3']
    """
    return [Part(number, n) for number in range(1, n + 1)]


def lacking(out: str | Path, part: Part, settings: Settings, found: Listing) -> str:
    """Why a part cannot be merged, with what to do; "" when it is whole. `settings` are those of the whole table.

    >>> lacking("p.csv", Part(2, 3), Settings("", 0.05, ""), Listing(10, Counter(), ""))
    'p.csv.part-2-of-3: found no such table, expected part 2/3; score it with --part 2/3'
    """
    table, (first, last) = part.table(out), part.span(found.n_images)
    if not _holds_something(table):
        return f"{table}: found no such table, expected part {part}; score it with --part {part}"
    other = settings.of_part(part, found.digest).differing(table)
    if other:
        return f"{table}: found a table of another {', '.join(other)}, expected part {part} of this command; remove it"
    n = sum(1 for _ in lines_of(table)) - 1  # without the columns' names
    if n < last - first:
        return f"{table}: found {max(n, 0)} files in it, expected {last - first}; go on with it with --part {part}"
    if n > last - first:
        return f"{table}: found {n} files in it, expected {last - first}: has it been scored twice at a time? remove it"
    return ""


def merge(out: str | Path, folder: str | Path, settings: Settings, n_parts: int) -> None:
    """Put the tables of n parts into one, in order, and remove them. Only when every image has its line in its part's table.

    ValueError names every part that is missing, unfinished or of another detector, threshold or listing of the folder; then
    nothing is written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "1.png").touch()
    ...     merge(Path(folder, "p.csv"), folder, Settings("", 0.05, ""), n_parts=1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...p.csv.part-1-of-1: found no such table, expected part 1/1; score it with --part 1/1
    """
    out, found = Path(out), listing(folder)
    problems = [problem for part in parts_of(n_parts) if (problem := lacking(out, part, settings, found))]
    if problems:
        raise ValueError("\n".join(problems))
    temporary = out.with_name(f".{out.name}.merging")
    try:
        with open(temporary, "wb") as file:
            file.writelines(_merged(out, folder, n_parts))
            file.flush()
            os.fsync(file.fileno())
        settings.write(out)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    for part in parts_of(n_parts):
        for path in (part.table(out), settings.file(part.table(out))):
            path.unlink()


def _merged(out: Path, folder: str | Path, n_parts: int) -> Iterator[bytes]:
    """The lines of the whole table; ValueError where a line is not that of the image whose turn it is."""
    paths = images_below(folder)
    yield line(COLUMNS)
    for table in (part.table(out) for part in parts_of(n_parts)):
        for row, _ in islice(lines_of(table), 1, None):
            expected = next(paths, None)
            if row["path"] != expected:
                raise ValueError(f"{table}: found the file {row['path']!r} in it, expected {expected!r} here; remove it")
            yield line(list(row.values()))


def _is_whole(out: Path, folder: str | Path, settings: Settings) -> bool:
    """Whether the table of all parts is there already; ValueError for an unfinished one, which a single process has begun."""
    if not _holds_something(out):
        return False
    written = Table(out, settings)
    n = sum(not written.has(path) for path in images_below(folder))
    if n:
        raise ValueError(
            f"{out}: found a table that lacks {n} files, expected a whole one or none; go on with it in a single process, "
            "without --gpus, --parts and --merge, or remove it"
        )
    return True


def _environments(options: argparse.Namespace) -> list[dict[str, str]]:
    """The environment of each process that is to be started: its GPU, and its share of the cores."""
    from cadetlib import reproduce

    if options.gpus and options.device:
        raise ValueError("found both --gpus and --device, expected one of them: each process has one GPU of --gpus")
    gpus = reproduce.gpu_slots(options.gpus) if options.gpus else [None] * options.parts
    kept = processes.without_distributed(os.environ)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), kept.get("PYTHONPATH")]))
    kept["TQDM_DISABLE"] = "1"  # one bar for all, here
    kept.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(gpus))))
    return [kept | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}) for gpu in gpus]


def _begin(part: Part, options: argparse.Namespace, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process that scores one part: the same command, with --part."""
    names = ("detector", "encoder", "images", "out", "alpha", "threshold", "batch_size", "workers", "device")
    same = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names if getattr(options, name) not in (None, "")]
    return subprocess.Popen(
        [sys.executable, "-m", "cadetlib.score", "score", *same, f"--part={part}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        preexec_fn=partial(processes.die_with_parent, os.getpid()),
    )


def _grown(table: Path, read: dict[Path, int]) -> int:
    """How many lines a table has grown by since it was last `read`."""
    if not table.exists():
        return 0
    with open(table, "rb") as file:
        file.seek(read.get(table, len(line(COLUMNS))))
        added = sum(block.count(b"\n") for block in iter(partial(file.read, 2**20), b""))
        read[table] = file.tell()
    return added


def _wait(running: dict[Part, subprocess.Popen[bytes]], out: Path, bar: Any) -> None:
    """Until every part is scored. When one fails, the others are ended too, and ChildProcessError names it."""
    read: dict[Path, int] = {}
    every = list(running)
    try:
        while running:
            time.sleep(0.2)
            bar.update(sum(_grown(part.table(out), read) for part in every))
            for part in [part for part, process in running.items() if process.poll() is not None]:
                _check_exit(part, running.pop(part).returncode, part.table(out))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _check_exit(part: Part, code: int, table: Path) -> None:
    if code not in (0, SOME_FAILED):
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise ChildProcessError(
            f"part {part}: found its process {how}, expected exit code 0; what it wrote to {table} is kept, "
            "and the same command goes on from there"
        )


def _score_parts(options: argparse.Namespace, settings: Settings) -> Counter[str]:
    """All parts in processes of their own, those that are not scored yet; then their merged table -> as `score_folder`."""
    out, environments, found = Path(options.out), _environments(options), listing(options.images)
    if not _is_whole(out, options.images, settings):
        parts = dict(zip(parts_of(len(environments)), environments, strict=True))
        open_parts = [part for part in parts if lacking(out, part, settings, found)]
        done = sum(last - first for first, last in (part.span(found.n_images) for part in parts if part not in open_parts))
        with _bar(found.n_images, f"score, {len(parts)} parts") as bar:
            bar.update(done)
            _wait({part: _begin(part, options, parts[part]) for part in open_parts}, out, bar)
        merge(out, options.images, settings, len(parts))
    return found.others


# --- the gallery --------------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }}
body {{ margin: 2rem auto; max-width: 70rem; padding: 0 1rem }}
ol {{ list-style: none; padding: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem }}
li {{ break-inside: avoid; border-top: 4px solid #6b6b6b; padding-top: .5rem; overflow-wrap: anywhere; font-size: .85rem }}
li.flagged {{ border-color: #b34700 }}
img {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: #f2f2f2; image-rendering: {rendering} }}
b {{ display: block; font-size: 1rem }}
</style></head><body><h1>{title}</h1>
<p>{words}</p><ol>
{items}
</ol>{failures}</body></html>
"""


def _thumbnail(file: Path, side: int = 176) -> tuple[str, int]:
    """An image as the detector saw it, upright and cropped, as a data URI -> with its side, at most `side` pixels."""
    with Image.open(file) as opened:
        side = min(side, *opened.size)
    pixels = data.read_image(file, side).permute(1, 2, 0).numpy()
    buffer, kind = io.BytesIO(), "png" if side <= 64 else "jpeg"
    Image.fromarray(pixels).save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", side


def _shown(text: str) -> str:
    """Text fit for a page: escaped, and file names that are no Unicode made so."""
    return html.escape(processes.printable(text))


def _item(folder: Path, row: dict[str, str]) -> tuple[str, int]:
    try:
        uri, side = _thumbnail(folder / row["path"])
    except (OSError, ValueError):  # it was there when it was scored
        uri, side = "", 64
    kind, word = ("flagged", "flagged") if row["flagged"] == "True" else ("", "not flagged")
    name = _shown(row["path"])
    text = f'<li class="{kind}"><img alt="{name}" src="{uri}"><b>p = {float(row["p_value"]):.4g}</b>{word}<br>{name}</li>'
    return text, side


def _gallery(folder: str | Path, found: Summary, threshold: float, promised: Any) -> str:
    """A page of the most anomalous images, smallest score first, that needs no other file."""
    items = [_item(Path(folder), row) for row in found.most_anomalous]
    words = (
        f"{found.flagged} of {found.n - found.failed} images have p ≤ {threshold:g} and are flagged; of normal images, "
        f"{promised.expected:.2%} would be (95 of 100 calibrations: {promised.low:.2%} to {promised.high:.2%}). "
        f"Here are the {len(items)} most anomalous. "
        "An image's p-value is the share of calibration images that look at least as unusual."
    )
    failed = "".join(f"<li>{_shown(row['path'])}: {_shown(row['error'])}</li>" for row in found.first_failed)
    return _PAGE.format(
        title="The most anomalous images",
        rendering="pixelated" if items and max(side for _, side in items) <= 64 else "auto",
        words=words,
        items="\n".join(text for text, _ in items),
        failures=f"<h2>{found.failed} files could not be scored</h2><ul>{failed}</ul>" if found.failed else "",
    )


# --- the command line ---------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    """A line on stderr: stdout is left to those who pipe it."""
    print(processes.printable(text), file=sys.stderr, flush=True)


def recorded_encoder(detector: Path) -> str:
    """The encoder's name as it was given at fit; a file is looked for from here, then from the detector's folder.

    >>> from torch import nn
    >>> import tempfile
    >>> detector = CADet(nn.Flatten(), n_views=4, image_size=8).fit(torch.rand(9, 3, 8, 8), torch.rand(9, 3, 8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     detector.save(Path(folder, "d.safetensors"), encoder_name="torchvision:resnet50")
    ...     recorded_encoder(Path(folder, "d.safetensors"))
    'torchvision:resnet50'
    """
    name = encoders.read_safetensors(detector, cadet.FORMAT)[1].get("encoder_name", "")
    if not name:
        raise ValueError(f"{detector}: found no name of an encoder in it, expected --encoder")
    beside = detector.parent / name
    is_file = name.endswith((".safetensors", *foreign.SUFFIXES))
    return str(beside) if is_file and not Path(name).exists() and beside.exists() else name


def _report_failures(failed: int, first: Sequence[tuple[str, str]], what_to_do: str = "") -> int:
    if failed:
        _say(f"{failed} files could not be scored:")
        for path, error in first[:10]:
            _say(f"    {path}: {error}")
        if failed > 10:
            _say(f"    and {failed - 10} more")
        if what_to_do:
            _say(what_to_do)
    return SOME_FAILED if failed else 0


def _run_fit(options: argparse.Namespace) -> int:
    """`fit`: a detector from two folders of normal images."""
    if Path(options.out).is_dir():
        raise ValueError(f"--out: found the folder {options.out}, expected a file's name")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    encoder = encoders.placed(encoders.load_encoder(options.encoder), options.device)
    detector = CADet(
        encoder,
        n_views=options.n_views,
        crop_scale=options.crop_scale,
        image_size=options.image_size or int(getattr(encoder, "image_size")),  # noqa: B009 - a module's attribute of any type
        seed=options.seed,
        flip=not options.no_flip,
        batch_size=options.batch_size,
        dtype=embed.resolved_dtype(options.dtype, encoders.device_of(encoder)),
        ties=options.ties,
    )
    failed = fit_folders(detector, options.reference, options.calibration, options.workers)
    detector.save(options.out, encoder_name=options.encoder)
    n = len(detector.calibration_scores_)
    _say(f"{options.out}: gamma {detector.gamma_:.4g}; {n} calibration images, so the smallest p-value is {1 / (n + 1):.3g}")
    if n < thresholds.calibration_needed(0.05):
        _say(f"too few for alpha = 0.05, which needs {thresholds.calibration_needed(0.05)} calibration images or more")
    return _report_failures(len(failed), [(item.path, item.error) for item in failed])


def _threshold(options: argparse.Namespace, detector: CADet) -> float:
    if options.alpha is not None and options.threshold:
        raise ValueError("found both --alpha and --threshold, expected one of them")
    if options.threshold:
        return thresholds.read(options.threshold, detector.fingerprint()).threshold
    return thresholds.reachable(0.05 if options.alpha is None else options.alpha, len(detector.calibration_scores_))


def _run_score(options: argparse.Namespace) -> int:
    """`score`: a table of p-values for a folder of images, or one part of it."""
    name = options.encoder or recorded_encoder(Path(options.detector))
    elsewhere = bool(options.gpus or options.parts or options.merge)  # the devices are for those who score
    if options.retry and elsewhere:
        raise ValueError(
            "found --retry beside --gpus, --parts or --merge, expected it without them: a single process reads again"
        )
    encoder = encoders.placed(encoders.load_encoder(name), "cpu" if elsewhere else options.device)
    detector = CADet.load(options.detector, encoder, options.batch_size)
    threshold = _threshold(options, detector)
    if options.part:
        return _run_part(options, detector, threshold, Part.read(options.part))
    if elsewhere:
        others = _several(options, settings_of(detector, options.images, threshold))
    else:
        others = score_folder(detector, options.images, options.out, threshold, options.workers, retry=options.retry)
    return _report(options, len(detector.calibration_scores_), threshold, others)


def _run_part(options: argparse.Namespace, detector: CADet, threshold: float, part: Part) -> int:
    score_folder(detector, options.images, options.out, threshold, options.workers, part, options.retry)
    found = summary(part.table(options.out))
    _say(f"part {part}: {found.n} files, {found.n - found.failed} scored, in {part.table(options.out)}")
    return SOME_FAILED if found.failed else 0


def _several(options: argparse.Namespace, settings: Settings) -> Counter[str]:
    """The table of several processes' parts, scored now (--gpus, --parts) or before (--merge)."""
    if not options.merge:
        return _score_parts(options, settings)
    if not _is_whole(Path(options.out), options.images, settings):
        merge(options.out, options.images, settings, options.merge)
    return listing(options.images).others


def _report(options: argparse.Namespace, n_calibration: int, threshold: float, others: Counter[str]) -> int:
    """Say what a finished table holds, and write the gallery -> the exit code."""
    found = summary(options.out, options.gallery_size if options.gallery else 0)
    promised = thresholds.promised(n_calibration, threshold)
    if options.gallery:
        record.write_atomically(options.gallery, _gallery(options.images, found, threshold, promised))
    _say(
        f"{options.out}: {found.n} files, {found.n - found.failed} scored, {found.flagged} flagged at p <= {threshold:g}; "
        f"of normal images, {promised.expected:.2%} [{promised.low:.2%}, {promised.high:.2%}] would be"
    )
    if others:
        _say("no images, left out: " + ", ".join(f"{count} {end}" for end, count in others.most_common(10)))
    return _report_failures(found.failed, [(row["path"], row["error"]) for row in found.first_failed], RETRY)


def _count(text: str) -> int:
    return checks.at_least(int(text), "number of parts", 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cadetlib.score", description="p-values for folders of images")
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit", help="make a detector from two folders of normal images")
    fit.add_argument("--encoder", required=True, help="torchvision:NAME, timm:NAME, a .safetensors file or a checkpoint")
    fit.add_argument("--reference", required=True, help="folder of a few hundred normal images to compare with")
    fit.add_argument("--calibration", required=True, help="folder of other normal images; with n the smallest p-value is 1/(n+1)")
    fit.add_argument("--out", required=True, help="the detector's file, .safetensors")
    fit.add_argument("--n-views", type=int, default=50, help="random views per image")
    fit.add_argument("--crop-scale", type=float, default=0.75, help="area of a view")
    fit.add_argument("--image-size", type=int, default=0, help="side to which images are brought; default: the encoder's own")
    fit.add_argument("--no-flip", action="store_true", help="no mirrored views: a mirrored image would be another thing")
    fit.add_argument("--seed", type=int, default=0, help="of the views")
    fit.add_argument("--dtype", choices=[*embed.DTYPES, embed.AUTO], default="float32", help="of the forward passes")
    fit.add_argument("--ties", choices=cadet.TIES, default="paper", help="conservative: equal scores count against an image")
    score = commands.add_parser("score", help="write the p-value of every image below a folder")
    score.add_argument("--detector", required=True, help="what `fit` wrote")
    score.add_argument("--encoder", default="", help="default: the one named at `fit`")
    score.add_argument("--images", required=True, help="folder of the images to judge, with its sub-folders")
    score.add_argument("--out", required=True, help="the table, .csv; an unfinished one is gone on with")
    score.add_argument("--alpha", type=float, help="flag when the p-value is at most this; default 0.05")
    score.add_argument("--threshold", default="", help="instead of --alpha: a threshold saved in notebook 06")
    score.add_argument("--gallery", default="", help="also write a page (.html) of the most anomalous images")
    score.add_argument("--gallery-size", type=int, default=60, help="how many images it shows")
    score.add_argument("--retry", action="store_true", help="read files again that an earlier run could not read")
    several = score.add_mutually_exclusive_group()
    several.add_argument("--gpus", default="", help="numbers, such as 0,1: a process for each scores a part; then one table")
    several.add_argument("--parts", type=_count, default=0, help="the same with so many processes without a GPU of their own")
    several.add_argument("--part", default="", help="I/N: score this part alone, for machines that share a file system")
    several.add_argument("--merge", type=_count, default=0, help="score nothing: make one table of N parts that are all there")
    for command in (fit, score):
        told = "1024, on a GPU more of small ones" if command is fit else "as it was fitted"
        command.add_argument("--batch-size", type=int, help=f"views at a time ({told})")
        command.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="threads that read images")
        command.add_argument("--device", default="", help="cpu, cuda, ...; default: the GPU when there is one")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this module -> its exit code."""
    options = _parser().parse_args(arguments)
    processes.keep_freed_memory()
    try:
        checks.at_least(options.workers, "workers", 1)
        return _run_fit(options) if options.command == "fit" else _run_score(options)
    except (ValueError, OSError) as error:
        _say(f"error: {error}")
        return 1
    except torch.OutOfMemoryError as error:
        _say(f"error: {error} With a smaller --batch-size it takes less.")
        return 1
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
