"""What a training run is told, and what follows from that alone: schedule, optimizer, transformations, its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadetlib import checks, embed, imagenet, parameters, record
from cadetlib.views import TrainViews

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
    optimizer: str = "lars"  # "lars", "sgd" (Nesterov's momentum) or "adamw"
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


def in_channels_last(settings: Settings, device: torch.device) -> bool:
    """Whether images and weights lie channels last in memory: when asked for, but on a CPU not with fewer than 8 channels.

    There torch 2.14 (AVX2) writes beyond the gradient of a 1x1 convolution's weights, which aborts the process or worse.

    >>> [in_channels_last(Settings(width=width, channels_last=True), torch.device("cpu")) for width in (4, 8)]
    [False, True]
    """
    return settings.channels_last and (device.type != "cpu" or settings.width >= 8)


def n_views(settings: Settings) -> int:
    """How many views a step takes of an image.

    >>> n_views(Settings()), n_views(Settings(objective="supervised"))
    (2, 1)
    """
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


def is_streamed(settings: Settings) -> bool:
    """Whether the run's images are read from files as it goes on: when asked for, or when they do not fit in memory.

    >>> is_streamed(Settings(data="imagenet-train")), is_streamed(Settings(data="digits-train"))
    (True, False)
    """
    return settings.stream or (settings.data in imagenet.SETS and imagenet.SETS[settings.data].streamed)


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
