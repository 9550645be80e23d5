"""Attacked images as the notebooks ask for them: made once, kept under their content, and what the attacks do to the victim."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadetlib import attacks, encoders
from cadetlib.experiments import IN_DISTRIBUTION, Row
from cadetlib.views import resize_to

ATTACK_NAMES = {"fgsm": "FGSM", "pgd": "PGD", "cw_l2": "CW-L2", "cw_l2_ball": "CW-L2-ball", "cw_linf": "CW-Linf"}


def attacked(
    name: str, classifier: nn.Module, images: Tensor, labels: Tensor, cache: str | Path | None = None, **settings: Any
) -> Tensor:
    """Images (N, 3, S, S) after the attack `name` of attacks.ATTACKS, float32 in [0, 1]; kept in `cache` under their content.

    >>> from tempfile import TemporaryDirectory
    >>> classifier, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(4, 3, 2, 2)
    >>> with TemporaryDirectory() as cache:
    ...     made = attacked("fgsm", classifier, images, torch.tensor([0, 1, 0, 1]), cache, eps=0.1)
    ...     again = attacked("fgsm", classifier, images, torch.tensor([0, 1, 0, 1]), cache, eps=0.1)  # read, not made
    >>> torch.equal(made, again), bool((made - images).abs().max() <= 0.1 + 1e-6)
    (True, True)
    """
    if name not in attacks.ATTACKS:
        raise ValueError(f"attack: found {name!r}, expected one of {list(attacks.ATTACKS)}")
    if cache is None:
        return attacks.ATTACKS[name](classifier, images, labels, **settings)
    digest = hashlib.sha256(encoders.fingerprint(classifier).encode())
    # The fingerprint is of what is saved: how a part pads, and what normalises its input, may not be.
    weights, parts = classifier.state_dict(), classifier.named_modules()
    unsaved = {name: values.tolist() for name, values in classifier.named_buffers() if name not in weights}
    unsaved |= {f"config of {name}": part.config for name, part in parts if hasattr(part, "config")}
    digest.update(json.dumps(unsaved, sort_keys=True, default=str).encode())
    digest.update(json.dumps([name, settings, list(images.shape), str(images.dtype)], sort_keys=True).encode())
    digest.update(images.cpu().contiguous().numpy().tobytes() + labels.cpu().contiguous().numpy().tobytes())
    path = Path(cache) / f"attack-{digest.hexdigest()[:32]}.safetensors"
    if not path.is_file():
        made = attacks.ATTACKS[name](classifier, images, labels, **settings)
        encoders.write_safetensors(path, {"images": made}, "cadetlib.images")
        del made  # what is read next stays in the file, mapped: in memory only while it is looked at
    return encoders.read_safetensors(path, "cadetlib.images")[0]["images"]


def attack_settings(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of attack `name` among a notebook's flat parameters: pgd_eps is `eps` of "pgd".

    >>> attack_settings("cw_l2", {"cw_l2_c": 0.1, "cw_l2_ball_eps": 0.5, "seed": 0})
    {'c': 0.1}
    """
    longer = [other for other in attacks.ATTACKS if other.startswith(name + "_")]
    own = [k for k in parameters if k.startswith(name + "_") and not any(k.startswith(other + "_") for other in longer)]
    return {k.removeprefix(name + "_"): parameters[k] for k in own}


def attack_all(
    names: Sequence[str],
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    parameters: Mapping[str, Any],
    cache: str | Path | None = None,
) -> dict[str, Tensor]:
    """`attacked` for each of several attacks, under the names of ATTACK_NAMES.

    >>> from tempfile import TemporaryDirectory
    >>> classifier, images, labels = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
    >>> with TemporaryDirectory() as cache:
    ...     made = attack_all(["fgsm"], classifier, images, labels, {"fgsm_eps": 0.1, "seed": 0}, cache)
    2 images after FGSM {'eps': 0.1}
    >>> made["FGSM"].shape
    torch.Size([2, 3, 2, 2])
    """
    made = {}
    for name in names:
        settings = attack_settings(name, parameters)
        print(f"{len(images)} images after {ATTACK_NAMES.get(name, name)} {settings}")
        made[ATTACK_NAMES.get(name, name)] = attacked(name, classifier, images, labels, cache, **settings)
    return made


