"""How fast this machine pretrains, scores and attacks, as a share of its own peak; and from that the hours of a profile.

    python benchmarks/throughput.py [--scale imagenet cifar] [--profile imagenet] [--out throughput.json] [--seconds 5]

The peak is the rate of a large matrix product, measured here in the same precision. A pass's FLOPs are those that torch counts
(`FlopCounterMode`); the time is that of the work as a whole, views, losses and updates included. On a CPU a share may exceed 1:
some convolutions need fewer products than are counted. `python -m cadetlib.costs imagenet --rates FILE` reads what is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cadetlib import ahead, attacks, costs, data, embed, encoders, mmd, pretrain, record, training_data, training_settings
from cadetlib.cadet import CADet

Row = dict[str, Any]
N_VIEWS, PGD_STEPS = 50, 3


class Scale(NamedTuple):
    """A network and how many images it is given at once: fewer on a CPU, whose rates do not depend on it much."""

    settings: training_settings.Settings
    batch: int
    batch_on_cpu: int


SCALES = {
    "imagenet": Scale(training_settings.Settings(data="imagenet-train", channels_last=True), batch=256, batch_on_cpu=8),
    "cifar": Scale(
        training_settings.Settings(arch="resnet18", stem="cifar", image_size=32, head_hidden=512, blur=0.0, channels_last=True),
        batch=512,
        batch_on_cpu=64,
    ),
}


def waited(device: torch.device) -> float:
    """The clock, when the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rate(work: Callable[[], object], n: int, device: torch.device, seconds: float) -> float:
    """Units a second of `work`, which does n of them: the median of the rounds that fit into `seconds`, at least three."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = waited(device)
        work()
        times.append(waited(device) - began)
    return n / statistics.median(times)


def peak(dtype: str, device: torch.device, seconds: float) -> float:
    """FLOP/s of a product of large square matrices."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(embed.DTYPES[dtype]) for _ in range(2))
    return rate(lambda: a @ b, 2 * side**3, device, seconds)


