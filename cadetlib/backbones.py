"""CADet on other encoders than the one it was written for: larger ones, other ways of learning without labels (Section 6.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cadetlib import cifar_resnet, encoders, experiments
from cadetlib.views import EvalViews

Row = dict[str, Any]


def load(name: str) -> nn.Module:
    """An encoder on the GPU when there is one: "cifar:resnet20", "cifar:resnet56", or what `encoders.load_encoder` takes.

    >>> load("cifar:vgg")
    Traceback (most recent call last):
    ValueError: cifar: found no public weights of 'vgg', expected one of ['resnet20', 'resnet56']
    """
    kind, _, rest = name.partition(":")
    encoder = cifar_resnet.load(rest).encoder if kind == "cifar" else encoders.load_encoder(name)
    return encoders.placed(encoder)


def rows(
    name: str,
    encoder: nn.Module,
    sets: Mapping[str, Tensor],
    paired: Mapping[str, bool],
    divisions: Sequence[experiments.Split],
    views: EvalViews,
    grid: Sequence[int],
    n_views: int,
    cache: Path | None = None,
    dtype: str = "float32",
) -> list[Row]:
    """AUROC of CADet with this encoder against each set of anomalies, in the shape of the rows of Tables 3 and 4.

    sets: name -> images (N, 3, S, S), among them "in-distribution"; they are brought to the encoder's own side. views: what
    their area, flip and seed are; grid: the numbers of views to keep, among them n_views.

    >>> import torch
    >>> images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> sets = {"in-distribution": images, "darker": images / 3}
    >>> divisions = experiments.splits(30, n_splits=2, n_reference=8, n_calibration=8)
    >>> pixels, paired = nn.Flatten(), {"in-distribution": False, "darker": True}
    >>> [row] = rows("pixels", pixels, sets, paired, divisions, EvalViews(8), [4], 4)
    30 images of in-distribution: 4 views each
    30 images of darker: 4 views each
    >>> row["encoder"], row["anomaly"], row["dim"], row["low"] <= row["auroc"] <= row["high"]
    ('pixels', 'darker', 192, True)
    """
    own = EvalViews(getattr(encoder, "image_size", views.image_size), views.crop_scale, views.flip, views.seed)
    sums = experiments.view_sums_of_sets(encoder, sets, own, grid, cache, dtype=dtype)
    ask = experiments.Asker(sums, paired, divisions)
    about = dict(
        encoder=name,
        detector="CADet",
        dim=int(sums[experiments.IN_DISTRIBUTION].means.shape[-1]),
        millions_of_weights=sum(p.numel() for p in encoder.parameters()) / 1e6,
    )
    return [about | ask(anomaly, n_views) for anomaly in ask.anomalies]
