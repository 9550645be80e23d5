"""The training program (Section 3): contrastive pretraining after SimCLRv2, or a supervised classifier for comparison.

    python -m cadetlib.pretrain --params params/digits/01_pretraining.yaml
    torchrun --nproc-per-node 8 -m cadetlib.pretrain --params FILE.yaml

Read it downwards: settings, schedule, the loop, the run and its report, the launch. What a run keeps on disk is in `run_files`;
notebooks ask `trained` for encoders. All randomness is a function of (seed, epoch, image, view), so that a run is the same on
any number of processes and goes on after any interruption as if there had been none. Exit codes: 0 finished, 75 saved and left
because SIGTERM, SIGUSR1 or SIGUSR2 asked, 1 anything else (torchrun has its own: 1 also when it was asked to stop and its
processes have saved).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from cadetlib import (
    ahead,
    checks,
    data,
    embed,
    encoders,
    imagenet,
    losses,
    parameters,
    probe,
    processes,
    record,
    run_files,
    stream,
)
from cadetlib.run_files import is_first, say
from cadetlib.synchronised import synchronised
from cadetlib.views import TrainViews

PREEMPTED = 75  # EX_TEMPFAIL: saved; start me again
OPERATION = (
    "output",
    "log_every",
    "checkpoint_every",
    "knn_every",
    "knn_data",
    "knn_images",
    "snapshots",
    "max_steps",
    "workers",
    "allow_unreadable",
)  # may change between runs
TAKEN = {"contrastive": "pretrained", "supervised": "supervised_pretrained"}  # objective -> parameter that names weights
COLLAPSED = 0.99  # mean similarity of different images beyond which nothing is being learned
_SETTLED = 5  # epochs, or the warm-up when it is shorter, before a collapse is looked for
_TOGETHER = 600  # seconds within which all processes must have started


@dataclass(frozen=True)
class Settings:
    """A training run. The defaults are the paper's where it gives one, SimCLRv2's where it does not.

    >>> Settings(epochs=90).batch_size
    1024
    """

    output: str = "outputs/training"  # folder of checkpoints, log and encoder
    data: str = "digits-train"  # image set, one of data.SOURCES
    classes: list[int] = field(default_factory=list)  # keep only these labels; empty: all
    objective: str = "contrastive"  # "contrastive" (Eq. 1) or "supervised" (cross entropy)
    arch: str = "resnet50"
    width: int = 64  # channels of the first stage
    stem: str = "imagenet"  # "imagenet" or "cifar", of encoders.STEMS
    image_size: int = 224
    head_hidden: int = 2048
    head_dim: int = 128
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # smallest and largest area fraction of a crop
    flip: float = 0.5  # probabilities of the other transformations
    jitter: float = 0.8
    jitter_strength: float = 1.0
    greyscale: float = 0.2
    blur: float = 0.5
    tau: float = 0.1
    symmetric: bool = False  # also anchors of the second view (SimCLR); Eq. 1 as printed has only the first
    reduction: str = "sum"  # "sum" (Eq. 1) or "mean"
    batch_size: int = 1024  # over all processes
    epochs: int = 800
    warmup_epochs: int = 40
    optimizer: str = "lars"  # "lars", "sgd" or "adamw"
    learning_rate: float = 1.2
    momentum: float = 0.9
    weight_decay: float = 0.0001
    dtype: str = "float32"  # of the forward and backward pass: "float32", "bfloat16", "float16" or "auto"
    channels_last: bool = False
    seed: int = 0
    log_every: int = 10  # steps
    checkpoint_every: int = 10  # epochs
    knn_every: int = 0  # epochs between kNN evaluations; 0: none
    knn_data: str = ""  # held-out labelled set of the kNN evaluation
    knn_images: int = 2000  # at most so many of it, and five times as many to look among
    snapshots: list[int] = field(default_factory=list)  # epochs after which the encoder is kept beside the final one
    max_steps: int = 0  # stop after so many steps, to try a configuration; 0: run to the end
    stream: bool = False  # read image files as training goes on; sets that do not fit in memory always are
    workers: int = 0  # processes that decode a streamed set, for each training process; 0: one a core
    allow_unreadable: int = 0  # damaged image files of a set to leave out; with more, training does not begin

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "objective": ("contrastive", "supervised"),
            "optimizer": ("lars", "sgd", "adamw"),
            "reduction": ("sum", "mean"),
            "dtype": (*embed.DTYPES, embed.AUTO),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected one of {allowed}")
        for name in ("batch_size", "epochs", "log_every", "checkpoint_every", "knn_images", "width"):
            checks.at_least(getattr(self, name), name, 1)
        for name in ("workers", "allow_unreadable", "knn_every", "max_steps", "warmup_epochs"):
            checks.at_least(getattr(self, name), name, 0)
        checks.in_open_interval(self.tau, "tau", high=math.inf)
        for name in ("flip", "jitter", "greyscale", "blur"):
            if checks.not_negative(getattr(self, name), name) > 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a probability")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: found {self.crop_scale}, expected [low, high] with 0 < low <= high <= 1")


def learning_rate(step: int, steps_per_epoch: int, settings: Settings) -> float:
    """Linear warm-up per iteration, then a cosine to zero at the last epoch (Section 3). step counts from 0.

    >>> settings = Settings(epochs=10, warmup_epochs=2, learning_rate=1.0)
    >>> [round(learning_rate(step, 1, settings), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    warmup, total = settings.warmup_epochs * steps_per_epoch, settings.epochs * steps_per_epoch
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer; batch norm's parameters and biases are left out of weight decay and of LARS's adaptation.

    >>> [group["weight_decay"] for group in make_optimizer(nn.BatchNorm2d(3), Settings(optimizer="sgd")).param_groups]
    [0.0001, 0.0]
    """
    plain = [p for p in model.parameters() if p.ndim <= 1]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        dict(params=decayed, weight_decay=settings.weight_decay),
        dict(params=plain, weight_decay=0.0),
    ]
    if settings.optimizer == "lars":
        from timm.optim import Lars

        groups[0]["always_adapt"] = True  # timm adapts no group without weight decay
        return Lars(groups, lr=settings.learning_rate, momentum=settings.momentum, trust_coeff=0.001)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.momentum, 0.999))


# --- what a run may go on from -----------------------------------------------------------------------------------------


def different_settings(found: Mapping[str, Any], settings: Settings) -> list[str]:
    """What a finished or interrupted run was told otherwise, "name value and value now"; those of OPERATION may differ.

    A setting that an older run did not know yet had its default; a dtype that is left to the machine is never another one.

    >>> different_settings({"epochs": 800, "log_every": 3}, Settings(epochs=90))
    ['epochs 800 (then) and 90 (now)']
    """
    expected, known = asdict(settings), asdict(Settings()) | dict(found)
    free = (*OPERATION, "dtype") if settings.dtype == embed.AUTO else OPERATION
    decisive = [k for k in expected if k not in free and known[k] != expected[k]]
    return [f"{k} {known[k]!r} (then) and {expected[k]!r} (now)" for k in decisive]


def _refuse_other_settings(found: Mapping[str, Any], settings: Settings) -> None:
    """ValueError naming each setting in which a checkpoint differs from this run."""
    if different := different_settings(found, settings):
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
        self.asked = False

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
        if not losses.is_distributed():
            return self.asked
        flag = torch.tensor(float(self.asked), device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return bool(flag)


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


def in_channels_last(settings: Settings, device: torch.device) -> bool:
    """Whether images and weights lie channels last in memory: when asked for, but on a CPU not with fewer than 8 channels.

    There torch 2.14 (AVX2) writes beyond the gradient of a 1x1 convolution's weights, which aborts the process or worse.

    >>> narrow, cpu = Settings(width=4, channels_last=True), torch.device("cpu")
    >>> in_channels_last(narrow, cpu), in_channels_last(replace(narrow, width=8), cpu)
    (False, True)
    """
    return settings.channels_last and (device.type != "cpu" or settings.width >= 8)


def _n_views(settings: Settings) -> int:
    return 2 if settings.objective == "contrastive" else 1


def train_views(settings: Settings) -> TrainViews:
    """The transformations that a run's settings ask for.

    >>> train_views(Settings(blur=0.0)) == TrainViews(224, blur=0.0)
    True
    """
    return TrainViews(
        settings.image_size,
        (settings.crop_scale[0], settings.crop_scale[1]),
        settings.flip,
        settings.jitter,
        settings.jitter_strength,
        settings.greyscale,
        settings.blur,
        settings.seed,
    )


def training_views(views: TrainViews, x: Tensor, keys: Tensor, epoch: int, settings: Settings) -> Tensor:
    """The views of one batch (V b, 3, S, S), the first of all images, then the second. x: (b, 3, S, S) float, keys: (b,) numbers.

    Of a streamed set, x are the views' crops (b, V, 3, S, S).

    >>> training_views(TrainViews(8), torch.rand(4, 3, 8, 8), torch.arange(4), epoch=0, settings=Settings()).shape
    torch.Size([8, 3, 8, 8])
    """
    numbers = stream.view_numbers(epoch, _n_views(settings))
    batch = views.after_crop(x, keys, numbers) if x.ndim == 5 else views(x, keys, numbers)
    return batch.contiguous(memory_format=torch.channels_last) if in_channels_last(settings, batch.device) else batch


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


def is_streamed(settings: Settings) -> bool:
    """Whether the run's images are read from files as it goes on: when asked for, or when they do not fit in memory.

    >>> is_streamed(Settings(data="imagenet-train")), is_streamed(Settings(data="digits-train"))
    (True, False)
    """
    return settings.stream or (settings.data in imagenet.SETS and imagenet.SETS[settings.data].streamed)


def prepared(name: str, settings: Settings) -> data.ImageSet:
    """A set of the run's classes, counted from 0; files are not read yet.

    >>> prepared("digits", Settings(classes=[7, 8])).labels.unique()
    tensor([0, 1])
    """
    images = data.load(name, allow_unreadable=settings.allow_unreadable).of_classes(settings.classes)
    if settings.classes and images.labels is not None:
        position = {label: i for i, label in enumerate(settings.classes)}
        images = replace(images, labels=torch.tensor([position[int(label)] for label in images.labels]))
    return images


def _training_images(settings: Settings) -> data.ImageSet:
    """The run's images, with labels counted from 0 in the order of `classes`; brought to its size unless they are streamed."""
    images = prepared(settings.data, settings)
    if not is_streamed(settings):
        images = images.resized(settings.image_size)
    elif not isinstance(images, data.FolderSet):
        raise ValueError(f"stream: found {images.name}, which is no set of image files, expected one of {list(imagenet.SETS)}")
    if images.labels is None and settings.objective == "supervised":
        raise ValueError(f"data: found no labels in {images.name}, expected some for the supervised objective")
    return _at_least_a_batch(images, settings)


def _check_division(batch_size: int, world: int) -> None:
    if batch_size < 2 or batch_size % world:
        raise ValueError(f"batch_size: found {batch_size} on {world} processes, expected at least 2 and a multiple of {world}")


def _at_least_a_batch(images: data.ImageSet, settings: Settings, of: str = "images") -> data.ImageSet:
    if len(images) < settings.batch_size:
        raise ValueError(f"batch_size: found {settings.batch_size} with {len(images)} {of}, expected at most one batch an epoch")
    return images


def labelled_images(given: Mapping[str, Any], name: str) -> data.ImageSet:
    """Another set prepared as the training images of these parameters are: same classes, size and count of labels.

    >>> labelled_images(dict(classes=[7, 8], image_size=16), "digits").labels.unique()
    tensor([0, 1])
    """
    return _training_images(replace(settings_from(given), data=name, batch_size=1))


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
    _check_division(settings.batch_size, _n_processes())
    images = _training_images(settings)
    held_out = _held_out(settings, images)
    n_classes = 1 if images.labels is None else int(images.labels.max()) + 1
    if isinstance(images, data.FolderSet):
        images = stream.readable(images, Path(settings.output), settings.allow_unreadable, settings.workers, say)
        images = _at_least_a_batch(images, settings, "readable images")
    run = _Run(settings, images, n_classes, device)
    run.resume()
    report = _Report(run)
    end = min(run.last_step, settings.max_steps or run.last_step)
    made = ahead.made_ahead(batches(images, settings, device, run.step, end), device)

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


def _n_processes() -> int:
    return distributed.get_world_size() if losses.is_distributed() else 1


class _Run:
    """A training as it stands after `step` steps: what a checkpoint holds, and what a run leaves."""

    def __init__(self, settings: Settings, images: data.ImageSet, n_classes: int, device: torch.device) -> None:
        self.settings, self.images, self.device = settings, images, device
        self.folder = Path(settings.output)
        model = make_model(settings, n_classes).to(device)
        self.model = model.to(memory_format=torch.channels_last) if in_channels_last(settings, device) else model
        self.parallel: nn.Module = self.model
        if _n_processes() > 1:
            self.parallel = nn.parallel.DistributedDataParallel(synchronised(self.model, device))
        self.optimizer = make_optimizer(self.model, settings)
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
        rate = learning_rate(self.step, self.steps_per_epoch, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, z = training_loss(self.parallel, batch, y, self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        # Processes average gradients; a loss that is a sum over processes wants their sum.
        self.scaler.scale(loss * _n_processes() if self.sums else loss).backward()
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
            learning_rate=learning_rate(run.step - 1, run.steps_per_epoch, settings),
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


def steps_at_once(settings: Settings, device: torch.device) -> int:
    """For how many steps the views are made together: for one; on a GPU for several, where they are small.

    A call of TrainViews asks for some 300 operations, however many views it makes: one step's leave a GPU with little to do.

    >>> [steps_at_once(Settings(image_size=side, batch_size=512), torch.device("cuda")) for side in (32, 96, 224)]
    [8, 1, 1]
    >>> steps_at_once(Settings(image_size=32), torch.device("cpu"))
    1
    """
    pixels = _n_views(settings) * (settings.batch_size // _n_processes()) * settings.image_size**2
    return max(1, embed.GPU_PIXELS // pixels) if device.type == "cuda" else 1


def batches(
    images: data.ImageSet, settings: Settings, device: torch.device, first: int, last: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What each step first .. last - 1 learns from on this process: views (V b, 3, S, S) and labels (b,).

    >>> tiny = Settings(image_size=8, batch_size=4)
    >>> [views.shape for views, _ in batches(data.load("digits").resized(8), tiny, torch.device("cpu"), first=0, last=2)]
    [torch.Size([8, 3, 8, 8]), torch.Size([8, 3, 8, 8])]
    """
    views, at_once, per_epoch = train_views(settings), steps_at_once(settings, device), len(images) // settings.batch_size
    shares = _shares(images, views, settings, device, first, last)
    while first < last:
        epoch, position = divmod(first, per_epoch)
        n_steps = min(at_once, per_epoch - position, last - first)  # all of one epoch, whose number its views have
        x, y, keys = zip(*itertools.islice(shares, n_steps), strict=True)
        made = _of_each_step(training_views(views, torch.cat(x), torch.cat(keys), epoch, settings), n_steps, settings)
        for labels in y:
            yield made.pop(0), labels  # which then nobody but the step holds
        first += n_steps


def _of_each_step(made: Tensor, n_steps: int, settings: Settings) -> list[Tensor]:
    """The views of several steps (V n b, 3, S, S), the first of all images before the second -> (V b, 3, S, S) of each."""
    if n_steps == 1:
        return [made]
    parts = made.chunk(_n_views(settings) * n_steps)
    return [torch.cat(parts[i::n_steps]) for i in range(n_steps)]


def _shares(
    images: data.ImageSet, views: TrainViews, settings: Settings, device: torch.device, first: int, last: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each step its images or their crops, labels, image numbers, on the device."""
    if isinstance(images, data.FolderSet):
        crops = stream.Crops(images, views, _n_views(settings))
        yield from stream.batches(crops, settings.batch_size, settings.seed, first, last, device, settings.workers)
        return
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if losses.is_distributed() else (0, 1)
    pixels = images.images.to(device)
    labels = (images.labels if images.labels is not None else torch.zeros(len(images))).to(device)
    for _, index in stream.shares(len(images), settings.batch_size, settings.seed, first, last, rank, world):
        index = index.to(device, non_blocking=True)
        yield checks.images(pixels[index]), labels[index], index


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
    held_out = prepared(settings.knn_data, settings)
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


def settings_from(given: Mapping[str, Any], objective: str = "contrastive") -> Settings:
    """The settings of one run from a profile's flat parameters, checked by name and type.

    A key `supervised_X` stands in for X when the objective is "supervised"; `profile` and `output` say where results go:
    <output, or outputs/<profile>>/pretraining/<objective>.

    >>> settings_from({"epochs": 800, "supervised_epochs": 90}, "supervised").epochs
    90
    """
    defaults = {f.name: getattr(Settings(), f.name) for f in fields(Settings) if f.name != "objective"}
    allowed = defaults | {f"supervised_{k}": v for k, v in defaults.items()} | {"profile": "digits", "output": "", "processes": 1}
    # what notebook 01 is told besides
    besides = dict.fromkeys(TAKEN.values(), "") | {"other_recipes": [], "train_other_recipes": True}
    checked = parameters.validate(allowed | besides, given)
    folder = record.output_folder(checked["profile"], checked["output"])
    chosen = {k: v for k, v in given.items() if k in defaults}
    if objective == "supervised":
        own = {k: v for k, v in given.items() if k.startswith("supervised_") and k not in TAKEN.values()}
        chosen |= {k.removeprefix("supervised_"): v for k, v in own.items()}
    chosen["output"] = str(folder / "pretraining" / objective)
    return Settings(objective=objective, **parameters.validate(defaults, chosen))


def run_folder(settings: Settings) -> Path:
    """Where a run belongs: its `output`, with a digest of all settings that are decisive and not the default.

    So a run that was interrupted is found again, one with other settings begins anew, and a finished one is not repeated.

    >>> run_folder(Settings(output="training")) == run_folder(Settings(output="training", epochs=90))
    False
    """
    defaults = asdict(Settings())
    decisive = {k: v for k, v in asdict(settings).items() if k not in OPERATION and v != defaults[k]}
    return Path(f"{settings.output}-{record.digest(decisive)[:8]}")


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
        settings = settings_from(parameters.read_yaml(chosen.params), chosen.objective)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    settings = replace(settings, output=chosen.output or str(run_folder(settings)))
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
