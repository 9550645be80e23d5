"""A profile, notebook by notebook, through papermill.

    python -m cadetlib.reproduce PROFILE [--only 02,04] [--force] [--gpus 0,1] [--output DIR]
    python -m cadetlib.reproduce PROFILE --slurm [--slurm-partition P] [--slurm-minutes 1440] [--slurm-gpus 1] [--slurm-cpus 8]

Every parameter is checked before anything starts. A notebook is skipped when its key (parameters, source, library, data and
the results it needs) is the one its results on disk were made with, so that after a failure or a kill the same command goes
on where it stopped. A notebook is done when papermill ended well and the results of this very run are on disk: a killed
kernel leaves papermill's cells looking completed. It is done no more when its figures, or files that its results name, are
lost or changed. --force redoes what is done, training too. Exit codes: 0 all results on disk, 1 a notebook failed, 2 refused;
with --slurm (see `slurm`), which waits for nothing, 0 says that all that was to be done is submitted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cadetlib import parameters, processes, profiles, record
from cadetlib.profiles import Notebook

PACKAGE = Path(__file__).resolve().parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
# Threads that wait asleep: on a busy machine, spinning ones take the cores from those they wait for (twice the CPU time).
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
QUIET = {"PYTHONUNBUFFERED": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
FORCE = (
    "redo also what is done and unchanged, finished pretraining included (an earlier run of it is renamed to FOLDER.old-1 and so "
    "on); attacked images and embeddings in DIR/cache, kept under a digest of all that they depend on, are used again: to redo "
    "these as well, delete that folder"
)
NOISE = re.compile(
    r"(Executing|Ending) Cell \d+-+$|(In|Out)put Notebook: |Executing notebook with|\[IPKernelApp\] WARNING .* over TCP"
)


# --- what is done -------------------------------------------------------------------------------------------------------


def library_digest(folder: Path = PACKAGE) -> str:
    """SHA-256 of the package's sources and templates.

    >>> library_digest() == library_digest(PACKAGE), len(library_digest())
    (True, 64)
    """
    files = sorted([*folder.glob("*.py"), *folder.glob("*.j2")])
    return record.digest([[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files])


def data_listing() -> dict[str, int | None] | None:
    """Names of the data root's entries, and sizes of its files; None without a data root. Its place does not matter.

    >>> isinstance(data_listing(), dict | None)
    True
    """
    root = record.data_root()
    if not root.is_dir():
        return None
    return {p.name: p.stat().st_size if p.is_file() else None for p in sorted(root.iterdir()) if not p.name.startswith(".")}


def key_of(notebook: Notebook, folder: Path, library: str, data: Mapping[str, int | None] | None) -> str:
    """What the notebook's results depend on, as one digest. Raises as `record.read` when what it needs is not on disk.

    >>> setup = profiles.notebooks_of("digits")[0]  # which needs no other
    >>> key_of(setup, Path(), "library 1", None) == key_of(setup, Path(), "library 2", None)
    False
    """
    needed = {name: record.read(folder / f"{name}.json").digest for name in notebook.needs}
    return record.digest([notebook.parameters, notebook.source, library, data, needed])


def _done_file(folder: Path, name: str) -> Path:
    return folder / ".done" / f"{name}.json"


def is_done(folder: Path, name: str, key: str | None = None) -> bool:
    """Whether a notebook was finished (with that key), and its results and the files beside them are those of that run.

    >>> is_done(Path("no-such-folder"), "00_setup")
    False
    """
    try:
        done = json.loads(_done_file(folder, name).read_bytes())
        if key not in (None, done["key"]) or record.read(folder / f"{name}.json").digest != done["digest"]:
            return False
        return all(record.file_digest(folder / path) == digest for path, digest in done["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def mark_done(folder: Path, name: str, key: str, found: record.Loaded) -> None:
    """Note that a notebook was finished, with what key, and which results and files it left.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> content = record.canonical({"results": {"x": 1}, "provenance": {}, "digest": record.digest({"x": 1})})
    >>> mark_done(folder, "00_setup", "key", record.read(record.write_atomically(folder / "00_setup.json", content)))
    >>> is_done(folder, "00_setup", "key"), is_done(folder, "00_setup", "another key")
    (True, False)
    """
    done = {"key": key, "digest": found.digest, "files": record.kept_files(folder, name, found.results)}
    record.write_atomically(_done_file(folder, name), record.canonical(done) + "\n")


# --- running ------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What the notebooks of one call have in common.

    >>> Job(record.checkout(), record.output_folder("digits"), "", library_digest(), data_listing()).force
    False
    """

    root: Path
    folder: Path
    output: str  # as given with --output, absolute; "" for the profile's own folder
    library: str
    data: dict[str, int | None] | None
    force: bool = False


