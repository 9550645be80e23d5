"""The training program: a run that learns, and that survives whatever interrupts it.

Every run here is digits at 8 x 8 pixels through a residual network of width 4. A run that was interrupted must end with the
weights and the log of one that was not, bit for bit.
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from cadetlib import data, encoders, keep, parameters, pretrain, run_files, trained, training_settings
from cadetlib.training_settings import Settings

TINY = dict(
    data="digits-train", arch="resnet10", width=4, stem="cifar", image_size=8, head_hidden=16, head_dim=8, crop_scale=[0.4, 1.0],
    jitter=0.0, blur=0.0, greyscale=0.0, batch_size=128, epochs=6, warmup_epochs=1, learning_rate=0.5, log_every=1,
    checkpoint_every=1, knn_every=2, knn_data="digits-test", knn_images=50, seed=3,
)  # fmt: skip
STEPS = 36  # 6 epochs of 797 // 128 = 6 batches
STALE = dict(RANK="1", WORLD_SIZE="4", LOCAL_RANK="3", LOCAL_WORLD_SIZE="4", MASTER_ADDR="no.such.host", MASTER_PORT="1")


def settings(output, **changed):
    return Settings(output=str(output), **(TINY | changed))


# --- helpers: runs in processes of their own, and what a run leaves behind -----------------------------------------------


def run_and_exit(parameters, variables, signals):
    """What `python -m cadetlib.pretrain` does, in a process forked from one that has imported everything.

    signals: (number, step, delay) for a signal that this process gets `delay` seconds after it has logged `step`.
    """
    os.environ.update(variables)
    write = run_files.Log.write

    def write_and_signal(log, **values):
        write(log, **values)
        for number, step, delay in signals:
            if values["step"] == step:
                threading.Timer(delay, os.kill, (os.getpid(), number)).start()

    run_files.Log.write = write_and_signal
    sys.exit(pretrain.main(["--params", str(parameters)]))


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["cadetlib.pretrain", "timm.optim", "sklearn.datasets", "pytest"])


def run(folder, *signals, variables=None, target=run_and_exit, changed=None):
    """Train below `folder` in another process; its exit code. It trains in run_folder(folder)."""
    file = folder / "parameters.yaml"
    file.write_text(yaml.safe_dump(TINY | dict(output=str(folder)) | (changed or {})))
    process = _forks.Process(target=target, args=(file, variables or {}, signals))
    process.start()
    return exit_codes([process])[0]


def run_folder(folder, **changed):
    return training_settings.run_folder(training_settings.settings_from(TINY | dict(output=str(folder)) | changed))


def exit_codes(processes):
    for process in processes:
        process.join(100)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # None above: it hangs
    return codes


def steps_logged(folder):
    return [line["step"] for line in run_files.read_log(folder / "log.jsonl") if "loss" in line]


def last_checkpoint(folder):
    return torch.load(sorted(folder.glob("checkpoint-*.pt"))[-1], weights_only=True)


def tensors(value, name=""):
    """All tensors in nested dicts and lists, by their place."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, item in pairs for k, v in tensors(item, f"{name}/{key}").items()}


