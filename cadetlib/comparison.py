"""Tables 3 and 4: CADet and what it is compared with, on the same images under the same splits, one row per system and anomaly.

A system is asked for one score per image; a row is that system, with one encoder, against one kind of anomaly. Systems that
learn do so from training images or from calibration images, and see no anomaly before they score; the rows that the paper tunes
on attacks are tuned on images set aside for it, which no row is scored on, and say `tuned`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadetlib import cadet, data, embed, encoders, experiments, hu, metrics, probe, questions
from cadetlib.detectors import DETECTORS, tune_odin
from cadetlib.experiments import IN_DISTRIBUTION, Pair, Row, Split

Scores = Mapping[str, Tensor]  # set -> (N,), larger = more in-distribution
CADET = ("CADet", "contrastive")  # the system that all others are held against
_TIMED = 32  # images that CADet's seconds per image are measured on


@dataclass(frozen=True)
class Field:
    """What every system is asked about: the images of each set, and the splits of the in-distribution ones.

    successful: of in-distribution images, those that the victim gets right; of attacked ones, those of these that fool it.

    >>> sets = {"in-distribution": torch.rand(12, 3, 8, 8), "PGD": torch.rand(12, 3, 8, 8), "noise": torch.rand(5, 3, 8, 8)}
    >>> field = Field(sets, {"PGD": True, "noise": False}, experiments.splits(12, 1, n_reference=4, n_calibration=4))
    >>> field.anomalies, list(field.attacked)
    (['PGD', 'noise'], ['in-distribution', 'PGD'])
    >>> scores = {name: images.mean(dim=(1, 2, 3)) for name, images in sets.items()}
    >>> [len(part) for part in field.pairs(scores, "PGD")[0]], [len(part) for part in field.pairs(scores, "noise")[0]]
    ([4, 4], [4, 5])
    """

    sets: Mapping[str, Tensor]  # name -> (N, 3, S, S); among them "in-distribution"
    paired: Mapping[str, bool]  # whether image i of a set was made from in-distribution image i
    divisions: Sequence[Split]
    successful: Mapping[str, Tensor] = dataclass_field(default_factory=dict)  # set -> (N,) bool; see `of_successful`

    @property
    def anomalies(self) -> list[str]:
        """Names of the sets that are not in-distribution."""
        return [name for name in self.sets if name != IN_DISTRIBUTION]

    @property
    def attacked(self) -> dict[str, Tensor]:
        """The in-distribution images and the sets made from them."""
        return {name: images for name, images in self.sets.items() if name == IN_DISTRIBUTION or self.paired[name]}

    @property
    def tested(self) -> dict[str, Tensor]:
        """Of each set what the first split tests: for systems that are slow, and asked on that split alone."""
        test, own = self.divisions[0].test, self.attacked
        return {name: images[test] if name in own else images for name, images in self.sets.items()}

    def of_tested(self, name: str, scores: Tensor) -> Tensor:
        """Scores of `tested` images where these stand in their set; NaN for the others, which no row asks for."""
        if name not in self.attacked:
            return scores
        placed = torch.full((len(self.sets[name]),), math.nan, dtype=scores.dtype)
        placed[self.divisions[0].test] = scores
        return placed

    def pairs(self, scores: Scores, anomaly: str) -> list[Pair]:
        """For each split, the scores of its in-distribution test images and of the anomalies that belong to it."""
        clean, odd = scores[IN_DISTRIBUTION], scores[anomaly]
        return [(clean[d.test], odd[d.test] if self.paired[anomaly] else odd) for d in self.divisions]

    def images(self, anomaly: str) -> list[tuple[Tensor, Tensor]]:
        """Which image each of these scores is of: see `experiments.images_of_splits`."""
        return experiments.images_of_splits(self.divisions, self.paired[anomaly], len(self.sets[anomaly]))

    def over_cadet(self, pairs: Sequence[Pair], anomaly: str, theirs: Sequence[Pair]) -> Row:
        """A system's AUROC minus CADet's on the images that both have scored: `over_cadet`, its `_low` and `_high`.

        Over splits, the interval counts the draws of test images and of those CADet is fitted on. A system that was asked on the
        first split, and on the first of its images, is compared there alone, for these fits.
        """
        shared = [(a[: len(x)], b[: len(y)]) for (a, b), (x, y) in zip(theirs, pairs, strict=False)]
        fitted = experiments.fitted_share(self.divisions, len(self.sets[IN_DISTRIBUTION]))
        found = metrics.splits_difference(pairs, shared, n_boot=500, images=self.images(anomaly), fitted=fitted)
        return experiments.difference_over("cadet", found)

    def first(self, n: int, anomalies: Sequence[str]) -> Field:
        """The first n test images of the first split and what belongs to them: a small field for systems that are slow.

        Its one split has the same calibration images as the first one here, as far as n of them go.
        """
        division = self.divisions[0]
        test, calibration = division.test[:n], division.calibration[:n]
        clean = torch.cat([test, calibration])
        sets = {IN_DISTRIBUTION: self.sets[IN_DISTRIBUTION][clean]}
        sets |= {name: self.sets[name][clean if self.paired[name] else slice(n)] for name in anomalies}
        own = Split(clean[:0], torch.arange(len(test), len(clean)), torch.arange(len(test)))
        return Field(sets, self.paired, [own], {name: mask[clean] for name, mask in self.successful.items()})

    def of_successful(self, pairs: Sequence[Pair], anomaly: str, fitted: float) -> Row:
        """AUROC on images that the victim got right against attacks that then fooled it, as Hu et al.'s program counts them.

        `auroc_successful`, its `low_` and `high_`, and the images on either side; nothing where there is no attack, or where a
        split has fewer than two such images of a kind.
        """
        if anomaly not in self.successful:
            return {}
        clean, odd = self.successful[IN_DISTRIBUTION], self.successful[anomaly]
        masks = [(clean[d.test], odd[d.test]) for d in self.divisions]
        kept = [(a[right], b[fooled]) for (a, b), (right, fooled) in zip(pairs, masks, strict=True)]
        if min(len(scores) for pair in kept for scores in pair) < 2:
            return {}
        images = [(d.test[right], d.test[fooled]) for d, (right, fooled) in zip(self.divisions, masks, strict=True)]
        found = experiments.summary(kept, images, fitted)
        return {f"{key}_successful": found[key] for key in ("auroc", "low", "high", "n_in", "n_out")}


# --- encoders with a classifier's head ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What detectors learn from: an encoder's features of labelled training images, and the classifier on top.

    >>> images, labels = torch.rand(6, 3, 2, 2), torch.arange(6) % 2
    >>> learned_from = Known(encoders.Classifier(nn.Flatten(), nn.Linear(12, 2)), images.flatten(1), labels)
    >>> learned_from.classifier(images).shape
    torch.Size([6, 2])
    """

    classifier: encoders.Classifier
    features: Tensor  # (N, D)
    labels: Tensor  # (N,)


