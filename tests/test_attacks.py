"""Attacks against closed forms on linear victims, numpy loops in float64 written from the papers, and a small trained net."""

from __future__ import annotations

import copy
import math

import foolbox
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from cadetlib import attacks
from cadetlib.attacks import ATTACKS, accuracy, cw, cw_l2, cw_l2_ball, cw_linf, fgsm, pgd

LINF = {"fgsm": 0.05, "pgd": 0.02, "cw_linf": 0.1}  # the attacks that keep to an L-inf ball, and their default radius


def linear(weight, bias=None) -> nn.Module:
    """Logits weight @ pixels + bias, on images of 3 x 4 x 4 pixels."""
    layer = nn.Linear(48, len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        layer.bias.copy_(torch.as_tensor(np.zeros(len(weight)) if bias is None else bias))
    return nn.Sequential(nn.Flatten(), layer)


def pixels(n: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def flat(images: torch.Tensor) -> np.ndarray:
    return images.double().flatten(1).numpy()


def l2(change: torch.Tensor) -> torch.Tensor:
    return change.double().flatten(1).norm(dim=1)


@pytest.fixture(scope="module")
def test_digits(digits) -> tuple[torch.Tensor, torch.Tensor]:
    return digits[0][1400:1496], digits[1][1400:1496]


# Linear victims, where the answer is known


def test_fgsm_and_pgd_reach_the_corner_of_the_ball_for_a_confident_linear_victim():
    # A lead of 20 to 30: the probability of the label is 1 in float32, whose gradient a float32 loss would lose.
    weight = np.random.default_rng(0).normal(size=(2, 48))
    images = pixels(6, low=0.2, high=0.8)
    lead = flat(images) @ (weight[1] - weight[0])
    bias = np.array([0.0, 25.0 - lead.mean()])
    labels = torch.ones(6, dtype=torch.long)
    corner = torch.from_numpy(np.sign(weight[0] - weight[1])).view(3, 4, 4)
    classifier = linear(weight, bias)
    torch.testing.assert_close(fgsm(classifier, images, labels, eps=0.07), (images + 0.07 * corner).float())
    attacked = pgd(classifier, images, labels, eps=0.07, step=0.01, n_steps=15)
    torch.testing.assert_close(attacked, (images + 0.07 * corner).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [1, 10, 1000])
def test_how_sure_a_victim_is_does_not_change_its_attack(factor):
    """Three classes, the label far ahead: half of the way up the cross entropy is to lower the label, whose own gradient is 0
    in float64 from a lead of 37 on."""
    weight = np.random.default_rng(0).normal(size=(3, 48))
    images = pixels(6, low=0.2, high=0.8)
    bias = 10 * np.array([0.0, 0.0, 1.0]) - flat(images).mean(axis=0) @ weight.T
    found = fgsm(linear(factor * weight, factor * bias), images, torch.full((6,), 2), eps=0.05)
    others = torch.from_numpy(factor * (flat(images) @ weight.T + bias)[:, :2]).softmax(dim=1).numpy()
    upward = torch.from_numpy(np.sign(others @ weight[:2] - weight[2])).view_as(images)
    torch.testing.assert_close(found, (images + 0.05 * upward).float())


def test_pixels_that_the_victim_does_not_see_stay_as_they_are():
    weight = np.random.default_rng(0).normal(size=(3, 48))
    weight[:, ::5] = 0
    images, labels = pixels(4, low=0.2, high=0.8), torch.tensor([0, 1, 2, 0])
    for attacked in (fgsm(linear(weight), images, labels), pgd(linear(weight), images, labels, random_start=False)):
        moved = (attacked != images).flatten(1)
        assert not moved[:, ::5].any() and moved[:, 1::5].all()


def test_fgsm_and_pgd_equal_a_numpy_loop_for_softmax_regression():
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(5, 48)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    images, labels = pixels(8, seed=1), torch.arange(8) % 5

    def reference(eps: float, step: float, n_steps: int) -> np.ndarray:
        x = start = flat(images)
        for _ in range(n_steps):
            z = x @ weight.astype(float).T + bias
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            gradient = (p - np.eye(5)[labels]) @ weight.astype(float)
            x = np.clip(np.clip(x + step * np.sign(gradient), start - eps, start + eps), 0, 1)
        return x

    classifier = linear(weight, bias)
    np.testing.assert_allclose(flat(fgsm(classifier, images, labels, eps=0.3)), reference(0.3, 0.3, 1), atol=1e-6)
    attacked = pgd(classifier, images, labels, eps=0.1, step=0.03, n_steps=9, random_start=False)
    np.testing.assert_allclose(flat(attacked), reference(0.1, 0.03, 9), atol=1e-6)


def test_pgd_starts_uniformly_in_the_ball_as_the_seed_says():
    classifier, images, labels = (
        linear(np.random.default_rng(2).normal(size=(2, 48))),
        pixels(40, 2, 0.3, 0.7),
        [0] * 40,
    )
    settings = dict(eps=0.2, step=1e-7, n_steps=1)
    start = pgd(classifier, images, np.array(labels), **settings)
    assert stats.kstest(flat(start - images).ravel(), "uniform", args=(-0.2, 0.4)).pvalue > 0.01
    assert torch.equal(start, pgd(classifier, images, np.array(labels), **settings))
    other = pgd(classifier, images, np.array(labels), seed=1, **settings)
    assert abs(np.corrcoef(flat(start - images).ravel(), flat(other - images).ravel())[0, 1]) < 0.1


def test_cw_l2_finds_the_nearest_point_beyond_a_linear_boundary():
    weight = np.random.default_rng(3).normal(size=(2, 48)) / 7
    images = pixels(5, 3, 0.3, 0.7)
    normal = weight[1] - weight[0]
    bias = np.array([0.0, 0.7 - flat(images) @ normal @ np.ones(5) / 5])
    lead = flat(images) @ normal + bias[1]  # of class 1, about 0.7
    labels = torch.from_numpy((lead > 0).astype(np.int64))
    attacked = cw_l2(linear(weight, bias), images, labels, c=1.5, lr=0.01, n_steps=1000)
    change, distance = flat(attacked - images), np.abs(lead) / np.linalg.norm(normal)
    assert (flat(attacked) @ normal + bias[1] < 0).tolist() == (lead > 0).tolist()
    np.testing.assert_allclose(np.linalg.norm(change, axis=1), distance, rtol=2e-3)
    cosine = change @ normal / np.linalg.norm(change, axis=1) / np.linalg.norm(normal) * -np.sign(lead)
    assert cosine.min() > 0.999


class NumpyAdam:
    """Kingma and Ba 2015, Algorithm 1."""

    def __init__(self, lr: float) -> None:
        self.lr, self.t, self.m, self.v = lr, 0, 0.0, 0.0

    def step(self, gradient: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * gradient, 0.999 * self.v + 0.001 * gradient**2
        return -self.lr * (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


@pytest.mark.parametrize("confidence", [0.0, 0.5])
def test_cw_l2_equals_a_numpy_loop(confidence):
    rng = np.random.default_rng(4)
    weight, images = rng.normal(size=(4, 48)).astype(np.float32), pixels(6, seed=4, low=0.1, high=0.9)
    labels = linear(weight)(images).argmax(dim=1)

    def reference(x: np.ndarray, y: int, c: float, n_steps: int) -> np.ndarray:
        w, adam, best, shortest = np.arctanh((2 * x - 1) * (1 - 1e-6)), NumpyAdam(0.03), x, np.inf
        for _ in range(n_steps + 1):
            candidate = (np.tanh(w) + 1) / 2
            z = weight.astype(float) @ candidate
            other = max((k for k in range(4) if k != y), key=lambda k: z[k])
            distance = ((candidate - x) ** 2).sum()
            if z[other] - z[y] > confidence and distance < shortest:
                best, shortest = candidate, distance
            gradient = 2 * (candidate - x)
            if z[y] - z[other] > -confidence:
                gradient = gradient + c * (weight[y].astype(float) - weight[other])
            w = w + adam.step(gradient * (1 - np.tanh(w) ** 2) / 2)
        return best

    attacked = flat(cw_l2(linear(weight), images, labels, c=0.4, n_steps=40, confidence=confidence))
    expected = np.stack([reference(x, int(y), 0.4, 40) for x, y in zip(flat(images), labels, strict=True)])
    assert (np.abs(expected - flat(images)).max(axis=1) > 0.01).all()
    np.testing.assert_allclose(attacked, expected, atol=1e-4)


def test_cw_l2_leaves_alone_what_is_misclassified_already_or_cannot_be_reached(victim, test_digits):
    images = test_digits[0]
    predicted = victim(images).argmax(dim=1)
    assert (cw_l2(victim, images, (predicted + 1) % 10) - images).abs().max() < 2e-6
    assert torch.equal(cw_l2(victim, images, predicted, c=1e-9, lr=1e-6, n_steps=3), images)


def test_cw_l2_ball_goes_straight_to_its_border_for_a_linear_victim():
    weight = np.random.default_rng(5).normal(size=(2, 48))
    images, labels = pixels(4, 5, 0.3, 0.7), torch.tensor([0, 1, 0, 1])
    normal = (weight[1] - weight[0]) / np.linalg.norm(weight[1] - weight[0])
    attacked = cw_l2_ball(linear(weight), images, labels, eps=0.25, lr=0.1, n_steps=4)
    expected = 0.25 * np.where(labels[:, None] == 0, normal, -normal)
    np.testing.assert_allclose(flat(attacked - images), expected, atol=1e-6)
    halfway = cw_l2_ball(linear(weight), images, labels, eps=0.25, lr=0.1, n_steps=1)
    np.testing.assert_allclose(flat(halfway - images), expected * 0.4, atol=1e-6)


def test_cw_linf_equals_a_numpy_loop():
    weight, images = np.random.default_rng(6).normal(size=(2, 48)), pixels(12, seed=6)
    labels = torch.tensor([0, 1] * 6)
    bias = np.array(
        [0.0, (flat(images) @ (weight[0] - weight[1])).mean()]
    )  # hence some targets lead already, by less than the margin

    def reference(x: np.ndarray, target: int, margin: float, eps: float) -> np.ndarray:
        start, adam = x, NumpyAdam(0.03)
        for _ in range(12):
            z = weight @ x + bias
            active = z[1 - target] - z[target] + margin > 0
            x = x + adam.step(active * (weight[1 - target] - weight[target]))
            x = np.clip(np.clip(x, start - eps, start + eps), 0, 1)
        return x

    attacked = flat(cw_linf(linear(weight, bias), images, labels, eps=0.15, n_steps=12, margin=1.0))
    expected = np.stack([reference(x, 1 - int(y), 1.0, 0.15) for x, y in zip(flat(images), labels, strict=True)])
    assert 0 < (expected == flat(images)).all(axis=1).sum() < 6
    np.testing.assert_allclose(attacked, expected, atol=1e-5)


def test_cw_linf_targets_are_uniform_over_the_other_classes_and_follow_the_seed():
    weight = np.random.default_rng(7).normal(size=(5, 48))
    images, labels = pixels(600, 7, 0.4, 0.6), torch.arange(600) % 5
    classifier = linear(weight)

    def reached(seed: int) -> torch.Tensor:
        return classifier(cw_linf(classifier, images, labels, eps=0.4, n_steps=30, seed=seed)).argmax(dim=1)

    counts = torch.bincount((reached(0) - labels) % 5, minlength=5)
    assert counts[0] == 0 and stats.chisquare(counts[1:].numpy()).pvalue > 0.01
    assert torch.equal(reached(0), reached(0)) and 0.15 < (reached(0) == reached(1)).float().mean() < 0.35


# What every attack promises


def test_fgsm_and_pgd_are_foolbox_s(victim, test_digits):
    """Rauber et al.'s library, no random start: one image but where a gradient is all but zero, whose sign is rounding."""
    images, labels = (part[:40] for part in test_digits)
    model = foolbox.PyTorchModel(victim.eval(), bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.LinfFastGradientAttack()(model, images, labels, epsilons=0.05)[1]
    assert ((theirs - fgsm(victim, images, labels, eps=0.05)).abs() < 1e-6).double().mean() > 0.99
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=0.002, steps=50, random_start=False)
    theirs = attack(model, images, labels, epsilons=0.02)[1]
    ours = pgd(victim, images, labels, eps=0.02, step=0.002, n_steps=50, random_start=False)
    assert ((theirs - ours).abs() < 1e-5).double().mean() > 0.98
    assert accuracy(victim, theirs, labels) == accuracy(victim, ours, labels)


def test_cw_l2_is_foolbox_s(victim, test_digits):
    """One search step of theirs at our constant; they look at one iterate fewer."""
    images, labels = (part[:40] for part in test_digits)
    model = foolbox.PyTorchModel(victim.eval(), bounds=(0, 1), device="cpu")
    settings = dict(binary_search_steps=1, steps=50, stepsize=0.03, initial_const=3.0, abort_early=False)
    _, theirs, found = foolbox.attacks.L2CarliniWagnerAttack(**settings)(model, images, labels, epsilons=None)
    ours = cw_l2(victim, images, labels, c=3.0, lr=0.03, n_steps=49)
    mine = victim(ours).argmax(1) != labels
    assert found.sum() > 10 and (found == mine).double().mean() > 0.95
    both = found & mine
    assert torch.allclose(l2(theirs - images)[both], l2(ours - images)[both], rtol=0.02)


@pytest.mark.parametrize("name", ATTACKS)
def test_results_are_float_images_in_range_and_in_the_ball(name, victim, test_digits):
    images, labels = test_digits
    as_bytes = (images * 255).round().to(torch.uint8)
    attacked = ATTACKS[name](victim, as_bytes, labels.to(torch.int32))
    change = attacked.double() - as_bytes.double() / 255
    assert attacked.dtype == torch.float32 and attacked.shape == images.shape
    assert 0 <= attacked.min() and attacked.max() <= 1
    assert change.abs().max() > 0.01
    assert name not in LINF or change.abs().max() <= LINF[name] + 1e-7
    assert name != "cw_l2_ball" or l2(change).max() <= 0.1 + 1e-6


@pytest.mark.parametrize("name", ATTACKS)
def test_an_image_fares_the_same_alone_and_in_any_company(name, victim, test_digits):
    images, labels = (t[:12] for t in test_digits)
    # Steps of a fixed L2 length zigzag across the kinks of the margin and blow rounding errors up (to 5e-5 in 50 steps).
    settings = dict(n_steps=10) if name == "cw_l2_ball" else {}
    together = ATTACKS[name](victim, images, labels, **settings)
    alone = ATTACKS[name](victim, images, labels, batch_size=1, **settings)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:8]
    assert (together - images).abs().max() > 0.01
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    in_company = ATTACKS[name](victim, images[shuffled], labels[shuffled], batch_size=3, **settings)
    torch.testing.assert_close(in_company, together[shuffled], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_classifier_is_used_in_eval_mode_and_left_as_it_was(name, victim, test_digits):
    images, labels = (t[:8] for t in test_digits)
    expected = ATTACKS[name](victim, images, labels)
    net = copy.deepcopy(victim).train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    original = images.clone()
    with torch.no_grad():
        torch.testing.assert_close(ATTACKS[name](net, images, labels), expected)
    with torch.inference_mode():  # tensors made here refuse gradients
        result = ATTACKS[name](net, images.clone(), labels.clone())
    torch.testing.assert_close(result, expected)
    with pytest.raises(ValueError, match="labels"):
        ATTACKS[name](net, images, labels + 10)
    assert [module.training for module in net.children()] == [True, False] + [True] * 6 and net.training
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * (len(list(net.parameters())) - 1)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(images, original) and not result.requires_grad and not images.requires_grad


def test_accuracy_falls_with_the_radius_and_pgd_is_the_stronger(victim, test_digits):
    images, labels = test_digits
    radii = (0.01, 0.05, 0.1, 0.2)
    one_step = [accuracy(victim, images, labels)] + [accuracy(victim, fgsm(victim, images, labels, r), labels) for r in radii]
    many = one_step[:1] + [accuracy(victim, pgd(victim, images, labels, r, r / 10, 20), labels) for r in radii]
    assert one_step[0] > 0.9 and many[4] < 0.1
    assert one_step == sorted(one_step, reverse=True) and many == sorted(many, reverse=True)
    assert all(p <= f for p, f in zip(many, one_step, strict=True)) and many[3] < one_step[3]


def test_every_cw_misleads_the_victim_given_room(victim, test_digits):
    images, labels = test_digits
    room = {"l2": dict(c=10.0, n_steps=100), "l2_ball": dict(eps=2.0, lr=0.2), "linf": dict(eps=0.3)}
    for variant, settings in room.items():
        assert accuracy(victim, cw(victim, images, labels, variant, **settings), labels) < 0.1


def test_defaults_are_the_settings_of_the_paper(victim, test_digits):
    images, labels = (t[:16] for t in test_digits)
    settings = {
        "fgsm": dict(eps=0.05),
        "pgd": dict(eps=0.02, step=0.002, n_steps=50, random_start=True, seed=0),
        "cw_l2": dict(c=0.1, lr=0.03, n_steps=50, confidence=0.0),
        "cw_l2_ball": dict(eps=0.1, lr=0.03, n_steps=50),
        "cw_linf": dict(eps=0.1, lr=0.03, n_steps=50, margin=20.0, seed=0),
    }
    assert settings.keys() == ATTACKS.keys()
    for name, explicit in settings.items():
        assert torch.equal(ATTACKS[name](victim, images, labels), ATTACKS[name](victim, images, labels, **explicit))
    assert torch.equal(cw(victim, images, labels), cw_l2(victim, images, labels))


def test_accuracy_counts_hits(victim, test_digits):
    images, labels = test_digits
    wrong = torch.where(torch.arange(96) % 3 == 0, (labels + 1) % 10, labels)
    expected = np.mean(victim(images).argmax(dim=1).numpy() == wrong.numpy())
    net, seen = copy.deepcopy(victim).train(), []
    net.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    assert accuracy(net, images, wrong, batch_size=7) == pytest.approx(expected) and 0.5 < expected < 0.7
    assert set(seen) == {(False, False)} and net.training
    assert accuracy(victim, (images * 255).round().to(torch.uint8), wrong.numpy()) == pytest.approx(expected, abs=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ATTACKS)
def test_the_work_is_done_where_the_classifier_is_and_comes_back_to_the_images(name, victim, test_digits):
    images, labels = test_digits
    on_gpu = ATTACKS[name](copy.deepcopy(victim).cuda(), images, labels)
    assert on_gpu.device == images.device
    # A gradient near 0 may change its sign between devices: not every pixel needs to agree.
    assert ((on_gpu - ATTACKS[name](victim, images, labels)).abs() > 1e-3).float().mean() < 0.05


class _Detached(nn.Sequential):
    def forward(self, x):
        return super().forward(x.detach())


IMAGES, LABELS = pixels(3), torch.tensor([0, 1, 0])
BAD = {
    "images": [(fgsm, dict(images=IMAGES[0])), (fgsm, dict(images=IMAGES * 255)), (pgd, dict(images=IMAGES * math.nan))],
    "labels": [
        (fgsm, dict(labels=LABELS[:2])),
        (pgd, dict(labels=LABELS.float())),
        (cw_linf, dict(labels=LABELS.bool())),
        (cw_l2, dict(labels=LABELS + 1)),
        (cw_l2_ball, dict(labels=LABELS - 1)),
        (accuracy, dict(labels=LABELS + 1)),
        (accuracy, dict(labels=LABELS[:2])),
    ],
    "classifier": [
        (fgsm, dict(classifier=lambda x: x)),
        (pgd, dict(classifier=nn.Identity())),
        (fgsm, dict(classifier=linear(np.ones((1, 48))))),
        (cw_l2, dict(classifier=_Detached(nn.Flatten(), nn.Linear(48, 2)))),
        (cw_l2_ball, dict(classifier=linear(np.full((2, 48), math.nan)))),
    ],
    "eps": [(a, dict(eps=bad)) for a in (fgsm, pgd, cw_linf, cw_l2_ball) for bad in (-0.1, math.nan, math.inf)]
    + [(a, dict(eps=0.0)) for a in (cw_linf, cw_l2_ball)],
    "step": [(pgd, dict(step=0.0))],
    "n_steps": [(a, dict(n_steps=bad)) for a in (pgd, cw_l2, cw_l2_ball, cw_linf) for bad in (0, 1.5)],
    "lr": [(a, dict(lr=0.0)) for a in (cw_l2, cw_l2_ball, cw_linf)],
    "c": [(cw_l2, dict(c=0.0))],
    "confidence": [(cw_l2, dict(confidence=-1.0))],
    "margin": [(cw_linf, dict(margin=math.nan))],
    "batch_size": [(a, dict(batch_size=0)) for a in (fgsm, accuracy)],
    "variant": [(cw, dict(variant="linf0"))],
    "settings": [(cw, dict(variant="l2", eps=0.1))],
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_refused_by_name(name):
    usual = dict(classifier=linear(np.ones((2, 48))), images=IMAGES, labels=LABELS)
    for function, wrong in BAD[name]:
        with pytest.raises(ValueError, match=rf"^{name}\b.*expected"):
            function(**{**usual, **wrong})


def test_a_gradient_that_is_not_a_number_is_refused():
    class Root(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum(dim=(1, 2, 3)), (x[:, 0, 0, 0] * 0).sqrt()], dim=1)

    with pytest.raises(ValueError, match="gradients"):
        attacks.fgsm(Root(), IMAGES, LABELS)


def test_a_curve_over_strengths_begins_at_the_images_themselves():
    classifier, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), torch.rand(4, 3, 4, 4)
    y = torch.arange(4) % 3
    assert torch.equal(fgsm(classifier, x, y, eps=0), x) and torch.equal(pgd(classifier, x, y, eps=0, n_steps=3), x)
    with pytest.raises(ValueError, match="step: found 0"):
        pgd(classifier, x, y, eps=0.1, step=0)
