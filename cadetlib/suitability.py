"""Does an encoder suit CADet? Judged on normal images alone, without any anomaly.

CADet needs an encoder that puts random crops of one image near one another (alignment) and different images apart (uniformity;
Wang and Isola, ICML 2020), and whose similarities drop when an image is disturbed. The first two are measured on views, the
third by disturbing one's own normal images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadetlib import cadet, checks, corruptions, data, embed, metrics
from cadetlib.views import resize_to

Row = dict[str, Any]


def _quarters_shuffled(x: Tensor) -> Tensor:
    """The four quarters of each image in another order: every patch is normal, the whole is not."""
    top, bottom = x.chunk(2, dim=2)
    (a, b), (c, d) = top.chunk(2, dim=3), bottom.chunk(2, dim=3)
    return torch.cat([torch.cat([d, c], dim=3), torch.cat([b, a], dim=3)], dim=2)


# Images (N, 3, S, S) in [0, 1] -> the same, disturbed. Amounts as CIFAR-10-C's third severity; blur in parts of the image's side.
DISTURBANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda x: corruptions.gaussian_noise(x, 0.08),
    "blur": lambda x: corruptions.gaussian_blur(x, x.shape[-1] * 0.7 / 32),
    "contrast": lambda x: corruptions.contrast(x, 0.4),
    "jpeg": lambda x: corruptions.jpeg(x, 58),
    "turned by 180°": lambda x: x.flip(2, 3),
    "quarters shuffled": _quarters_shuffled,
}


class Pixels(nn.Module):
    """The image itself, at 8 x 8, as its features: what any encoder should beat.

    >>> Pixels()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 192])
    """

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 8).flatten(1) - 0.5


def alignment(m_in: Any) -> float:
    """Mean squared distance of two views of one image, on the unit sphere: 2 - 2 m_in; 0 is best (Wang and Isola, alpha = 2).

    >>> alignment(torch.tensor([1.0, 0.5]))
    0.5
    """
    return float(2 - 2 * checks.as_tensor(m_in, "m_in").double().mean())


def uniformity(embeddings: Any, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|^2) over pairs of embeddings (N, D) of different images, on the unit sphere.

    0 when all are equal; about -2 t when they fill a sphere of many dimensions evenly, which is best (Wang and Isola).

    >>> round(uniformity([[1.0, 0.0], [-1.0, 0.0]]), 6)
    -8.0
    """
    z = checks.unit(checks.embeddings(embeddings, "embeddings", at_least=2).double())
    squared = torch.pdist(z).square()
    return float(torch.logsumexp(-t * squared, dim=0) - np.log(len(squared)))


def judge(detector: cadet.CADet, name: str, reference: Any, normal: Any, n_judged: int = 100, seed: int = 0) -> Row:
    """How well `detector`'s encoder suits CADet, from normal images; the detector is fitted on reference and a part of `normal`.

    reference, normal: (N, 3, H, W), disjoint. n_judged of the normal images are not calibrated on; they are scored as they are
    and after each of DISTURBANCES. -> `alignment`, `uniformity`, mean and standard deviation of m_in and m_out, `rows` with the
    AUROC of each disturbance, its interval, and those of m_in and m_out alone, and `points`, the similarities.

    >>> images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> row = judge(cadet.CADet(Pixels(), n_views=3, image_size=8), "bare pixels", images[:5], images[5:], n_judged=10)
    >>> [one["anomaly"] for one in row["rows"]]
    ['noise', 'blur', 'contrast', 'jpeg', 'turned by 180°', 'quarters shuffled']
    """
    if not 1 <= n_judged <= len(normal) - 2:
        wrong = f"n_judged: found {n_judged} of {len(normal)} normal images, the others of which are calibrated on"
        raise ValueError(f"{wrong}; expected from 1 to {len(normal) - 2}")
    sizes = {"judged": n_judged, "calibration": len(normal) - n_judged}
    part = data.split(len(normal), sizes, seed)
    detector.fit(reference, normal[part["calibration"]])
    clean = resize_to(normal[part["judged"]], detector.image_size)
    known = detector.similarities(clean)
    first_views = detector.views(clean, 1)[:, 0]
    rows, points = [], [_point("normal", known, detector.gamma_)]
    for disturbance, disturb in DISTURBANCES.items():
        found = detector.similarities(disturb(clean).clamp(0, 1))
        rows.append(dict(detector="CADet", encoder=name, anomaly=disturbance) | _aurocs(known, found, detector.gamma_))
        points.append(_point(disturbance, found, detector.gamma_))
    return dict(
        encoder=name,
        alignment=alignment(known[0]),
        uniformity=uniformity(embed.embed(detector.encoder, first_views)),
        mean_m_in=float(known[0].mean()),
        deviation_m_in=float(known[0].std()),
        mean_m_out=float(known[1].mean()),
        deviation_m_out=float(known[1].std()),
        rows=rows,
        points=points,
    )


