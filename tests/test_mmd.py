"""Eq. 4 and its tests against double loops written from the paper, a known level, and exact small cases."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cadetlib import mmd


def paper_mmd2(x, y):
    """Eq. 4 as printed: a double loop over i != j."""
    x = [v / np.linalg.norm(v) for v in np.asarray(x, dtype=np.float64)]
    y = [v / np.linalg.norm(v) for v in np.asarray(y, dtype=np.float64)]
    n = len(x)
    total = sum(x[i] @ x[j] + y[i] @ y[j] - x[i] @ y[j] - y[i] @ x[j] for i, j in itertools.product(range(n), repeat=2) if i != j)
    return total / (n * (n - 1))


def sample(n, dim=5, seed=0, shift=0.0, dtype=torch.float64):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).add(shift).to(dtype)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 9), dim=st.integers(1, 6), seed=st.integers(0, 10**6), shift=st.floats(0, 5))
def test_mmd2_is_equation_4(n, dim, seed, shift):
    x, y = sample(n, dim, seed), sample(n, dim, seed + 1, shift)
    assert mmd.mmd2_unbiased(x, y) == pytest.approx(paper_mmd2(x, y), abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_mmd2_ignores_scale_and_joint_order(seed, scale):
    x, y = sample(6, seed=seed), sample(6, seed=seed + 1, shift=0.5)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    expected = mmd.mmd2_unbiased(x, y)
    assert mmd.mmd2_unbiased(x * scale, y) == pytest.approx(expected, abs=1e-12)
    assert mmd.mmd2_unbiased(x[order], y[order]) == pytest.approx(expected, abs=1e-12)
    assert mmd.mmd2_unbiased(y, x) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dim", "max_bytes"), [(5, 2**30), (5, 200), (20, 2**30), (20, 200)])
def test_null_values_are_equation_4_of_the_splits(dtype, dim, max_bytes):
    """Every null value is Eq. 4 of its split, whether the Gram matrix is whole or its upper triangle comes in blocks."""
    x, y = sample(7, dim, dtype=dtype), sample(7, dim, seed=1, shift=0.3, dtype=dtype)
    result = mmd.mmd_test(x, y, n_perm=25, seed=3, max_bytes=max_bytes)
    splits = mmd.random_splits(1, 25, 14, torch.Generator().manual_seed(3))[0]
    pooled = torch.cat([x, y]).double()
    expected = [paper_mmd2(pooled[s[:7]], pooled[s[7:]]) for s in splits]
    np.testing.assert_allclose(result.null, expected, atol=1e-6 if dtype == torch.float32 else 1e-12)
    assert result.statistic == pytest.approx(paper_mmd2(x, y), abs=1e-12)
    assert result.p_value == (1 + (np.asarray(expected) >= result.statistic).sum()) / 26


def test_large_tests_are_the_double_precision_sums():
    """float32 at n = 300, several blocks: every null value to rounding, and the p-value, as float64 sums over whole matrices."""
    x, y = sample(300, 40, dtype=torch.float32), sample(300, 40, seed=1, shift=0.05, dtype=torch.float32)
    result = mmd.mmd_test(x, y, n_perm=60, seed=2)
    z = torch.nn.functional.normalize(torch.cat([x, y]).double(), dim=-1)
    k = z @ z.T
    null = []
    for split in mmd.random_splits(1, 60, 600, torch.Generator().manual_seed(2))[0]:
        a, b = split[:300], split[300:]
        within, across = k[a][:, a] + k[b][:, b], k[a][:, b]
        null.append(float(within.sum() - within.trace() - 2 * (across.sum() - across.trace())) / (300 * 299))
    np.testing.assert_allclose(result.null, null, atol=1e-8)
    assert result.p_value == (1 + (np.array(null) >= result.statistic).sum()) / 61


def test_mmd_cc_follows_algorithm_1():
    x1, x2, y = sample(5), sample(5, seed=1), sample(5, seed=2, shift=1.0)
    result = mmd.mmd_cc_test(x1, x2, y, n_perm=40, seed=7)
    splits = mmd.random_splits(1, 40, 10, torch.Generator().manual_seed(7))[0]
    reference = torch.cat([x1, x2])
    null = np.array([paper_mmd2(reference[s[:5]], reference[s[5:]]) for s in splits])
    np.testing.assert_allclose(result.null, null, atol=1e-12)
    assert result.p_value == pytest.approx((1 + (null >= paper_mmd2(x1, y)).sum()) / 41)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_splits_that_repeat_the_observed_one_count_as_ties(dtype):
    """n = 2: by symmetry Eq. 4 takes few values, and the p-value must count exact repeats in spite of rounding."""
    x, y = sample(2, dtype=dtype), sample(2, seed=1, dtype=dtype)
    result = mmd.mmd_test(x, y, n_perm=400)
    splits = mmd.random_splits(1, 400, 4, torch.Generator().manual_seed(0))[0]
    pooled = torch.cat([x, y]).double()
    null = np.array([paper_mmd2(pooled[s[:2]], pooled[s[2:]]) for s in splits])
    expected = (1 + (null >= paper_mmd2(x, y) - 1e-9).sum()) / 401
    assert result.p_value == pytest.approx(expected, abs=1e-12)
    assert result.p_value == pytest.approx(float(1 + (result.null >= result.statistic).sum()) / 401)


def test_level_under_h0_and_power_under_a_shift():
    """Over 2,000 draws the p-values of MMD are uniform on their grid (its exactness is a theorem) and see a shift."""
    n_draws, n, n_perm = 2000, 10, 19
    z = mmd.centred(torch.nn.functional.normalize(sample(60_000 // 10, 16)))
    index = torch.randint(len(z), (3, n_draws, n), generator=torch.Generator().manual_seed(5))
    tests = mmd.test_draws(z @ z.T, *index, n_perm=n_perm)
    rank = (tests.mmd * (n_perm + 1)).round().long()
    counts = torch.bincount(rank, minlength=n_perm + 2)[1:]
    expected = n_draws / (n_perm + 1)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 43.8  # 99.9 % point with 19 degrees of freedom
    assert 0.03 < float((tests.mmd_cc <= 0.05).double().mean()) < 0.08  # methods.md: 0.055 at n = 10
    shifted = mmd.mmd_test(sample(50, 16), sample(50, 16, seed=1, shift=0.5), n_perm=99)
    assert shifted.p_value == 0.01


def test_shared_splits_are_the_single_ones():
    z = mmd.centred(sample(30, 4).view(30, -1)).view(3, 10, -1)
    gram, splits = z @ z.transpose(1, 2), mmd.random_splits(1, 20, 10, torch.Generator().manual_seed(1))
    expected = mmd.split_statistics(gram, splits.expand(3, -1, -1))
    assert torch.allclose(mmd.shared_split_statistics(gram, splits[0]), expected, atol=1e-6)
    assert torch.allclose(mmd.shared_split_statistics(gram, splits[0], max_bytes=8 * 100 * 7), expected, atol=1e-6)


def test_p_values_of_draws_are_uniform_without_a_shift():
    """Many draws that share splits: rejection at each level within four standard errors of it."""
    z = mmd.centred(torch.randn(4000, 8, generator=torch.Generator().manual_seed(3)))
    order = torch.rand(2000, 4000, generator=torch.Generator().manual_seed(4)).argsort(dim=1)[:, :15]
    p = mmd.test_draws(z @ z.T, *order.split(5, dim=1), n_perm=199).mmd
    for level in (0.05, 0.2, 0.5):
        assert abs(float((p <= level).double().mean()) - level) < 4 * (level * (1 - level) / 2000) ** 0.5 + 0.01


def test_draws_are_the_single_tests():
    x = sample(40, 6)
    x[30:] += 1
    index = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(s))[:15] for s in range(3)])
    x1, x2, y = index[:, :5], index[:, 5:10], index[:, 10:]
    z = mmd.centred(x)
    tests = mmd.test_draws(z @ z.T, x1, x2, y, n_perm=2000)
    for b in range(3):
        assert float(tests.statistic[b]) == pytest.approx(paper_mmd2(x[x1[b]], x[y[b]]), abs=1e-12)
        # Other random splits: p-values agree to Monte Carlo error (standard error at most 0.011 each).
        assert float(tests.mmd[b]) == pytest.approx(mmd.mmd_test(x[x1[b]], x[y[b]], 2000).p_value, abs=0.06)
        assert float(tests.mmd_cc[b]) == pytest.approx(mmd.mmd_cc_test(x[x1[b]], x[x2[b]], x[y[b]], 2000).p_value, abs=0.06)


def test_p_value_is_reproducible_and_never_zero():
    x, y = sample(20), sample(20, seed=1, shift=9.0)
    assert mmd.mmd_test(x, y, 50, seed=1).p_value == 1 / 51
    assert torch.equal(mmd.mmd_test(x, y, 50, seed=1).null, mmd.mmd_test(x, y, 50, seed=1).null)
    assert not torch.equal(mmd.mmd_test(x, y, 50, seed=1).null, mmd.mmd_test(x, y, 50, seed=2).null)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (sample(1), sample(1), "at least 2"),
        (sample(3), sample(4), "equal shapes"),
        (sample(3)[:, :2], sample(3), "equal shapes"),
        (sample(3), torch.full((3, 5), float("nan")), "y: found 15 NaN"),
        (sample(3), torch.zeros(3, 5), "y: found a zero vector"),
        (torch.empty(0, 5), torch.empty(0, 5), "at least 2"),
        (sample(3).flatten(), sample(3), r"expected \(n, D\)"),
        ("abc", sample(3), "x: found"),
    ],
)
def test_bad_samples_are_refused_by_name(x, y, message):
    with pytest.raises(ValueError, match=message):
        mmd.mmd_test(x, y)


X1, X2, Y = torch.arange(30).view(3, 2, 5)  # two draws of five from a pool of thirty
DRAWN = {
    "test_draws": lambda x1=X1, x2=X2, y=Y, **settings: mmd.test_draws(torch.eye(30), x1, x2, y, **settings),
    "test_shifts": lambda x1=X1, x2=X2, y=Y, **settings: mmd.test_shifts(torch.eye(30), x1, x2, [y], **settings),
}
TESTS = DRAWN | {
    "mmd_test": lambda **settings: mmd.mmd_test(sample(3), sample(3, seed=1), **settings),
    "mmd_cc_test": lambda **settings: mmd.mmd_cc_test(sample(3), sample(3, seed=1), sample(3, seed=2), **settings),
}


@pytest.mark.parametrize("test", TESTS.values(), ids=TESTS)
def test_bad_settings_are_refused(test):
    test(n_perm=1)  # the fewest
    for wrong in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match=f"n_perm: found {wrong}"):
            test(n_perm=wrong)
    with pytest.raises(ValueError, match=r"seed: found 0\.5"):
        test(seed=0.5)


@pytest.mark.parametrize("name", ["mmd_test", "mmd_cc_test"])
def test_a_bound_on_memory_is_a_number_of_bytes(name):
    assert 0 < TESTS[name](n_perm=9, max_bytes=1).p_value <= 1  # a row at a time
    with pytest.raises(ValueError, match="max_bytes: found 0"):
        TESTS[name](max_bytes=0)


def test_samples_of_unequal_sizes_are_refused():
    with pytest.raises(ValueError, match="x2"):
        mmd.mmd_cc_test(sample(3), sample(2), sample(3))


@pytest.mark.parametrize("test", DRAWN.values(), ids=DRAWN)
def test_indices_that_are_no_draws_are_refused(test):
    for x1, x2, y in (
        (X1[:, :1], X2[:, :1], Y[:, :1]),
        (X1[0], X2[0], Y[0]),
        (X1, X2[:, :4], Y),
        (X1, X2, Y[:, :4]),
        (X1, X2, Y[:1]),
    ):
        with pytest.raises(ValueError, match=r"expected equal \(B, n\), n >= 2"):
            test(x1, x2, y)
    test(X1[:, :2], X2[:, :2], Y[:, :2])  # the smallest samples that Eq. 4 is defined for


@pytest.mark.parametrize(("n", "dim"), [(12, 40), (300, 8)])
def test_shifts_are_the_single_tests(n, dim):
    """Every draw against every y: the statistic of Eq. 4, and p-values that its own null gives with the draw's splits."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(4 * n, dim, generator=generator)
    pool[3 * n :] += 0.3
    z = mmd.centred(pool)
    x1, x2, near = (torch.randperm(3 * n, generator=generator)[: 2 * n].view(2, n) for _ in range(3))
    far = 3 * n + torch.stack([torch.randperm(n, generator=generator) for _ in range(2)])
    found = mmd.test_shifts(z, x1, x2, [near, far], n_perm=60, seed=5)
    splits = torch.Generator().manual_seed(5)
    for b in range(2):
        split = mmd.random_splits(1, 60, 2 * n, splits)[0]
        for tests, y in zip(found, (near, far), strict=True):
            statistic = mmd.mmd2_unbiased(pool[x1[b]], pool[y[b]])
            assert float(tests.statistic[b]) == pytest.approx(statistic, rel=1e-4, abs=1e-6)
            for p, other in ((tests.mmd[b], y[b]), (tests.mmd_cc[b], x2[b])):
                both = torch.cat([pool[x1[b]], pool[other]]).double()
                null = [mmd.mmd2_unbiased(both[order[:n]], both[order[n:]]) for order in split]
                assert float(p) == pytest.approx((1 + sum(v >= statistic - 1e-7 for v in null)) / 61, abs=0.02)


