"""Results: what is read is what was saved, or an error; and where it came from."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from cadetlib import record


class Interval(NamedTuple):
    low: float
    high: float


@dataclass
class Row:
    name: str
    interval: Interval


@pytest.fixture
def run(write_notebook):
    write_notebook("01_a", parameters="seed = 3  # seed\ntau = 0.5  # temperature\n")
    return record.start("01_a", {"profile": "tiny", "output": "", "seed": 3, "tau": 1})


def test_results_come_back_as_json_knows_them(run, checkout):
    path = run.save(
        scalars=[np.float32(0.1), np.int64(2), np.bool_(True), torch.tensor(0.1), np.str_("x"), None, True, 3],
        array=np.arange(6, dtype=np.uint8).reshape(2, 3),
        tensor=torch.arange(4.0, requires_grad=True, dtype=torch.float64).reshape(2, 2).bfloat16(),
        rows=(Row("PGD", Interval(0.25, 0.5)), {"a": {"b": Interval(0, 1)}}),
        weights=run.cache / "encoder.safetensors",
    )
    assert path == checkout / "outputs" / "tiny" / "01_a.json"
    expected = {
        "scalars": [float(np.float32(0.1)), 2, True, float(torch.tensor(0.1)), "x", None, True, 3],
        "array": [[0, 1, 2], [3, 4, 5]],
        "tensor": [[0.0, 1.0], [2.0, 3.0]],
        "rows": [{"name": "PGD", "interval": {"low": 0.25, "high": 0.5}}, {"a": {"b": {"low": 0, "high": 1}}}],
        "weights": "cache/encoder.safetensors",
    }
    assert run.load() == expected
    results, provenance = record.load(path)
    text = json.dumps(expected, sort_keys=True, separators=(",", ":"))
    assert json.loads(path.read_text())["digest"] == hashlib.sha256(text.encode()).hexdigest()
    assert results == expected
    assert provenance["seeds"] == {"seed": 3}
    assert provenance["parameters"] == {"profile": "tiny", "seed": 3, "tau": 1.0}
    assert provenance["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert str(checkout) not in path.read_text()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "results.table.pgd: found nan"),
        ([0.5, float("-inf")], r"results.table.pgd\[1\]: found -inf"),
        (np.array([[1, np.nan]], np.float32), r"results.table.pgd\[0\]\[1\]: found nan"),
        (torch.tensor(float("inf")), "found inf, expected a finite number, or None"),
        ({3: 0.5}, "found the key 3, expected strings"),
        (1j, "found complex"),
        ({1, 2}, "found set"),
        (Path("/elsewhere/x"), "found the absolute path /elsewhere/x"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(run, value, message):
    with pytest.raises(ValueError, match=message):
        run.save(table={"pgd": value})
    assert not run.path.exists()


def test_no_damaged_file_is_read(run):
    content = run.save(auroc=[0.25, 0.5], name="PGD").read_bytes()
    document = json.loads(content)
    foreign = [b"", b"[]", b"{}", b"\x89PNG", json.dumps({"results": [], "provenance": {}, "digest": record.digest([])}).encode()]
    truncated = [content[:length] for length in range(len(content.rstrip()))]
    edited = [
        content.replace(b"0.25", b"0.35"),
        content.replace(b"0.25", b"NaN"),
        content.replace(document["digest"].encode(), b"0" * 64),
    ]
    for damaged in foreign + truncated + edited:
        run.path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"01_a.json: found .*, expected .*delete it and run the notebook 01_a again"):
            record.load(run.path)
    run.path.write_bytes(content)
    assert record.load(run.path)[0] == document["results"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, stop = tmp_path / "x.txt", threading.Event()
    contents = [bytes([c]) * 300_000 for c in b"ab"]
    record.write_atomically(path, contents[0])

    def write():
        while not stop.is_set():
            for content in contents:
                record.write_atomically(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    seen = {path.read_bytes() for _ in range(300)}
    stop.set()
    writer.join()
    assert seen <= set(contents)


def test_a_failed_write_leaves_what_was_there(run, monkeypatch):
    before = run.save(x=1).read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.save(x=2)
    assert run.path.read_bytes() == before
    assert [p.name for p in run.folder.iterdir()] == ["01_a.json"]


def test_results_of_a_dry_run_say_so_and_are_taken_for_no_results(checkout, write_notebook):
    """The profile's 00_setup.yaml decides; what is made from the results of a dry run is of a dry run too."""
    profile = {"profile": "tiny", "output": ""}
    for name in ("01_a", "02_b", "03_c"):
        write_notebook(name)
    (checkout / "params" / "tiny" / "00_setup.yaml").write_text("dry_run: true\n")
    dry = record.start("01_a", profile).save(auroc=0.9)
    assert '"dry_run": true' in dry.read_text() and record.read(dry).results == {"auroc": 0.9}
    with pytest.raises(ValueError, match=r"01_a\.json: found results of a dry run"):
        record.result(dry)
    (checkout / "params" / "tiny" / "00_setup.yaml").write_text("dry_run: false\n")
    from_dry = record.start("02_b", profile)
    from_dry.need("01_a")
    with pytest.raises(ValueError, match=r"02_b\.json: found results of a dry run"):
        record.result(from_dry.save(auroc=0.9))
    assert record.result(record.start("03_c", profile).save(auroc=0.9)).provenance["dry_run"] is False


