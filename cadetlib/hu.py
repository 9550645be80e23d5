"""Hu et al. 2019, "A new defense against adversarial images: turning a weakness into a strength" (rows of Table 4).

Around a natural image the classifier withstands noise, yet a gradient finds another class in a few steps. An attacked image
fails one or the other, whence three criteria, all of them larger for an image that looks attacked:

    C1   how far noise moves the class probabilities                               `noise_distance`
    C2t  gradient steps towards a random class until the predicted one is left     `steps_to_leave(targeted=True)`
    C2u  gradient steps away from the predicted class until it is left             `steps_to_leave(targeted=False)`

What they did not publish, or the paper leaves open, is chosen here: how three criteria make one score (`Hu`), what "tuned" means
(`tune_hu`) and what self-calibration is (`HuSelfCalibrated`). The class to leave is always the predicted one, right or wrong:
labels play no part. The criteria know only their image, so its values do not depend, up to float32's rounding of the network,
on the images it is measured with.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadetlib import checks, rng
from cadetlib.attacks import count_classes, evaluating, input_gradient, linf_box, random_targets
from cadetlib.cadet import p_values
from cadetlib.encoders import encode
from cadetlib.metrics import auroc

_ROUNDING = 1e-6  # a criterion that spreads less than this share of its largest value spreads by float32's rounding alone

# Where `tune_hu` searches. Hu et al.'s program has sigma 0.1 (ImageNet) and 0.01 (CIFAR-10), steps of 0.005 and 0.0005 with a
# target, of 0.1, 1 and 3 without; shares of false alarms are compared as ratios, 0 leaves a criterion out.
GRID: dict[str, tuple[float, ...]] = {
    "sigma": (0.001, 0.01, 0.1),
    "lr": (0.0005, 0.005, 0.05),
    "lr_untargeted": (0.005, 0.1, 1.0, 3.0),
    "weights": (0.0, 0.1, 1.0),
}


class Criteria(NamedTuple):
    """The three criteria of images, each (N,) float64 on the CPU, larger = looks more attacked.

    >>> measured = Criteria(c1=torch.tensor([0.1]), c2t=torch.tensor([3.0]), c2u=torch.tensor([200.0]))
    >>> measured.c2t
    tensor([3.])
    """

    c1: Tensor  # in [0, 2]
    c2t: Tensor  # whole numbers in [1, cap]
    c2u: Tensor  # whole numbers in [1, cap]


def noise_distance(classifier: nn.Module, images: Any, sigma: float = 0.01, seed: int = 0, batch_size: int = 128) -> Tensor:
    """C1: L1 distance between the class probabilities of an image and of the image with Gaussian noise -> (N,) float64, CPU.

    classifier: any module from images in [0, 1] to logits (N, n_classes); images: (N, 3, H, W) uint8 or [0, 1]. Noise of standard
    deviation sigma, a function of (seed, pixels), is added without clipping. Hu et al.: 0.1 on ImageNet, 0.01 on CIFAR-10. Two
    forward passes. Wrong input raises ValueError.

    >>> blind = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> _ = nn.init.zeros_(blind[1].weight)
    >>> noise_distance(blind, torch.full((1, 3, 2, 2), 0.5))
    tensor([0.], dtype=torch.float64)
    """
    x = checks.images(images).detach()
    checks.in_open_interval(sigma, "sigma", high=math.inf)
    checks.at_least(batch_size, "batch_size", 1)
    distances = []
    with evaluating(classifier) as device, torch.no_grad():
        for some in x.split(batch_size):
            part = some.to(device)
            clean, noisy = (_probabilities(classifier, at) for at in (part, part + sigma * _gaussian(part, seed)))
            distances.append((clean - noisy).abs().sum(dim=1).cpu())
    return torch.cat(distances)


def steps_to_leave(
    classifier: nn.Module,
    images: Any,
    targeted: bool,
    lr: float | None = None,
    radius: float = 0.03,
    cap: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> Tensor:
    """C2: steps of gradient descent until the predicted class is left, `cap` when it never is -> (N,) float64, CPU.

    targeted: descend the cross entropy of a class drawn evenly from the others as a function of (seed, pixels); otherwise
    ascend that of the predicted class. Either walk ends at whichever other class it meets first. A step is lr times the
    gradient itself, not its sign, then back into the L-inf ball of `radius` and into [0, 1]. Defaults are those of Hu et
    al.'s program for a ResNet on ImageNet: lr 0.005 and cap 200 with a target, 0.1 and 1000 without (the gradient away from
    a class that is all but certain is tiny); on CIFAR-10 it has 0.0005 and 1, with radius 0.5.

    batch_size images walk at once; where one is done the next begins. The cross entropy is of float64, in which a probability
    of 1 - 1e-9 still has a gradient. Images, classifier and errors as for `noise_distance`, but gradients must reach the images.

    >>> blind = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> _ = nn.init.zeros_(blind[1].weight)
    >>> steps_to_leave(blind, torch.rand(2, 3, 2, 2), targeted=True, cap=5)  # no gradient leads anywhere
    tensor([5., 5.], dtype=torch.float64)
    """
    x = checks.images(images).detach()
    lr = checks.in_open_interval((0.005 if targeted else 0.1) if lr is None else lr, "lr", high=math.inf)
    cap = checks.at_least((200 if targeted else 1000) if cap is None else cap, "cap", 1)
    checks.in_open_interval(radius, "radius", high=math.inf)
    checks.at_least(batch_size, "batch_size", 1)
    with evaluating(classifier) as device:
        n_classes = count_classes(classifier, x[:1].to(device, copy=True))

        def begin(place: Tensor) -> _Walkers:
            start = x[place.to(x.device)].to(device, copy=True)
            away = torch.zeros(len(start), dtype=torch.long, device=device)
            offset = random_targets(start, away, n_classes, seed) if targeted else away
            low, high = linf_box(start, radius)
            return _Walkers(place.to(device), away, start, low, high, predicted=away, offset=offset)

        return _walk(classifier, begin, len(x), -lr if targeted else lr, cap, batch_size)


def criteria(
    classifier: nn.Module,
    images: Any,
    sigma: float = 0.01,
    lr: float = 0.005,
    lr_untargeted: float = 0.1,
    radius: float = 0.03,
    cap_targeted: int = 200,
    cap_untargeted: int = 1000,
    seed: int = 0,
    batch_size: int = 128,
) -> Criteria:
    """All three criteria of images (N, 3, H, W), uint8 or [0, 1]: see `noise_distance` and `steps_to_leave`.

    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> measured = criteria(classifier, torch.rand(4, 3, 2, 2), cap_targeted=5, cap_untargeted=5)
    >>> [values.shape for values in measured]
    [torch.Size([4]), torch.Size([4]), torch.Size([4])]
    """
    x = checks.images(images).detach()
    checks.at_least(cap_targeted, "cap_targeted", 1)
    checks.at_least(cap_untargeted, "cap_untargeted", 1)
    checks.in_open_interval(lr_untargeted, "lr_untargeted", high=math.inf)
    return Criteria(
        noise_distance(classifier, x, sigma, seed, batch_size),
        steps_to_leave(classifier, x, True, lr, radius, cap_targeted, seed, batch_size),
        steps_to_leave(classifier, x, False, lr_untargeted, radius, cap_untargeted, seed, batch_size),
    )


def forward_passes(measured: Criteria, cap_targeted: int = 200, cap_untargeted: int = 1000) -> Tensor:
    """What the criteria of each image cost, (N,), in forward passes of one image; one with its backward pass counts as three.

    Two for C1, and three for each place at which a walk stood and asked for class and gradient, its start included.

    >>> forward_passes(Criteria(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([1000.0])))
    tensor([3008.])
    """
    walks = ((measured.c2t, cap_targeted), (measured.c2u, cap_untargeted))
    return 2 + 3 * torch.stack([(steps + 1).clamp(max=cap) for steps, cap in walks]).sum(dim=0)


def any_of_three(clean: Criteria, measured: Criteria, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Hu et al.'s combination as a score (N,) float64: an image is called attacked when ANY criterion exceeds its threshold.

    A threshold is a clean false alarm rate in disguise: weight w grants its criterion the rate w * alpha. Then the image is
    called attacked at all alpha from min over criteria of p / w on, where p = (1 + number of clean values >= its own) / (1 + n).
    That minimum is the score. A count at which many clean images tie (the cap, say) can never have a small p. Weight 0 leaves a
    criterion out.

    >>> clean, image = ([torch.arange(4.0)] * 3, [torch.tensor([2.0]), torch.tensor([9.0]), torch.tensor([0.0])])
    >>> any_of_three(Criteria(*clean), Criteria(*image))
    tensor([0.2000], dtype=torch.float64)
    """
    ours, theirs = _check_criteria(clean), _check_criteria(measured)
    used = [(c, m, w) for c, m, w in zip(ours, theirs, _weights(weights), strict=True) if w > 0]
    return torch.stack([p_values(-c, -m, ties="conservative") / w for c, m, w in used]).amin(dim=0)


