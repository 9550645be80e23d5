"""Corruptions against the definitions written out, Pillow, and the published amounts."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from cadetlib import corruptions, data


@pytest.fixture(scope="module")
def images():
    return data.load("digits").images[:40] // 2 + torch.randint(
        0, 100, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("name", corruptions.SEVERITIES)
def test_severities_grow_and_stay_images(images, name):
    moved = [(corruptions.corrupt(images, name, s).float() - images.float()).abs().mean() for s in range(1, 6)]
    assert moved == sorted(moved) and moved[0] > 0
    assert corruptions.corrupt(images, name, 5).dtype == torch.uint8


def test_severities_are_those_of_cifar_10_c():
    """Hendrycks and Dietterich 2019, as in their program for CIFAR-10."""
    assert {name: amounts for name, (_, amounts) in corruptions.SEVERITIES.items()} == {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "jpeg": (80, 65, 58, 50, 40),
    }


def test_a_jpeg_is_the_file_that_pillow_writes(images):
    for severity, quality in enumerate((80, 65, 58, 50, 40), 1):
        for ours, image in zip(corruptions.corrupt(images[:3], "jpeg", severity), images, strict=False):
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
            assert np.array_equal(ours.permute(1, 2, 0), np.asarray(Image.open(file)))


@pytest.mark.parametrize("name", corruptions.SEVERITIES)
def test_an_image_is_corrupted_alike_in_any_batch(images, name):
    whole, alone = corruptions.corrupt(images, name, 3), corruptions.corrupt(images[7:9], name, 3)
    assert torch.equal(whole[7:9], alone)


def test_noise_is_normal_and_seeded(images):
    grey = torch.full((20, 3, 8, 8), 0.5) + torch.linspace(0, 1e-3, 20).view(-1, 1, 1, 1)  # twenty different images
    noise = (corruptions.gaussian_noise(grey, 0.1) - grey).flatten().double().numpy()
    assert stats.kstest(noise / 0.1, "norm").pvalue > 1e-3
    assert not torch.equal(corruptions.gaussian_noise(grey, 0.1, seed=1), corruptions.gaussian_noise(grey, 0.1, seed=0))


def test_brightness_is_that_of_hsv(images):
    x = images[:1].double() / 255
    x[0, :, 0, 0] = 0  # black
    ours = corruptions.brightness(x, 0.15).permute(0, 2, 3, 1).reshape(-1, 3)
    for pixel, found in zip(x.permute(0, 2, 3, 1).reshape(-1, 3).tolist(), ours.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        assert found == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.15)), abs=1e-9)


def test_contrast_keeps_the_mean_of_each_channel():
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    out = corruptions.contrast(x, 0.3)
    assert torch.allclose(out.mean((2, 3)), x.mean((2, 3)))
    assert torch.allclose(out.std((2, 3)), 0.3 * x.std((2, 3)))


def test_blur_of_a_point_is_the_gaussian():
    x = torch.zeros(1, 3, 15, 15, dtype=torch.float64)
    x[0, 1, 7, 7] = 1
    offset = np.arange(-7, 8)
    weights = np.where(np.abs(offset) <= round(4 * 0.8), np.exp(-0.5 * (offset / 0.8) ** 2), 0)
    expected = np.outer(weights, weights) / weights.sum() ** 2
    out = corruptions.gaussian_blur(x, 0.8)
    assert np.allclose(out[0, 1].numpy(), expected) and not out[0, 0].any()


@pytest.mark.parametrize("wrong", ["digits:rain-1", "digits:jpeg-6", "digits:jpeg", "digits:jpeg-"])
def test_unknown_corruptions_are_refused_with_the_known_ones(wrong):
    with pytest.raises(ValueError, match="gaussian_noise"):
        data.load(wrong)


def test_a_corrupted_set_is_named_after_what_was_done():
    blurred = data.load("digits:gaussian_blur-2")
    assert blurred.name == "digits:gaussian_blur-2"
    assert torch.equal(blurred.images, corruptions.corrupt(data.load("digits").images, "gaussian_blur", 2))
