"""On a GPU: the next batch is made while the passes of the last one run, and the result of the one before is read.

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


class Sent:
    """A tensor on its way from a device to the processor, which waits for it when it reads it and not before.

    >>> Sent(torch.tensor([1.0, 2.0])).read()
    tensor([1., 2.])
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._arrived = value, None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(value.device))

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        if self._arrived is None:
            return self._value.cpu()
        self._arrived.synchronize()
        return self._value.clone()  # no longer in pinned memory, of which there is little


def results(
    launch: Callable[..., tuple[Tensor, ...]], batches: Iterator[Batch], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """launch(*batch) for each batch that has a result, in order, on the CPU. `launch` may not wait for the device.

    On a GPU a result is read when the passes of the next batch are asked for: it never waits to be asked.

    >>> batches = [(torch.tensor(1), torch.tensor(2)), (torch.tensor(3), torch.tensor(4))]
    >>> list(results(lambda a, b: (a + b, a * b), iter(batches), torch.device("cpu")))
    [(tensor(3), tensor(2)), (tensor(7), tensor(12))]
    """
    made, before = made_ahead(batches, device), list[Sent]()
    batch = next(made, None)
    while batch is not None:
        result, batch = [Sent(value) for value in launch(*batch)], None
        if device.type == "cuda":
            result, before = before, result
            batch = next(made, None)
        if result:
            yield tuple(value.read() for value in result)
        if device.type != "cuda":  # not before the result is used: a CPU would only hold two batches
            batch = next(made, None)
    if before:
        yield tuple(value.read() for value in before)