def _check_criteria(measured: Criteria) -> Criteria:
    """Three criteria (N,) of the same images, all of them numbers."""
    columns = [checks.finite(checks.as_tensor(c, name), name) for name, c in zip(Criteria._fields, measured, strict=True)]
    if any(c.shape != columns[0].shape or c.ndim != 1 or not len(c) for c in columns):
        raise ValueError(f"criteria: found shapes {[tuple(c.shape) for c in columns]}, expected (N,) three times, N at least 1")
    return Criteria(*columns)


def standardised_sum(measured: Criteria, means: Tensor, deviations: Tensor) -> Tensor:
    """Minus the sum of (criterion - mean) / deviation over the criteria whose deviation is not 0 -> score (N,) float64.

    >>> standardised_sum(Criteria(*torch.eye(3)), torch.zeros(3), torch.tensor([1.0, 2.0, 0.0]))
    tensor([-1.0000, -0.5000, -0.0000], dtype=torch.float64)
    """
    used = deviations > 0
    columns = torch.stack(measured).double()[used]
    return -((columns - means[used, None]) / deviations[used, None]).sum(dim=0)


class _HuDetector(ABC):
    """What both detectors share: the criteria's settings (see `criteria`) and whom they are measured on.

    n_calibration: of the images given to `fit`, so many at most are measured, drawn evenly as a function of the seed, for
    a clean image may take thousands of passes. Give `fit` clean images that the classifier was not trained on: of its own
    training images it is surer than of any others. After `fit`: classifier, calibration_ (their Criteria). forwards: what
    `score_samples` last cost per image in forward passes, by `forward_passes`, for walks differ in length; nan before.
    """

    post_hoc = False
    needs_logits = True
    needs_labels = False
    tuned_on_anomalies = False

    def __init__(
        self,
        sigma: float = 0.01,
        lr: float = 0.005,
        lr_untargeted: float = 0.1,
        radius: float = 0.03,
        cap_targeted: int = 200,
        cap_untargeted: int = 1000,
        seed: int = 0,
        batch_size: int = 128,
        n_calibration: int = 1000,
    ) -> None:
        self.sigma = checks.in_open_interval(sigma, "sigma", high=math.inf)
        self.lr = checks.in_open_interval(lr, "lr", high=math.inf)
        self.lr_untargeted = checks.in_open_interval(lr_untargeted, "lr_untargeted", high=math.inf)
        self.radius = checks.in_open_interval(radius, "radius", high=math.inf)
        self.cap_targeted = checks.at_least(cap_targeted, "cap_targeted", 1)
        self.cap_untargeted = checks.at_least(cap_untargeted, "cap_untargeted", 1)
        self.seed = checks.seed(seed)
        self.batch_size = checks.at_least(batch_size, "batch_size", 1)
        self.n_calibration = checks.at_least(n_calibration, "n_calibration", 2)
        self.forwards = math.nan

    def settings(self) -> dict[str, Any]:
        """The keywords of `criteria`."""
        names = ("sigma", "lr", "lr_untargeted", "radius", "cap_targeted", "cap_untargeted", "seed", "batch_size")
        return {name: getattr(self, name) for name in names}

    def fit(self, classifier: nn.Module, images: Any, labels: Any = None) -> Self:
        """Learn the criteria of clean images (N, 3, H, W), uint8 or [0, 1]; labels are checked if given, and not used.

        ValueError when the classifier is no module from such images to logits that gradients pass through.
        """
        x = checks.images(images, at_least=2)
        with evaluating(classifier) as device:
            n_classes = count_classes(classifier, x[:1].to(device, copy=True))
        if labels is not None:
            checks.in_classes(checks.labels(labels, len(x)), n_classes)
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[: self.n_calibration]
        return self.fit_criteria(classifier, criteria(classifier, x[chosen.to(x.device)], **self.settings()))

    def fit_criteria(self, classifier: nn.Module, measured: Criteria) -> Self:
        """`fit` from criteria of clean images already measured with this detector's settings."""
        _check_criteria(measured)
        self.classifier, self.calibration_ = classifier, measured
        return self

    def score_samples(self, images: Any) -> Tensor:
        """Score of each image, (N,) float64 on the CPU; larger = more in-distribution."""
        self._check_fitted()
        measured = criteria(self.classifier, images, **self.settings())
        self.forwards = float(forward_passes(measured, self.cap_targeted, self.cap_untargeted).mean())
        return self.score_criteria(measured)

    @abstractmethod
    def score_criteria(self, measured: Criteria) -> Tensor:
        """`score_samples` from criteria already measured with this detector's settings."""

    def _check_fitted(self) -> None:
        if not hasattr(self, "calibration_"):
            raise ValueError(f"found a {type(self).__name__} without calibration, expected fit(classifier, images, labels) first")


