"""The experiments' bookkeeping: who is drawn, who is fitted on, who is scored; and their numbers on cases that can be known."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from cadetlib import attack_sets, cadet, data, embed, encoders, experiments, metrics, mmd, shifts, two_sample
from cadetlib.views import EvalViews


def unit_sums(n, seed, shift=0.0, dim=8, grid=(2, 4)):
    """View sums of n made-up images, whose views scatter around a direction of their own."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(n, 1, dim, generator=generator) + 1 + shift
    z = centre + (0.3 + shift) * torch.randn(n, grid[-1], dim, generator=generator)
    m_in, means = embed.sums_of_views(z, grid)
    return embed.ViewSums(tuple(grid), m_in, means.float())


def test_draws_are_disjoint_and_of_the_pool():
    pool = torch.arange(100, 140)
    parts = shifts.draws_without_overlap(pool, 50, (10, 10, 20), seed=0)
    together = torch.cat(parts, dim=1)
    assert [tuple(p.shape) for p in parts] == [(50, 10), (50, 10), (50, 20)]
    assert all(sorted(row) == pool.tolist() for row in together.tolist())
    assert len({tuple(row) for row in parts[0].tolist()}) > 40, "draws repeat one another"
    with pytest.raises(ValueError, match="found 40 images"):
        shifts.draws_without_overlap(pool, 1, (20, 21), seed=0)


def test_table_1_keeps_its_level_and_sees_a_shift():
    generator = torch.Generator().manual_seed(0)
    reference, same, other = (torch.randn(150, 16, generator=generator) for _ in range(3))
    rows = shifts.rejection_rates(reference, {"same": same, "other": other + 0.7}, [10, 40], 60, 99)
    rate = {(r["test"], r["shift"], r["n"]): r["rate"] for r in rows}
    assert len(rows) == 2 * 3 * 2
    assert rate["MMD", "other", 40] == rate["MMD-CC", "other", 40] == 1.0
    assert max(rate["MMD", "no shift", n] for n in (10, 40)) < 0.15
    for row in rows:
        assert row["rate"] == np.mean(np.asarray(row["p_values"]) <= 0.05)
        assert row["low"] <= row["rate"] <= row["high"]