def known(encoder: nn.Module, file: str | Path, training: data.ImageSet, size: int, dtype: str = "float32") -> Known:
    """The encoder with the head its file holds, else with a linear probe on the training images, which the paper leaves open.

    size: to which training images are brought; those of a folder are read block by block and not kept.

    >>> from tempfile import TemporaryDirectory
    >>> encoder = encoders.ResNet("resnet10", width=4, stem="cifar", image_size=8).eval()
    >>> training = data.load("digits-train").of_classes([0, 1])[:40]
    >>> with TemporaryDirectory() as folder:
    ...     learned_from = known(encoder, encoders.save_encoder(encoder, f"{folder}/encoder.safetensors"), training, 8)
    >>> learned_from.features.shape, learned_from.classifier.head.out_features
    (torch.Size([40, 32]), 2)
    """
    features, labels = experiments.features(encoder, training, size, dtype)
    head = encoders.head_of(file)
    head = probe.linear_probe(features, labels) if head is None else head
    classifier = encoders.Classifier(encoder, head.to(encoders.device_of(encoder))).eval()
    return Known(classifier, features, labels)


# --- rows -----------------------------------------------------------------------------------------------------------------


def rows_of(
    system: str, encoder: str, field: Field, scores: Scores, cadet_pairs: Mapping[str, Sequence[Pair]], **about: Any
) -> list[Row]:
    """A row for each anomaly that was scored: `experiments.summary`, and by how much its AUROC is `over_cadet`.

    cadet_pairs: anomaly -> scores of CADet, split by split. For the row's own interval, nothing is fitted on held-out images:
    these systems learn from others, and Hu et al.'s, which learns from calibration images, is asked on one split only.

    >>> sets = {"in-distribution": torch.rand(12, 3, 8, 8), "dark": torch.rand(5, 3, 8, 8) / 4}
    >>> field = Field(sets, {"dark": False}, experiments.splits(12, 1, n_reference=4, n_calibration=4))
    >>> scores = {name: images.mean(dim=(1, 2, 3)) for name, images in sets.items()}
    >>> (row,) = rows_of("mean pixel", "none", field, scores, {}, tuned=False)
    >>> row["detector"], row["anomaly"], row["auroc"], row["tuned"]
    ('mean pixel', 'dark', 1.0, False)
    """
    rows = []
    for anomaly in (name for name in scores if name != IN_DISTRIBUTION):
        pairs = field.pairs(scores, anomaly)
        found = experiments.summary(pairs, field.images(anomaly), fitted=0)
        row: Row = dict(detector=system, encoder=encoder, anomaly=anomaly) | found | about
        row |= field.of_successful(pairs, anomaly, fitted=0)
        if anomaly in cadet_pairs and (system, encoder) != CADET:
            row |= field.over_cadet(pairs, anomaly, cadet_pairs[anomaly])
        rows.append(row)
    return rows


