"""CADet on other encoders: each row is what CADet itself gives with that encoder."""

import pytest
import torch
from torch import nn

from cadetlib import backbones, encoders, experiments, metrics
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
