"""p-values for millions of images on many machines, through Ray Data: a folder or an object store in, Parquet out.

    python -m cadetlib.ray_score --detector detector.safetensors --images s3://bucket/images --out s3://bucket/p_values \\
        --alpha 0.05 --address auto

Images are read and decoded by tasks on CPU workers, scored by actors that hold the detector, on a GPU each where there are
any, and written as Parquet. What is scheduled where, what is held back, and what is done again when a machine is lost is
Ray's business. The detector and its encoder are read once, where the command runs, and reach the actors through Ray.

Object stores are pyarrow's: for s3:// the endpoint and the key are those of AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, the key on every machine. It may list and read the images, and list, read and write below --out; no more.

One row an image, with the numbers of `cadetlib.score`, null where its table is empty. Which images are done is read from the
Parquet files in --out, so that the same command goes on where an earlier one was stopped. Exit codes: those of `cadetlib.score`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadetlib import checks, encoders, image_files, processes, record, score, thresholds
from cadetlib.cadet import CADet
from cadetlib.chunks import Decoded, images_per_chunk, images_per_step, rows_of_chunk
from cadetlib.score_table import COLUMNS, Settings, Summary

_LACK = ""
try:  # an optional extra: its lack is said to those who score, not to whoever imports the package
    import pyarrow as pa
    import ray
    import ray.data
    from pyarrow import compute, dataset, fs, parquet
except ModuleNotFoundError as error:
    pa = ray = None  # type: ignore[assignment]
    _LACK = f"found no module {error.name}, expected those of `pip install -r requirements-ray.txt`, here and on every machine"

SETTINGS = "_settings.json"  # readers of Parquet folders pass over names with an underscore
_THREADS = 8  # that read in one task: an object store answers slowly and many at once
_MAX_RETRIES = 10  # of a task whose object store says that it is overloaded, or does not answer
_READER_BYTES = 640 * 2**20  # of memory that a task takes which reads, beside its images: measured, and a quarter more
_BLOCKS_PER_ACTOR = 4  # at least, so that no actor waits long for the last one


def _check_out(out: str) -> None:
    """`out` may be a folder, and what reads and writes it is installed."""
    if out.endswith(".csv"):
        raise ValueError(f"{out}: found the name of a table, expected a folder of Parquet files; tables are cadetlib.score's")
    if _LACK:
        raise ModuleNotFoundError(_LACK)


# --- files, wherever they are -------------------------------------------------------------------------------------------


def _place(uri: str) -> tuple[Any, str]:
    """The pyarrow file system of a folder and the folder's path there: s3://, gs://, abfs://, hdfs:// or a local path."""
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).resolve())
    filesystem, path = fs.FileSystem.from_uri(uri)
    return filesystem, path.rstrip("/")


