"""Hu et al.'s criteria against loops over one image at a time, and the detectors' scores against what their rules say."""

from __future__ import annotations

import copy
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import nn

from cadetlib import hu, rng
from cadetlib.attacks import accuracy, cw_l2, cw_linf, random_targets
from cadetlib.hu import Criteria, Hu, HuSelfCalibrated, HuTuned, criteria, noise_distance, steps_to_leave, tune_hu

WIDE = dict(sigma=0.1, lr=0.02, lr_untargeted=0.5, radius=0.3, cap_targeted=12, cap_untargeted=20)  # digits leave, most of them


def linear(weight, bias=None) -> nn.Module:
    """Logits weight @ pixels + bias, on images of 3 x 4 x 4 pixels."""
    layer = nn.Linear(48, len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        layer.bias.copy_(torch.as_tensor(np.zeros(len(weight)) if bias is None else bias))
    return nn.Sequential(nn.Flatten(), layer)


def pixels(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def some(digits) -> torch.Tensor:
    return digits[0][1400:1424]


@pytest.fixture(scope="module")
def measured(victim, some) -> Criteria:
    return criteria(victim, some, **WIDE)


def same(a: Criteria, b: Criteria, index=slice(None)) -> bool:
    """Equal counts, and C1 equal but for the network's rounding."""
    return (
        torch.equal(a.c2t[index], b.c2t)
        and torch.equal(a.c2u[index], b.c2u)
        and torch.allclose(a.c1[index], b.c1, rtol=1e-4, atol=1e-6)
    )


# The criteria


@pytest.mark.parametrize("targeted", [True, False])
def test_steps_equal_a_loop_over_one_image_at_a_time(targeted, victim, some):
    lr, radius, cap = (0.02, 0.3, 12) if targeted else (0.5, 0.3, 20)

    def reference(image: torch.Tensor) -> int:
        x, predicted = image.clone(), int(victim(image).argmax())
        target = random_targets(image, torch.tensor([predicted]), 10, 3) if targeted else torch.tensor([predicted])
        for count in range(1, cap):
            x.requires_grad_()
            loss = -torch.log_softmax(victim(x).double(), dim=1)[0, target]
            slope = torch.autograd.grad(loss.sum(), x)[0]
            x = x.detach() - lr * slope if targeted else x.detach() + lr * slope
            x = torch.min(torch.max(x, image - radius), image + radius).clamp(0, 1)
            if int(victim(x).argmax()) != predicted:
                return count
        return cap

    expected = [reference(image[None]) for image in some]
    assert len(set(expected)) > 4 and 0 < expected.count(cap) < 20
    found = steps_to_leave(victim, some, targeted, lr=lr, radius=radius, cap=cap, seed=3, batch_size=5)
    assert found.tolist() == expected and found.dtype == torch.float64


def test_both_walks_equal_a_numpy_loop_for_softmax_regression():
    rng_ = np.random.default_rng(1)
    weight, bias = rng_.normal(size=(2, 48)).astype(np.float32), np.array([0.0, 0.5], np.float32)
    images = pixels(30, 1)

    def reference(x: np.ndarray, rate: float, aims_at_other: bool) -> int:
        start, w = x, weight.astype(float)
        predicted = int((w @ x + bias).argmax())
        aim = 1 - predicted if aims_at_other else predicted
        for count in range(1, 60):
            p = np.exp(w @ x + bias) / np.exp(w @ x + bias).sum()
            gradient = (p - np.eye(2)[aim]) @ w
            x = x - rate * gradient if aims_at_other else x + rate * gradient
            x = np.clip(np.clip(x, start - 0.08, start + 0.08), 0, 1)
            if (w @ x + bias).argmax() != predicted:
                return count
        return 60

    for targeted in (True, False):
        expected = [reference(x, 0.004, targeted) for x in images.double().flatten(1).numpy()]
        assert len(set(expected)) > 5 and 0 < expected.count(60) < 25
        found = steps_to_leave(linear(weight, bias), images, targeted, lr=0.004, radius=0.08, cap=60)
        assert found.tolist() == expected


def test_a_class_that_is_all_but_certain_still_has_a_gradient():
    # Probability 1 - 1e-13, in float32 1, and its gradient 0: no step however long would move.
    classifier = linear([[2.0] * 48, [0.0] * 48], [-18.0, 0.0])  # logits 30 and 0 at the image, -18 and 0 at black
    assert steps_to_leave(classifier, torch.full((1, 3, 4, 4), 0.5), False, lr=1e14, radius=1.0, cap=9).item() == 1


def test_noise_distance_equals_the_formula_with_normal_noise(victim, some):
    uniform = rng.uniform(5, rng.image_keys(some), torch.tensor([-3]), 192)[:, 0].double().numpy()
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, :96])), 2 * np.pi * uniform[:, 96:]
    noise = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(some.shape)
    noisy = some + 0.2 * torch.from_numpy(noise).float()
    p, q = (torch.softmax(victim(x).double(), dim=1).detach().numpy() for x in (some, noisy))
    expected = np.abs(p - q).sum(axis=1)
    assert expected.max() > 0.1 and noisy.min() < 0
    np.testing.assert_allclose(noise_distance(victim, some, sigma=0.2, seed=5), expected, rtol=1e-4, atol=1e-7)


