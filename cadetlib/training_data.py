"""What a training run learns from: its images, and the views of each step, in an order that any number of processes share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed

from cadetlib import checks, data, embed, imagenet, losses, stream
from cadetlib.training_settings import Settings, in_channels_last, is_streamed, n_views, settings_from, train_views
from cadetlib.views import TrainViews


def prepared(name: str, settings: Settings) -> data.ImageSet:
    """A set of the run's classes, counted from 0; files are not read yet.

    >>> prepared("digits", Settings(classes=[7, 8])).labels.unique()
    tensor([0, 1])
    """
    images = data.load(name, allow_unreadable=settings.allow_unreadable).of_classes(settings.classes)
    if settings.classes and images.labels is not None:
        position = {label: i for i, label in enumerate(settings.classes)}
        images = replace(images, labels=torch.tensor([position[int(label)] for label in images.labels]))
    return images


def training_images(settings: Settings) -> data.ImageSet:
    """The run's images, with labels counted from 0 in the order of `classes`; brought to its size unless they are streamed.

    >>> training_images(Settings(data="digits-train", image_size=16, batch_size=64)).images.shape
    torch.Size([797, 3, 16, 16])
    """
    images = prepared(settings.data, settings)
    if not is_streamed(settings):
        images = images.resized(settings.image_size)
    elif not isinstance(images, data.FolderSet):
        raise ValueError(f"stream: found {images.name}, which is no set of image files, expected one of {list(imagenet.SETS)}")
    if images.labels is None and settings.objective == "supervised":
        raise ValueError(f"data: found no labels in {images.name}, expected some for the supervised objective")
    return at_least_a_batch(images, settings)


def at_least_a_batch(images: data.ImageSet, settings: Settings, of: str = "images") -> data.ImageSet:
    """The images; ValueError where they are fewer than a batch.

    >>> at_least_a_batch(data.load("digits")[:100], Settings(batch_size=64)).name
    'digits'
    """
    if len(images) < settings.batch_size:
        raise ValueError(f"batch_size: found {settings.batch_size} with {len(images)} {of}, expected at most one batch an epoch")
    return images


def labelled_images(given: Mapping[str, Any], name: str) -> data.ImageSet:
    """Another set prepared as the training images of these parameters are: same classes, size and count of labels.

    >>> labelled_images(dict(classes=[7, 8], image_size=16), "digits").labels.unique()
    tensor([0, 1])
    """
    return training_images(replace(settings_from(given), data=name, batch_size=1))


def training_views(views: TrainViews, x: Tensor, keys: Tensor, epoch: int, settings: Settings) -> Tensor:
    """The views of one batch (V b, 3, S, S), the first of all images, then the second. x: (b, 3, S, S) float, keys: (b,) numbers.

    Of a streamed set, x are the views' crops (b, V, 3, S, S).

    >>> training_views(TrainViews(8), torch.rand(4, 3, 8, 8), torch.arange(4), epoch=0, settings=Settings()).shape
    torch.Size([8, 3, 8, 8])
    """
    numbers = stream.view_numbers(epoch, n_views(settings))
    batch = views.after_crop(x, keys, numbers) if x.ndim == 5 else views(x, keys, numbers)
    return batch.contiguous(memory_format=torch.channels_last) if in_channels_last(settings, batch.device) else batch


def steps_at_once(settings: Settings, device: torch.device) -> int:
    """For how many steps the views are made together: for one; on a GPU for several, where they are small.

    A call of TrainViews asks for some 300 operations, however few its views are: those of a step leave a GPU with little to do.

    >>> [steps_at_once(Settings(image_size=side, batch_size=512), torch.device("cuda")) for side in (32, 96, 224)]
    [8, 1, 1]
    >>> steps_at_once(Settings(image_size=32), torch.device("cpu"))
    1
    """
    pixels = n_views(settings) * (settings.batch_size // losses.n_processes()) * settings.image_size**2
    return max(1, embed.GPU_PIXELS // pixels) if device.type == "cuda" else 1


def batches(
    images: data.ImageSet, settings: Settings, device: torch.device, first: int, last: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What each step first .. last - 1 learns from on this process: views (V b, 3, S, S) and labels (b,).

    >>> tiny = Settings(image_size=8, batch_size=4)
    >>> [views.shape for views, _ in batches(data.load("digits").resized(8), tiny, torch.device("cpu"), first=0, last=2)]
    [torch.Size([8, 3, 8, 8]), torch.Size([8, 3, 8, 8])]
    """
    views, at_once, per_epoch = train_views(settings), steps_at_once(settings, device), len(images) // settings.batch_size
    shares = _shares(images, views, settings, device, first, last)
    while first < last:
        epoch, position = divmod(first, per_epoch)
        n_steps = min(at_once, per_epoch - position, last - first)  # all of one epoch, whose number its views have
        x, y, keys = zip(*itertools.islice(shares, n_steps), strict=True)
        made = _of_each_step(training_views(views, torch.cat(x), torch.cat(keys), epoch, settings), n_steps, settings)
        for labels in y:
            yield made.pop(0), labels  # which then nobody but the step holds
        first += n_steps


def _of_each_step(made: Tensor, n_steps: int, settings: Settings) -> list[Tensor]:
    """The views of several steps (V n b, 3, S, S), the first of all images before the second -> (V b, 3, S, S) of each."""
    if n_steps == 1:
        return [made]
    parts = made.chunk(n_views(settings) * n_steps)
    return [torch.cat(parts[i::n_steps]) for i in range(n_steps)]


def _shares(
    images: data.ImageSet, views: TrainViews, settings: Settings, device: torch.device, first: int, last: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each step its images or their crops, labels, image numbers, on the device."""
    if isinstance(images, data.FolderSet):
        crops = stream.Crops(images, views, n_views(settings))
        yield from stream.batches(crops, settings.batch_size, settings.seed, first, last, device, settings.workers)
        return
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if losses.is_distributed() else (0, 1)
    pixels = images.images.to(device)
    labels = (images.labels if images.labels is not None else torch.zeros(len(images))).to(device)
    for _, index in stream.shares(len(images), settings.batch_size, settings.seed, first, last, rank, world):
        index = index.to(device, non_blocking=True)
        yield checks.images(pixels[index]), labels[index], index
