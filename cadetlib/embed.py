"""From images to embeddings, and to the sums over random views that CADet is made of; batched, sharded and cached.

For unit embeddings z_1 .. z_n of n views of one image and S their sum, m_in = (|S|^2 - n) / (n (n - 1)) and m_out = <S, mu> / n
(Eq. 5): one vector per image stands for all its views, and the sums at a grid of n come from one pass.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadetlib import ahead, checks, encoders
from cadetlib.views import EvalViews, resize_to

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"  # bfloat16 where the device multiplies it, else float32
_FORMAT = "cadetlib.view_sums"
GPU_PIXELS = 2**23  # of images that a GPU is asked to work on together


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16. A CPU without them computes, but some twenty times slower than float32.

    >>> multiplies_bfloat16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # of x86 and of ARM
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in names)


def resolved_dtype(dtype: str, device: torch.device | None = None) -> str:
    """One of DTYPES: "auto" is the fastest that this device (None: the one that encoders are put on) has for an encoder.

    >>> resolved_dtype("float16"), resolved_dtype("auto") in ("float32", "bfloat16")
    ('float16', True)
    """
    if dtype == AUTO:
        return "bfloat16" if multiplies_bfloat16(device or encoders.default_device()) else "float32"
    return checks.one_of(dtype, "dtype", DTYPES)


def warn_of_emulation(dtype: str, device: torch.device) -> None:
    """RuntimeWarning when a CPU has no instructions for this dtype, of which a user who waits would not think.

    >>> warn_of_emulation("float32", torch.device("cpu"))
    """
    if dtype == "bfloat16" and device.type == "cpu" and not multiplies_bfloat16(device):
        message = (
            "dtype: found bfloat16 on a CPU without instructions for it, many times slower than float32; set float32 or auto"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=4)


@contextmanager
def inference(encoder: nn.Module, dtype: str = "float32") -> Iterator[torch.device]:
    """Eval mode, no gradients, and autocast to `dtype` on the encoder's device; every module's mode is restored.

    >>> encoder = nn.Dropout(0.9)
    >>> with inference(encoder):
    ...     encoder(torch.ones(3))  # no dropout in eval mode
    tensor([1., 1., 1.])
    >>> encoder.training
    True
    """
    checks.one_of(dtype, "dtype", DTYPES)
    device = encoders.device_of(encoder)
    warn_of_emulation(dtype, device)
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
            yield device
    finally:
        for module, training in modes:
            module.training = training


def embed(encoder: nn.Module, images: Any, batch_size: int = 512, dtype: str = "float32") -> Tensor:
    """Features of images as they are (N, 3, S, S), uint8 or [0, 1] -> (N, D) float32 on the CPU.

    >>> white = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    >>> embed(nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), white)  # any module will do; bytes become [0, 1]
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    x = checks.as_tensor(images, "images").detach()
    checks.at_least(len(x) if x.ndim else 0, "number of images", 1)
    batch_size = checks.at_least(batch_size, "batch_size", 1)
    with inference(encoder, dtype) as device:
        found = ahead.results(lambda some: (encoders.features_of(encoder, some),), _batches(x, batch_size, device), device)
        parts = [checks.finite(features, "encoder's features") for (features,) in found]
    return torch.cat(parts)


def _batches(x: Tensor, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor]]:
    """The images as they are, at most `batch_size` at a time, on the device, and none of them the caller's own."""
    for start in range(0, len(x), batch_size):
        with torch.autocast(device.type, enabled=False):
            batch = checks.images(_moved(x[start : start + batch_size], device))
        if batch.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            batch = batch.clone()  # an encoder may write into what it is given
        yield (batch,)
        del batch  # before the next is moved


def views_at_once(image_size: int, device: torch.device) -> int:
    """How many views go through an encoder together unless one is told: 1024, on a GPU up to `GPU_PIXELS` where they are small.

    There a batch of small views is computed faster than it is asked for; a CPU is given pieces in any case (`encoders.encode`).

    >>> views_at_once(224, torch.device("cuda")), views_at_once(32, torch.device("cuda")), views_at_once(32, torch.device("cpu"))
    (1024, 8192, 1024)
    """
    return max(1024, GPU_PIXELS // image_size**2) if device.type == "cuda" else 1024


def _moved(batch: Tensor, device: torch.device) -> Tensor:
    """The batch on the device. To a GPU through pinned memory, from where it travels while the processor goes on."""
    through_pinned = device.type == "cuda" and not batch.is_cuda
    return (batch.pin_memory() if through_pinned else batch).to(device, non_blocking=True)


def signature(encoder: nn.Module, image_size: int) -> Tensor:
    """The encoder's features of a fixed pattern: tells encoders apart whose weights are the same or that have none.

    >>> mean, largest = (nn.Sequential(pool(4), nn.Flatten()) for pool in (nn.AvgPool2d, nn.MaxPool2d))  # without weights
    >>> same_signature(mean, signature(mean, image_size=4), signature(largest, image_size=4))
    False
    """
    pattern = torch.arange(2 * 3 * image_size**2, dtype=torch.float64).mul(0.37).sin().add(1).div(2).float()
    return embed(encoder, pattern.view(2, 3, image_size, image_size))


def same_signature(encoder: nn.Module, found: Tensor, expected: Tensor) -> bool:
    """Whether two signatures are this encoder's. Devices and precisions differ by rounding, other encoders by far more.

    Where there are weights, they were compared before; without any, the signature alone tells, and less is allowed.

    >>> found = torch.tensor([[1.0, 2.0]])
    >>> same_signature(nn.Linear(2, 2), found, found + 1e-3), same_signature(nn.Flatten(), found, found + 1e-3)
    (True, False)
    """
    allowed = 1e-2 if encoder.state_dict() else 1e-4
    atol = allowed * float(expected.abs().mean())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=allowed, atol=atol)