def test_noise_is_standard_normal_and_follows_seed_and_pixels():
    odd = torch.rand(40, 3, 5, 5, generator=torch.Generator().manual_seed(0))  # 75 numbers an image: not a multiple of two
    noise = hu._gaussian(odd, 0)
    assert noise.shape == odd.shape and stats.kstest(noise.numpy().ravel(), "norm").pvalue > 0.01
    among_pixels, among_images = np.corrcoef(noise.flatten(1).T), np.corrcoef(noise.flatten(1))
    assert np.abs(among_pixels - np.eye(75)).mean() < 0.15 and np.abs(among_images - np.eye(40)).mean() < 0.11
    assert torch.equal(noise[3:5], hu._gaussian(odd[3:5], 0))
    assert abs(np.corrcoef(noise.numpy().ravel(), hu._gaussian(odd, 1).numpy().ravel())[0, 1]) < 0.06


def test_an_image_fares_the_same_in_any_company(victim, some, measured):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert len(set(measured.c2t.tolist())) > 4 and len(set(measured.c2u.tolist())) > 4
    assert same(measured, criteria(victim, some[order], **WIDE), order)
    assert same(measured, criteria(victim, some[order[:9]], **WIDE, batch_size=4), order[:9])
    assert same(measured, criteria(victim, torch.cat([some[order[:5]]] * 2)[:7], **WIDE, batch_size=3), order[[*range(5), 0, 1]])
    assert same(measured, criteria(victim, some[:3], **WIDE, batch_size=1), slice(3))


def test_a_walk_counts_its_cap_when_it_never_leaves_or_leaves_with_the_last_step(victim, some):
    assert steps_to_leave(victim, some, True, lr=1e-9, cap=3).tolist() == [3.0] * 24
    assert steps_to_leave(victim, some, False, lr=1e-9, cap=1).tolist() == [1.0] * 24
    full = steps_to_leave(victim, some, False, lr=0.5, radius=0.3, cap=20)
    assert 0 < (full == 4).sum() and 0 < (full > 4).sum() < 24
    assert torch.equal(steps_to_leave(victim, some, False, lr=0.5, radius=0.3, cap=4), full.clamp(max=4))


def test_defaults_are_those_of_the_published_program_for_imagenet():
    expected = dict(
        sigma=0.01, lr=0.005, lr_untargeted=0.1, radius=0.03, cap_targeted=200, cap_untargeted=1000, seed=0, batch_size=128
    )
    assert {name: p.default for name, p in list(inspect.signature(criteria).parameters.items())[2:]} == expected
    assert Hu().settings() == HuSelfCalibrated().settings() == expected
    weight, images = np.random.default_rng(8).normal(size=(3, 48)) / 2, pixels(60, 8)
    classifier = linear(weight, -weight @ images.double().flatten(1).numpy().mean(axis=0))  # no class far ahead
    explicit = criteria(classifier, images, **expected)
    assert explicit.c2t.max() == 200 and explicit.c2u.max() == 1000 and len(explicit.c2t.unique()) > 3
    alone = (
        noise_distance(classifier, images),
        steps_to_leave(classifier, images, True),
        steps_to_leave(classifier, images, False),
    )
    assert same(explicit, criteria(classifier, images)) and same(explicit, Criteria(*alone))


def test_the_cost_is_what_the_classifier_is_asked(victim, some, measured):
    net, passes = copy.deepcopy(victim), []
    net.register_forward_hook(lambda _, x, y: passes.append(len(x[0]) * (3 if torch.is_grad_enabled() else 1)))
    criteria(net, some, **WIDE, batch_size=7)
    cost = hu.forward_passes(measured, WIDE["cap_targeted"], WIDE["cap_untargeted"])
    assert sum(passes) - 2 * 3 == cost.sum()  # one image is tried at the start of each walk, to see that it has a gradient
    detector = Hu(**WIDE).fit(victim, some)
    assert math.isnan(detector.forwards)
    detector.score_samples(some[:6])
    assert detector.forwards == pytest.approx(float(cost[:6].mean()))


