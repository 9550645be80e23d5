"""What scoring in half precision does to CADet: bfloat16 and float16 forward passes against float32, on the same views.

Views and similarities are computed in full precision whatever the dtype; only the encoder's forward passes change (autocast).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor, nn

from cadetlib import cadet, checks, embed
from cadetlib.views import EvalViews

Row = dict[str, Any]


def _difference(name: str, value: Tensor, full: Tensor) -> Row:
    """How far `value` is from `full`, both (N,), in standard deviations of `full` over the images."""
    spread = float(full.std())
    if not spread:
        raise ValueError(f"{name}: found no spread over {len(full)} images, expected images that differ")
    change = (value - full).abs() / spread
    return {f"{name}_mean": float(change.mean()), f"{name}_largest": float(change.max()), f"{name}_spread": spread}


def effect(
    encoder: nn.Module,
    images: Tensor,
    views: EvalViews,
    n_views: int,
    n_reference: int,
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"),
    cache: str | Path | None = None,
) -> list[Row]:
    """A row per dtype: how m_in, m_out and the score change against float32, in units of their spread over the images.

    images (N, 3, S, S), in-distribution: the first n_reference are X_val(1), the next as many X_val(2), the rest is scored;
    each dtype fits a detector of its own. `X_mean` and `X_largest` are the mean and largest absolute difference of X over
    the standard deviation of X in float32, `X_spread`; `rank` is Spearman's correlation of the scores, `p_value_largest` the
    largest difference of a p-value (Eq. 8), `forward_ms` the bare forward pass per view on this machine.

    >>> import torch
    >>> images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> rows = effect(nn.Flatten(), images, EvalViews(8, 0.75, False, 0), 4, 5, ["float32", "bfloat16"])
    >>> [(row["dtype"], row["m_in_largest"], round(row["rank"], 3)) for row in rows]  # no layer here that autocast would change
    [('float32', 0.0, 1.0), ('bfloat16', 0.0, 1.0)]
    """
    for dtype in dtypes:
        checks.one_of(dtype, "dtype", embed.DTYPES)
    checks.at_least(len(images), "number of images", 2 * n_reference + 2)
    found = {dtype: _scored(encoder, images, views, n_views, n_reference, dtype, cache) for dtype in ("float32", *dtypes)}
    rows = []
    for dtype in dtypes:
        ours, full = found[dtype], found["float32"]
        row: Row = dict(dtype=dtype, forward_ms=_forward_milliseconds(encoder, images, dtype))
        for name in ("m_in", "m_out", "score"):
            row |= _difference(name, ours[name], full[name])
        row |= dict(
            rank=float(spearmanr(ours["score"], full["score"]).statistic),
            p_value_largest=float((ours["p_value"] - full["p_value"]).abs().max()),
        )
        rows.append(row)
    return rows


def _scored(
    encoder: nn.Module, images: Tensor, views: EvalViews, n_views: int, n_reference: int, dtype: str, cache: str | Path | None
) -> dict[str, Tensor]:
    sums = embed.view_sums(encoder, images, views, [n_views], dtype=dtype, cache=cache)
    reference, calibration, test = sums[:n_reference], sums[n_reference : 2 * n_reference], sums[2 * n_reference :]
    detector = cadet.CADet(nn.Identity(), n_views=n_views).fit_sums(reference, calibration)
    m_in, m_out = detector.similarities_of_sums(test)
    score = detector.score_sums(test)
    return dict(m_in=m_in, m_out=m_out, score=score, p_value=cadet.p_values(detector.calibration_scores_, score))


def _forward_milliseconds(encoder: nn.Module, images: Tensor, dtype: str, repeats: int = 3) -> float:
    """Milliseconds per image of the bare forward pass: the fastest of several, or of those that begin within a second."""
    with embed.inference(encoder, dtype) as device:
        batch = checks.images(images.to(device))
        encoder(batch[:1])  # warms up
        times: list[float] = []
        while len(times) < repeats and sum(times) < 1:
            began = time.perf_counter()
            float(encoder(batch).sum())  # a number waits for the device
            times.append(time.perf_counter() - began)
    return 1000 * min(times) / len(images)
