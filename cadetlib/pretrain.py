"""The training program (Section 3): contrastive pretraining after SimCLRv2, or a supervised classifier for comparison.

    python -m cadetlib.pretrain --params params/digits/01_pretraining.yaml
    torchrun --nproc-per-node 8 -m cadetlib.pretrain --params FILE.yaml

Read it downwards: the loop, the run and its report, the launch. What a run is told is in `training_settings`, what it learns from
in `training_data`, what it keeps on disk in `run_files`; notebooks ask `trained` for encoders. All randomness is a function of
(seed, epoch, image, view), so that a run is the same on any number of processes and goes on after any interruption as if there
had been none. Exit codes: 0 finished, 75 saved and left because SIGTERM, SIGUSR1 or SIGUSR2 asked, 1 anything else (torchrun has
its own: 1 also when it was asked to stop and its processes have saved).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from cadetlib import (
    ahead,
    data,
    embed,
    encoders,
    losses,
    parameters,
    probe,
    processes,
    record,
    run_files,
    stream,
    training_data,
    training_settings,
)
from cadetlib.run_files import is_first, say
from cadetlib.synchronised import synchronised
from cadetlib.training_settings import Settings

PREEMPTED = 75  # EX_TEMPFAIL: saved; start me again
COLLAPSED = 0.99  # mean similarity of different images beyond which nothing is being learned
_SETTLED = 5  # epochs, or the warm-up when it is shorter, before a collapse is looked for
_TOGETHER = 600  # seconds within which all processes must have started


# --- what a run may go on from -----------------------------------------------------------------------------------------


def _refuse_other_settings(found: Mapping[str, Any], settings: Settings) -> None:
    """ValueError naming each setting in which a checkpoint differs from this run."""
    if different := training_settings.different_settings(found, settings):
        raise ValueError(
            f"resume: found {', '.join(different)}; expected equal settings: restore them, or choose another output folder"
        )


def _identity(images: data.ImageSet) -> str:
    """How many images a run trains on, and a digest of their files' names or of their labels: alike on every machine."""
    if isinstance(images, data.FolderSet):
        return f"{len(images)} images {stream.digest(images)[:16]}"
    labels = b"" if images.labels is None else images.labels.cpu().numpy().tobytes()
    return f"{len(images)} images {run_files.digest(labels)}"


def _refuse_other_images(found: str, images: data.ImageSet) -> None:
    """ValueError when a checkpoint's run had others: an epoch, the order and the schedule would no longer be what they were."""
    if found != _identity(images):
        raise ValueError(
            f"resume: found a run on {found} (count and digest) and {_identity(images)} of {images.name} now, expected the same: "
            "put them back, or choose another output folder"
        )


# --- the loop -----------------------------------------------------------------------------------------------------------


class _Stop:
    """Set by one of processes.ASKING, looked at after every step by all processes together."""

    def __init__(self) -> None:
        self.asked, self.before = False, ahead.Sent(torch.zeros(()))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals meanwhile; afterwards they mean what they meant before."""
        before = {number: signal.signal(number, self._ask) for number in processes.ASKING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def agreed(self, device: torch.device) -> bool:
        """Whether a process was asked; of several, whether one was a call ago: all answer alike, and none waits for this step."""
        if not losses.is_distributed():
            return self.asked
        flag = torch.full((), float(self.asked), device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        before, self.before = self.before, ahead.Sent(flag)
        return bool(before.read())


class Model(nn.Module):
    """Encoder and head in one module, so that one forward pass serves all views and processes can keep in step.

    >>> tiny = Settings(arch="resnet10", width=4, stem="cifar", image_size=8, head_hidden=8, head_dim=5)
    >>> Model(tiny, n_classes=0)(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 5])
    """

    def __init__(self, settings: Settings, n_classes: int) -> None:
        super().__init__()
        self.encoder = encoders.ResNet(settings.arch, settings.width, settings.stem, settings.image_size)
        self.head: nn.Module = (
            encoders.ContrastiveHead(self.encoder.dim, settings.head_hidden, settings.head_dim)
            if settings.objective == "contrastive"
            else nn.Linear(self.encoder.dim, n_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def make_model(settings: Settings, n_classes: int) -> Model:
    """A fresh model, initialised from the seed and not from the global random state.

    >>> tiny = Settings(arch="resnet10", width=4, stem="cifar", objective="supervised")
    >>> make_model(tiny, n_classes=3).head
    Linear(in_features=32, out_features=3, bias=True)
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Model(settings, n_classes)


