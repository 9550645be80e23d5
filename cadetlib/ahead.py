"""On a GPU: the next batch is made while the passes of the last one run.

Making views asks the device for numbers and so waits for it. In the stream of the passes it would wait for these too, and leave
the device idle until the next ones are asked for; in a stream of its own it waits for itself alone. On a CPU nothing of this is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound=tuple[Tensor, ...])


def made_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches; on a GPU each is made in a stream of its own, from where it is asked for.

    >>> x, y = torch.rand(4, 3, 8, 8), torch.arange(2)
    >>> [len(batch) for batch, _ in made_ahead(iter([(x, y), (x[:2], y)]), torch.device("cpu"))]
    [4, 2]
    """
    if device.type != "cuda":
        yield from batches
        return
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))  # what batches are made from may still be on its way
    while True:
        with torch.cuda.stream(beside):  # not around the yield: the stream would be the consumer's too
            batch = next(batches, None)
        if batch is None:
            return
        now = torch.cuda.current_stream(device)
        now.wait_stream(beside)
        for tensor in batch:
            tensor.record_stream(now)  # or its memory would be written again while the passes still read it
        yield batch
        del batch, tensor  # before the next is made


def results(launch: Callable[..., Tensor], batches: Iterator[Batch], device: torch.device) -> Iterator[Tensor]:
    """launch(*batch) for each batch, in order. `launch` may not wait for the device; whoever looks at its results will.

    On a GPU the next batch is made between the two.

    >>> list(results(torch.add, iter([(torch.tensor(1), torch.tensor(2))]), torch.device("cpu")))
    [tensor(3)]
    """
    made = made_ahead(batches, device)
    batch = next(made, None)
    while batch is not None:
        result, batch = launch(*batch), None
        if device.type == "cuda":
            batch = next(made, None)
        yield result
        if device.type != "cuda":  # not before the result is used: a CPU would only hold two batches
            batch = next(made, None)
