"""The contrastive loss (Eq. 1) over the embeddings of every process.

Knows nothing of models or training. The gather carries gradients: without them each process would treat the others'
embeddings as constants, and the gradient would be wrong by a third and more, silently.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from cadetlib import checks


class _Gather(torch.autograd.Function):
    """All processes' rows, in rank order; backward sums what every process says of this one's rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()  # it may be the caller's own
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def is_distributed() -> bool:
    """Whether a process group of several processes is at work.

    >>> is_distributed()  # True under torchrun with two processes or more, once their group is made
    False
    """
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def n_processes() -> int:
    """How many processes learn together.

    >>> n_processes()
    1
    """
    return distributed.get_world_size() if is_distributed() else 1


def gather(z: Tensor) -> Tensor:
    """(n, D) of this process -> (world size * n, D) of all, differentiable; every process must bring the same n.

    >>> gather(torch.rand(4, 8)).shape  # two processes would have (8, 8)
    torch.Size([4, 8])
    """
    return _Gather.apply(z) if is_distributed() else z


def info_nce(
    z0: Tensor, z1: Tensor, tau: float = 0.1, symmetric: bool = False, reduction: str = "sum", check: bool = True
) -> Tensor:
    """Eq. 1: each anchor z0_i against its positive z1_i, all other z1_j and all other z0_j -> scalar.

    z0, z1: (n, D), two views of the same n images, any scale. As printed the loss is one-sided and a sum over i;
    `symmetric` adds the anchors z1 (SimCLR), `reduction="mean"` divides by the number of anchors.
    In a process group, negatives come from all processes and the value is this process's share: summed over the processes
    ("sum") or averaged ("mean") it is the loss of the whole batch. `check=False` leaves out the look at the values, which
    makes the host wait for the device.

    >>> z = torch.eye(2)
    >>> round(float(info_nce(z, z, tau=1.0)), 4)  # two anchors, each log(1 + 2 / e): one positive, two negatives at cosine 0
    1.1029
    """
    if check:
        for name, z in (("z0", z0), ("z1", z1)):
            if not (isinstance(z, Tensor) and z.is_floating_point() and z.dtype == z0.dtype):
                found = z.dtype if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"{name}: found {found}, expected a tensor of floating point, z0 and z1 of one dtype")
            checks.embeddings(z.detach(), name)
    if z0.shape != z1.shape:
        raise ValueError(f"found z0 {tuple(z0.shape)} and z1 {tuple(z1.shape)}, expected equal shapes: row i is image i in both")
    checks.in_open_interval(tau, "tau", high=math.inf)
    checks.one_of(reduction, "reduction", ("sum", "mean"))
    z0, z1 = checks.unit(z0), checks.unit(z1)
    all0, all1 = gather(z0), gather(z1)
    first = distributed.get_rank() * len(z0) if is_distributed() else 0
    own = torch.arange(first, first + len(z0), device=z0.device)
    loss = _anchored(z0, all1, all0, own, tau)
    if symmetric:
        loss = loss + _anchored(z1, all0, all1, own, tau)
    return loss if reduction == "sum" else loss / (len(z0) * (1 + symmetric))


def _anchored(anchors: Tensor, others: Tensor, same: Tensor, own: Tensor, tau: float) -> Tensor:
    """Sum over anchors of -log softmax at the positive: others[own], against all others and same without itself."""
    positives = anchors @ others.T / tau
    negatives = (anchors @ same.T / tau).scatter(1, own[:, None], float("-inf"))
    return F.cross_entropy(torch.cat([positives, negatives], dim=1), own, reduction="sum")
