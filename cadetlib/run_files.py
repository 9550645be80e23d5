"""What a training keeps in its folder: a lock, checkpoints that are whole or not there, a log, and encoders on the way.

A checkpoint's name carries a digest of its content, so that a damaged one is told, and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from cadetlib import encoders, losses, processes

ENCODER = "encoder.safetensors"  # in the folder of a finished run
_KEEP = 2  # checkpoints: the last, and the one before it should the last be damaged
_PATIENCE = 60  # seconds that a run waits for another one in its folder to end


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write atomically a checkpoint whose name carries its own digest; keep the last two.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for step in (1, 2, 3):
    ...         _ = save_checkpoint(Path(folder), step, {"step": step})
    ...     len(list(Path(folder).iterdir())), load_checkpoint(Path(folder), torch.device("cpu"))
    (2, {'step': 3})
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    for unfinished in folder.glob(".checkpoint-*.part"):  # of a process that was killed here
        unfinished.unlink(missing_ok=True)
    path = folder / f"checkpoint-{step:09d}-{digest(content)}.pt"
    temporary = folder / f".{path.name}.part"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-_KEEP]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest undamaged checkpoint of the first process's folder, on all processes; None when there is none at all.

    A damaged one is set aside with a loud line. ValueError when all are damaged: starting anew is for a person to decide.

    >>> load_checkpoint(Path("no-such-run"), torch.device("cpu")) is None
    True
    """
    found = [_newest_undamaged(folder) if is_first() else None]
    if losses.is_distributed():
        distributed.broadcast_object_list(found)
    return None if found[0] is None else torch.load(io.BytesIO(found[0]), map_location=device, weights_only=True)


def _newest_undamaged(folder: Path) -> bytes | None:
    damaged: list[Path] = []
    for path in sorted(folder.glob("checkpoint-*.pt"), reverse=True):
        content = path.read_bytes()
        if path.stem.endswith(f"-{digest(content)}"):
            for other in damaged:
                other.replace(other.with_suffix(".damaged"))
            return content
        damaged.append(path)
        say(f"DAMAGED CHECKPOINT {path.name}: its content does not match its name; going back to the one before")
    if damaged:
        raise ValueError(f"found only damaged checkpoints in {folder}, expected one whole; remove them to begin anew")
    return None


def digest(content: bytes) -> str:
    """By which a damaged file is told.

    >>> digest(b"whole") == digest(b"hole")
    False
    """
    return hashlib.sha256(content).hexdigest()[:16]


def is_first() -> bool:
    """Whether this is the one process of all that writes.

    >>> is_first()
    True
    """
    return not losses.is_distributed() or distributed.get_rank() == 0


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A lock on a run's folder, which the system frees however this process ends; ValueError when another process has it.

    Two runs in one folder would remove each other's unfinished checkpoints and write one log. One that was killed leaves
    processes behind that decode, for some seconds: so long this one waits.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder, alone_in(Path(folder)):
    ...     pass  # nobody else trains here meanwhile
    """
    place, last = os.open(folder, os.O_RDONLY), time.monotonic() + _PATIENCE
    try:
        while not processes.locks(place):
            if time.monotonic() > last:
                raise ValueError(f"{folder}: found another training at work in it, expected none; wait for it or end it")
            time.sleep(0.5)
        yield
    finally:
        os.close(place)


def holds(file: Path, steps: int) -> bool:
    """Whether an undamaged encoder of so many steps is there: written again it would have other bytes, and outdate notebooks.

    >>> holds(Path("no-such-run", ENCODER), steps=100)
    False
    """
    try:
        return encoders.read_safetensors(file, encoders.FORMAT)[1].get("steps") == str(steps)
    except (FileNotFoundError, ValueError):
        return False


def snapshot_file(folder: Path, epoch: int) -> Path:
    """Where a run keeps its encoder as it was after an epoch.

    >>> snapshot_file(Path("run"), 40).name
    'encoder-epoch-0040.safetensors'
    """
    return folder / f"encoder-epoch-{epoch:04d}.safetensors"


def snapshots(folder: Path) -> dict[int, Path]:
    """The encoders that a run kept on its way: epoch -> file.

    >>> snapshots(Path("no-such-run"))
    {}
    """
    return {int(path.stem.rpartition("-")[2]): path for path in sorted(folder.glob("encoder-epoch-*.safetensors"))}


class Log:
    """One JSON line per report, and a plain line for people; on resume, what came after the checkpoint is dropped.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     Log(Path(folder, "log.jsonl"), step=0).write(step=10, loss=2.5)
    ...     Log(Path(folder, "log.jsonl"), step=9).has(10, "loss")
    step 10  loss 2.5
    False
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if is_first():
            kept = [line for line in read_log(path) if line["step"] <= step]
            temporary = path.with_name(f".{path.name}")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(path)

    def has(self, step: int, name: str) -> bool:
        """Whether a value of this name was logged at this step."""
        return any(line["step"] == step and name in line for line in read_log(self.path))

    def write(self, **values: Any) -> None:
        if is_first():
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
            say("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log; a last line cut off by a kill is left out.

    >>> read_log(Path("no-such-run/log.jsonl"))
    []
    """
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def say(line: str) -> None:
    """Print a line, once for all processes.

    >>> say("resumed at step 10")
    resumed at step 10
    """
    if is_first():
        with suppress(BrokenPipeError):  # whoever read along has gone; what is asked of this process is on disk
            print(processes.printable(line), flush=True)
