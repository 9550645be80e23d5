"""Checkpoints of self-supervised libraries as encoders, told apart by the names of their weights.

VISSL, MoCo, lightly, solo-learn and DINO all train torchvision's ResNet and wrap it, each in prefixes of its own. What stands
under the prefix is the encoder; heads, queues, momentum copies and optimizers are left where they are. Files are read with
`weights_only=True`: nothing is executed.

Two things that weights do not show follow the library. Pixels: all five normalise by ImageNet's mean and deviation, but for
solo-learn on CIFAR, which takes CIFAR-10's. The first layer for small images: solo-learn pads it by two pixels, the others by
one, and lightly's own network loses the ReLU behind it where it is cut into an nn.Sequential, as lightly's examples do.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadetlib.encoders import DEPTHS, IMAGENET_MEAN, IMAGENET_STD, ResNet, block_of

SUFFIXES = (".pth", ".pt", ".ckpt", ".tar", ".torch", ".th")
CONTAINERS = ("classy_state_dict.base_model.model.trunk.", "state_dict.", "model_state_dict.", "model.", "")
PREFIXES = (  # in this order: of a student and a teacher, or a query and a key encoder, the one that their authors evaluate
    ("VISSL", "_feature_blocks."),
    ("MoCo v1, v2", "module.encoder_q."),
    ("MoCo v3", "module.base_encoder."),
    ("DINO", "teacher.module.backbone."),
    ("DINO", "teacher.backbone."),
    ("DINO", "student.module.backbone."),
    ("lightly", "backbone."),
    ("solo-learn", "encoder."),
    ("torchvision in DataParallel", "module."),
    ("torchvision, DINO", ""),
)
_LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
_OF_SOLO_LEARN = ("classifier.", "projector.")  # what it keeps beside its backbone, as it trains
_SMALL = {"solo-learn": "cifar-padded", "lightly's own, cut": "cifar-linear"}  # stems for small images that differ
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # solo-learn's for CIFAR-10
_HEAD = re.compile(r"(fc|linear|head|classifier|projector|projection_head)\.")  # beside the encoder under its own prefix


def load(
    path: str | Path,
    image_size: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    stem: str = "",
) -> ResNet:
    """The encoder of a foreign checkpoint, in eval mode; architecture and width are read off its weights.

    image_size 0: 224 with ImageNet's stem, 32 with CIFAR's. mean and std, of the pixels it was trained on, and stem, a key of
    encoders.STEMS: by default those of the library. An encoder that was trained with others (solo-learn's on CIFAR-100, to name
    one) is loaded with them and saved by `encoders.save_encoder`. FileNotFoundError without a file; ValueError when nothing in
    it looks like a ResNet, or when weights are missing, left over or of another shape, which it names.

    >>> from tempfile import TemporaryDirectory
    >>> weights = ResNet("resnet10", width=4, stem="cifar").state_dict()
    >>> with TemporaryDirectory() as folder:  # as lightly saves it
    ...     torch.save({"state_dict": {f"backbone.{name}": value for name, value in weights.items()}}, f"{folder}/simclr.ckpt")
    ...     load(f"{folder}/simclr.ckpt").config["arch"]
    'resnet10'
    """
    path = Path(path)
    tensors = flattened(_read(path))
    library, weights = encoder_weights(tensors, path.name)
    arch, width, seen = architecture(weights, path.name)
    stem = stem or (_SMALL.get(library, seen) if seen == "cifar" else seen)
    usual = (CIFAR_MEAN, CIFAR_STD) if stem == "cifar-padded" else (IMAGENET_MEAN, IMAGENET_STD)
    encoder = ResNet(arch, width, stem, image_size or (224 if stem == "imagenet" else 32), mean or usual[0], std or usual[1])
    _fit(encoder, weights, f"{path.name}, named as {library} does")
    return encoder.eval()


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"found no file {path.name} in {path.parent}; expected a checkpoint with a ResNet's weights")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO and MoCo keep their command line
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, LookupError) as error:
        raise ValueError(
            f"{path.name}: found no file of weights alone ({error}), expected tensors and plain values; with the library that "
            "wrote it, save its model's state_dict() by torch.save and load that"
        ) from error


def flattened(content: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors in nested dictionaries, under their keys joined by points.

    >>> list(flattened({"state_dict": {"conv1.weight": torch.ones(1)}, "epoch": 3}))
    ['state_dict.conv1.weight']
    """
    if isinstance(content, Tensor):
        return {name: content}
    items = content.items() if isinstance(content, Mapping) else ()
    return {k: v for key, item in items for k, v in flattened(item, f"{name}.{key}" if name else str(key)).items()}


