"""p-values for folders of images, from the command line; in constant memory, with a line for every file.

    python -m cadetlib.score fit --encoder torchvision:resnet50 --reference DIR --calibration DIR --out detector.safetensors
    python -m cadetlib.score score --detector detector.safetensors --images DIR --out p_values.csv --alpha 0.05

Images are read a chunk at a time by a few threads while the encoder works on the chunk before. The table grows chunk by chunk,
and the same command goes on where an earlier one was stopped. Exit codes: 0 all files scored; 3 some could not be read (each has
its line, with the reason); 1 wrong input; 2 wrong arguments; 130 stopped by the user.
"""

from __future__ import annotations

import argparse
import base64
import csv
import functools
import hashlib
import heapq
import html
import io
import json
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from cadetlib import cadet, checks, data, embed, encoders, record, thresholds
from cadetlib.cadet import CADet

COLUMNS = ("path", "score", "m_in", "m_out", "p_value", "flagged", "error")
SOME_FAILED = 3
_FORMAT = "cadetlib.p_values"
_CHUNK = 256  # images held at a time, about
_NO_DECODER = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows their names and cannot read them by itself


# --- files --------------------------------------------------------------------------------------------------------------


@functools.cache
def suffixes() -> frozenset[str]:
    """The endings of the files that Pillow reads, in lower case."""
    Image.init()
    readable = set(Image.OPEN) - _NO_DECODER
    return frozenset(data.IMAGE_SUFFIXES) | {end for end, kind in Image.registered_extensions().items() if kind in readable}


def is_image(name: str) -> bool:
    """Whether a file's name ends as that of an image; hidden files do not count."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes()


def files_below(folder: str | Path, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Paths, from `folder` on, of all files below it, in a fixed order; links to folders are followed, but not in a circle."""
    place = os.stat(folder)
    here = (place.st_dev, place.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir(), entry.path) for entry in entries)
    for name, is_folder, path in found:
        if is_folder:
            yield from files_below(path, f"{inside}{name}/", above | {here})
        else:
            yield inside + name


def count_files(folder: str | Path) -> tuple[int, Counter[str]]:
    """How many images there are below a folder, and how many other files by their ending; FileNotFoundError without an image."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"found no folder {folder}, expected one with images, in sub-folders or not")
    n_images, others = 0, Counter[str]()
    for path in files_below(folder):
        if is_image(os.path.basename(path)):
            n_images += 1
        else:
            others[os.path.splitext(path)[1].lower() or os.path.basename(path)] += 1
    if not n_images:
        raise FileNotFoundError(f"found no image below {folder}, expected files ending in {', '.join(sorted(suffixes()))}")
    return n_images, others


class Decoded(NamedTuple):
    """One file: its path from the folder on, and its image (3, S, S) uint8 or the reason why there is none."""

    path: str
    image: Tensor | None
    error: str = ""


def decode(folder: str | Path, path: str, size: int) -> Decoded:
    """One image file, read and resized. Whatever a decoder says of a damaged file becomes the file's error."""
    try:
        return Decoded(path, data.read_image(Path(folder, path), size))
    except Exception as error:  # decoders raise anything, from struct.error to DecompressionBombError
        reason = str(error).replace(f"{Path(folder, path)}: ", "").replace(f"{folder}{os.sep}", "")
        return Decoded(path, None, reason or type(error).__name__)


def chunks_of(folder: str | Path, paths: Iterable[str], size: int, chunk: int, workers: int) -> Iterator[list[Decoded]]:
    """The files decoded by `workers` threads, `chunk` at a time; the next chunk is read while this one is used."""
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


