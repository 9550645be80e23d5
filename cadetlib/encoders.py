"""Encoders: modules from images (N, 3, S, S) in [0, 1] to features (N, D). Normalisation of pixels belongs to the encoder.

`ResNet` is the project's own family, with torchvision's parameter names, in any width and with an ImageNet or a CIFAR stem;
`load_encoder` brings the project's checkpoints, torchvision's or timm's networks in the same shape. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cadetlib import checks

if TYPE_CHECKING:
    from torchvision.models.resnet import BasicBlock, Bottleneck

FORMAT = "cadetlib.encoder"  # what its files say they are
_CPU_PIXELS = 2**17  # 128 images of 32 pixels, 2 or 3 of 224: 0.4 to 0.7 of the time that the views of 20 images take at once
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEPTHS: dict[str, tuple[str, tuple[int, ...]]] = {  # torchvision's block, and how many a stage has
    "resnet10": ("BasicBlock", (1, 1, 1, 1)),
    "resnet18": ("BasicBlock", (2, 2, 2, 2)),
    "resnet34": ("BasicBlock", (3, 4, 6, 3)),
    "resnet50": ("Bottleneck", (3, 4, 6, 3)),
    "resnet101": ("Bottleneck", (3, 4, 23, 3)),
}
STEMS = {  # kernel, stride and padding of the first layer, and whether its values are rectified
    "imagenet": ((7, 2, 3), True),  # then a max pooling
    "cifar": ((3, 1, 1), True),
    "cifar-padded": ((3, 1, 2), True),  # solo-learn's
    "cifar-linear": ((3, 1, 1), False),  # lightly's own network, cut into an nn.Sequential
}


def block_of(arch: str) -> type[BasicBlock] | type[Bottleneck]:
    """torchvision's residual block of an architecture in DEPTHS.

    >>> block_of("resnet50").expansion
    4
    """
    from torchvision.models import resnet  # here, since it takes seconds, for which a command without a network need not wait

    return getattr(resnet, DEPTHS[arch][0])


class Normalize(nn.Module):
    """(x - mean) / std per channel.

    >>> Normalize(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))(torch.ones(1, 3, 1, 1)).flatten()
    tensor([2., 2., 2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _stage(block: type[BasicBlock] | type[Bottleneck], depth: int, channels: int, planes: int, stride: int) -> nn.Sequential:
    """`depth` residual blocks from `channels` to planes * expansion channels; the first has the stride."""
    out = planes * block.expansion
    shortcut = None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return nn.Sequential(block(channels, planes, stride, shortcut), *(block(out, planes) for _ in range(depth - 1)))


class ResNet(nn.Module):
    """He et al.'s residual network without its classifier: [0, 1] images (N, 3, S, S) -> pooled features (N, dim).

    arch: a key of DEPTHS; width: channels of the first stage (64 in the paper); stem: a key of STEMS, "imagenet" (7x7,
    stride 2, and max pooling), "cifar" (3x3, stride 1) or as another library has it. Parameters carry torchvision's names.

    >>> ResNet("resnet18", width=8, stem="cifar", image_size=16)(torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        arch: str = "resnet50",
        width: int = 64,
        stem: str = "imagenet",
        image_size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if arch not in DEPTHS or stem not in STEMS:
            raise ValueError(f"found arch {arch!r}, stem {stem!r}; expected one of {list(DEPTHS)} and of {list(STEMS)}")
        self.config: dict[str, Any] = dict(arch=arch, width=width, stem=stem, image_size=image_size)
        self.config |= dict(mean=[float(v) for v in mean], std=[float(v) for v in std])
        self.image_size = checks.at_least(image_size, "image_size", 8)
        block, depths = block_of(arch), DEPTHS[arch][1]
        self.normalize = Normalize(mean, std)
        first, rectified = STEMS[stem]
        self.conv1 = nn.Conv2d(3, width, *first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True) if rectified else nn.Identity()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self.layer1 = _stage(block, depths[0], width, width, 1)
        self.layer2 = _stage(block, depths[1], width * block.expansion, 2 * width, 2)
        self.layer3 = _stage(block, depths[2], 2 * width * block.expansion, 4 * width, 2)
        self.layer4 = _stage(block, depths[3], 4 * width * block.expansion, 8 * width, 2)
        self.dim = 8 * width * block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalize(images)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


class ContrastiveHead(nn.Sequential):
    """SimCLRv2's head: three fully connected layers with batch norm, ReLU between them; the last has no bias and no ReLU.

    >>> ContrastiveHead(64, hidden=32, out=16)(torch.rand(5, 64)).shape
    torch.Size([5, 16])
    """

    def __init__(self, dim: int, hidden: int = 2048, out: int = 128) -> None:
        super().__init__(
            nn.Linear(dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out, bias=False),
            nn.BatchNorm1d(out),
        )
        self[-1].bias.requires_grad_(False)  # it stays 0: SimCLRv2's last layer has a scale and no shift


def _check_head(head: Any, dim: Any) -> None:
    """A linear layer; of `dim` inputs, if it is known how many features the encoder has."""
    if not isinstance(head, nn.Linear):
        raise ValueError(f"head: found {type(head).__name__}, expected torch.nn.Linear")
    if isinstance(dim, int) and head.in_features != dim:
        raise ValueError(f"head: found {head.in_features} inputs, expected {dim}, the encoder's features")


class Classifier(nn.Module):
    """An encoder and a linear head: logits = head(encoder(images)).

    >>> encoder = ResNet("resnet10", width=4, stem="cifar", image_size=8)
    >>> classifier = Classifier(encoder, nn.Linear(encoder.dim, 10))
    >>> classifier(torch.rand(2, 3, 8, 8)).shape, classifier.image_size
    (torch.Size([2, 10]), 8)
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise ValueError(f"encoder: found {type(encoder).__name__}, expected a torch.nn.Module from images to features")
        _check_head(head, getattr(encoder, "dim", None))
        self.encoder, self.head = encoder, head

    @property
    def image_size(self) -> int:
        return getattr(self.encoder, "image_size")  # noqa: B009 - a module's attribute of any type

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


class _Backbone(nn.Module):
    """A network of another library as an encoder: normalised input, features before its classifier."""

    def __init__(self, network: nn.Module, image_size: int, mean: Sequence[float], std: Sequence[float], name: str) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.network = network
        self.image_size = image_size
        self.config = dict(name=name, image_size=image_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images)).flatten(1)


def encode(encoder: nn.Module, images: Tensor, name: str = "encoder") -> Tensor:
    """encoder(images) as float32 (N, D), refused when it is of another shape or holds NaN or infinite values.

    Images are brought to the dtype of its weights.

    On a CPU an encoder in eval mode is given the images in equal pieces of about `_CPU_PIXELS`, which its caches hold.

    >>> encode(nn.Flatten(), torch.rand(2, 3, 4, 4)).shape
    torch.Size([2, 48])
    >>> encode(nn.Identity(), torch.rand(2, 3, 4, 4))
    Traceback (most recent call last):
    ValueError: encoder: returned (2, 3, 4, 4) for 2 images, expected a tensor (2, D)
    """
    return checks.finite(features_of(encoder, images, name), f"{name}'s features")


def features_of(encoder: nn.Module, images: Tensor, name: str = "encoder") -> Tensor:
    """`encode` without its look at the values, for which one waits for the device.

    >>> features_of(nn.Flatten(), torch.rand(2, 3, 4, 4)).shape
    torch.Size([2, 48])
    """
    whole = encoder.training or images.device.type != "cpu"
    n_pieces = 1 if whole else math.ceil(len(images) * math.prod(images.shape[2:]) / _CPU_PIXELS)
    parts = []
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), images.dtype)
    for some in images.to(dtype).tensor_split(min(len(images), n_pieces)):
        features = _applied(encoder, some, name)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(some):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{name}: returned {found} for {len(some)} images, expected a tensor ({len(some)}, D)")
        parts.append(features.float())
    return torch.cat(parts)


