"""A real Slurm of two nodes: the README's script for several machines, interrupted, and a profile as a chain of jobs."""

import contextlib
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import slurm_cluster
import yaml
from test_pretrain import TINY, assert_same_run, run_folder
from test_pretrain_distributed import run_processes, wait_for_step
from test_reproduce import wait_for

from cadetlib import record, reproduce

pytestmark = pytest.mark.skipif(
    bool(slurm_cluster.missing()), reason=f"needs Debian's slurm-wlm and munge; not here: {', '.join(slurm_cluster.missing())}"
)

CHECKOUT = Path(__file__).resolve().parents[1]
LONG = 200  # seconds that a job may need on a busy machine


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture
def slurm(environment, monkeypatch):
    """Run a command of Slurm's, which also this process now finds; what it prints."""
    monkeypatch.setenv("SLURM_CONF", environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]]))

    def call(*command):
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=LONG)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def job(slurm, number):
    """What Slurm says of a job, such as JobState and Restarts."""
    return dict(re.findall(r"(\S+?)=(\S*)", slurm("scontrol", "--oneliner", "show", "job", str(number))))


def wait_for_state(slurm, number, state, meanwhile=lambda: None):
    deadline = time.monotonic() + LONG
    while (found := job(slurm, number)["JobState"]) != state:
        assert time.monotonic() < deadline, f"job {number}: found {found} for {LONG} s, expected {state}"
        meanwhile()
        time.sleep(0.3)


def start_again(slurm, number):
    """Slurm lets a requeued job wait for two minutes; here for two seconds: sooner, its node may refuse it."""

    def hurry():
        """Slurm refuses this of a job that began after its state was asked for."""
        with contextlib.suppress(AssertionError):
            slurm("scontrol", "update", f"JobId={number}", "StartTime=now")

    wait_for_state(slurm, number, "PENDING")
    time.sleep(2)
    wait_for_state(slurm, number, "RUNNING", hurry)


def script_of_the_readme(changes):
    """The README's script, as it stands there but for what this cluster has not; every change has one place."""
    found = re.search(r"^    #!/bin/bash\n(?:    .*\n)+", (CHECKOUT / "README.md").read_text(), re.MULTILINE)
    script = textwrap.dedent(found[0])
    for old, new in changes.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


@pytest.mark.slow
def test_the_script_of_the_readme_survives_a_kill_and_a_time_limit(slurm, tmp_path):
    """kill -9 of a process: torchrun begins again; Slurm's signal before the limit: saved and requeued. Bit for bit one run."""
    changed, found, log, parameters = dict(knn_every=0), tmp_path / "found", tmp_path / "job.log", tmp_path / "job.yaml"
    parameters.write_text(yaml.safe_dump(TINY | changed))
    changes = {"--nodes=4": "--nodes=2", "--nproc-per-node 8": "--nproc-per-node 1"}
    changes |= {"$HEAD:29500": f"localhost:{slurm_cluster.free_ports(1)[0]}"}  # n1 is no name of the network's
    changes |= {"params/imagenet/01_pretraining.yaml": f"{parameters} --output {found}"}
    (tmp_path / "job.sh").write_text(script_of_the_readme(changes))
    number = re.search(r"\d+", slurm("sbatch", f"--output={log}", "--time=60", str(tmp_path / "job.sh")))[0]

    wait_for_step(found, 7, LONG)
    found_here = [p for p in psutil.process_iter(["cmdline", "environ"]) if str(found) in (p.info["cmdline"] or ())]
    (first,) = [p for p in found_here if (p.info["environ"] or {}).get("RANK") == "0"]
    first.kill()
    wait_for(lambda: "resumed at step" in log.read_text(), LONG)
    wait_for_step(found, 10, LONG)
    slurm("scancel", "--signal=TERM", number)  # as --signal has it
    start_again(slurm, number)
    assert run_processes(tmp_path, 2, **changed) == [0, 0]
    wait_for_state(slurm, number, "COMPLETED")
    assert job(slurm, number).items() >= dict(Restarts="1", NodeList="n[1-2]").items()
    assert re.findall("asked to stop|resumed", log.read_text()) == ["resumed", "asked to stop", "resumed"]
    assert_same_run(found, run_folder(tmp_path, **changed))


@pytest.mark.slow
def test_a_profile_is_a_chain_of_jobs(slurm, checkout, write_notebook, capsys):
    """One is stopped at its time limit and goes on, one fails and with it what needs it; submitted again, what is left."""
    pytest.importorskip("submitit", reason="an optional extra: pip install -r requirements-slurm.txt")
    write_notebook("00_a", "run.save(forced=record.forced())")
    stopped = "import time\nbegun = run.folder / 'begun'\nif not begun.exists():\n    begun.touch()\n    time.sleep(600)"
    four = dict(parameters="processes = 1  # GPUs\n", yaml="processes: 4\n")
    write_notebook("01_b", "run.need('00_a')", stopped, "run.save(forced=record.forced())", **four)
    write_notebook("02_c", "run.need('00_a')", "raise RuntimeError('odd')")
    write_notebook("03_d", "run.need('02_c')", "run.need('01_b')", "run.save(x=4)")
    options = ["--slurm", "--slurm-partition", "other", "--slurm-minutes", "90", "--slurm-cpus", "5"]

    def submitted(*more):
        assert reproduce.main(["tiny", *options, *more]) == 0
        lines = capsys.readouterr().out.splitlines()[:4]
        return lines, [(re.findall(r"job (\d+)", line) or [""])[0] for line in lines]

    lines, (a, b, c, d) = submitted("--force")
    first = [f"00_a  job {a}", f"01_b  job {b}, after {a}", f"02_c  job {c}, after {a}"]
    assert lines == [*first, f"03_d  job {d}, after {c}, {b}"]
    told = [job(slurm, number) for number in (a, b, c, d)]
    assert [t["Dependency"] for t in told] == [
        "(null)",
        *[f"afterok:{a}(unfulfilled)"] * 2,
        f"afterok:{c}(unfulfilled),afterok:{b}(unfulfilled)",
    ]
    assert [(t["NumCPUs"], t["TresPerNode"]) for t in told] == [
        ("5", "gres:gpu:1"),
        ("20", "gres:gpu:4"),
        *[("5", "gres:gpu:1")] * 2,
    ]
    assert {(t["JobName"][:6], t["Partition"], t["TimeLimit"]) for t in told} == {("cadet-", "other", "01:30:00")}

    folder = checkout / "outputs/tiny"
    wait_for((folder / "begun").exists, LONG)
    slurm("scancel", "--signal=USR2", b)  # as submitit's --signal has it
    start_again(slurm, b)
    wait_for_state(slurm, b, "COMPLETED")
    wait_for_state(slurm, c, "FAILED")
    wait_for_state(slurm, d, "CANCELLED")
    assert job(slurm, b)["Restarts"] == "1"
    # What was to be done anew is not begun anew after an interruption.
    assert [record.load(folder / f"{name}.json")[0] for name in ("00_a", "01_b")] == [dict(forced=True), dict(forced=False)]

    lines, (*_, c, d) = submitted()
    assert lines == ["00_a  skipped, unchanged", "01_b  skipped, unchanged", f"02_c  job {c}", f"03_d  job {d}, after {c}"]
    slurm("scancel", c, d)