class Hu(_HuDetector):
    """Hu et al.'s detector at their settings: called attacked when any criterion exceeds its threshold, see `any_of_three`.

    weights: the criteria's shares of false alarms, in their order; equal by default. `fit` sees clean images only: thresholds
    and settings chosen on attacked images, as in the paper's row "tuned on Adv", are `tune_hu`'s.

    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> detector = Hu(cap_targeted=5, cap_untargeted=5).fit(classifier, torch.rand(10, 3, 2, 2))
    >>> detector.score_samples(torch.rand(4, 3, 2, 2)).shape
    torch.Size([4])

    >>> detector = Hu().fit_criteria(classifier, Criteria(*[torch.arange(9.0)] * 3))
    >>> detector.score_criteria(Criteria(*torch.tensor([[9.0], [4.0], [4.0]])))  # one criterion beyond all nine: 1 / (9 + 1)
    tensor([0.1000], dtype=torch.float64)
    """

    def __init__(self, weights: Sequence[float] = (1.0, 1.0, 1.0), **settings: Any) -> None:
        super().__init__(**settings)
        self.weights = _weights(weights)

    def score_criteria(self, measured: Criteria) -> Tensor:
        self._check_fitted()
        return any_of_three(self.calibration_, measured, self.weights)


class HuTuned(Hu):
    """A `Hu` whose settings and weights were chosen on attacked images, by `tune_hu`.

    >>> HuTuned(sigma=0.1).tuned_on_anomalies, Hu(sigma=0.1).tuned_on_anomalies
    (True, False)
    """

    tuned_on_anomalies = True


