"""Mild, known shifts: brightness, contrast, Gaussian noise, Gaussian blur and JPEG, at the five severities of CIFAR-10-C.

CIFAR-10.1 is not to be had everywhere; these are shifts that anyone can make from the test images they have. The amounts are
those of Hendrycks and Dietterich's program for images of 32 x 32 (ICLR 2019). Noise is a function of (seed, pixels), so that an
image is corrupted alike in any batch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from cadetlib import checks, rng


def gaussian_noise(x: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """Independent normal noise on every value; images (N, 3, H, W) in [0, 1], as for all of these -> the same shape.

    >>> noisy = gaussian_noise(torch.full((1, 3, 64, 64), 0.5), deviation=0.1)
    >>> round(float(noisy.mean()), 2), round(float(noisy.std()), 2)
    (0.5, 0.1)
    """
    n = x[0].numel()
    draws = rng.uniform(seed, rng.image_keys(x), torch.tensor([rng.CORRUPTION_NOISE]), 2 * n)[:, 0].double()
    radius = (-2 * torch.log1p(-draws[:, :n])).sqrt()  # Box and Muller; 1 - u is never 0
    normal = radius * torch.cos(2 * math.pi * draws[:, n:])
    return x + deviation * normal.view_as(x).to(x.dtype)


def brightness(x: Tensor, amount: float, seed: int = 0) -> Tensor:
    """The value of HSV raised by `amount`: each pixel scaled so that its largest channel is that much higher.

    >>> brightness(torch.tensor([0.4, 0.2, 0.0]).view(1, 3, 1, 1), amount=0.2).flatten()
    tensor([0.6000, 0.3000, 0.0000])
    """
    value = x.amax(dim=1, keepdim=True)
    raised = (value + amount).clamp(max=1)
    return torch.where(value > 0, x * (raised / value.clamp(min=1e-8)), raised)  # black has no hue and becomes grey


def contrast(x: Tensor, factor: float, seed: int = 0) -> Tensor:
    """Each channel drawn towards its mean over the image.

    >>> contrast(torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2), factor=0.5)[0, 0]
    tensor([[0.2500, 0.7500]])
    """
    return torch.lerp(x.mean(dim=(2, 3), keepdim=True).expand_as(x), x, factor)


def gaussian_blur(x: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """A Gaussian of `sigma` pixels, borders repeated.

    >>> point = torch.zeros(1, 3, 9, 9)
    >>> point[..., 4, 4] = 1
    >>> blurred = gaussian_blur(point, sigma=0.6)
    >>> round(float(blurred[0, 0].sum()), 4), bool(blurred[0, 0, 4, 4] > blurred[0, 0, 4, 5] > 0)
    (1.0, True)
    """
    blurred = ndimage.gaussian_filter(x.double().numpy(), sigma=(0, 0, sigma, sigma), mode="nearest")
    return torch.from_numpy(blurred).to(x.dtype)


def jpeg(x: Tensor, quality: float, seed: int = 0) -> Tensor:
    """Each image through a JPEG file of that quality.

    >>> images = torch.rand(1, 3, 16, 16)
    >>> fine, coarse = ((jpeg(images, quality) - images).abs().mean() for quality in (95, 5))
    >>> bool(0 < fine < coarse)
    True
    """
    from PIL import Image

    out = []
    for image in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        out.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).to(x.dtype) / 255


SEVERITIES: dict[str, tuple[Callable[[Tensor, float, int], Tensor], tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "jpeg": (jpeg, (80, 65, 58, 50, 40)),
}


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Images (N, 3, H, W), uint8 or [0, 1], after the corruption `name` of SEVERITIES at 1 (mild) to 5 -> uint8, same shape.

    >>> corrupt(torch.zeros(1, 3, 2, 2), "brightness", 1).unique().tolist()
    [13]
    """
    checks.one_of(name, "corruption", SEVERITIES)
    function, amounts = SEVERITIES[name]
    if checks.at_least(severity, "severity", 1) > len(amounts):
        raise ValueError(f"severity: found {severity!r}, expected a whole number from 1 to {len(amounts)}")
    x = checks.images(images).cpu()
    parts = [function(part, amounts[int(severity) - 1], seed).clamp(0, 1) for part in x.split(1000)]
    return (torch.cat(parts) * 255).round().to(torch.uint8)