def _listed(uri: str) -> list[str]:
    """Paths, from the folder on, of all images below it, in a fixed order; FileNotFoundError when there is none.

    ValueError for a name that is not UTF-8, which Parquet's text could not hold.
    """
    filesystem, folder = _place(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        paths = list(image_files.images_below(folder))  # follows links to folders, and lists links that lead nowhere
    else:
        found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
        paths = sorted(i.path[len(folder) + 1 :] for i in found if i.type is fs.FileType.File and image_files.is_image(i.path))
    if not paths:
        raise FileNotFoundError(f"found no image below {uri}, expected files ending in {image_files.KINDS}")
    for path in paths:
        if path.encode(errors="replace").decode() != path:
            raise ValueError(f"found the file name {os.fsencode(path)!r}, expected UTF-8; rename it, or use cadetlib.score")
    return paths


class _Named(io.BytesIO):
    """The bytes of a file under its name: what Pillow says of them is what it would say of the file."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self._name = name

    def __repr__(self) -> str:
        return repr(self._name)

    def __str__(self) -> str:
        return self._name


def _decoded(content: bytes, path: str, size: int) -> Decoded:
    """`chunks.decode` of a file's bytes, with the same image and the same error.

    >>> _decoded(b"PNG", "cut.png", size=32).error
    "found no readable image (cannot identify image file 'cut.png'), expected a whole image file; replace or remove it"
    """
    try:
        return Decoded(path, image_files.read_image(_Named(content, path), size))  # type: ignore[arg-type]
    except Exception as error:  # as in `chunks.decode`
        return Decoded(path, None, str(error).replace(f"{path}: ", "") or type(error).__name__)


def _read(filesystem: Any, folder: str, path: str, size: int) -> Decoded:
    """One image. What a file system refuses is the file's error; what Ray Data calls worth a second try is raised."""
    try:
        with filesystem.open_input_stream(f"{folder}/{path}", compression=None) as file:
            content = file.read()
    except OSError as error:
        if any(sign in str(error) for sign in ray.data.DataContext.get_current().retried_io_errors):
            raise
        return Decoded(path, None, f"could not be read ({error})")
    return _decoded(content, path, size)


def _check_readable(images: str, paths: Sequence[str]) -> None:
    """PermissionError when a store lists these images and gives none: each image of it would end as a row with an error."""
    filesystem, folder = _place(images)
    if isinstance(filesystem, fs.LocalFileSystem):
        return
    for path in paths:
        try:
            with filesystem.open_input_stream(f"{folder}/{path}", compression=None) as file:
                file.read(1)
            return
        except OSError as error:
            refused = error
    raise PermissionError(
        f"{images}: found images and could read none of the first {len(paths)} ({refused}), expected a key that may read them"
    )


# --- the stages ---------------------------------------------------------------------------------------------------------


def _decode(batch: dict[str, np.ndarray], filesystem: Any, folder: str, size: int) -> dict[str, np.ndarray]:
    """Stage 1, on CPU workers: `path` (N,) -> with `image` (N, 3, size, size) uint8, black where there is an `error` (N,)."""
    with ThreadPoolExecutor(_THREADS) as pool:
        items = list(pool.map(lambda path: _read(filesystem, folder, path, size), batch["path"]))
    black = np.zeros((3, size, size), np.uint8)
    pixels = np.stack([black if item.image is None else item.image.numpy() for item in items])
    return {"path": batch["path"], "image": pixels, "error": np.array([item.error for item in items], dtype=object)}


class _Scorer:
    """Stage 2, an actor: holds the detector and turns decoded images into rows."""

    def __init__(self, detector: Any, threshold: float, device: str) -> None:
        processes.keep_freed_memory()
        self.detector: CADet = ray.get(detector)
        encoders.placed(self.detector.encoder, device)
        self.threshold = threshold

    def __call__(self, batch: dict[str, np.ndarray]) -> Any:
        columns = batch["path"], torch.from_numpy(batch["image"].copy()), batch["error"]
        chunk = [Decoded(path, None if error else image, error) for path, image, error in zip(*columns, strict=True)]
        return _table_of(rows_of_chunk(self.detector, chunk, self.threshold))


def _table_of(rows: Sequence[Sequence[str]]) -> Any:
    """Lines of `chunks.rows_of_chunk` as a pyarrow table: numbers as float64, `flagged` as bool, null for what is empty."""
    columns = dict(zip(COLUMNS, ([field or None for field in fields] for fields in zip(*rows, strict=True)), strict=True))
    numbers = {name: [v and float(v) for v in columns[name]] for name in ("score", "m_in", "m_out", "p_value")}
    flagged = [v and v == "True" for v in columns["flagged"]]
    types = {name: pa.string() for name in COLUMNS} | dict.fromkeys(numbers, pa.float64()) | {"flagged": pa.bool_()}
    return pa.table(columns | numbers | {"flagged": flagged}, schema=pa.schema(types))


def _images_per_block(n_images: int, n_actors: int, step: int, most: int = 512) -> int:
    """How many images one task reads and one Parquet file holds, about `most`: whole forward passes of `step` images.

    Few images are spread over all actors.

    >>> _images_per_block(1_000_000, 8, step=20), _images_per_block(1000, 8, step=20)
    (520, 40)
    """
    wanted = min(most, math.ceil(n_images / (_BLOCKS_PER_ACTOR * n_actors)))
    return step * math.ceil(wanted / step)


def _run(
    paths: Sequence[str], images: str, out: str, detector: CADet, threshold: float, actors: int, gpus: float, most: int
) -> None:
    """Score the images and add their rows to the folder `out`; every file of it is whole or, after a crash, has no end.

    A task that Ray repeats writes the same rows under the same name: a file's name is that of the run and the task's number.
    Ray Data begins lost actors again, and their tasks, without being asked to. Paths go in rather than `read_binary_files`,
    which ends a run at the first file that cannot be opened and passes over names with an underscore.
    """
    block = _images_per_block(len(paths), actors, images_per_step(detector), most)
    table = pa.table({"path": pa.array(paths, pa.string())})
    source, where = _place(images)  # here, since a relative folder or AWS_ENDPOINT_URL may be this machine's alone
    filesystem, folder = _place(out)
    blocks = ray.data.from_arrow([table.slice(start, block) for start in range(0, len(paths), block)])
    blocks.context.retried_map_errors = blocks.context.retried_io_errors  # by Ray Data, which pauses between the tries
    blocks.context.max_map_retries = _MAX_RETRIES
    rows = blocks.map_batches(
        _decode,  # type: ignore[arg-type]
        batch_size=None,
        batch_format="numpy",
        fn_kwargs={"filesystem": source, "folder": where, "size": detector.image_size},
        memory=_READER_BYTES + 2 * block * 3 * detector.image_size**2,  # also keeps Ray Data from reading in the actors
    )
    rows = rows.map_batches(
        _Scorer,
        batch_size=min(block, images_per_chunk(detector)),
        batch_format="numpy",
        fn_constructor_args=(ray.put(detector), threshold, "cuda" if gpus else "cpu"),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0 if gpus else 1,
        num_gpus=gpus,
    )
    rows.write_parquet(folder, filesystem=filesystem, try_create_dir=False)  # the settings are in it already


# --- what is written ----------------------------------------------------------------------------------------------------


def _settings_of(detector: CADet, images: str, threshold: float) -> dict[str, Any]:
    """What the rows of one folder have in common."""
    filesystem, folder = _place(images)
    where = hashlib.sha256(os.fsencode(f"{filesystem.type_name}://{folder}")).hexdigest()
    return Settings(detector.fingerprint(), threshold, where).stated()


def _claim(out: str, settings: dict[str, Any]) -> None:
    """Record the settings in the folder; ValueError when it holds rows of other settings, or Parquet files of something else."""
    filesystem, folder = _place(out)
    file = f"{folder}/{SETTINGS}"
    if filesystem.get_file_info(file).type is fs.FileType.NotFound:
        if _parquet_files(out):
            raise ValueError(f"{out}: found Parquet files without {SETTINGS}, expected an empty folder; choose another --out")
        _write(filesystem, file, (json.dumps(settings, indent=2) + "\n").encode())
        return
    with filesystem.open_input_stream(file) as stream:
        found = json.loads(stream.read())
    other = [key for key, value in settings.items() if found.get(key) != value]
    if other:
        raise ValueError(
            f"{out}: found rows of another {', '.join(other)}, expected those of an unfinished run of this very command; choose "
            "another --out, or remove it"
        )


def _write(filesystem: Any, file: str, content: bytes) -> None:
    if isinstance(filesystem, fs.LocalFileSystem):
        record.write_atomically(file, content)
        return
    with filesystem.open_output_stream(file, compression=None) as stream:  # an object is there when it is closed, as a whole
        stream.write(content)


def _parquet_files(out: str) -> list[str]:
    filesystem, folder = _place(out)
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return sorted(info.path for info in found if info.path.endswith(".parquet"))


def _written(out: str) -> list[str]:
    """The paths of all rows in a folder. A Parquet file that was cut short, as a crash leaves it on a disk, is removed."""
    filesystem, _ = _place(out)

    def paths_in(file: str) -> list[str]:
        try:
            with filesystem.open_input_file(file) as stream:
                return parquet.ParquetFile(stream).read(columns=["path"])["path"].to_pylist()
        except pa.ArrowInvalid:  # its end, which is written last, is not there
            filesystem.delete_file(file)
            return []

    with ThreadPoolExecutor(_THREADS) as pool:
        return [path for paths in pool.map(paths_in, _parquet_files(out)) for path in paths]


def _forget_errors(out: str) -> set[str]:
    """Remove the rows with an error, file by file, each written anew as a whole -> the paths that have no row now."""
    filesystem, _ = _place(out)

    def forget(file: str) -> list[str]:
        with filesystem.open_input_file(file) as stream:
            rows = parquet.ParquetFile(stream).read()
        failed = rows["error"].is_valid()
        if compute.any(failed).as_py():
            buffer = io.BytesIO()
            parquet.write_table(rows.filter(compute.invert(failed)), buffer)
            _write(filesystem, file, buffer.getvalue())
        return rows.filter(failed)["path"].to_pylist()

    with ThreadPoolExecutor(_THREADS) as pool:
        return {path for paths in pool.map(forget, _parquet_files(out)) for path in paths}


def _check_rows(out: str, paths: Sequence[str]) -> None:
    """Every image has its row, and one only; ValueError when not."""
    found = _written(out)
    lacking, twice = set(paths).difference(found), len(found) - len(set(found))
    if lacking:
        raise ValueError(f"{out}: found no row of {len(lacking)} images, such as {min(lacking)}; run the same command again")
    if twice:
        raise ValueError(
            f"{out}: found {twice} rows more than images, expected one row an image: two runs wrote at the same time; an image's "
            "rows are equal, so keep any one"
        )


def summary(out: str) -> Summary:
    """Counts over the rows in the folder `out`, and its first failures.

    FileNotFoundError for a folder without rows, ModuleNotFoundError without Ray Data.

    >>> summary("p_values.csv")
    Traceback (most recent call last):
    ValueError: p_values.csv: found the name of a table, expected a folder of Parquet files; tables are cadetlib.score's
    """
    _check_out(out)
    filesystem, _ = _place(out)
    files = _parquet_files(out)
    if not files:
        raise FileNotFoundError(f"{out}: found no Parquet file, expected those that `score_images` writes")
    rows = dataset.dataset(files, filesystem=filesystem)
    failed = dataset.field("error").is_valid()
    first = rows.to_table(columns=["path", "error"], filter=failed).sort_by("path").slice(0, 10).to_pylist()
    flagged = dataset.field("flagged")
    return Summary(rows.count_rows(), rows.count_rows(filter=flagged), rows.count_rows(filter=failed), first, [])


# --- the command line ---------------------------------------------------------------------------------------------------


def score_images(
    detector: CADet,
    images: str,
    out: str,
    threshold: float,
    actors: int = 1,
    gpus: float = 0,
    most: int = 512,
    retry: bool = False,
) -> Summary:
    """Write the p-value of every image below `images` that has no row in `out` yet -> what `out` then holds.

    images, out: folders, local or as URI; actors: that score, with `gpus` each; most: images in a task and a Parquet file;
    retry: images whose row is an error are read again.
    Ray is used as it is connected. ValueError for a folder of other settings, ModuleNotFoundError without Ray Data; Ray's errors
    when it gives up.

    >>> detector = CADet(torch.nn.Flatten(), n_views=4, image_size=8)
    >>> score_images(detector, "s3://bucket/incoming", "s3://bucket/p_values", threshold=0.05, actors=0)
    Traceback (most recent call last):
    ValueError: actors: found 0, expected a whole number of at least 1
    """
    checks.at_least(actors, "actors", 1)
    checks.at_least(most, "most", 1)
    _check_out(out)
    _claim(out, _settings_of(detector, images, threshold))
    paths = _listed(images)
    done = set(_written(out))
    if retry:
        done -= _forget_errors(out)
    lacking = [path for path in paths if path not in done]
    if not done:
        _check_readable(images, paths[:_THREADS])
    score._say(f"{len(paths)} images, {len(paths) - len(lacking)} done")
    if lacking:
        _run(lacking, images, out, detector, threshold, actors, gpus, most)
    _check_rows(out, paths)
    return summary(out)


def _workers(actors: int, gpus: float | None, resources: dict[str, float]) -> tuple[int, float]:
    """How many actors there are, and GPUs for each, on a cluster with `resources`; 0 and None are decided by what is there.

    Without a GPU half of the CPUs score and half read. ValueError when no CPU would be left to read images: Ray would wait.

    >>> _workers(0, None, {"CPU": 64, "GPU": 8}), _workers(0, None, {"CPU": 16}), _workers(16, 0.5, {"CPU": 64, "GPU": 8})
    ((8, 1), (8, 0), (16, 0.5))
    """
    cpus, found = int(resources.get("CPU", 0)), resources.get("GPU", 0)
    gpus = min(1, found) if gpus is None else gpus
    actors = actors or max(1, int(found / gpus) if gpus else cpus // 2)
    if not gpus and actors >= cpus:
        raise ValueError(f"found {actors} actors on {cpus} CPUs, expected at least one CPU more than actors, to read images")
    return actors, gpus


def _score(options: argparse.Namespace) -> int:
    encoder = encoders.load_encoder(options.encoder or score.recorded_encoder(Path(options.detector)))
    detector = CADet.load(options.detector, encoders.placed(encoder, "cpu"), options.batch_size)
    threshold = score._threshold(options, detector)
    ray.init(address=options.address or None, ignore_reinit_error=True, logging_level=logging.WARNING)
    actors, gpus = _workers(options.actors, options.gpus_per_actor, ray.cluster_resources())
    found = score_images(detector, options.images, options.out, threshold, actors, gpus, options.images_per_file, options.retry)
    promised = thresholds.promised(len(detector.calibration_scores_), threshold)
    score._say(
        f"{options.out}: {found.n} files, {found.n - found.failed} scored, {found.flagged} flagged at p <= {threshold:g}; "
        f"of normal images, {promised.expected:.2%} [{promised.low:.2%}, {promised.high:.2%}] would be"
    )
    failures = [(row["path"], row["error"]) for row in found.first_failed]
    return score._report_failures(found.failed, failures, "when they can be read: the same command with --retry")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cadetlib.ray_score", description="p-values for millions of images")
    parser.add_argument("--detector", required=True, help="what `cadetlib.score fit` wrote, readable where this command runs")
    parser.add_argument("--encoder", default="", help="default: the one named at `fit`")
    parser.add_argument(
        "--images", required=True, help="folder of the images to judge: s3://, gs://, or where all machines see it"
    )
    parser.add_argument("--out", required=True, help="folder of the Parquet files, likewise; an unfinished one is gone on with")
    parser.add_argument("--alpha", type=float, help="flag when the p-value is at most this; default 0.05")
    parser.add_argument("--threshold", default="", help="instead of --alpha: a threshold saved in notebook 06")
    parser.add_argument("--retry", action="store_true", help="read images again that an earlier run could not read")
    parser.add_argument("--actors", type=int, default=0, help="that score; default: one a GPU, or half of the CPUs")
    parser.add_argument("--gpus-per-actor", type=float, help="default: 1, or 0 on a cluster without GPUs")
    parser.add_argument("--address", default="", help="of the Ray cluster, such as auto; default: a new one on this machine")
    parser.add_argument("--batch-size", type=int, help="views at a time (as it was fitted)")
    parser.add_argument("--images-per-file", type=int, default=512, help="images in a task and a Parquet file, about")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this module -> its exit code."""
    options = _parser().parse_args(arguments)
    if _LACK:
        score._say(f"error: {_LACK}")
        return 1
    try:
        checks.at_least(options.actors, "actors", 0)
        checks.at_least(options.images_per_file, "images-per-file", 1)
        _check_out(options.out)
        return _score(options)
    except (ValueError, OSError, ray.exceptions.RayError) as error:
        score._say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        score._say("stopped; the same command goes on from here")
        return 130


if __name__ == "__main__":
    from cadetlib import ray_score  # under the name by which workers find it, where Ray would send __main__ as source

    sys.exit(ray_score.main())