class HuSelfCalibrated(_HuDetector):
    """The paper's own variant, which sees no attacked image: the criteria standardised by mean and deviation on clean images.

    The paper says no more than that; the score is minus their sum. After `fit`: means_ and deviations_ (of n - 1 degrees of
    freedom), (3,) float64. A criterion that is the same for all clean images (all at the cap, say) cannot be standardised:
    its deviation is set to 0, the sum goes on without it, and a warning says so. ValueError when none is left.

    >>> detector = HuSelfCalibrated().fit_criteria(nn.Identity(), Criteria(*[torch.tensor([0.0, 2.0, 4.0])] * 3))
    >>> detector.score_criteria(Criteria(*torch.tensor([[6.0], [2.0], [2.0]])))  # two deviations above the mean, by one criterion
    tensor([-2.], dtype=torch.float64)
    """

    def fit_criteria(self, classifier: nn.Module, measured: Criteria) -> Self:
        columns = torch.stack(_check_criteria(measured)).double()
        deviations = columns.std(dim=1)
        spread = deviations > _ROUNDING * columns.abs().amax(dim=1)
        constant = [name for name, spreads in zip(Criteria._fields, spread.tolist(), strict=True) if not spreads]
        if len(constant) == len(columns):
            raise ValueError(
                f"images: found the same value of each criterion for all {columns.shape[1]} clean images, expected a spread to "
                "standardise by; raise the caps or the step sizes, and check that the images differ"
            )
        if constant:
            warnings.warn(f"left out of the sum: {', '.join(constant)}, the same for all clean images", stacklevel=3)
        self.means_, self.deviations_ = columns.mean(dim=1), torch.where(spread, deviations, 0)
        return super().fit_criteria(classifier, measured)

    def score_criteria(self, measured: Criteria) -> Tensor:
        self._check_fitted()
        return standardised_sum(_check_criteria(measured), self.means_, self.deviations_)


