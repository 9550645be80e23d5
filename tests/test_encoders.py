"""Encoders against torchvision and timm, and files that come back whole or not at all."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from cadetlib import encoders
from cadetlib.encoders import Classifier, ContrastiveHead, Normalize, ResNet

MEAN, STD = torch.tensor(encoders.IMAGENET_MEAN).view(3, 1, 1), torch.tensor(encoders.IMAGENET_STD).view(3, 1, 1)


def images(n=2, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def randomised(model, seed=0):
    """The model with random weights and running statistics, under which features depend on all layers and on the image."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.ndim > 1:
            bound = (6 / value[0].numel()) ** 0.5
            value.uniform_(-bound, bound, generator=generator)
        elif name.endswith(("weight", "running_var")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value.uniform_(-0.2, 0.2, generator=generator)
    return model.eval()


def small(seed=0, **changes):
    with torch.random.fork_rng():
        return randomised(ResNet(**{"arch": "resnet10", "width": 4, "stem": "cifar", "image_size": 16} | changes), seed)


@pytest.fixture
def file(tmp_path):
    return encoders.save_encoder(small(), tmp_path / "encoder.safetensors")


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_resnet_computes_what_torchvisions_does(arch):
    theirs = randomised(models.get_model(arch))
    ours = ResNet(arch)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state)
    theirs.fc = nn.Identity()
    x = images(size=64)
    with torch.inference_mode():
        expected = theirs((x - MEAN) / STD)
        torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().mean()))
    assert ours.dim == {"resnet50": 2048}.get(arch, 512)


def test_commands_do_not_wait_for_torchvision_before_they_make_a_network():
    """Of torchvision, importing any part imports all models, which takes longer than many commands."""
    package = Path(encoders.__file__).parent
    commands = [f"cadetlib.{path.stem}" for path in package.glob("*.py") if "\nif __name__ ==" in path.read_text()]
    assert {"cadetlib.data", "cadetlib.score", "cadetlib.keep", "cadetlib.pretrain"} <= set(commands)
    assert not is_imported("torchvision", commands)
    assert not is_imported("torch", ["cadetlib.reproduce"]), "which only starts others, most of the time"


def is_imported(name, commands):
    code = f"import sys, {', '.join(commands)}; print({name!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


def test_the_cifar_stem_keeps_the_resolution():
    """3x3 with stride 1 and no pooling: only the first of stages 2 to 4 halve the side."""
    sides = []
    encoder = small(image_size=32)
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        stage.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
    encoder(images(size=32))
    assert sides == [32, 16, 8, 4]
    assert encoder.conv1.weight.shape == (4, 3, 3, 3)