@dataclass
class _Child:
    """One notebook at work."""

    notebook: Notebook
    key: str
    run_id: str
    slots: list[str | None]
    process: subprocess.Popen[str]
    printer: threading.Thread
    started: float


@dataclass(frozen=True)
class _Outcome:
    """What became of a notebook."""

    state: str
    seconds: float | None = None
    failure: str = ""


def _say(text: str) -> None:
    """Print at once, also into a pipe; when that has gone, what is at work goes on all the same."""
    with suppress(OSError):
        print(text, flush=True)


def _run_all(selected: Sequence[Notebook], job: Job, slots: Sequence[str | None]) -> dict[str, _Outcome]:
    """Run what is not done, each as soon as what it needs is there and a slot is free; after a failure nothing new is begun.

    A notebook that starts several processes waits for a GPU for each, or for all GPUs when they are fewer.
    """
    waiting, running, free = list(selected), list[_Child](), list(slots)
    outcomes: dict[str, _Outcome] = {}
    place = {n.name: f"[{i}/{len(selected)}] {n.name}" for i, n in enumerate(selected, 1)}
    try:
        while running or (waiting and not _failed(outcomes)):
            unfinished = {n.name for n in waiting} | {child.notebook.name for child in running}
            ready = [n for n in waiting if not unfinished & set(n.needs)]
            n_slots = min(ready[0].processes, len(slots)) if ready else 0
            if ready and len(free) >= n_slots and not _failed(outcomes):
                notebook = ready[0]
                waiting.remove(notebook)
                key = key_of(notebook, job.folder, job.library, job.data)
                if is_done(job.folder, notebook.name, key):
                    outcomes[notebook.name] = _Outcome("skipped, unchanged")
                    _say(f"{place[notebook.name]} skipped, unchanged")
                else:
                    _say(place[notebook.name])
                    taken, free = free[:n_slots], free[n_slots:]
                    running.append(_begin(notebook, key, job, taken, len(slots)))
                continue
            time.sleep(0.1)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                free += child.slots
                outcome = outcomes[child.notebook.name] = _finish(child, job)
                _say(f"{place[child.notebook.name]} {outcome.state}, {outcome.seconds:.1f} s")
    finally:
        _end(running)
    return outcomes


def _failed(outcomes: Mapping[str, _Outcome]) -> bool:
    return any(outcome.failure for outcome in outcomes.values())


def _begin(notebook: Notebook, key: str, job: Job, slots: Sequence[str | None], n_slots: int) -> _Child:
    """Start papermill on a notebook, in a process of its own under `_supervise`."""
    executed, log = job.folder / f"{notebook.name}.ipynb", job.folder / "logs" / f"{notebook.name}.log"
    for stale in (_done_file(job.folder, notebook.name), executed):
        stale.unlink(missing_ok=True)
    log.parent.mkdir(exist_ok=True)
    run_id = uuid.uuid4().hex
    process = subprocess.Popen(
        processes.supervised(_papermill(notebook, executed, job)),
        cwd=job.root,
        env=_environment(job, run_id, slots, n_slots),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends its children
    )
    prefix = f"{notebook.number} | " if n_slots > 1 else "    "
    printer = threading.Thread(target=_print_and_log, args=(process, log, prefix), daemon=True)
    printer.start()
    return _Child(notebook, key, run_id, list(slots), process, printer, time.monotonic())


