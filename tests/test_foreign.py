"""Checkpoints of other libraries: torchvision's own networks under every library's names give torchvision's features."""

import argparse
import re

import pytest
import torch
from test_encoders import MEAN, STD, images, randomised
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

from cadetlib import encoders, foreign


def network(seed=0):
    """The smallest ResNet of torchvision's parts, with random weights and statistics."""
    torch.manual_seed(seed)
    return randomised(ResNet(BasicBlock, [1, 1, 1, 1]), seed).eval()


@pytest.fixture(scope="module")
def small():
    return network()


def features(model, x):
    """Of torchvision's network, before its classifier."""
    whole, model.fc = model.fc, nn.Identity()
    with torch.no_grad():
        z = model((x - MEAN) / STD)
    model.fc = whole
    return z


def under(prefix, state, *without):
    return {prefix + k: v for k, v in state.items() if not k.startswith(without)}


def vissl(state, other):
    trunk, heads = under("_feature_blocks.", state, "fc."), {"0.clf.0.weight": torch.ones(3)}
    return dict(classy_state_dict=dict(base_model=dict(model=dict(trunk=trunk, heads=heads))), phase_idx=799)


def vissl_trunk(state, other):
    return dict(model_state_dict={k: v for k, v in under("_feature_blocks.", state, "fc.").items() if "num_batches" not in k})


def moco(state, other):
    weights = under("module.encoder_k.", other) | under("module.encoder_q.", state) | {"module.queue": torch.ones(2)}
    return dict(epoch=800, arch="resnet50", state_dict=weights, optimizer=dict(state={}, param_groups=[{"lr": 0.1}]))


def moco_v3(state, other):
    return dict(state_dict=under("module.momentum_encoder.", other) | under("module.base_encoder.", state))


def lightly(state, other):
    heads = {"projection_head.layers.0.weight": torch.ones(2), "backbone_momentum.conv1.weight": torch.ones(2)}
    return {"state_dict": under("backbone.", state, "fc.") | heads, "pytorch-lightning_version": "2.1.0"}


def lightly_numbered(state, other):
    """nn.Sequential(*list(resnet.children())[:-1]): layers by number."""
    numbers = dict(conv1=0, bn1=1, layer1=4, layer2=5, layer3=6, layer4=7)
    named = {f"backbone.{numbers[k.split('.')[0]]}.{k.partition('.')[2]}": v for k, v in under("", state, "fc.").items()}
    return dict(state_dict=named | {"projection_head.0.weight": torch.ones(2)})


def solo_learn(state, other):
    weights = under("momentum_backbone.", other, "fc.") | under("backbone.", state, "fc.")
    return dict(state_dict=weights | {"projector.0.weight": torch.ones(2), "classifier.weight": torch.ones(2)})


def solo_learn_old(state, other):
    return dict(state_dict=under("encoder.", state, "fc.") | {"classifier.weight": torch.ones(2)})


def dino(state, other):
    return under("", state, "fc.")


def dino_full(state, other):
    student = under("module.backbone.", other, "fc.") | {"module.head.mlp.0.weight": torch.ones(2)}
    return dict(student=student, teacher=under("backbone.", state, "fc."), epoch=100, args=argparse.Namespace(arch="resnet50"))


def torchvisions(state, other):
    return state


NAMINGS = [
    vissl, vissl_trunk, moco, moco_v3, lightly, lightly_numbered, solo_learn, solo_learn_old, dino, dino_full, torchvisions,
]  # fmt: skip


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.__name__)
def test_features_are_the_networks_whatever_its_weights_are_called(naming, small, tmp_path):
    other = {k: v + 1 for k, v in small.state_dict().items()}
    torch.save(naming(small.state_dict(), other), tmp_path / "checkpoint.pth.tar")
    encoder = encoders.load_encoder(tmp_path / "checkpoint.pth.tar")
    assert not encoder.training and encoder.image_size == 224
    x = images(size=64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), features(small, x), rtol=1e-4, atol=1e-4)


def small_images_network(padding, relu):
    """torchvision's parts with a first layer for small images."""
    model = network(3)
    model.conv1, model.maxpool, model.relu = nn.Conv2d(3, 64, 3, 1, padding, bias=False), nn.Identity(), relu
    return model


