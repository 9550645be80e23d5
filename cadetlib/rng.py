"""Random numbers as a pure function of (seed, key, stream): the same on every device, in any order, in any batch.

A generator with a state would tie an image's random views to the images that came before it. Here every draw is a hash of
where it belongs, so that a score depends neither on batch size nor on who computes it. The hash is the finaliser of
SplitMix64 (Steele, Lea, Flood 2014), in wrapping 64-bit integer arithmetic, exact on CPU and GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cadetlib import checks

# Streams of an image's random numbers that are no view's (those from 0 on): two of attacks, Hu et al.'s noise, the random signs
# beside which attacks are judged, and the noise of a corruption.
ATTACK_START, ATTACK_TARGET, HU_NOISE, RANDOM_SIGNS, CORRUPTION_NOISE = -1, -2, -3, -4, -5
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _shift_right(h: Tensor, bits: int) -> Tensor:
    return (h >> bits) & ((1 << (64 - bits)) - 1)  # logical, where torch's shift of signed integers is arithmetic


def _mix(h: Tensor) -> Tensor:
    h = (h ^ _shift_right(h, 30)) * _MULTIPLIERS[0]
    h = (h ^ _shift_right(h, 27)) * _MULTIPLIERS[1]
    return h ^ _shift_right(h, 31)


def uniform(seed: int, keys: Tensor, streams: Tensor, n: int) -> Tensor:
    """Uniform numbers in [0, 1): for each key (N,) and each stream (S,), n of them -> (N, S, n) float32.

    >>> a = uniform(0, torch.tensor([7, 8]), torch.arange(3), 5)
    >>> b = uniform(0, torch.tensor([8]), torch.arange(1, 2), 5)
    >>> bool((a[1, 1] == b[0, 0]).all())
    True
    """
    device = keys.device
    start = int(_mix(torch.tensor(checks.seed(seed), dtype=torch.int64) + _GOLDEN))
    h = _mix((keys.long() ^ start) + _GOLDEN)[:, None]
    h = _mix((h ^ streams.to(device).long()) + _GOLDEN)[..., None]
    h = _mix(h + _GOLDEN * torch.arange(1, n + 1, device=device))
    return _shift_right(h, 40).float() * 2.0**-24


def image_keys(images: Tensor) -> Tensor:
    """A 64-bit key of each image's pixels: (N, 3, H, W) float in [0, 1] -> (N,) int64.

    Pixels are read at 16 bits: bytes have the same key on every device. Images that were resized in floating point differ in
    their last bits from one device to another, some across the border between two such numbers: they can get other views there.

    >>> images = torch.rand(2, 3, 4, 4)
    >>> bool((image_keys(images) == image_keys(images.flip(0)).flip(0)).all()), len(image_keys(images).unique())
    (True, 2)
    """
    pixels = (images.flatten(1) * 65535).round().long()
    position = torch.arange(pixels.shape[1], device=images.device)
    weights = _mix(position * _GOLDEN) | 1  # odd, hence a change of any one pixel changes the key
    return _mix((pixels * weights).sum(dim=1))