def encoder_weights(tensors: Mapping[str, Tensor], name: str = "checkpoint") -> tuple[str, dict[str, Tensor]]:
    """The library whose names these are, and the encoder's weights under torchvision's names.

    >>> weights = {"conv1.weight": torch.rand(4, 3, 3, 3), "layer1.0.conv1.weight": torch.rand(4, 4, 3, 3)}
    >>> library, found = encoder_weights({f"module.encoder_q.{name}": value for name, value in weights.items()})
    >>> library, list(found)
    ('MoCo v1, v2', ['conv1.weight', 'layer1.0.conv1.weight'])
    """
    for container in CONTAINERS:
        for library, prefix in PREFIXES:
            start = container + prefix
            own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            own = _named(own)
            if "conv1.weight" in own and "layer1.0.conv1.weight" in own:
                beside = tuple(container + name for name in _OF_SOLO_LEARN)
                if prefix == "backbone." and any(k.startswith(beside) for k in tensors):
                    library = "solo-learn"
                if f"{start}2.0.conv1.weight" in tensors:  # no layer between the first norm and the first stage
                    library = "lightly's own, cut"
                return library, {k: v for k, v in own.items() if not _HEAD.match(k)}
    expected = ", ".join(f"{library} ({prefix or 'no prefix'})" for library, prefix in PREFIXES)
    raise ValueError(
        f"{name}: found no ResNet among {len(tensors)} tensors, the first of which are {list(tensors)[:5]}; "
        f"expected names as those of {expected}"
    )


def _named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names for lightly's: layers by their number in an nn.Sequential, a shortcut that is called so."""
    if "0.weight" in weights and "1.running_mean" in weights:
        parted = {k: k.partition(".") for k in weights}
        numbers = sorted({first for first, _, _ in parted.values() if first.isdigit()}, key=int)
        layers = dict(zip(numbers, _LAYERS, strict=False))
        weights = {f"{layers.get(first, first)}.{rest}": weights[k] for k, (first, _, rest) in parted.items()}
    return {k.replace(".shortcut.", ".downsample."): v for k, v in weights.items()}


def architecture(weights: Mapping[str, Tensor], name: str = "checkpoint") -> tuple[str, int, str]:
    """Which of encoders.DEPTHS these weights belong to, the width of its first stage, and its stem.

    >>> architecture(ResNet("resnet18", width=8, stem="cifar").state_dict())
    ('resnet18', 8, 'cifar')
    """
    depths = tuple(len({k.split(".")[1] for k in weights if k.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
    expansion = 4 if "layer1.0.conv3.weight" in weights else 1
    known = {(block_of(arch).expansion, counts): arch for arch, (_, counts) in DEPTHS.items()}
    if (expansion, depths) not in known:
        raise ValueError(f"{name}: found a ResNet of {depths} blocks a stage, expected one of {list(DEPTHS)}")
    first = weights["conv1.weight"]
    return known[expansion, depths], first.shape[0], "cifar" if first.shape[-1] == 3 else "imagenet"


def _fit(encoder: ResNet, weights: Mapping[str, Tensor], name: str) -> None:
    """Load the weights; ValueError names those that are missing, left over or of another shape."""
    own = encoder.state_dict()
    counters = {k for k in own if k.endswith("num_batches_tracked")}  # old checkpoints have none, and nothing reads them here
    shapes = {k: f"{k} {tuple(weights[k].shape)} for {tuple(own[k].shape)}" for k in own if k in weights}
    problems = {
        "missing": sorted(own.keys() - weights.keys() - counters),
        "left over": sorted(weights.keys() - own.keys()),
        "of another shape": [text for k, text in shapes.items() if weights[k].shape != own[k].shape],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:8])}" for kind, keys in problems.items() if keys)
        config = {k: encoder.config[k] for k in ("arch", "width", "stem")}
        raise ValueError(f"{name}: found weights that do not fit the ResNet {config}: {found}; expected each exactly once")
    encoder.load_state_dict(dict(weights), strict=False)
