"""Random views of images, T_train and T_eval, as batched tensor operations on whatever device the images are on.

Knows nothing of encoders or files. A crop resized to a square, a flip and a blur are each a linear map along rows and one
along columns; so a view is `rows @ image @ columns.T`, and all views of an image share one matrix product. The draws come
from `rng.uniform`: a view is a function of (seed, image key, view index) alone. Conventions are torchvision's, pixel for
pixel (RandomResizedCrop, ColorJitter, GaussianBlur, RandomGrayscale), which the tests check.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cadetlib import checks, rng

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as PIL and torchvision
_HUE = 3  # of the four steps of a colour jitter
_TRIES = 10  # torchvision's number of draws before it falls back to a centre crop


def resize_to(images: Any, size: int) -> Tensor:
    """Images (N, 3, H, W), uint8 or [0, 1] -> float32 (N, 3, size, size): shorter side resized, bilinear, then centre crop.

    Antialiased. Clean and attacked images go through the same door, so that a detector sees the attack and not the preprocessing.

    >>> resize_to(torch.rand(2, 3, 20, 30), size=16).shape
    torch.Size([2, 3, 16, 16])
    """
    x, size = checks.images(images), checks.at_least(size, "size", 1)
    height, width = x.shape[-2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        shape = (max(size, round(height * scale)), max(size, round(width * scale)))
        x = F.interpolate(x, shape, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    return x[..., top : top + size, left : left + size]


def crop_boxes(
    draws: Tensor, scale: tuple[float, float], ratio: tuple[float, float], size: int, across: int | None = None
) -> Tensor:
    """torchvision's RandomResizedCrop.get_params on an image `size` high and `across` wide (None: a square), vectorised.

    draws: (..., 2 * 10 + 2) uniform numbers -> boxes (..., 4) int64: top, left, height, width.
    Area fraction uniform in `scale`, aspect log-uniform in `ratio`, the first of ten draws that fits, else the centre: as
    much of the image as `ratio` allows.

    >>> crop_boxes(torch.full((22,), 0.5), scale=(0.25, 0.25), ratio=(1 / 2, 2.0), size=8)
    tensor([2, 2, 4, 4])
    """
    across = size if across is None else across
    area = size * across * (scale[0] + (scale[1] - scale[0]) * draws[..., :_TRIES])
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[..., _TRIES : 2 * _TRIES])
    width, height = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (width > 0) & (width <= across) & (height > 0) & (height <= size)
    first = fits.int().argmax(dim=-1, keepdim=True)
    centre = ~fits.any(dim=-1)
    width = width.gather(-1, first).squeeze(-1).masked_fill(centre, min(across, round(size * ratio[1])))
    height = height.gather(-1, first).squeeze(-1).masked_fill(centre, min(size, round(across / ratio[0])))
    top = torch.where(centre, (size - height) // 2, (draws[..., -2] * (size - height + 1)).long())
    left = torch.where(centre, (across - width) // 2, (draws[..., -1] * (across - width + 1)).long())
    return torch.stack([top, left, height, width], dim=-1)


def crop_matrices(start: Tensor, length: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Bilinear resampling of the interval [start, start + length) of a line of `size` pixels to `size` pixels.

    start, length: (...,) int64; flip: (...,) bool reverses the result -> matrices (..., size, size), output rows, input columns.

    >>> crop_matrices(torch.tensor(1), torch.tensor(2), size=4) @ torch.tensor([0.0, 1.0, 2.0, 3.0])
    tensor([1.0000, 1.2500, 1.7500, 2.0000])
    """
    output = torch.arange(size, device=start.device, dtype=torch.float32).expand(*start.shape, size)
    if flip is not None:
        output = torch.where(flip[..., None], size - 1 - output, output)
    last = (length - 1).float()[..., None]
    source = ((output + 0.5) * (length.float()[..., None] / size) - 0.5).clamp(min=0).minimum(last)
    source = source + start.float()[..., None]
    pixel = torch.arange(size, device=start.device, dtype=torch.float32)
    return (1 - (source[..., None] - pixel).abs()).clamp_(min=0)  # the tent of bilinear interpolation


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns.T, for each image and each of its views.

    images: (N, 3, S, S); rows, columns: (N, V, S, S) -> (N, V, 3, S, S).

    >>> image = torch.arange(4.0).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    >>> same, swapped = torch.eye(2).expand(1, 1, 2, 2), torch.eye(2).flip(0).expand(1, 1, 2, 2)
    >>> resample(image, rows=same, columns=swapped)[0, 0, 0]
    tensor([[1., 0.],
            [3., 2.]])
    """
    n, channels, size, _ = images.shape
    n_views = rows.shape[1]
    lines = images.transpose(1, 2).reshape(n, size, channels * size)
    out = (rows.reshape(n, n_views * size, size) @ lines).view(n, n_views, size * channels, size)
    out = (out @ columns.transpose(-1, -2)).view(n, n_views, size, channels, size)
    return out.transpose(2, 3)


@dataclass(frozen=True)
class EvalViews:
    """T_eval (Section 5.1): random resized crop of a fixed area fraction, horizontal flip with probability 0.5, nothing else.

    >>> EvalViews(image_size=8)(torch.rand(2, 3, 8, 8), n_views=5).shape
    torch.Size([2, 5, 3, 8, 8])
    """

    image_size: int
    crop_scale: float = 0.75  # area fraction of a crop
    flip: bool = True
    seed: int = 0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        checks.at_least(self.image_size, "image_size", 2)
        checks.seed(self.seed)
        if not 0 < checks.not_negative(self.crop_scale, "crop_scale") <= 1:
            raise ValueError(f"crop_scale: found {self.crop_scale}, expected an area fraction in (0, 1]")
        if self.crop_scale * self.image_size**2 < 1:  # no box would fit, and the whole image be taken
            raise ValueError(
                f"crop_scale: found {self.crop_scale}, less than a pixel of {self.image_size} x {self.image_size}, expected more"
            )

    def __call__(self, images: Tensor, n_views: int, first_view: int = 0, keys: Tensor | None = None) -> Tensor:
        """Images (N, 3, S, S) float in [0, 1] -> views (N, n_views, 3, S, S), numbered first_view, first_view + 1, ..."""
        expected = (3, self.image_size, self.image_size)
        if images.dtype != torch.float32 or images.shape[1:] != expected:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images: found {found}, expected torch.float32 (N, {str(expected)[1:]}; see resize_to")
        keys = rng.image_keys(images) if keys is None else keys.to(images.device)
        streams = torch.arange(first_view, first_view + n_views, device=images.device)
        draws = rng.uniform(self.seed, keys, streams, 2 * _TRIES + 3)
        boxes = crop_boxes(draws[..., 1:], (self.crop_scale, self.crop_scale), self.ratio, self.image_size)
        flip = draws[..., 0] < 0.5 if self.flip else None
        rows = crop_matrices(boxes[..., 0], boxes[..., 2], self.image_size)
        columns = crop_matrices(boxes[..., 1], boxes[..., 3], self.image_size, flip)
        return resample(images, rows, columns)

    def settings(self) -> dict[str, Any]:
        """All that determines a view besides the image: part of a cache's key and of a saved detector."""
        return asdict(self)


