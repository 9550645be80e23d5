"""One run on 1, 2 and 4 processes (gloo), and the launch of processes that must not outlive who launched them."""

import contextlib
import io
import multiprocessing
import os
import signal
import socket
import sys
import time

import psutil
import pytest
import torch
import yaml
from test_pretrain import STALE, TINY, exit_codes, last_checkpoint, run_and_exit, run_folder, settings, steps_logged
from torch import distributed

from cadetlib import pretrain, run_files, trained
from cadetlib.training_settings import Settings

# Plain gradient steps, as large as the gradient is (LARS and AdamW would hide a wrong factor), and small enough for float32:
# on another number of processes sums over the batch are taken in another order, which changes their last bits (1e-7).
# That alone changes loss and weights by about 1e-6 here. Where a ReLU's input lies that near to zero it lets a gradient
# through or not, which was seen to make 1e-4 of it; hence the tolerances. A step that is wrong by a factor of the number
# of processes, and batch norm over a part of the batch, change the loss by more than 1e-2 and the weights by half their way.
CURVE, WAY, STATISTICS = 1e-3, 1e-2, dict(rtol=1e-2, atol=1e-3)
SGD = dict(optimizer="sgd", momentum=0.5, weight_decay=0.0, tau=0.5, max_steps=8, knn_every=0)
RATES = dict(sum=0.005 / TINY["batch_size"], mean=0.005)

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["cadetlib.pretrain", "timm.optim", "sklearn.datasets", "pytest"])


def losses(folder):
    return torch.tensor([line["loss"] for line in run_files.read_log(folder / "log.jsonl") if "loss" in line])