# --- samples that are nearly alike, very small or very large ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_constant_samples_are_never_told_apart(dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        v = torch.randn(1, 64, dtype=torch.float64, generator=generator).to(dtype).expand(30, 64)
        x1, x2, y = v.split(10)
        results = [mmd.mmd_test(x1, y, 20), mmd.mmd_cc_test(x1, x2, y, 20)]
        assert [(result.statistic, result.p_value) for result in results] == [(0.0, 1.0)] * 2
    assert mmd.mmd_test(np.ones((5, 3)), np.ones((5, 3)), 20).p_value == 1


@pytest.mark.parametrize("spread", [1e-4, 1e-7, 1e-9])
def test_the_level_holds_for_samples_that_are_nearly_alike(spread):
    """Eq. 4 as printed would lose the digits in which they differ: at 1e-8 it rejected 45 % at 5 %."""
    generator = torch.Generator().manual_seed(1)
    rejected = 0
    for i in range(200):
        v = torch.randn(1, 16, dtype=torch.float64, generator=generator)
        x, y = (v + spread * torch.randn(2, 10, 16, dtype=torch.float64, generator=generator)).unbind()
        rejected += mmd.mmd_test(x, y, 99, seed=i).p_value <= 0.05
        if i < 3:
            assert mmd.mmd_test(x, y + 3 * spread * torch.eye(16)[0].double(), 99).p_value <= 0.05
    assert 1 <= rejected <= 21  # 10 expected; beyond 21 in 1 of 1,000


