"""The experiments' bookkeeping: who is drawn, who is fitted on, who is scored; and their numbers on cases that can be known."""

import dataclasses
from types import MappingProxyType

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from cadetlib import cadet, data, embed, experiments, metrics, questions
from cadetlib.views import EvalViews


def unit_sums(n, seed, shift=0.0, dim=8, grid=(2, 4)):
    """View sums of n made-up images, whose views scatter around a direction of their own."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(n, 1, dim, generator=generator) + 1 + shift
    z = centre + (0.3 + shift) * torch.randn(n, grid[-1], dim, generator=generator)
    m_in, means = embed.sums_of_views(z, grid)
    return embed.ViewSums(tuple(grid), m_in, means.float())


def test_anomalies_made_of_held_out_images_are_left_out():
    digits = data.load("digits-test")
    noisy = data.load("digits-test:gaussian_noise-3")
    held_out = experiments.some_of(digits, 700, 0)
    clean = data.ImageSet(noisy.name, digits.images)  # the same pictures under the corrupted set's name: to be recognised
    chosen = experiments.anomalous(clean, 0, 8, "digits-test", 700, 0)
    seen = {image.numpy().tobytes() for image in held_out.images}
    assert len(chosen) == 300 and not any(image.numpy().tobytes() in seen for image in chosen)
    assert len(experiments.anomalous(noisy, 120, 8, "digits-test", 700, 0)) == 120
    assert len(experiments.anomalous(data.load("digits-7-to-9"), 50, 8, "digits-test", 700, 0)) == 50


def test_splits_are_disjoint_seeded_and_checked():
    first, second = experiments.splits(100, 2, 20, 30, seed=5)
    for division in (first, second):
        parts = torch.cat([division.reference, division.calibration, division.test])
        assert sorted(parts.tolist()) == list(range(100))
    assert first.test.tolist() != second.test.tolist()
    assert experiments.splits(100, 1, 20, 30, seed=5)[0].test.tolist() == first.test.tolist()
    with pytest.raises(ValueError, match="found 50 held-out images"):
        experiments.splits(50, 1, 20, 30)


def test_an_image_is_never_calibrated_on_in_one_form_and_scored_in_another():
    """Attacked image i counts in a split only when clean image i is a test image of it; and fit never sees an anomaly."""
    held_out, moved = unit_sums(60, 0), unit_sums(60, 1, shift=0.5)
    divisions = experiments.splits(60, 3, 10, 20, seed=0)
    pairs = experiments.pairs_of_splits(held_out, moved, True, divisions, 4)
    for division, (inside, outside) in zip(divisions, pairs, strict=True):
        detector = cadet.CADet(nn.Identity(), n_views=4)
        detector.fit_sums(held_out[division.reference], held_out[division.calibration])
        assert torch.equal(inside, detector.score_sums(held_out[division.test]))
        assert torch.equal(outside, detector.score_sums(moved[division.test]))
    other = experiments.pairs_of_splits(held_out, unit_sums(60, 2, shift=3.0), True, divisions, 4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(pairs, other, strict=True)), "other anomalies changed the clean scores"
    with pytest.raises(ValueError, match="60 images"):
        experiments.pairs_of_splits(held_out, moved[:10], True, divisions, 4)


def test_the_score_is_made_of_its_parts():
    sums = {"in-distribution": unit_sums(60, 0), "odd": unit_sums(40, 1, shift=0.5)}
    ask = questions.Asker(sums, {"in-distribution": False, "odd": False}, experiments.splits(60, 3, 10, 20, seed=0))
    assert ask("odd", 4, experiments.weighted(0.0)) == ask("odd", 4, experiments.m_in_only)
    assert ask("odd", 4, experiments.weighted(1.0)) == ask("odd", 4)
    assert ask("odd", 4, experiments.weighted(1e9))["auroc"] == pytest.approx(ask("odd", 4, experiments.m_out_only)["auroc"])
    assert ask("odd", 4, n_reference=10) == ask("odd", 4) != ask("odd", 4, n_reference=2)
    alone = ask.pairs("odd", 4, experiments.m_in_only)
    assert ask("odd", 4, experiments.m_in_only) == {"anomaly": "odd"} | experiments.summary(alone, ask.images("odd"), fitted=0)
    assert experiments.hangs_on_fit(ask.pairs("odd", 4), ask.images("odd")), "m_out is of the split's reference images"
    assert experiments.hangs_on_fit(alone[:1], ask.images("odd")[:1]), "one split tells nothing"
    row = ask("odd", 4)
    pairs = experiments.pairs_of_splits(sums["in-distribution"], sums["odd"], False, ask.divisions, 4)
    assert row["auroc"] == pytest.approx(np.mean([metrics.auroc(*pair) for pair in pairs]))
    assert row["low"] <= row["auroc"] <= row["high"] and len(row["splits"]) == 3


def test_what_the_draw_of_images_moves_is_what_fresh_images_move():
    """AUROCs with other reference, calibration and test images each time, from a pool that is never used up."""
    normal, odd = unit_sums(12_000, 0), unit_sums(200, 1, shift=0.5)
    ask = questions.Asker({"in-distribution": normal[:1000], "odd": odd}, {"odd": False}, experiments.splits(1000, 10, 3, 500))
    (row,) = questions.by_draw(ask, 4, n_draws=20)
    assert (row["n_reference"], row["n_calibration"], row["n_test"]) == (3, 500, 497)
    fixed = dict(reference=torch.arange(3), calibration=torch.arange(3, 503), test=torch.arange(503, 1000))
    fresh = dict(reference=torch.arange(1000, 2500).split(3), calibration=torch.arange(1000, 12_000).split(500))
    for kind, drawn in fresh.items():
        divisions = [experiments.Split(**{**fixed, kind: some}) for some in drawn]
        pairs = experiments.pairs_of_splits(normal, odd, False, divisions, 4)
        expected = np.std([metrics.auroc(*pair) for pair in pairs], ddof=1)
        assert row[kind] == pytest.approx(expected, rel=0.4)  # which depends a little on the other images too
    pair = experiments.pairs_of_splits(normal, odd, False, [experiments.Split(**fixed)], 4)[0]
    low, high = metrics.bootstrap_interval(*pair)
    assert row["test"] == pytest.approx((high - low) / 3.92, rel=0.2)
    few = questions.Asker(ask.sums, ask.paired, experiments.splits(1000, 2, 2, 2))
    assert [questions.by_draw(few, 4)[0][kind] for kind in ("reference", "calibration")] == [None, None]
    more = experiments.splits(1000, 10, 100, 500)
    assert questions.by_draw(questions.Asker(ask.sums, ask.paired, more), 4)[0]["reference"] < 0.4 * row["reference"]


@dataclasses.dataclass(frozen=True)
class MeanOf:
    """Asked for AUROCs, it has instead a split's mean of a number that each image of one kind has: what moves it is known."""

    kind: str
    values: torch.Tensor
    divisions: list[experiments.Split]
    anomalies = ("odd",)
    paired = MappingProxyType({"odd": False})

    def pairs(self, anomaly, n_views):
        return [(self.values[getattr(division, self.kind)],) * 2 for division in self.divisions]


