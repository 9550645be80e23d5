"""Speed, as ratios measured in one run on one machine: `make bench`.

Each row compares the library with the least work that could do the job (the floor) or with what others do (peers). Both sides
are timed in turn, several times, and the medians compared: a busy machine slows both. Peers are measured when installed (pip
install hyppo; pip install --no-deps torchdrift), once, on fewer samples; the pair loop of the paper is run on a part of its
work and scaled up, which the table says.

    python benchmarks/run.py [--out FOLDER]     prints a table, writes bench.json and bench.png
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from throughput import endless_batches, flops, peak

from cadetlib import detectors, embed, encoders, explored, mmd, plots, pretrain, processes, record, training_settings, widgets
from cadetlib.cadet import CADet, view_similarities

Row = dict[str, Any]
PAPER_POST_HOC = ("MSP", "Energy", "MaxLogit", "KLMatching", "ReAct", "Mahalanobis", "Residual", "ViM")  # all but ODIN
DEVICE = encoders.default_device()
ON_GPU = DEVICE.type == "cuda"  # which is given more at once, or it would wait to be asked
WIDTH = 64 if ON_GPU else 32  # of the ResNet-18 in profiles cifar10 and cifar10-cpu
FASTEST = embed.resolved_dtype("auto", DEVICE)


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    began = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def medians(*works: Callable[[], Any], repeats: int = 5) -> list[float]:
    """Median seconds of each, measured in turn after one warm-up each."""
    for work in works:
        seconds(work)
    rounds = [[seconds(work) for work in works] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def permutation_test(n: int = 2000, dim: int = 2048, n_perm: int = 500) -> list[Row]:
    """(a) `mmd_test` against the two matrix products that it cannot do without, and beside other libraries."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, dim, generator=generator).to(DEVICE) for _ in range(2))
    z, signs = torch.cat([x, y]), torch.randn(n_perm, 2 * n, generator=generator).to(DEVICE)
    ours, floor = medians(lambda: mmd.mmd_test(x, y, n_perm), lambda: signs @ (z @ z.T))
    what = f"MMD test, n = {n}, D = {dim}, {n_perm} permutations"
    rows = [dict(what=what, against="its two matrix products", ours=ours, other=floor, wanted="at most 1.5 times as long")]
    return rows + peers()


def peers(n: int = 200, dim: int = 2048, n_perm: int = 500) -> list[Row]:
    """(a) the same test beside the libraries that have one, when installed: fewer samples, for they take minutes at n = 2000."""
    x, y = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows = []
    for name, run in {"hyppo": _hyppo, "torchdrift": _torchdrift}.items():
        if importlib.util.find_spec(name):
            run(x[:10], y[:10], 2)  # imports, and compiles where it is compiled
            ours, *_ = medians(lambda: mmd.mmd_test(x, y, n_perm))
            other = seconds(lambda run=run: run(x, y, n_perm))
            rows.append(dict(what=f"MMD test, n = {n}, D = {dim}, {n_perm} permutations", against=name, ours=ours, other=other))
    return rows


def _hyppo(x: torch.Tensor, y: torch.Tensor, n_perm: int) -> None:
    """The same kernel; it computes the statistic anew for each permutation, on the CPU."""
    from hyppo.ksample import MMD

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of replications is low")
        MMD("cosine").test(x.cpu().numpy(), y.cpu().numpy(), reps=n_perm, auto=False)


def _torchdrift(x: torch.Tensor, y: torch.Tensor, n_perm: int) -> None:
    """A Gaussian kernel; it permutes the Gram matrix in a loop."""
    from torchdrift.detectors.mmd import kernel_mmd

    kernel_mmd(x, y, n_perm=n_perm)


