"""What a process needs: a clean environment, a GPU, an end when its parent ends, and memory that it need not ask for twice."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

import psutil

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # a process to save and leave; Slurm and submitit send the latter two
# What torchrun tells its workers, or takes as its own options (PET_): left over from elsewhere, it misleads the next launch.
_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")
_DISTRIBUTED_PREFIXES = ("TORCHELASTIC_", "PET_")
_GRACE = 25  # seconds to save in; Slurm kills after 30
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
_MOST_MAPPED, _TRIM_THRESHOLD = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of mallopt(3)
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up here, since a fork may not load libraries


def without_distributed(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables of a distributed run.

    >>> without_distributed({"RANK": "3", "PET_NNODES": "2", "HOME": "/home/ada"})
    {'HOME': '/home/ada'}
    """
    return {k: v for k, v in environment.items() if k not in _DISTRIBUTED and not k.startswith(_DISTRIBUTED_PREFIXES)}


def locks(file: int | IO[Any], shared: bool = False) -> bool:
    """Whether an open file or folder could be locked; the system frees it when it is closed, or however this process ends.

    False when another process has it. On a file system that knows no locks everyone gets one.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file, open(file.name) as again:
    ...     locks(file), locks(again)
    (True, False)
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def printable(text: str) -> str:
    """Text that any output takes: what a file's name has that is no Unicode becomes a question mark.

    >>> printable(os.fsdecode(b"caf\\xe9.png"))
    'caf?.png'
    """
    return text.encode("utf-8", "replace").decode()


def die_with_parent(parent: int | None = None) -> None:
    """Have this process receive SIGTERM when the thread that started it ends, however it ends. Linux; elsewhere nothing.

    `parent`: the process id it should be the child of; if that one has ended already, the signal comes at once. Survives an
    exec, so that it serves as `preexec_fn` of any command.

    >>> import subprocess
    >>> subprocess.run(["echo", "a child"], preexec_fn=die_with_parent, capture_output=True).stdout.strip()
    b'a child'
    """
    if _prctl is not None:
        _prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, for what it allocates next. Returns whether the C library does: glibc.

    A forward pass on a CPU allocates what the pass before it freed. glibc gives large blocks back to the system at once, which
    has to find and to clear their pages anew: a tenth to a fifth of scoring in float32 (`make bench`). Afterwards the process
    holds the most memory that it ever used at once. Results do not change. For commands and notebooks, which own their process.

    >>> keep_freed_memory() in (True, False)
    True
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_MOST_MAPPED, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))


def gpu_slots(gpus: str | None) -> list[str | None]:
    """One CUDA_VISIBLE_DEVICES for each process that may run at a time; [None], one after the other, without `--gpus`.

    >>> gpu_slots(None)
    [None]
    """
    if gpus is None:
        return [None]
    if not re.fullmatch(r"\d+(,\d+)*", gpus) or len(set(gpus.split(","))) < len(gpus.split(",")):
        raise ValueError(f"--gpus: found {gpus!r}, expected different whole numbers separated by commas, such as 0,1")
    devices = visible_gpus()
    if any(int(i) >= len(devices) for i in gpus.split(",")):
        expected = f"numbers below {len(devices)}" if devices else "no --gpus"
        raise ValueError(f"--gpus: found {gpus!r} where torch sees {len(devices)} GPUs, expected {expected}")
    return [devices[int(i)] for i in gpus.split(",")]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    >>> import torch
    >>> len(visible_gpus()) == torch.cuda.device_count()
    True
    """
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def supervised(command: Sequence[str]) -> list[str]:
    """The command of a process that runs another one, and ends it with all that it started when this one ends, however it ends.

    >>> subprocess.run(supervised(["echo", "done"]), capture_output=True, text=True, check=True).stdout
    'done\\n'
    """
    code = "import sys; from cadetlib.processes import _supervise; sys.exit(_supervise(int(sys.argv[1]), sys.argv[2:]))"
    return [sys.executable, "-c", code, str(os.getpid()), *command]


def _supervise(parent: int, command: Sequence[str]) -> int:
    """Run a command to its exit code; end it, with all that it started, when the process `parent` ends, however it ends.

    The kernel is papermill's child in a session of its own, and a notebook may start processes itself: the one who takes
    over the orphans of all of them (Linux: subreaper) can end them all.
    """
    for number in ASKING:  # Slurm's too, which reach every process of a job
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        if _prctl:
            _prctl(_SET_CHILD_SUBREAPER, 1)
        die_with_parent(parent)
        code = subprocess.call(command)
        return code if code >= 0 else 128 - code
    finally:
        for number in ASKING:
            signal.signal(number, signal.SIG_IGN)
        _end_descendants()


def _end_descendants(timeout: float = 10) -> None:
    """End every descendant of this process: asked first, since pretraining then saves; whoever stays is killed.

    Again until none is left: one may have started another meanwhile.
    """
    asked = psutil.Process().children(recursive=True)
    for child in asked:
        with suppress(psutil.Error):
            child.terminate()
    psutil.wait_procs(asked, timeout=_GRACE)
    deadline = time.monotonic() + timeout
    while (children := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for child in children:
            with suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=0.5)
