"""Results and where they come from: what a notebook computed, written atomically, read back only when whole.

A results file holds `results`, their `provenance` (commit, parameters, versions, hardware, seconds) and the `digest` of the
results, so that a half-written, edited or foreign file is told from the real one. Figures are drawn from what was read back.
"""

from __future__ import annotations

import ast
import base64
import dataclasses
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cadetlib import parameters, processes

PACKAGES = ("torch", "torchvision", "numpy", "timm", "cadetlib")


def checkout() -> Path:
    """The folder that holds notebooks/, params/ and outputs/: CADET_ROOT, else the one around this package.

    >>> (checkout() / "cadetlib" / "record.py").is_file()
    True
    """
    return Path(os.environ.get("CADET_ROOT") or Path(__file__).resolve().parents[1]).resolve()


def data_root() -> Path:
    """The folder of image sets: CADET_DATA, else data/ in the checkout.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, CADET_DATA="~/sets"):
    ...     data_root() == Path.home() / "sets"
    True
    """
    return Path(os.environ.get("CADET_DATA") or checkout() / "data").expanduser()


def interpreter() -> str:
    """This Python, as one calls it in the checkout: .venv/bin/python, or the whole path of another environment's.

    >>> Path(shlex.split(interpreter())[0]).name == Path(sys.executable).name
    True
    """
    path = Path(sys.executable)
    return shlex.quote(str(path.relative_to(checkout()) if path.is_relative_to(checkout()) else path))


def output_folder(profile: str, output: str = "") -> Path:
    """Where a profile's results go: `output` (a relative one counts from the checkout), else outputs/<profile>.

    >>> output_folder("digits").relative_to(checkout()).as_posix(), output_folder("digits", "/results/here").as_posix()
    ('outputs/digits', '/results/here')
    """
    return checkout() / (Path(output).expanduser() if output else Path("outputs", profile))


def is_dry_run(profile: str) -> bool:
    """Whether no number of a profile is a result: `dry_run` in params/<profile>/00_setup.yaml; False without that file.

    >>> is_dry_run("imagenet-dry-run"), is_dry_run("digits"), is_dry_run("one of my own")
    (True, False, False)
    """
    file = checkout() / "params" / profile / "00_setup.yaml"
    return file.exists() and bool(parameters.read_yaml(file).get("dry_run"))


# --- files that are whole or not there ----------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """A results file, verified.

    >>> Loaded(results={"auroc": 0.9}, provenance={"notebook": "04_cadet_tables"}, digest=digest({"auroc": 0.9})).results
    {'auroc': 0.9}
    """

    results: dict[str, Any]
    provenance: dict[str, Any]
    digest: str


def write_atomically(path: str | Path, content: bytes | str) -> Path:
    """Write a file under a temporary name, force it to the disk, rename it: a reader finds the old, the new, or none.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_atomically(f"{folder}/new/note.txt", "whole").read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text. Floats keep every digit; NaN and infinities are refused.

    >>> canonical({"b": [0.1, None], "a": "γ"})
    '{"a":"γ","b":[0.1,null]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical text, in hexadecimal.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), len(digest({}))
    (True, 64)
    """
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def read(path: str | Path) -> Loaded:
    """A results file that verifies. FileNotFoundError when there is none, ValueError when it is damaged or something else.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = start("08_report", {"output": folder}).save(auroc=0.9)
    ...     read(path).results
    {'auroc': 0.9}
    """
    path = Path(path)
    try:
        document = json.loads(path.read_bytes())
        results, provenance, stated = document["results"], document["provenance"], document["digest"]
        reason = "" if isinstance(results, dict) and isinstance(provenance, dict) else "results that are no mapping"
        reason = reason or ("" if digest(results) == stated else "results that do not match their digest")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no results in it ({type(error).__name__}: {error})"
    if reason:
        raise ValueError(
            f"{path}: found {reason}, expected a file written by record.save; it is damaged or foreign: "
            f"delete it and run the notebook {path.stem} again"
        )
    return Loaded(results, provenance, stated)


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results, provenance) of a results file that verifies; errors as in `read`.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     results, provenance = load(start("08_report", {"output": folder}).save(auroc=0.9))
    >>> results, provenance["notebook"]
    ({'auroc': 0.9}, '08_report')
    """
    return read(path)[:2]


