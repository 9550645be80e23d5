"""CADet on other encoders than the one it was written for: larger ones, other ways of learning without labels (Section 6.3).

    python -m cadetlib.backbones torchvision:resnet101 timm:vit_small_patch16_224.dino

fetches public weights once, where there is a network: notebooks run without one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadetlib import cifar_resnet, encoders, experiments, questions, record
from cadetlib.views import EvalViews

Row = dict[str, Any]


def load(name: str) -> nn.Module:
    """An encoder on the GPU when there is one: "cifar:resnet20", "cifar:resnet56", or what `encoders.load_encoder` takes.

    >>> load("cifar:vgg")
    Traceback (most recent call last):
    ValueError: cifar: found no public weights of 'vgg', expected one of ['resnet20', 'resnet56']
    """
    kind, _, rest = name.partition(":")
    encoder = cifar_resnet.load(rest).encoder if kind == "cifar" else encoders.load_encoder(name)
    return encoders.placed(encoder)


def missing(names: Sequence[str]) -> list[str]:
    """For each of these encoders whose weights are not on this machine, what to do about it. Nothing is fetched.

    Names that no library knows are left to `load`, which says so.

    >>> missing(["no-such-file.pth"])
    ['found no file no-such-file.pth, expected the weights of an encoder there']
    """
    return [line for name in dict.fromkeys(names) for line in _missing(name)]


def _missing(name: str) -> Iterator[str]:
    kind, _, rest = name.partition(":")
    if kind == "cifar":
        try:
            cifar_resnet.load(rest)  # of 1 MB; the only way to hear what is wrong with the file
        except FileNotFoundError as error:
            yield str(error)
    elif kind in ("torchvision", "timm"):
        if not _is_cached(kind, rest):
            yield (
                f"found no weights of {name} on this machine, expected them in the cache of {kind}: notebooks run without a "
                f"network; to get them: `python -m cadetlib.backbones {name}`"
            )
    elif not (record.checkout() / name).is_file():  # where notebooks run
        yield f"found no file {name}, expected the weights of an encoder there"


def _is_cached(kind: str, name: str) -> bool:
    """Whether torchvision or timm would find the weights without a network; True for a name that they do not know."""
    if kind == "torchvision":
        from torchvision import models

        known = models.get_model_weights(name).__members__.get("IMAGENET1K_V1") if name in models.list_models(models) else None
        return known is None or _in_hub(known.url)
    import huggingface_hub
    import timm

    if not timm.list_models(name.partition(".")[0]):
        return True
    found = timm.models.get_pretrained_cfg(name)
    if found is None:
        return True
    files = ("model.safetensors", "pytorch_model.bin")
    stored = [huggingface_hub.try_to_load_from_cache(found.hf_hub_id, file) for file in files if found.hf_hub_id]
    return any(isinstance(path, str) for path in stored) or (isinstance(found.url, str) and _in_hub(found.url))


def _in_hub(url: str) -> bool:
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).is_file()


def rows(
    name: str,
    encoder: nn.Module,
    sets: Mapping[str, Tensor],
    paired: Mapping[str, bool],
    divisions: Sequence[experiments.Split],
    views: EvalViews,
    grid: Sequence[int],
    n_views: int,
    cache: Path | None = None,
    dtype: str = "float32",
) -> list[Row]:
    """AUROC of CADet with this encoder against each set of anomalies, in the shape of the rows of Tables 3 and 4.

    sets: name -> images (N, 3, S, S), among them "in-distribution"; they are brought to the encoder's own side. views: what
    their area, flip and seed are; grid: the numbers of views to keep, among them n_views.

    >>> import torch
    >>> images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> sets = {"in-distribution": images, "darker": images / 3}
    >>> divisions = experiments.splits(30, n_splits=2, n_reference=8, n_calibration=8)
    >>> pixels, paired = nn.Flatten(), {"in-distribution": False, "darker": True}
    >>> [row] = rows("pixels", pixels, sets, paired, divisions, EvalViews(8), [4], 4)
    30 images of in-distribution: 4 views each
    30 images of darker: 4 views each
    >>> row["encoder"], row["anomaly"], row["dim"], row["low"] <= row["auroc"] <= row["high"]
    ('pixels', 'darker', 192, True)
    """
    own = EvalViews(getattr(encoder, "image_size", views.image_size), views.crop_scale, views.flip, views.seed)
    sums = experiments.view_sums_of_sets(encoder, sets, own, grid, cache, dtype=dtype)
    ask = questions.Asker(sums, paired, divisions)
    about = dict(
        encoder=name,
        detector="CADet",
        dim=int(sums[experiments.IN_DISTRIBUTION].means.shape[-1]),
        millions_of_weights=sum(p.numel() for p in encoder.parameters()) / 1e6,
    )
    return [about | ask(anomaly, n_views) for anomaly in ask.anomalies]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the weights of these encoders, with a line for each; the exit code.

    >>> main(["timm:no_such_model"])  # doctest: +ELLIPSIS
    timm:no_such_model: timm: found no model 'no_such_model', expected one of timm.list_models()
    1
    """
    parser = argparse.ArgumentParser(prog="python -m cadetlib.backbones", description="Fetch public weights once.")
    parser.add_argument("names", nargs="+", help="such as torchvision:resnet101 or timm:vit_small_patch16_224.dino")
    failed = 0
    for name in parser.parse_args(arguments).names:
        try:
            encoder = load(name)
        except Exception as error:  # of many libraries; all are said, and the next name is tried
            print(f"{name}: {error}")
            failed = 1
        else:
            print(f"{name}: {encoders.n_parameters(encoder) / 1e6:.1f} million weights, images of side {encoder.image_size}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