def test_the_classifier_is_used_in_eval_mode_and_left_as_it_was(victim, some, measured):
    net = copy.deepcopy(victim).train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.inference_mode():  # tensors made here refuse gradients
        assert same(measured, criteria(net, some.clone(), **WIDE))
    with torch.no_grad():
        assert same(measured, criteria(net, some.numpy(), **WIDE))
    assert net.training and not net[1].training and not net[0].weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


# The detectors


def made_up(n: int, seed: int) -> Criteria:
    """Criteria with ties and with values at the cap."""
    draws = np.random.default_rng(seed)
    columns = draws.random(n) ** 3, draws.integers(1, 12, n).clip(max=8), draws.integers(1, 30, n).clip(max=20)
    return Criteria(*(torch.from_numpy(np.asarray(column, float)) for column in columns))


def test_the_score_of_hu_is_the_false_alarm_rate_at_which_any_threshold_is_exceeded():
    clean, images, weights = made_up(40, 0), made_up(60, 1), (1.0, 0.5, 0.25)
    detector = Hu(weights=weights).fit_criteria(nn.Identity(), clean)
    scores = detector.score_criteria(images).numpy()
    assert len(set(scores)) > 20 and scores.min() > 0
    # A criterion's threshold is the lowest that at most w alpha (n + 1) - 1 clean images reach. Does the image reach any?
    for alpha in (0.03, 0.1, 0.301, 0.8, 2.0):
        flagged = np.zeros(60, bool)
        for c, values, w in zip(clean, images, weights, strict=True):
            candidates = np.unique(np.concatenate([c.numpy(), values.numpy(), [np.inf]]))
            allowed = [t for t in candidates if (c.numpy() >= t).sum() + 1 <= w * alpha * 41]
            flagged |= values.numpy() >= min(allowed, default=np.inf)
        np.testing.assert_array_equal(scores <= alpha, flagged)
    alone = Hu(weights=(0, 2, 0)).fit_criteria(nn.Identity(), clean).score_criteria(images)
    by_hand = [(1 + sum(c >= v for c in clean.c2t.tolist())) / 41 / 2 for v in images.c2t.tolist()]
    np.testing.assert_allclose(alone, by_hand)


def test_self_calibration_standardises_as_numpy_does():
    clean, images = made_up(30, 2), made_up(50, 3)
    detector = HuSelfCalibrated().fit_criteria(nn.Identity(), clean)
    c, x = np.stack(clean), np.stack(images)
    np.testing.assert_allclose(detector.means_, c.mean(axis=1))
    np.testing.assert_allclose(detector.deviations_, c.std(axis=1, ddof=1))
    expected = -((x - c.mean(axis=1)[:, None]) / c.std(axis=1, ddof=1)[:, None]).sum(axis=0)
    np.testing.assert_allclose(detector.score_criteria(images), expected)


def test_a_criterion_without_spread_is_left_out_with_a_warning():
    clean, images = made_up(30, 4), made_up(20, 5)
    stuck = clean._replace(c2u=torch.full((30,), 1000.0, dtype=torch.float64), c1=0.3 + 1e-9 * clean.c1)
    with pytest.warns(UserWarning, match="left out.*c1, c2u, the same"):
        detector = HuSelfCalibrated().fit_criteria(nn.Identity(), stuck)
    expected = -(images.c2t - clean.c2t.mean()) / clean.c2t.std()
    torch.testing.assert_close(detector.score_criteria(images), expected)
    with pytest.raises(ValueError, match="same value of each criterion for all 30 clean images, expected a spread"):
        HuSelfCalibrated().fit_criteria(nn.Identity(), stuck._replace(c2t=stuck.c2u))


@pytest.mark.parametrize("detector", [Hu, HuTuned, HuSelfCalibrated])
def test_detectors_work_on_images_and_use_no_label(detector, victim, digits, some, measured):
    images, labels = digits[0][1200:1230], digits[1][1200:1230]
    fitted = detector(**WIDE).fit(victim, images, labels)
    expected = detector(**WIDE).fit_criteria(victim, criteria(victim, images, **WIDE)).score_criteria(measured)
    scores = fitted.score_samples((some * 1).numpy())
    assert scores.shape == (24,) and scores.dtype == torch.float64 and scores.device.type == "cpu"
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(detector(**WIDE).fit(victim, images, (labels + 1) % 10).score_samples(some), scores)
    assert (detector.post_hoc, detector.needs_logits) == (False, True)
    assert detector.tuned_on_anomalies == (detector is HuTuned)


