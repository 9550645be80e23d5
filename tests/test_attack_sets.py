"""Attacked images in the cache: told apart by all that makes them, and given back as they were."""

import pytest
import torch
from torch import nn

from cadetlib import attack_sets, encoders


def test_attack_settings_and_cache(tmp_path):
    parameters = {"pgd_eps": 0.1, "pgd_n_steps": 2, "cw_l2_c": 1.0, "cw_l2_n_steps": 3, "cw_l2_ball_eps": 0.5, "seed": 1}
    assert attack_sets.attack_settings("cw_l2", parameters) == {"c": 1.0, "n_steps": 3}
    assert attack_sets.attack_settings("cw_l2_ball", parameters) == {"eps": 0.5}
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 3))
    images, labels = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    made = attack_sets.attack_all(["pgd", "cw_l2"], classifier, images, labels, parameters, tmp_path)
    assert list(made) == ["PGD", "CW-L2"]
    assert len(list(tmp_path.glob("attack-*.safetensors"))) == 2
    again = attack_sets.attack_all(["pgd"], classifier, images, labels, parameters, tmp_path)
    assert torch.equal(again["PGD"], made["PGD"]) and len(list(tmp_path.glob("attack-*.safetensors"))) == 2
    attack_sets.attack_all(["pgd"], classifier, images, labels, parameters | {"pgd_eps": 0.2}, tmp_path)
    assert len(list(tmp_path.glob("attack-*.safetensors"))) == 3, "other settings must not find the cached images"
    with pytest.raises(ValueError, match="found 'pdg'"):
        attack_sets.attacked("pdg", classifier, images, labels)


@pytest.mark.parametrize("other", [dict(std=(0.1, 0.5, 0.3)), dict(stem="cifar-linear")])
def test_another_victim_of_the_same_weights_is_attacked_anew(tmp_path, other):
    """What normalises its input, and how its stem ends, is not among its weights."""
    torch.manual_seed(0)
    one = encoders.ResNet("resnet10", 4, "cifar", 8).eval()
    two = encoders.ResNet(**dict(arch="resnet10", width=4, stem="cifar", image_size=8) | other).eval()
    two.load_state_dict(one.state_dict())
    head, images, labels = nn.Linear(32, 3), torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    for network in (one, two):
        victim = encoders.Classifier(network, head)
        found = attack_sets.attacked("fgsm", victim, images, labels, tmp_path, eps=0.1)
        assert torch.equal(found, attack_sets.attacked("fgsm", victim, images, labels, eps=0.1))


def test_sets_of_images_come_back_as_they_were(tmp_path):
    sets = {"in-distribution": torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8), "PGD": torch.rand(4, 3, 5, 5)}
    loaded = attack_sets.load_sets(tmp_path, attack_sets.save_sets(tmp_path, **sets))
    assert set(loaded) == set(sets) and all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in sets.items())
