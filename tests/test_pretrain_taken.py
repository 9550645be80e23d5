"""Weights that others have trained, in the place of a training: the same features, the same classifier, or a refusal."""

from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models

from cadetlib import encoders, experiments, run_files, trained, training_settings

GIVEN = dict(profile="tiny", data="digits-train", arch="resnet18", width=64, stem="imagenet", image_size=32, epochs=800)
N_CLASSES = 10


@pytest.fixture
def network():
    """torchvision's ResNet-18 of ten classes, with batch norm's statistics as training leaves them."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = models.resnet18(num_classes=N_CLASSES)
        made(torch.rand(8, 3, 32, 32))
    return made.eval()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A data root, and where notebook 01 writes."""
    monkeypatch.setenv("CADET_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "weights").mkdir(parents=True)
    return tmp_path


def logits(network, images):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoders.IMAGENET_MEAN, encoders.IMAGENET_STD))
    with torch.no_grad():
        return network((images - mean) / std)


def without_head(network):
    return {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}


def test_a_checkpoint_below_the_data_root_takes_the_place_of_a_training(place, network, monkeypatch):
    """MoCo's names; what notebook 01 and those after it ask of a run's folder."""
    weights = {f"module.encoder_q.{k}": v for k, v in without_head(network).items()}
    torch.save({"state_dict": weights, "epoch": 200}, place / "data" / "weights" / "moco.pth.tar")
    monkeypatch.setattr(trained, "launch", None)  # nothing is trained
    folder = trained.obtain(GIVEN | dict(output=str(place / "out"), pretrained="weights/moco.pth.tar"))
    assert folder.parent == place / "out" / "pretraining"
    (encoder,) = experiments.load_encoders(place, {"contrastive": folder / "encoder.safetensors"}).values()
    images = torch.rand(3, 3, 32, 32)
    network.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(encoder.cpu()(images), logits(network, images), rtol=1e-4, atol=1e-5)
    assert trained.origin(folder) == "moco.pth.tar, trained by others"
    assert [line["epoch"] for line in run_files.read_log(folder / "log.jsonl")] == [800] and run_files.snapshots(folder) == {}
    assert str(place) not in (folder / "log.jsonl").read_text()


def test_torchvisions_classifier_comes_with_its_head(place, network, monkeypatch):
    backbone = models.resnet18(num_classes=N_CLASSES)
    backbone.load_state_dict(network.state_dict())
    monkeypatch.setattr(models, "get_model", lambda name, weights: backbone)
    before = backbone.fc
    given = GIVEN | dict(output=str(place), supervised_pretrained="torchvision:resnet18")
    taken_apart = []
    monkeypatch.setattr(encoders, "_drop_classifier", lambda net: taken_apart.append(net) or setattr(net, "fc", nn.Identity()))
    head_of = trained._head_of
    monkeypatch.setattr(trained, "_head_of", lambda *about: setattr(backbone, "fc", before) or head_of(*about))
    folder = trained.obtain(given, "supervised")
    victim = experiments.load_victim(place, {"supervised": folder / "encoder.safetensors"}).cpu()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(victim(images), logits(network, images), rtol=1e-4, atol=1e-4)
    assert taken_apart and trained.origin(folder) == "torchvision:resnet18, trained by others"


def test_the_own_format_and_the_wrong_classifier(place, network):
    encoder = encoders.ResNet("resnet10", 4, "cifar", 32)
    file, odd, bare = (place / "data" / "weights" / f"{name}.safetensors" for name in ("own", "odd", "bare"))
    encoders.save_encoder(encoder, file, head=nn.Linear(32, N_CLASSES))
    encoders.save_encoder(encoder, odd, head=nn.Linear(32, 1000))
    encoders.save_encoder(encoder, bare)
    given = GIVEN | dict(output=str(place))
    folder = trained.obtain(given | dict(supervised_pretrained=str(file)), "supervised")
    assert encoders.fingerprint(encoders.load_encoder(folder / "encoder.safetensors")) == encoders.fingerprint(encoder)
    for name, problem in ((odd, "classifier of 1000 classes and 10 in digits-train"), (bare, "without a linear classifier")):
        with pytest.raises(ValueError, match=f"supervised_pretrained: found .*{problem}"):
            trained.obtain(given | dict(supervised_pretrained=str(name)), "supervised")
    torch.save(network.state_dict(), place / "data" / "weights" / "plain.pth")
    with pytest.raises(ValueError, match="without a linear classifier, expected 'torchvision:NAME'"):
        trained.obtain(given | dict(supervised_pretrained="weights/plain.pth"), "supervised")


def test_a_network_that_only_has_the_names_of_a_resnet_is_refused(network):
    """Its weights fit, but it computes something else: here without the last ReLU."""
    network.fc = nn.Identity()
    twin = encoders._Backbone(network, 32, encoders.IMAGENET_MEAN, encoders.IMAGENET_STD, "timm:twin").eval()
    assert isinstance(trained._as_resnet(twin, "timm:twin"), encoders.ResNet)
    network.layer4[1].relu = nn.GELU()
    with pytest.raises(ValueError, match="timm:twin: found a network that "):
        trained._as_resnet(twin, "timm:twin")


def test_what_is_not_there_is_said_with_the_step_that_gets_it(place, monkeypatch):
    given = GIVEN | dict(output=str(place), pretrained="weights/simclr.torch", supervised_pretrained="torchvision:resnet18")
    with pytest.raises(FileNotFoundError, match=r"pretrained: found no file .*data/weights/simclr\.torch .*vissl/model_zoo"):
        trained.obtain(given)

    def offline(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        FileNotFoundError, match=r"resnet18: found no weights here.*no route.*cadetlib\.backbones torchvision:resnet18"
    ):
        trained.obtain(given, "supervised")
    assert [line.split(":")[0] for line in trained.missing_weights(given)] == ["pretrained"]


def test_both_are_no_settings_of_a_training():
    """A run is found again whatever is taken for the other one."""
    given = GIVEN | dict(pretrained="a.pth", supervised_pretrained="torchvision:resnet50", supervised_epochs=90)
    plain = {k: v for k, v in given.items() if "pretrained" not in k}
    for objective in ("contrastive", "supervised"):
        assert training_settings.settings_from(given, objective) == training_settings.settings_from(plain, objective)
    with pytest.raises(ValueError, match="pretrained: found the whole number 3, expected a string"):
        training_settings.settings_from(GIVEN | dict(pretrained=3))