def images_per_step(detector: CADet) -> int:
    """How many images' views fill one forward pass."""
    return max(1, detector.batch_size // detector.n_views)


def images_per_chunk(detector: CADet) -> int:
    """About _CHUNK images, in whole forward passes."""
    step = images_per_step(detector)
    return step * max(1, _CHUNK // step)


def view_sums(detector: CADet, images: Tensor) -> embed.ViewSums:
    """The view sums of images (N, 3, S, S), each forward pass filled up to the same size.

    Convolutions round differently in batches of different sizes: filled up, an image's score is the same to the last bit,
    whichever files it is read with.
    """
    lacking = -len(images) % images_per_step(detector)
    filled = torch.cat([images, images[:1].expand(lacking, -1, -1, -1)]) if lacking else images
    return detector.view_sums(filled)[: len(images)]


def sums_of_chunk(detector: CADet, chunk: Sequence[Decoded]) -> tuple[list[Decoded], embed.ViewSums | None]:
    """The chunk with its errors, and the view sums of the images without one, in their order.

    An image that the encoder has no finite features for gets an error of its own, unless that is so for every image.
    """
    good = [item.image for item in chunk if item.image is not None]
    if not good:
        return list(chunk), None
    try:
        return list(chunk), view_sums(detector, torch.stack(good))
    except ValueError:
        tried = [_alone(detector, item) for item in chunk]
        parts = [sums for _, sums in tried if sums is not None]
        if not parts:
            raise
        return [item for item, _ in tried], embed.concatenate(parts)


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
    total, _ = count_files(folder)
    paths = (path for path in files_below(folder) if is_image(os.path.basename(path)))
    with _bar(total, what) as bar:
        for chunk in chunks_of(folder, paths, detector.image_size, images_per_chunk(detector), workers):
            found, sums = sums_of_chunk(detector, chunk)
            failed += [Decoded(f"{folder}/{item.path}", None, item.error) for item in found if item.error]
            if sums is not None:
                yield sums
            bar.update(len(chunk))


def fit_folders(detector: CADet, reference: str | Path, calibration: str | Path, workers: int = 2) -> list[Decoded]:
    """Algorithm 2 on two folders, whatever their size -> the files that could not be read, left out.

    The images of one must not be in the other: X_val(2) stands for images that mu has not seen. ValueError for one folder twice
    or inside the other.
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
    """The whole lines of a table, each with the position where it ends; a last line that was cut short is left out."""
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
    """What the lines of one table have in common."""

    detector: str  # fingerprint
    threshold: float
    folder: str  # sha256 of the images' place

    def file(self, table: Path) -> Path:
        return table.with_name(f"{table.name}.settings.json")


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big")


class Table:
    """The CSV file that grows: begun, or taken up again where an earlier run was stopped. Eight bytes a file are kept in memory.

    ValueError for a file that another detector, threshold or folder of images, or something else altogether, has written.
    """

    def __init__(self, path: str | Path, settings: Settings) -> None:
        self.path, beside = Path(path), settings.file(Path(path))
        self.done = np.empty(0, np.uint64)
        stated = {"format": _FORMAT, **settings._asdict()}
        if self.path.exists() and self.path.stat().st_size:
            self._check(beside, stated)
            self._take_up()
        else:
            record.write_atomically(beside, json.dumps(stated, indent=2) + "\n")
            record.write_atomically(self.path, line(COLUMNS))

    def _check(self, beside: Path, stated: dict[str, Any]) -> None:
        try:
            found = json.loads(beside.read_text())
        except (OSError, ValueError):
            found = {}
        other = [key for key in stated if found.get(key) != stated[key]]
        if other:
            raise ValueError(
                f"{self.path}: found a file of another {', '.join(other)}, expected an unfinished table of this very command; "
                "choose another --out, or remove it"
            )

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
            self.path.write_bytes(line(COLUMNS))

    def has(self, path: str) -> bool:
        """Whether the file has its line from an earlier run."""
        value = np.uint64(_hash(path))
        at = np.searchsorted(self.done, value)
        return bool(at < len(self.done) and self.done[at] == value)

    def append(self, rows: Iterable[Sequence[str]]) -> None:
        """Write lines, and wait until they are on the disk."""
        with open(self.path, "ab") as file:
            file.write(b"".join(line(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())


def rows_of_chunk(detector: CADet, chunk: Sequence[Decoded], threshold: float) -> list[list[str]]:
    """A line for each file of a chunk, in its order: numbers with every digit, and an error where there are none."""
    chunk, sums = sums_of_chunk(detector, chunk)
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
    """What a table holds."""

    n: int
    flagged: int
    failed: int
    first_failed: list[dict[str, str]]  # at most ten
    most_anomalous: list[dict[str, str]]  # smallest score first


def summary(table: str | Path, most: int = 0) -> Summary:
    """Counts over a table, its first failures and its `most` most anomalous lines."""
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


def score_folder(detector: CADet, folder: str | Path, table: str | Path, threshold: float, workers: int = 2) -> Counter[str]:
    """Write the p-value of every image below a folder -> how many other files were left out, by ending.

    An unfinished table of the same detector, threshold and folder is gone on with.
    """
    total, others = count_files(folder)
    place = hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()
    written = Table(table, Settings(detector.fingerprint(), threshold, place))
    paths = (p for p in files_below(folder) if is_image(os.path.basename(p)) and not written.has(p))
    with _bar(total, "score") as bar:
        bar.update(min(total, len(written.done)))
        for chunk in chunks_of(folder, paths, detector.image_size, images_per_chunk(detector), workers):
            written.append(rows_of_chunk(detector, chunk, threshold))
            bar.update(len(chunk))
    return others


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


def thumbnail(file: Path, side: int = 176) -> tuple[str, int]:
    """An image as the detector saw it, upright and cropped, as a data URI -> with its side, at most `side` pixels."""
    with Image.open(file) as opened:
        side = min(side, *opened.size)
    pixels = data.read_image(file, side).permute(1, 2, 0).numpy()
    buffer, kind = io.BytesIO(), "png" if side <= 64 else "jpeg"
    Image.fromarray(pixels).save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", side


def _shown(text: str) -> str:
    """Text fit for a page: escaped, and file names that are no Unicode made so."""
    return html.escape(text.encode("utf-8", "replace").decode())


def _item(folder: Path, row: dict[str, str]) -> tuple[str, int]:
    uri, side = thumbnail(folder / row["path"])
    kind, word = ("flagged", "flagged") if row["flagged"] == "True" else ("", "not flagged")
    name = _shown(row["path"])
    text = f'<li class="{kind}"><img alt="{name}" src="{uri}"><b>p = {float(row["p_value"]):.4g}</b>{word}<br>{name}</li>'
    return text, side


def gallery(folder: str | Path, found: Summary, threshold: float, promised: Any) -> str:
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
        failures=f"<h2>{found.failed} files could not be read</h2><ul>{failed}</ul>" if found.failed else "",
    )


# --- the command line ---------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line on stderr: stdout is left to those who pipe it."""
    print(text.encode("utf-8", "replace").decode(), file=sys.stderr, flush=True)


def _placed(encoder: nn.Module, device: str) -> nn.Module:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def recorded_encoder(detector: Path) -> str:
    """The encoder's name as it was given at fit; a file is looked for from here, then from the detector's folder."""
    name = encoders.read_safetensors(detector, cadet.FORMAT)[1].get("encoder_name", "")
    if not name:
        raise ValueError(f"{detector}: found no name of an encoder in it, expected --encoder")
    beside = detector.parent / name
    return str(beside) if name.endswith(".safetensors") and not Path(name).exists() and beside.exists() else name


def _report_failures(failed: int, first: Sequence[tuple[str, str]]) -> int:
    if failed:
        say(f"{failed} files could not be read:")
        for path, error in first[:10]:
            say(f"    {path}: {error}")
        if failed > 10:
            say(f"    and {failed - 10} more")
    return SOME_FAILED if failed else 0


def run_fit(options: argparse.Namespace) -> int:
    """`fit`: a detector from two folders of normal images."""
    encoder = _placed(encoders.load_encoder(options.encoder), options.device)
    detector = CADet(
        encoder,
        n_views=options.n_views,
        crop_scale=options.crop_scale,
        image_size=options.image_size or int(getattr(encoder, "image_size")),  # noqa: B009 - a module's attribute of any type
        seed=options.seed,
        flip=not options.no_flip,
        batch_size=options.batch_size,
        dtype=options.dtype,
        ties=options.ties,
    )
    failed = fit_folders(detector, options.reference, options.calibration, options.workers)
    detector.save(options.out, encoder_name=options.encoder)
    n = len(detector.calibration_scores_)
    say(f"{options.out}: gamma {detector.gamma_:.4g}; {n} calibration images, so the smallest p-value is {1 / (n + 1):.3g}")
    if n < thresholds.calibration_needed(0.05):
        say(f"too few for alpha = 0.05, which needs {thresholds.calibration_needed(0.05)} calibration images or more")
    return _report_failures(len(failed), [(item.path, item.error) for item in failed])


def run_score(options: argparse.Namespace) -> int:
    """`score`: a table of p-values for a folder of images."""
    if options.alpha is not None and options.threshold:
        raise ValueError("found both --alpha and --threshold, expected one of them")
    encoder = _placed(encoders.load_encoder(options.encoder or recorded_encoder(Path(options.detector))), options.device)
    detector = CADet.load(options.detector, encoder, options.batch_size)
    n = len(detector.calibration_scores_)
    if options.threshold:
        threshold = thresholds.read(options.threshold, detector.fingerprint()).threshold
    else:
        threshold = thresholds.reachable(0.05 if options.alpha is None else options.alpha, n)
    others = score_folder(detector, options.images, options.out, threshold, options.workers)
    found = summary(options.out, options.gallery_size if options.gallery else 0)
    promised = thresholds.promised(n, threshold)
    if options.gallery:
        record.write_atomically(options.gallery, gallery(options.images, found, threshold, promised))
    say(
        f"{options.out}: {found.n} files, {found.n - found.failed} scored, {found.flagged} flagged at p <= {threshold:g}; "
        f"of normal images, {promised.expected:.2%} [{promised.low:.2%}, {promised.high:.2%}] would be"
    )
    if others:
        say("no images, left out: " + ", ".join(f"{count} {end}" for end, count in others.most_common(10)))
    return _report_failures(found.failed, [(row["path"], row["error"]) for row in found.first_failed])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cadetlib.score", description="p-values for folders of images")
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit", help="make a detector from two folders of normal images")
    fit.add_argument("--encoder", required=True, help="torchvision:NAME, timm:NAME or a .safetensors file")
    fit.add_argument("--reference", required=True, help="folder of a few hundred normal images to compare with")
    fit.add_argument("--calibration", required=True, help="folder of other normal images; with n the smallest p-value is 1/(n+1)")
    fit.add_argument("--out", required=True, help="the detector's file, .safetensors")
    fit.add_argument("--n-views", type=int, default=50, help="random views per image")
    fit.add_argument("--crop-scale", type=float, default=0.75, help="area of a view")
    fit.add_argument("--image-size", type=int, default=0, help="side to which images are brought; default: the encoder's own")
    fit.add_argument("--no-flip", action="store_true", help="no mirrored views: a mirrored image would be another thing")
    fit.add_argument("--seed", type=int, default=0, help="of the views")
    fit.add_argument("--dtype", choices=list(embed.DTYPES), default="float32", help="of the forward passes")
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
    for command in (fit, score):
        command.add_argument("--batch-size", type=int, default=1024, help="views at a time")
        command.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="threads that read images")
        command.add_argument("--device", default="", help="cpu, cuda, ...; default: the GPU when there is one")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this module -> its exit code."""
    options = _parser().parse_args(arguments)
    try:
        checks.at_least(options.workers, "workers", 1)
        return run_fit(options) if options.command == "fit" else run_score(options)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