def test_any_scale_is_the_same_test():
    x, y = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(2))
    expected = mmd.mmd_test(x, y, 50)
    for scale in (1e-30, 1e-13, 1e19, 1e30):
        found = mmd.mmd_test(x * scale, y, 50)
        assert found.statistic == pytest.approx(expected.statistic, rel=1e-5) and found.p_value == expected.p_value
        torch.testing.assert_close(found.null, expected.null, rtol=1e-3, atol=1e-6)
    for scale in (1e-300, 1e200):
        assert mmd.mmd2_unbiased(x.double() * scale, y.double()) == pytest.approx(expected.statistic, rel=1e-9)


def test_a_seed_is_any_whole_number():
    x, y = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(mmd.mmd_test(x, y, 9, seed=np.int64(3)).null, mmd.mmd_test(x, y, 9, seed=3).null)
    for wrong in (None, 1.5, "1", 2**70):
        with pytest.raises(ValueError, match="seed: found"):
            mmd.mmd_test(x, y, 9, seed=wrong)
    with pytest.raises(ValueError, match="n_perm: found None"):
        mmd.mmd_test(x, y, None)
    with pytest.raises(ValueError, match="max_bytes"):
        mmd.mmd_test(x, y, 9, max_bytes=0)


@pytest.mark.parametrize("dim, offset", [(8, 100.0), (8, 1000.0), (128, 1000.0)])
def test_single_precision_tests_clusters_as_double_does(dim, offset):
    for seed in range(40):
        x, y = torch.randn(2, 2, dim, generator=torch.Generator().manual_seed(seed)) + offset
        assert mmd.mmd_test(x, y, 99, seed).p_value == mmd.mmd_test(x.double(), y.double(), 99, seed).p_value
    assert not mmd.mmd_test(x.requires_grad_(), y, 9).null.requires_grad