@pytest.mark.parametrize(("kind", "wanted"), [("reference", 40), ("calibration", 100)])
def test_what_the_draw_of_images_moves_is_known_for_a_mean(kind, wanted, monkeypatch):
    """Drawn again are 35 images from a pool of 70: a mean of as many as the split has, all of them new, moves otherwise."""
    monkeypatch.setattr(questions.metrics, "auroc", lambda a, b: float(a.mean()))
    monkeypatch.setattr(questions.metrics, "bootstrap_interval", lambda *_, **__: (0.0, 3.92))
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    [row] = questions.by_draw(MeanOf(kind, values, experiments.splits(4000, 30, 40, 100)), 4, n_draws=50)
    assert row[kind] == pytest.approx(float(values.std()) / wanted**0.5, rel=0.08)
    assert row["test"] == 1
    assert (row["n_reference"], row["n_calibration"], row["n_test"]) == (40, 100, 3860)


def test_a_summary_is_of_all_its_splits():
    first, second = ([3.0, 2.0, 1.0], [2.5, 0.5]), ([5.0, 4.0, 0.0], [1.0, 0.5, -1.0])
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in (first, second)]
    found = experiments.summary(pairs)
    for name, one in (("aupr", metrics.aupr), ("fpr95", metrics.fpr_at_tpr), ("auroc", metrics.auroc)):
        each = [one(*pair) for pair in pairs]
        assert each[0] != each[1] and found[name] == pytest.approx(np.mean(each))
    assert found["splits"] == [metrics.auroc(*pair) for pair in pairs]


def test_table_5_is_the_mean_over_splits_with_intervals_over_images():
    """Against the normal theory of a mean and of a variance, whose standard error holds the fourth moment."""
    sums = {"in-distribution": unit_sums(600, 0), "odd": unit_sums(400, 1, shift=0.5)}
    ask = questions.Asker(sums, {"in-distribution": False, "odd": False}, experiments.splits(600, 3, 10, 200, seed=0))
    for name, column in ask.moments(4).items():
        found = [[v.numpy() for v in ask.detector(4, s).similarities_of_sums(ask.tested(name, s))] for s in range(3)]
        gammas = [m_in.std(ddof=1) / m_out.std(ddof=1) for m_in, m_out in map(calibration_similarities, [ask] * 3, range(3))]
        assert column["gamma"] == pytest.approx(np.mean(gammas)) and ask.gammas(4) == pytest.approx(gammas)
        assert [column["gamma_low"], column["gamma_high"]] == pytest.approx([min(gammas), max(gammas)])
        assert column["n"] == len(found[0][0])
        m_in, m_out = ([pair[k] for pair in found] for k in (0, 1))
        weighted = [g * v for g, v in zip(gammas, m_out, strict=True)]
        for key, splits in (("m_in", m_in), ("m_out", m_out), ("gamma_m_out", weighted)):
            errors = [v.std() / len(v) ** 0.5 for v in splits]
            spreads = [((((v - v.mean()) ** 2 - v.var()) ** 2).mean() / len(v)) ** 0.5 for v in splits]
            for moment, values, error in (
                ("mean", [v.mean() for v in splits], np.mean(errors)),
                ("variance", [v.var(ddof=1) for v in splits], np.mean(spreads)),
            ):
                value, low, high = (column[f"{moment}_{key}{end}"] for end in ("", "_low", "_high"))
                assert value == pytest.approx(np.mean(values))
                assert [low, high] == pytest.approx([value - 1.96 * error, value + 1.96 * error], abs=0.5 * error)