def _papermill(notebook: Notebook, executed: Path, job: Job) -> list[str]:
    """The command; paths below the checkout are relative to it, since papermill writes them into the executed notebook."""
    paths = [notebook.path, executed, notebook.parameter_file]
    source, target, file = (str(p.relative_to(job.root) if p.is_relative_to(job.root) else p) for p in paths)
    output = ["-r", "output", job.output] if job.output else []
    options = "-k python3 --start-timeout 300 --log-output --no-progress-bar".split()
    return [sys.executable, "-m", "papermill", source, target, "-f", file, *output, *options]


def _environment(job: Job, run_id: str, slots: Sequence[str | None], n_slots: int) -> dict[str, str]:
    """The child's environment: this package and data root, no network, no stale distributed variables, --force, its GPUs."""
    kept = processes.without_distributed(os.environ)
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), kept.get("PYTHONPATH")]))
    environment = OFFLINE | PATIENT | kept | QUIET | {"CADET_ROOT": str(job.root), "CADET_RUN_ID": run_id, "PYTHONPATH": path}
    environment["CADET_FORCE"] = str(int(job.force))
    if kept.get("CADET_DATA"):
        environment["CADET_DATA"] = str(Path(kept["CADET_DATA"]).expanduser().absolute())
    if gpus := [slot for slot in slots if slot is not None]:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if n_slots > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) * len(slots) // n_slots)))
    return environment


def _print_and_log(process: subprocess.Popen[str], log: Path, prefix: str) -> None:
    """Every line to the log, and to the terminal what is not papermill's talk about itself.

    Lines are read to the end even where they cannot be written, on a full disk or to a terminal that has gone: a notebook whose
    lines nobody reads stops.
    """
    file, failed = None, ""
    with suppress(OSError):
        file = open(log, "wb", buffering=0)
    for line in process.stdout or ():
        try:
            if file is not None:
                file.write(line.encode())
        except OSError as error:
            failed = failed or f"{prefix}{log.name}: {error.strerror}; the notebook goes on"
        if line.strip() and not NOISE.match(line):
            with suppress(OSError):
                _say(prefix + line.rstrip())
    if file is not None:
        file.close()
    if failed:
        with suppress(OSError):
            _say(failed)


def _finish(child: _Child, job: Job) -> _Outcome:
    """Judge an ended notebook, and mark it done when its results are there."""
    child.printer.join()
    name, seconds = child.notebook.name, time.monotonic() - child.started
    why = f"papermill ended with exit code {child.process.returncode}" if child.process.returncode else ""
    try:
        found = record.read(job.folder / f"{name}.json")
        if found.provenance.get("run_id") != child.run_id:
            why = why or "it wrote no results: those on disk are of an earlier run (run.save was not reached)"
    except FileNotFoundError:
        why = why or "it wrote no results (run.save was not reached)"
    except ValueError as error:
        why = why or str(error)
    if why:
        return _Outcome("failed", seconds, f"{name} failed: {why}\n{_what_happened(job.folder, name)}")
    mark_done(job.folder, name, child.key, found)
    return _Outcome("done", seconds)


def _what_happened(folder: Path, name: str, n_lines: int = 20) -> str:
    """The tail of the failing cell's error; of the log when no cell holds one, as after a killed kernel."""
    with suppress(OSError, ValueError):
        for i, cell in enumerate(parameters.read_notebook(folder / f"{name}.ipynb")):
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    lines = "\n".join(output["traceback"]).splitlines()[-n_lines:]
                    return "\n".join([f"the error of cell {i + 1} of {folder / name}.ipynb:", *map(_uncoloured, lines)])
    log = folder / "logs" / f"{name}.log"
    lines = log.read_text(encoding="utf-8").splitlines()[-n_lines:] if log.exists() else []
    return "\n".join([f"no cell holds an error (kernel killed? out of memory?); the end of {log}:", *map(_uncoloured, lines)])