def timed(
    score: Callable[[Tensor], Any], sets: Mapping[str, Tensor], say: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Any], float]:
    """What a system says of the images of each set, and the seconds that an image took it.

    say: is told before each set how many images of which it is.

    >>> scores, seconds = timed(lambda images: images.mean(dim=(1, 2, 3)), {"noise": torch.rand(8, 3, 4, 4)})
    >>> scores["noise"].shape, seconds > 0
    (torch.Size([8]), True)
    """
    began = time.perf_counter()
    found = {}
    for name, images in sets.items():
        say(f"{len(images)} images of {name}")
        found[name] = score(images)
    return found, (time.perf_counter() - began) / sum(map(len, sets.values()))


def cadet_rows(
    encoder: str,
    field: Field,
    sums: Mapping[str, embed.ViewSums],
    detector: cadet.CADet,
    cadet_pairs: dict[str, list[Pair]],
) -> tuple[list[Row], dict[str, list[Pair]]]:
    """The rows of CADet from view sums already made, and its scores: anomaly -> pairs, split by split.

    Those of the contrastive encoder, which come first, fill `cadet_pairs`. Sums may be of an earlier run: for the seconds, a few
    images are asked again, after one for warming up.

    >>> sets = {"in-distribution": torch.rand(12, 3, 8, 8), "noise": torch.rand(5, 3, 8, 8)}
    >>> field = Field(sets, {"noise": False}, experiments.splits(12, 2, n_reference=4, n_calibration=4))
    >>> detector = cadet.CADet(nn.Flatten(), n_views=4, image_size=8)
    >>> sums = {name: detector.view_sums(images) for name, images in sets.items()}
    >>> rows, pairs = cadet_rows("contrastive", field, sums, detector, cadet_pairs={})
    >>> [(row["detector"], row["anomaly"], row["forwards"]) for row in rows], len(pairs["noise"])
    ([('CADet', 'noise', 4.0)], 2)
    """
    ask = questions.Asker(sums, field.paired, field.divisions)
    pairs = {anomaly: ask.pairs(anomaly, detector.n_views) for anomaly in ask.anomalies}
    if ("CADet", encoder) == CADET:
        cadet_pairs.update(pairs)
    few = field.sets[IN_DISTRIBUTION][:_TIMED]
    detector.view_sums(few[:1])
    _, seconds = timed(detector.view_sums, {IN_DISTRIBUTION: few})
    rows = []
    for anomaly, found in pairs.items():
        told = experiments.summary(found, field.images(anomaly), ask.fitted())
        row: Row = dict(detector="CADet", encoder=encoder, anomaly=anomaly) | told
        row |= field.of_successful(found, anomaly, ask.fitted())
        if ("CADet", encoder) != CADET and anomaly in cadet_pairs:
            row |= field.over_cadet(found, anomaly, cadet_pairs[anomaly])
        rows.append(row | dict(tuned=False, seconds=seconds, forwards=float(detector.n_views)))
    return rows, pairs


