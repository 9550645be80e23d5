"""What every public function refuses, said in one place: wrong shapes, wrong ranges, values that are not numbers.

Each check returns the value it checked, so that it reads as one step of a computation.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def as_tensor(values: Any, name: str) -> Tensor:
    """`values` (tensor, array or nested list) as a tensor on the device it is on; ValueError when it is none of these.

    >>> as_tensor([[1, 2]], "x")
    tensor([[1, 2]])
    """
    if isinstance(values, Tensor):
        return values
    try:
        return torch.from_numpy(np.array(values)) if not isinstance(values, np.ndarray) else torch.from_numpy(values.copy())
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: of tensors in a list that require gradients
        raise ValueError(f"{name}: found {type(values).__name__}, expected a tensor or an array of numbers ({error})") from error


def finite(values: Tensor, name: str) -> Tensor:
    """`values`, all of whose entries are finite.

    >>> finite(torch.tensor([1.0, math.nan]), "scores")
    Traceback (most recent call last):
    ValueError: scores: found 1 NaN or infinite of 2 values, expected finite numbers
    """
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name}: found {bad} NaN or infinite of {values.numel()} values, expected finite numbers")
    return values


def embeddings(values: Any, name: str, n_dims: int = 2, at_least: int = 1) -> Tensor:
    """Embeddings (..., D): floating point, `n_dims` dimensions, at least `at_least` rows, finite, no zero vector.

    >>> embeddings([[3, 4]], "z")
    tensor([[3., 4.]], dtype=torch.float64)
    >>> embeddings([[0.0, 0.0]], "z")
    Traceback (most recent call last):
    ValueError: z: found a zero vector, whose cosine similarity is undefined; expected none
    """
    z = as_tensor(values, name)
    if z.ndim != n_dims or 0 in z.shape[1:]:
        expected = {1: "(D,)", 2: "(n, D)", 3: "(N, n_views, D)"}[n_dims]
        raise ValueError(f"{name}: found shape {tuple(z.shape)}, expected {expected}")
    if n_dims > 1 and len(z) < at_least:
        raise ValueError(f"{name}: found {len(z)} samples, expected at least {at_least}")
    if z.is_complex() or z.dtype == torch.bool:
        raise ValueError(f"{name}: found dtype {z.dtype}, expected real numbers")
    z = finite(z if z.is_floating_point() else z.double(), name)
    if bool((z == 0).all(dim=-1).any()):
        raise ValueError(f"{name}: found a zero vector, whose cosine similarity is undefined; expected none")
    return z


def features(values: Any, at_least: int = 1, name: str = "features") -> Tensor:
    """Features (N, D) as a classifier takes them: finite, float32 or float64; a zero vector is one like any other.

    >>> features([[0, 0], [3, 4]]).dtype
    torch.float32
    """
    x = as_tensor(values, name)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name}: found shape {tuple(x.shape)}, expected (N, D)")
    if len(x) < at_least:
        raise ValueError(f"{name}: found {len(x)} samples, expected at least {at_least}")
    if x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name}: found dtype {x.dtype}, expected real numbers")
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return finite(x.detach(), name)


def unit(z: Tensor) -> Tensor:
    """Embeddings (..., D), each divided by its length, whatever that is; a zero vector stays zero.

    >>> unit(torch.tensor([[3e-30, 4e-30], [3e30, 0.0], [0.0, 0.0]]))  # squares would be 0 and infinite
    tensor([[0.6000, 0.8000],
            [1.0000, 0.0000],
            [0.0000, 0.0000]])
    """
    largest = torch.linalg.vector_norm(z.detach(), math.inf, dim=-1, keepdim=True)
    return F.normalize(z / largest.where(largest > 0, 1), dim=-1)


def images(values: Any, name: str = "images", at_least: int = 1) -> Tensor:
    """Images (N, 3, H, W), uint8 or floating point in [0, 1] -> float32 in [0, 1] on the same device.

    >>> images(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).unique()
    tensor([1.])
    >>> images(torch.rand(1, 2, 2, 3))
    Traceback (most recent call last):
    ValueError: images: found shape (1, 2, 2, 3), expected (N, 3, H, W) (repeat a grey channel three times)
    """
    x = as_tensor(values, name).detach()
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape[2:]:
        raise ValueError(f"{name}: found shape {tuple(x.shape)}, expected (N, 3, H, W) (repeat a grey channel three times)")
    if len(x) < at_least:
        raise ValueError(f"{name}: found {len(x)} images, expected at least {at_least}")
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not x.is_floating_point():
        raise ValueError(f"{name}: found dtype {x.dtype}, expected uint8 or floating point in [0, 1]")
    low, high = (float(v) for v in torch.aminmax(finite(x, name)))
    if low < 0 or high > 1:
        raise ValueError(
            f"{name}: found values in [{low:.4g}, {high:.4g}], expected [0, 1] (divide by 255? undo a normalisation?)"
        )
    return x.float()


def labels(values: Any, n_images: int, name: str = "labels") -> Tensor:
    """Labels (n_images,) of any integer type -> int64.

    >>> labels([2, 0], n_images=2)
    tensor([2, 0])
    """
    y = as_tensor(values, name)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"{name}: found dtype {y.dtype}, expected integers")
    if y.shape != (n_images,):
        raise ValueError(f"{name}: found shape {tuple(y.shape)}, expected ({n_images},), one per image")
    return y.long()


def classes(values: Any, n_images: int, name: str = "labels") -> Tensor:
    """Labels (n_images,) that count from 0 -> int64.

    >>> classes([2, -1], n_images=2)
    Traceback (most recent call last):
    ValueError: labels: found -1, expected whole numbers from 0
    """
    y = labels(values, n_images, name)
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"{name}: found {int(y.min())}, expected whole numbers from 0")
    return y


def in_classes(labels: Tensor, n_classes: int) -> Tensor:
    """Labels (N,) int64, each of which is one of a classifier's classes, 0 to n_classes - 1.

    >>> in_classes(torch.tensor([0, 3]), n_classes=3)
    Traceback (most recent call last):
    ValueError: labels: found 0 to 3, expected 0 to 2, the classifier's 3 classes
    """
    if not len(labels):
        raise ValueError("labels: found none, expected one at least")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(f"labels: found {low} to {high}, expected 0 to {n_classes - 1}, the classifier's {n_classes} classes")
    return labels


def in_open_interval(value: float, name: str, low: float = 0.0, high: float = 1.0) -> float:
    """A number strictly between `low` and `high`.

    >>> in_open_interval(0.05, "alpha"), in_open_interval(3, "tau", high=math.inf)
    (0.05, 3.0)
    """
    if not _is_number(value) or not low < value < high:
        raise ValueError(f"{name}: found {value!r}, expected a number between {low} and {high}, both excluded")
    return float(value)


def _is_number(value: Any) -> bool:
    """Of Python, NumPy or a tensor of one; neither a word nor None."""
    try:
        return not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def not_negative(value: float, name: str) -> float:
    """A finite number of at least 0.

    >>> not_negative(-0.1, "step")
    Traceback (most recent call last):
    ValueError: step: found -0.1, expected a finite number of at least 0
    """
    if not _is_number(value) or value < 0:
        raise ValueError(f"{name}: found {value!r}, expected a finite number of at least 0")
    return float(value)


def one_of(value: str, name: str, allowed: Iterable[str]) -> str:
    """One of the `allowed` words.

    >>> one_of("max", "reduction", ("sum", "mean"))
    Traceback (most recent call last):
    ValueError: reduction: found 'max', expected one of ('sum', 'mean')
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}: found {value!r}, expected one of {allowed}")
    return value


def at_least(value: int, name: str, minimum: int) -> int:
    """A whole number of at least `minimum`.

    >>> at_least(1, "n_views", 2)
    Traceback (most recent call last):
    ValueError: n_views: found 1, expected a whole number of at least 2
    """
    if isinstance(value, bool) or not _is_number(value) or int(value) != value or value < minimum:
        raise ValueError(f"{name}: found {value!r}, expected a whole number of at least {minimum}")
    return int(value)


def seed(value: int, name: str = "seed") -> int:
    """A whole number of Python or NumPy, as torch's generators and ours take it.

    >>> seed(np.int64(3))
    3
    >>> seed(1.5)
    Traceback (most recent call last):
    ValueError: seed: found 1.5, expected a whole number of at most 64 bits, one of them the sign
    """
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or not -(2**63) <= whole < 2**63:
        raise ValueError(f"{name}: found {value!r}, expected a whole number of at most 64 bits, one of them the sign")
    return whole