def _applied(encoder: nn.Module, images: Tensor, name: str) -> Any:
    """encoder(images); ValueError, and not torch's own error alone, when it is one for images of another size."""
    try:
        return encoder(images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        found = f"{name}: found {type(encoder).__name__}, which fails on images {tuple(images.shape)} ({error})"
        raise ValueError(f"{found}, expected a module that takes images of this size") from error


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters; CPU when it has none.

    >>> device_of(nn.Linear(2, 2))
    device(type='cpu')
    """
    return next((p.device for p in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def default_device() -> torch.device:
    """This process's GPU when there is one, else the CPU.

    >>> default_device().type in ("cuda", "cpu")
    True
    """
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def placed(module: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """The module on a device (None: the default), channels last in memory: convolutions take 0.6 to 0.75 of the time.

    ValueError for a device that is none, or not here.

    >>> placed(nn.Conv2d(3, 4, 3), "cpu").weight.is_contiguous(memory_format=torch.channels_last)
    True
    """
    try:
        return module.to(device or default_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    except (RuntimeError, AssertionError) as error:  # torch's words for each of these are its own
        raise ValueError(f"device: found {str(device)!r}, expected one that can be used here ({error})") from error


def fingerprint(module: nn.Module) -> str:
    """sha256 of a module's weights and buffers: names, shapes and values, as float32 and without where they are.

    >>> module = nn.Linear(2, 1)
    >>> before = fingerprint(module)
    >>> _ = nn.init.ones_(module.bias)
    >>> len(before), before == fingerprint(module), fingerprint(module) == fingerprint(module.double())
    (64, False, True)
    """
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    config = getattr(module, "config", {})
    try:
        return weights_digest(tensors, config)
    except TypeError:  # another library's config, which holds what JSON does not
        return weights_digest(tensors, {"config of": type(module).__name__})


def weights_digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """sha256 of tensors, byte for byte, with their names, types and shapes, and of what is said about them.

    >>> weights_digest({"weight": torch.zeros(2)}, {"width": 4}) == weights_digest({"weight": torch.zeros(1, 2)}, {"width": 4})
    False
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_encoder(encoder: ResNet, path: str | Path, half: bool = False, head: nn.Linear | None = None, **about: Any) -> Path:
    """Write an encoder's weights and configuration as safetensors, atomically; with a linear `head`, a whole classifier.

    `half` stores float16 (half the size; loaded back as float32); `about` is kept as text in the file's metadata.

    >>> from tempfile import TemporaryDirectory
    >>> encoder = ResNet("resnet10", width=4, stem="cifar", image_size=8).eval()
    >>> with TemporaryDirectory() as folder:
    ...     again = load_encoder(save_encoder(encoder, f"{folder}/encoder.safetensors", trained_on="nothing"))
    >>> fingerprint(again) == fingerprint(encoder)
    True
    """
    if not isinstance(encoder, ResNet):
        raise ValueError(f"encoder: found {type(encoder).__name__}, expected a cadetlib.encoders.ResNet")
    if taken := {"format", "sha256", "config"} & about.keys():
        raise ValueError(f"about: found {sorted(taken)}, which the file says itself, expected other names")
    tensors = encoder.state_dict()
    if head is not None:
        _check_head(head, encoder.dim)
        if head.bias is None:
            raise ValueError("head: found no bias, expected torch.nn.Linear with one (zeros will do)")
        tensors = {**tensors, **{f"classifier.{k}": v for k, v in head.state_dict().items()}}
    return write_safetensors(path, halved(tensors) if half else tensors, FORMAT, config=json.dumps(encoder.config), **about)


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as float16, half the size; ValueError when one does not fit.

    >>> halved({"weight": torch.tensor([0.5]), "steps": torch.tensor(7)})
    {'weight': tensor([0.5000], dtype=torch.float16), 'steps': tensor(7)}
    """
    return {k: checks.finite(v.half(), f"{k} as float16") if v.is_floating_point() else v for k, v in tensors.items()}


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], kind: str, **about: Any) -> Path:
    """Write tensors atomically, with their kind, their digest and, as text, what is said `about` them.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = write_safetensors(f"{folder}/mu.safetensors", {"mu": torch.ones(2)}, kind="example", seed=0)
    ...     tensors, about = read_safetensors(path, kind="example")
    >>> tensors["mu"], about["seed"]
    (tensor([1., 1.]), '0')
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"format": kind} | {k: str(v) for k, v in about.items()}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors lets nobody else read its files
        save_file(tensors, temporary, metadata | {"sha256": weights_digest(tensors, metadata)})
        temporary.chmod(mode)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: found no way to write it ({error}), expected room on a disk that can be written") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_safetensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that says it is `kind`; ValueError for a damaged or foreign file.

    >>> read_safetensors("nowhere/encoder.safetensors", kind="cadetlib.encoder")
    Traceback (most recent call last):
    FileNotFoundError: found no file encoder.safetensors in nowhere; expected a cadetlib.encoder file
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"found no file {path.name} in {path.parent}; expected a {kind} file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path.name}: found no readable safetensors file ({error}), expected a {kind} file; make it anew"
        ) from error
    if metadata.get("format") != kind:
        raise ValueError(f"{path.name}: found format {metadata.get('format')!r}, expected {kind!r}, written by this library")
    digest = metadata.pop("sha256", None)
    if digest is not None and digest != weights_digest(tensors, metadata):
        raise ValueError(f"{path.name}: found content that does not match its digest, expected an undamaged file; make it anew")
    return tensors, metadata


