"""The paper's experiments as functions of embeddings and view sums: each returns rows, one dictionary per cell of a table.

Notebooks call these, save what they return and draw it. Every AUROC comes over several splits of the held-out images into
X_val(1), X_val(2) and test, with an interval; attacked images count in a split when the image they were made from is a test
image of it, so that no image is calibrated on in one form and scored in another. `questions` has what is asked through these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cadetlib import attacks, cadet, checks, cifar_resnet, data, embed, encoders, metrics, probe, thresholds
from cadetlib.views import EvalViews

IN_DISTRIBUTION = "in-distribution"  # the name of the held-out images among the sets
Row = dict[str, Any]
Pair = tuple[Tensor, Tensor]  # scores of in-distribution test images and of anomalies


@dataclass(frozen=True)
class Split:
    """One division of the held-out in-distribution images: indices of X_val(1), X_val(2) and the test images.

    >>> (division,) = splits(10, 1, n_reference=2, n_calibration=5)
    >>> torch.cat([division.reference, division.calibration, division.test]).sort().values.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    reference: Tensor
    calibration: Tensor
    test: Tensor


def splits(n: int, n_splits: int, n_reference: int, n_calibration: int, n_test: int = 0, seed: int = 0) -> list[Split]:
    """`n_splits` random divisions of n held-out images; the test images are `n_test`, or with 0 all that are left.

    >>> [len(division.test) for division in splits(1000, 3, n_reference=100, n_calibration=500)]
    [400, 400, 400]
    """
    left = n - n_reference - n_calibration
    if min(n_reference, n_calibration) < 2 or left < max(2, n_test):
        raise ValueError(
            f"found {n} held-out images for {n_reference} reference, {n_calibration} calibration and {n_test or 'some'} test; "
            "expected enough for all and at least 2 of each"
        )
    sizes = dict(reference=n_reference, calibration=n_calibration, test=n_test or left)
    return [Split(**data.split(n, sizes, seed + i)) for i in range(n_splits)]


def pairs_of_splits(
    held_out: embed.ViewSums,
    anomalies: embed.ViewSums,
    paired: bool,
    divisions: Sequence[Split],
    n_views: int,
    score: Callable[[cadet.CADet, embed.ViewSums], Tensor] = cadet.CADet.score_sums,
) -> list[Pair]:
    """Scores of CADet per split: fitted on its reference and calibration images, asked for its test images and the anomalies.

    paired: whether anomaly i was made from held-out image i. `score` may be another function of detector and sums.

    >>> views = EvalViews(8)
    >>> held_out, noise = (embed.view_sums(nn.Flatten(), torch.rand(n, 3, 8, 8), views, (4,)) for n in (20, 6))
    >>> pairs = pairs_of_splits(held_out, noise, paired=False, divisions=splits(20, 3, 5, 10), n_views=4)
    >>> [(len(normal), len(odd)) for normal, odd in pairs]
    [(5, 6), (5, 6), (5, 6)]
    """
    if paired and len(anomalies) != len(held_out):
        raise ValueError(f"found {len(anomalies)} anomalies made from {len(held_out)} images, expected one for each")
    pairs = []
    for division in divisions:
        detector = cadet.CADet(nn.Identity(), n_views=n_views)
        detector.fit_sums(held_out[division.reference], held_out[division.calibration])
        odd = anomalies[division.test] if paired else anomalies
        pairs.append((score(detector, held_out[division.test]), score(detector, odd)))
    return pairs


def images_of_splits(divisions: Sequence[Split], paired: bool, n_anomalies: int) -> list[tuple[Tensor, Tensor]]:
    """Which image each of the scores of `pairs_of_splits` is of, as `metrics.splits_interval` asks.

    Test images and what was made from them (`paired`) have the place of the held-out image; others have negative numbers.

    >>> [(tested, made)] = images_of_splits(splits(10, 1, n_reference=2, n_calibration=5), paired=False, n_anomalies=2)
    >>> len(tested), made.tolist()
    (3, [-2, -1])
    """
    own = torch.arange(-n_anomalies, 0)
    return [(division.test, division.test if paired else own) for division in divisions]


