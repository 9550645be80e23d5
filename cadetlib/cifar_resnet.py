"""The CIFAR-10 ResNets of He et al. 2016 and public weights of them: victims for the attacks that nobody here trained.

Three stages of 16, 32 and 64 channels with n basic blocks each; where a stage halves the image, the shortcut takes every second
pixel and fills the new channels with zeros (option A). The weights are Y. Idelbayev's (BSD 2-clause), of
github.com/akamaster/pytorch_resnet_cifar10: 91.7 % and 93.4 % of the test images right. They are looked for under
weights/pytorch_resnet_cifar10/ in the data root.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadetlib import data
from cadetlib.encoders import Classifier, Normalize

_FOLDER = "weights/pytorch_resnet_cifar10"
WEIGHTS = {  # name -> blocks a stage, file, sha256 of the file
    "resnet20": (3, "resnet20-12fca82f.th", "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8"),
    "resnet56": (9, "resnet56-4bfd9763.th", "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367"),
}


class _Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut without parameters."""

    def __init__(self, channels: int, planes: int) -> None:
        super().__init__()
        self.stride, self.new = planes // channels, planes - channels
        self.conv1 = nn.Conv2d(channels, planes, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.new // 2, self.new // 2))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """[0, 1] images (N, 3, 32, 32) -> pooled features (N, 64), with `depth` = 6 n + 2 layers.

    >>> encoder = CifarResNet(n_blocks=3)
    >>> encoder(torch.rand(2, 3, 32, 32)).shape, encoder.config["name"]
    (torch.Size([2, 64]), 'cifar-resnet20')
    """

    def __init__(self, n_blocks: int) -> None:
        super().__init__()
        self.config = dict(name=f"cifar-resnet{6 * n_blocks + 2}", image_size=32)
        self.image_size, self.dim = 32, 64
        self.normalize = Normalize()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16) for _ in range(n_blocks)))
        self.layer2 = nn.Sequential(_Block(16, 32), *(_Block(32, 32) for _ in range(n_blocks - 1)))
        self.layer3 = nn.Sequential(_Block(32, 64), *(_Block(64, 64) for _ in range(n_blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalize(images))))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))


def load(name: str) -> Classifier:
    """The public classifier "resnet20" or "resnet56" of CIFAR-10, in eval mode, on the CPU.

    FileNotFoundError says where its file was looked for and how to get it, ValueError when the file is not the published one.

    >>> load("resnet18")
    Traceback (most recent call last):
    ValueError: cifar: found no public weights of 'resnet18', expected one of ['resnet20', 'resnet56']
    """
    if name not in WEIGHTS:
        raise ValueError(f"cifar: found no public weights of {name!r}, expected one of {list(WEIGHTS)}")
    n_blocks, file, sha256 = WEIGHTS[name]
    path = data.root() / _FOLDER / file
    state = torch.load(_verified(path, sha256), map_location="cpu", weights_only=True)["state_dict"]
    state = {key.removeprefix("module."): value for key, value in state.items()}
    head = nn.Linear(64, 10)
    head.load_state_dict({key: state.pop(f"linear.{key}") for key in ("weight", "bias")})
    encoder = CifarResNet(n_blocks)
    encoder.load_state_dict(state)
    return Classifier(encoder, head).eval()


def _verified(path: Path, sha256: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"found no {path} (data root {data.root()}; CADET_DATA names another); to get it, take "
            f"pretrained_models/{path.name} of github.com/akamaster/pytorch_resnet_cifar10 and put it into {_FOLDER}/"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: found sha256 {found[:16]}…, expected {sha256[:16]}…; take the published file again")
    return path