def test_contrastive_head_is_simclrv2s():
    """Three layers 2048 -> 2048 -> 128 without biases, each with batch norm, ReLU between them and not at the end."""
    head = ContrastiveHead(512)
    linear = [m for m in head if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(2048, 512), (2048, 2048), (128, 2048)]
    assert all(m.bias is None for m in linear)
    kinds = [type(m).__name__ for m in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert ContrastiveHead(4, 6, 3)(torch.rand(5, 4)).min() < 0


@pytest.mark.parametrize("with_head", [False, True])
def test_a_saved_encoder_comes_back_to_the_bit(tmp_path, with_head):
    encoder, head = small(mean=[0.1, 0.2, 0.3]), nn.Linear(32, 7)
    path = encoders.save_encoder(encoder, tmp_path / "new" / "e.safetensors", head=head if with_head else None, epochs=3)
    loaded = encoders.load_encoder(path)
    assert encoders.fingerprint(loaded) == encoders.fingerprint(encoder)
    assert torch.equal(loaded(images(size=16)), encoder(images(size=16)))
    assert not loaded.training and loaded.image_size == 16
    assert [p.name for p in path.parent.iterdir()] == ["e.safetensors"]
    if with_head:
        classifier = encoders.load_classifier(path)
        assert torch.equal(classifier(images(size=16)), head(encoder(images(size=16)))) and classifier.image_size == 16
    else:
        with pytest.raises(ValueError, match=r"e.safetensors: found an encoder without a classifier's head"):
            encoders.load_classifier(path)


def test_half_precision_is_half_the_size_and_close(tmp_path):
    encoder = small(width=16)
    whole, half = (encoders.save_encoder(encoder, tmp_path / f"{h}.safetensors", half=h) for h in (False, True))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    found, expected = encoders.load_encoder(half)(images(size=16)), encoder(images(size=16))
    assert found.dtype == torch.float32
    assert nn.functional.cosine_similarity(found, expected).min() > 0.9999
    encoder.bn1.running_var.fill_(1e6)
    with pytest.raises(ValueError, match=r"bn1.running_var as float16: found 16 NaN or infinite"):
        encoders.save_encoder(encoder, tmp_path / "overflow.safetensors", half=True)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def pickle(path):
    torch.save(small().state_dict(), path)


def of_another_kind(path):
    encoders.write_safetensors(path, {"mu": torch.ones(3)}, "cadetlib.detector")


def of_another_library(path):
    save_file({"weight": torch.ones(3)}, path)


def with_a_weight_missing(path):
    tensors, about = encoders.read_safetensors(path, "cadetlib.encoder")
    tensors.pop("conv1.weight")
    encoders.write_safetensors(path, tensors, "cadetlib.encoder", config=about["config"])


def with_a_hostile_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "no readable safetensors"),
        (flip_a_bit, "does not match its digest"),
        (empty, "no readable safetensors"),
        (pickle, "no readable safetensors"),
        (of_another_kind, "found format 'cadetlib.detector', expected 'cadetlib.encoder'"),
        (of_another_library, "found format None"),
        (with_a_weight_missing, "fit no ResNet"),
        (with_a_hostile_header, "no readable safetensors"),
    ],
)
def test_damaged_and_foreign_files_are_refused(file, damage, message):
    damage(file)
    with pytest.raises(ValueError, match=message) as refusal:
        encoders.load_encoder(file)
    assert "encoder.safetensors" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet50", ValueError, "found 'resnet50', expected 'torchvision:NAME', 'timm:NAME' or the path"),
        ("weights.bin", ValueError, "found 'weights.bin', expected"),
        ("nowhere/encoder.safetensors", FileNotFoundError, "found no file encoder.safetensors in nowhere"),
        ("torchvision:resnet51", ValueError, "found no model 'resnet51'"),
        ("torchvision:vit_h_14", ValueError, "found no IMAGENET1K_V1 weights of 'vit_h_14'"),
        ("timm:resnet51", ValueError, "found no model 'resnet51'"),
    ],
)
def test_unknown_encoders_are_refused_with_what_was_expected(name, error, message):
    with pytest.raises(error, match=message):
        encoders.load_encoder(name)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_encoders_are_the_v1_networks_without_classifier(name, monkeypatch):
    """The download is the one thing replaced: by random weights, remembered with the address they were asked for under."""
    theirs, asked = randomised(models.get_model(name)), []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, *_, **__: asked.append(url) or theirs.state_dict()
    )
    encoder = encoders.load_encoder(f"torchvision:{name}")
    assert asked == [models.get_model_weights(name)["IMAGENET1K_V1"].url]
    assert encoder.image_size == 224 and not encoder.training
    setattr(theirs, "fc" if name == "resnet18" else "classifier", nn.Identity())
    x = images(size=64)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), theirs((x - MEAN) / STD).flatten(1))


def test_timm_encoders_are_normalised_as_timm_says(monkeypatch):
    import timm

    theirs, asked = randomised(timm.create_model("test_resnet", num_classes=0)), []

    def offline(name, pretrained, num_classes):
        asked.append((name, pretrained, num_classes))
        return theirs

    monkeypatch.setattr("timm.create_model", offline)
    encoder = encoders.load_encoder("timm:test_resnet.r160_in1k")
    assert asked == [("test_resnet.r160_in1k", True, 0)]
    assert encoder.image_size == theirs.pretrained_cfg["input_size"][1] and not encoder.training
    mean, std = (torch.tensor(theirs.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    x = images(size=64)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), theirs((x - mean) / std))