def grey(images: Tensor) -> Tensor:
    """Luma of images (..., 3, H, W) -> (..., 1, H, W).

    >>> grey(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)).flatten()
    tensor([0.2990])
    """
    red, green, blue = images.unbind(-3)
    return (_GREY[0] * red).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2]).unsqueeze(-3)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of images (N, 3, H, W) by shift (N,) in turns, in HSV as torchvision does.

    >>> red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    >>> shift_hue(red, torch.tensor([1 / 3])).flatten().round(decimals=4).abs()  # green
    tensor([0., 1., 0.])
    """
    red, green, blue = images.unbind(1)
    value, lowest = images.amax(dim=1), images.amin(dim=1)
    chroma = value - lowest
    divisor = chroma.masked_fill(chroma == 0, 1)
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    # f(n) = value - chroma * max(0, min(k, 4 - k, 1)) with k = (n + hue) mod 6 and n = 5, 3, 1: HSV back to RGB in closed form.
    n = torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)
    k = (n + (sector + 6 * shift[:, None, None])[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def colour_jitter(images: Tensor, order: Tensor, factors: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Brightness, contrast, saturation and hue, each image in its own order.

    images (N, 3, H, W); order (N, 4): a permutation of 0..3; factors (N, 4): three multipliers and a hue shift in turns;
    chosen (N,) bool: the others stay as they are (None: all are chosen).

    >>> image, order = torch.tensor([0.4, 0.2, 0.0]).view(1, 3, 1, 1), torch.tensor([[0, 1, 2, 3]])
    >>> colour_jitter(image, order, torch.tensor([[2.0, 1.0, 1.0, 0.0]])).flatten().round(decimals=4).abs()  # twice as bright
    tensor([0.8000, 0.4000, 0.0000])
    """
    # Sorted by the place of its hue in their order, the images that do a step before their hue lie side by side, and so do those
    # that do it after: the hue is turned once, for all, and a GPU is waited for once, to hear how many there are of each.
    place = (order == _HUE).int().argmax(dim=1)
    place, by = (place if chosen is None else place.masked_fill(~chosen, -1)).sort()
    first = torch.searchsorted(place, torch.arange(4, device=place.device)).tolist()  # how many have it before place 0, 1, 2, 3
    out, order, factors = images[by], order[by], factors[by]
    for step in (0, 1, 2):
        _blend(out[first[step + 1] :], order[first[step + 1] :, step], factors[first[step + 1] :])
    out[first[0] :] = shift_hue(out[first[0] :], factors[first[0] :, _HUE])
    for step in (1, 2, 3):
        _blend(out[first[0] : first[step]], order[first[0] : first[step], step], factors[first[0] : first[step]])
    return torch.empty_like(out).index_copy_(0, by, out)


