"""The public CIFAR-10 classifiers: their published accuracy on the real test images, and damaged or missing files."""

import pytest
import torch

from cadetlib import attacks, cifar_resnet, data, profiles


@pytest.fixture
def weights_there():
    if not (data.root() / cifar_resnet._FOLDER).is_dir():
        pytest.skip("needs the public ResNets below CADET_DATA")


@pytest.mark.data
@pytest.mark.parametrize(("name", "accuracy"), [("resnet20", 0.9173), ("resnet56", 0.9339)])
def test_public_weights_reach_their_published_accuracy(weights_there, name, accuracy):
    test, n = data.load("cifar10-test")[:500], 500
    found = attacks.accuracy(cifar_resnet.load(name), test.images, test.labels)
    assert abs(found - accuracy) < 4 * (accuracy * (1 - accuracy) / n) ** 0.5


@pytest.mark.data
def test_a_flipped_byte_in_the_weights_is_refused(weights_there, tmp_path, monkeypatch):
    name, file = "resnet20", cifar_resnet.WEIGHTS["resnet20"][1]
    content = bytearray((data.root() / cifar_resnet._FOLDER / file).read_bytes())
    content[5000] ^= 1
    (tmp_path / cifar_resnet._FOLDER).mkdir(parents=True)
    (tmp_path / cifar_resnet._FOLDER / file).write_bytes(content)
    monkeypatch.setenv("CADET_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="expected 12fca82f"):
        cifar_resnet.load(name)


@pytest.mark.parametrize(("number", "names"), [("03", ["resnet20"]), ("05", ["resnet20", "resnet56"]), ("02", [])])
def test_a_profile_asks_for_its_victims_before_it_runs(tmp_path, monkeypatch, number, names):
    monkeypatch.setenv("CADET_DATA", str(tmp_path))
    chosen = [notebook for notebook in profiles.notebooks_of("cifar10-cpu") if notebook.number == number]
    lines = profiles.missing_weights(chosen)
    assert len(lines) == len(names) and all(f"take pretrained_models/{n}" in line for n, line in zip(names, lines, strict=True))


def test_missing_weights_are_said_with_the_step_that_gets_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CADET_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pytorch_resnet_cifar10"):
        cifar_resnet.load("resnet56")
    with pytest.raises(ValueError, match="resnet20"):
        cifar_resnet.load("resnet18")


def test_shortcuts_skip_pixels_and_pad_channels():
    block = cifar_resnet._Block(2, 4).eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)  # nothing but the shortcut is left
    x = torch.rand(1, 2, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2]) and not out[:, [0, 3]].any()
