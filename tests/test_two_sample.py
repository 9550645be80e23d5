"""The learned two-sample tests against float64 loops, exact null distributions, their level and their power."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from cadetlib import two_sample
from cadetlib.two_sample import TESTS

QUICK = dict(n_perm=19, n_epochs=20, learning_rate=1e-2, image_size=16)  # overfits, so that a leak of the training half shows
CHEAP = {
    "ME": dict(n_locations=2, n_steps=10),
    "C2ST-S": QUICK,
    "C2ST-L": QUICK,
    "MMD-D": QUICK,
    "MMD": dict(n_perm=19),
    "MMD-CC": dict(n_perm=19),
}
EVERY_TEST = pytest.mark.parametrize("name", list(TESTS))
LEARNED = pytest.mark.parametrize("name", ["ME", "C2ST-S", "C2ST-L", "MMD-D"])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(name, n, dim, seed, shift=0.0):
    """x and y for the test `name`, y shifted; MMD-CC takes twice as many x. The mean is off zero, as the cosine needs."""
    n_x = 2 * n if name == "MMD-CC" else n
    return torch.randn(n_x, dim, generator=seeded(seed)) + 1, torch.randn(n, dim, generator=seeded(seed + 10**6)) + 1 + shift


def images(n, seed, brightest=200):
    return torch.randint(0, brightest, (n, 3, 20, 16), generator=seeded(seed)).to(torch.uint8)


# --- ME -----------------------------------------------------------------------------------------------------------------


def test_me_statistic_worked_by_hand():
    """One location at 0, width such that k(1, 0) = 1/2: z = 1/2, 1/2, 0, mean 1/3, variance 1/12, 3 (1/9) / (1/12) = 4."""
    x, y = torch.tensor([[0.0], [0.0], [1.0]]).double(), torch.ones(3, 1).double()
    width = (2 * np.log(2)) ** -0.5
    location = torch.zeros(1, 1).double()
    z = two_sample.gaussian_features(x, location, width) - two_sample.gaussian_features(y, location, width)
    assert float(two_sample.mean_embedding_statistic(z, gamma=0.0)) == pytest.approx(4)
    assert float(two_sample.mean_embedding_statistic(z, gamma=1 / 12)) == pytest.approx(2)


def test_me_is_its_formula_on_the_half_it_did_not_learn_from():
    x, y = draw("ME", 31, 3, 0, shift=0.5)
    found = two_sample.me_test(x, y, seed=4, n_locations=2, n_steps=15, gamma=1e-3, reference="chi2")
    halves = two_sample.split_halves(x, y, seeded(4))
    train = np.concatenate([halves.x_train.double().numpy(), halves.y_train.double().numpy()])
    scale = np.sqrt(((train - train.mean(0)) ** 2).mean())

    def features(points):
        points = (points.double().numpy() - train.mean(0)) / scale
        return np.array([[np.exp(-((p - v) ** 2).sum() / (2 * found.width**2)) for v in found.locations.numpy()] for p in points])

    z = features(halves.x_test) - features(halves.y_test)
    w, sigma = z.mean(0), np.cov(z.T) + 1e-3 * np.eye(2)
    assert len(z) == 16
    assert found.statistic == pytest.approx(16 * w @ np.linalg.inv(sigma) @ w, rel=1e-9)
    assert found.p_value == pytest.approx(np.exp(-found.statistic / 2), rel=1e-9)  # chi-square, 2 degrees of freedom


def test_me_with_one_location_is_a_t_test():
    """Hotelling's T^2 in one dimension: the F reference must give the two-sided t-test of the differences."""
    z = torch.randn(12, 1, generator=seeded(0)).double() + 0.4
    statistic = float(two_sample.mean_embedding_statistic(z, gamma=0.0))
    expected = stats.ttest_1samp(z.numpy()[:, 0], 0).pvalue
    assert two_sample.mean_embedding_p_value(statistic, 12, 1) == pytest.approx(expected, rel=1e-9)