def test_a_fingerprint_tells_one_weight_buffer_or_setting_from_another():
    encoder = small()
    expected = encoders.fingerprint(encoder)
    assert encoders.fingerprint(small()) == expected == encoders.fingerprint(small().double())
    found = {expected, encoders.fingerprint(small(std=[0.2, 0.2, 0.2]))}
    for name in ("layer4.0.conv2.weight", "bn1.running_mean", "bn1.num_batches_tracked"):
        changed = small()
        changed.state_dict()[name].view(-1)[0] += 1
        found.add(encoders.fingerprint(changed))
    assert len(found) == 5
    names = [nn.ModuleDict({name: nn.Linear(2, 2)}) for name in "ab"]
    names[1].load_state_dict({k.replace("a.", "b."): v for k, v in names[0].state_dict().items()})
    assert encoders.fingerprint(names[0]) != encoders.fingerprint(names[1])


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 3, 4), r"returned \(2, 3, 4\) for 2 images, expected a tensor \(2, D\)"),
        (torch.ones(3, 4), r"returned \(3, 4\)"),
        (torch.ones(2), r"returned \(2,\)"),
        ([1, 2], "returned list"),
        (torch.tensor([[1.0, float("nan")], [0, 1]]), "encoder's features: found 1 NaN"),
    ],
)
def test_encode_refuses_other_shapes_and_nan(value, message):
    with pytest.raises(ValueError, match=message):
        encoders.encode(Returns(value), images(2))


class Counts(torch.nn.Module):
    """The mean of each channel, and how many images it was given at a time."""

    def forward(self, images):
        self.given = [*getattr(self, "given", []), len(images)]
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize(("training", "given"), [(False, [2, 2, 2, 2, 2, 1]), (True, [11])])
def test_a_cpu_gets_large_images_in_pieces_that_a_gradient_passes(training, given):
    """Not in training mode, in which batch norm is of the whole batch."""
    encoder, many = Counts().train(training), torch.rand(11, 3, 256, 256, requires_grad=True)  # two of these are 2^17 pixels
    features = encoders.encode(encoder, many)
    assert encoder.given == given and torch.equal(features, many.mean(dim=(2, 3)))
    (gradient,) = torch.autograd.grad(features.sum(), many)
    assert torch.allclose(gradient, torch.full_like(many, 1 / 256**2))


def test_a_classifier_is_its_head_on_its_encoder():
    encoder, head = small(), nn.Linear(32, 5)
    classifier = Classifier(encoder, head)
    x = images(size=16)
    assert torch.equal(classifier(x), encoder(x) @ head.weight.T + head.bias)
    with pytest.raises(ValueError, match=r"head: found Sequential, expected torch.nn.Linear"):
        Classifier(encoder, nn.Sequential(head))


@pytest.mark.parametrize("changes", [{"arch": "resnet51"}, {"stem": "none"}, {"image_size": 4}])
def test_impossible_networks_are_refused(changes):
    with pytest.raises(ValueError, match=r"resnet51|none|image_size"):
        ResNet(**changes)


def test_normalize_is_per_channel():
    x = images(2, 4)
    torch.testing.assert_close(Normalize()(x), (x - MEAN) / STD)


def test_the_last_layer_of_the_contrastive_head_has_no_shift():
    """SimCLRv2's last layer is scaled and not shifted: its bias is 0 and no step moves it."""
    head = encoders.ContrastiveHead(4, 8, 6)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    head(torch.randn(16, 4, generator=torch.Generator().manual_seed(0))).square().mul(torch.arange(6.0)).sum().backward()
    before = head[-1].weight.detach().clone()
    optimizer.step()
    assert not head[-1].bias.any()
    assert not torch.equal(head[-1].weight, before)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    encoder, file = ResNet("resnet10", 4, "cifar", 8), tmp_path / "encoder.safetensors"
    for head in (nn.Linear(encoder.dim, 3, bias=False), nn.Linear(encoder.dim + 1, 3), nn.Sequential(nn.Linear(3, 3))):
        with pytest.raises(ValueError, match="head: found"):
            encoders.save_encoder(encoder, file, head=head)
    with pytest.raises(ValueError, match="encoder: found Flatten"):
        encoders.save_encoder(nn.Flatten(), file)
    for name in ("sha256", "format", "config"):
        with pytest.raises(ValueError, match=f"about: found \\['{name}'\\]"):
            encoders.save_encoder(encoder, file, **{name: "a"})
    assert not file.exists()
    of_numpy = ResNet("resnet10", 4, "cifar", 8, mean=np.float32([0.5] * 3)).eval()
    assert encoders.load_encoder(encoders.save_encoder(of_numpy, file)).config == of_numpy.config


@pytest.mark.parametrize("name", ["timm:resnet18.nope", "timm:*", "timm:", "timm:beit3_giant_patch14_224"])
def test_timm_models_that_are_none_or_have_no_weights_are_refused(name):
    with pytest.raises(ValueError, match="timm: found no"):
        encoders.load_encoder(name)
