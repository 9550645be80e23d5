"""What users' code calls: names, the order of what they are given, and defaults, which are the paper's or Algorithm 1 to 3's."""

import importlib
import inspect

import pytest
from torchvision import transforms

from cadetlib import detectors, two_sample, views
from cadetlib.cadet import CADet

REQUIRED = inspect.Parameter.empty
MMD = dict(n_perm=500, seed=0)  # Section 4.1: "500 permutations"
PGD = dict(eps=0.02, step=0.002, n_steps=50)  # Section 5.1
GIVEN = dict(classifier=REQUIRED, images=REQUIRED, labels=REQUIRED)

SIGNATURES = {
    "mmd.mmd2_unbiased": dict(x=REQUIRED, y=REQUIRED),
    "mmd.mmd_test": dict(x=REQUIRED, y=REQUIRED) | MMD,
    "mmd.mmd_cc_test": dict(x1=REQUIRED, x2=REQUIRED, y=REQUIRED) | MMD,
    "cadet.view_similarities": dict(z=REQUIRED, mu=REQUIRED),
    "cadet.CADet": dict(encoder=REQUIRED, n_views=50, crop_scale=0.75, image_size=32, seed=0),  # Section 5.1: 50 views of 0.75
    "cadet.CADet.fit": dict(self=REQUIRED, reference_images=REQUIRED, calibration_images=REQUIRED),
    "cadet.CADet.predict": dict(self=REQUIRED, images=REQUIRED, alpha=0.05),
    "cadet.CADet.load": dict(path=REQUIRED, encoder=REQUIRED),
    "losses.info_nce": dict(z0=REQUIRED, z1=REQUIRED, tau=0.1),  # Section 3
    "attacks.fgsm": GIVEN | dict(eps=0.05),  # Section 5.1
    "attacks.pgd": GIVEN | PGD,
    "attacks.cw": GIVEN,
    "metrics.auroc": dict(in_scores=REQUIRED, out_scores=REQUIRED),
    "encoders.load_encoder": dict(name=REQUIRED),
    "encoders.Classifier": dict(encoder=REQUIRED, head=REQUIRED),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_name_takes_what_the_contract_says(name):
    module, *attributes = name.split(".")
    found = importlib.import_module(f"cadetlib.{module}")
    for attribute in attributes:
        found = getattr(found, attribute)
    parameters = inspect.signature(found).parameters
    expected = SIGNATURES[name]
    in_order = [p for p in parameters if p in expected]
    assert in_order == list(expected)
    assert {p: parameters[p].default for p in in_order} == expected
    # What else there is, nobody has to give.
    others = [p for n, p in parameters.items() if n not in expected]
    assert all(p.default is not REQUIRED or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in others)


def test_every_row_of_the_tables_has_its_system():
    rows_of_table_3 = "MSP Energy ODIN MaxLogit KLMatching ReAct Mahalanobis Residual ViM Hu HuSelfCalibrated".split()
    assert set(rows_of_table_3) <= set(detectors.DETECTORS)
    assert set(two_sample.TESTS) == {"ME", "C2ST-S", "C2ST-L", "MMD-D", "MMD", "MMD-CC"}


def test_views_are_drawn_as_torchvision_draws_unless_told_otherwise():
    """T_eval's crop scale is the paper's, T_train's torchvision's (SimCLRv2), the ratio both times torchvision's."""
    theirs = inspect.signature(transforms.RandomResizedCrop).parameters
    for make in (views.EvalViews(8), views.TrainViews(8)):
        assert make.ratio == pytest.approx(theirs["ratio"].default)
    assert views.TrainViews(8).crop_scale == theirs["scale"].default
    assert views.EvalViews(8).crop_scale == inspect.signature(CADet).parameters["crop_scale"].default == 0.75