def test_me_levels_of_both_references():
    """Fixed locations, no shift, 600 draws: chi-square holds its level with 1,000 points, not with 25; F with both."""
    locations, width, n_draws, rejected = torch.randn(5, 3, generator=seeded(1)), 2.0, 600, {}
    for n in (25, 1000):
        points = torch.randn(n_draws, 2, n, 3, generator=seeded(n))
        features = two_sample.gaussian_features(points.reshape(-1, 3), locations, width).reshape(n_draws, 2, n, 5).double()
        statistics = [float(two_sample.mean_embedding_statistic(z)) for z in features[:, 0] - features[:, 1]]
        for reference in ("chi2", "F"):
            p_values = np.array([two_sample.mean_embedding_p_value(s, n, 5, reference) for s in statistics])
            rejected[n, reference] = int((p_values <= 0.05).sum())
    low, high = stats.binom.ppf([0.0005, 0.9995], n_draws, 0.05)
    assert low <= rejected[1000, "chi2"] <= high
    assert low <= rejected[1000, "F"] <= high
    assert low <= rejected[25, "F"] <= high
    assert rejected[25, "chi2"] > 1.5 * high


def test_me_locations_climb():
    """On the training half the learned locations tell the samples apart better than the random ones they start from."""
    x, y = (z.double() for z in draw("ME", 60, 4, 3, shift=0.4))

    def statistic(n_steps):
        locations, width = two_sample._learned_locations(x, y, 3, n_steps, 0.05, 1e-5, seeded(0))
        z = two_sample.gaussian_features(x, locations, width) - two_sample.gaussian_features(y, locations, width)
        return float(two_sample.mean_embedding_statistic(z))

    assert statistic(100) > 1.3 * statistic(0)


@pytest.mark.parametrize("reference", ["F", "chi2"])
def test_me_p_value_is_never_zero(reference):
    assert 0 < two_sample.mean_embedding_p_value(1e30, 1000, 5, reference) < 1e-300
    assert two_sample.mean_embedding_p_value(0.0, 1000, 5, reference) == 1


# --- C2ST ---------------------------------------------------------------------------------------------------------------


def test_accuracy_test_has_the_hypergeometric_null():
    """Permuting labels of fixed predictions, the number of positives among x is hypergeometric: an exact null."""
    m, n_perm = 15, 20_000
    logits = torch.randn(2 * m, generator=seeded(0)) + torch.cat([torch.full((m,), 0.4), torch.full((m,), -0.4)])
    found = two_sample.accuracy_test(logits, n_perm, seeded(1))
    positive = (logits > 0).numpy()
    hits, called = int(positive[:m].sum()), int(positive.sum())
    assert found.statistic == pytest.approx((hits + m - (called - hits)) / (2 * m))
    exact = stats.hypergeom(2 * m, called, m)
    assert found.p_value == pytest.approx(exact.sf(hits - 1), abs=4 * (0.25 / n_perm) ** 0.5)
    support = np.arange(max(0, called - m), min(m, called) + 1)
    counts = np.array([np.isclose(found.null, (2 * k + m - called) / (2 * m)).sum() for k in support])
    assert counts.sum() == n_perm
    expected = n_perm * exact.pmf(support)
    often = expected > 5
    assert ((counts - expected)[often] ** 2 / expected[often]).sum() < stats.chi2.ppf(0.999, often.sum() - 1)


def test_the_classifier_learns_which_sample_a_point_is_of():
    """Two points of each to learn from, at every step: one that was called by the wrong name would keep the other unsure."""
    seen = []
    x = 1 + 0.01 * torch.randn(4, 3, generator=seeded(0))

    def look(logits, n_perm, generator):
        seen.append(logits)
        return two_sample.logit_test(logits, n_perm, generator)

    two_sample.c2st_test(x, -x, n_perm=1, n_epochs=100, learning_rate=1e-2, statistic=look)
    of_x, of_y = seen[0].split(2)
    assert of_x.min() > 3 and of_y.max() < -3


def test_logit_test_against_every_split():
    """m = 3: all 20 splits in whole tenths; two have the observed value, and must count as ties whatever their rounding."""
    tenths = [3, 5, 9, -2, 7, 1]
    splits = [2 * sum(chosen) - sum(tenths) for chosen in itertools.combinations(tenths, 3)]
    assert splits.count(splits[0]) == 2
    found = two_sample.logit_test(torch.tensor(tenths).double() / 10, 5000, seeded(0))
    assert found.statistic == pytest.approx(splits[0] / 30)
    assert found.p_value == pytest.approx(np.mean(np.array(splits) >= splits[0]), abs=4 * (0.25 / 5000) ** 0.5)
    assert {round(float(v) * 30) for v in found.null} == set(splits)