def test_fit_measures_so_many_images_at_most_drawn_as_the_seed_says(victim, digits):
    def calibration(seed: int, n: int) -> list[float]:
        settings = {**WIDE, "cap_targeted": 1, "cap_untargeted": 1, "seed": seed, "n_calibration": n}
        return sorted(Hu(**settings).fit(victim, digits[0][1200:1220]).calibration_.c1.tolist())

    everyone, nine = calibration(0, 30), calibration(0, 9)
    assert len(everyone) == 20 and len(nine) == 9 and calibration(0, 9) == nine
    assert all(min(abs(c - value) for c in everyone) < 1e-6 for value in nine)
    assert nine != pytest.approx(sorted(noise_distance(victim, digits[0][1200:1209], sigma=0.1).tolist()))


def test_larger_scores_are_cleaner(victim, digits):
    """C1 tells digits that an attack leaves just beyond the border, where noise has an easy game, and C2 those it drives deep.

    Each half of Hu et al.'s argument holds where the attack is of its kind, and not for the other: the sum need not be right.
    """
    images, labels = digits[0][1300:1380], digits[1][1300:1380]
    clean, calibration, labels = images[:40], images[40:], labels[:40]
    near, deep = cw_l2(victim, clean, labels, c=20.0), cw_linf(victim, clean, labels, eps=0.6)
    assert accuracy(victim, clean, labels) > 0.9 and accuracy(victim, near, labels) < 0.2 > accuracy(victim, deep, labels)
    for attacked, weights in ((near, (1, 0, 0)), (deep, (0, 0, 1))):
        detector = Hu(**WIDE, weights=weights).fit(victim, calibration)
        found = auroc(detector.score_samples(clean), detector.score_samples(attacked))
        assert found > 0.7


def auroc(inside, outside) -> float:
    return roc_auc_score(np.repeat([1, 0], [len(inside), len(outside)]), np.concatenate([inside, outside]))


