"""Section 4's tables: what is drawn, what is counted, on cases whose rates can be known."""

import itertools

import numpy as np
import pytest
import torch

from cadetlib import mmd, shifts, two_sample


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
    assert all(0.03 < r["level"] < 0.07 for r in rows if r["n"] == 20), "of the tests without anomalies, at 0.05"
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


def test_anomalies_made_from_the_reference_are_of_images_in_no_other_sample():
    """Copies of a few images: drawn as others are, they would meet their originals, and be more alike than fresh ones."""
    reference = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    auroc = {}
    for paired in ((), ("copy",)):
        for row in shifts.small_sample_aurocs(reference, {"copy": reference.clone()}, [3], 1000, (100,), paired=paired):
            auroc[row["test"], paired] = row["auroc"]
    for test in ("MMD", "MMD-CC"):
        assert auroc[test, ("copy",)] == pytest.approx(0.5, abs=0.05) and auroc[test, ()] < 0.42


def test_seconds_are_those_of_one_test(monkeypatch):
    ticks = itertools.count(1000.0)
    monkeypatch.setattr(shifts.time, "perf_counter", lambda: next(ticks))
    reference = torch.rand(80, 4)
    rows = shifts.trained_rejection_rates({"ME": dict(n_steps=0)}, reference, {}, [26], 2, say=lambda _: None)
    assert [row["seconds"] for row in rows] == [0.5]


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


def test_the_encoders_similarity_is_that_of_mmd():
    """Notebook 02 compares plain embeddings; the pool's Gram matrix must be the one of the single tests."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator) + 1
    (row,) = [r for r in shifts.rejection_rates(x, {"y": y}, [4], 1, 199) if (r["test"], r["shift"]) == ("MMD", "y")]
    x1, _ = shifts.draws_without_overlap(torch.arange(12), 1, (4, 4), 0)
    (drawn,) = shifts.draws_without_overlap(torch.arange(12), 1, (4,), 1)
    single = mmd.mmd_test(x[x1[0]], y[drawn[0]], 4000)
    assert row["p_values"][0] == pytest.approx(single.p_value, abs=0.1)


def test_the_papers_shift_is_shown_before_any_other():
    row = dict(encoder="contrastive", test="MMD-CC", n=50)
    rows = [row | dict(shift=shift, rate=rate) for shift, rate in (("noise-1", 0.5), ("cifar10.1-v6", 1.0), ("no shift", 0.5))]
    assert shifts.shift_to_show(rows) == "cifar10.1-v6"
    assert shifts.shift_to_show(rows[2:]) == "no shift"
    ours = [row | dict(shift=shift, rate=rate) for shift, rate in (("noise-1", 0.9), ("blur-1", 0.6), ("no shift", 0.0))]
    assert shifts.shift_to_show(ours) == "blur-1", "neither always seen nor never"
