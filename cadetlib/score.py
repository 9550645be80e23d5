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
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from cadetlib import cadet, checks, embed, encoders, foreign, gallery, processes, record, thresholds
from cadetlib.cadet import CADet
from cadetlib.chunks import Decoded, chunks_of, images_per_chunk, listing, progress, rows_of_chunk, sums_of_chunk
from cadetlib.image_files import images_below
from cadetlib.score_parts import is_whole, merge, score_parts
from cadetlib.score_table import SOME_FAILED, Part, Settings, Table, line, lines_of, summary

RETRY = "when they can be read: the same command with --retry, in a single process"


# --- fit ----------------------------------------------------------------------------------------------------------------


def _each_chunk(detector: CADet, folder: Path, what: str, workers: int, failed: list[Decoded]) -> Iterator[embed.ViewSums]:
    none_yet = True
    with progress(listing(folder).n_images, what) as bar:
        for chunk in chunks_of(folder, images_below(folder), detector.image_size, images_per_chunk(detector), workers):
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

    >>> import numpy as np
    >>> from PIL import Image
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


# --- score --------------------------------------------------------------------------------------------------------------


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

    >>> from PIL import Image
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
    with progress(last - first, f"part {part}" if part else "score") as bar:
        bar.update(min(last - first, len(written.done)))
        for chunk in chunks_of(folder, paths, detector.image_size, images_per_chunk(detector), workers):
            rows = rows_of_chunk(detector, chunk, threshold, none_yet)
            none_yet &= all(row[-1] for row in rows)
            written.append(rows)
            bar.update(len(chunk))
    return found.others


def _read_again(detector: CADet, folder: str | Path, written: Table, threshold: float, workers: int) -> None:
    """Read once more the files whose line is an error. Lines keep their place, as if they had never failed."""
    failed = (row["path"] for row, _ in islice(lines_of(written.path), 1, None) if row["error"])
    chunks = chunks_of(folder, failed, detector.image_size, images_per_chunk(detector), workers)
    again = {row[0]: row for chunk in chunks for row in rows_of_chunk(detector, chunk, threshold)}
    if again:
        written.replace(line(again.get(row["path"], list(row.values()))) for row, _ in lines_of(written.path))


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
        return score_parts(options, settings)
    if not is_whole(Path(options.out), options.images, settings):
        merge(options.out, options.images, settings, options.merge)
    return listing(options.images).others


def _report(options: argparse.Namespace, n_calibration: int, threshold: float, others: Counter[str]) -> int:
    """Say what a finished table holds, and write the gallery -> the exit code."""
    found = summary(options.out, options.gallery_size if options.gallery else 0)
    promised = thresholds.promised(n_calibration, threshold)
    if options.gallery:
        record.write_atomically(options.gallery, gallery.page(options.images, found, threshold, promised))
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
