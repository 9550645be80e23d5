"""An encoder judged without anomalies: the measures against loops, and verdicts on encoders that are known to be bad."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cadetlib import data, suitability
from cadetlib.cadet import CADet


def test_alignment_and_uniformity_are_wang_and_isola_s():
    z = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    u = (z / z.norm(dim=1, keepdim=True)).double().numpy()
    pairs = [math.exp(-2 * sum((u[i] - u[j]) ** 2)) for i in range(7) for j in range(7) if i != j]
    assert suitability.uniformity(z * 3) == pytest.approx(math.log(np.mean(pairs)))
    views = u[:, None] + 0  # two views of two images: their mean squared distance is 2 - 2 m_in
    m_in = [float(views[0, 0] @ views[1, 0]), float(views[2, 0] @ views[3, 0])]
    squared = [sum((views[i, 0] - views[i + 1, 0]) ** 2) for i in (0, 2)]
    assert suitability.alignment(m_in) == pytest.approx(np.mean(squared))


class Constant(nn.Module):
    """Pixels that drown in a constant."""

    def forward(self, images):
        return suitability.Pixels()(images) * 0.01 + 1


class Averse(nn.Module):
    """Sees contrast only: flat images are the most alike to it."""

    def forward(self, images):
        flat = images.flatten(1) - images.flatten(1).mean(dim=1, keepdim=True)
        return torch.cat([torch.full((len(images), 1), 4.0), flat], dim=1)


def judged(encoder):
    digits = data.load("digits-test").resized(16).images
    detector = CADet(encoder, n_views=4, image_size=16, flip=False)
    return suitability.judge(detector, "mine", digits[:30], digits[30:130], n_judged=40)


def test_verdicts():
    pixels = judged(suitability.Pixels())
    by_name = {row["anomaly"]: row for row in pixels["rows"]}
    assert set(by_name) == set(suitability.DISTURBANCES) and all(r["low"] <= r["auroc"] <= r["high"] for r in pixels["rows"])
    assert by_name["quarters shuffled"]["m_out_alone"] > 0.8, "shuffled digits are unlike others"
    assert pixels["alignment"] == pytest.approx(2 - 2 * pixels["mean_m_in"])
    constant, averse = judged(Constant()), judged(Averse())
    words = " ".join(suitability.advice(constant, pixels))
    assert "alignment near 0" in words and "uniformity near 0" in words and constant["uniformity"] > -0.01
    assert "contrast, images look more normal" in " ".join(suitability.advice(averse, pixels)).replace("After ", "")
    better = {**pixels, "rows": [{**row, "auroc": 0.99} for row in pixels["rows"]]}
    assert suitability.advice(better, pixels) == ["Nothing here speaks against it."]
    assert "no better than bare pixels" in " ".join(suitability.advice(pixels, better))


def test_disturbances_keep_shape_and_range():
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name, disturb in suitability.DISTURBANCES.items():
        out = disturb(x).clamp(0, 1)
        assert out.shape == x.shape and not torch.allclose(out, x, atol=0.01), name
    quarter = suitability.DISTURBANCES["quarters shuffled"](x)
    assert torch.equal(quarter[..., :8, :8], x[..., 8:, 8:]) and torch.equal(quarter[..., 8:, :8], x[..., :8, 8:])


def test_more_judged_than_there_are_is_refused():
    normal = torch.rand(12, 3, 8, 8)
    with pytest.raises(ValueError, match=r"n_judged: found 80 of 12 normal images.*expected from 1 to 10"):
        suitability.judge(CADet(suitability.Pixels(), n_views=2, image_size=8), "bare pixels", normal, normal, n_judged=80)