def assert_near(found, expected):
    """The same loss curve, the same way of the weights from where they began, and the same statistics of batch norm."""
    torch.testing.assert_close(losses(found), losses(expected), rtol=0, atol=CURVE)
    found, expected = last_checkpoint(found), last_checkpoint(expected)
    assert found["step"] == expected["step"]
    model = pretrain.make_model(Settings(**expected["settings"]), 10)
    begun, a, b = (
        torch.cat([state[name].flatten() for name, _ in model.named_parameters()])
        for state in (model.state_dict(), found["model"], expected["model"])
    )
    assert (a - b).norm() < WAY * (b - begun).norm()
    for name, _ in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(found["model"][name], expected["model"][name], **STATISTICS)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_processes(folder, world, signals=(), store=None, ranks=None, **changed):
    """Train in `world` processes with the variables that torchrun would give them; the last one gets the signals.

    store: what torchrun keeps over its restarts; without, the first process has one of its own.
    ranks: those that start at all; default: every one.
    """
    file = folder / "parameters.yaml"
    file.write_text(yaml.safe_dump(TINY | dict(output=str(folder)) | changed))
    common = dict(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", WORLD_SIZE=str(world))
    common |= dict(MASTER_PORT=str(store.port if store else free_port()), TORCHELASTIC_USE_AGENT_STORE=str(bool(store)))
    started = []
    for rank in ranks or range(world):
        variables = common | dict(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        started.append(_forks.Process(target=run_and_exit, args=(file, variables, signals if rank == world - 1 else ())))
        started[-1].start()
    return exit_codes(started)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, Eq. 1 as a sum."""
    folder = tmp_path_factory.mktemp("alone")
    assert pretrain.train(settings(folder, **SGD, learning_rate=RATES["sum"])) == 0
    return folder


def test_mean_and_sum_are_one_run_at_matching_rates(alone, tmp_path):
    assert pretrain.train(settings(tmp_path, **SGD, reduction="mean", learning_rate=RATES["mean"])) == 0
    assert_near(tmp_path, alone)
    assert losses(alone).diff().abs().max() > 10 * CURVE  # there is a curve to compare


@pytest.mark.parametrize(("world", "reduction"), [(2, "sum"), (2, "mean"), (4, "sum")])
def test_any_number_of_processes_is_one_run(world, reduction, alone, tmp_path):
    changed = SGD | dict(reduction=reduction, learning_rate=RATES[reduction])
    assert run_processes(tmp_path, world, **changed) == [0] * world
    assert_near(run_folder(tmp_path, **changed), alone)


def test_processes_share_the_evaluation(tmp_path, monkeypatch):
    """Each reads its part of the images, and all get the accuracy that one process finds on the same weights."""
    embedded = []
    monkeypatch.setattr(pretrain.embed, "embed", lambda _, images, dtype: embedded.append(len(images)) or images.flatten(1))
    images = pretrain.data.load("digits-train")
    labelled, whole = images[:103], pretrain._knn(None, images, images[300:353], settings(tmp_path, knn_images=20))
    assert embedded == [100, 53]

    shares = []
    for rank in range(3):
        monkeypatch.setattr(pretrain.losses, "is_distributed", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        shares.append(pretrain._share(labelled))
    assert torch.equal(torch.cat([share.images for share in shares]), labelled.images) and max(map(len, shares)) == 35
    monkeypatch.undo()

    changed = SGD | dict(learning_rate=RATES["sum"], knn_every=1, knn_images=30, max_steps=6)
    assert pretrain.train(settings(tmp_path / "one", **changed)) == 0
    assert run_processes(tmp_path, 2, **changed) == [0, 0]
    one, two = (run_files.read_log(f / "log.jsonl") for f in (tmp_path / "one", run_folder(tmp_path, **changed)))
    one, two = ([line["knn_accuracy"] for line in lines if "knn_accuracy" in line] for lines in (one, two))
    assert len(one) == 1 and one == pytest.approx(two, abs=1.5 / 30) and 0 < whole <= 1


def test_one_process_asked_to_stop_stops_all(alone, tmp_path):
    """All save at one step and leave with 75; then a different number of processes goes on."""
    changed = SGD | dict(learning_rate=RATES["sum"])
    folder = run_folder(tmp_path, **changed)
    assert run_processes(tmp_path, 2, [(signal.SIGTERM, 3, 0)], **changed) == [75, 75]
    step = last_checkpoint(folder)["step"]
    assert 3 <= step < 8 and steps_logged(folder) == list(range(1, step + 1))
    assert run_processes(tmp_path, 1, **changed) == [0]
    assert_near(folder, alone)


def test_a_restart_does_not_look_for_the_processes_before_it(alone, tmp_path):
    """torchrun keeps one store over its restarts, with the addresses of processes that are no more."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    changed = SGD | dict(learning_rate=RATES["sum"])
    for step in (2, 4, 8):
        assert run_processes(tmp_path, 2, store=store, **changed | dict(max_steps=step)) == [0, 0]
    assert_near(run_folder(tmp_path, **changed), alone)


def test_batch_is_divided_evenly(tmp_path):
    """Which each process finds alone: the last two of three meet nobody, who would keep the first one's addresses."""
    assert run_processes(tmp_path, 3, ranks=[1, 2]) == [1] * 2
    assert not list(run_folder(tmp_path).glob("*"))


# --- launch --------------------------------------------------------------------------------------------------------------


class InterruptedAt(io.StringIO):
    """Standard output of someone who presses Ctrl-C at the sight of some text."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def write(self, line):
        if self.text in line:
            self.text = "\0"
            raise KeyboardInterrupt
        return super().write(line)


def descendants(pid=None):
    """Processes of a pid that train, or start those that do."""
    return [p for p in psutil.Process(pid).children(recursive=True) if "--params" in p.cmdline()]


def ended(found, timeout):
    """Whether these processes end within so many seconds; those that do not are ended here."""
    _, alive = psutil.wait_procs(found, timeout=timeout)
    for process in alive:
        process.kill()
    return not alive


def wait_for_step(folder, step, timeout=100):
    """Until the log of a run holds `step`."""
    deadline = time.monotonic() + timeout
    while max(steps_logged(folder), default=0) < step:
        assert time.monotonic() < deadline, f"no step {step} in {timeout} s"
        time.sleep(0.01)


def launch_and_exit(given, variables):
    os.environ.update(variables)
    trained.launch(given)
    sys.exit(0)


@pytest.mark.slow
def test_launch_ends_what_it_started(alone, tmp_path, monkeypatch):
    """A run of hours under torchrun, interrupted; then left by a killed parent; then on one process. Among stale variables."""
    for name, value in STALE.items():
        monkeypatch.setenv(name, value)
    given = TINY | SGD | dict(learning_rate=RATES["sum"], output=str(tmp_path), processes=2, max_steps=0, epochs=10**5)

    with contextlib.redirect_stdout(InterruptedAt("step 1 ")) as printed, pytest.raises(KeyboardInterrupt):
        trained.launch(given)
    assert ended(descendants(), timeout=0)
    (folder,) = (tmp_path / "pretraining").iterdir()
    assert "asked to stop: saved at step" in printed.getvalue()
    step = last_checkpoint(folder)["step"]
    assert step >= 1

    parent = _forks.Process(target=launch_and_exit, args=(given, STALE))
    parent.start()
    wait_for_step(folder, step + 1)
    left = descendants(parent.pid)
    assert len(left) == 3  # torchrun and its two
    parent.kill()
    assert ended(left, timeout=60)

    end = last_checkpoint(folder)["step"] + 8
    assert trained.launch(given | dict(processes=1, max_steps=end)) == folder
    assert steps_logged(folder) == list(range(1, end + 1))
    torch.testing.assert_close(losses(folder)[:7], losses(alone)[:7], rtol=0, atol=CURVE)  # later ones differ in learning rate


def test_launch_goes_on_only_with_equal_settings(monkeypatch, tmp_path):
    """The folder is that of the run with the same settings; what may change between runs, and how many processes, is not one."""

    class NotStarted(Exception):
        """What would have been the child."""

    def folder(*arguments, **changed):
        with pytest.raises(NotStarted) as refused:
            trained.launch(TINY | dict(output=str(tmp_path)) | changed, *arguments)
        return refused.value.args[0]

    def popen(command, **_):
        raise NotStarted(command[command.index("--output") + 1])

    monkeypatch.setattr(trained.subprocess, "Popen", popen)
    assert folder() == folder(log_every=7, max_steps=3, processes=4, supervised_epochs=9)
    assert len({folder(), folder(tau=0.2), folder(seed=4), folder("supervised"), folder("supervised", supervised_epochs=9)}) == 5


def test_no_more_processes_than_gpus(monkeypatch, tmp_path, capsys):
    """Eight are asked for, as by the paper's parameters, and two GPUs are here; torchrun itself may still be told otherwise."""
    commands = []

    def popen(command, **_):
        commands.append(command)
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(trained.subprocess, "Popen", popen)
    for asked in (8, 1):
        with pytest.raises(InterruptedError):
            trained.launch(TINY | dict(output=str(tmp_path), processes=asked))
    assert commands[0][commands[0].index("--nproc-per-node") + 1] == "2" and "--nproc-per-node" not in commands[1]
    assert "found 2 GPUs for 8 processes; going on with 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="found process 3 of this machine and 2 GPUs, expected a GPU for each process"):
        pretrain._gpu_of(2, torch.cuda.device_count())


def test_launch_says_what_went_wrong(tmp_path):
    with pytest.raises(RuntimeError, match=r"exit code 1; its last lines:\n(.*\n)*.*batch_size: found 1000 with 797 images"):
        trained.launch(TINY | dict(batch_size=1000, output=str(tmp_path)))
