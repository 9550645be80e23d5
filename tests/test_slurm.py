"""Slurm: what sbatch is told by a fake one that notes its scripts, and what a job does when its script is run."""

import json
import os
import re
import subprocess
import sys

import pytest

from cadetlib import record, reproduce, slurm

pytest.importorskip("submitit", reason="an optional extra: pip install -r requirements-slurm.txt")

SBATCH = """#!{python}
import pathlib, sys
folder = pathlib.Path({folder!r})
number = 101 + len(list(folder.glob("*.sh")))
(folder / f"{{number}}.sh").write_text(pathlib.Path(sys.argv[1]).read_text())
print("Submitted batch job", number)
"""
SRUN = """#!{python}
import os, sys
os.execv({python!r}, sys.argv[sys.argv.index({python!r}) :])  # what stands after srun's options
"""


@pytest.fixture
def cluster(checkout, tmp_path, monkeypatch):
    """A folder on PATH with sbatch and srun, in which the scripts of the jobs 101, 102, ... are found."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (folder / name).write_text(text.format(python=sys.executable, folder=str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(reproduce, "library_digest", lambda: "library")
    return folder


@pytest.fixture
def chain(write_notebook):
    """00 <- 01 <- 03 and 00 <- 02 <- 03; 01 trains on four GPUs."""
    write_notebook("00_a", "run.save(x=1)")
    write_notebook("01_b", "run.need('00_a')", "run.save(x=2)", parameters="processes = 1  # GPUs\n", yaml="processes: 4\n")
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
    (notebook,) = [n for n in reproduce.notebooks_of("tiny") if n.name == name]
    folder = checkout / "outputs/tiny"
    key = reproduce.key_of(notebook, folder, "library", reproduce.data_listing())
    reproduce.mark_done(folder, name, key, record.read(run.path))


def test_each_notebook_is_a_job_after_those_it_needs(cluster, chain, capsys):
    options = ["--slurm-partition", "learn fair", "--slurm-minutes", "90", "--slurm-cpus", "5"]
    assert reproduce.main(["tiny", "--slurm", *options]) == 0
    found = jobs(cluster)
    assert [job["job-name"] for job in found] == ["cadet-00_a", "cadet-01_b", "cadet-02_c", "cadet-03_d"]
    assert [job.get("dependency") for job in found] == [None, "afterok:101", "afterok:101", "afterok:103:102"]
    assert [job.get("kill-on-invalid-dep") for job in found] == [None, "yes", "yes", "yes"]
    assert [(job["gpus-per-node"], job["cpus-per-task"]) for job in found] == [("1", "5"), ("4", "20"), ("1", "5"), ("1", "5")]
    assert {(job["partition"], job["time"], job["ntasks-per-node"]) for job in found} == {("learn fair", "90", "1")}
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["00_a  job 101", "01_b  job 102, after 101", "02_c  job 103, after 101", "03_d  job 104, after 103, 102"]


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


@pytest.mark.slow
def test_a_job_does_what_only_does_and_its_failure_is_an_exit_code(cluster, checkout, write_notebook):
    """The script that sbatch was given, run as Slurm would, while another notebook's job is at work in the same folder."""
    write_notebook("00_a", "run.save(x=1, forced=record.forced())")
    write_notebook("01_b", "run.need('00_a')", "raise RuntimeError('odd')")
    assert reproduce.main(["tiny", "--slurm", "--force"]) == 0

    def execute(number):
        variables = dict(SLURM_JOB_ID=str(number), SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_PROCID="0", SLURM_LOCALID="0")
        return subprocess.run(
            ["bash", cluster / f"{number}.sh"], env=os.environ | variables, capture_output=True, text=True, timeout=200
        )

    folder = checkout / "outputs/tiny"
    with reproduce._alone_in(folder, "02_other"):
        done = execute(101)
        assert done.returncode == 0, done.stdout + done.stderr
        failed = execute(102)
    assert failed.returncode != 0 and "01_b failed" in failed.stdout + failed.stderr
    assert record.load(folder / "00_a.json")[0] == dict(x=1, forced=True)
    assert json.loads((folder / ".done/00_a.json").read_text())["key"] and not reproduce.is_done(folder, "01_b")


def test_jobs_share_a_folder_by_notebook_and_with_nobody_else(tmp_path):
    with reproduce._alone_in(tmp_path, "00_a"), reproduce._alone_in(tmp_path, "01_b"):
        for notebook, expected in (("", "at work here"), ("01_b", "at work on 01_b")):
            with pytest.raises(ValueError, match=expected), reproduce._alone_in(tmp_path, notebook):
                pass
    with reproduce._alone_in(tmp_path), pytest.raises(ValueError, match="at work here"), reproduce._alone_in(tmp_path, "00_a"):
        pass


def test_a_requeued_job_does_not_begin_anew(chain):
    job = slurm.NotebookJob("tiny", "01_b", "/shared", force=True, environment=(("CADET_DATA", "/data"),))
    again = job.checkpoint()
    assert again.function == slurm.NotebookJob("tiny", "01_b", "/shared", False, (("CADET_DATA", "/data"),))


def test_what_cannot_be_submitted_is_refused(chain, cluster, capsys, monkeypatch):
    for options, expected in {
        ("--slurm-minutes", "0"): "--slurm-minutes: found 0",
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