def _load_resnet(path: Path) -> tuple[ResNet, nn.Linear | None]:
    tensors, metadata = read_safetensors(path, FORMAT)
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    classifier = {k.removeprefix("classifier."): tensors.pop(k) for k in list(tensors) if k.startswith("classifier.")}
    head = None
    try:
        encoder = ResNet(**json.loads(metadata["config"]))
        encoder.load_state_dict(tensors)
        if classifier:
            head = nn.Linear(encoder.dim, len(classifier["bias"]))
            head.load_state_dict(classifier)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path.name}: found weights that fit no ResNet ({error}), expected what save_encoder writes") from error
    return encoder.eval(), head


def load_encoder(name: str | Path) -> nn.Module:
    """An encoder in eval mode, on the CPU, [0, 1] images -> (N, D), with `.image_size`.

    name: "torchvision:resnet50" (V1 weights, which keep near-identical images close), "timm:NAME", the path of a safetensors
    file that this project wrote, or of a checkpoint (.pth, .ckpt, ...) of VISSL, MoCo, lightly, solo-learn or DINO, which
    `foreign` reads; a path may begin with "file:". FileNotFoundError and ValueError say what was expected.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = save_encoder(ResNet("resnet10", width=4, stem="cifar", image_size=8), f"{folder}/encoder.safetensors")
    ...     encoder = load_encoder(path)
    >>> encoder(torch.rand(2, 3, 8, 8)).shape, encoder.image_size, encoder.training
    (torch.Size([2, 32]), 8, False)
    """
    from cadetlib import foreign  # which builds on this file's ResNet

    kind, _, rest = str(name).partition(":")
    if kind in ("torchvision", "timm"):
        try:
            return {"torchvision": _torchvision_encoder, "timm": _timm_encoder}[kind](rest)
        except OSError as error:  # from the network, or from being told to do without it
            raise FileNotFoundError(
                f"{name}: found no weights here, and could not download them ({error}); on a machine with a network run "
                f"`python -m cadetlib.backbones {name}` and bring its cache, the folder of TORCH_HOME or HF_HOME"
            ) from error
    if kind == "file":
        return load_encoder(rest)
    if str(name).endswith(foreign.SUFFIXES):
        return foreign.load(name)
    if not str(name).endswith(".safetensors"):
        raise ValueError(
            f"encoder: found {name!r}, expected 'torchvision:NAME', 'timm:NAME' or the path of a .safetensors file or of a "
            f"checkpoint ({', '.join(foreign.SUFFIXES)})"
        )
    return _load_resnet(Path(name))[0]