def calibration_similarities(ask, split):
    held_out = ask.sums["in-distribution"][ask.divisions[split].calibration]
    return [v.numpy() for v in ask.detector(4, split).similarities_of_sums(held_out)]


def test_an_encoders_accuracies_carry_their_interval():
    def images(name, n):
        labels = torch.arange(n) % 2
        pixels = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(n)) * 0.8 + 0.15 * labels[:, None, None, None]
        return data.ImageSet(name=name, images=(255 * pixels).to(torch.uint8), labels=labels)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
    row = experiments.encoder_quality(encoder, images("a", 60), images("b", 50), 4)
    for key in ("knn_accuracy", "linear_probe_accuracy"):
        expected = stats.binomtest(round(50 * row[key]), 50).proportion_ci(method="exact")
        assert 0.3 < row[key] < 1 and row["n_held_out"] == 50
        assert (row[f"{key}_low"], row[f"{key}_high"]) == pytest.approx((expected.low, expected.high))


def test_roc_points_hold_their_auroc():
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(300, generator=generator) + 1, torch.randn(300, generator=generator)) for _ in range(3)]
    curve = experiments.roc_points(pairs)
    assert np.trapezoid(curve["detection_rate"], curve["false_alarm_rate"]) == pytest.approx(curve["auroc"], abs=0.005)


def test_batch_decisions_count_what_they_say():
    curves = [
        dict(name="in-distribution", kind="in", p_values=np.linspace(0.01, 1, 100)),
        dict(name="found", kind="out", p_values=np.full(100, 0.01)),
        dict(name="missed", kind="out", p_values=np.ones(100)),
    ]
    found, missed = experiments.batch_decisions(curves, alpha=0.05, q=0.1)
    assert found["alpha_found"] == found["bh_found"] == 1.0 and missed["alpha_found"] == 0.0
    assert found["alpha_false_discoveries"] == pytest.approx(5 / 105)
    assert found["n"] == 200


def test_view_sums_of_sets_are_those_of_each(tmp_path):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    sets = {"a": torch.rand(3, 3, 8, 8), "b": torch.rand(2, 3, 8, 8)}
    sums = experiments.view_sums_of_sets(encoder, sets, EvalViews(8), (2, 4), tmp_path, say=lambda line: None)
    alone = embed.view_sums(encoder, sets["b"], EvalViews(8), (2, 4))
    assert torch.equal(sums["b"].m_in, alone.m_in)


def test_no_image_is_tuned_or_calibrated_on_in_one_form_and_scored_in_another():
    numbered = data.ImageSet(
        "numbered", torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 3, 8, 8), torch.arange(60) % 3
    )
    corrupted = data.ImageSet("numbered:as-it-is", numbered.images, numbered.labels)
    ours = numbered.of_classes([0, 2])

    def numbers(images):
        return set(images[:, 0, 0, 0].tolist())

    held_out, aside = experiments.some_of(ours, 15, seed=1), experiments.set_aside(ours, 15, 5, seed=1)
    odd = experiments.anomalous(corrupted, 0, 8, "numbered", 15, 1, classes=[0, 2], n_aside=5)
    parts = [numbers(found) for found in (held_out.images, aside.images, odd)]
    assert [len(part) for part in parts] == [15, 5, 20]
    assert set().union(*parts) == numbers(ours.images)  # disjoint, and nothing else
    for n_held_out in (0, 40):
        with pytest.raises(ValueError, match="expected some that are left"):
            experiments.anomalous(corrupted, 0, 8, "numbered", n_held_out, 1, classes=[0, 2])
    with pytest.raises(ValueError, match="n_held_out: found 0, all images of numbered"):
        experiments.set_aside(numbered, 0, 5, seed=1)


def test_more_reference_images_than_there_are_are_refused():
    sets = {"in-distribution": torch.rand(20, 3, 8, 8), "PGD": torch.rand(20, 3, 8, 8)}
    sums = experiments.view_sums_of_sets(nn.Flatten(), sets, EvalViews(8), grid=[4], say=lambda _: None)
    ask = questions.Asker(sums, {"PGD": True}, experiments.splits(20, 2, n_reference=5, n_calibration=10))
    assert ask("PGD", 4, n_reference=5)["auroc"] == ask("PGD", 4)["auroc"]
    with pytest.raises(ValueError, match="n_reference: found 6, expected at most 5"):
        ask("PGD", 4, n_reference=6)