def fitted_share(divisions: Sequence[Split], n_held_out: int, n_reference: int = 0) -> float:
    """The share of the held-out images that a split is fitted on, as `metrics.splits_interval` asks: the mean of both kinds'.

    That is right where the draws of reference and of calibration images move an AUROC alike, and more than is needed where those
    of the smaller kind, the reference images, move it more, as they do with most encoders (`by_draw`).

    >>> fitted_share(splits(10, 3, n_reference=2, n_calibration=4), n_held_out=10)
    0.3
    """
    return ((n_reference or len(divisions[0].reference)) + len(divisions[0].calibration)) / 2 / n_held_out


def hangs_on_fit(pairs: Sequence[Pair], images: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether an image's score differs from split to split, and so hangs on the images that these are fitted on.

    True as well where no image is scored twice, for then nothing is known. images: as of `images_of_splits`.

    >>> images = [(torch.tensor([0, 1]), torch.tensor([-1])), (torch.tensor([1, 2]), torch.tensor([-1]))]
    >>> scores = [(torch.tensor([0.5, 0.7]), torch.tensor([0.1])), (torch.tensor([0.7, 0.9]), torch.tensor([0.1]))]
    >>> hangs_on_fit(scores, images), hangs_on_fit([scores[0], (scores[1][0] + 0.1, scores[1][1])], images)
    (False, True)
    """
    twice = False
    for mine, of in zip(zip(*pairs, strict=True), zip(*images, strict=True), strict=True):
        image, order = torch.cat(of).sort()
        score, again = torch.cat(mine)[order], image[1:] == image[:-1]
        if bool((again & (score[1:] != score[:-1])).any()):
            return True
        twice |= bool(again.any())
    return not twice


def m_in_only(detector: cadet.CADet, sums: embed.ViewSums) -> Tensor:
    """The intra-similarity alone, as a score.

    >>> detector = cadet.CADet(nn.Flatten(), n_views=4, image_size=8).fit(torch.rand(5, 3, 8, 8), torch.rand(10, 3, 8, 8))
    >>> sums = detector.view_sums(torch.rand(3, 3, 8, 8))
    >>> torch.equal(m_in_only(detector, sums), detector.similarities_of_sums(sums)[0])
    True
    """
    return detector.similarities_of_sums(sums)[0]


def m_out_only(detector: cadet.CADet, sums: embed.ViewSums) -> Tensor:
    """The out-similarity alone, as a score.

    >>> detector = cadet.CADet(nn.Flatten(), n_views=4, image_size=8).fit(torch.rand(5, 3, 8, 8), torch.rand(10, 3, 8, 8))
    >>> sums = detector.view_sums(torch.rand(3, 3, 8, 8))
    >>> torch.equal(m_out_only(detector, sums), detector.similarities_of_sums(sums)[1])
    True
    """
    return detector.similarities_of_sums(sums)[1]


def weighted(factor: float) -> Callable[[cadet.CADet, embed.ViewSums], Tensor]:
    """The score with gamma replaced by factor * gamma of Eq. 7.

    >>> detector = cadet.CADet(nn.Flatten(), n_views=4, image_size=8).fit(torch.rand(5, 3, 8, 8), torch.rand(10, 3, 8, 8))
    >>> sums = detector.view_sums(torch.rand(3, 3, 8, 8))
    >>> torch.equal(weighted(1.0)(detector, sums), detector.score_sums(sums))
    True
    """

    def score(detector: cadet.CADet, sums: embed.ViewSums) -> Tensor:
        m_in, m_out = detector.similarities_of_sums(sums)
        return m_in + factor * detector.gamma_ * m_out

    return score


def summary(
    pairs: Sequence[Pair],
    images: Sequence[tuple[Tensor, Tensor]] | None = None,
    fitted: float | None = None,
    n_boot: int = 500,
) -> Row:
    """AUROC, AUPR (anomalies positive) and FPR at 95 % TPR, each the mean over splits, with the AUROC's interval and spread.

    images: as of `images_of_splits`; fitted: the share of the held-out images that a split fits on, both for the interval.

    >>> normal = torch.tensor([3.0, 2.0])
    >>> row = summary([(normal, torch.tensor([1.0, 0.0])), (normal, torch.tensor([4.0, 0.0]))])
    >>> row["auroc"], row["splits"], row["n_in"], row["n_out"]
    (0.75, [1.0, 0.5], 2, 2)
    """
    interval = metrics.splits_interval(pairs, n_boot=n_boot, images=images, fitted=fitted)
    return dict(
        auroc=interval.mean,
        low=interval.low,
        high=interval.high,
        splits=[metrics.auroc(*pair) for pair in pairs],
        aupr=sum(metrics.aupr(*pair) for pair in pairs) / len(pairs),
        fpr95=sum(metrics.fpr_at_tpr(*pair) for pair in pairs) / len(pairs),
        n_in=len(pairs[0][0]),
        n_out=len(pairs[0][1]),
    )


def difference_over(name: str, found: metrics.SplitsInterval) -> Row:
    """A difference of AUROCs as three entries of a row: over what, and from where to where.

    >>> difference_over("signs", metrics.SplitsInterval(0.05, 0.01, 0.09, 0.01, 0.04, 0.06))
    {'over_signs': 0.05, 'over_signs_low': 0.01, 'over_signs_high': 0.09}
    """
    return {f"over_{name}": found.mean, f"over_{name}_low": found.low, f"over_{name}_high": found.high}


def moments(sums: embed.ViewSums, detector: cadet.CADet, n_boot: int = 500, seed: int = 0) -> Row:
    """A column of Table 5 for one fitted detector: mean and variance of m_in and m_out, and gamma's share of the mean.

    Beside each value its `_low` and `_high`: 95 % percentile bootstrap over images, the detector held fixed.

    >>> detector = cadet.CADet(nn.Flatten(), n_views=4, image_size=8).fit(torch.rand(5, 3, 8, 8), torch.rand(10, 3, 8, 8))
    >>> row = moments(detector.view_sums(torch.rand(30, 3, 8, 8)), detector)
    >>> row["mean_m_in_low"] < row["mean_m_in"] < row["mean_m_in_high"]
    True
    """
    m_in, m_out = detector.similarities_of_sums(sums)
    drawn = torch.randint(len(m_in), (n_boot, len(m_in)), generator=torch.Generator().manual_seed(seed))
    row: Row = dict(n=len(m_in))
    for name, values in dict(m_in=m_in, m_out=m_out, gamma_m_out=detector.gamma_ * m_out).items():
        for moment, of in (("mean", torch.mean), ("variance", torch.var)):
            low, high = of(values[drawn], dim=1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
            key = f"{moment}_{name}"
            row |= {key: float(of(values, dim=0)), f"{key}_low": low, f"{key}_high": high}
    return row


def view_sums_of_sets(
    encoder: nn.Module,
    sets: Mapping[str, Tensor],
    views: EvalViews,
    grid: Sequence[int],
    cache: str | Path | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
    say: Callable[[str], None] = print,
) -> dict[str, embed.ViewSums]:
    """View sums of several sets of images, one line of progress each.

    >>> sets = {"in-distribution": torch.rand(4, 3, 8, 8), "noise": torch.rand(2, 3, 8, 8)}
    >>> sums = view_sums_of_sets(nn.Flatten(), sets, EvalViews(8), grid=[2, 5])
    4 images of in-distribution: 5 views each
    2 images of noise: 5 views each
    >>> sums["noise"].at(2)[1].shape
    torch.Size([2, 192])
    """
    checks.at_least(len(sets), "number of image sets", 1)
    sums = {}
    for name, images in sets.items():
        say(f"{len(images)} images of {name}: {grid[-1]} views each")
        sums[name] = embed.view_sums(encoder, images, views, grid, batch_size=batch_size, dtype=dtype, cache=cache)
    return sums


# --- what notebooks ask for ---------------------------------------------------------------------------------------------


def load_encoders(folder: Path, files: Mapping[str, str]) -> dict[str, nn.Module]:
    """The encoders that notebook 01 saved below `folder`: name -> module.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = encoders.save_encoder(encoders.ResNet("resnet10", 4, "cifar", 8), f"{folder}/contrastive/encoder.safetensors")
    ...     loaded = load_encoders(Path(folder), {"contrastive": "contrastive/encoder.safetensors"})
    >>> loaded["contrastive"].image_size
    8
    """
    return {name: encoders.placed(encoders.load_encoder(folder / file)) for name, file in files.items()}


def load_victim(folder: Path, files: Mapping[str, str], name: str = "supervised") -> nn.Module:
    """The classifier that the attacks are made against: "supervised", which notebook 01 saved below `folder`, or a public one.

    A public one is "cifar:resnet20" or "cifar:resnet56".

    >>> from tempfile import TemporaryDirectory
    >>> encoder = encoders.ResNet("resnet10", 4, "cifar", 8)
    >>> with TemporaryDirectory() as folder:
    ...     _ = encoders.save_encoder(encoder, f"{folder}/victim.safetensors", head=nn.Linear(encoder.dim, 7))
    ...     load_victim(Path(folder), {"supervised": "victim.safetensors"}).head.out_features
    7
    """
    kind, _, rest = name.partition(":")
    if kind == "cifar":
        return encoders.placed(cifar_resnet.load(rest))
    if name != "supervised":
        raise ValueError(f"victim: found {name!r}, expected 'supervised', 'cifar:resnet20' or 'cifar:resnet56'")
    return encoders.placed(encoders.load_classifier(folder / files["supervised"]))


def positions(labels: Tensor | None, classes: Sequence[int]) -> Tensor:
    """Labels as a classifier of `classes` counts them: by position; unchanged when `classes` is empty.

    >>> positions(torch.tensor([7, 3, 7]), classes=[3, 7])
    tensor([1, 0, 1])
    """
    if labels is None:
        raise ValueError("labels: found none, expected labelled images: an attack moves an image away from its label")
    return torch.tensor([list(classes).index(int(y)) for y in labels]) if classes else labels


def some_of(images: data.ImageSet, n: int, seed: int) -> data.ImageSet:
    """n of the images, drawn at random and left in their order; all of them when n is 0.

    >>> digits = data.load("digits-test")
    >>> len(some_of(digits, 20, seed=0)), len(some_of(digits, 0, seed=0)) == len(digits)
    (20, True)
    """
    return images[data.split(len(images), {"some": n}, seed)["some"].sort().values] if n else images


def labelled(name: str, classes: Sequence[int], n: int = 0, seed: int = 0, allow_unreadable: int = 0) -> data.ImageSet:
    """Images of those classes, at most n (0: all), labelled as a classifier of `classes` counts; a folder's are not read yet.

    >>> digits = labelled("digits-test", classes=[3, 7], n=20)
    >>> len(digits), digits.labels.unique().tolist()
    (20, [0, 1])
    """
    chosen = data.load(name, allow_unreadable=allow_unreadable).of_classes(classes)
    chosen = some_of(chosen, min(n, len(chosen)), seed)
    return replace(chosen, labels=positions(chosen.labels, classes))


def features(encoder: nn.Module, images: data.ImageSet, size: int, dtype: str = "float32") -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,) of labelled images brought to size x size; of a folder only a block is in memory.

    >>> z, labels = features(nn.Flatten(), data.load("digits-test")[:5], size=4)
    >>> z.shape, labels.shape
    (torch.Size([5, 48]), torch.Size([5]))
    """
    if images.labels is None:
        raise ValueError(f"{images.name}: found no labels, expected labelled images")
    parts = [(embed.embed(encoder, b.images, dtype=dtype), b.labels) for b in images.blocks(size) if len(b)]
    return torch.cat([z for z, _ in parts]), torch.cat([labels for _, labels in parts if labels is not None])


def anomalous(
    images: data.ImageSet,
    n: int,
    size: int,
    in_distribution: str,
    n_held_out: int,
    seed: int,
    classes: Sequence[int] = (),
    n_aside: int = 0,
) -> Tensor:
    """The first n images of a set of anomalies (0: all), brought to size x size: (n, 3, size, size).

    Of a set made from the in-distribution one (`name:corruption-severity`), only images of its `classes` (none: all) that
    `some_of(n_held_out)` and `set_aside(n_aside)` leave: no image is calibrated or tuned on in one form and scored in another.
    ValueError when none is left.

    >>> anomalous(data.load("digits-7-to-9"), n=5, size=16, in_distribution="digits-test", n_held_out=100, seed=0).shape
    torch.Size([5, 3, 16, 16])
    """
    if images.name.startswith(f"{in_distribution}:"):
        images = images.of_classes(classes)
        left = len(images) - n_held_out - n_aside if n_held_out else 0
        if left < 1:
            raise ValueError(
                f"{images.name}: found {n_held_out or 'all'} of {len(images)} images held out and {n_aside} set aside, expected "
                "some that are left: others would be calibrated on in one form and scored in another"
            )
        images = set_aside(images, n_held_out, min(n or left, left), seed, after=n_aside)
    return images[: n or len(images)].resized(size).images


def set_aside(images: data.ImageSet, n_held_out: int, n: int, seed: int, after: int = 0) -> data.ImageSet:
    """n images that `some_of(images, n_held_out, seed)` leaves: to tune on what nothing else may see; `after` so many of these.

    ValueError when they are not left, as when n_held_out is 0, which stands for all.

    >>> numbered = data.ImageSet("numbered", torch.zeros(10, 3, 1, 1), torch.arange(10))
    >>> held_out, aside = some_of(numbered, 6, seed=0), set_aside(numbered, n_held_out=6, n=4, seed=0)
    >>> sorted([*held_out.labels.tolist(), *aside.labels.tolist()])
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if n and not n_held_out:
        raise ValueError(f"n_held_out: found 0, all images of {images.name}, expected fewer: {n} others are to be set aside")
    parts = data.split(len(images), {"held out": n_held_out, "before": after, "aside": n}, seed)
    return images[parts["aside"].sort().values]


def accuracy(classifier: encoders.Classifier, images: data.ImageSet) -> float:
    """Share of the labelled images that the classifier gets right.

    >>> classifier, images = encoders.Classifier(nn.Flatten(), nn.Linear(12, 2)), torch.rand(4, 3, 2, 2)
    >>> accuracy(classifier, data.ImageSet("toy", images, 1 - classifier(images).argmax(dim=1)))
    0.0
    """
    if images.labels is None:
        raise ValueError(f"{images.name}: found no labels, expected labelled images")
    return attacks.accuracy(classifier, images.images, images.labels)


def encoder_quality(encoder: nn.Module, training: data.ImageSet, held_out: data.ImageSet, size: int) -> Row:
    """What an encoder's features of images at size x size know of the labels: kNN and linear-probe accuracy on held-out ones.

    Beside each accuracy the `_low` and `_high` of its 95 % interval (Clopper-Pearson): over images, the encoder held fixed.

    >>> training, held_out = (data.load(name).of_classes([0, 1])[:60] for name in ("digits-train", "digits-test"))
    >>> quality = encoder_quality(nn.Flatten(), training, held_out, size=8)
    >>> quality["knn_accuracy"], quality["n_features"]
    (1.0, 192)
    """
    (known, labels), (asked, truth) = (features(encoder, images, size) for images in (training, held_out))
    head = probe.linear_probe(known, labels)
    accuracies = dict(
        knn_accuracy=probe.knn_accuracy(known, labels, asked, truth),
        linear_probe_accuracy=float((head(asked).argmax(1) == truth).double().mean()),
    )
    intervals = {k: metrics.binomial_interval(round(v * len(truth)), len(truth)) for k, v in accuracies.items()}
    return dict(
        **accuracies,
        **{f"{k}_{end}": getattr(interval, end) for k, interval in intervals.items() for end in ("low", "high")},
        n_classes=int(labels.max()) + 1,
        n_features=known.shape[1],
        n_parameters=encoders.n_parameters(encoder),
        n_training=len(labels),
        n_held_out=len(truth),
        fingerprint=encoders.fingerprint(encoder),
    )


def roc_points(pairs: Sequence[Pair], n_points: int = 201) -> Row:
    """Figure 1b: the ROC curve averaged over splits at equal false alarm rates, and its mean AUROC.

    >>> curve = roc_points([(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0]))], n_points=3)
    >>> curve["false_alarm_rate"].tolist(), curve["detection_rate"].tolist(), curve["auroc"]
    ([0.0, 0.5, 1.0], [1.0, 1.0, 1.0], 1.0)
    """
    grid = np.linspace(0, 1, n_points)
    curves = [metrics.roc_curve(*pair) for pair in pairs]
    mean = np.mean([np.interp(grid, curve.false_alarm_rate, curve.detection_rate) for curve in curves], axis=0)
    auroc = sum(metrics.auroc(*pair) for pair in pairs) / len(pairs)
    return dict(false_alarm_rate=grid, detection_rate=mean, auroc=auroc)


def batch_decisions(curves: Sequence[Row], alpha: float, q: float) -> list[Row]:
    """In-distribution images and as many anomalies of one kind: p <= alpha beside Benjamini and Hochberg at level q.

    >>> normal = dict(name="in-distribution", kind="in", p_values=[0.2, 0.5, 0.9])
    >>> odd = dict(name="PGD", kind="out", p_values=[0.01, 0.01, 0.6])
    >>> (row,) = batch_decisions([normal, odd], alpha=0.05, q=0.1)
    >>> row["anomaly"], row["n"], row["alpha_flagged"], row["bh_flagged"], row["bh_false_discoveries"]
    ('PGD', 6, 2, 2, 0.0)
    """
    normal = next(curve["p_values"] for curve in curves if curve["kind"] == "in")
    rows = []
    for curve in (curve for curve in curves if curve["kind"] != "in"):
        batch = thresholds.batch_parts(normal, curve["p_values"])
        row: Row = dict(anomaly=curve["name"], n=sum(map(len, batch)))
        for rule, found in zip(("alpha", "bh"), thresholds.batch_decision(*batch, alpha, q), strict=True):
            row[f"{rule}_flagged"], row[f"{rule}_found"] = found["flagged"], found["found"]
            row[f"{rule}_false_discoveries"] = found["false_discovery_rate"]
        rows.append(row)
    return rows


def example_folders(folder: Path, seed: int) -> Path:
    """Three folders of digits to try CADet on: 0 to 6 as reference and calibration; 30 of these and 30 of 7 to 9 to judge.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     {part.name: len(list(part.iterdir())) for part in sorted(example_folders(Path(folder), seed=0).iterdir())}
    {'calibration': 400, 'images': 60, 'reference': 150}
    """
    from PIL import Image

    normal, odd = data.load("digits-test").of_classes(range(7)), data.load("digits-7-to-9")
    parts = data.split(len(normal), {"reference": 150, "calibration": 400, "images": 30}, seed)
    chosen = {name: [("normal", normal.images[i]) for i in index] for name, index in parts.items()}
    chosen["images"] += [("odd", odd.images[i]) for i in data.split(len(odd), {"images": 30}, seed)["images"]]
    for part, images in chosen.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number, (kind, image) in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / part / f"{kind}_{number:03d}.png")
    return folder
