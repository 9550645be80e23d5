"""Scoring in half precision: what `precision.effect` reports is what detectors of each dtype give when they are used."""

import pytest
import torch
from torch import nn

from cadetlib import encoders, precision
from cadetlib.cadet import CADet
from cadetlib.views import EvalViews


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(34, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(1)
    return encoders.ResNet("resnet10", width=4, stem="cifar", image_size=8).eval()


def test_effect_is_the_difference_between_two_detectors(encoder, images):
    row = precision.effect(encoder, images, EvalViews(8, seed=3), n_views=4, n_reference=8, dtypes=["bfloat16"])[0]
    half, full = (
        CADet(encoder, n_views=4, image_size=8, seed=3, dtype=dtype).fit(images[:8], images[8:16])
        for dtype in ("bfloat16", "float32")
    )
    m_in, expected = half.similarities(images[16:])[0], full.similarities(images[16:])[0]
    scale = expected.std()
    assert row["m_in_mean"] == pytest.approx(float((m_in - expected).abs().mean() / scale), rel=1e-9)
    assert row["m_in_largest"] == pytest.approx(float((m_in - expected).abs().max() / scale), rel=1e-9)
    change = (half.score_samples(images[16:]) - full.score_samples(images[16:])).abs().mean()
    assert row["score_mean"] == pytest.approx(float(change / full.score_samples(images[16:]).std()), rel=1e-9)
    assert row["p_value_largest"] == pytest.approx(float((half.p_values(images[16:]) - full.p_values(images[16:])).abs().max()))
    assert 0 < row["m_in_mean"] < row["m_in_largest"] and row["rank"] < 1


def test_half_precision_is_of_the_forward_passes_and_not_of_the_views(images):
    """An encoder without a layer that autocast changes scores alike in every dtype: its views are made in full precision."""
    full, half = precision.effect(nn.Flatten(), images, EvalViews(8), 4, 8, ["float32", "bfloat16"])
    for row in (full, half):
        assert row["m_in_largest"] == row["m_out_largest"] == row["score_largest"] == row["p_value_largest"] == 0


def test_too_few_or_equal_images_are_refused(images):
    with pytest.raises(ValueError, match="number of images"):
        precision.effect(nn.Flatten(), images[:17], EvalViews(8), 4, 8)
    with pytest.raises(ValueError, match="dtype"):
        precision.effect(nn.Flatten(), images, EvalViews(8), 4, 8, ["float8"])
    same = torch.cat([images[:16], images[:1].expand(10, -1, -1, -1)])
    with pytest.raises(ValueError, match="spread"):
        precision.effect(nn.Flatten(), same, EvalViews(8), 4, 8, ["bfloat16"])