def _uncoloured(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


# --- processes ----------------------------------------------------------------------------------------------------------


def _end(running: Sequence[_Child]) -> None:
    """End the notebooks at work, their kernels included."""
    for child in running:
        child.process.terminate()
    for child in running:
        child.process.wait()


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Make SIGINT, SIGTERM and SIGHUP an orderly end with exit code 128 + number."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, *(n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN)]
    before = {number: signal.signal(number, stop) for number in numbers}  # what is ignored, as under nohup, stays so
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _locked(path: Path, what: str, shared: bool = False) -> Iterator[None]:
    """Hold a lock, which the system frees however this process ends; ValueError when another one holds it."""
    with open(path, "a+", encoding="utf-8") as file:
        if not processes.locks(file, shared):
            file.seek(0)
            raise ValueError(
                f"{path.parent}: found another reproduce at work {what} (process {file.read().strip()}), expected none; "
                "wait for it, end it, or name another folder with --output"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _alone_in(folder: Path, notebook: str = "") -> Iterator[None]:
    """Hold the folder's lock; with `notebook` that one's, and the folder's together with the jobs of other notebooks."""
    with _locked(folder / ".lock", "here", shared=bool(notebook)):
        if not notebook:
            yield
            return
        with _locked(folder / f".lock-{notebook}", f"on {notebook}"):
            yield


# --- the command --------------------------------------------------------------------------------------------------------


def _check_needs(notebooks: Sequence[Notebook], selected: Sequence[Notebook], job: Job) -> None:
    """What `--only` leaves out but needs must be on disk; say when it was made with other parameters, code or data."""
    names = {n.name for n in selected}
    absent = sorted({name for n in selected for name in n.needs if name not in names and not _verifies(job.folder, name)})
    if absent:
        raise ValueError(
            f"--only: found no results of {', '.join(absent)} in {job.folder}, expected them there; add them to --only"
        )
    upstream: set[str] = set()
    for n in reversed(notebooks):  # needs are earlier notebooks, hence one pass reaches the needs of needs
        upstream.update(n.needs if n.name in names | upstream else ())
    for n in notebooks:
        if n.name in upstream - names and not _is_current(n, job):
            _say(f"note: the results of {n.name} were made with other parameters, code or data; without --only they are redone")


def _verifies(folder: Path, name: str) -> bool:
    try:
        return bool(record.read(folder / f"{name}.json"))
    except (OSError, ValueError):
        return False


def _is_current(notebook: Notebook, job: Job) -> bool:
    try:
        return is_done(job.folder, notebook.name, key_of(notebook, job.folder, job.library, job.data))
    except (OSError, ValueError):
        return False


def _summary(selected: Sequence[Notebook], outcomes: Mapping[str, _Outcome], folder: Path) -> str:
    """A line for each notebook, and where the report is."""
    rows = [(n.name, outcomes.get(n.name, _Outcome("not run"))) for n in selected]
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{name:{width}}  {f'{outcome.seconds:8.1f} s' if outcome.seconds is not None else '':10}  {outcome.state}"
        for name, outcome in rows
    ]
    report = folder / "report.html"
    return "\n".join(["", *lines, "", f"report: {report}" if report.exists() else f"results: {folder}"])


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cadetlib.reproduce", description="Run a profile's notebooks in order.")
    parser.add_argument("profile", help="a folder of params/, such as digits")
    parser.add_argument("--only", metavar="02,04", help="these notebooks alone; what they need must be on disk")
    parser.add_argument("--force", action="store_true", help=FORCE)
    parser.add_argument(
        "--gpus",
        metavar="0,1",
        help="run notebooks side by side, one on each of these GPUs (pretraining: on all, up to its `processes`)",
    )
    parser.add_argument("--output", metavar="DIR", default="", help="folder of the results (outputs/PROFILE in the checkout)")
    slurm = parser.add_argument_group("on a cluster")
    slurm.add_argument("--slurm", action="store_true", help="submit each notebook as a job, after those it needs; wait for none")
    slurm.add_argument("--slurm-partition", metavar="P", default="", help="the cluster's default, unless given")
    slurm.add_argument("--slurm-minutes", metavar="N", type=int, default=1440, help="limit of a job, which then goes on (1440)")
    slurm.add_argument("--slurm-gpus", metavar="N", type=int, default=1, help="of a job; pretraining gets its `processes` (1)")
    slurm.add_argument("--slurm-cpus", metavar="N", type=int, default=8, help="for each GPU, or without any for the job (8)")
    return parser.parse_args(arguments)


def _absolute(output: str) -> str:
    """A folder as given on the command line, from the working directory on; "" when none was given."""
    return str(Path(output).expanduser().absolute()) if output else ""


def _to_continue(chosen: argparse.Namespace) -> str:
    """The command that goes on from here; what --force was to redo and has been redone is not redone once more."""
    given = {"--only": chosen.only, "--gpus": chosen.gpus, "--output": _absolute(chosen.output)}
    options = [part for name, value in given.items() if value for part in (name, value)]
    return f"{record.interpreter()} -m cadetlib.reproduce {shlex.join([chosen.profile, *options])}"


def reproduce(chosen: argparse.Namespace, job_of: str = "") -> int:
    """Check everything, then run or submit; the exit code. ValueError for what is refused before anything starts.

    job_of: the one notebook of `--only`, when jobs of other notebooks may be at work in the same folder.

    >>> reproduce(_arguments(["digits", "--only", "zz"]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: --only: found 'zz', expected numbers or names out of 00_setup, ...
    """
    root = record.checkout()
    notebooks = profiles.notebooks_of(chosen.profile, root)
    selected = profiles.select(notebooks, chosen.only)
    if chosen.slurm and chosen.gpus:
        raise ValueError(f"--gpus: found {chosen.gpus!r} beside --slurm, expected one of them (--slurm-gpus counts a job's)")
    slots = processes.gpu_slots(chosen.gpus)
    missing = profiles.missing_data(selected) + profiles.missing_weights(selected)
    if missing:
        raise ValueError("\n".join(missing))
    output = _absolute(chosen.output)
    folder = record.output_folder(chosen.profile, output)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder, job_of):
        job = Job(root, folder, output, library_digest(), data_listing(), chosen.force)
        _check_needs(notebooks, selected, job)
        for n in selected if chosen.force else ():
            _done_file(folder, n.name).unlink(missing_ok=True)
        if chosen.slurm:
            from cadetlib import slurm

            request = slurm.Request(chosen.slurm_partition, chosen.slurm_minutes, chosen.slurm_gpus, chosen.slurm_cpus)
            slurm.submit(chosen.profile, selected, job, request, _say)
            return 0
        outcomes = _run_all(selected, job, slots)
        _say(_summary(selected, outcomes, folder))
        for outcome in outcomes.values():
            if outcome.failure:
                _say(f"\n{outcome.failure}")
        if any(n.parameters.get("dry_run") for n in notebooks):
            _say("this was a dry run: no number of it is a result")
        if all(is_done(folder, n.name) for n in selected):
            return 0
    _say(f"\nto go on from here, in {record.checkout()}: {_to_continue(chosen)}")
    return 1


def run_job(profile: str, name: str, output: str = "", force: bool = False) -> int:
    """Run one notebook as `--only` does, but beside jobs of other notebooks in the same folder; the exit code.

    >>> run_job("no-such-profile", "00_setup")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: profile: found 'no-such-profile', expected one of ...
    """
    options = ["--only", name, *(["--output", output] if output else []), *(["--force"] if force else [])]
    return reproduce(_arguments([profile, *options]), job_of=name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this module; its exit code."""
    chosen = _arguments(arguments)
    try:
        with _signals_end_it():
            return reproduce(chosen)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except SystemExit:
        _say(f"\nended with all it started; to go on from here, in {record.checkout()}: {_to_continue(chosen)}")
        raise


if __name__ == "__main__":
    sys.exit(main())