def test_table_1_counts_a_p_value_of_just_alpha():
    """Of 19 splits a certain shift has p = 1 / 20 = 0.05, which rejects at 0.05; float32's 0.05 would not."""
    reference = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    for row in shifts.rejection_rates(reference, {"far": reference + 3}, [20], 40, n_perm=19):
        assert row["shift"] != "far" or row["rate"] == 1.0
        assert set(row["p_values"]) <= {k / 20 for k in range(1, 21)}
    rows = shifts.trained_rejection_rates({"ME": dict(n_steps=0)}, reference, {"far": reference + 3}, [26], 3, say=lambda _: None)
    x, _, y = shifts._draws_of_shift(80, 80, False, 26, 3, 0)
    pool = torch.cat([reference, reference + 3])
    alone = [
        two_sample.TESTS["ME"](pool[a], pool[b], seed=i, n_steps=0).p_value for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    assert rows[-1]["p_values"] == alone, "in float64, as the test itself says"


def test_table_2_reaches_its_ceiling_and_no_more():
    generator = torch.Generator().manual_seed(1)
    reference, fresh = torch.randn(400, 16, generator=generator).split(200)
    rows = shifts.small_sample_aurocs(reference, {"far": reference + 9, "same": fresh}, [3, 20], 1000, (100,))
    auroc = {(r["test"], r["anomaly"], r["n"]): r["auroc"] for r in rows}
    assert auroc["MMD-CC", "far", 20] == pytest.approx(1 - 0.5 / 101, abs=0.004)
    assert 0.4 < auroc["MMD", "same", 20] < 0.6
    found = {(r["test"], r["anomaly"], r["n"]): (r["aupr"], r["fpr95"]) for r in rows}
    assert found["MMD-CC", "far", 20][0] > 0.98 and found["MMD-CC", "far", 20][1] < 0.03
    assert 0.4 < found["MMD", "same", 20][0] < 0.6 and found["MMD", "same", 20][1] > 0.9
    assert auroc["MMD-CC", "far", 3] > auroc["MMD", "far", 3], "MMD at n = 3 is held back by its ten splits, MMD-CC is not"


def test_no_image_is_drawn_in_two_forms():
    """Pools made from the reference image by image: what S_Q holds is in no other sample."""
    for draws in (shifts._draws_of_shift(90, 90, True, 10, 40, 0), shifts._draws_of_anomaly(90, 90, True, 10, 40, 0)):
        together = torch.cat([*draws[:-1], draws[-1] - 90], dim=1)
        assert int(draws[-1].min()) >= 90
        assert all(len(set(row)) == len(row) for row in together.tolist())
    reference = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    rows = shifts.rejection_rates(reference, {"copy": reference.clone()}, [10], 100, 99, paired=["copy"])
    assert all(row["low"] <= 0.05 for row in rows), "copies are no shift"


def test_tests_that_learn_have_their_cells():
    generator = torch.Generator().manual_seed(0)
    reference, shifted = torch.rand(2, 80, 3, 4, 4, generator=generator)
    tests = {"ME": dict(n_steps=0), "C2ST-L": dict(n_epochs=2, image_size=16, n_perm=19)}
    others = {"dark": shifted / 2}
    rows = shifts.trained_rejection_rates(tests, reference, others, [25], 4, say=lambda _: None)
    rate = {(row["test"], row["shift"]): row["rate"] for row in rows}
    assert set(rate) == {(test, shift) for test in tests for shift in ("no shift", "dark")}
    assert rate["ME", "dark"] == 1.0 and rate["ME", "no shift"] < 1
    assert all(len(row["p_values"]) == 4 and row["seconds"] > 0 and row["encoder"] == "none" for row in rows)


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
    ask = experiments.Asker(sums, {"in-distribution": False, "odd": False}, experiments.splits(60, 3, 10, 20, seed=0))
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
    ask = experiments.Asker({"in-distribution": normal[:1000], "odd": odd}, {"odd": False}, experiments.splits(1000, 10, 3, 500))
    (row,) = experiments.by_draw(ask, 4, n_draws=20)
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
    few = experiments.Asker(ask.sums, ask.paired, experiments.splits(1000, 2, 2, 2))
    assert [experiments.by_draw(few, 4)[0][kind] for kind in ("reference", "calibration")] == [None, None]
    more = experiments.splits(1000, 10, 100, 500)
    assert experiments.by_draw(experiments.Asker(ask.sums, ask.paired, more), 4)[0]["reference"] < 0.4 * row["reference"]


def test_table_5_is_the_mean_over_splits_with_intervals_over_images():
    """Against the normal theory of a mean and of a variance, whose standard error holds the fourth moment."""
    sums = {"in-distribution": unit_sums(600, 0), "odd": unit_sums(400, 1, shift=0.5)}
    ask = experiments.Asker(sums, {"in-distribution": False, "odd": False}, experiments.splits(600, 3, 10, 200, seed=0))
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


def test_the_encoders_similarity_is_that_of_mmd():
    """Notebook 02 compares plain embeddings; the pool's Gram matrix must be the one of the single tests."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator) + 1
    (row,) = [r for r in shifts.rejection_rates(x, {"y": y}, [4], 1, 199) if (r["test"], r["shift"]) == ("MMD", "y")]
    x1, _ = shifts.draws_without_overlap(torch.arange(12), 1, (4, 4), 0)
    (drawn,) = shifts.draws_without_overlap(torch.arange(12), 1, (4,), 1)
    single = mmd.mmd_test(x[x1[0]], y[drawn[0]], 4000)
    assert row["p_values"][0] == pytest.approx(single.p_value, abs=0.1)


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
    ask = experiments.Asker(sums, {"PGD": True}, experiments.splits(20, 2, n_reference=5, n_calibration=10))
    assert ask("PGD", 4, n_reference=5)["auroc"] == ask("PGD", 4)["auroc"]
    with pytest.raises(ValueError, match="n_reference: found 6, expected at most 5"):
        ask("PGD", 4, n_reference=6)


def test_the_papers_shift_is_shown_before_any_other():
    row = dict(encoder="contrastive", test="MMD-CC", n=50)
    rows = [row | dict(shift=shift, rate=rate) for shift, rate in (("noise-1", 0.5), ("cifar10.1-v6", 1.0), ("no shift", 0.5))]
    assert shifts.shift_to_show(rows) == "cifar10.1-v6"
    assert shifts.shift_to_show(rows[2:]) == "no shift"