def training_loss(model: nn.Module, batch: Tensor, y: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Loss of one batch of `training_views` (V b, 3, S, S) and the embeddings (V b, D) it came from. y: (b,) labels.

    Summed over processes ("sum") or averaged over them ("mean") it is the loss of the whole batch.

    >>> tiny = Settings(arch="resnet10", width=4, stem="cifar", image_size=8, head_hidden=8, head_dim=5)
    >>> loss, z = training_loss(make_model(tiny, 0), torch.rand(8, 3, 8, 8), torch.arange(4), tiny)
    >>> loss.shape, z.shape
    (torch.Size([]), torch.Size([8, 5]))
    """
    with torch.autocast(batch.device.type, embed.DTYPES[settings.dtype], enabled=settings.dtype != "float32"):
        z = model(batch)
    z = z.float()
    if settings.objective == "supervised":
        return F.cross_entropy(z, y), z
    z0, z1 = z.chunk(2)
    return losses.info_nce(z0, z1, settings.tau, settings.symmetric, settings.reduction, check=False), z


def likeness(z: Tensor) -> float:
    """Mean cosine similarity of different rows (n, D): 1 when all have collapsed to one point, be it zero.

    >>> likeness(torch.tensor([[1.0, 0.0], [0.0, 2.0]])), likeness(torch.ones(3, 2))
    (0.0, 1.0)
    """
    unit, n = F.normalize(z, dim=1), len(z)
    # |u - v|^2 / 2 is 1 - <u, v> of unit vectors, and 0 of zeros, whose cosine would be undefined.
    distance = (n * unit.square().sum() - unit.sum(dim=0).square().sum()) / (n * (n - 1))
    return float(1 - distance)


def _check_division(batch_size: int, world: int) -> None:
    if batch_size < 2 or batch_size % world:
        raise ValueError(f"batch_size: found {batch_size} on {world} processes, expected at least 2 and a multiple of {world}")


def train(settings: Settings, device: torch.device | None = None) -> int:
    """Run to the end, or until asked to stop; goes on from the last checkpoint in `settings.output`. Returns the exit code.

    >>> train(Settings(batch_size=1))
    Traceback (most recent call last):
    ValueError: batch_size: found 1 on 1 processes, expected at least 2 and a multiple of 1
    """
    stop = _Stop()
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    with stop.listening(), run_files.alone_in(folder) if is_first() else nullcontext():
        return _train(settings, device or encoders.default_device(), stop)


def _train(settings: Settings, device: torch.device, stop: _Stop) -> int:
    settings = replace(settings, dtype=embed.resolved_dtype(settings.dtype, device))
    embed.warn_of_emulation(settings.dtype, device)
    _check_division(settings.batch_size, losses.n_processes())
    images = training_data.training_images(settings)
    held_out = _held_out(settings, images)
    n_classes = 1 if images.labels is None else int(images.labels.max()) + 1
    if isinstance(images, data.FolderSet):
        images = stream.readable(images, Path(settings.output), settings.allow_unreadable, settings.workers, say)
        images = training_data.at_least_a_batch(images, settings, "readable images")
    run = _Run(settings, images, n_classes, device)
    run.resume()
    report = _Report(run)
    end = min(run.last_step, settings.max_steps or run.last_step)
    made = ahead.made_ahead(training_data.batches(images, settings, device, run.step, end), device)

    def evaluates() -> bool:
        if held_out is None or not run.at_end_of_epoch:
            return False
        return run.epochs_done % settings.knn_every == 0 or run.step == run.last_step

    def evaluate() -> None:
        assert held_out is not None
        report.evaluation(_knn(run.model.encoder, images, held_out, settings))

    if run.step and evaluates() and _anywhere(not report.log.has(run.step, "knn_accuracy"), device):
        evaluate()  # the run ended after this step's checkpoint and before its evaluation
    run.model.train()
    while run.step < end:
        report.add(*run.learn(*next(made)))
        if run.step % settings.log_every == 0 or run.step == end:
            report.line()
        if run.at_end_of_epoch and run.epochs_done in settings.snapshots:
            run.keep_snapshot()
        asked = stop.agreed(device)
        if asked or run.step == end or (run.at_end_of_epoch and run.epochs_done % settings.checkpoint_every == 0):
            run.save()
        if not asked and evaluates():  # after the checkpoint, which a kill in a long evaluation would else cost
            evaluate()
            asked = stop.agreed(device)
            if asked:
                run.save()
        if asked:
            say(f"asked to stop: saved at step {run.step}; start again with the same settings to go on")
            return PREEMPTED
    if run.step == run.last_step:
        run.keep_encoder()
    return 0


class _Run:
    """A training as it stands after `step` steps: what a checkpoint holds, and what a run leaves."""

    def __init__(self, settings: Settings, images: data.ImageSet, n_classes: int, device: torch.device) -> None:
        self.settings, self.images, self.device = settings, images, device
        self.folder = Path(settings.output)
        model = make_model(settings, n_classes).to(device)
        self.model = (
            model.to(memory_format=torch.channels_last) if training_settings.in_channels_last(settings, device) else model
        )
        self.parallel: nn.Module = self.model
        if losses.n_processes() > 1:
            self.parallel = nn.parallel.DistributedDataParallel(synchronised(self.model, device))
        self.optimizer = training_settings.make_optimizer(self.model, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "float16")
        self.step, self.made_by = 0, made_by_also_here([])
        self.steps_per_epoch = len(images) // settings.batch_size
        self.last_step = settings.epochs * self.steps_per_epoch

    @property
    def epochs_done(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def at_end_of_epoch(self) -> bool:
        return self.step % self.steps_per_epoch == 0

    @property
    def sums(self) -> bool:
        """Whether the loss is a sum over anchors, of which every process has its own."""
        return self.settings.objective == "contrastive" and self.settings.reduction == "sum"

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one; ValueError when it is of other settings or images."""
        found = run_files.load_checkpoint(self.folder, self.device)
        if found is None:
            return
        _refuse_other_settings(found["settings"], self.settings)
        _refuse_other_images(found.get("images", _identity(self.images)), self.images)
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.scaler.load_state_dict(found["scaler"])
        self.step, self.made_by = found["step"], made_by_also_here(found.get("made_by", []))
        say(f"resumed at step {self.step}")

    def learn(self, batch: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One step -> the loss before it and the embeddings it came from."""
        rate = training_settings.learning_rate(self.step, self.steps_per_epoch, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, z = training_loss(self.parallel, batch, y, self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        # Processes average gradients; a loss that is a sum over processes wants their sum.
        self.scaler.scale(loss * losses.n_processes() if self.sums else loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return loss.detach(), z.detach()

    def save(self) -> None:
        """Write a checkpoint; ValueError where it would hold what is not finite."""
        # Batch norm's statistics too: float16's scaler keeps the weights from an overflow, but not them.
        if not all(bool(torch.isfinite(value).all()) for value in self.model.state_dict().values()):
            raise ValueError(
                f"step {self.step}: found NaN or infinite weights, expected finite ones; lower learning_rate or use float32"
            )
        if is_first():
            state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
            state |= dict(step=self.step, settings=asdict(self.settings), images=_identity(self.images), made_by=self.made_by)
            run_files.save_checkpoint(self.folder, self.step, state)

    def keep_snapshot(self) -> None:
        """Keep the encoder as it is after this epoch."""
        if is_first():
            file = run_files.snapshot_file(self.folder, self.epochs_done)
            encoders.save_encoder(self.model.encoder, file, half=True, steps=self.step)

    def keep_encoder(self) -> None:
        """Keep the encoder of the whole run, unless it is there already."""
        if is_first() and not run_files.holds(self.folder / run_files.ENCODER, self.step):
            head = self.model.head if isinstance(self.model.head, nn.Linear) else None
            # A folder is nobody else's business.
            told = json.dumps({key: value for key, value in asdict(self.settings).items() if key != "output"})
            by = json.dumps(self.made_by)
            encoders.save_encoder(
                self.model.encoder, self.folder / run_files.ENCODER, head=head, steps=self.step, settings=told, made_by=by
            )


class _Report:
    """What a run says of itself while it learns: lines of its log, and an error instead of a line that should end it."""

    def __init__(self, run: _Run) -> None:
        self.run, self.log = run, run_files.Log(run.folder / "log.jsonl", run.step)
        self.losses: list[Tensor] = []  # since the last line
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.began, self.began_step = time.perf_counter(), self.run.step

    def add(self, loss: Tensor, z: Tensor) -> None:
        """After a step: its loss, and the embeddings it came from."""
        self.losses.append(loss)
        self.z = z

    def line(self) -> None:
        """Mean loss, learning rate and speed since the last line; ValueError for a loss that is not finite, or a collapse."""
        run, settings, n_steps = self.run, self.run.settings, self.run.step - self.began_step
        value = _over_processes(torch.stack(self.losses).mean(), run.sums)
        if not math.isfinite(value):
            raise ValueError(
                f"step {run.step}: found loss {value}, expected a finite one; lower learning_rate, or lengthen warmup_epochs"
            )
        self._refuse_collapse()
        self.log.write(
            step=run.step,
            epoch=round(run.step / run.steps_per_epoch, 4),
            loss=value / (settings.batch_size * (1 + settings.symmetric)) if run.sums else value,  # per anchor
            learning_rate=training_settings.learning_rate(run.step - 1, run.steps_per_epoch, settings),
            images_per_second=round(n_steps * settings.batch_size / (time.perf_counter() - self.began), 1),
        )
        self.losses = []
        self._restart_clock()

    def _refuse_collapse(self) -> None:
        run, settings = self.run, self.run.settings
        alike = likeness(losses.gather(self.z.chunk(2)[0])) if settings.objective == "contrastive" else 0.0
        if alike > COLLAPSED and (run.step - 1) // run.steps_per_epoch > min(settings.warmup_epochs, _SETTLED):
            raise ValueError(
                f"step {run.step}: found embeddings of different images {alike:.4f} alike, expected less than {COLLAPSED}: "
                "the representation has collapsed; lower learning_rate or tau"
            )

    def evaluation(self, accuracy: float) -> None:
        """The accuracy at the end of an epoch; the time that it took is none of training's."""
        self.log.write(step=self.run.step, epoch=float(self.run.epochs_done), knn_accuracy=accuracy)
        self._restart_clock()


def made_by_also_here(earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What trained an encoder, in order: commit, versions and hardware of each start that differs from the one before.

    >>> len(made_by_also_here(made_by_also_here([]))), list(made_by_also_here([])[0])
    (1, ['commit', 'versions', 'hardware'])
    """
    here = dict(commit=record.git_state(record.checkout()), versions=record.versions(), hardware=record.hardware())
    return earlier if earlier and earlier[-1] == here else [*earlier, here]


def _anywhere(here: bool, device: torch.device) -> bool:
    """Whether something is so for the first process, which has the log; the same answer for all."""
    if not losses.is_distributed():
        return here
    found = torch.tensor(float(here and is_first()), device=device)
    distributed.all_reduce(found)
    return bool(found)


def _over_processes(value: Tensor, of_sum: bool) -> float:
    if losses.is_distributed():
        distributed.all_reduce(value)
        value = value if of_sum else value / distributed.get_world_size()
    return float(value)


def _held_out(settings: Settings, images: data.ImageSet) -> data.ImageSet | None:
    """This process's share of the kNN evaluation's labelled images, looked for before the training and not hours later.

    None without an evaluation.
    """
    if not (settings.knn_every and settings.knn_data):
        return None
    held_out = training_data.prepared(settings.knn_data, settings)
    if images.labels is None or held_out.labels is None:
        raise ValueError(f"knn_data: found no labels in {images.name} or {held_out.name}, expected labels for the kNN evaluation")
    chosen = data.split(len(held_out), {"test": min(len(held_out), settings.knn_images)}, seed=0)["test"]
    return _share(held_out[chosen]).resized(settings.image_size)


def _knn(encoder: encoders.ResNet, images: data.ImageSet, test: data.ImageSet, settings: Settings) -> float:
    """Accuracy on the held-out images, of which `test` is this process's share, among some of those it is trained on."""
    bank = images[data.split(len(images), {"bank": min(len(images), 5 * settings.knn_images)}, seed=0)["bank"]]
    bank = _share(bank).resized(settings.image_size)
    return probe.knn_accuracy(*_all_features(encoder, bank, settings.dtype), *_all_features(encoder, test, settings.dtype))


def _share(images: data.ImageSet) -> data.ImageSet:
    """This process's part of the images: each process decodes and holds its own."""
    if not losses.is_distributed():
        return images
    return images[torch.arange(len(images)).tensor_split(distributed.get_world_size())[distributed.get_rank()]]


def _all_features(encoder: encoders.ResNet, share: data.ImageSet, dtype: str) -> tuple[Tensor, Tensor]:
    """Features and labels of the images of all processes' shares, in the order that they had together."""
    assert share.labels is not None  # _held_out has looked
    own = embed.embed(encoder, share.images, dtype=dtype) if len(share) else torch.empty(0, encoder.dim)
    parts = [(own, share.labels)]
    if losses.is_distributed():
        parts *= distributed.get_world_size()
        distributed.all_gather_object(parts, parts[0])
    features, labels = (torch.cat(kind) for kind in zip(*parts, strict=True))
    return features, labels


# --- the launch ---------------------------------------------------------------------------------------------------------


def _gpu_of(local_rank: int, n_gpus: int) -> int:
    """The GPU of one of this machine's processes, its own; ValueError when there are more processes than GPUs."""
    if local_rank >= n_gpus:
        raise ValueError(
            f"torchrun: found process {local_rank + 1} of this machine and {n_gpus} GPUs, expected a GPU for each process: start "
            f"it with --nproc-per-node {n_gpus}"
        )
    return local_rank


def _store_of_this_start() -> tuple[distributed.Store, int, int]:
    """torchrun's store with keys of this start alone, this process's rank, and how many there are.

    torchrun keeps one store for all restarts, in which a process would find the addresses of those that are gone, and wait for
    them; nor does it number its starts alike on all machines. So each process leaves a mark of its own, and all go on as soon
    as all have seen the same marks: then each has seen every other's newest.
    """
    store, rank, world = next(distributed.rendezvous("env://"))
    marks, views = ([f"{kind}/{i}" for i in range(world)] for kind in ("mark", "seen"))
    store.set(marks[rank], uuid.uuid4().hex)
    deadline = time.monotonic() + _TOGETHER
    while time.monotonic() < deadline:
        if store.check(marks):
            seen = record.digest([mark.decode() for mark in store.multi_get(marks)])
            store.set(views[rank], seen)
            if store.check(views) and set(store.multi_get(views)) == {seen.encode()}:
                return distributed.PrefixStore(seen, store), rank, world
        time.sleep(0.1)
    raise RuntimeError(f"found not all of {world} processes started within {_TOGETHER} s, expected all; start them again")


def main(arguments: list[str] | None = None) -> int:
    """The command line: reads settings, joins torchrun's processes when there are any, trains."""
    parser = argparse.ArgumentParser(prog="python -m cadetlib.pretrain", description="Pretrain an encoder; resumes by itself.")
    parser.add_argument("--params", required=True, type=Path, help="YAML file of a profile's 01_pretraining")
    parser.add_argument("--output", help="folder of this run; default: the one in which notebook 01 looks for it")
    parser.add_argument("--objective", default="contrastive", choices=("contrastive", "supervised"))
    chosen = parser.parse_args(arguments)
    processes.keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # on a GPU: every step has the same shapes, so the fastest convolutions are looked for
    try:
        settings = training_settings.settings_from(parameters.read_yaml(chosen.params), chosen.objective)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    settings = replace(settings, output=chosen.output or str(training_settings.run_folder(settings)))
    # Only torchrun's own variables count: RANK and WORLD_SIZE may be left over from something else.
    if distributed.is_available() and distributed.is_torchelastic_launched():
        # Before the processes meet: one that ended meanwhile would leave the others waiting for it.
        _check_division(settings.batch_size, int(os.environ["WORLD_SIZE"]))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(_gpu_of(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
        processes.die_with_parent()  # torchrun puts each process into a session of its own
        store, rank, world = _store_of_this_start()
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    code = train(settings)
    if distributed.is_available() and distributed.is_initialized():  # not after an error: it would wait for the other processes
        distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