def lightlys_own(state, other):
    """lightly's ResNetGenerator, cut into an nn.Sequential: no ReLU of its own, no max pooling, shortcuts that are called so."""
    numbers = dict(conv1=0, bn1=1, layer1=2, layer2=3, layer3=4, layer4=5)
    named = {f"backbone.{numbers[k.split('.')[0]]}.{k.partition('.')[2]}": v for k, v in under("", state, "fc.").items()}
    named = {k.replace("downsample", "shortcut"): v for k, v in named.items()}
    return dict(state_dict=named | {"projection_head.layers.0.weight": torch.ones(2)})


@pytest.mark.parametrize(
    "naming, padding, relu, statistics",
    [
        (lightlys_own, 1, nn.Identity(), (encoders.IMAGENET_MEAN, encoders.IMAGENET_STD)),
        (moco, 1, nn.ReLU(), (encoders.IMAGENET_MEAN, encoders.IMAGENET_STD)),
        (solo_learn, 2, nn.ReLU(), (foreign.CIFAR_MEAN, foreign.CIFAR_STD)),
        (solo_learn_old, 2, nn.ReLU(), (foreign.CIFAR_MEAN, foreign.CIFAR_STD)),
    ],
)
def test_the_first_layer_for_small_images_and_the_pixels_are_the_librarys(naming, padding, relu, statistics, tmp_path):
    model = small_images_network(padding, relu)
    torch.save(naming(model.state_dict(), model.state_dict()), tmp_path / "a.ckpt")
    encoder = encoders.load_encoder(tmp_path / "a.ckpt")
    assert encoder.image_size == 32
    x = images(size=32)
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in statistics)
    model.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), model((x - mean) / std), rtol=1e-4, atol=1e-4)
    path = encoders.save_encoder(encoder, tmp_path / "encoder.safetensors")
    assert encoders.fingerprint(encoders.load_encoder(path)) == encoders.fingerprint(encoder)


def test_resnet_50_and_the_cifar_stem_are_seen_from_the_weights(tmp_path):
    large = models.resnet50()
    torch.save(moco(large.state_dict(), {}), tmp_path / "a.ckpt")
    found = encoders.load_encoder(tmp_path / "a.ckpt")
    assert found.config["arch"] == "resnet50" and found.dim == 2048
    torch.testing.assert_close(found.layer4[2].conv3.weight, large.layer4[2].conv3.weight)
    thin = encoders.ResNet("resnet18", 8, "cifar", 32, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)).eval()
    torch.save(solo_learn(thin.state_dict(), {}), tmp_path / "b.ckpt")
    again = foreign.load(tmp_path / "b.ckpt", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), stem="cifar")
    assert again.config == thin.config
    assert encoders.fingerprint(again) == encoders.fingerprint(thin)


class Planted:
    """What a pickle may hold besides tensors: a call that is made when it is read."""

    def __reduce__(self):
        return (open, ("planted", "w"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "layer2.0.bn1.weight"}, "1 missing: layer2.0.bn1.weight"),
        (lambda s: s | {"layer2.0.se.weight": torch.ones(2)}, "1 left over: layer2.0.se.weight"),
        (lambda s: s | {"bn1.bias": torch.ones(3)}, "1 of another shape: bn1.bias (3,) for (64,)"),
        (lambda s: {k: v for k, v in s.items() if "layer4" not in k}, "found a ResNet of (1, 1, 1, 0) blocks a stage"),
        (
            lambda s: {"blocks.0.attn.qkv.weight": torch.ones(2)},
            "found no ResNet among 1 tensors, the first of which are ['blocks",
        ),
        (lambda s: s | {"hook": Planted()}, "found no file of weights alone"),
    ],
)
def test_what_does_not_fit_is_named(change, message, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(change(small.state_dict()), "wrong.pth")
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        encoders.load_encoder("wrong.pth")
    assert "wrong.pth" in str(refusal.value) and not (tmp_path / "planted").exists()


def test_damaged_and_missing_files_are_refused(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.pth: found no file of weights alone"):
        encoders.load_encoder(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError, match=r"found no file gone\.ckpt"):
        encoders.load_encoder(tmp_path / "gone.ckpt")
