"""Reproduce: real papermill runs of tiny notebooks, unchanged, changed, failing, killed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from cadetlib import data, parameters, processes, profiles, record, reproduce

CHECKOUT = Path(__file__).resolve().parents[1]
PROFILES = sorted(p.name for p in (CHECKOUT / "params").glob("*") if p.is_dir())


@pytest.fixture
def fixed_library(monkeypatch):
    """Keys that do not change when somebody works on the package while these tests run."""
    monkeypatch.setattr(reproduce, "library_digest", lambda: "library")


def states(output):
    """Notebook -> state, from the last lines of a run."""
    return dict(re.findall(r"^(\d\d_\w+) +(?:[\d.]+ s)? +(.+)$", output, re.MULTILINE))


def run_ids(checkout):
    files = sorted((checkout / "outputs" / "tiny").glob("*.json"))
    return {file.stem: re.findall(r'"run_id": "(\w+)"', file.read_text()) for file in files}


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


# --- refused before anything starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_every_parameter_file_fits_its_notebook(profile):
    for notebook in profiles.notebooks_of(profile, CHECKOUT):
        uncommented = [name for name, p in parameters.declared(notebook.path).items() if not p.comment]
        assert not uncommented, f"{notebook.name}: parameters without a comment: {uncommented}"


def test_what_does_not_fit_is_refused_before_anything_starts(checkout, write_notebook, capsys):
    write_notebook("00_a", "run.save(x=1)", parameters="lr = 0.1  # rate\n", yaml="lr: 1e-3\nepocs: 3\n")
    write_notebook("01_b", "run.need('02_c')")
    write_notebook("02_c", "run.need(name)")
    write_notebook("03_d", yaml="profile: digits\n")
    write_notebook("04_e", yaml="output: elsewhere\n")
    for name in ("06_g", "06_g-Copy1", "Untitled"):
        (write_notebook("05_f").parent / f"{name}.ipynb").write_text("{}")
    (checkout / "params/tiny/05_f.yaml").rename(checkout / "params/tiny/07_h.yaml")
    assert reproduce.main(["tiny"]) == 2
    problems = capsys.readouterr().err
    for expected in (
        "07_h.yaml: found no notebooks/07_h.ipynb",
        "00_a.yaml: lr: found the string '1e-3', expected a number; YAML 1.1 takes 1e-3 for a string, write 0.001",
        "00_a.yaml: epocs: unknown parameter",
        "01_b.ipynb: found need('02_c'), expected an earlier notebook: 00_a",
        "02_c.ipynb: found `run.need(name)`, expected the name itself",
        "03_d.yaml: profile: found 'digits', expected 'tiny'",
        "04_e.yaml: output: expected a parameter that is ''",
        "05_f.yaml: found no such file",
        "06_g.yaml: found no such file",
    ):
        assert expected in problems
    assert "Copy1" not in problems and "Untitled" not in problems
    assert reproduce.main(["tyni"]) == 2
    assert "profile: found 'tyni', expected one of tiny" in capsys.readouterr().err
    assert not (checkout / "outputs").exists()


def test_what_cannot_be_run_is_refused_before_anything_starts(checkout, write_notebook, capsys, monkeypatch):
    declared = 'data_required = ["digits"]  # image sets without which nothing can start\n'
    write_notebook("00_a", "run.save(x=1)")
    write_notebook("01_b", "run.need('00_a')", parameters=declared, yaml="data_required: [digits, svhn-test]\n")
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["4", "7"])
    monkeypatch.setenv("CADET_DATA", str(checkout / "no data"))
    (message,) = data.missing(["svhn-test"])
    for arguments, expected in {
        ("--only", "01"): message,
        ("--only", "1,zz"): "--only: found '1,zz', expected numbers or names out of 00_a, 01_b",
        ("--gpus", "0,"): "--gpus: found '0,', expected different whole numbers",
        ("--gpus", "1,1"): "--gpus: found '1,1'",
        ("--gpus", "0,2"): "--gpus: found '0,2' where torch sees 2 GPUs, expected numbers below 2",
    }.items():
        assert reproduce.main(["tiny", *arguments]) == 2
        assert expected in capsys.readouterr().err
    assert processes.gpu_slots("1,0") == ["7", "4"]
    assert not (checkout / "outputs").exists()
    (checkout / "params/tiny/01_b.yaml").write_text("")
    assert reproduce.main(["tiny", "--only", "01"]) == 2
    assert "found no results of 00_a" in capsys.readouterr().err


# --- done, unchanged, changed ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_changed_is_redone_and_nothing_else(checkout, write_notebook, capsys, fixed_library):
    say = "print('parity of', x, 'forced' * record.forced())"
    write_notebook("00_a", f"{say}\nrun.save(parity=x % 2)", parameters="x = 1  # a number\n")
    b = write_notebook("01_b", "parity = run.need('00_a')['parity']  # once\nrun.save(parity=parity)")
    c = write_notebook(
        "02_c", "parity = run.need('01_b')['parity']", "if parity:\n    raise RuntimeError('odd')\nrun.save(ok=True)"
    )

    def call(*arguments):
        before = run_ids(checkout) if (checkout / "outputs").exists() else {}
        code = reproduce.main(["tiny", *arguments])
        output = capsys.readouterr().out
        remade = [name for name, run_id in run_ids(checkout).items() if before.get(name) != run_id]
        return code, output, remade

    code, output, remade = call()
    assert (code, remade) == (1, ["00_a", "01_b"])
    assert states(output) == {"00_a": "done", "01_b": "done", "02_c": "failed"}
    assert "[1/3] 00_a\n    parity of 1\n" in output
    assert str(checkout) not in json.dumps(json.loads((checkout / "outputs/tiny/00_a.ipynb").read_text())["metadata"])
    assert "parity of 1" in (checkout / "outputs/tiny/logs/00_a.log").read_text()
    assert output.rstrip().endswith(f"to go on from here, in {checkout}: {sys.executable} -m cadetlib.reproduce tiny")
    assert "RuntimeError: odd" in output.split("02_c failed: papermill ended with exit code 1")[1]

    edit(c, "if parity", "if not parity")
    (checkout / "outputs/tiny/report.html").write_text("")
    code, output, remade = call()
    assert (code, remade) == (0, ["02_c"])
    assert states(output) == {"00_a": "skipped, unchanged", "01_b": "skipped, unchanged", "02_c": "done"}
    assert output.rstrip().endswith(f"report: {checkout}/outputs/tiny/report.html")
    assert call()[::2] == (0, [])

    results = checkout / "outputs/tiny/00_a.json"
    results.write_bytes(results.read_bytes()[:-40])
    edit(b, "# once", "# again")
    code, output, _ = call()
    assert code == 0  # both write the digest that was there, hence 02_c stands
    assert states(output) == {"00_a": "done", "01_b": "done", "02_c": "skipped, unchanged"}

    (checkout / "params/tiny/00_a.yaml").write_text("x: 4\n")
    code, output, remade = call("--only", "0,01_b")
    assert (code, remade) == (0, ["00_a", "01_b"])
    (checkout / "params/tiny/00_a.yaml").write_text("x: 2\n")
    code, output, remade = call("--only", "02")
    assert (code, remade, "RuntimeError: odd" in output) == (1, [], True)
    assert re.findall("note: the results of (.*) were made", output) == ["00_a"]
    assert "-m cadetlib.reproduce tiny --only 02\n" in output
    assert call("--only", "00")[::2] == (0, ["00_a"])
    assert call("--only", "00")[::2] == (0, [])
    code, output, remade = call("--only", "00", "--force")
    assert (code, remade, "parity of 2 forced\n" in output) == (0, ["00_a"], True)


def test_a_file_lost_or_changed_is_noticed(checkout, write_notebook):
    """Encoders, images, the report (whatever the results name) and figures; not what other notebooks left."""
    from matplotlib import pyplot

    for name in ("00_a", "01_b"):
        write_notebook(name)
    folder = checkout / "outputs/tiny"
    for name in ("runs/1/encoder.bin", "images.bin", "report.html", "other.bin"):
        record.write_atomically(folder / name, name)
    for name in ("00_a", "01_b"):
        run = record.start(name, {"profile": "tiny", "output": ""})
        run.figure(pyplot.figure(figsize=(1, 1)), f"{name}_square", "a square")
    run = record.start("00_a", {"profile": "tiny", "output": ""})
    run.save(
        encoders={"a": folder / "runs/1/encoder.bin"}, sets=[{"file": "images.bin"}], report="report.html", text="x" * 5000,
        folder="runs", foreign=["../../params/tiny/00_a.yaml", "", "/etc/hostname"],
    )  # fmt: skip
    reproduce.mark_done(folder, "00_a", "key", record.read(run.path))
    assert reproduce.is_done(folder, "00_a", "key")
    own = ["runs/1/encoder.bin", "images.bin", "report.html", *(f"figures/00_a_square.{s}" for s in ("png", "svg", "json"))]
    assert sorted(json.loads((folder / ".done/00_a.json").read_text())["files"]) == sorted(own)
    for path in [folder / name for name in own]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
        assert not reproduce.is_done(folder, "00_a", "key"), path
        path.unlink()
        assert not reproduce.is_done(folder, "00_a"), path
        path.write_bytes(content)
        assert reproduce.is_done(folder, "00_a", "key")
    for other in ("other.bin", "figures/01_b_square.png"):
        (folder / other).unlink()
    assert reproduce.is_done(folder, "00_a", "key")


def test_force_reaches_the_notebooks_and_nothing_else_does(checkout, monkeypatch):
    for given, force in (("1", False), ("0", True)):
        monkeypatch.setenv("CADET_FORCE", given)
        job = reproduce.Job(checkout, checkout, "", "library", None, force)
        assert reproduce._environment(job, "run", [None], 1)["CADET_FORCE"] == str(int(force))


def test_a_key_holds_all_that_results_depend_on(checkout, write_notebook, monkeypatch):
    path = write_notebook("00_a", "run.save(x=1)", parameters="x = 1  # a number\n")

    def key(library="library"):
        (notebook,) = profiles.notebooks_of("tiny")
        return reproduce.key_of(notebook, checkout, library, reproduce.data_listing())

    first = key()
    document = json.loads(path.read_text())
    document["cells"][0]["outputs"], document["cells"][0]["execution_count"] = [{"output_type": "stream", "text": "x"}], 3
    path.write_text(json.dumps(document, indent=1))
    assert key() == first
    assert key("other library") != first
    edit(path, "run.save(x=1)", "run.save(x=2)")
    second = key()
    (checkout / "params/tiny/00_a.yaml").write_text("x: 2\n")
    third = key()
    roots = [checkout / "data 1", checkout / "data 2"]
    for root in roots:
        (root / "cifar").mkdir(parents=True)
        (root / "file").write_text("12")
    keys = []
    for root in roots:
        monkeypatch.setenv("CADET_DATA", str(root))
        keys.append(key())
    assert keys[0] == keys[1]
    (roots[1] / "file").write_text("123")
    assert len({first, second, third, keys[0], key()}) == 5

    for name in ("a.py", "b.j2"):
        (checkout / name).write_text("1")
    library = reproduce.library_digest(checkout)
    edit(checkout / "b.j2", "1", "2")
    assert reproduce.library_digest(checkout) != library


@pytest.mark.slow
def test_gpus_take_notebooks_side_by_side(checkout, write_notebook, capsys, monkeypatch):
    meet = (
        "import os, pathlib, time\n"
        "pathlib.Path(run.folder / run.name).touch()\n"
        "deadline = time.monotonic() + 60\n"
        "while not all((run.folder / name).exists() for name in ('00_a', '01_b')):\n"
        "    assert time.monotonic() < deadline, 'the other notebook did not come'\n"
        "    time.sleep(0.05)\n"
        "run.save(gpu=os.environ['CUDA_VISIBLE_DEVICES'], rank=os.environ.get('RANK'))"
    )
    draw = "from matplotlib import pyplot\nfigure, _ = pyplot.subplots(figsize=(1, 1))\nrun.figure(figure, 'square', 'a square')"
    write_notebook("00_a", meet)
    write_notebook("01_b", meet, draw)
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["4", "7"])
    monkeypatch.setenv("RANK", "3")
    output = checkout / "elsewhere"
    assert reproduce.main(["tiny", "--gpus", "0,1", "--output", str(output)]) == 0
    saved = [record.load(output / f"{name}.json")[0] for name in ("00_a", "01_b")]
    assert sorted(r["gpu"] for r in saved) == ["4", "7"]
    assert {r["rank"] for r in saved} == {None}
    assert not (checkout / "outputs").exists()

    executed = json.loads((output / "01_b.ipynb").read_text())
    shown = [o for cell in executed["cells"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert [o["data"]["text/plain"] for o in shown] == [["[figure: a square]"]]
    done = output / ".done/00_a.json"
    assert (done.exists(), reproduce.is_done(output, "00_a"), reproduce.is_done(output, "00_a", "another key")) == (
        True,
        True,
        False,
    )
    edit(output / "00_a.json", '"4"' if '"4"' in (output / "00_a.json").read_text() else '"7"', '"5"')
    assert not reproduce.is_done(output, "00_a")
    assert reproduce.is_done(output, "01_b")
    (output / "figures/square.svg").unlink()
    assert not reproduce.is_done(output, "01_b")


@pytest.mark.slow
def test_a_notebook_of_several_processes_gets_a_gpu_for_each_or_all_there_are(checkout, write_notebook, monkeypatch):
    save = "import os\nrun.save(gpus=os.environ['CUDA_VISIBLE_DEVICES'])"
    write_notebook("00_a", save, parameters="processes = 3  # of torchrun\n", yaml="processes: 3\n")
    write_notebook("01_b", "run.need('00_a')", save)
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["4", "7", "8", "9"])
    for asked, expected in (("0,1,2,3", "4,7,8"), ("0,1", "4,7")):
        output = checkout / asked
        assert reproduce.main(["tiny", "--gpus", asked, "--output", str(output)]) == 0
        first, second = (record.load(output / f"{name}.json")[0]["gpus"] for name in ("00_a", "01_b"))
        assert first == expected and "," not in second


def test_notebooks_go_on_when_nobody_reads_along(checkout, write_notebook):
    """As behind `| head -n 1`, or a `tee` whose disk is full."""
    for name in ("00_a", "01_b"):
        write_notebook(name, "run.save(x=1)")
    command = [sys.executable, "-c", "import sys; from cadetlib import reproduce; sys.exit(reproduce.main(['tiny']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 0
    assert (checkout / "outputs/tiny/01_b.json").exists()


# --- failures and kills ---------------------------------------------------------------------------------------------------

SLOW = """
import os, pathlib, subprocess, time
saves = f"trap 'sleep 1; touch {run.folder}/saved; kill $!; exit' TERM; sleep 600 & wait"
child = subprocess.Popen(["bash", "-c", saves], start_new_session=True)
run.folder.joinpath("pids").write_text(f"{os.getpid()} {os.getppid()} {child.pid} ")
while not run.folder.joinpath("go").exists():
    time.sleep(0.05)
