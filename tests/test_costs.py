"""A profile's costs, against what a run of it looked at; and the rates that turn them into hours, against counted passes."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from cadetlib import costs, data, encoders, profiles, record, training_settings

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("throughput", ROOT / "benchmarks" / "throughput.py")
throughput = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(throughput)


def costs_of(profile):
    """Skips where the profile's sets, whose images are counted, are not at hand."""
    if profile.startswith("cifar10") and (missing := data.missing(["cifar10-train", "svhn-first1083"])):
        pytest.skip(missing[0])
    return {cost.what: cost for cost in costs.of_profile(profile)}


def test_the_papers_costs_by_hand():
    """Section 3: two views of each image, 800 times; Section 5: 50 views of 7,300 images, 12,000 others and five attacks."""
    found = costs_of("imagenet")
    assert found["01 contrastive"].trained == 800 * 2 * 1_281_167
    assert found["04 CADet, two encoders"].forward == 2 * 50 * (6 * 7300 + 2000 + 10_000)
    assert found["04 attacks"].attacked == 7300 * (4 * 50 + 1)
    assert found["04 attacks"].disk > 5 * 7300 * 3 * 224**2 * 4
    assert costs_of("imagenet-pretrained")["01 contrastive"].trained == 0


def test_the_readmes_cost_sheet_is_what_the_parameters_ask_for():
    """Passes, FLOPs and GB of each row; a forward pass is 8.2 GFLOPs and one that goes back three times that."""
    page = (ROOT / "README.md").read_text()
    rows = [line.split("|")[1:-1] for line in page[page.index("| what | passes of") :].split("\n\n")[0].splitlines()[2:]]
    units = dict(G=1e9, M=1e6, k=1e3)
    found = {cost.what.removesuffix(", at most"): cost for cost in costs.of_profile("imagenet")}
    assert [re.sub(r", \d+ epochs", "", what.strip()) for what, *_ in rows] == list(found)
    for cost, (what, passes, flops, _, gigabytes) in zip(found.values(), rows, strict=True):
        numbers = re.findall(r"([\d.]+) ([GMk])", passes)
        said = [float(number) * units[unit] for number, unit in numbers]
        assert said == pytest.approx([n for n in (cost.trained, cost.forward, cost.attacked) if n], rel=0.05), what
        asked = 8.2e9 * (3 * cost.trained + cost.forward + 3 * cost.attacked)
        assert float(flops.replace("at most", "")) == pytest.approx(asked, rel=0.05), what
        assert float(gigabytes.strip() or 0) == pytest.approx(cost.disk / 1e9, abs=0.06, rel=0.02), what


def test_imagenet_pretrained_is_imagenet_without_the_training():
    named = {"profile", "pretrained", "supervised_pretrained"}
    for one, other in zip(*(profiles.notebooks_of(profile) for profile in ("imagenet", "imagenet-pretrained")), strict=True):
        different = {k for k in one.parameters if one.parameters[k] != other.parameters[k]}
        assert different <= (named if one.number == "01" else {"profile"}), one.name


@pytest.mark.parametrize("profile", ["digits", "cifar10-cpu"])
def test_scoring_costs_what_the_kept_run_scored(profile):
    run, _ = record.load(ROOT / "outputs" / "reference" / profile / "04_cadet_tables.json")
    scored = sum(images["n"] for images in run["sets"])
    assert costs_of(profile)["04 CADet, two encoders"].forward == 2 * run["settings"]["n_views"] * scored


def test_pretraining_costs_what_the_kept_run_trained():
    """Up to the images that are left over when an epoch ends."""
    run, about = record.load(ROOT / "outputs" / "reference" / "cifar10-cpu" / "01_pretraining.json")
    trained = 2 * run["logs"]["contrastive"][-1]["step"] * about["parameters"]["batch_size"]
    assert trained <= costs_of("cifar10-cpu")["01 contrastive"].trained < 1.01 * trained


def test_other_recipes_are_counted_where_they_are_trained():
    """Three of the digits', of 20 epochs each; those of cifar10-cpu are taken only if they are there."""
    found = costs_of("digits")
    epochs = profiles.notebooks_of("digits")[1].parameters["epochs"]
    assert found["01 other recipes"].trained == 3 * 20 * found["01 contrastive"].trained // epochs
    assert "01 other recipes" not in costs_of("cifar10-cpu")


def test_the_command_line_tells_hours_only_with_rates(tmp_path, capsys):
    assert costs.main(["imagenet"]) == 0 and "hours" not in capsys.readouterr().out
    file = tmp_path / "throughput.json"
    told = dict(
        what="imagenet scale, float32", hardware={"cpu": "slow"}, rates=dict(trained=569407.555, forward=1.0, attacked=1.0)
    )
    file.write_text(json.dumps(told))
    assert costs.main(["imagenet", "--rates", str(file)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("01 contrastive"))
    assert line.split()[-1] == "1.00"  # 2,049,867,200 views at 569,407.6 a second
    file.write_text(json.dumps(told | {"rates": dict(trained=0.0, forward=1.0, attacked=1.0)}))
    assert costs.main(["imagenet", "--rates", str(file)]) == 2
    assert "rates: trained: found 0.0" in capsys.readouterr().err


def test_flops_are_those_of_a_convolution():
    """3 x 3 taps of 5 channels for each of 7 channels and 8 x 8 pixels, a product and a sum each; backward as much again."""
    layer, x = nn.Conv2d(5, 7, 3, padding=1, bias=False), torch.rand(2, 5, 8, 8)
    once = 2 * 2 * 7 * 5 * 9 * 64
    assert throughput.flops(lambda: layer(x)) == once
    assert throughput.flops(lambda: layer(x).sum().backward()) == 2 * once
    assert throughput.flops(lambda: layer(x.requires_grad_()).sum().backward()) == 3 * once


@pytest.mark.parametrize("kind", costs.KINDS)
def test_work_makes_the_passes_that_it_is_timed_for(kind, monkeypatch):
    seen = []
    forward = encoders.ResNet.forward
    monkeypatch.setattr(encoders.ResNet, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    settings = training_settings.Settings(arch="resnet10", width=8, stem="cifar", image_size=8, head_hidden=8, head_dim=8)
    run, passes, images, flops = throughput.work_of(throughput.Scale(settings, 60, 60), "float32", torch.device("cpu"))[kind]
    seen.clear()
    run()
    assert passes <= sum(seen) <= passes + 1  # an attack first looks at what the classifier makes of one image
    assert passes == images * {"trained": 2, "forward": throughput.N_VIEWS, "attacked": throughput.PGD_STEPS}[kind]
    made = encoders.ResNet("resnet10", 8, "cifar", 8).eval()
    forward_flops = throughput.flops(lambda: made(torch.rand(1, 3, 8, 8)))
    assert flops / forward_flops == pytest.approx({"trained": 3, "forward": 1, "attacked": 2}[kind], rel=0.05)