@dataclass(frozen=True)
class ViewSums:
    """Sums of unit embeddings over the first n views, for each image and each n of a grid.

    >>> sums = ViewSums((2, 50), m_in=torch.tensor([[0.9, 0.8]]), means=torch.ones(1, 2, 16))  # of one image
    >>> m_in, mean = sums.at(50)
    >>> m_in, mean.shape
    (tensor([0.8000]), torch.Size([1, 16]))
    """

    grid: tuple[int, ...]  # numbers of views, increasing
    m_in: Tensor  # (N, K) float64: mean cosine similarity over the n (n - 1) ordered pairs of views
    means: Tensor  # (N, K, D) float32: S / n, the mean unit embedding

    def at(self, n_views: int) -> tuple[Tensor, Tensor]:
        """m_in (N,) and mean unit embedding (N, D) over the first n_views views."""
        if n_views not in self.grid:
            raise ValueError(f"n_views: found {n_views}, expected one of the grid {self.grid}")
        k = self.grid.index(n_views)
        return self.m_in[:, k], self.means[:, k]

    def __getitem__(self, index: Any) -> ViewSums:
        return ViewSums(self.grid, self.m_in[index], self.means[index])

    def __len__(self) -> int:
        return len(self.m_in)


def concatenate(parts: Sequence[ViewSums]) -> ViewSums:
    """View sums of consecutive shards, in order, as one.

    >>> shard = ViewSums((50,), m_in=torch.tensor([[0.8], [0.7]]), means=torch.ones(2, 1, 16))
    >>> len(concatenate([shard, shard[:1]]))
    3
    """
    if len({part.grid for part in parts}) != 1:
        raise ValueError(f"found grids {[part.grid for part in parts]}, expected at least one part and equal grids")
    return ViewSums(parts[0].grid, torch.cat([p.m_in for p in parts]), torch.cat([p.means for p in parts]))


