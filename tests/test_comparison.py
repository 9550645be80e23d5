"""Rows of Tables 3 and 4: the right images against the right images, and no system that has seen an anomaly before it scores."""

import pytest
import torch
from torch import nn

from cadetlib import (
    attack_sets,
    attack_study,
    attacks,
    cadet,
    claims,
    comparison,
    costs,
    data,
    embed,
    encoders,
    experiments,
    hu,
    metrics,
    questions,
)
from cadetlib.detectors import DETECTORS
from cadetlib.experiments import IN_DISTRIBUTION
from cadetlib.views import EvalViews

NAMES = ["MSP", "Mahalanobis", "ViM", "kNN", "SSD"]
HU = dict(cap_targeted=3, cap_untargeted=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small network with a probe, digits 0 to 4 held out, 5 to 9 unseen, and attacked digits."""
    torch.manual_seed(0)
    network = encoders.ResNet("resnet10", 4, "cifar", 8).eval()
    digits = data.load("digits-test")
    held_out, unseen = digits.of_classes(range(5))[:90], digits.of_classes(range(5, 10))[:40]
    training = data.load("digits-train").of_classes(range(5))[:200]
    file = encoders.save_encoder(network, tmp_path_factory.mktemp("encoder") / "encoder.safetensors")
    known = comparison.known(network, file, training, 8)
    moved = attacks.fgsm(known.classifier, held_out.images, held_out.labels, eps=0.1)
    sets = {IN_DISTRIBUTION: held_out.images, "unseen": unseen.images, "FGSM": moved}
    divisions = experiments.splits(90, 2, 20, 30)
    counted = attack_sets.successful(known.classifier, held_out.images, held_out.labels, {"FGSM": moved})
    field = comparison.Field(sets, {IN_DISTRIBUTION: False, "unseen": False, "FGSM": True}, divisions, counted)
    return network, known, field


def all_rows(network, known, field, encoder="contrastive"):
    views, grid = EvalViews(8), [4]
    sums = experiments.view_sums_of_sets(network, field.sets, views, grid, say=lambda _: None)
    cadet_pairs = {}
    detector = cadet.CADet(network, n_views=4, image_size=8)
    rows, _ = comparison.cadet_rows(encoder, field, sums, detector, cadet_pairs)
    clean = field.sets[IN_DISTRIBUTION][:10]
    tuning = (clean, attack_study.random_signs(clean, 0.2))
    rows += comparison.post_hoc_rows(NAMES, encoder, field, known, cadet_pairs, say=lambda _: None)
    rows += comparison.odin_rows(encoder, field, known, tuning, cadet_pairs, say=lambda _: None)
    small = field.first(15, [name for name in field.anomalies if field.paired[name]])
    return rows + comparison.hu_rows(encoder, small, known, tuning, cadet_pairs, HU, say=lambda _: None)


@pytest.fixture(scope="module")
def rows(world):
    return all_rows(*world)


def of(rows, detector, anomaly):
    (row,) = [r for r in rows if (r["detector"], r["anomaly"]) == (detector, anomaly)]
    return row


def test_settings_reach_their_detector_and_no_other(world, rows):
    _, known, field = world
    training = data.load("digits-train").of_classes(range(5))[:200]
    settings = {"ViM": dict(n_principal=3)}
    told = comparison.post_hoc_rows(["ViM", "MSP"], "contrastive", field, known, {}, settings=settings, say=lambda _: None)
    detector = DETECTORS["ViM"](n_principal=3).fit(known.classifier, training.images, training.labels)
    scores = {name: detector.score_samples(images) for name, images in field.sets.items()}
    for anomaly in field.anomalies:
        expected = [metrics.auroc(*pair) for pair in field.pairs(scores, anomaly)]
        assert of(told, "ViM", anomaly)["splits"] == pytest.approx(expected)
        assert of(told, "ViM", anomaly)["splits"] != of(rows, "ViM", anomaly)["splits"]
        assert of(told, "MSP", anomaly)["splits"] == of(rows, "MSP", anomaly)["splits"]


def test_every_system_has_its_row(rows):
    systems = {row["detector"] for row in rows}
    assert systems == {"CADet", *NAMES, "ODIN", "ODIN tuned", "Hu", "HuSelfCalibrated", "Hu tuned"}
    assert {row["detector"] for row in rows if row["tuned"]} == {"ODIN tuned", "Hu tuned"}
    assert all(row["seconds"] > 0 and row["forwards"] >= 1 and 0 <= row["auroc"] <= 1 for row in rows)
    assert {row["anomaly"] for row in rows if "Hu" in row["detector"]} == {"FGSM"}, "Hu's walks are for attacks"


def test_seconds_are_those_of_one_image(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])

    def score(images):
        clock[0] += 0.5 * len(images)
        return len(images)

    told = []
    found = comparison.timed(score, {"a": torch.rand(8, 3, 2, 2), "b": torch.rand(3, 3, 2, 2)}, told.append)
    assert found == ({"a": 8, "b": 3}, 0.5)
    assert told == ["8 images of a", "3 images of b"]


def test_a_small_field_has_the_attacks_on_its_own_images(world):
    """Test images first, then those to calibrate on, of the first split; of an anomaly that was made from none, its own first."""
    field = world[2]
    small = field.first(7, ["FGSM", "unseen"])
    [own], division = small.divisions, field.divisions[0]
    clean = [*division.test[:7].tolist(), *division.calibration[:7].tolist()]
    for name, images in ((IN_DISTRIBUTION, clean), ("FGSM", clean), ("unseen", range(7))):
        assert torch.equal(small.sets[name], field.sets[name][list(images)]), name
    assert (len(own.reference), own.calibration.tolist(), own.test.tolist()) == (0, [*range(7, 14)], [*range(7)])
    assert {name: mask.tolist() for name, mask in small.successful.items()} == {
        name: field.successful[name][clean].tolist() for name in field.successful
    }


def test_a_row_is_the_mean_over_splits_of_its_own_images(world, rows):
    """MSP by hand: attacked images count where their originals are test images, unseen ones everywhere."""
    _, known, field = world
    with torch.no_grad():
        scores = {name: known.classifier(x.float() / (255 if x.dtype == torch.uint8 else 1)).double().softmax(1).amax(1)
                  for name, x in field.sets.items()}  # fmt: skip
    for anomaly, row in ((a, of(rows, "MSP", a)) for a in ("unseen", "FGSM")):
        expected = [
            metrics.auroc(scores[IN_DISTRIBUTION][d.test], scores[anomaly][d.test] if anomaly == "FGSM" else scores[anomaly])
            for d in field.divisions
        ]
        assert row["splits"] == pytest.approx(expected, abs=2e-3)
        assert row["auroc"] == pytest.approx(sum(expected) / 2, abs=2e-3)


def test_an_attack_is_drawn_with_its_original_and_no_other_anomaly_is(world):
    """In the intervals of an AUROC and of its difference to CADet's; also where CADet alone is asked."""
    _, _, field = world
    generator = torch.Generator().manual_seed(0)
    clean, unseen = torch.randn(90, generator=generator), torch.randn(40, generator=generator) - 0.5
    scores = {IN_DISTRIBUTION: clean, "unseen": unseen, "FGSM": clean - 0.3 + 0.1 * torch.randn(90, generator=generator)}
    other = {name: s + 0.5 * torch.randn(len(s), generator=generator) for name, s in scores.items()}
    theirs = {name: field.pairs(other, name) for name in field.anomalies}
    for row in comparison.rows_of("ours", "contrastive", field, scores, theirs):
        pairs, paired = field.pairs(scores, row["anomaly"]), row["anomaly"] == "FGSM"
        images = [(d.test, d.test if paired else 100 + torch.arange(40)) for d in field.divisions]
        expected = metrics.splits_interval(pairs, n_boot=500, images=images, fitted=0)
        assert (row["low"], row["high"]) == (expected.low, expected.high)
        over = metrics.splits_difference(pairs, theirs[row["anomaly"]], n_boot=500, images=images, fitted=25 / 90)
        assert (row["over_cadet"], row["over_cadet_low"], row["over_cadet_high"]) == over[:3]
    pairs = field.pairs(scores, "FGSM")
    assert experiments.summary(pairs)["low"] < experiments.summary(pairs, field.images("FGSM"), 0)["low"]
    images = torch.rand(90, 3, 8, 8, generator=generator)
    sums = experiments.view_sums_of_sets(nn.Flatten(), {IN_DISTRIBUTION: images, "FGSM": images / 2}, EvalViews(8), [4])
    ask = questions.Asker(sums, {"FGSM": True}, field.divisions)
    expected = metrics.splits_interval(
        ask.pairs("FGSM", 4), n_boot=500, images=[(d.test, d.test) for d in field.divisions], fitted=25 / 90
    )
    assert (ask("FGSM", 4)["low"], ask("FGSM", 4)["high"]) == (expected.low, expected.high)


def test_an_encoder_is_held_against_the_contrastive_one_over_all_splits(world):
    _, _, field = world
    torch.manual_seed(1)
    networks = [encoders.ResNet("resnet10", 4, "cifar", 8).eval() for _ in range(2)]
    sums = [experiments.view_sums_of_sets(net, field.sets, EvalViews(8), [4], say=lambda _: None) for net in networks]
    detectors, cadet_pairs = [cadet.CADet(net, n_views=4, image_size=8) for net in networks], {}
    first, _ = comparison.cadet_rows("contrastive", field, sums[0], detectors[0], cadet_pairs)
    second, _ = comparison.cadet_rows("supervised", field, sums[1], detectors[1], cadet_pairs)
    assert not any("over_cadet" in row for row in first)
    for a, b in zip(first, second, strict=True):
        assert b["over_cadet"] == pytest.approx(b["auroc"] - a["auroc"], abs=1e-9)
        apart = (a["high"] - a["low"]) ** 2 + (b["high"] - b["low"]) ** 2
        assert 0 < b["over_cadet_high"] - b["over_cadet_low"] < 1.5 * apart**0.5
        assert claims.contrastive_better([a, b], {a["anomaly"]}).parts[0].high == -100 * b["over_cadet_low"]


def test_the_difference_to_cadet_is_on_the_same_images(rows):
    for anomaly in ("unseen", "FGSM"):
        ours, theirs = of(rows, "CADet", anomaly), of(rows, "kNN", anomaly)
        assert theirs["over_cadet"] == pytest.approx(theirs["auroc"] - ours["auroc"], abs=1e-9)
        assert theirs["over_cadet_low"] < theirs["over_cadet_high"] and "over_cadet" not in ours
    hu = of(rows, "Hu", "FGSM")
    assert (hu["n_in"], hu["n_out"]) == (15, 15) and "over_cadet" in hu


def test_no_score_depends_on_what_else_is_asked(world, rows):
    """With other anomalies in the place of the unseen ones, FGSM's rows stay to the last bit: nothing fits to anomalies."""
    network, known, field = world
    others = comparison.Field(field.sets | {"unseen": 255 - field.sets["unseen"]}, field.paired, field.divisions)
    changed = all_rows(network, known, others)
    for system in {row["detector"] for row in rows}:
        assert of(changed, system, "FGSM")["splits"] == of(rows, system, "FGSM")["splits"], system
    assert of(changed, "CADet", "unseen")["splits"] != of(rows, "CADet", "unseen")["splits"]


def test_a_head_in_the_file_is_taken_before_a_probe(world, tmp_path):
    network = world[0]
    head = nn.Linear(32, 5)
    file = encoders.save_encoder(network, tmp_path / "classifier.safetensors", head=head)
    training = data.load("digits-train").of_classes(range(5))[:50]
    assert torch.equal(comparison.known(network, file, training, 8).classifier.head.weight, head.weight)
    with pytest.raises(ValueError, match="no labels"):
        comparison.known(network, file, data.ImageSet("bare", training.images), 8)


def test_a_tuned_row_says_what_the_tuned_detector_costs(world, rows):
    _, known, field = world
    chosen = of(rows, "ODIN tuned", "FGSM")["chosen"]
    assert of(rows, "ODIN tuned", "FGSM")["forwards"] == DETECTORS["ODIN"](**chosen).forwards
    tuned, small = of(rows, "Hu tuned", "FGSM"), field.first(15, ["FGSM"])
    detector = hu.Hu(**HU | tuned["chosen"])
    found = [hu.criteria(known.classifier, images[:15], **detector.settings()) for images in small.sets.values()]
    passes = torch.cat([hu.forward_passes(c, detector.cap_targeted, detector.cap_untargeted) for c in found])
    assert tuned["forwards"] == pytest.approx(float(passes.mean()))


def test_hu_walks_cost_at_most_what_is_told(monkeypatch):
    """The costliest rows after training, counted where no image ever leaves its class: as the cost sheet counts them."""
    images, passes = torch.rand(40, 3, 4, 4), []
    known = comparison.Known(encoders.Classifier(nn.Flatten(), nn.Linear(48, 2)), images.flatten(1), torch.arange(40) % 2)
    with torch.no_grad():
        known.classifier.head.weight.mul_(1e-3)
        known.classifier.head.bias.copy_(torch.tensor([9.0, 0.0]))
    field = comparison.Field({IN_DISTRIBUTION: images, "PGD": images}, {"PGD": True}, experiments.splits(40, 1, 5, 10))
    small, steps = field.first(8, ["PGD"]), hu.steps_to_leave
    monkeypatch.setattr(
        hu,
        "steps_to_leave",
        lambda c, x, targeted, lr, r, cap, *rest: passes.append(len(x) * cap) or steps(c, x, targeted, lr, r, cap, *rest),
    )
    said = []
    comparison.hu_rows("contrastive", small, known, (images[:6], images[6:12]), {}, HU, say=said.append)
    assert "Hu, contrastive encoder: walks of 8 images of PGD" in said and "Hu tuned" in said[-1], "hours without a word"
    given = dict(n_hu=8, n_tuning=6, attacks=["pgd"], hu_cap_targeted=3, hu_cap_untargeted=3)
    assert sum(passes) == costs.hu_steps(given, n_held_out=40)


def test_the_population_of_published_programs_by_hand(world, rows):
    """Only images that the victim gets right against attacks that then fool it; no such column for unseen classes."""
    _, known, field = world
    labels = data.load("digits-test").of_classes(range(5))[:90].labels
    clean, moved = field.sets[IN_DISTRIBUTION] / 255, field.sets["FGSM"]
    right, fooled = (known.classifier(images).argmax(dim=1) == labels for images in (clean, moved))
    fooled = right & ~fooled
    detector = DETECTORS["MSP"]().fit_features(known.features, known.labels, known.classifier.head)
    scores = {name: detector.score_features(embed.embed(known.classifier.encoder, x)) for name, x in field.sets.items()}
    row = of(rows, "MSP", "FGSM")
    expected = [
        metrics.auroc(scores[IN_DISTRIBUTION][d.test][right[d.test]], scores["FGSM"][d.test][fooled[d.test]])
        for d in field.divisions
    ]
    assert row["auroc_successful"] == pytest.approx(sum(expected) / len(expected)) != row["auroc"]
    assert (row["n_in_successful"], row["n_out_successful"]) == tuple(
        int(m[field.divisions[0].test].sum()) for m in (right, fooled)
    )
    assert "auroc_successful" not in of(rows, "MSP", "unseen")