# --- MMD-D --------------------------------------------------------------------------------------------------------------


def loop_h(k, left, right):
    """h_ij of Liu et al. for the split of the pooled sample into the rows `left` and `right`."""
    n = len(left)
    return np.array(
        [
            [k[left[i], left[j]] + k[right[i], right[j]] - k[left[i], right[j]] - k[right[i], left[j]] for j in range(n)]
            for i in range(n)
        ]
    )


def loop_mmd(k, left, right):
    h, n = loop_h(k, left, right), len(left)
    return sum(h[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))


def loop_variance(k, n):
    h = loop_h(k, range(n), range(n, 2 * n))
    total = sum(h[i, j] for i in range(n) for j in range(n))
    return 4 / n**3 * sum(sum(h[i, j] for j in range(n)) ** 2 for i in range(n)) - 4 / n**4 * total**2


def gaussian_gram(points):
    points = points.double().numpy()
    return np.exp(-((points[:, None] - points[None]) ** 2).sum(-1) / 4)


def test_mmd_u_and_its_variance_are_the_loops():
    k = gaussian_gram(torch.randn(14, 3, generator=seeded(0)))
    mmd_u, variance = two_sample.mmd_and_variance(torch.from_numpy(k))
    assert float(mmd_u) == pytest.approx(loop_mmd(k, range(7), range(7, 14)), abs=1e-14)
    assert float(variance) == pytest.approx(loop_variance(k, 7), abs=1e-14)


def test_permutations_of_the_gram_matrix_are_the_loops():
    k = gaussian_gram(torch.cat(draw("MMD-D", 6, 2, 3, shift=0.7)))
    found = two_sample.gram_permutation_test(torch.from_numpy(k), 50, seeded(2))
    splits = two_sample.mmd.random_splits(1, 50, 12, seeded(2))[0].numpy()
    null = np.array([loop_mmd(k, s[:6], s[6:]) for s in splits])
    np.testing.assert_allclose(found.null, null, atol=1e-12)
    assert found.statistic == pytest.approx(loop_mmd(k, range(6), range(6, 12)), abs=1e-12)
    assert found.p_value == (1 + (null >= found.statistic - 1e-12).sum()) / 51


def test_mmd_d_is_the_deep_kernel_on_the_half_it_did_not_learn_from():
    x, y = draw("MMD-D", 16, 3, 5, shift=0.3)
    found = two_sample.mmd_d_test(x, y, seed=6, n_perm=30, n_epochs=5, learning_rate=1e-2)
    generator = seeded(6)
    halves = two_sample._network_inputs(two_sample.split_halves(x, y, generator), 64)
    kernel = two_sample.train_deep_kernel(halves.x_train, halves.y_train, 5, 100, 1e-2, 6, generator)
    inputs = torch.cat([halves.x_test, halves.y_test])
    features = kernel.featuriser(inputs).detach().double().numpy()
    inputs, e = inputs.double().numpy(), 1 / (1 + np.exp(-kernel.logit_e.item()))
    s0, s = np.exp(kernel.log_s0.item()), np.exp(kernel.log_s.item())
    k = np.zeros((16, 16))
    for i, j in itertools.product(range(16), repeat=2):
        raw = np.exp(-((inputs[i] - inputs[j]) ** 2).sum() / s)
        k[i, j] = (1 - e) * np.exp(-((features[i] - features[j]) ** 2).sum() / s0) * raw + e * raw
    splits = two_sample.mmd.random_splits(1, 30, 16, generator)[0].numpy()
    null = np.array([loop_mmd(k, split[:8], split[8:]) for split in splits])
    assert found.statistic == pytest.approx(loop_mmd(k, range(8), range(8, 16)), abs=1e-6)
    np.testing.assert_allclose(found.null, null, atol=1e-6)
    assert found.p_value == (1 + (null >= found.statistic).sum()) / 31


