"""Does CADet see an attack in the features of the very network that was attacked? CIFAR-10, public ResNet-20, nothing to train.

    python benchmarks/own_features.py [--params params/cifar10-cpu/04_cadet_tables.yaml] [--out own_features.json]

Area and number of views are varied together, on all held-out images of notebook 04, with its attacks and its splits; notebook 05
asks the same of fewer images. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cadetlib import attack_study, experiments, parameters, record
from cadetlib.views import EvalViews

SCALES, GRID = (0.5, 0.75, 0.9, 0.97), (2, 5, 10, 20, 50)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--params", type=Path, default=record.checkout() / "params" / "cifar10-cpu" / "04_cadet_tables.yaml")
    parser.add_argument("--out", type=Path, default=record.output_folder("bench") / "own_features.json")
    options = parser.parse_args()
    given = parameters.read_yaml(options.params)
    size, n, seed = given["image_size"], given["n_held_out"], given["seed"]
    held_out = experiments.some_of(experiments.labelled(given["in_distribution"], [], size), n, seed)
    victim = experiments.load_victim(Path(), {}, given["victim_name"])
    moved = experiments.attack_all(["fgsm", "pgd"], victim, held_out.images, held_out.labels, given)
    moved[attack_study.CONTROL] = attack_study.random_signs(held_out.images, given["fgsm_eps"])
    sets = {"in-distribution": held_out.images} | moved
    divisions = experiments.splits(len(held_out), given["n_splits"], given["n_reference"], given["n_calibration"], seed=seed)
    rows = []
    for scale in SCALES:
        views = EvalViews(size, scale, given["flip"], seed)
        sums = experiments.view_sums_of_sets(victim.encoder, sets, views, GRID, say=lambda _: None)
        ask = experiments.Asker(sums, {name: name in moved for name in sets}, divisions)
        for n_views in GRID:
            for name in ask.anomalies:
                parts = {"m_in": experiments.m_in_only, "m_out": experiments.m_out_only}
                halves = {part: ask(name, n_views, score)["auroc"] for part, score in parts.items()}
                rows.append(dict(crop_scale=scale, n_views=n_views) | ask(name, n_views) | halves)
            found = [f"{r['anomaly']} {r['auroc']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in rows[-len(ask.anomalies) :]]
            print(f"area {scale}, {n_views} views: " + ", ".join(found), flush=True)
    about = dict(network=given["victim_name"], parameters=given)
    about |= dict(hardware=record.hardware(), versions=record.versions(), commit=record.git_state(record.checkout()))
    record.write_atomically(options.out, json.dumps(about | dict(rows=rows), indent=1))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
