"""The encoders that notebooks ask for: trained now in processes of their own, kept by the project, or trained by others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadetlib import data, encoders, processes, record
from cadetlib.run_files import ENCODER, Log, say
from cadetlib.training_data import prepared
from cadetlib.training_settings import TAKEN, Settings, different_settings, run_folder, settings_from

VISSL_SIMCLR = (
    "https://dl.fbaipublicfiles.com/vissl/model_zoo/simclr_rn50_800ep_simclr_8node_resnet_16_07_20.7e8feed1/"
    "model_final_checkpoint_phase799.torch"
)
_GRACE = 45  # seconds to save and leave in; torchrun gives its processes 30


def obtain(given: Mapping[str, Any], objective: str = "contrastive") -> Path:
    """The folder of a finished run with these parameters: this user's own; else the one that the project keeps; else trained now.

    With `pretrained` (or `supervised_pretrained`) nothing is trained: see `take`.
    What the project keeps of a profile lies in outputs/reference/<profile>/pretraining/<objective>. Its file is used only when
    its digest is right and it was trained with just these settings, and it is said that it was used.

    >>> obtain({"pretrained": "no-such-file.pth"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: pretrained: found no file ...no-such-file.pth (a relative path begins at the data root, ...
    """
    settings = settings_from(given, objective)
    if name := given.get(TAKEN[objective]):
        return take(name, settings)
    if record.forced():  # reproduce --force: nothing finished or kept is taken
        record.set_aside(run_folder(settings))
        return launch(given, objective)
    kept = record.checkout() / "outputs" / "reference" / str(given.get("profile", "digits")) / "pretraining" / objective
    if run_folder(settings).is_dir() or not (kept / ENCODER).is_file():  # one's own, be it interrupted, comes first
        return launch(given, objective)
    _, about = encoders.read_safetensors(kept / ENCODER, encoders.FORMAT)  # compares its digest
    if different := different_settings(json.loads(about["settings"]), settings):
        print(f"{objective}: the encoder that the project keeps was trained otherwise ({', '.join(different)}): training anew")
        return launch(given, objective)
    print(f"{objective}: taking the encoder that the project keeps, trained with these settings. To train your own instead, run")
    print(f"  {record.interpreter()} -m cadetlib.pretrain --params params/{kept.parents[1].name}/01_pretraining.yaml")
    return Path(shutil.copytree(kept, f"{settings.output}-kept", dirs_exist_ok=True))


def take(name: str, settings: Settings) -> Path:
    """A folder with the encoder that others trained, as a run of these settings would have left it, so that it serves as one.

    name: what `encoders.load_encoder` takes, a file's relative path beginning at the data root; for the supervised objective it
    has to bring its classifier, for the very classes of `settings.data`: "torchvision:NAME", or a file of this project with a
    head. Of the log there is one line, which says the epochs that the parameters state. FileNotFoundError says how to get what
    is not there; ValueError when it is no ResNet, or has no such classifier.

    >>> take("no-such-file.pth", Settings())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: pretrained: found no file ...no-such-file.pth (a relative path begins at the data root, ...
    """
    parameter, supervised = TAKEN[settings.objective], settings.objective == "supervised"
    if absent := missing_weights({parameter: name}):
        raise FileNotFoundError(absent[0])
    found = str(_weights_place(name))
    try:
        encoder = _as_resnet(encoders.load_encoder(found), name)
        head = _head_of(found, parameter, prepared(settings.data, settings)) if supervised else None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{parameter}: {error}; or leave the parameter empty to train") from error
    folder = Path(f"{settings.output}-taken-{record.digest([name, encoders.fingerprint(encoder)])[:8]}")
    shown = name if _is_named(name) else Path(name).name  # a folder is nobody else's business
    encoders.save_encoder(encoder, folder / ENCODER, head=head, source=shown)
    Log(folder / "log.jsonl", -1).write(step=0, epoch=float(settings.epochs), source=shown)
    return folder


def missing_weights(given: Mapping[str, Any]) -> list[str]:
    """For each file that `pretrained` and `supervised_pretrained` name and that is not there, what to do about it.

    >>> missing_weights({"pretrained": "", "supervised_pretrained": "torchvision:resnet50"})
    []
    """
    found = {k: given.get(k, "") for k in TAKEN.values()}
    return [
        f"{k}: found no file {_weights_place(name)} (a relative path begins at the data root, CADET_DATA), expected weights; put "
        f"them there, or leave the parameter empty to train. VISSL's SimCLR, ResNet-50 of 800 epochs: {VISSL_SIMCLR}"
        for k, name in found.items()
        if name and not _is_named(name) and not _weights_place(name).is_file()
    ]


def public_weights(given: Mapping[str, Any]) -> list[str]:
    """What `pretrained` and `supervised_pretrained` take from torchvision or timm by name.

    >>> public_weights({"pretrained": "weights/file.pth", "supervised_pretrained": "torchvision:resnet50"})
    ['torchvision:resnet50']
    """
    return [given[k] for k in TAKEN.values() if _is_named(given.get(k, ""))]


def origin(folder: Path) -> str:
    """Where the encoder in a run's folder is from, in words.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = encoders.save_encoder(encoders.ResNet("resnet10", 4), folder / ENCODER, source="timm:resnet50")
    >>> origin(folder)
    'timm:resnet50, trained by others'
    """
    about = encoders.read_safetensors(folder / ENCODER, encoders.FORMAT)[1]
    return f"{about['source']}, trained by others" if "source" in about else "trained with these parameters"


def _is_named(name: str) -> bool:
    return name.partition(":")[0] in ("torchvision", "timm")


def _weights_place(name: str) -> Path:
    """The file of a name; the name itself when another library knows it."""
    return Path(name) if _is_named(name) else data.root() / Path(name).expanduser()


def _as_resnet(encoder: nn.Module, name: str) -> encoders.ResNet:
    """The same encoder as a ResNet of this project, in which later notebooks find its stages; ValueError when it is none."""
    if isinstance(encoder, encoders.ResNet):
        return encoder
    from cadetlib import foreign

    _, weights = foreign.encoder_weights({k.removeprefix("network."): v for k, v in encoder.state_dict().items()}, name)
    mean, std = (getattr(encoder.normalize, k).flatten().tolist() for k in ("mean", "std"))
    size = encoder.image_size
    made = encoders.ResNet(*foreign.architecture(weights, name), image_size=size, mean=mean, std=std)  # type: ignore[arg-type]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))  # type: ignore[call-overload]
    with torch.no_grad(), suppress(RuntimeError):  # weights that do not fit
        made.load_state_dict(weights, strict=False)
        if torch.allclose(made.eval()(images), encoder(images), rtol=1e-3, atol=1e-4):
            return made
    raise ValueError(
        f"{name}: found a network that computes something else than a ResNet of its weights, expected a plain ResNet"
    )


def _head_of(name: str, parameter: str, images: data.ImageSet) -> nn.Linear:
    """The classifier that comes with the weights; ValueError when there is none, or one of other classes than the images'."""
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        from torchvision import models

        head = getattr(models.get_model(rest, weights="IMAGENET1K_V1"), "fc", None)
    else:
        head = encoders.head_of(name) if name.endswith(".safetensors") else None
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{parameter}: found {name} without a linear classifier, expected 'torchvision:NAME' of a ResNet or a .safetensors "
            "file of this project saved with its head"
        )
    n_classes = 0 if images.labels is None else int(images.labels.max()) + 1
    if head.out_features != n_classes:
        raise ValueError(
            f"{parameter}: found a classifier of {head.out_features} classes and {n_classes} in {images.name}, expected the same"
        )
    return head


def n_processes(asked: int, n_gpus: int) -> int:
    """How many processes train: as asked, but on GPUs one for each at most, aloud. The batch is divided among them all.

    >>> n_processes(8, n_gpus=4)
    pretraining: found 4 GPUs for 8 processes; going on with 4, which give the same training up to rounding
    4
    >>> n_processes(2, n_gpus=0), n_processes(1, n_gpus=8)
    (2, 1)
    """
    if not n_gpus or asked <= n_gpus:
        return asked
    say(
        f"pretraining: found {n_gpus} GPUs for {asked} processes; going on with {n_gpus}, which give the same training up to "
        "rounding"
    )
    return n_gpus


def launch(given: Mapping[str, Any], objective: str = "contrastive") -> Path:
    """Train in a subprocess of its own with these parameters, its lines printed here; returns the folder of the run.

    A finished run is found in its `run_folder` and not repeated.
    `processes` > 1 starts that many with torchrun, but not more than there are GPUs when there are any. The child's environment
    holds no distributed variables, and interrupting this call, or the end of this process, ends the whole group. RuntimeError
    when the training did not finish.

    >>> launch({"epocs": 3})
    Traceback (most recent call last):
    ValueError: parameters: epocs: unknown parameter, did you mean epochs?
    """
    import yaml

    folder = run_folder(settings_from(given, objective))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "parameters.yaml"
    file.write_text(yaml.safe_dump(dict(given), sort_keys=False))
    number = n_processes(int(given.get("processes", 1)), torch.cuda.device_count())
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "-m"] if number > 1 else []
    command = [sys.executable, "-m", *torchrun, "cadetlib.pretrain", "--params", str(file), "--objective", objective]
    command += ["--output", str(folder)]
    environment = processes.without_distributed(os.environ)
    if number > 1:  # or torchrun says one thread each
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",  # of a file's name that is no Unicode
        start_new_session=True,  # an interrupted notebook cell reaches this process alone, which then ends its child
        preexec_fn=partial(processes.die_with_parent, os.getpid()),
    ) as child:
        lines: list[str] = []
        try:
            for line in child.stdout or ():
                lines = [*lines[-60:], line]
                print(line, end="", flush=True)
            code = child.wait()
        except BaseException:
            _end(child)
            raise
    if code:
        raise RuntimeError(f"pretraining ended with exit code {code}; its last lines:\n" + "".join(lines))
    return folder


def _end(child: subprocess.Popen[str]) -> None:
    """End a process and its group: first with the time to save, then at once."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(child.pid, signal.SIGTERM)
        try:
            print(child.communicate(timeout=_GRACE)[0], end="", flush=True)
        finally:
            os.killpg(child.pid, signal.SIGKILL)