def tune_hu(
    classifier: nn.Module,
    clean: Any,
    attacked: Any,
    grid: Mapping[str, Sequence[float]] = GRID,
    **settings: Any,
) -> HuTuned:
    """The row "tuned on Adv": a fitted detector, with the settings of `grid` that best tell these clean images from the attacked.

    clean, attacked: images (N, 3, H, W) that no later evaluation may use. Each criterion's own setting (sigma, lr,
    lr_untargeted) is the one with the largest AUROC of that criterion alone, the first of equals; then the weights, each from
    grid["weights"], are those with the largest AUROC of `any_of_three`. So the search costs as many measurements as
    the grid has settings, not their product. A key that `grid` lacks keeps its value of `settings`, keywords of `Hu`.

    >>> classifier, clean = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(4, 3, 2, 2)
    >>> caps = dict(cap_targeted=2, cap_untargeted=2)
    >>> tuned = tune_hu(classifier, clean, clean.flip(-1), grid={"sigma": (0.1,), "weights": (1.0,)}, **caps)
    >>> tuned.sigma, tuned.weights
    (0.1, (1.0, 1.0, 1.0))
    """
    if unknown := sorted(set(grid) - set(GRID)):
        raise ValueError(f"grid: found {unknown}, expected keys among {list(GRID)}")
    if empty := sorted(key for key, values in grid.items() if not len(values)):
        raise ValueError(f"grid: found no value for {empty}, expected one at least (leave the key out to keep its default)")
    untuned = HuTuned(**settings)
    images, n_clean = _clean_and_attacked(clean, attacked)
    chosen, measured = {}, []
    for key, measure in _measures(classifier, images, untuned).items():
        tried = {value: measure(value) for value in grid.get(key, (getattr(untuned, key),))}
        chosen[key] = max(tried, key=lambda value: auroc(-tried[value][:n_clean], -tried[value][n_clean:]))
        measured.append(tried[chosen[key]])
    inside, outside = Criteria(*(c[:n_clean] for c in measured)), Criteria(*(c[n_clean:] for c in measured))
    weights = _best_weights(inside, outside, grid["weights"]) if "weights" in grid else untuned.weights
    return HuTuned(**{**settings, **chosen, "weights": weights}).fit_criteria(classifier, inside)


def _clean_and_attacked(clean: Any, attacked: Any) -> tuple[Tensor, int]:
    """Clean images, then attacked ones, in one tensor, and the number of the clean."""
    inside, outside = checks.images(clean, "clean", at_least=2), checks.images(attacked, "attacked")
    if inside.shape[1:] != outside.shape[1:]:
        raise ValueError(
            f"attacked: found images of {tuple(outside.shape[1:])}, expected {tuple(inside.shape[1:])}, as clean ones"
        )
    return torch.cat([inside, outside.to(inside.device)]), len(inside)


def _measures(classifier: nn.Module, images: Tensor, detector: Hu) -> dict[str, Callable[[float], Tensor]]:
    """Each criterion of images as a function of its own setting, by the setting's name, the others being the detector's."""
    radius, seed, batch_size = detector.radius, detector.seed, detector.batch_size

    def steps(targeted: bool, cap: int) -> Callable[[float], Tensor]:
        return lambda lr: steps_to_leave(classifier, images, targeted, lr, radius, cap, seed, batch_size)

    return {
        "sigma": lambda sigma: noise_distance(classifier, images, sigma, seed, batch_size),
        "lr": steps(True, detector.cap_targeted),
        "lr_untargeted": steps(False, detector.cap_untargeted),
    }