def result(path: str | Path) -> Loaded:
    """`read` for those who keep numbers or judge by them: ValueError also for the results of a dry run.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     result(start("08_report", {"output": folder, "profile": "imagenet-dry-run"}).save(auroc=0.9))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...08_report.json: found results of a dry run, expected numbers that are results; run a profile in full
    """
    found = read(path)
    if found.provenance.get("dry_run"):
        raise ValueError(f"{path}: found results of a dry run, expected numbers that are results; run a profile in full")
    return found


# --- files beside the results -------------------------------------------------------------------------------------------


def kept_files(folder: Path, name: str, results: Any) -> dict[str, str]:
    """What the notebook `name` left beside its results file: path below `folder` -> SHA-256 of the file.

    These are its figures, and the files that its results name by their path from the folder: encoders, image sets, a report.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = write_atomically(f"{folder}/encoder.safetensors", "weights")
    ...     list(kept_files(Path(folder), "01_pretraining", {"encoder": "encoder.safetensors", "note": "no file"}))
    ['encoder.safetensors']
    """
    named = {text for text in _texts(results) if _names_a_file(folder, text)}
    about = [path for path in (folder / "figures").glob("*.json") if _drawn_by(path) == name]
    drawn = {f"figures/{path.stem}.{suffix}" for path in about for suffix in ("svg", "png", "json")}
    return {path: file_digest(folder / path) for path in sorted(named | drawn)}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file_digest(write_atomically(f"{folder}/abc.txt", "abc"))[:8]
    'ba7816bf'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _texts(value: Any) -> Iterator[str]:
    """All strings in plain results, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _names_a_file(folder: Path, text: str) -> bool:
    path = Path(text)
    return not path.is_absolute() and ".." not in path.parts and os.path.isfile(folder / path)  # False also for what is no path


def _drawn_by(about: Path) -> str | None:
    """The notebook that a figure's description names; None when the file is no description."""
    try:
        return str(json.loads(about.read_bytes())["notebook"])
    except (ValueError, KeyError, TypeError):
        return None


def forced() -> bool:
    """Whether this notebook is run by `reproduce --force`, which redoes also what was finished before: CADET_FORCE is 1.

    >>> forced()
    False
    """
    return os.environ.get("CADET_FORCE") == "1"