def test_the_deep_kernel_learns():
    """Training raises the criterion by which it was trained, from where the medians put it; e starts as published."""
    x, y = draw("MMD-D", 40, 3, 0, shift=0.5)
    inputs = torch.cat([x, y])
    distances = two_sample._squared_distances(inputs, inputs)

    def criterion(n_epochs):
        kernel = two_sample.train_deep_kernel(x, y, n_epochs, 100, 5e-3, 0, seeded(0))
        mmd_u, variance = two_sample.mmd_and_variance(kernel(inputs, distances))
        return (mmd_u / (variance + 1e-8).sqrt()).item(), kernel

    before, kernel = criterion(0)
    i, j = np.triu_indices(80, 1)
    assert kernel.log_s.exp().item() == pytest.approx(np.median(distances.numpy()[i, j]), rel=0.01)
    assert kernel.logit_e.sigmoid().item() == pytest.approx(1e-10, rel=0.01)
    assert criterion(60)[0] > 1.5 * before


def test_the_convolutions_are_those_of_liu_et_al():
    """Parameters counted by hand: four 3x3 convolutions 3-16-32-64-128, three batch norms, 128 x 4 x 4 -> 300 at 64 pixels."""
    network = two_sample._featuriser((3, 64, 64))
    convolutions = sum(9 * a * b + b for a, b in ((3, 16), (16, 32), (32, 64), (64, 128)))
    batch_norms = 2 * (32 + 64 + 128)
    assert sum(p.numel() for p in network.parameters()) == convolutions + batch_norms + 2048 * 300 + 300
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 300)


# --- All tests ----------------------------------------------------------------------------------------------------------


@EVERY_TEST
def test_level_without_a_shift(name):
    """Rejections at 0.05 in 60 draws without a shift: no more than the 99.9 % point of the binomial."""
    p_values = [TESTS[name](*draw(name, 20, 3, s), seed=s, **CHEAP[name]).p_value for s in range(60)]
    assert all(0 < p <= 1 for p in p_values)
    assert sum(p <= 0.05 for p in p_values) <= stats.binom.ppf(0.9995, 60, 0.05)
    assert np.mean(np.array(p_values) > 0.5) > 0.25  # half of them, for exact tests; none, for one that always rejects


@EVERY_TEST
def test_power_under_a_shift(name):
    shift = torch.tensor([3.0, -3.0, 0.0])
    p_values = [TESTS[name](*draw(name, 30, 3, s, shift), seed=s, **CHEAP[name]).p_value for s in range(5)]
    assert max(p_values) <= 0.05


@EVERY_TEST
def test_images_are_accepted_whole_numbers_or_not(name):
    x, y = images(44 if name == "MMD-CC" else 22, 0), images(22, 1, brightest=60)
    found = TESTS[name](x, y, seed=1, **CHEAP[name])
    again = TESTS[name](x.float() / 255, y.float() / 255, seed=1, **CHEAP[name])
    assert found.statistic == again.statistic
    assert found.p_value == again.p_value
    assert isinstance(found.statistic, float) and 0 < found.p_value <= 1
    if name not in ("MMD", "MMD-CC"):  # blind to brightness: a cosine
        assert found.p_value <= 0.05


@LEARNED
def test_a_step_goes_along_its_own_gradient(name, monkeypatch):
    x, y = draw(name, 16, 3, 0, shift=0.5)
    found = TESTS[name](x, y, seed=3, **CHEAP[name])
    step, n_steps = torch.optim.Adam.step, []

    def spoil_afterwards(optimiser):
        step(optimiser)
        n_steps.append(1)
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                parameter.grad.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.Adam, "step", spoil_afterwards)
    assert TESTS[name](x, y, seed=3, **CHEAP[name]).statistic == found.statistic
    assert n_steps


@EVERY_TEST
def test_a_seed_says_it_all(name):
    x, y = draw(name, 16, 3, 0, shift=0.5)
    torch.manual_seed(98)
    found = TESTS[name](x, y, seed=3, **CHEAP[name])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = TESTS[name](x, y, seed=3, **CHEAP[name])
    assert torch.equal(torch.get_rng_state(), before)
    assert (again.statistic, again.p_value) == (found.statistic, found.p_value)
    if name not in ("MMD", "MMD-CC"):  # these learn nothing: another seed, the same statistic
        assert len({TESTS[name](x, y, seed=s, **CHEAP[name]).statistic for s in range(4)}) > 1


