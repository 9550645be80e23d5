"""What do longer training and more width bring? CADet with an encoder as it was after each epoch that its run kept.

    python -m cadetlib.pretrain --params narrow.yaml --output narrow   # params/cifar10-cpu/01_pretraining.yaml, but width: 16
    python benchmarks/training_curve.py narrow outputs/reference/cifar10-cpu/pretraining/contrastive

Each folder is that of a pretraining; its encoder before any training is asked too. The images, the splits and the attacks, on the
public ResNet-20, are those of notebook 04.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from own_features import PARAMS, attacked, held_out, rows_at, write
from torch import nn

from cadetlib import attack_study, data, encoders, experiments, parameters, plots, record, run_files
from cadetlib.experiments import IN_DISTRIBUTION


def stages(folder: Path) -> Iterator[tuple[int, float | None, nn.Module]]:
    """Epoch, nearest-neighbour accuracy as logged, and encoder: untrained, at each snapshot, at the end."""
    log = run_files.read_log(folder / "log.jsonl")
    accuracy = {round(line["epoch"]): line["knn_accuracy"] for line in log if "knn_accuracy" in line}
    last = round(log[-1]["epoch"])
    files = run_files.snapshots(folder) | {last: folder / run_files.ENCODER}
    yield 0, None, attack_study.untrained(encoders.placed(encoders.load_encoder(files[last])))
    for epoch, file in sorted(files.items()):
        yield epoch, accuracy.get(epoch), encoders.placed(encoders.load_encoder(file))


def trained_with(folder: Path) -> dict[str, Any]:
    """The settings that a run's encoder was trained with, and by which commits on what, as its file has them."""
    _, about = encoders.read_safetensors(folder / run_files.ENCODER, encoders.FORMAT)
    return json.loads(about["settings"]) | dict(made_by=json.loads(about.get("made_by", "[]")))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of pretrainings")
    parser.add_argument("--unseen", nargs="*", default=["svhn-first1083", "cifar100-first2000"], help="sets beside the attacks")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.75], help="areas of a view")
    parser.add_argument("--n-views", type=int, default=20)
    parser.add_argument("--params", type=Path, default=PARAMS)
    parser.add_argument("--out", type=Path, default=record.output_folder("bench") / "training_curve.json")
    options = parser.parse_args()
    settings = {run: trained_with(run) for run in options.runs}
    runs = {about["width"]: run for run, about in settings.items()}
    if len(runs) < len(options.runs):
        parser.error(
            f"runs: found widths {[about['width'] for about in settings.values()]}, expected a different one of each run"
        )
    given = parameters.read_yaml(options.params)
    images = held_out(given)
    moved = attacked(experiments.load_victim(Path(), {}, given["victim_name"]), images, given)
    chosen = [given[key] for key in ("n_unseen", "image_size", "in_distribution", "n_held_out", "seed")]
    unseen = {name: experiments.anomalous(data.load(name), *chosen) for name in options.unseen}
    sets = {IN_DISTRIBUTION: images.images} | unseen | moved
    paired = dict.fromkeys(unseen, False) | dict.fromkeys(moved, True)
    rows = []
    for width, run in runs.items():
        for epoch, accuracy, encoder in stages(run):
            about = dict(width=width, epoch=epoch, knn_accuracy=accuracy)
            for scale in options.scales:
                rows += rows_at(encoder, sets, paired, scale, [options.n_views], given, **about)
    write(options.out, given, rows, trained=list(settings.values()))
    options.out.with_suffix(".png").write_bytes(plots.png(plots.attack_study(attack_study.of_training(rows))))


if __name__ == "__main__":
    main()