def attack_mix(
    names: Sequence[str], classifier: nn.Module, images: Tensor, labels: Tensor, parameters: Mapping[str, Any], cache: str | Path
) -> Tensor:
    """Each image after one of the attacks, in turn, for what is tuned "on attacks": float32, in the order of the images.

    With fewer images than attacks, the last attacks are left out.

    >>> from tempfile import TemporaryDirectory
    >>> classifier, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(4, 3, 2, 2)
    >>> settings = {"fgsm_eps": 0.2, "pgd_eps": 0.1, "pgd_step": 0.05, "pgd_n_steps": 9}
    >>> with TemporaryDirectory() as cache:
    ...     mix = attack_mix(["fgsm", "pgd"], classifier, images, torch.tensor([0, 1, 0, 1]), settings, cache)
    >>> moved = (mix - images).abs().amax(dim=(1, 2, 3))  # fgsm, pgd, fgsm, pgd
    >>> bool((moved <= torch.tensor([0.2, 0.1, 0.2, 0.1]) + 1e-6).all())
    True
    """
    made = torch.empty(images.shape)
    for i, name in enumerate(names[: len(images)]):
        own = slice(i, None, len(names))
        made[own] = attacked(name, classifier, images[own], labels[own], cache, **attack_settings(name, parameters))
    return made


def save_sets(folder: Path, **sets: Tensor) -> str:
    """Keep image sets in one safetensors file of `folder`; returns the file's name. uint8 stays uint8.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = save_sets(Path(folder), clean=torch.zeros(2, 3, 4, 4, dtype=torch.uint8), PGD=torch.rand(2, 3, 4, 4))
    ...     {name: images.dtype for name, images in sorted(load_sets(Path(folder), file).items())}
    {'PGD': torch.float32, 'clean': torch.uint8}
    """
    tensors = {name: images.contiguous() for name, images in sets.items()}
    encoders.write_safetensors(folder / "images.safetensors", tensors, "cadetlib.images")
    return "images.safetensors"


def load_sets(folder: Path, file: str) -> dict[str, Tensor]:
    """Image sets that `save_sets` kept.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     load_sets(Path(folder), save_sets(Path(folder), clean=torch.zeros(2, 3, 4, 4)))["clean"].shape
    torch.Size([2, 3, 4, 4])
    """
    return encoders.read_safetensors(folder / file, "cadetlib.images")[0]


def attack_strength(classifier: nn.Module, images: Tensor, labels: Tensor, attacked_sets: Mapping[str, Tensor]) -> list[Row]:
    """The victim's accuracy on clean and on attacked images, and how far the attack moved them.

    >>> classifier, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.full((4, 3, 2, 2), 0.5)
    >>> rows = attack_strength(classifier, images, classifier(images).argmax(dim=1), {"brighter": images + 0.25})
    >>> [(row["images"], row["linf"]) for row in rows], rows[0]["accuracy"]
    ([('clean', 0.0), ('brighter', 0.25)], 1.0)
    """
    rows = [dict(images="clean", accuracy=attacks.accuracy(classifier, images, labels), linf=0.0, l2=0.0)]
    for name, moved in attacked_sets.items():
        blocks = zip(moved.split(1024), images.split(1024), strict=True)
        changes = ((after - resize_to(x, x.shape[-1])).flatten(1) for after, x in blocks)
        lengths = torch.cat([torch.stack([c.norm(order, dim=1) for order in (torch.inf, 2)]) for c in changes], dim=1)
        linf, l2 = lengths.mean(dim=1).tolist()
        rows.append(dict(images=name, accuracy=attacks.accuracy(classifier, moved, labels), linf=linf, l2=l2))
    return rows


def successful(classifier: nn.Module, images: Tensor, labels: Tensor, attacked_sets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which images the victim gets right and, of each attacked set, which of these it then gets wrong: set -> (N,) bool.

    >>> dark_is_0 = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> with torch.no_grad():
    ...     _ = dark_is_0[1].weight.copy_(torch.tensor([[0.0], [1.0]])), dark_is_0[1].bias.copy_(torch.tensor([6.0, 0.0]))
    >>> images = torch.tensor([0.1, 0.2, 0.9]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    >>> found = successful(dark_is_0, images, torch.tensor([0, 0, 0]), {"brighter": (images * 4).clamp(0, 1)})
    >>> found["in-distribution"].tolist(), found["brighter"].tolist()
    ([True, True, False], [False, True, False])
    """
    right = attacks.correct(classifier, images, labels)
    return {IN_DISTRIBUTION: right} | {k: right & ~attacks.correct(classifier, x, labels) for k, x in attacked_sets.items()}