def sums_of_views(z: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """m_in (N, K) float64 and means (N, K, D) float64 of embeddings z (N, n_views, D), over the first n views for n in grid.

    >>> z = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]])  # three views, of which the first two agree
    >>> m_in, means = sums_of_views(z, (2, 3))
    >>> m_in  # of three views, one pair in three agrees
    tensor([[1.0000, 0.3333]], dtype=torch.float64)
    """
    unit = checks.unit(z.double())
    segments = torch.tensor(grid).diff(prepend=torch.tensor([0])).tolist()
    sums = torch.stack([part.sum(dim=1) for part in unit.split(segments, dim=1)], dim=1).cumsum(dim=1)
    n = torch.stack([torch.full((), float(n), dtype=torch.float64, device=z.device) for n in grid])  # made there: nobody waits
    m_in = (sums.square().sum(dim=-1) - n) / (n * (n - 1))
    return m_in, sums / n[:, None]


def view_sums(
    encoder: nn.Module,
    images: Any,
    views: EvalViews,
    grid: Sequence[int] = (50,),
    keys: Tensor | None = None,
    shard: tuple[int, int] = (0, 1),
    batch_size: int | None = None,
    dtype: str = "float32",
    cache: str | Path | None = None,
) -> ViewSums:
    """One pass over images (N, 3, H, W): their views are made and encoded on the encoder's device, only sums are kept.

    grid: increasing numbers of views, each at least 2; keys (N,): what a view depends on besides seed and number (default: the
    image's pixels); shard = (i, of): the i-th of `of` consecutive parts of the images; batch_size: views at a time (None:
    `views_at_once`); cache: a folder in which results are kept under a key made of encoder, images, keys, views and grid; a file
    that is damaged, or of an encoder that does something else with equal weights, is made anew with a warning.

    >>> images, views = torch.rand(4, 3, 8, 8), EvalViews(image_size=8)
    >>> whole = view_sums(nn.Flatten(), images, views, grid=(2, 10))
    >>> halves = [view_sums(nn.Flatten(), images, views, grid=(2, 10), shard=(i, 2)) for i in (0, 1)]
    >>> torch.allclose(whole.m_in, concatenate(halves).m_in)
    True
    """
    x = checks.as_tensor(images, "images").detach()
    checks.at_least(len(x) if x.ndim else 0, "number of images", 1)
    if isinstance(grid, int):
        raise ValueError(f"grid: found {grid}, expected a sequence of numbers of views, such as ({grid},)")
    grid = tuple(checks.at_least(n, "n_views", 2) for n in grid)
    if not grid or list(grid) != sorted(set(grid)):
        raise ValueError(f"grid: found {grid}, expected increasing numbers of views")
    index, of = shard
    if not 0 <= index < of:
        raise ValueError(f"shard: found {shard}, expected (i, of) with 0 <= i < of")
    if batch_size is None:
        batch_size = views_at_once(views.image_size, encoders.device_of(encoder))
    batch_size = checks.at_least(batch_size, "batch_size", 1)
    keys = None if keys is None else checks.labels(keys, len(x), "keys")
    first, last = len(x) * index // of, len(x) * (index + 1) // of
    x = x[first:last]
    keys = None if keys is None else keys[first:last]
    if cache is None:
        return _view_sums(encoder, x, views, grid, keys, batch_size, dtype)
    path = Path(cache) / f"{_cache_key(encoder, x, views, grid, keys, dtype)}.safetensors"
    mark = signature(encoder, views.image_size)
    tensors = _cached(path, encoder, mark)
    if tensors is None:
        result = _view_sums(encoder, x, views, grid, keys, batch_size, dtype)
        tensors = {"m_in": result.m_in, "means": result.means, "signature": mark}
        encoders.write_safetensors(path, tensors, _FORMAT)
    return ViewSums(grid, tensors["m_in"], tensors["means"])


def _cached(path: Path, encoder: nn.Module, mark: Tensor) -> dict[str, Tensor] | None:
    """What a cache's file holds; None when there is none, and, with a warning, when it is not to be trusted."""
    if not path.is_file():
        return None
    try:
        tensors, _ = encoders.read_safetensors(path, _FORMAT)
        if not same_signature(encoder, mark, tensors["signature"]):
            raise ValueError(f"{path.name}: found view sums of an encoder with the same weights and other features")
    except (KeyError, ValueError) as error:
        warnings.warn(f"cache: {error}; computing anew", stacklevel=3)
        return None
    return tensors


def _view_sums(
    encoder: nn.Module, x: Tensor, views: EvalViews, grid: tuple[int, ...], keys: Tensor | None, batch_size: int, dtype: str
) -> ViewSums:
    parts: list[Tensor] = []

    def sums(some: Tensor) -> tuple[Tensor, ...]:
        parts.append(encoders.features_of(encoder, some.flatten(0, 1)).view(*some.shape[:2], -1))
        if sum(part.shape[1] for part in parts) < grid[-1]:
            return ()  # an image's views can be more than a batch
        z = torch.cat(parts, dim=1)
        parts.clear()
        largest = torch.linalg.vector_norm(z, math.inf, dim=-1)  # of a view: 0, or not finite, where its embedding is wrong
        m_in, means = sums_of_views(z, grid)
        return m_in, means.float(), largest

    m_in, means = [], []
    with inference(encoder, dtype) as device:
        batches = _batches_of_views(x, views, grid[-1], keys, batch_size, device)
        for batch_in, batch_means, largest in ahead.results(sums, batches, device):
            checks.embeddings(largest.view(-1, 1), "encoder's features")
            m_in.append(batch_in)
            means.append(batch_means)
    if not m_in:
        raise ValueError("images: found none in this shard, expected at least one; use fewer shards")
    return ViewSums(grid, torch.cat(m_in), torch.cat(means))


def _batches_of_views(
    x: Tensor, views: EvalViews, n_views: int, keys: Tensor | None, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor]]:
    """Views (n, V, 3, S, S) of the images in order, at most `batch_size` at a time: all of some images, or some of one."""
    step = max(1, batch_size // n_views)
    for start in range(0, len(x), step):
        with torch.autocast(device.type, enabled=False):  # dtype is of the forward passes, not of the pixels
            images = resize_to(_moved(x[start : start + step], device), views.image_size)
        chosen = None if keys is None else keys[start : start + step]
        for first in range(0, n_views, batch_size):
            with torch.autocast(device.type, enabled=False):
                some = views(images, min(batch_size, n_views - first), first, chosen)
            yield (some,)
            del some  # before the next are made


def _cache_key(encoder: nn.Module, x: Tensor, views: EvalViews, grid: Sequence[int], keys: Tensor | None, dtype: str) -> str:
    digest = hashlib.sha256(encoders.fingerprint(encoder).encode())
    digest.update(json.dumps([views.settings(), list(grid), dtype, str(x.dtype), list(x.shape)]).encode())
    digest.update(x.cpu().contiguous().numpy().tobytes())
    digest.update(b"" if keys is None else keys.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
