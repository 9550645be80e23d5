"""The table of p-values: a CSV file with a line for every image, that grows and is gone on with; whole, or a part."""

from __future__ import annotations

import csv
import hashlib
import heapq
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from cadetlib import processes, record

COLUMNS = ("path", "score", "m_in", "m_out", "p_value", "flagged", "error")
SOME_FAILED = 3  # exit code of a command whose table is complete, with errors in it
_FORMAT = "cadetlib.p_values"


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


def holds_something(path: Path) -> bool:
    """Whether a file is there and not empty.

    >>> holds_something(Path("no-such.csv"))
    False
    """
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
        if holds_something(self.path):
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