def test_halves_hold_each_sample_once_and_the_first_alone_sets_the_scale():
    halves = two_sample.split_halves(torch.arange(1.0, 12)[:, None], torch.arange(21.0, 32)[:, None], seeded(0))
    assert [len(z) for z in (halves.x_train, halves.y_train, halves.x_test, halves.y_test)] == [5, 5, 6, 6]
    assert sorted(torch.cat([halves.x_train, halves.x_test]).flatten().tolist()) == list(range(1, 12))
    assert sorted(torch.cat([halves.y_train, halves.y_test]).flatten().tolist()) == list(range(21, 32))
    scaled = two_sample._standardised(halves)
    train = torch.cat([scaled.x_train, scaled.y_train])
    assert float(train.mean()) == pytest.approx(0, abs=1e-6)
    assert float(train.square().mean()) == pytest.approx(1, abs=1e-6)
    other = two_sample._standardised(replace(halves, x_test=halves.x_test * 100))
    assert torch.equal(other.x_train, scaled.x_train) and torch.equal(other.y_test, scaled.y_test)


def test_batches_cover_an_epoch_and_none_is_small():
    steps = list(two_sample._batches(25, 2, 10, seeded(0)))
    assert [len(i) for i, _ in steps] == [13, 12, 13, 12] == [len(j) for _, j in steps]
    for side in (0, 1):
        assert sorted(torch.cat([s[side] for s in steps[:2]]).tolist()) == list(range(25))
    assert not torch.equal(steps[0][0], steps[0][1])


@LEARNED
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(12, 3), torch.ones(11, 3), r"x \(12, 3\), y \(11, 3\); expected equal shapes"),
        (torch.ones(12, 3), torch.ones(12, 4), "equal shapes"),
        (images(12, 0), torch.ones(12, 3), "equal shapes"),
        (torch.ones(3, 3), torch.ones(3, 3), "x: found 3 samples, expected at least"),
        (torch.ones(12, 3, 4), torch.ones(12, 3, 4), r"expected \([nN], D\)"),
        (torch.ones(12, 3), torch.full((12, 3), float("nan")), "y: found 36 NaN"),
        (torch.ones(12, 3, 8, 8), torch.full((12, 3, 8, 8), 2.0), r"y: found values in \[2, 2\]"),
    ],
)
def test_bad_samples_are_refused_by_name(name, x, y, message):
    with pytest.raises(ValueError, match=message):
        TESTS[name](x, y)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("ME", dict(n_locations=9), "x: found 16 samples, expected at least 19"),
        ("ME", dict(reference="t"), "reference: found 't'"),
        ("C2ST-S", dict(n_perm=0), "n_perm: found 0"),
        ("C2ST-L", dict(batch_size=1), "batch_size: found 1"),
        ("MMD-D", dict(n_epochs=0), "n_epochs: found 0"),
        ("MMD-D", dict(image_size=40), "image_size: found 40"),
        ("MMD-CC", dict(), "x with 16 samples, y with 16; MMD-CC expects twice"),
    ],
)
def test_bad_settings_are_refused(name, setting, message):
    x, y = draw("ME", 16, 3, 0)
    with pytest.raises(ValueError, match=message):
        TESTS[name](x, y, **setting)


@pytest.mark.parametrize("name", ["ME", "C2ST-S", "C2ST-L", "MMD-D"])
@pytest.mark.parametrize("scale, offset", [(1e-30, 0.0), (1e30, 0.0), (1e-300, 0.0), (1e300, 0.0), (1.0, 1e9)])
def test_learning_knows_no_scale(name, scale, offset):
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(30, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    settings = dict(n_steps=50) if name == "ME" else dict(n_epochs=60, learning_rate=3e-3)
    x, y = x * scale + offset, (y + 2) * scale + offset
    assert TESTS[name](x.requires_grad_(), y, **settings).p_value < 0.05
    assert x.grad is None


@pytest.mark.parametrize("name", ["C2ST-S", "C2ST-L", "MMD-D"])
def test_training_that_diverges_is_no_result(name):
    x, y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="training diverged; expected a smaller learning_rate"):
        TESTS[name](x, y, n_epochs=20, learning_rate=1e30)


def test_a_zero_vector_is_a_sample_like_any_other():
    x = torch.cat([torch.zeros(1, 3), torch.randn(29, 3, generator=torch.Generator().manual_seed(0))])
    assert TESTS["ME"](x, x + 3, n_steps=20).p_value < 0.05
