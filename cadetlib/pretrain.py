"""The training program (Section 3): contrastive pretraining after SimCLRv2, or a supervised classifier for comparison.

    python -m cadetlib.pretrain --params params/digits/01_pretraining.yaml
    torchrun --nproc-per-node 8 -m cadetlib.pretrain --params FILE.yaml

Read it downwards: settings, schedule, synchronised batch norm, checkpoints, the loop, the launch. All randomness is a function
of (seed, epoch, image, view), so that a run is the same on any number of processes and goes on after any interruption as if
there had been none. Exit codes: 0 finished, 75 saved and left because SIGTERM or SIGUSR1 asked for it, 1 anything else.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from cadetlib import checks, data, embed, encoders, losses, parameters, probe
from cadetlib.views import TrainViews

PREEMPTED = 75  # EX_TEMPFAIL: saved; start me again
OPERATION = (
    "output",
    "log_every",
    "checkpoint_every",
    "knn_every",
    "knn_data",
    "knn_images",
    "max_steps",
)  # may change between runs
COLLAPSED = 0.99  # mean similarity of different images beyond which nothing is being learned
_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")
_KEEP = 2  # checkpoints: the last, and the one before it should the last be damaged


@dataclass(frozen=True)
class Settings:
    """A training run. The defaults are the paper's where it gives one, SimCLRv2's where it does not."""

    output: str = "outputs/training"  # folder of checkpoints, log and encoder
    data: str = "digits-train"  # image set, one of data.SOURCES
    classes: list[int] = field(default_factory=list)  # keep only these labels; empty: all
    objective: str = "contrastive"  # "contrastive" (Eq. 1) or "supervised" (cross entropy)
    arch: str = "resnet50"
    width: int = 64  # channels of the first stage
    stem: str = "imagenet"  # "imagenet" or "cifar"
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
    dtype: str = "float32"  # of the forward and backward pass: "float32", "bfloat16" or "float16"
    channels_last: bool = False
    seed: int = 0
    log_every: int = 10  # steps
    checkpoint_every: int = 10  # epochs
    knn_every: int = 0  # epochs between kNN evaluations; 0: none
    knn_data: str = ""  # held-out labelled set of the kNN evaluation
    knn_images: int = 2000  # at most so many of it, and five times as many to look among
    max_steps: int = 0  # stop after so many steps, to try a configuration; 0: run to the end

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "objective": ("contrastive", "supervised"),
            "optimizer": ("lars", "sgd", "adamw"),
            "reduction": ("sum", "mean"),
            "dtype": tuple(embed.DTYPES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected one of {allowed}")
        for name in ("batch_size", "epochs", "log_every", "checkpoint_every"):
            checks.at_least(getattr(self, name), name, 1)
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: found {self.crop_scale}, expected [low, high] with 0 < low <= high <= 1")


def learning_rate(step: int, steps_per_epoch: int, settings: Settings) -> float:
    """Linear warm-up per iteration, then a cosine to zero at the last epoch (Section 3). step counts from 0."""
    warmup, total = settings.warmup_epochs * steps_per_epoch, settings.epochs * steps_per_epoch
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer; batch norm's parameters and biases are left out of weight decay and of LARS's adaptation."""
    plain = [p for p in model.parameters() if p.ndim <= 1]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [dict(params=decayed, weight_decay=settings.weight_decay), dict(params=plain, weight_decay=0.0)]
    if settings.optimizer == "lars":
        from timm.optim import Lars

        return Lars(groups, lr=settings.learning_rate, momentum=settings.momentum, trust_coeff=0.001)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.momentum, 0.999))


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient


class _CpuSyncBatchNorm(nn.SyncBatchNorm):
    """Batch norm over all processes' samples where torch has none: on CPU. Local statistics would leak the positive pair."""

    def forward(self, x: Tensor) -> Tensor:
        running_mean, running_var, momentum = self.running_mean, self.running_var, self.momentum
        assert running_mean is not None and running_var is not None and momentum is not None  # torch's defaults
        if not (self.training and losses.is_distributed()):
            return F.batch_norm(x, running_mean, running_var, self.weight, self.bias, self.training, momentum, self.eps)
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        n = x.numel() // x.shape[1] * distributed.get_world_size()
        mean = _SumOverProcesses.apply(x.float().sum(dims)) / n
        centred = x.float() - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims)) / n
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (n / (n - 1)), momentum)
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        return (normal * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norm over all processes; torch's own on CUDA."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.__class__ = _CpuSyncBatchNorm
    return model


# --- checkpoints --------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write atomically a checkpoint whose name carries its own digest; keep the last two."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"checkpoint-{step:09d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    temporary = folder / f".{path.name}.part"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-_KEEP]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest undamaged checkpoint; a damaged one is set aside with a loud line. None when there is none at all."""
    paths = sorted(folder.glob("checkpoint-*.pt"), reverse=True)
    for path in paths:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] == path.stem.rpartition("-")[2]:
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        print(f"DAMAGED CHECKPOINT {path.name}: its content does not match its name; going back to the one before", flush=True)
        if _is_first():
            path.replace(path.with_suffix(".damaged"))
    if paths:
        raise ValueError(f"found only damaged checkpoints in {folder.name}, expected one whole; remove them to begin anew")
    return None


def refuse_other_settings(found: dict[str, Any], settings: Settings) -> None:
    """ValueError naming each setting in which a checkpoint differs from this run; those of OPERATION may differ."""
    expected = asdict(settings)
    different = [k for k in expected if k not in OPERATION and found.get(k) != expected[k]]
    if different:
        listed = ", ".join(f"{k} {found.get(k)!r} (checkpoint) and {expected[k]!r} (now)" for k in different)
        raise ValueError(f"resume: found {listed}; expected equal settings: restore them, or choose another output folder")


# --- the loop -----------------------------------------------------------------------------------------------------------


def _is_first() -> bool:
    return not losses.is_distributed() or distributed.get_rank() == 0


@dataclass
class _Stop:
    """Set by SIGTERM or SIGUSR1, looked at after every step by all processes together."""

    asked: bool = False

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: setattr(self, "asked", True))

    def agreed(self, device: torch.device) -> bool:
        if not losses.is_distributed():
            return self.asked
        flag = torch.tensor(float(self.asked), device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return bool(flag)


class Model(nn.Module):
    """Encoder and head in one module, so that one forward pass serves all views and processes can keep in step."""

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
    """A fresh model, initialised from the seed and not from the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Model(settings, n_classes)


def training_loss(
    model: nn.Module, views: TrainViews, x: Tensor, y: Tensor, keys: Tensor, epoch: int, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Loss of one batch and the embeddings it came from. x: (b, 3, S, S) float, y: (b,) labels, keys: (b,) image numbers.

    Summed over processes ("sum") or averaged over them ("mean") it is the loss of the whole batch.
    """
    numbers = (2 * epoch, 2 * epoch + 1) if settings.objective == "contrastive" else (2 * epoch,)
    batch = torch.cat([views(x, keys, number) for number in numbers])
    if settings.channels_last:
        batch = batch.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, embed.DTYPES[settings.dtype], enabled=settings.dtype != "float32"):
        z = model(batch)
    z = z.float()
    if settings.objective == "supervised":
        return F.cross_entropy(z, y), z
    z0, z1 = z.chunk(2)
    return losses.info_nce(z0, z1, settings.tau, settings.symmetric, settings.reduction, check=False), z


def _similarity_of_images(z: Tensor) -> float:
    """Mean cosine similarity over pairs of rows: 1 when the representation has collapsed to a point."""
    n = len(z)
    total = F.normalize(z.detach(), dim=1).sum(dim=0).square().sum()
    return float((total - n) / (n * (n - 1)))


def training_images(settings: Settings) -> data.ImageSet:
    """The run's images, brought to its size, with labels counted from 0 in the order of `classes`."""
    images = data.load(settings.data).of_classes(settings.classes).resized(settings.image_size)
    if settings.classes and images.labels is not None:
        position = {label: i for i, label in enumerate(settings.classes)}
        images = replace(images, labels=torch.tensor([position[int(label)] for label in images.labels]))
    if len(images) < settings.batch_size:
        raise ValueError(
            f"batch_size: found {settings.batch_size} with {len(images)} images, expected at most one batch an epoch"
        )
    return images