def post_hoc_rows(
    names: Sequence[str],
    encoder: str,
    field: Field,
    learned_from: Known,
    cadet_pairs: Mapping[str, Sequence[Pair]],
    dtype: str = "float32",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """The detectors that need features alone, each set embedded once for all of them; settings: name -> keywords of its class.

    >>> images, labels = torch.rand(12, 3, 8, 8), torch.arange(12) % 2
    >>> learned_from = Known(encoders.Classifier(nn.Flatten(), nn.Linear(192, 2)), images.flatten(1), labels)
    >>> sets, divisions = {"in-distribution": images, "noise": torch.rand(5, 3, 8, 8)}, experiments.splits(12, 1, 4, 4)
    >>> field = Field(sets, {"noise": False}, divisions)
    >>> rows = post_hoc_rows(["MSP", "SSD"], "contrastive", field, learned_from, {}, say=lambda _: None)
    >>> [(row["detector"], row["anomaly"], row["forwards"]) for row in rows]
    [('MSP', 'noise', 1.0), ('SSD', 'noise', 1.0)]
    """
    classifier = learned_from.classifier

    def features_of(images: Tensor) -> Tensor:
        return embed.embed(classifier.encoder, images, dtype=dtype)

    features, embedding = timed(features_of, field.sets)
    rows = []
    for name in names:
        say(f"{name}, {encoder} encoder")
        detector = DETECTORS[name](**(settings or {}).get(name, {})).fit_features(
            learned_from.features, learned_from.labels, classifier.head
        )
        scores, scoring = timed(detector.score_features, features)
        about = dict(tuned=False, seconds=embedding + scoring, forwards=detector.forwards)
        rows += rows_of(name, encoder, field, scores, cadet_pairs, **about)
    return rows


def odin_rows(
    encoder: str,
    field: Field,
    learned_from: Known,
    tuning: tuple[Tensor, Tensor],
    cadet_pairs: Mapping[str, Sequence[Pair]],
    say: Callable[[str], None] = print,
) -> list[Row]:
    """ODIN at its published settings on every set and, under the name "ODIN tuned", tuned on attacks, on every attack.

    tuning: clean and attacked images that no row is scored on.

    >>> images, labels = torch.rand(12, 3, 4, 4), torch.arange(12) % 2
    >>> learned_from = Known(encoders.Classifier(nn.Flatten(), nn.Linear(48, 2)), images.flatten(1), labels)
    >>> sets = {"in-distribution": images, "PGD": images.flip(-1), "noise": torch.rand(5, 3, 4, 4)}
    >>> field = Field(sets, {"PGD": True, "noise": False}, experiments.splits(12, 1, 4, 4))
    >>> rows = odin_rows("contrastive", field, learned_from, (images[:4], images[4:8]), {}, say=lambda _: None)
    >>> [(row["detector"], row["anomaly"]) for row in rows]  # what is tuned on attacks is asked about attacks
    [('ODIN', 'PGD'), ('ODIN', 'noise'), ('ODIN tuned', 'PGD')]
    """
    say(f"ODIN, {encoder} encoder")
    odin = DETECTORS["ODIN"]().fit(learned_from.classifier, tuning[0])  # which learns nothing
    scores, seconds = timed(odin.score_samples, field.sets)
    about = dict(seconds=seconds, forwards=odin.forwards)
    rows = rows_of("ODIN", encoder, field, scores, cadet_pairs, tuned=False, **about)
    tuned = tune_odin(learned_from.classifier, *tuning)
    scores, seconds = timed(tuned.score_samples, field.attacked)
    chosen = dict(temperature=tuned.temperature, step=tuned.step)
    about = dict(seconds=seconds, forwards=tuned.forwards)
    return rows + rows_of("ODIN tuned", encoder, field, scores, cadet_pairs, tuned=True, chosen=chosen, **about)


def hu_rows(
    encoder: str,
    field: Field,
    learned_from: Known,
    tuning: tuple[Tensor, Tensor],
    cadet_pairs: Mapping[str, Sequence[Pair]],
    settings: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Hu et al.'s detector untuned, self-calibrated, and tuned on attacks, on a small `field` (see `Field.first`).

    Its walks are measured once for a set and serve the first two. Fitted on the field's calibration images; tuning: clean and
    attacked images that no row is scored on.

    >>> images, labels = torch.rand(12, 3, 4, 4), torch.arange(12) % 2
    >>> learned_from = Known(encoders.Classifier(nn.Flatten(), nn.Linear(48, 2)), images.flatten(1), labels)
    >>> field = Field({"in-distribution": images, "PGD": images.flip(-1)}, {"PGD": True}, experiments.splits(12, 1, 4, 4))
    >>> settings, tuning = dict(lr=100.0, radius=0.5, cap_targeted=5, cap_untargeted=5), (images[:4], images[4:8])
    >>> rows = hu_rows("contrastive", field, learned_from, tuning, {}, settings, say=lambda _: None)
    >>> [(row["detector"], row["tuned"]) for row in rows]
    [('Hu', False), ('HuSelfCalibrated', False), ('Hu tuned', True)]
    """
    classifier, clean = learned_from.classifier, field.sets[IN_DISTRIBUTION]
    calibration = clean[field.divisions[0].calibration]
    untuned, calibrated = hu.Hu(**settings), hu.HuSelfCalibrated(**settings)
    measured = hu.criteria(classifier, calibration, **untuned.settings())
    untuned.fit_criteria(classifier, measured)
    calibrated.fit_criteria(classifier, measured)

    def walks(system: str, detector: hu.Hu, sets: Mapping[str, Tensor]) -> tuple[dict[str, hu.Criteria], float]:
        told = f"{system}, {encoder} encoder: walks of "
        return timed(lambda images: hu.criteria(classifier, images, **detector.settings()), sets, lambda of: say(told + of))

    found, seconds = walks("Hu", untuned, field.tested)
    about = dict(seconds=seconds, forwards=_passes(untuned, found))
    rows = []
    for system, detector in (("Hu", untuned), ("HuSelfCalibrated", calibrated)):
        scores = {name: field.of_tested(name, detector.score_criteria(c)) for name, c in found.items()}
        rows += rows_of(system, encoder, field, scores, cadet_pairs, tuned=False, **about)
    say(f"Hu, {encoder} encoder: tuning on {len(tuning[1])} attacked images")
    tuned = hu.tune_hu(classifier, *tuning, **settings)
    tested = {name: images for name, images in field.tested.items() if name in field.attacked}
    found, seconds = walks("Hu tuned", tuned, tested)
    scores = {name: field.of_tested(name, tuned.score_criteria(criteria)) for name, criteria in found.items()}
    chosen = {key: getattr(tuned, key) for key in hu.GRID}
    about = dict(seconds=seconds, forwards=_passes(tuned, found))
    return rows + rows_of("Hu tuned", encoder, field, scores, cadet_pairs, tuned=True, chosen=chosen, **about)


def _passes(detector: hu.Hu, found: Mapping[str, hu.Criteria]) -> float:
    """What an image cost, in passes, over all sets whose walks were measured with the detector's caps."""
    passes = [hu.forward_passes(c, detector.cap_targeted, detector.cap_untargeted) for c in found.values()]
    return float(torch.cat(passes).mean())