def set_aside(folder: str | Path) -> Path | None:
    """Rename a folder, as by --force, to the first free of <folder>.old-1, .old-2, ... -> its new path; None without one.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     (Path(folder) / "contrastive").mkdir()
    ...     set_aside(f"{folder}/contrastive").name, set_aside(f"{folder}/contrastive")
    ('contrastive.old-1', None)
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    aside = next(path for i in itertools.count(1) if not (path := folder.with_name(f"{folder.name}.old-{i}")).exists())
    return folder.rename(aside)


# --- what can be saved --------------------------------------------------------------------------------------------------


def plain(value: Any, folder: str | Path = ".", name: str = "results") -> Any:
    """`value` as JSON knows it: scalars, lists and mappings with string keys.

    Arrays and tensors, tuples, named tuples, dataclasses and paths below `folder` (from there on) are converted. ValueError,
    by name, for NaN and infinities (save None where a number does not exist), for other keys and for other types.

    >>> plain({"p_values": (0.5, None)})
    {'p_values': [0.5, None]}
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value  # numpy's strings are str by inheritance
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name}: found {value}, expected a finite number, or None where there is none")
        return float(value)
    if isinstance(value, Path):
        return _relative(value, Path(folder), name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise ValueError(f"{name}: found the key {wrong!r}, expected strings (write str(key))")
        return {str(key): plain(item, folder, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, folder, f"{name}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy's and torch's scalars and arrays
        listed = value.tolist()
        if not isinstance(listed, type(value)):
            return plain(listed, folder, name)
    raise ValueError(f"{name}: found {type(value).__name__}, expected numbers, strings, arrays, lists, mappings or dataclasses")


def _relative(path: Path, folder: Path, name: str) -> str:
    if not path.is_absolute():
        return path.as_posix()
    if path.is_relative_to(folder.resolve()):
        return path.relative_to(folder.resolve()).as_posix()
    raise ValueError(
        f"{name}: found the absolute path {path}, expected one below {folder}: results do not name a machine's folders"
    )


# --- where results come from --------------------------------------------------------------------------------------------


def git_state(root: Path) -> dict[str, Any] | None:
    """The checkout's commit and whether files differ from it; None without git, without a commit, or below another repository.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     print(git_state(Path(folder)))
    None
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on; None for what is not installed.

    >>> list(versions())
    ['python', 'torch', 'torchvision', 'numpy', 'timm', 'cadetlib']
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB and names of the GPUs; never the machine's name.

    >>> list(hardware())
    ['cpu', 'cores', 'memory_gib', 'gpus']
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        memory = None
    return {"cpu": _cpu(), "cores": cores, "memory_gib": memory, "gpus": _gpus()}


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")  # a run that never imported torch has used no GPU
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _seeds(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if re.search(r"(^|_)seeds?$", name)}


def _without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters fit to be shown to others: an absolute path keeps its last part; `output` says nothing of the results."""

    def shown(value: Any) -> Any:
        if isinstance(value, list):
            return [shown(item) for item in value]
        absolute = isinstance(value, str) and value.startswith(("/", "~"))
        return f".../{Path(value).name}" if absolute else value

    return {name: shown(value) for name, value in values.items() if name != "output"}


# --- one notebook's run -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run of one notebook: where it writes, what it needs, what it saves. Made by `start`.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     run = start("08_report", {"output": folder})
    ...     _ = run.save(p_values=(0.5, 0.25))
    ...     run.path.name, run.load(), run.provenance()["parameters"]["profile"]
    ('08_report.json', {'p_values': [0.5, 0.25]}, 'digits')
    """

    name: str
    parameters: dict[str, Any]
    folder: Path
    run_id: str
    git: dict[str, Any] | None
    started: datetime
    clock: float
    dry_run: bool = False  # whether no number of it is a result
    needed: dict[str, str] = field(default_factory=dict)  # name -> digest of the results read

    @property
    def figures(self) -> Path:
        """The folder of figures."""
        return self.folder / "figures"

    @property
    def cache(self) -> Path:
        """The folder of what can be computed again."""
        return self.folder / "cache"

    @property
    def path(self) -> Path:
        """This notebook's results file."""
        return self.folder / f"{self.name}.json"

    def need(self, name: str) -> dict[str, Any]:
        """The results of an earlier notebook of this profile; when those are of a dry run, so are this one's.

        FileNotFoundError with the command that makes them; ValueError when they are damaged or of another profile.
        """
        path, profile = self.folder / f"{name}.json", self.parameters["profile"]
        if not path.exists():
            raise FileNotFoundError(_how_to_make(self, name))
        results, provenance, found = read(path)
        their_profile = provenance.get("parameters", {}).get("profile")
        if their_profile != profile:
            raise ValueError(f"{path}: found profile {their_profile!r}, expected {profile!r}; give each profile its own output")
        self.needed[name] = found
        self.dry_run |= provenance.get("dry_run", False)
        return results

    def save(self, **results: Any) -> Path:
        """Write the results (see `plain`) with their provenance; the path of the file. ValueError for NaN and infinities."""
        if not results:
            raise ValueError(f"{self.name}: found no results, expected save(name=value, ...)")
        saved = plain(results, self.folder)
        document = {"results": saved, "provenance": self.provenance(), "digest": digest(saved)}
        lines = (f'"{key}": {json.dumps(value, ensure_ascii=False, allow_nan=False)}' for key, value in document.items())
        return write_atomically(self.path, "{\n" + ",\n".join(lines) + "\n}\n")

    def load(self) -> dict[str, Any]:
        """The results as this run saved them: what figures and text are made of. ValueError when it has not saved any."""
        found = read(self.path) if self.path.exists() else None
        if found is None or found.provenance.get("run_id") != self.run_id:
            raise ValueError(f"{self.name}: found no results of this run, expected run.save(...) before run.load()")
        return found.results

    def provenance(self) -> dict[str, Any]:
        """What the results depend on, without names of machines, users or folders."""
        return {
            "notebook": self.name,
            "run_id": self.run_id,
            "dry_run": self.dry_run,
            "git": self.git,
            "parameters": _without_folders(self.parameters),
            "seeds": _seeds(self.parameters),
            "needed": self.needed,
            "versions": versions(),
            "hardware": hardware(),
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.clock, 3),
        }

    def figure(self, figure: Any, name: str, alt: str) -> Picture:
        """Save a matplotlib figure as figures/<name>.svg, .png and .json (its alternative text) and close it.

        Returns the image, which a notebook shows when it is a cell's last expression: once, since the figure is closed.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"figure: found the name {name!r}, expected letters, digits, '-', '_' and '.'")
        if not alt.strip():
            raise ValueError(f"figure {name}: found no alternative text, expected alt='what a reader sees'")
        from matplotlib import pyplot, rc_context

        with rc_context({"svg.hashsalt": name}):  # the same figure, the same file
            svg = _drawn(figure, format="svg", metadata={"Date": None})
        picture = Picture(_drawn(figure, format="png", dpi=200), alt)
        pyplot.close(figure)
        write_atomically(self.figures / f"{name}.svg", svg)
        write_atomically(self.figures / f"{name}.png", picture.png)
        about = {"name": name, "notebook": self.name, "alt": alt}
        write_atomically(self.figures / f"{name}.json", json.dumps(about, ensure_ascii=False) + "\n")
        return picture


@dataclass(frozen=True)
class Picture:
    """A PNG that a notebook shows at half its pixels, with its alternative text, which also stands for it in a log.

    >>> Picture(png=b"", alt="AUROC rises with the number of views")
    Picture(alt='AUROC rises with the number of views')
    """

    png: bytes = field(repr=False)
    alt: str

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        width, height = (int.from_bytes(self.png[at : at + 4], "big") // 2 for at in (16, 20))  # in PNG's first chunk
        content = {"image/png": base64.b64encode(self.png).decode(), "text/plain": f"[figure: {self.alt}]"}
        return content, {"image/png": {"width": width, "height": height, "alt": self.alt}}


def _drawn(figure: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight", **options)
    return buffer.getvalue()


def _how_to_make(run: Run, name: str) -> str:
    """The commands that make the results of notebook `name`, for a run that needs them."""
    profile, root = run.parameters["profile"], checkout()
    output = run.parameters["output"] and shlex.quote(str(run.folder))
    executed = shlex.quote(str((run.folder / f"{name}.ipynb").relative_to(root) if not output else run.folder / f"{name}.ipynb"))
    papermill = f"{interpreter()} -m papermill notebooks/{name}.ipynb {executed} -f params/{profile}/{name}.yaml"
    return (
        f"{run.name} needs the results of {name}, and found no {run.folder / name}.json. Run that notebook first; in {root}:\n"
        f"    {interpreter()} -m cadetlib.reproduce {profile} --only {name.split('_')[0]}"
        + (f" --output {output}" if output else "")
        + "\n"
        f"or, that one alone:\n    {papermill}" + (f" -r output {output}" if output else "")
    )


def start(name: str, namespace: Mapping[str, Any]) -> Run:
    """Begin a notebook's run, after its parameters cell: `record.start("04_cadet_tables", globals())`.

    Takes the current values of the parameters that notebooks/<name>.ipynb declares, `profile` and `output` among them, and
    checks them once more, for a notebook can be run by papermill alone or by hand. ValueError as in `parameters.validate`.
    The kernel keeps from then on the memory that it frees (`processes.keep_freed_memory`).

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     start("08_report", {"output": folder, "profile": "mine"}).parameters["profile"]
    'mine'
    """
    notebook = checkout() / "notebooks" / f"{name}.ipynb"
    if not notebook.exists():
        raise FileNotFoundError(
            f"found no {notebook}; install the package from its checkout (pip install -e .) or set CADET_ROOT"
        )
    defaults = {key: parameter.value for key, parameter in parameters.declared(notebook).items()}
    for required in ("profile", "output"):
        if not isinstance(defaults.get(required), str):
            raise ValueError(f"{notebook}: found no parameter {required}, expected a string")
    names = [*defaults, *_injected(namespace.get("In", ()))]
    values = parameters.validate(defaults, {key: namespace[key] for key in names if key in namespace}, name)
    folder = output_folder(values["profile"], values["output"])
    folder.mkdir(parents=True, exist_ok=True)
    processes.keep_freed_memory()
    run_id = os.environ.get("CADET_RUN_ID") or uuid.uuid4().hex
    dry_run = values.get("dry_run", False) or is_dry_run(values["profile"])
    return Run(name, values, folder, run_id, git_state(checkout()), datetime.now(UTC), time.monotonic(), dry_run)


def _injected(history: Sequence[str]) -> list[str]:
    """The names that papermill's own cell assigns, of which it only warns when the notebook does not declare them."""
    cells = [ast.parse(source) for source in history if source.startswith("# Parameters\n")]
    return [
        node.id for cell in cells for node in ast.walk(cell) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