def train(settings: Settings, device: torch.device | None = None) -> int:
    """Run to the end, or until asked to stop; goes on from the last checkpoint in `settings.output`. Returns the exit code."""
    device = device or torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if losses.is_distributed() else (0, 1)
    if settings.batch_size % world:
        raise ValueError(f"batch_size: found {settings.batch_size} on {world} processes, expected a multiple of {world}")
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    stop = _Stop()
    stop.listen()

    images = training_images(settings)
    pixels, labels = (
        images.images.to(device),
        (images.labels if images.labels is not None else torch.zeros(len(images))).to(device),
    )
    n_classes = int(labels.max()) + 1
    model = make_model(settings, n_classes).to(device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    parallel: nn.Module = model
    if world > 1:
        parallel = nn.parallel.DistributedDataParallel(synchronised(model, device), broadcast_buffers=False)
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "float16")
    views = TrainViews(
        settings.image_size,
        (settings.crop_scale[0], settings.crop_scale[1]),
        settings.flip,
        settings.jitter,
        settings.jitter_strength,
        settings.greyscale,
        settings.blur,
        settings.seed,
    )

    step = 0
    checkpoint = load_checkpoint(folder, device)
    if checkpoint is not None:
        refuse_other_settings(checkpoint["settings"], settings)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        step = checkpoint["step"]
        _say(f"resumed at step {step}")

    def save() -> None:
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise ValueError(
                f"step {step}: found NaN or infinite weights, expected finite ones; lower learning_rate or use float32"
            )
        if _is_first():
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step)
            save_checkpoint(folder, step, state | dict(settings=asdict(settings)))

    steps_per_epoch = len(images) // settings.batch_size
    last_step = settings.epochs * steps_per_epoch
    end = min(last_step, settings.max_steps or last_step)
    log = _Log(folder / "log.jsonl", step)
    share = settings.batch_size // world
    order, order_epoch = torch.empty(0), -1
    began, began_step, recent = time.perf_counter(), step, []
    model.train()
    while step < end:
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != order_epoch:
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
            order, order_epoch = torch.randperm(len(images), generator=generator).to(device), epoch
        first = position * settings.batch_size + rank * share
        index = order[first : first + share]
        rate = learning_rate(step, steps_per_epoch, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = checks.images(pixels[index])
        loss, z = training_loss(parallel, views, x, labels[index], index, epoch, settings)
        optimizer.zero_grad(set_to_none=True)
        # Processes average gradients; a loss that is a sum over processes wants their sum.
        of_sum = settings.objective == "contrastive" and settings.reduction == "sum"
        scaler.scale(loss * world if of_sum else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        recent.append(loss.detach())
        step += 1

        if step % settings.log_every == 0 or step == end:
            value = _over_processes(torch.stack(recent).mean(), of_sum)
            if not math.isfinite(value):
                raise ValueError(
                    f"step {step}: found loss {value}, expected a finite one; lower learning_rate, or lengthen warmup_epochs"
                )
            alike = _similarity_of_images(z) if settings.objective == "contrastive" else 0.0
            if alike > COLLAPSED and epoch > settings.warmup_epochs:
                raise ValueError(
                    f"step {step}: found embeddings of different images {alike:.4f} alike, expected less than {COLLAPSED}: "
                    "the representation has collapsed; lower learning_rate or tau"
                )
            speed = (step - began_step) * settings.batch_size / (time.perf_counter() - began)
            per_image = value / settings.batch_size if of_sum else value
            log.write(
                step=step,
                epoch=round(step / steps_per_epoch, 4),
                loss=per_image,
                learning_rate=rate,
                images_per_second=round(speed, 1),
            )
            recent = []
        finished_epoch = step % steps_per_epoch == 0
        done = step // steps_per_epoch
        if settings.knn_every and settings.knn_data and finished_epoch and (done % settings.knn_every == 0 or step == last_step):
            log.write(step=step, epoch=float(done), knn_accuracy=_knn(model.encoder, images, settings))
            model.train()
        asked = stop.agreed(device)
        if asked or step == end or (finished_epoch and done % settings.checkpoint_every == 0):
            save()
        if asked:
            _say(f"asked to stop: saved at step {step}; start again with the same settings to go on")
            return PREEMPTED
    if _is_first() and step == last_step:
        head = model.head if isinstance(model.head, nn.Linear) else None
        encoders.save_encoder(
            model.encoder, folder / "encoder.safetensors", head=head, steps=step, settings=json.dumps(asdict(settings))
        )
    return 0


def _over_processes(value: Tensor, of_sum: bool) -> float:
    if losses.is_distributed():
        distributed.all_reduce(value)
        value = value if of_sum else value / distributed.get_world_size()
    return float(value)


@torch.no_grad()
def _knn(encoder: nn.Module, images: data.ImageSet, settings: Settings) -> float:
    held_out = data.load(settings.knn_data).of_classes(settings.classes).resized(settings.image_size)
    if images.labels is None or held_out.labels is None:
        raise ValueError(f"knn_data: found no labels in {images.name} or {held_out.name}, expected labels for the kNN evaluation")
    position = {label: i for i, label in enumerate(settings.classes)}
    labels = torch.tensor([position.get(int(y), int(y)) for y in held_out.labels])
    chosen = data.split(len(held_out), {"test": min(len(held_out), settings.knn_images)}, seed=0)["test"]
    bank = data.split(len(images), {"bank": min(len(images), 5 * settings.knn_images)}, seed=0)["bank"]
    features = embed.embed(encoder, images.images[bank], dtype=settings.dtype)
    return probe.knn_accuracy(
        features, images.labels[bank], embed.embed(encoder, held_out.images[chosen], dtype=settings.dtype), labels[chosen]
    )


class _Log:
    """One JSON line per report, and a plain line for people; on resume, what came after the checkpoint is dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if _is_first():
            kept = [line for line in read_log(path) if line["step"] <= step]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        if _is_first():
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
            _say("  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log; a last line cut off by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _say(line: str) -> None:
    if _is_first():
        print(line, flush=True)


# --- the launch ---------------------------------------------------------------------------------------------------------


def settings_from(given: Mapping[str, Any], objective: str = "contrastive") -> Settings:
    """The settings of one run from a profile's flat parameters, checked by name and type.

    A key `supervised_X` stands in for X when the objective is "supervised"; `profile` and `output` say where results go:
    <output, or outputs/<profile>>/pretraining/<objective>.
    """
    defaults = {f.name: getattr(Settings(), f.name) for f in fields(Settings)}
    allowed = defaults | {f"supervised_{k}": v for k, v in defaults.items()} | {"profile": "digits", "output": "", "processes": 1}
    checked = parameters.validate(allowed, given)
    folder = Path(checked["output"] or Path(__file__).resolve().parents[1] / "outputs" / checked["profile"])
    chosen = {k: v for k, v in given.items() if k in defaults}
    if objective == "supervised":
        chosen |= {k.removeprefix("supervised_"): v for k, v in given.items() if k.startswith("supervised_")}
    chosen |= {"objective": objective, "output": str(folder / "pretraining" / objective)}
    return Settings(**parameters.validate(defaults, chosen))


def launch(given: Mapping[str, Any], objective: str = "contrastive") -> Path:
    """Train in a subprocess of its own with these parameters, its lines printed here; returns the folder of the run.

    `processes` > 1 starts that many with torchrun. The child's environment holds no distributed variables, and interrupting
    this call, or the end of this process, ends the whole group. RuntimeError when the training did not finish.
    """
    import yaml

    folder = Path(settings_from(given, objective).output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "parameters.yaml"
    file.write_text(yaml.safe_dump(dict(given), sort_keys=False))
    processes = int(given.get("processes", 1))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *torchrun, "cadetlib.pretrain", "--params", str(file), "--objective", objective]
    environment = {k: v for k, v in os.environ.items() if k not in _DISTRIBUTED and not k.startswith("TORCHELASTIC_")}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as child:
        try:
            lines: list[str] = []
            for line in child.stdout or ():
                lines = [*lines[-20:], line]
                print(line, end="", flush=True)
            code = child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)
            raise
    if code:
        raise RuntimeError(f"pretraining ended with exit code {code}; its last lines:\n" + "".join(lines))
    return folder


def main(arguments: list[str] | None = None) -> int:
    """The command line: reads settings, joins torchrun's processes when there are any, trains."""
    parser = argparse.ArgumentParser(prog="python -m cadetlib.pretrain", description="Pretrain an encoder; resumes by itself.")
    parser.add_argument("--params", required=True, type=Path, help="YAML file of a profile's 01_pretraining")
    parser.add_argument("--objective", default="contrastive", choices=("contrastive", "supervised"))
    chosen = parser.parse_args(arguments)
    settings = settings_from(parameters.read_yaml(chosen.params), chosen.objective)
    # Only torchrun's own variables count: RANK and WORLD_SIZE may be left over from something else.
    if distributed.is_available() and distributed.is_torchelastic_launched():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(backend)
    try:
        return train(settings)
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
