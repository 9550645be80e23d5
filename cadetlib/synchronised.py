"""Batch norm over the samples of all processes, of which torch has one on GPUs only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from cadetlib import losses


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient


class _CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over all processes' samples where torch has none: on CPU. x: (n, C) or (n, C, H, W).

    Local statistics would leak the positive pair.
    """

    def forward(self, x: Tensor) -> Tensor:
        running_mean, running_var, momentum = self.running_mean, self.running_var, self.momentum
        assert running_mean is not None and running_var is not None and momentum is not None  # torch's defaults
        if not (self.training and losses.is_distributed()):
            return F.batch_norm(x, running_mean, running_var, self.weight, self.bias, self.training, momentum, self.eps)
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        n = x.numel() // x.shape[1] * distributed.get_world_size()
        mean = _SumOverProcesses.apply(x.float().sum(dims)) / n
        centred = x.float() - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims)) / n
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (n / (n - 1)), momentum)
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        return (normal * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norm over all processes; torch's own on CUDA.

    >>> synchronised(nn.Sequential(nn.BatchNorm2d(3)), torch.device("cpu"))[0](torch.ones(2, 3, 1, 1)).flatten().tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__ = _CpuSyncBatchNorm
    return model