def flops(work: Callable[[], object]) -> int:
    """What the matrix products and convolutions of `work` take, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class Work(NamedTuple):
    """What is timed; the passes it makes, the images they are made for, and the FLOPs of a pass."""

    run: Callable[[], object]
    passes: int
    images: int
    flops: float


def endless_batches(settings: training_settings.Settings, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """What `pretrain` learns from step by step, of random images held on the device."""
    n, side = settings.batch_size * 8, settings.image_size
    images = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, device=device)
    random = data.ImageSet("random", images, torch.zeros(n, dtype=torch.int64))
    return ahead.made_ahead(training_data.batches(random, settings, device, 0, sys.maxsize), device)


def work_of(scale: Scale, dtype: str, device: torch.device) -> dict[str, Work]:
    """For each of costs.KINDS, its work."""
    batch = scale.batch if device.type == "cuda" else scale.batch_on_cpu
    settings = replace(scale.settings, dtype=dtype, batch_size=batch)
    model = pretrain.make_model(settings, 1).to(device, memory_format=torch.channels_last).train()
    optimizer = training_settings.make_optimizer(model, settings)
    side, n_steps = settings.image_size, 2 * training_data.steps_at_once(settings, device)
    images, keys = torch.rand(batch, 3, side, side, device=device), torch.arange(batch, device=device)
    made = endless_batches(settings, device)

    def train_a_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        pretrain.training_loss(model, *next(made), settings)[0].backward()
        optimizer.step()

    def train() -> None:
        for _ in range(n_steps):
            train_a_step()

    encoder = (
        encoders.placed(encoders.ResNet(settings.arch, settings.width, settings.stem, side), device).eval().requires_grad_(False)
    )
    detector = CADet(encoder, n_views=N_VIEWS, image_size=side, dtype=dtype).fit(images[:2], images[2:8])
    victim = encoders.Classifier(encoder, nn.Linear(encoder.dim, 10).to(device))

    few = images[: max(1, (detector.batch_size if device.type == "cuda" else batch) // N_VIEWS)]  # a GPU's: one forward pass

    def attack() -> Tensor:
        with torch.autocast(device.type, embed.DTYPES[dtype], enabled=dtype != "float32"):
            return attacks.pgd(victim, images, keys % 10, n_steps=PGD_STEPS, batch_size=batch)

    def to_features() -> Tensor:
        return encoder(images[:2])

    def to_pixels() -> None:  # an attack's step, as torch can count it
        encoder(images[:2].clone().requires_grad_()).sum().backward()

    return {
        "trained": Work(train, 2 * batch * n_steps, batch * n_steps, flops(train_a_step) / (2 * batch)),
        "forward": Work(lambda: detector.score_samples(few), N_VIEWS * len(few), len(few), flops(to_features) / 2),
        "attacked": Work(attack, PGD_STEPS * batch, batch, flops(to_pixels) / 2),
    }


def measured(names: Sequence[str], dtypes: Sequence[str], device: torch.device, seconds: float) -> Iterator[Row]:
    """A row for each scale, precision and kind of work, as soon as it is measured."""
    for dtype in dtypes:
        best = peak(dtype, device, seconds)
        for name in names:
            for kind, work in work_of(SCALES[name], dtype, device).items():
                took = rate(work.run, work.passes, device, seconds)
                share = took * work.flops / best
                print(
                    f"{name:9} {dtype:9} {kind:9} {took:9.1f} passes/s, {share:4.0%} of the peak, {best / 1e12:.2f} TFLOP/s",
                    flush=True,
                )
                row = dict(
                    scale=name, dtype=dtype, kind=kind, passes_per_second=took, images_per_second=took * work.images / work.passes
                )
                yield row | dict(gflops_per_pass=work.flops / 1e9, share_of_peak=share, peak_tflops=best / 1e12)


def mmd_seconds(n: int, dim: int, device: torch.device) -> float:
    """Seconds of an MMD test of n + n samples."""
    x, y = torch.randn(2, n, dim, device=device)
    began = waited(device)
    mmd.mmd_test(x, y, n_perm=500)
    return waited(device) - began


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", nargs="+", default=list(SCALES), choices=list(SCALES))
    parser.add_argument("--profile", default="imagenet", help="whose hours are told, at the first scale and precision")
    parser.add_argument("--samples", type=int, default=20_000, help="of the MMD test at D = 2048; 0: none")
    parser.add_argument("--seconds", type=float, default=5, help="for each measurement")
    parser.add_argument("--out", type=Path, default=record.output_folder("bench") / "throughput.json")
    options = parser.parse_args()
    device = encoders.default_device()
    # The peak of what convolutions may use: TF32, unless it is switched off.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.benchmark = True  # as pretraining does
    dtypes = list(dict.fromkeys(("float32", embed.resolved_dtype(embed.AUTO, device))))
    what = f"{options.scale[0]} scale, {dtypes[0]}"
    rates: dict[str, float] = {}
    results: Row = dict(what=what, rates=rates, rows=[], hardware=record.hardware(), versions=record.versions())
    results |= dict(threads=torch.get_num_threads(), commit=record.git_state(record.checkout()))

    def save() -> None:  # after each row: whoever stops this has what was measured
        record.write_atomically(options.out, json.dumps(results, indent=1))

    for row in measured(options.scale, dtypes, device, options.seconds):
        results["rows"].append(row)
        if (row["scale"], row["dtype"]) == (options.scale[0], dtypes[0]):
            rates[row["kind"]] = row["passes_per_second"]
        save()
    if options.samples:
        took = mmd_seconds(options.samples, 2048, device)
        results["mmd"] = dict(n=options.samples, dim=2048, n_perm=500, seconds=took)
        print(f"MMD of {options.samples} + {options.samples} samples, D = 2048: {took:.1f} s")
        save()
    print(f"\n{options.profile}, at the rates of {what}:\n{costs.sheet(costs.of_profile(options.profile), rates).to_string()}")
    print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
