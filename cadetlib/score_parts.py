"""One table from several processes: each scores a range of the images, and the tables of all become one."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cadetlib import processes
from cadetlib.chunks import Listing, listing, progress
from cadetlib.image_files import images_below
from cadetlib.score_table import COLUMNS, SOME_FAILED, Part, Settings, Table, holds_something, line, lines_of, parts_of


def lacking(out: str | Path, part: Part, settings: Settings, found: Listing) -> str:
    """Why a part cannot be merged, with what to do; "" when it is whole. `settings` are those of the whole table.

    >>> lacking("p.csv", Part(2, 3), Settings("", 0.05, ""), Listing(10, Counter(), ""))
    'p.csv.part-2-of-3: found no such table, expected part 2/3; score it with --part 2/3'
    """
    table, (first, last) = part.table(out), part.span(found.n_images)
    if not holds_something(table):
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


def is_whole(out: Path, folder: str | Path, settings: Settings) -> bool:
    """Whether the table of all parts is there already; ValueError for an unfinished one, which a single process has begun.

    >>> is_whole(Path("no-such.csv"), "images", Settings("", 0.05, ""))
    False
    """
    if not holds_something(out):
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

    if options.gpus and options.device:
        raise ValueError("found both --gpus and --device, expected one of them: each process has one GPU of --gpus")
    gpus = processes.gpu_slots(options.gpus) if options.gpus else [None] * options.parts
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


def score_parts(options: argparse.Namespace, settings: Settings) -> Counter[str]:
    """All parts in processes of their own, those that are not scored yet; then their merged table -> as `score.score_folder`.

    options: of the command line of `score`.

    >>> score_parts(argparse.Namespace(gpus="0,1", device="cpu", images=".", out="p.csv"), Settings("", 0.05, ""))
    Traceback (most recent call last):
    ValueError: found both --gpus and --device, expected one of them: each process has one GPU of --gpus
    """
    out, environments, found = Path(options.out), _environments(options), listing(options.images)
    if not is_whole(out, options.images, settings):
        parts = dict(zip(parts_of(len(environments)), environments, strict=True))
        open_parts = [part for part in parts if lacking(out, part, settings, found)]
        done = sum(last - first for first, last in (part.span(found.n_images) for part in parts if part not in open_parts))
        with progress(found.n_images, f"score, {len(parts)} parts") as bar:
            bar.update(done)
            _wait({part: _begin(part, options, parts[part]) for part in open_parts}, out, bar)
        merge(out, options.images, settings, len(parts))
    return found.others