def test_tuning_finds_the_best_of_the_grid(victim, digits):
    clean, labels = digits[0][1300:1324], digits[1][1300:1324]
    attacked = cw_linf(victim, clean, labels, eps=0.3)[:16]
    fixed = dict(radius=0.3, cap_targeted=12, cap_untargeted=20)
    grid = dict(sigma=(0.001, 0.3), lr=(1e-6, 0.02), lr_untargeted=(0.5, 0.01), weights=(1.0, 0.2, 0.0))
    tuned = tune_hu(victim, clean, attacked, grid=grid, **fixed)
    best, columns = {}, []
    for key, f in {
        "sigma": lambda x, v: noise_distance(victim, x, v),
        "lr": lambda x, v: steps_to_leave(victim, x, True, v, 0.3, 12),
        "lr_untargeted": lambda x, v: steps_to_leave(victim, x, False, v, 0.3, 20),
    }.items():
        values = {v: (f(clean, v), f(attacked, v)) for v in grid[key]}
        aurocs = {v: auroc(-a, -b) for v, (a, b) in values.items()}
        assert len(set(aurocs.values())) == 2
        best[key] = max(aurocs, key=aurocs.get)
        columns.append(values[best[key]])
    assert {key: getattr(tuned, key) for key in best} == best
    inside, outside = (Criteria(*(column[i] for column in columns)) for i in (0, 1))
    over_weights = [
        auroc(d.score_criteria(inside), d.score_criteria(outside))
        for w in itertools.product(grid["weights"], repeat=3)
        if max(w) > 0
        for d in [Hu(weights=w).fit_criteria(victim, inside)]
    ]
    found = auroc(tuned.score_criteria(inside), tuned.score_criteria(outside))
    assert found == pytest.approx(max(over_weights)) and min(over_weights) < found
    assert isinstance(tuned, HuTuned) and tuned.tuned_on_anomalies and (tuned.radius, tuned.cap_targeted) == (0.3, 12)
    assert same(tuned.calibration_, inside)
    part = tune_hu(
        victim, clean, attacked, grid={"sigma": (0.3, 0.001)}, lr=0.02, weights=(1, 2, 0), **{**fixed, "cap_untargeted": 2}
    )
    assert (part.sigma, part.lr, part.weights) == (best["sigma"], 0.02, (1.0, 2.0, 0.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_work_is_done_where_the_classifier_is_and_comes_back_to_the_cpu(victim, some, measured):
    on_gpu = criteria(copy.deepcopy(victim).cuda(), some, **WIDE)
    assert all(column.device.type == "cpu" for column in on_gpu)
    assert (on_gpu.c2t == measured.c2t).float().mean() > 0.9 and (on_gpu.c2u == measured.c2u).float().mean() > 0.9
    torch.testing.assert_close(on_gpu.c1, measured.c1, rtol=1e-2, atol=1e-4)


class _Detached(nn.Sequential):
    def forward(self, x):
        return super().forward(x.detach())


IMAGES = pixels(3)
TWO = linear(np.ones((2, 48)))
BAD = {
    "images": [dict(images=IMAGES[0]), dict(images=IMAGES * 255), dict(images=IMAGES * math.nan), dict(images=IMAGES[:0])],
    "classifier": [
        dict(classifier=lambda x: x),
        dict(classifier=nn.Identity()),
        dict(classifier=linear(np.ones((1, 48)))),
        dict(classifier=_Detached(nn.Flatten(), nn.Linear(48, 2))),
        dict(classifier=linear(np.full((2, 48), math.nan))),
    ],
    "sigma": [dict(sigma=bad) for bad in (0.0, -1.0, math.nan, math.inf)],
    "lr": [dict(lr=bad) for bad in (0.0, math.nan)],
    "lr_untargeted": [dict(lr_untargeted=0.0)],
    "radius": [dict(radius=0.0), dict(radius=math.inf)],
    "cap_targeted": [dict(cap_targeted=0), dict(cap_targeted=1.5)],
    "cap_untargeted": [dict(cap_untargeted=0)],
    "batch_size": [dict(batch_size=0)],
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_refused_by_name(name):
    for wrong in BAD[name]:
        with pytest.raises(ValueError, match=rf"^{name}\b.*expected"):
            criteria(**{**dict(classifier=TWO, images=IMAGES, cap_untargeted=2, cap_targeted=2), **wrong})
        if name not in ("images", "classifier"):
            with pytest.raises(ValueError, match=rf"^{name}\b.*expected"):
                Hu(**wrong)


@pytest.mark.parametrize("weights", [(1, 1), (0, 0, 0), (1, -1, 1), (1, math.nan, 1), (1, math.inf, 1)])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match=r"^weights: .*expected three numbers"):
        Hu(weights=weights)


def test_detectors_refuse_what_they_cannot_use():
    short = dict(cap_targeted=2, cap_untargeted=2)
    refused = {
        "without calibration, expected fit": lambda: HuSelfCalibrated().score_samples(IMAGES),
        "without calibration, expected": lambda: Hu().score_criteria(made_up(3, 0)),
        r"^labels: found shape \(2,\)": lambda: Hu(**short).fit(TWO, IMAGES, [0, 1]),
        r"^labels: .*expected integers": lambda: Hu(**short).fit(TWO, IMAGES, IMAGES[:, 0, 0, 0]),
        "^images: found 1 images, expected at least 2": lambda: Hu(**short).fit(TWO, IMAGES[:1]),
        "^n_calibration: found 1": lambda: Hu(n_calibration=1),
        r"^grid: found \['eps'\]": lambda: tune_hu(TWO, IMAGES, IMAGES, grid={"eps": (1,)}),
        r"^grid: found no value for \['lr'\]": lambda: tune_hu(TWO, IMAGES, IMAGES, grid={"lr": ()}),
        r"^grid: found weights \(0,\)": lambda: tune_hu(TWO, IMAGES, IMAGES, grid={"weights": (0,)}, **short),
        "^attacked: found images of": lambda: tune_hu(TWO, IMAGES, IMAGES[..., :2], **short),
        "^clean: found": lambda: tune_hu(TWO, IMAGES[:1], IMAGES, **short),
        "^attacked: found 0": lambda: tune_hu(TWO, IMAGES, IMAGES[:0], **short),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_labels_of_no_class_seeds_and_criteria_that_are_no_numbers_are_refused(victim, some):
    with pytest.raises(ValueError, match="labels: found"):
        hu.Hu(cap_targeted=2, cap_untargeted=2).fit(victim, some, torch.arange(len(some)) + 50)
    with pytest.raises(ValueError, match=r"seed: found 1\.5"):
        hu.Hu(seed=1.5)
    broken = hu.Criteria(torch.tensor([float("nan"), 1.0]), torch.rand(2), torch.rand(2))
    with pytest.raises(ValueError, match="c1: found 1 NaN"):
        hu.HuSelfCalibrated().fit_criteria(victim, broken)
    with pytest.raises(ValueError, match="criteria: found shapes"):
        hu.Hu().fit_criteria(victim, hu.Criteria(torch.rand(2), torch.rand(2), torch.rand(3)))