def load_classifier(path: str | Path) -> Classifier:
    """A classifier in eval mode from a file that `save_encoder(..., head=...)` wrote.

    >>> from tempfile import TemporaryDirectory
    >>> encoder = ResNet("resnet10", width=4, stem="cifar", image_size=8)
    >>> with TemporaryDirectory() as folder:
    ...     path = save_encoder(encoder, f"{folder}/victim.safetensors", head=nn.Linear(encoder.dim, 10))
    ...     load_classifier(path)(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """
    encoder, head = _load_resnet(Path(path))
    if head is None:
        raise ValueError(f"{Path(path).name}: found an encoder without a classifier's head, expected one saved with its head")
    return Classifier(encoder, head).eval()


def head_of(file: str | Path) -> nn.Linear | None:
    """The classifier's linear head that a file of this project holds beside its encoder; None when it holds none.

    >>> from tempfile import TemporaryDirectory
    >>> encoder = ResNet("resnet10", width=4, stem="cifar", image_size=8)
    >>> with TemporaryDirectory() as folder:
    ...     print(head_of(save_encoder(encoder, f"{folder}/encoder.safetensors")))
    ...     print(head_of(save_encoder(encoder, f"{folder}/victim.safetensors", head=nn.Linear(encoder.dim, 10))))
    None
    Linear(in_features=32, out_features=10, bias=True)
    """
    return _load_resnet(Path(file))[1]


def _torchvision_encoder(name: str) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"torchvision: found no model {name!r}, expected one of torchvision.models.list_models()")
    weights = models.get_model_weights(name).__members__.get("IMAGENET1K_V1")
    if weights is None:
        raise ValueError(f"torchvision: found no IMAGENET1K_V1 weights of {name!r}, expected a model that has them")
    network = models.get_model(name, weights=weights)
    _drop_classifier(network)
    transform = weights.transforms()
    return _Backbone(network, transform.crop_size[0], transform.mean, transform.std, f"torchvision:{name}").eval()


def _drop_classifier(network: nn.Module) -> None:
    for attribute in ("fc", "classifier", "heads", "head"):
        if hasattr(network, attribute):
            setattr(network, attribute, nn.Identity())
            return
    raise ValueError(f"{type(network).__name__}: found no classifier to take off, expected fc, classifier, heads or head")


def _timm_encoder(name: str) -> nn.Module:
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"timm: found no model {name!r}, expected one of timm.list_models()")
    pretrained = timm.list_pretrained(f"{architecture}.*")
    if not pretrained or (name != architecture and name not in pretrained):
        raise ValueError(f"timm: found no weights of {name!r}, expected one of {pretrained or timm.list_pretrained()[:5]}")
    network = timm.create_model(name, pretrained=True, num_classes=0)
    data: Mapping[str, Any] = timm.data.resolve_model_data_config(network)
    return _Backbone(network, data["input_size"][1], data["mean"], data["std"], f"timm:{name}").eval()


def n_parameters(module: nn.Module) -> int:
    """Number of weights of a module.

    >>> n_parameters(nn.Linear(3, 2))
    8
    """
    return sum(math.prod(p.shape) for p in module.parameters())
