"""CADet on other encoders: each row is what CADet itself gives with that encoder."""

import huggingface_hub
import pytest
import timm
import torch
from torch import nn
from torchvision import models

from cadetlib import backbones, encoders, experiments, metrics, profiles
from cadetlib.cadet import CADet
from cadetlib.views import EvalViews


@pytest.fixture(scope="module")
def sets() -> dict[str, torch.Tensor]:
    images = torch.rand(40, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return {"in-distribution": images, "darker": images / 2, "others": 1 - images[:10].square()}


def test_rows_are_what_cadet_gives_at_the_encoders_own_size(sets):
    torch.manual_seed(0)
    encoder = encoders.ResNet("resnet10", width=4, stem="cifar", image_size=8).eval()
    paired = {"in-distribution": False, "darker": True, "others": False}
    divisions = experiments.splits(40, n_splits=2, n_reference=10, n_calibration=10)
    rows = backbones.rows("tiny", encoder, sets, paired, divisions, EvalViews(12, seed=5), [3, 6], 6)
    assert [(row["encoder"], row["anomaly"], row["dim"]) for row in rows] == [("tiny", "darker", 32), ("tiny", "others", 32)]
    aurocs = []
    for division in divisions:
        held_out = sets["in-distribution"]
        detector = CADet(encoder, n_views=6, image_size=8, seed=5).fit(
            held_out[division.reference], held_out[division.calibration]
        )
        normal = detector.score_samples(held_out[division.test])
        aurocs.append(metrics.auroc(normal, detector.score_samples(sets["darker"][division.test])))
    assert rows[0]["auroc"] == pytest.approx(sum(aurocs) / 2, abs=1e-9)
    assert rows[0]["millions_of_weights"] == pytest.approx(encoders.n_parameters(encoder) / 1e6)


def test_backbones_by_name(tmp_path):
    file = encoders.save_encoder(encoders.ResNet("resnet10", width=4, stem="cifar", image_size=8), tmp_path / "e.safetensors")
    loaded = backbones.load(str(file))
    assert isinstance(loaded, nn.Module) and loaded.image_size == 8 and not loaded.training
    with pytest.raises(ValueError, match="expected 'torchvision:NAME'"):
        backbones.load("resnet50")


def test_weights_that_are_not_on_this_machine_are_said_before_a_notebook_asks_for_them(tmp_path, monkeypatch):
    vit, resnet = "timm:vit_small_patch16_224.dino", "torchvision:resnet101"
    cache = tmp_path / "hub"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, file: _in_cache(cache, repo, file)
    )  # its own default for the folder was read at import
    monkeypatch.setenv("CADET_DATA", str(tmp_path))
    lines = backbones.missing([vit, resnet, "cifar:resnet20", "timm:no_such_model", resnet])
    assert [line.partition(" on this machine")[0] for line in lines[:2]] == [
        f"found no weights of {name}" for name in (vit, resnet)
    ]
    assert f"python -m cadetlib.backbones {resnet}" in lines[1] and "resnet20-12fca82f.th" in lines[2] and len(lines) == 3
    said = [line for n in profiles.notebooks_of("imagenet-pretrained") for line in profiles.missing_weights([n])]
    assert [name for name in (vit, resnet, "torchvision:resnet50") if any(f"weights of {name} " in line for line in said)] == [
        vit,
        resnet,
        "torchvision:resnet50",
    ]

    url = models.get_model_weights("resnet101").IMAGENET1K_V1.url
    file = tmp_path / "checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir()
    file.touch()
    snapshot = cache / f"models--{timm.models.get_pretrained_cfg(vit[5:]).hf_hub_id.replace('/', '--')}"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("abc")
    (snapshot / "snapshots" / "abc").mkdir(parents=True)
    (snapshot / "snapshots" / "abc" / "model.safetensors").touch()
    assert backbones.missing([vit, resnet]) == []


def _in_cache(cache, repo, file, look=huggingface_hub.try_to_load_from_cache):
    return look(repo, file, cache_dir=cache)


def test_the_command_fetches_what_it_can_and_says_the_rest(tmp_path, capsys):
    file = encoders.save_encoder(encoders.ResNet("resnet10", width=4, stem="cifar", image_size=8), tmp_path / "e.safetensors")
    assert backbones.main([str(file)]) == 0
    assert backbones.main(["torchvision:nothing", str(file)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0] == said[2] and "images of side 8" in said[0]
    assert "found no model 'nothing'" in said[1]