def _aurocs(known: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], gamma: float) -> Row:
    normal, disturbed = (m_in + gamma * m_out for m_in, m_out in (known, found))
    low, high = metrics.bootstrap_interval(normal, disturbed, n_boot=200, paired=True)
    alone = [metrics.auroc(a, b) for a, b in zip(known, found, strict=True)]
    return dict(auroc=metrics.auroc(normal, disturbed), low=low, high=high, m_in_alone=alone[0], m_out_alone=alone[1])


def _point(name: str, found: tuple[Tensor, Tensor], gamma: float) -> Row:
    return dict(set=name, m_in=found[0], gamma_m_out=gamma * found[1])


def advice(row: Row, yardstick: Row) -> list[str]:
    """What speaks against an encoder, and what to do about it, one sentence or two each. Rules of thumb, none of them a test.

    row, yardstick: of `judge`, of the encoder and of `Pixels` on the same images.

    >>> yardstick = dict(alignment=0.1, uniformity=-2.0, rows=[dict(anomaly="blur", auroc=0.6)])
    >>> advice(yardstick | dict(rows=[dict(anomaly="blur", auroc=0.9)]), yardstick)
    ['Nothing here speaks against it.']
    >>> print(*advice(yardstick | dict(alignment=0.0, rows=[dict(anomaly="blur", auroc=0.9)]), yardstick))
    Crops of an image all look the same to it (alignment near 0): take smaller crops, or features before its head.
    """
    aurocs = {one["anomaly"]: one["auroc"] for one in row["rows"]}
    said = []
    if row["alignment"] < 0.002:
        said.append(
            "Crops of an image all look the same to it (alignment near 0): take smaller crops, or features before its head."
        )
    if row["uniformity"] > -0.5:
        said.append(
            "Different images look nearly the same to it (uniformity near 0): it was trained on something else, or its features "
            "share a large constant; train it on images like yours, or take another layer or another encoder."
        )
    blind = _those(aurocs, lambda value: 0.4 <= value < 0.6)
    if blind:
        said.append(
            f"It hardly sees {', '.join(blind)}. Where that would be an anomaly to you, train contrastively on images "
            "like yours, without it among the augmentations."
        )
    inverted = _those(aurocs, lambda value: value < 0.4)
    if inverted:
        said.append(
            f"After {', '.join(inverted)}, images look more normal to it than normal ones: such anomalies get large p-values. "
            "Score them by another detector as well, or flag unusually large scores too, each at half the level."
        )
    pixels = float(np.mean([one["auroc"] for one in yardstick["rows"]]))
    if np.mean(list(aurocs.values())) <= pixels:
        said.append(f"On average it tells disturbed images from normal ones no better than bare pixels do (AUROC {pixels:.2f}).")
    return said or ["Nothing here speaks against it."]


def _those(aurocs: dict[str, float], condition: Callable[[float], bool]) -> Sequence[str]:
    return [name for name, value in aurocs.items() if condition(value)]
