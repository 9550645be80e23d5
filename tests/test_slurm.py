"""Slurm: what is submitted and what is refused, on a fake sbatch that notes its scripts; test_slurm_cluster has a real one."""

import os
import re
import sys

import pytest

from cadetlib import profiles, record, reproduce

pytest.importorskip("submitit", reason="an optional extra: pip install -r requirements-slurm.txt")

SBATCH = """#!{python}
import pathlib, sys
folder = pathlib.Path({folder!r})
number = 101 + len(list(folder.glob("*.sh")))
(folder / f"{{number}}.sh").write_text(pathlib.Path(sys.argv[1]).read_text())
print("Submitted batch job", number)
"""


@pytest.fixture
def cluster(checkout, tmp_path, monkeypatch):
    """A folder on PATH with sbatch, and srun to be found, in which the scripts of the jobs 101, 102, ... are."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name in ("sbatch", "srun"):
        (folder / name).write_text(SBATCH.format(python=sys.executable, folder=str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(reproduce, "library_digest", lambda: "library")
    return folder


@pytest.fixture
def chain(write_notebook):
    """00 <- 01 <- 03 and 00 <- 02 <- 03."""
    write_notebook("00_a", "run.save(x=1)")
    write_notebook("01_b", "run.need('00_a')", "run.save(x=2)")
    write_notebook("02_c", "run.need('00_a')", "run.save(x=3)")
    write_notebook("03_d", "run.need('02_c')", "run.need('01_b')", "run.save(x=4)")


def told(script):
    """sbatch's options in a script."""
    return {k: v.strip("'") for k, v in re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE)}


def jobs(cluster):
    return [told(path) for path in sorted(cluster.glob("*.sh"))]


def mark_as_done(checkout, name):
    """As if the notebook had been run: results of its present key, and their mark."""
    run = record.start(name, {"profile": "tiny", "output": ""})
    run.save(x=1)
    (notebook,) = [n for n in profiles.notebooks_of("tiny") if n.name == name]
    folder = checkout / "outputs/tiny"
    key = reproduce.key_of(notebook, folder, "library", reproduce.data_listing())
    reproduce.mark_done(folder, name, key, record.read(run.path))


def test_what_is_done_is_not_submitted_and_not_waited_for(cluster, chain, checkout, capsys):
    for name in ("00_a", "02_c"):
        mark_as_done(checkout, name)
    (checkout / "params/tiny/02_c.yaml").write_text("")
    assert reproduce.main(["tiny", "--slurm", "--slurm-gpus", "0"]) == 0
    found = jobs(cluster)
    assert [(job["job-name"], job.get("dependency")) for job in found] == [("cadet-01_b", None), ("cadet-03_d", "afterok:101")]
    assert not any("gpus-per-node" in job for job in found) and {job["cpus-per-task"] for job in found} == {"8"}
    assert capsys.readouterr().out.count("skipped, unchanged") == 2
    assert reproduce.main(["tiny", "--slurm", "--force", "--only", "02"]) == 0  # 00 is left as it is
    assert [job["job-name"] for job in jobs(cluster)[2:]] == ["cadet-02_c"]
    assert not reproduce.is_done(checkout / "outputs/tiny", "02_c") and reproduce.is_done(checkout / "outputs/tiny", "00_a")


def test_jobs_share_a_folder_by_notebook_and_with_nobody_else(tmp_path):
    with reproduce._alone_in(tmp_path, "00_a"), reproduce._alone_in(tmp_path, "01_b"):
        for notebook, expected in (("", "at work here"), ("01_b", "at work on 01_b")):
            with pytest.raises(ValueError, match=expected), reproduce._alone_in(tmp_path, notebook):
                pass
    with reproduce._alone_in(tmp_path), pytest.raises(ValueError, match="at work here"), reproduce._alone_in(tmp_path, "00_a"):
        pass


def test_what_cannot_be_submitted_is_refused(chain, cluster, capsys, monkeypatch):
    for options, expected in {
        ("--slurm-minutes", "2"): "--slurm-minutes: found 2, expected a whole number of at least 3",
        ("--gpus", "0"): "--gpus: found '0' beside --slurm",
    }.items():
        assert reproduce.main(["tiny", "--slurm", *options]) == 2
        assert expected in capsys.readouterr().err
    (cluster / "srun").unlink()
    monkeypatch.setenv("PATH", str(cluster))
    assert reproduce.main(["tiny", "--slurm"]) == 2
    assert "--slurm: found no Slurm here" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert reproduce.main(["tiny", "--slurm"]) == 2
    assert "--slurm: found no submitit" in capsys.readouterr().err
    assert not jobs(cluster)