run.save(x=1)
if run.folder.joinpath("die").exists():
    os.kill(os.getpid(), 9)
child.kill()
"""


def alive(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the end of a parent is a signal on Linux alone")
def test_a_killed_run_leaves_nothing_running_and_goes_on(checkout, write_notebook, capsys, fixed_library, request):
    fixed = "import sys; from cadetlib import reproduce; reproduce.library_digest = lambda: 'library'"
    command = [sys.executable, "-c", f"{fixed}; sys.exit(reproduce.main(['tiny']))"]
    folder = checkout / "outputs/tiny"
    write_notebook("00_a", "run.save(x=1)")
    write_notebook("01_b", "run.need('00_a')", SLOW)
    file = folder / "pids"

    def at_work():
        """The ids of the kernel, of papermill and of what the notebook started, once all are there."""
        wait_for(lambda: file.exists() and file.read_text().endswith(" "))
        return [int(pid) for pid in file.read_text().split()]

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    request.addfinalizer(process.kill)
    pids = at_work()
    assert all(map(alive, pids))
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert f"found another reproduce at work here (process {process.pid})" in second.stderr
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, pids)), seconds=5)
    assert (folder / "saved").exists()  # it was asked before it was killed
    assert sorted(p.name for p in folder.glob("*.json")) == ["00_a.json"]

    file.unlink()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored when the tests were begun in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    interrupt = threading.Thread(target=lambda: (at_work(), os.kill(os.getpid(), signal.SIGINT)))
    interrupt.start()
    with pytest.raises(SystemExit) as end:
        reproduce.main(["tiny"])
    assert not any(alive(int(pid)) for pid in file.read_text().split())
    assert end.value.code == 128 + signal.SIGINT
    assert f"{sys.executable} -m cadetlib.reproduce tiny" in capsys.readouterr().out
    interrupt.join()

    (folder / "go").touch()
    (folder / "die").touch()
    assert reproduce.main(["tiny"]) == 1  # its results are on disk, and yet it was killed
    output = capsys.readouterr().out
    assert states(output) == {"00_a": "skipped, unchanged", "01_b": "failed"}
    assert "kernel killed?" in output
    assert (folder / "01_b.json").exists()
    (folder / "die").unlink()
    assert reproduce.main(["tiny"]) == 0
    assert states(capsys.readouterr().out) == {"00_a": "skipped, unchanged", "01_b": "done"}
    assert not any(alive(int(pid)) for pid in file.read_text().split())


@pytest.mark.slow
def test_results_of_an_earlier_run_do_not_count(checkout, write_notebook, capsys):
    write_notebook("00_a", "pass")
    record.start("00_a", {"profile": "tiny", "output": ""}).save(x=1)
    assert reproduce.main(["tiny"]) == 1
    assert "00_a failed: it wrote no results: those on disk are of an earlier run" in capsys.readouterr().out
    (checkout / "outputs/tiny/00_a.json").unlink()
    command = [sys.executable, "-m", "cadetlib.reproduce", "tiny"]
    found = subprocess.run(command, cwd=checkout / "params", capture_output=True, text=True)
    assert found.returncode == 1
    assert "00_a failed: it wrote no results (run.save was not reached)" in found.stdout


def test_what_is_ignored_stays_so_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with reproduce._signals_end_it():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_notebook_goes_on_when_its_log_cannot_be_written(capsys):
    talkative = "for i in range(40_000): print(i)"  # more than a pipe holds
    process = subprocess.Popen([sys.executable, "-c", talkative], stdout=subprocess.PIPE, text=True)
    reproduce._print_and_log(process, Path("/dev/full"), "")
    assert process.wait(60) == 0 and "the notebook goes on" in capsys.readouterr().out
