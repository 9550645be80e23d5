"""Memory, measured: that scoring needs the same for any number of images, and what an MMD test on large samples needs.

    python benchmarks/memory.py [--images 250] [--factor 8] [--samples 20000]     prints three tables

Every line is a process of its own and reports its own peak: resident memory, and what torch held at most on the GPU when there
is one. Speed is `run.py`'s matter; seconds stand here to show how time grows. Linux, which is where a process can read its peak.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Measured = dict[str, Any]
LIMIT_MIB = 4096  # for the test of 20,000 + 20,000 samples at D = 2048, inputs included


def peak_mib() -> float:
    """The most memory that this program had resident, in MiB.

    Not `getrusage`: its maximum is kept over an exec, and so is never below what the process that started this one held.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def device_mib() -> float | None:
    """The most memory that tensors took on the GPU, in MiB; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def run_here(task: str, arguments: Sequence[Any]) -> Measured:
    """In the child: do it, and say what it took; `before_mib` is the peak when only libraries and inputs were there."""
    work = {"score": score_command, "mmd": mmd_test}[task]
    before, began = work(*arguments)
    return dict(seconds=time.perf_counter() - began, before_mib=before, peak_mib=peak_mib(), device_mib=device_mib())


def score_command(chunk: int, *arguments: str) -> tuple[float, float]:
    """`python -m cadetlib.score ...` in this process, `chunk` images at a time -> the memory and the time at its beginning."""
    from cadetlib import chunks, score

    chunks._CHUNK = chunk  # so that also the smaller folder is many chunks
    before, began = peak_mib(), time.perf_counter()
    code = score.main(arguments)
    if code:
        sys.exit(f"score {' '.join(arguments)}: found exit code {code}, expected 0")
    return before, began


def mmd_test(n: int, dim: int, n_perm: int, max_bytes: int) -> tuple[float, float]:
    """The MMD test of n + n samples -> the memory, inputs included, and the time at its beginning."""
    import torch

    from cadetlib import mmd

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, dim, generator=generator).to(device) for _ in range(2))
    before, began = peak_mib(), time.perf_counter()
    mmd.mmd_test(x, y, n_perm, max_bytes=max_bytes)
    return before, began


def measured(task: str, *arguments: Any) -> Measured:
    """The same in a fresh process -> seconds, before_mib, peak_mib, device_mib; RuntimeError with its last words if it fails."""
    command = [sys.executable, __file__, "--child", json.dumps([task, arguments])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if done.returncode:
        raise RuntimeError(f"{task} {arguments}: found exit code {done.returncode}, expected 0\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- scoring ------------------------------------------------------------------------------------------------------------


def write_images(folder: Path, n: int, side: int = 64) -> Path:
    """n small JPEGs of noise in sub-folders of a hundred."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(n)
    for i in range(n):
        path = folder / f"{i // 100:03d}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(side, side, 3), dtype=np.uint8)).save(path)
    return folder


def write_encoder(path: Path, image_size: int) -> Path:
    """A small untrained encoder: what it sees does not matter here."""
    import torch

    from cadetlib import encoders

    torch.manual_seed(0)
    return encoders.save_encoder(encoders.ResNet("resnet10", width=4, stem="imagenet", image_size=image_size), path)


def scoring(home: Path, sizes: Sequence[int], image_size: int = 128, chunk: int = 32) -> list[Measured]:
    """Peaks of `fit` with so many reference images, and of `score` on as many, for each of `sizes`; files go into `home`."""
    encoder, calibration = write_encoder(home / "encoder.safetensors", image_size), write_images(home / "calibration", 20)
    rows = []
    for n in sizes:
        images, detector = write_images(home / f"images-{n}", n), home / f"{n}.safetensors"
        fit = ["--encoder", encoder, "--reference", images, "--calibration", calibration, "--out", detector, "--n-views", 2]
        score = ["--detector", detector, "--images", images, "--out", home / f"{n}.csv"]
        for command, options in (("fit", fit), ("score", score)):
            row = measured("score", chunk, command, *map(str, options), "--batch-size", "16", "--workers", "2")
            rows.append(dict(what=f"score {command}", n=n) | row)
    return rows


# --- tables -------------------------------------------------------------------------------------------------------------


def shown(rows: Sequence[Measured]) -> str:
    """A table: what, number, seconds, and peak memory as a whole and beyond what was there at the beginning."""
    lines = [f"{'what':24} {'n':>7} {'seconds':>9} {'peak MiB':>9} {'of it added':>12} {'GPU MiB':>9}"]
    for row in rows:
        device = "-" if row["device_mib"] is None else f"{row['device_mib']:.0f}"
        added = row["peak_mib"] - row["before_mib"]
        lines.append(f"{row['what']:24} {row['n']:7} {row['seconds']:9.1f} {row['peak_mib']:9.0f} {added:12.0f} {device:>9}")
    return "\n".join(lines)


def grown(rows: Sequence[Measured], memory: str) -> dict[str, float]:
    """For each task of `scoring`, the MiB by which its peak for the most images exceeds that for the fewest.

    memory: "peak_mib", on the host, or "device_mib", on the GPU.
    """
    peaks: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["n"]):
        peaks.setdefault(row["what"], []).append(row[memory])
    return {what: found[-1] - found[0] for what, found in peaks.items()}


def growth(rows: Sequence[Measured]) -> str:
    """How time and added memory grow from each row to the next, as powers of n."""
    words = []
    for a, b in itertools.pairwise(rows):
        step = math.log(b["n"] / a["n"])
        time_power = math.log(b["seconds"] / a["seconds"]) / step
        memory_power = math.log((b["peak_mib"] - b["before_mib"]) / (a["peak_mib"] - a["before_mib"])) / step
        words.append(f"{a['n']} -> {b['n']}: time as n^{time_power:.2f}, added memory as n^{memory_power:.2f}")
    return "\n".join(words)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=250, help="images at 1x; 0 leaves scoring out")
    parser.add_argument("--factor", type=int, default=8, help="how many times as many for the comparison")
    parser.add_argument("--samples", type=int, default=20_000, help="n of the large MMD test at D = 2048; 0 leaves it out")
    parser.add_argument("--growing", type=int, nargs="*", default=[2500, 5000, 10_000], help="n of the smaller ones at --dim")
    parser.add_argument("--dim", type=int, default=2048, help="D of the smaller ones")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_here(*json.loads(options.child))))
        return
    if options.images:
        with tempfile.TemporaryDirectory() as home:
            rows = scoring(Path(home), (options.images, options.images * options.factor))
        print(shown(rows))
        for place, memory in (("host", "peak_mib"), ("GPU", "device_mib")):
            if rows[0][memory] is not None:
                added = ", ".join(f"{what} {mib:+.0f} MiB" for what, mib in grown(rows, memory).items())
                print(f"{options.factor} times the images, on the {place}: {added}", flush=True)
    if options.growing:
        what = f"MMD, D = {options.dim}"
        rows = [dict(what=what, n=n) | measured("mmd", n, options.dim, 500, 2**26) for n in options.growing]
        print(f"\n{shown(rows)}\n{growth(rows)}", flush=True)
    if options.samples:
        large = dict(what="MMD, D = 2048", n=options.samples) | measured("mmd", options.samples, 2048, 500, 2**30)
        word = "fits" if large["peak_mib"] < LIMIT_MIB else "DOES NOT FIT"
        print(f"\n{shown([large])}\n{word} {LIMIT_MIB} MiB, inputs included", flush=True)


if __name__ == "__main__":
    main()