def _blend(images: Tensor, which: Tensor, factors: Tensor) -> None:
    """Brightness, contrast or saturation (`which` is 0, 1 or 2), in place: a blend with black, the mean luma or the luma."""
    factor, which = factors.gather(1, which[:, None]).view(-1, 1, 1, 1), which.view(-1, 1, 1, 1)
    luma = grey(images)
    target = torch.where(which == 1, luma.mean(dim=(2, 3), keepdim=True), luma).masked_fill_(which == 0, 0)
    images.copy_(torch.lerp(target.expand_as(images), images, factor).clamp_(0, 1))


def blur_matrices(sigma: Tensor, radius: int, size: int) -> Tensor:
    """Gaussian blur of a line of `size` pixels, borders reflected, sigma (...,); 0 leaves it as it is -> (..., size, size).

    >>> blur_matrices(torch.tensor([0.0, 1.0]), radius=1, size=3)[:, 1]  # the middle pixel's weights, without and with blur
    tensor([[0.0000, 1.0000, 0.0000],
            [0.2741, 0.4519, 0.2741]])
    """
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[..., None]) ** 2)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    source = (torch.arange(size, device=sigma.device)[:, None] + offset).abs()
    source = torch.where(source > size - 1, 2 * (size - 1) - source, source)
    matrix = torch.zeros(*sigma.shape, size, size, device=sigma.device)
    return matrix.scatter_add_(-1, source.expand(*sigma.shape, size, -1), weights[..., None, :].expand(*sigma.shape, size, -1))