def _best_weights(clean: Criteria, attacked: Criteria, values: Sequence[float]) -> tuple[float, ...]:
    """Of all triples of `values` that are not multiples of one tried before, that with the largest AUROC."""
    triples = {tuple(w / max(t) for w in t): t for t in itertools.product(sorted(values, reverse=True), repeat=3) if max(t) > 0}
    if not triples:
        raise ValueError(f"grid: found weights {tuple(values)}, expected one above 0")
    return max(triples, key=lambda w: auroc(any_of_three(clean, clean, w), any_of_three(clean, attacked, w)))


def _weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Three weights of at least 0, not all 0."""
    if len(weights) != 3 or not all(0 <= w < math.inf for w in weights) or max(weights) == 0:
        raise ValueError(f"weights: found {tuple(weights)}, expected three numbers of at least 0, not all 0: for c1, c2t, c2u")
    return tuple(float(w) for w in weights)


def _probabilities(classifier: nn.Module, x: Tensor) -> Tensor:
    return encode(classifier, x, "classifier").double().softmax(dim=1)


def _gaussian(x: Tensor, seed: int) -> Tensor:
    """Standard normal numbers of x's shape (N, 3, H, W), a function of (seed, each image's pixels), by Box and Muller 1958."""
    half = (x[0].numel() + 1) // 2
    first, second = rng.uniform(seed, rng.image_keys(x), torch.tensor([rng.HU_NOISE]), 2 * half)[:, 0].split(half, dim=1)
    length = (-2 * torch.log1p(-first)).sqrt()  # of 1 - first, in (0, 1]
    angle = 2 * math.pi * second
    return torch.cat([length * angle.cos(), length * angle.sin()], dim=1)[:, : x[0].numel()].view_as(x)


class _Walkers(NamedTuple):
    """Images under way, each field (A, ...) on the classifier's device."""

    place: Tensor  # among all images
    taken: Tensor  # steps so far
    at: Tensor
    low: Tensor
    high: Tensor
    predicted: Tensor  # the class to leave, known from the first step on
    offset: Tensor  # from that class to the one whose cross entropy the walk descends or ascends, modulo their number


def _walk(
    classifier: nn.Module, begin: Callable[[Tensor], _Walkers], n_images: int, rate: float, cap: int, batch_size: int
) -> Tensor:
    """Steps until each image leaves its class or reaches the cap, (n_images,) float64 on the CPU.

    begin: places among the images -> Walkers before their first step; batch_size of them walk at once, as long as any wait.
    """
    counts = torch.full((n_images,), cap, dtype=torch.float64)
    waiting = torch.arange(n_images)
    walkers = begin(waiting[:0])
    while len(waiting) or len(walkers.place):
        if (room := batch_size - len(walkers.place)) and len(waiting):
            walkers = _Walkers(*map(torch.cat, zip(walkers, begin(waiting[:room]), strict=True)))
            waiting = waiting[room:]
        walkers, left = _step(classifier, walkers, rate)
        counts[walkers.place[left].cpu()] = walkers.taken[left].double().cpu() - 1  # this step was taken from beyond the border
        # Whoever has taken cap steps is done wherever the last one led: its count is the cap.
        walkers = _Walkers(*(field[~left & (walkers.taken < cap)] for field in walkers))
    return counts


def _step(classifier: nn.Module, walkers: _Walkers, rate: float) -> tuple[_Walkers, Tensor]:
    """All walkers one step further up (rate > 0) or down the cross entropy, and which had left their class before it."""
    at = walkers.at.requires_grad_()
    logits = encode(classifier, at, "classifier")
    now = logits.argmax(dim=1)
    predicted = torch.where(walkers.taken == 0, now, walkers.predicted)
    # Summed, so that no image's gradient depends on how many walk along.
    loss = F.cross_entropy(logits.double(), (predicted + walkers.offset) % logits.shape[1], reduction="sum")
    moved = (at + rate * input_gradient(loss, at)).detach().clamp(walkers.low, walkers.high)
    return walkers._replace(at=moved, taken=walkers.taken + 1, predicted=predicted), now != predicted
