"""The study's own parts: the control, the layers, and rows that are those of the ablations."""

import json

import pytest
import torch
from torch import nn

from cadetlib import attack_study, attacks, encoders, experiments, questions
from cadetlib.views import EvalViews

OF_04 = dict(fgsm_eps=0.2, pgd_eps=0.2, pgd_step=0.02, pgd_n_steps=2)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return encoders.ResNet("resnet10", 4, "cifar", 8).eval()


def test_random_signs_move_every_value_by_eps_at_random():
    images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    change = attack_study.random_signs(images, 0.1) - images
    assert torch.allclose(change.abs(), torch.full_like(change, 0.1), atol=1e-6)
    assert abs(float((change > 0).double().mean()) - 0.5) < 4 * 0.5 / change.numel() ** 0.5
    assert torch.equal(attack_study.random_signs(images[3:5], 0.1), attack_study.random_signs(images, 0.1)[3:5])
    assert float(attack_study.random_signs(torch.ones(1, 3, 2, 2), 0.1).max()) == 1.0


def test_layers_are_the_encoders_own(network):
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(attack_study.AtLayer(network, "layer4")(images), network(images))
    assert [attack_study.AtLayer(network, f"layer{i}")(images).shape[1] for i in (1, 2, 3)] == [4, 8, 16]
    with pytest.raises(ValueError, match="layer5"):
        attack_study.AtLayer(network, "layer5")
    with pytest.raises(ValueError, match="found Identity"):
        attack_study.AtLayer(nn.Identity(), "layer1")


def test_a_network_before_training_is_one_and_the_same(network):
    torch.manual_seed(1)
    fresh, state = attack_study.untrained(network), torch.get_rng_state()
    torch.manual_seed(2)
    again = attack_study.untrained(network)
    assert encoders.fingerprint(fresh) == encoders.fingerprint(again) != encoders.fingerprint(attack_study.untrained(network, 1))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "whoever asks has his own random numbers left"
    assert not fresh.training


def test_rows_agree_with_the_ablations(network):
    images, labels = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(30).long()
    victim = encoders.Classifier(network, nn.Linear(32, 2)).eval()
    attacked = attack_study.attack_at(0.05, ["fgsm"], victim, images, labels, OF_04)
    assert set(attacked) == {"FGSM", attack_study.CONTROL}
    views, divisions = EvalViews(8), experiments.splits(30, 3, 6, 12)
    study = attack_study.Study(network, victim, images, labels, attacked, views, 4, divisions)
    sums = experiments.view_sums_of_sets(network, {"in-distribution": images, **attacked}, views, [4], say=lambda _: None)
    ask = questions.Asker(sums, {"in-distribution": False, "FGSM": True, attack_study.CONTROL: True}, divisions)
    rows = study.rows("size", 8)
    assert rows[0]["auroc"] == ask("FGSM", 4)["auroc"] and rows[0]["m_in"] == ask("FGSM", 4, experiments.m_in_only)["auroc"]
    assert {row["anomaly"] for row in rows} == set(attacked) and {(row["factor"], row["value"]) for row in rows} == {("size", 8)}
    other = study.but(views=EvalViews(8, crop_scale=0.3)).rows("area", 0.3)
    assert other[0]["m_in"] != rows[0]["m_in"]
    with pytest.raises(ValueError, match="found FGSM and random signs, expected two sets that were made from"):
        attack_study.over_signs(questions.Asker(sums, ask.paired | {"FGSM": False}, divisions), "FGSM", 4)
    with pytest.raises(ValueError, match="cw"):
        attack_study.attack_at(0.1, ["cw"], victim, images, labels, OF_04)


def test_pgd_at_another_strength_is_that_of_notebook_04_scaled(network):
    """Two steps of a tenth of the radius; more iterations would move the images further."""
    images, labels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(6) % 2
    victim = encoders.Classifier(network, nn.Linear(32, 2)).eval()
    made = attack_study.attack_at(0.1, ["pgd"], victim, images, labels, OF_04)["PGD"]
    assert torch.allclose(made, attacks.pgd(victim, images, labels, eps=0.1, step=0.01, n_steps=2))
    assert not torch.allclose(made, attacks.pgd(victim, images, labels, eps=0.1, step=0.01, n_steps=50))


@pytest.mark.parametrize("eps", [float("nan"), -0.1, "a"])
def test_a_change_of_no_size_is_refused(eps):
    with pytest.raises(ValueError, match="eps: found"):
        attack_study.random_signs(torch.rand(1, 3, 4, 4), eps)


def test_areas_of_a_view_stand_apart_from_epochs():
    rows = [dict(width=64, epoch=epoch, crop_scale=scale) for epoch in (0, 150) for scale in (0.75, 0.9)]
    assert [(r["factor"], r["value"], r["crop_scale"]) for r in attack_study.of_training(rows)] == [
        ("epochs, at width 64", 0, 0.75),
        ("epochs, at width 64", 150, 0.75),
        ("area, width 64, trained to the end", 0.75, 0.75),
        ("area, width 64, trained to the end", 0.9, 0.9),
    ]


def test_what_benchmarks_measured_is_told_with_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("CADET_ROOT", str(tmp_path))
    folder = tmp_path / "outputs" / "reference" / "some"
    folder.mkdir(parents=True)
    assert attack_study.kept("some") == []
    row, clean = dict(anomaly="PGD", auroc=0.9, low=0.8, high=1.0, m_in=0.7), dict(commit="a" * 40, dirty=False)
    grid = [row | dict(crop_scale=scale, n_views=n) for scale in (0.5, 0.9) for n in (2, 50)]
    (folder / "own_features.json").write_text(json.dumps(dict(network="cifar:resnet20", commit=clean, rows=grid)))
    ends = [row | dict(width=width, epoch=9) for width in (16, 32)] + [row | dict(width=16, epoch=9, anomaly="svhn")]
    changed = dict(commit="b" * 40, dirty=True)
    (folder / "training_curve.json").write_text(json.dumps(dict(commit=changed, rows=ends)))
    earlier = [row | dict(factor="epochs of 40, width 32", value=32), row | dict(anomaly="svhn", factor="encoder", value="own")]
    (folder / "training_epochs.json").write_text(json.dumps(dict(commit=clean, rows=earlier)))
    found = attack_study.kept("some")
    assert [(r["factor"], r["value"]) for r in found] == [
        ("area, in cifar:resnet20's own features", 0.5),
        ("area, in cifar:resnet20's own features", 0.9),
        ("views of area 0.9, in cifar:resnet20's own features", 2),
        ("views of area 0.9, in cifar:resnet20's own features", 50),
        ("epochs, at width 16", 9),
        ("epochs, at width 32", 9),
        ("width, trained to the end", 16),
        ("width, trained to the end", 32),
        ("epochs of 40, width 32", 32),
    ]
    assert {r["commit"] for r in found} == {"aaaaaaa", "bbbbbbb and changes"}


def test_an_attack_is_held_against_random_signs_on_the_same_images():
    """Where both were asked, though their own intervals overlap; else beyond both intervals."""
    signs, close = dict(auroc=0.6, low=0.5, high=0.7), dict(auroc=0.65, low=0.55, high=0.75)
    assert attack_study.how_seen(close, signs) == "seen as noise"
    assert attack_study.how_seen(close | dict(over_signs_low=0.01), signs) == "seen as an attack"
    assert attack_study.how_seen(dict(auroc=0.8, low=0.75, high=0.85, over_signs_low=-0.01), signs) == "seen as noise"
    assert attack_study.how_seen(dict(auroc=0.5, low=0.45, high=0.55, over_signs_low=0.1), signs) == "not seen"