@dataclass(frozen=True)
class TrainViews:
    """T_train (Section 3, settings of SimCLRv2): crop, flip, colour jitter, greyscale, blur. Probability 0 leaves a step out.

    Call with images (N, 3, S, S) float in [0, 1], their keys (N,) and the number of the view (epoch and view together), or
    several numbers: (V N, 3, S, S), the first view of all images before the second. One call of two views asks a GPU half as
    often as two calls, and it is the asking that takes the time.

    >>> make, images, keys = TrainViews(image_size=8), torch.rand(2, 3, 8, 8), torch.tensor([10, 11])
    >>> first, again, second = make(images, keys, view=0), make(images, keys, view=0), make(images, keys, view=1)
    >>> first.shape, torch.equal(first, again), torch.equal(first, second)
    (torch.Size([2, 3, 8, 8]), True, False)
    >>> torch.allclose(make(images, keys, view=[0, 1]), torch.cat([first, second]))
    True
    """

    image_size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    jitter: float = 0.8
    jitter_strength: float = 1.0
    greyscale: float = 0.2
    blur: float = 0.5
    seed: int = 0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, images: Tensor, keys: Tensor, view: int | Sequence[int]) -> Tensor:
        size, draws = self.image_size, self._draws(keys.to(images.device), _numbers(view))
        boxes = self._boxes(draws, size, size)
        rows = crop_matrices(boxes[..., 0], boxes[..., 2], size)
        columns = crop_matrices(boxes[..., 1], boxes[..., 3], size, draws[..., 0] < self.flip)
        return self._recoloured(_in_turn(resample(images, rows, columns)), _in_turn(draws))

    def boxes(self, keys: Tensor, views: Sequence[int], height: int, width: int) -> Tensor:
        """The crops of these views, for those who cut them: keys (N,) -> (N, V, 4) int64 top, left, height, width.

        >>> TrainViews(8).boxes(torch.arange(3), [0, 1], height=375, width=500).shape
        torch.Size([3, 2, 4])
        """
        return self._boxes(self._draws(keys, views), height, width)

    def after_crop(self, crops: Tensor, keys: Tensor, view: int | Sequence[int]) -> Tensor:
        """What views are besides their crops, which were cut by `boxes` and resized to S x S.

        crops: (N, V, 3, S, S) float in [0, 1], one for each number of `view`; without V for a single number -> (V N, 3, S, S).
        """
        draws = _in_turn(self._draws(keys.to(crops.device), _numbers(view)))
        crops = crops if crops.ndim == 4 else _in_turn(crops)
        return self._recoloured(torch.where((draws[:, 0] < self.flip).view(-1, 1, 1, 1), crops.flip(-1), crops), draws)

    def _draws(self, keys: Tensor, views: Sequence[int]) -> Tensor:
        return rng.uniform(self.seed, keys, torch.tensor(views, device=keys.device), 2 * _TRIES + 15)

    def _boxes(self, draws: Tensor, height: int, width: int) -> Tensor:
        return crop_boxes(draws[..., 13 : 13 + 2 * _TRIES + 2], self.crop_scale, self.ratio, height, width)

    def _recoloured(self, out: Tensor, draws: Tensor) -> Tensor:
        """Colour jitter, greyscale and blur; writes into `out` (N, 3, S, S)."""
        n, size = len(out), self.image_size
        if self.jitter > 0:
            strength = 0.8 * self.jitter_strength
            low, high = max(0.0, 1 - strength), 1 + strength
            hue = (2 * draws[:, 5:6] - 1) * (0.2 * self.jitter_strength)
            factors = torch.cat([low + (high - low) * draws[:, 2:5], hue], dim=1)
            out = colour_jitter(out, draws[:, 6:10].argsort(dim=1), factors, draws[:, 1] < self.jitter)
        if self.greyscale > 0:
            out = torch.where((draws[:, 10] < self.greyscale).view(n, 1, 1, 1), grey(out), out)
        if self.blur > 0:
            sigma = torch.where(draws[:, 11] < self.blur, 0.1 + 1.9 * draws[:, 12], 0.0)
            matrix = blur_matrices(sigma, max(1, size // 20), size)[:, None]
            out = resample(out, matrix, matrix)[:, 0]
        return out.clamp_(0, 1)


def _numbers(view: int | Sequence[int]) -> Sequence[int]:
    return [view] if isinstance(view, int) else view


def _in_turn(values: Tensor) -> Tensor:
    """(N, V, ...) -> (V N, ...): the first of all, then the second."""
    return values.transpose(0, 1).flatten(0, 1)
