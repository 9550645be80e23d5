"""When does CADet see an attack? One factor is varied at a time from a common setting (the question of Sections 5 and 6).

A factor may be the encoder (how long it was trained, which layer is read), the views (their area, the size of the input) or the
attack (its victim, its strength, and whether it is an attack at all: random signs of the same size are the control).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadetlib import attack_sets, attacks, checks, encoders, experiments, questions, record, rng
from cadetlib.experiments import IN_DISTRIBUTION, Row, Split
from cadetlib.views import EvalViews

CONTROL = "random signs"
_KEPT = ("FGSM", "PGD")  # the attacks that benchmarks/ measure


@dataclass(frozen=True)
class Study:
    """A setting in which CADet is asked for attacked images; `but` changes one thing, `rows` asks.

    >>> images, labels = torch.rand(12, 3, 8, 8), torch.arange(12) % 2
    >>> victim, views = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), EvalViews(8)
    >>> moved, divisions = {CONTROL: random_signs(images, 0.2)}, experiments.splits(12, 1, n_reference=4, n_calibration=4)
    >>> study = Study(nn.Flatten(), victim, images, labels, moved, views, n_views=4, divisions=divisions)
    >>> (row,) = study.but(views=EvalViews(8, crop_scale=0.3)).rows("area", 0.3)  # doctest: +ELLIPSIS
    area 0.3: random signs ... (m_in ...)
    >>> row["factor"], row["value"], row["anomaly"]
    ('area', 0.3, 'random signs')
    """

    encoder: nn.Module
    victim: nn.Module  # of the attacks: its accuracy on the attacked images is reported
    images: Tensor  # (N, 3, S, S) in-distribution
    labels: Tensor  # (N,)
    attacked: Mapping[str, Tensor]  # attack -> (N, 3, S, S), image by image
    views: EvalViews
    n_views: int
    divisions: Sequence[Split]
    cache: Path | None = None
    dtype: str = "float32"

    def but(self, **changes: Any) -> Study:
        """The same setting with some fields changed."""
        return replace(self, **changes)

    def rows(self, factor: str, value: float | str) -> list[Row]:
        """AUROC of the score, of m_in and of m_out against each attack, under the name of the factor and its value here.

        Where random signs are among the attacks: by how much each other one's AUROC is `over_signs`, with its interval.
        """
        sets = {IN_DISTRIBUTION: self.images, **self.attacked}
        sums = experiments.view_sums_of_sets(
            self.encoder, sets, self.views, [self.n_views], self.cache, dtype=self.dtype, say=lambda _: None
        )
        ask = questions.Asker(sums, {name: name != IN_DISTRIBUTION for name in sets}, self.divisions)
        rows = []
        for name, images in self.attacked.items():
            halves = {
                half: ask.auroc(name, self.n_views, score)
                for half, score in (("m_in", experiments.m_in_only), ("m_out", experiments.m_out_only))
            }
            accuracy = attacks.accuracy(self.victim, images, self.labels)
            row = dict(factor=factor, value=value, victim_accuracy=accuracy) | halves | ask(name, self.n_views)
            rows.append(row | over_signs(ask, name, self.n_views))
        print(f"{factor} {value}: " + ", ".join(f"{r['anomaly']} {r['auroc']:.2f} (m_in {r['m_in']:.2f})" for r in rows))
        return rows


def attack_at(
    eps: float,
    names: Sequence[str],
    victim: nn.Module,
    images: Tensor,
    labels: Tensor,
    parameters: Mapping[str, Any],
    cache: Path | None = None,
) -> dict[str, Tensor]:
    """ "fgsm" and "pgd" of notebook 04 at another L-inf radius, and the control: random signs of that size.

    parameters: notebook 04's, of which PGD's iterations stay and its step grows with the radius.

    >>> victim = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> of_04 = dict(fgsm_eps=0.2, pgd_eps=0.2, pgd_step=0.02, pgd_n_steps=50)
    >>> made = attack_at(0.1, ["fgsm", "pgd"], victim, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), of_04)
    2 images after FGSM {'eps': 0.1}
    2 images after PGD {'eps': 0.1, 'step': 0.01, 'n_steps': 50}
    >>> {name: tuple(images.shape) for name, images in made.items()}
    {'FGSM': (2, 3, 2, 2), 'PGD': (2, 3, 2, 2), 'random signs': (2, 3, 2, 2)}
    """
    for name in names:
        checks.one_of(name, "attack", ("fgsm", "pgd"))
    step = eps / parameters["pgd_eps"] * parameters["pgd_step"]
    at_eps = {**parameters, "fgsm_eps": eps, "pgd_eps": eps, "pgd_step": step}
    return attack_sets.attack_all(names, victim, images, labels, at_eps, cache) | {CONTROL: random_signs(images, eps)}


def random_signs(images: Tensor, eps: float, seed: int = 0) -> Tensor:
    """Images (N, 3, H, W) with every value moved by eps up or down at random, a function of (seed, pixels), clipped to [0, 1].

    As long as FGSM's change in every norm and aimed at nothing: what a detector sees of it, it sees of noise.

    >>> moved = random_signs(torch.full((1, 3, 8, 8), 0.5), eps=0.25)
    >>> moved.unique()
    tensor([0.2500, 0.7500])
    """
    x, eps = checks.images(images), checks.not_negative(eps, "eps")
    draws = rng.uniform(seed, rng.image_keys(x), torch.tensor([rng.RANDOM_SIGNS]), x[0].numel()).view_as(x)
    return (x + eps * (2 * (draws < 0.5).to(x.dtype) - 1)).clamp(0, 1)


def over_signs(ask: questions.Asker, attack: str, n_views: int) -> Row:
    """By how much an attack's AUROC exceeds that of random signs on the same images, with its interval; nothing without these.

    >>> images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> sets = {IN_DISTRIBUTION: images, "halved": images / 2, CONTROL: random_signs(images, 0.01)}
    >>> sums = experiments.view_sums_of_sets(nn.Flatten(), sets, EvalViews(8), [4], say=lambda _: None)
    >>> ask = questions.Asker(sums, {"halved": True, CONTROL: True}, experiments.splits(20, 2, n_reference=5, n_calibration=9))
    >>> sorted(over_signs(ask, "halved", n_views=4)), over_signs(ask, CONTROL, n_views=4)
    (['over_signs', 'over_signs_high', 'over_signs_low'], {})
    """
    if attack == CONTROL or CONTROL not in ask.sums:
        return {}
    if not (ask.paired[attack] and ask.paired[CONTROL]):
        raise ValueError(f"found {attack} and {CONTROL}, expected two sets that were made from the in-distribution images")
    return ask.over("signs", attack, ask.pairs(attack, n_views), ask.pairs(CONTROL, n_views))


def how_seen(row: Mapping[str, Any], control: Mapping[str, Any]) -> str:
    """What CADet sees of an attack, from its AUROC and that of random signs, with their intervals.

    "seen as an attack": better than random signs, on the same images where both were asked (`over_signs`), else beyond both
    intervals; "seen as noise": better than chance, and not better than random signs; else "not seen".

    >>> signs = dict(auroc=0.6, low=0.55, high=0.65)
    >>> [how_seen(dict(auroc=x, low=x - 0.05, high=x + 0.05), signs) for x in (0.8, 0.65, 0.5)]
    ['seen as an attack', 'seen as noise', 'not seen']
    """
    if row["low"] <= 0.5:
        return "not seen"
    better = row["over_signs_low"] > 0 if "over_signs_low" in row else row["low"] > control["high"]
    return "seen as an attack" if better else "seen as noise"


def of_training(rows: Sequence[Row]) -> list[Row]:
    """Rows with `width` and `epoch` as a study's: each width's epochs, then the widths, all trained to their ends, if several.

    When views of several areas were tried (`crop_scale`), these are of the first, and the areas follow, trained to the end.

    >>> rows = [dict(width=width, epoch=epoch) for width in (16, 32) for epoch in (0, 26)]
    >>> [(row["factor"], row["value"]) for row in of_training(rows)][2:5]
    [('epochs, at width 32', 0), ('epochs, at width 32', 26), ('width, trained to the end', 16)]
    """
    widths, areas = (list(dict.fromkeys(row.get(key) for row in rows)) for key in ("width", "crop_scale"))
    last = {width: max(row["epoch"] for row in rows if row["width"] == width) for width in widths}
    ends = [row for row in rows if row["epoch"] == last[row["width"]]]

    def of_first_area(some: Sequence[Row]) -> list[Row]:
        return [row for row in some if row.get("crop_scale") == areas[0]]

    made = [row | dict(factor=f"epochs, at width {row['width']}", value=row["epoch"]) for row in of_first_area(rows)]
    if len(widths) > 1:
        made += [row | dict(factor="width, trained to the end", value=row["width"]) for row in of_first_area(ends)]
    if len(areas) > 1:
        made += [row | dict(factor=f"area, width {row['width']}, trained to the end", value=row["crop_scale"]) for row in ends]
    return made


def kept(profile: str) -> list[Row]:
    """What was measured of this question once, and the project keeps for a profile.

    Rows as a study's, with the `commit` that measured them: attacks on a network read in its own features, by area and number
    of views (benchmarks/own_features.py), then epochs and widths (benchmarks/training_curve.py), on all images of notebook 04;
    then epochs as an earlier run of notebook 05 had them from snapshots that are not kept. Empty when nothing is kept.

    >>> sorted({row["factor"] for row in kept("cifar10-cpu")})[:2]
    ["area, in cifar:resnet20's own features", "area, in the contrastive encoder's own features"]
    >>> kept("digits")
    []
    """
    folder, rows = record.checkout() / "outputs" / "reference" / profile, []
    for file in ("own_features.json", "own_features_contrastive.json"):
        network, found = _measured(folder / file)
        own = f"in {'the contrastive encoder' if network == 'contrastive' else network}'s own features"
        most, widest = (max((row[key] for row in found), default=0) for key in ("n_views", "crop_scale"))
        rows += [row | dict(factor=f"area, {own}", value=row["crop_scale"]) for row in found if row["n_views"] == most]
        at = f"views of area {widest}, {own}"
        rows += [row | dict(factor=at, value=row["n_views"]) for row in found if row["crop_scale"] == widest]
    rows += of_training(_measured(folder / "training_curve.json")[1])
    return rows + _measured(folder / "training_epochs.json")[1]


def _measured(path: Path) -> tuple[str, list[Row]]:
    """Whose features a benchmark read, and its rows for attacks and the control, with the commit; none without the file."""
    if not path.is_file():
        return "", []
    found = json.loads(path.read_text())
    commit = found["commit"]["commit"][:7] + (" and changes" if found["commit"]["dirty"] else "")
    return found.get("network", ""), [row | dict(commit=commit) for row in found["rows"] if row["anomaly"] in (*_KEPT, CONTROL)]


class AtLayer(nn.Module):
    """A ResNet of this project read at one of its stages, "layer1" to "layer4": pooled features of that stage.

    >>> encoder = encoders.ResNet("resnet10", width=4, stem="cifar", image_size=8)
    >>> AtLayer(encoder, "layer2")(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(self, encoder: nn.Module, layer: str) -> None:
        super().__init__()
        if not isinstance(encoder, encoders.ResNet):
            raise ValueError(
                f"encoder: found {type(encoder).__name__}, expected a ResNet of this project, whose stages have names"
            )
        checks.one_of(layer, "layer", [f"layer{i}" for i in range(1, 5)])
        self.encoder, self.n_stages, self.image_size = encoder, int(layer[-1]), encoder.image_size
        self.config = encoder.config | dict(layer=layer)  # tells it apart from another stage of the same weights

    def forward(self, images: Tensor) -> Tensor:
        e = self.encoder
        x = e.maxpool(e.relu(e.bn1(e.conv1(e.normalize(images)))))
        for stage in (e.layer1, e.layer2, e.layer3, e.layer4)[: self.n_stages]:
            x = stage(x)
        return x.mean(dim=(2, 3))


def untrained(encoder: nn.Module, seed: int = 0) -> nn.Module:
    """A ResNet of this project with its weights as before any training.

    >>> trained = encoders.ResNet("resnet10", width=4, stem="cifar", image_size=8)
    >>> fresh = untrained(trained)
    >>> fresh.config == trained.config, encoders.fingerprint(fresh) == encoders.fingerprint(trained)
    (True, False)
    """
    if not isinstance(encoder, encoders.ResNet):
        raise ValueError(f"encoder: found {type(encoder).__name__}, expected a ResNet of this project, of known stages")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return encoders.placed(encoders.ResNet(**encoder.config), encoders.device_of(encoder)).eval()