def test_need_reads_results_of_this_profile_or_says_what_to_run(run, write_notebook, checkout, monkeypatch):
    write_notebook("02_b")
    later = record.start("02_b", {"profile": "tiny", "output": ""})
    with pytest.raises(FileNotFoundError) as error:
        later.need("01_a")
    assert f"{sys.executable} -m cadetlib.reproduce tiny --only 01\n" in str(error.value)
    assert f"{sys.executable} -m papermill notebooks/01_a.ipynb outputs/tiny/01_a.ipynb -f params/tiny/01_a.yaml" in str(
        error.value
    )
    monkeypatch.setattr(sys, "executable", str(checkout / ".venv/bin/python"))
    with pytest.raises(FileNotFoundError, match=r"\n    .venv/bin/python -m cadetlib.reproduce tiny --only 01\n"):
        later.need("01_a")
    run.save(x=0.5)
    assert later.need("01_a") == {"x": 0.5}
    assert later.provenance()["needed"] == {"01_a": hashlib.sha256(b'{"x":0.5}').hexdigest()}

    other = record.start("02_b", {"profile": "big", "output": str(run.folder)})
    with pytest.raises(ValueError, match="found profile 'tiny', expected 'big'"):
        other.need("01_a")
    elsewhere = record.start("02_b", {"profile": "tiny", "output": "my results"})
    with pytest.raises(FileNotFoundError) as error:
        elsewhere.need("01_a")
    assert f"--only 01 --output '{checkout}/my results'\n" in str(error.value)
    assert f"-r output '{checkout}/my results'" in str(error.value)


def test_a_forced_run_sets_the_old_one_aside(tmp_path, monkeypatch):
    folder = tmp_path / "contrastive-1234abcd"
    assert record.set_aside(folder) is None
    for i in (1, 2):
        record.write_atomically(folder / "encoder.bin", str(i))
        assert record.set_aside(folder) == tmp_path / f"contrastive-1234abcd.old-{i}"
    assert [(tmp_path / f"{folder.name}.old-{i}/encoder.bin").read_text() for i in (1, 2)] == ["1", "2"]
    assert not folder.exists()
    for value, expected in {None: False, "0": False, "1": True}.items():
        monkeypatch.delenv("CADET_FORCE", raising=False)
        if value is not None:
            monkeypatch.setenv("CADET_FORCE", value)
        assert record.forced() is expected


def test_load_gives_only_what_this_run_saved(run):
    run.save(x=1)
    again = record.start("01_a", {"profile": "tiny", "output": "", "seed": 3, "tau": 0.5})
    with pytest.raises(ValueError, match="found no results of this run"):
        again.load()
    again.save(x=2)
    assert again.load() == {"x": 2}


def test_start_checks_what_papermill_only_warns_of(run, checkout):
    values = {"profile": "tiny", "output": "", "seed": 3, "tau": 0.5}
    with pytest.raises(ValueError, match=r"tau: found the string '1e-3'.*write 0.001"):
        record.start("01_a", values | {"tau": "1e-3"})
    notebook = load_notebook_node(str(checkout / "notebooks" / "01_a.ipynb"))
    injected = parameterize_notebook(notebook, {"sead": 4}, kernel_name="python3", language="python").cells[1].source
    with pytest.raises(ValueError, match=r"sead: unknown parameter, did you mean seed\?"):
        record.start("01_a", values | {"sead": 4, "In": ["", "x = 1", injected]})
    with pytest.raises(FileNotFoundError, match="set CADET_ROOT"):
        record.start("09_z", values)


def test_provenance_names_the_commit_and_no_folder_of_this_machine(run, checkout):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(checkout), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert record.git_state(checkout) is None
    git("init")
    assert record.git_state(checkout) is None  # no commit yet
    git("add", "notebooks", "params")
    git("commit", "-m", "first")
    assert record.git_state(checkout) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (checkout / "new.py").write_text("")
    assert record.git_state(checkout) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    assert record.git_state(checkout / "notebooks") is None  # another repository's folder

    run.parameters |= {"images": "/home/someone/cats", "folders": ["~/dogs", "birds"]}
    shown = run.provenance()["parameters"]
    assert (shown["images"], shown["folders"], "output" in shown) == (".../cats", [".../dogs", "birds"], False)


def test_a_figure_is_saved_twice_the_same_with_its_alternative_text(run):
    from matplotlib import pyplot

    files = []
    for _ in range(2):
        figure, axes = pyplot.subplots(figsize=(2, 1))
        axes.plot([0, 1], label="a")
        axes.legend()
        shown, metadata = run.figure(figure, "line", alt="a line, rising")._repr_mimebundle_()
        assert pyplot.get_fignums() == []
        files.append([(run.figures / f"line.{suffix}").read_bytes() for suffix in ("svg", "png", "json")])
    assert files[0] == files[1]
    assert files[0][0].startswith(b"<?xml") and files[0][1].startswith(b"\x89PNG")
    assert json.loads(files[0][2]) == {"name": "line", "notebook": "01_a", "alt": "a line, rising"}
    height, width = pyplot.imread(run.figures / "line.png").shape[:2]
    assert metadata["image/png"] == {"width": width // 2, "height": height // 2, "alt": "a line, rising"}
    assert shown["text/plain"] == "[figure: a line, rising]"
    for name, alt in (("a/b", "x"), ("", "x"), ("line", " ")):
        with pytest.raises(ValueError, match="expected"):
            run.figure(None, name, alt=alt)