def log_of(folder):
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_run(found, expected):
    """Bit-identical weights and optimizer state, the same log line for line, and the same encoder."""
    a, b = last_checkpoint(found), last_checkpoint(expected)
    assert a["step"] == b["step"]
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []
    assert log_of(found) == log_of(expected)
    a, b = (encoders.load_encoder(folder / "encoder.safetensors") for folder in (found, expected))
    assert encoders.fingerprint(a) == encoders.fingerprint(b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert pretrain.train(settings(folder)) == 0
    assert steps_logged(folder) == list(range(1, STEPS + 1))
    return folder


# --- the schedule and the optimizer --------------------------------------------------------------------------------------


def test_learning_rate_without_warmup_and_in_a_run(uninterrupted):
    assert training_settings.learning_rate(0, 10, Settings(learning_rate=0.3, warmup_epochs=0, epochs=5)) == 0.3
    logged = [line["learning_rate"] for line in log_of(uninterrupted) if "loss" in line]
    warmup = [0.5 * (i + 1) / 6 for i in range(6)]
    assert logged == pytest.approx(warmup + [0.25 * (1 + math.cos(math.pi * i / 30)) for i in range(30)], rel=1e-12)


# --- interruptions -------------------------------------------------------------------------------------------------------


def test_killed_at_random_points(uninterrupted, tmp_path):
    """kill -9, before the first checkpoint and after; the log must neither repeat nor lose a step."""
    chance, folder = random.Random(5), run_folder(tmp_path)
    for first in (1, 4, 10, 16, 27):
        step = first + chance.randrange(6)
        assert run(tmp_path, (signal.SIGKILL, step, chance.uniform(0, 0.03))) == -signal.SIGKILL
        assert step <= max(steps_logged(folder)) < STEPS
    assert run(tmp_path) == 0
    assert_same_run(folder, uninterrupted)


def run_and_die_in_save(parameters, *_):
    """Killed at the second checkpoint, when its bytes are written and its name is not."""
    fsync, calls = os.fsync, []

    def die(number):
        fsync(number)
        calls.append(number)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = die
    run_and_exit(parameters, {}, ())


def test_killed_while_saving(uninterrupted, tmp_path):
    folder = run_folder(tmp_path)
    assert run(tmp_path, target=run_and_die_in_save) == -signal.SIGKILL
    assert [p.name.split("-")[1] for p in folder.glob("checkpoint-*.pt")] == ["000000006"]
    assert len(list(folder.glob(".checkpoint-*.part"))) == 1
    assert run(tmp_path) == 0
    assert_same_run(folder, uninterrupted)
    assert list(folder.glob(".*")) == [], "what the killed process had half written is still there"


def run_and_die_in_log(parameters, *_):
    """Killed at the start, when the log is half rewritten without the steps after the checkpoint."""

    def write_half(path, text):
        path.write_bytes(text.encode()[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_text = write_half
    run_and_exit(parameters, {}, ())


def test_killed_while_going_back_in_the_log(uninterrupted, tmp_path):
    folder = run_folder(tmp_path)
    assert run(tmp_path, (signal.SIGKILL, 14, 0)) == -signal.SIGKILL
    assert run(tmp_path, target=run_and_die_in_log) == -signal.SIGKILL
    assert run(tmp_path) == 0
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_saves_and_leaves(number, uninterrupted, tmp_path):
    folder = run_folder(tmp_path)
    assert run(tmp_path, (number, 8, 0)) == 75
    step = last_checkpoint(folder)["step"]
    assert 8 <= step < STEPS and steps_logged(folder) == list(range(1, step + 1))
    assert run(tmp_path) == 0
    assert_same_run(folder, uninterrupted)


def test_signals_mean_afterwards_what_they_meant_before(tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    assert pretrain.train(settings(tmp_path, max_steps=1)) == 0
    assert {number: signal.getsignal(number) for number in before} == before


# --- checkpoints ---------------------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, truncate])
def test_damaged_checkpoint_falls_back_loudly(damage, uninterrupted, tmp_path, capsys):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    (folder / "encoder.safetensors").unlink()
    last = sorted(folder.glob("checkpoint-*.pt"))[-1]
    damage(last)
    assert pretrain.train(settings(folder)) == 0
    said = capsys.readouterr().out
    assert f"DAMAGED CHECKPOINT {last.name}" in said and "resumed at step 30" in said
    assert_same_run(folder, uninterrupted)
    assert [p.stem for p in folder.glob("*.damaged")] == [last.stem]


def test_only_damaged_checkpoints_is_an_error_each_time(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    log = (folder / "log.jsonl").read_bytes()
    for path in folder.glob("checkpoint-*.pt"):
        flip(path)
    for _ in range(2):  # a restart by a scheduler must not begin anew either
        with pytest.raises(ValueError, match="only damaged checkpoints"):
            pretrain.train(settings(folder))
    assert (folder / "log.jsonl").read_bytes() == log


def test_checkpoints_on_disk(uninterrupted):
    """Two of them, complete, of the format that earlier runs wrote; the keys are what later versions must be able to read."""
    assert [int(p.name.split("-")[1]) for p in sorted(uninterrupted.glob("checkpoint-*.pt"))] == [30, 36]
    checkpoint = last_checkpoint(uninterrupted)
    assert set(checkpoint) == {"model", "optimizer", "scaler", "step", "settings", "images", "made_by"}
    assert checkpoint["settings"] == settings(uninterrupted).__dict__


def test_an_encoder_says_which_commits_trained_it(tmp_path, monkeypatch):
    """One entry for the starts at one commit, the next when another goes on; a checkpoint from before has none."""
    for commit, max_steps in (("a", 2), ("a", 5), ("b", 8), ("c", 0)):
        monkeypatch.setattr(pretrain.record, "git_state", lambda root, commit=commit: dict(commit=commit, dirty=False))
        assert pretrain.train(settings(tmp_path, max_steps=max_steps)) == 0
        if commit == "a":
            told = last_checkpoint(tmp_path)["made_by"]
            assert [start["commit"]["commit"] for start in told] == ["a"]
    about = pretrain.encoders.read_safetensors(tmp_path / "encoder.safetensors", pretrain.encoders.FORMAT)[1]
    made_by = json.loads(about["made_by"])
    assert [start["commit"] for start in made_by] == [dict(commit=commit, dirty=False) for commit in "abc"]
    assert made_by[0]["versions"] == pretrain.record.versions() and made_by[0]["hardware"] == pretrain.record.hardware()


def test_other_settings_are_refused_by_name(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    with pytest.raises(ValueError, match=r"tau 0\.1 \(then\) and 0\.5 \(now\), seed 3 \(then\) and 4 \(now\)"):
        pretrain.train(settings(folder, tau=0.5, seed=4))


def test_operational_settings_may_change(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    sorted(folder.glob("checkpoint-*.pt"))[-1].unlink()
    other = dict(log_every=4, checkpoint_every=3, knn_every=1, knn_data="digits", knn_images=20, max_steps=34, snapshots=[])
    other |= dict(workers=3, allow_unreadable=2)
    assert {"output", *other} == set(training_settings.OPERATION)
    assert pretrain.train(settings(folder, **other)) == 0
    assert last_checkpoint(folder)["step"] == 34
    assert steps_logged(folder) == [*range(1, 31), 32, 34]


def test_a_setting_that_an_older_run_did_not_know_had_its_default(uninterrupted, tmp_path):
    then = {k: v for k, v in settings(tmp_path).__dict__.items() if k not in ("flip", "batch_size")}
    assert training_settings.different_settings(then, settings(tmp_path)) == ["batch_size 1024 (then) and 128 (now)"]


MILD = TINY | dict(optimizer="adamw", learning_rate=0.001, epochs=2, snapshots=[1, 2])  # its weights fit float16


@pytest.fixture(scope="module")
def mild(tmp_path_factory):
    """The folder of a run of two epochs that kept its encoder after each."""
    folder = tmp_path_factory.mktemp("mild")
    assert pretrain.train(Settings(output=str(folder), **MILD)) == 0
    return folder


def test_snapshots_are_the_encoder_on_its_way(mild):
    assert list(run_files.snapshots(mild)) == [1, 2]
    first, second = (encoders.load_encoder(file).state_dict() for file in run_files.snapshots(mild).values())
    last = encoders.load_encoder(mild / "encoder.safetensors").state_dict()
    assert all(torch.allclose(last[k].float(), second[k].float(), rtol=1e-3, atol=1e-6) for k in last)
    assert not torch.allclose(first["conv1.weight"], second["conv1.weight"], rtol=1e-3)


@pytest.mark.data
@pytest.mark.parametrize("profile", ["cifar10", "cifar10-resnet50"])
@pytest.mark.parametrize("objective", ["contrastive", "supervised"])
def test_profiles_for_a_gpu_take_two_steps_anywhere(profile, objective, tmp_path):
    """Their own settings but for the size of a batch: the network, optimizer, precision and views that nobody has run here."""
    if not (data.root() / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 below the data root {data.root()}: set CADET_DATA, or download cifar10-test")
    given = parameters.read_yaml(Path(pretrain.__file__).parents[1] / "params" / profile / "01_pretraining.yaml")
    small = dict(output=str(tmp_path), data="cifar10-test", batch_size=8, max_steps=2, knn_every=0, log_every=1)
    assert pretrain.train(replace(training_settings.settings_from(given, objective), **small)) == 0
    assert steps_logged(tmp_path) == [1, 2]


# --- an encoder that the project keeps ------------------------------------------------------------------------------------


def kept_in(checkout, run):
    """A checkout that keeps the encoder of a finished run for the profile digits."""
    return keep.keep_encoder(run, checkout / "outputs" / "reference" / "digits" / "pretraining" / "contrastive").parent


def test_a_kept_encoder_is_taken_where_none_was_trained(mild, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CADET_ROOT", str(tmp_path))
    monkeypatch.setattr(trained, "launch", lambda *_: "trained")
    given = MILD | dict(profile="digits")
    assert trained.obtain(given) == "trained"
    kept = kept_in(tmp_path, mild)
    folder = trained.obtain(given)
    assert folder.name == "contrastive-kept" and "taking the encoder that the project keeps" in capsys.readouterr().out
    half, whole = (encoders.load_encoder(f / "encoder.safetensors").state_dict() for f in (folder, mild))
    assert all(torch.equal(half[k], whole[k].half().float()) for k in half if whole[k].is_floating_point())
    assert run_files.read_log(folder / "log.jsonl") == run_files.read_log(mild / "log.jsonl")

    assert trained.obtain(given | dict(tau=0.3)) == "trained"
    assert "tau 0.1 (then) and 0.3 (now)" in capsys.readouterr().out
    file = kept / "encoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="does not match its digest"):
        trained.obtain(given)
    shutil.copytree(mild, training_settings.run_folder(training_settings.settings_from(given)))
    assert trained.obtain(given) == "trained"  # the user's own comes first


# --- runs that go wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log_every", "message"), [(1, "found loss nan"), (1000, "NaN or infinite weights")])
def test_diverged_loss_stops_the_run(log_every, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain.train(settings(tmp_path, optimizer="sgd", learning_rate=1e30, log_every=log_every))
    assert list(tmp_path.glob("*checkpoint*")) == []


def change_model(monkeypatch, change):
    """Have the run begin with a model that `change` has been at."""
    made = pretrain.make_model

    def changed(*arguments):
        model = made(*arguments)
        with torch.no_grad():
            change(model)
        return model

    monkeypatch.setattr(pretrain, "make_model", changed)


def test_infinite_statistics_are_not_saved(monkeypatch, tmp_path):
    """In training mode batch norm does not use its running mean, so that only the save can see that it is ruined."""
    change_model(monkeypatch, lambda model: model.encoder.bn1.running_mean.fill_(math.inf))
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        pretrain.train(settings(tmp_path))
    assert list(tmp_path.glob("*checkpoint*")) == []


def dead_encoder(model):
    """Every image to zero, and every embedding with it."""
    model.encoder.conv1.weight.zero_()


def constant_head(model):
    """Every image to the same embedding."""
    model.head[-1].weight.zero_()
    model.head[-1].bias.normal_()


def test_any_folder_of_images_can_be_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("CADET_DATA", str(tmp_path))
    (tmp_path / "pets").mkdir()
    for i, image in enumerate(data.load("digits-test").images[:140]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "pets" / f"{i}.png")
    folder = tmp_path / "run"
    assert pretrain.train(settings(folder, data="folder:pets", knn_every=0, max_steps=2)) == 0
    assert last_checkpoint(folder)["step"] == 2
    with pytest.raises(FileNotFoundError, match=r"found no folder .*wolves"):
        pretrain.train(settings(folder, data="folder:wolves", knn_every=0))


def test_a_run_goes_on_with_the_images_that_it_began_with_alone(tmp_path, monkeypatch):
    assert pretrain.train(settings(tmp_path, max_steps=2)) == 0
    load = data.load
    monkeypatch.setattr(data, "load", lambda name, **_: load(name)[: 790 if name == "digits-train" else None])  # still 6 batches
    with pytest.raises(ValueError, match=r"resume: found a run on 797 images \w+ .* and 790 images \w+ of digits-train now"):
        pretrain.train(settings(tmp_path, max_steps=4))
    monkeypatch.undo()
    assert pretrain.train(settings(tmp_path, max_steps=4)) == 0


@pytest.mark.parametrize("change", [dead_encoder, constant_head])
def test_collapsed_representation_stops_the_run(change, monkeypatch, tmp_path):
    change_model(monkeypatch, change)
    with pytest.raises(ValueError, match=r"step 7: .* the representation has collapsed"):
        pretrain.train(settings(tmp_path, optimizer="sgd", learning_rate=1e-30, warmup_epochs=0))


def test_likeness_is_the_mean_cosine_over_pairs():
    z = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    pairs = [torch.cosine_similarity(z[i], z[j], dim=0) for i in range(7) for j in range(7) if i != j]
    assert pretrain.likeness(z) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-12)
    assert pretrain.likeness(torch.zeros(4, 5)) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(batch_size=1), "batch_size: found 1 on 1 processes, expected at least 2"),
        (dict(batch_size=2000), "batch_size: found 2000 with 797 images"),
        (dict(data="no-such-set"), "found no set named 'no-such-set'"),
        (dict(knn_data="no-such-set"), "found no set named 'no-such-set'"),
    ],
)
def test_refused_before_training(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain.train(settings(tmp_path, **changed))
    assert not (tmp_path / "log.jsonl").exists()


def test_labels_are_asked_for(monkeypatch, tmp_path):
    digits = data.load("digits-train")
    monkeypatch.setattr(data, "load", lambda name, **_: replace(digits, labels=None))
    with pytest.raises(ValueError, match="expected some for the supervised objective"):
        pretrain.train(settings(tmp_path, objective="supervised"))
    with pytest.raises(ValueError, match="expected labels for the kNN evaluation"):
        pretrain.train(settings(tmp_path))


# --- what is learned -----------------------------------------------------------------------------------------------------


def test_supervised_run_writes_a_classifier(tmp_path):
    """Only labels 2, 5 and 7, in this order: the head counts them from 0, and knows the digits it was trained on."""
    supervised = settings(
        tmp_path, objective="supervised", classes=[5, 2, 7], width=8, batch_size=64, epochs=20, optimizer="adamw",
        learning_rate=0.01, weight_decay=0.01, crop_scale=[0.6, 1.0], flip=0.0, knn_every=0, checkpoint_every=20,
    )  # fmt: skip
    assert pretrain.train(supervised) == 0
    images = data.load("digits-train").of_classes([5, 2, 7])
    classifier = encoders.load_classifier(tmp_path / "encoder.safetensors")
    with torch.no_grad():
        predicted = classifier(images.images / 255).argmax(dim=1)
    assert torch.tensor([5, 2, 7])[predicted].eq(images.labels).float().mean() > 0.9


def test_contrastive_run_learns(tmp_path):
    """Below log(2 * 128 - 1), the loss of embeddings that know nothing, and neighbours of a kind; the head is not kept."""
    changed = dict(width=8, optimizer="adamw", learning_rate=0.01, weight_decay=0.01, tau=0.2, flip=0.0, crop_scale=[0.6, 1.0])
    assert pretrain.train(settings(tmp_path, **changed)) == 0
    lines = log_of(tmp_path)
    assert sum([line["loss"] for line in lines if "loss" in line][-6:]) / 6 < math.log(255) - 1
    evaluations = [line for line in lines if "knn_accuracy" in line]
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(12, 2), (24, 4), (36, 6)]
    assert evaluations[-1]["knn_accuracy"] > 0.5  # chance: 0.1
    with pytest.raises(ValueError, match="without a classifier's head"):
        encoders.load_classifier(tmp_path / "encoder.safetensors")


@pytest.mark.parametrize("symmetric", [False, True])
def test_logged_loss_is_per_anchor_whatever_the_reduction(symmetric, tmp_path):
    first = []
    for reduction in ("sum", "mean"):
        assert pretrain.train(settings(tmp_path / reduction, reduction=reduction, symmetric=symmetric, max_steps=1)) == 0
        first.append(log_of(tmp_path / reduction)[0]["loss"])
    assert first[0] == pytest.approx(first[1], rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_channels_last(dtype, tmp_path):
    """Near the float32 loss at the first step, and weights that stay float32."""
    losses = {}
    for name, precision in {"full": "float32", "half": dtype}.items():
        assert pretrain.train(settings(tmp_path / name, max_steps=2, width=8, channels_last=True, dtype=precision)) == 0
        losses[name] = log_of(tmp_path / name)[0]["loss"]
    assert losses["half"] == pytest.approx(losses["full"], rel=0.02) and losses["half"] != losses["full"]
    model = last_checkpoint(tmp_path / "half")["model"]
    assert {value.dtype for value in model.values() if value.is_floating_point()} == {torch.float32}


def test_a_narrow_network_trains_with_channels_last_asked_for(tmp_path):
    """In a process of its own, for where torch writes beyond its memory it aborts."""
    assert run(tmp_path, changed=dict(max_steps=4, channels_last=True)) == 0


def test_a_dtype_left_to_the_machine_is_settled_when_the_run_begins(tmp_path, monkeypatch):
    """So that a run that goes on elsewhere keeps its precision or is refused; a finished one of either kind serves "auto"."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert pretrain.train(settings(tmp_path, max_steps=1, dtype="auto")) == 0
    assert last_checkpoint(tmp_path)["settings"]["dtype"] == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    with pytest.raises(ValueError, match=r"dtype 'float32' \(then\) and 'bfloat16' \(now\)"):
        pretrain.train(settings(tmp_path, max_steps=2, dtype="auto"))
    assert training_settings.different_settings({"dtype": "bfloat16"}, training_settings.Settings(dtype="auto")) == []


# --- parameters and the command line -------------------------------------------------------------------------------------


def test_stale_distributed_variables_count_for_nothing(uninterrupted, tmp_path):
    assert run(tmp_path, variables=STALE) == 0
    assert_same_run(run_folder(tmp_path), uninterrupted)


def test_a_kill_in_an_evaluation_costs_no_checkpoint_and_no_evaluation(tmp_path, monkeypatch):
    """The checkpoint is written first; the evaluation that was cut off is made up for when the run goes on."""
    whole = settings(tmp_path / "whole", epochs=4)
    assert pretrain.train(whole) == 0
    knn, calls = pretrain._knn, []

    def cut_off(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return knn(*given)

    monkeypatch.setattr(pretrain, "_knn", cut_off)
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(settings(folder, epochs=4))
    assert last_checkpoint(folder)["step"] == 24
    assert pretrain.train(settings(folder, epochs=4)) == 0

    def said(of):
        return [(line["step"], line["knn_accuracy"]) for line in run_files.read_log(of / "log.jsonl") if "knn_accuracy" in line]

    assert said(folder) == said(tmp_path / "whole") and len(said(folder)) == 2
    first = (folder / run_files.ENCODER).read_bytes()
    assert pretrain.train(settings(folder, epochs=4)) == 0 and (folder / run_files.ENCODER).read_bytes() == first


def test_two_trainings_in_one_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "_PATIENCE", 1)
    with run_files.alone_in(tmp_path), pytest.raises(ValueError, match="found another training at work in it"):
        pretrain.train(settings(tmp_path))
    assert pretrain.train(settings(tmp_path, epochs=1)) == 0