def paper_similarities(z: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Eq. 5 for one image as printed, pair by pair: z (n_views, D), reference (n_images, n_views, D), unit embeddings."""
    n = len(z)
    m_in = sum(float(z[i] @ z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    m_out = sum(float(a @ b) for image in reference for a in z for b in image) / (n * n * len(reference))
    return m_in, m_out


def similarities(n_views: int = 50, n_reference: int = 300, dim: int = 2048, n_images: int = 100, looped: int = 3) -> list[Row]:
    """(b) `view_similarities` against the paper's loop over pairs; the loop sees `looped` reference images and is scaled up."""
    z = torch.nn.functional.normalize(torch.randn(n_images, n_views, dim), dim=-1)
    reference = torch.nn.functional.normalize(torch.randn(n_reference, n_views, dim), dim=-1)
    mu = reference.mean(dim=(0, 1))
    (ours,) = medians(lambda: view_similarities(z, mu))
    inner = seconds(lambda: paper_similarities(z[0], reference[:0].new_zeros(1, 0, dim)))
    loop = inner + (seconds(lambda: paper_similarities(z[0], reference[:looped])) - inner) * n_reference / looped
    what = f"similarities of an image, {n_views} views, {n_reference} references, D = {dim}"
    against = f"the paper's pair loop ({looped} references, scaled up)"
    return [dict(what=what, against=against, ours=ours / n_images, other=loop, wanted="at least 1000 times faster")]


def scoring(n_images: int = 640 if ON_GPU else 40, n_views: int = 50) -> list[Row]:
    """(c) CADet's scoring against the encoder's bare forward passes on as many images as there are views.

    In batches as large as scoring's and in small ones, which a CPU's caches hold; the faster of the two is the floor.
    """
    rows = []
    for dtype in dict.fromkeys(("float32", FASTEST)):
        encoder = encoders.placed(encoders.ResNet("resnet18", width=WIDTH, stem="cifar", image_size=32), DEVICE).eval()
        images = torch.rand(n_images, 3, 32, 32).to(DEVICE)
        detector = CADet(encoder, n_views=n_views, dtype=dtype).fit(images[:4], images[4:12])
        batch = torch.rand(n_images * n_views, 3, 32, 32).to(DEVICE, memory_format=torch.channels_last)

        def bare(size: int, encoder: Any = encoder, batch: Any = batch, dtype: str = dtype) -> None:
            with embed.inference(encoder, dtype):
                for some in batch.split(size):
                    encoder(some)

        def score(detector: CADet = detector, images: torch.Tensor = images) -> None:
            detector.score_samples(images)

        large, small = partial(bare, detector.batch_size // n_views * n_views), partial(bare, 128)
        ours, *floors = medians(score, large, small, repeats=3)
        what = f"CADet scoring, ResNet-18 of width {WIDTH} at 32 x 32, {n_views} views, {dtype}"
        wanted = "at least 0.9 of their throughput"
        row = dict(what=what, against="bare forward passes", ours=ours, other=min(floors), wanted=wanted)
        with torch.no_grad():
            rows.append(row | per_second(n_images, ours, dtype, flops(partial(encoder, batch[:n_views])) * n_images))
    return rows


@functools.cache
def _peak(dtype: str) -> float:
    return peak(dtype, DEVICE, seconds=2)


def per_second(n_images: int, took: float, dtype: str, n_flops: float) -> Row:
    """Images a second, and the share of the rate of a large matrix product that their passes come to."""
    return dict(images_per_second=n_images / took, share_of_peak=n_flops / took / _peak(dtype))


def training_steps(batch_size: int, dtype: str = FASTEST) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of contrastive pretraining, and forward, backward and step on random tensors of the same shape."""
    settings = training_settings.Settings(
        arch="resnet18", width=WIDTH, stem="cifar", image_size=32, head_hidden=512, head_dim=128, batch_size=batch_size,
        optimizer="sgd", blur=0.0, jitter_strength=0.5, dtype=dtype, channels_last=True, tau=0.2,
    )  # fmt: skip
    model = pretrain.make_model(settings, 1).to(DEVICE).to(memory_format=torch.channels_last).train()
    optimizer = training_settings.make_optimizer(model, settings)
    made = endless_batches(settings, DEVICE)
    noise = torch.rand(2 * batch_size, 3, 32, 32).to(DEVICE, memory_format=torch.channels_last)

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def bare() -> None:
        with torch.autocast(DEVICE.type, embed.DTYPES[dtype], enabled=dtype != "float32"):
            z = model(noise)
        update(z.float().square().mean())

    def ours() -> None:
        update(pretrain.training_loss(model, *next(made), settings)[0])

    return ours, bare


def training(batch_size: int = 512 if ON_GPU else 64, dtype: str = FASTEST) -> list[Row]:
    """(d) a step of contrastive pretraining against the same without its views and its loss."""
    steps = 16 if ON_GPU else 5  # a GPU makes the views of eight steps together, beside those before

    def several(step: Callable[[], None]) -> None:
        for _ in range(steps):
            step()

    took, floor = (t / steps for t in medians(*(partial(several, step) for step in training_steps(batch_size, dtype)), repeats=7))
    what = f"contrastive training step, ResNet-18 of width {WIDTH} at 32 x 32, batch {batch_size}, {dtype}"
    row = dict(
        what=what, against="bare forward, backward, step", ours=took, other=floor, wanted="at least 0.85 of its throughput"
    )
    step, _ = training_steps(batch_size, dtype)
    return [row | per_second(batch_size, took, dtype, flops(step))]


def allocation(rounds: int = 9) -> list[Row]:
    """(g) Training and scoring on a CPU with the memory kept that they free, as commands and notebooks do, and without.

    In turn, each after a pass that is not timed, for the first one after a change finds its memory.
    """
    if DEVICE.type != "cpu" or not processes.keep_freed_memory():
        return []
    rows = []
    for what, work in _works():
        took: dict[bool, list[float]] = {True: [], False: []}
        for keep in [True, False] * rounds:
            (processes.keep_freed_memory if keep else _give_back_freed_memory)()
            work()
            took[keep].append(seconds(work))
        ours, other = (statistics.median(took[keep]) for keep in (True, False))
        rows.append(dict(what=f"{what}, memory kept", against="memory given back to the system", ours=ours, other=other))
    processes.keep_freed_memory()
    return rows


def _give_back_freed_memory() -> None:
    """glibc's own way, with the threshold at its highest, where it sets it by itself once such blocks have been freed."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((-4, 65536), (-3, 2**25), (-1, 2**26)):  # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(parameter, value)
    libc.malloc_trim(0)  # or what was kept before would still serve


def _works() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is done over and over on a CPU: passes of a ResNet-18 at 32 x 32."""
    encoder = encoders.ResNet("resnet18", width=WIDTH, stem="cifar", image_size=32).eval()
    images = torch.rand(20, 3, 32, 32)
    for dtype in dict.fromkeys(("float32", FASTEST)):
        detector = CADet(encoder, n_views=50, dtype=dtype).fit(images[:4], images[4:12])
        yield f"CADet scoring, 50 views, {dtype}", lambda detector=detector: detector.score_samples(images)
    step, _ = training_steps(batch_size=256)
    yield f"contrastive training step, batch 256, {FASTEST}", step


def post_hoc(n_train: int = 50_000, n_test: int = 10_000, dim: int = 512, n_classes: int = 10) -> list[Row]:
    """(e) Table 3's detectors on cached features and logits, fitted and asked once, against the minute that they may take."""
    head = torch.nn.Linear(dim, n_classes)
    centres, (train, test) = torch.rand(n_classes, dim), (torch.arange(n) % n_classes for n in (n_train, n_test))
    features, asked = ((centres[y] + 0.5 * torch.randn(len(y), dim)).clamp(min=0) for y in (train, test))
    names = PAPER_POST_HOC

    def fit_and_score(names: Sequence[str]) -> None:
        for name in names:
            detectors.DETECTORS[name]().fit_features(features, train, head).score_features(asked)

    fit_and_score(names[:1])  # imports
    what = f"Table 3's {len(names)} detectors on features, fitted on {n_train}, {n_test} scored, D = {dim}"
    took = seconds(lambda: fit_and_score(names))
    return [dict(what=what, against="the minute it may take", ours=took, other=60.0, wanted="less than a minute")]


def slider(n: int = 10_000, n_calibration: int = 2000) -> list[Row]:
    """(f) A move of the threshold explorer's slider, in the kernel, against the 150 ms that it may take."""
    rng = np.random.default_rng(0)

    def scored(name: str, kind: str, shift: float) -> Row:
        values = rng.normal(shift, size=n)
        return dict(name=name, kind=kind, scores=np.sort(values), images=np.argsort(values))

    detector = dict(name="CADet", fingerprint="", ties="paper", calibration_scores=np.sort(rng.normal(size=n_calibration)))
    row = explored.curves(detector | dict(sets=[scored("test", "in", 0), scored("unseen", "out", -1)]))
    pictures = {curve["name"]: rng.integers(256, size=(n, 3, 32, 32), dtype=np.uint8) for curve in row["curves"]}
    explorer = widgets.ThresholdExplorer([row], pictures, 0.05, 0.1, "unused.json")
    moves = itertools.cycle(np.geomspace(0.001, 0.9, 40))
    (ours,) = medians(lambda: setattr(explorer.slider, "value", next(moves)), repeats=40)
    what = f"a move of the explorer's slider, {n} images a set"
    return [dict(what=what, against="the 150 ms it may take", ours=ours, other=0.15, wanted="less than that")]


def table(rows: list[Row]) -> str:
    """The rows as text: milliseconds of ours and of the other, and how many times as fast ours is."""
    lines = [f"{'ours':>10} {'other':>12} {'speed':>9}   what, against what (what is wanted)"]
    for row in rows:
        line = f"{1e3 * row['ours']:8.2f} ms {1e3 * row['other']:9.1f} ms {row['other'] / row['ours']:8.2f}x   {row['what']}"
        lines.append(f"{line}, against {row['against']}" + (f" ({row['wanted']})" if "wanted" in row else ""))
        if "share_of_peak" in row:
            speed = f"{row['images_per_second']:.0f} images/s, {row['share_of_peak']:.0%} of a large matrix product's FLOP/s"
            lines.append(f"{'':38}{speed}")
    return "\n".join(lines)


def main() -> None:
    """Measure everything, print the table, write the results and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=record.output_folder("bench"))
    folder = parser.parse_args().out
    processes.keep_freed_memory()
    rows = []
    for measure in (permutation_test, similarities, scoring, training, post_hoc, slider, allocation):
        rows += measure()
        print(".", end="", flush=True)
    print("\n" + table(rows))
    results = dict(
        rows=rows, device=DEVICE.type, hardware=record.hardware(), versions=record.versions(), threads=torch.get_num_threads()
    )
    record.write_atomically(folder / "bench.json", json.dumps(results, indent=1))
    record.write_atomically(folder / "bench.png", plots.png(plots.speed(rows)))
    print(f"written: {folder / 'bench.json'} and bench.png")


if __name__ == "__main__":
    main()
