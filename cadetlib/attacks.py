"""Adversarial attacks on a classifier (Section 5.1): FGSM, PGD and three readings of "CW".

An attack sees the victim only as a differentiable map from images in [0, 1] to logits, so normalisation of pixels belongs to
the victim. It returns float32 images: rounding them to 8 bits would undo much of it. Losses are summed over a batch and random
numbers are a function of (seed, pixels), hence an image's result does not depend on who shares its batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cadetlib import checks, rng
from cadetlib.encoders import device_of, encode

_INSIDE = 1 - 1e-6  # keeps atanh finite at pixels of 0 and 1


def fgsm(classifier: nn.Module, images: Any, labels: Any, eps: float = 0.05, batch_size: int = 128) -> Tensor:
    """Fast gradient sign method (Goodfellow et al. 2014): one step of length eps up the cross entropy, L-inf.

    classifier: any module from images to logits (N, n_classes); images: (N, 3, H, W) uint8 or [0, 1]; labels: (N,) integers
    -> attacked images (N, 3, H, W) float32 in [0, 1] on the images' device, at most eps from the images at every pixel (eps 0:
    the images). Paper: eps 0.05. Wrong input raises ValueError.

    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> attacked = fgsm(classifier, torch.full((1, 3, 2, 2), 0.5), torch.tensor([1]))
    >>> bool(((attacked - 0.5).abs() - 0.05).abs().max() < 1e-6)
    True
    """
    return pgd(classifier, images, labels, eps, step=eps, n_steps=1, random_start=False, batch_size=batch_size)


def pgd(
    classifier: nn.Module,
    images: Any,
    labels: Any,
    eps: float = 0.02,
    step: float = 0.002,
    n_steps: int = 50,
    random_start: bool = True,
    seed: int = 0,
    batch_size: int = 128,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2017): n_steps steps of the gradient's sign up the cross entropy, L-inf ball eps.

    The start is uniform in the ball as a function of (seed, the image's pixels), or the image itself. Images, labels, result
    and errors as for `fgsm`. Paper: eps 0.02, step 0.002, 50 steps; the random start is Madry et al.'s.

    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> images = torch.full((1, 3, 2, 2), 0.5)
    >>> change = pgd(classifier, images, torch.tensor([1]), eps=0.02, step=0.005, n_steps=20) - images
    >>> [round(float(v), 3) for v in change.abs().aminmax()]  # a linear victim: the corner of the ball
    [0.02, 0.02]
    """
    eps = checks.not_negative(eps, "eps")
    _check_steps(n_steps, **({"step": step} if eps else {}))  # at eps 0, where a curve over strengths begins, nothing moves

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        low, high = linf_box(x, eps)
        moved = x
        if random_start:
            draws = rng.uniform(seed, rng.image_keys(x), torch.tensor([rng.ATTACK_START]), x[0].numel())
            moved = (x + eps * (2 * draws.view_as(x) - 1)).clamp(low, high)
        for _ in range(n_steps):
            moved = moved.detach().requires_grad_()
            # The cross entropy is log(1 + exp(-lead)), whose gradient vanishes where a victim is confident; that of the lead, of
            # the same sign, does not.
            logits = encode(classifier, moved, "classifier").double()
            others = logits.scatter(1, y[:, None], -math.inf).logsumexp(dim=1)
            lead = logits.gather(1, y[:, None])[:, 0] - others
            moved = (moved - step * input_gradient(lead.sum(), moved).sign()).clamp(low, high)
        return moved.detach()

    return _in_batches(perturb, classifier, images, labels, batch_size)


def cw(classifier: nn.Module, images: Any, labels: Any, variant: str = "l2", **settings: Any) -> Tensor:
    """The paper's CW, "norm L2, delta 0.10, learning rate 0.03, and 50 iterations", in one of three readings.

    variant "l2" (`cw_l2`): Carlini and Wagner's own L2 attack, with trade-off c = 0.10;
    variant "l2_ball" (`cw_l2_ball`): their margin loss within an L2 ball of radius 0.10;
    variant "linf" (`cw_linf`): the CW of Hu et al. 2019, their margin loss within an L-inf ball of radius 0.10.

    The default is "l2": the attack that the paper cites, in the norm that it names, with its learning rate of Adam and its
    iterations; only the symbol delta must stand for c, the one constant left. "l2_ball" is the most literal, but Table 5 has
    CW lower m_in as far as PGD does (0.954 both), whose L2 norm reaches 0.02 sqrt(3 * 224 * 224) = 7.8. "linf" fits Table 5,
    and 0.1, 0.03 and 50 are just the settings of Hu et al.'s program, but the norm is not L2. So report all three.

    settings: keywords of the variant. Images, labels, result and errors as for `fgsm`, within the variant's own ball.

    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> images, labels = torch.full((1, 3, 2, 2), 0.5), torch.tensor([1])
    >>> bool((cw(classifier, images, labels, variant="linf", eps=0.1) - images).abs().max() <= 0.1 + 1e-6)
    True
    """
    functions = {name.removeprefix("cw_"): function for name, function in ATTACKS.items() if name.startswith("cw_")}
    if variant not in functions:
        raise ValueError(f"variant: found {variant!r}, expected one of {list(functions)}")
    known = list(inspect.signature(functions[variant]).parameters)[3:]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"settings: found {unknown}, expected settings of variant {variant!r}: {known}")
    return functions[variant](classifier, images, labels, **settings)


def cw_l2(
    classifier: nn.Module,
    images: Any,
    labels: Any,
    c: float = 0.1,
    lr: float = 0.03,
    n_steps: int = 50,
    confidence: float = 0.0,
    batch_size: int = 128,
) -> Tensor:
    """Carlini and Wagner's L2 attack (2017, Section VI-A), untargeted: the smallest change found that misleads the classifier.

    Adam minimises |x' - x|^2 + c max(z_label - max_other z, -confidence) over w, x' = (tanh w + 1) / 2. Of all iterates of an
    image the nearest that is misclassified by more than `confidence` is returned, and the image itself when there is none:
    raise c where that is often so, as on small images, whose changes are long (the original searches for c). No radius holds.
    Pixels of exactly 0 or 1 hardly move, since the tanh is flat there. Images, labels, result and errors as for `fgsm`.

    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    >>> _ = nn.init.eye_(classifier[1].weight)  # class 0 or 1, whichever of the first two pixels is the larger
    >>> images = torch.tensor([0.55] + [0.5] * 11).view(1, 3, 2, 2)
    >>> attacked = cw_l2(classifier, images, torch.tensor([0]), c=1.0)
    >>> accuracy(classifier, attacked, [0]), bool((attacked - images).norm() < 0.1)
    (0.0, True)
    """
    _check_steps(n_steps, c=c, lr=lr)
    checks.not_negative(confidence, "confidence")

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        w = torch.atanh((2 * x - 1) * _INSIDE).requires_grad_()
        optimizer = torch.optim.Adam([w], lr=lr)
        nearest, shortest = x, torch.full((len(x),), math.inf, device=x.device)
        for _ in range(n_steps + 1):  # the iterate after the last step counts too
            candidate = (torch.tanh(w) + 1) / 2
            lead = _lead(classifier, candidate, y)
            distance = (candidate - x).square().sum(dim=(1, 2, 3))
            nearer = ((lead < -confidence) & (distance < shortest)).detach()
            shortest = torch.where(nearer, distance, shortest).detach()
            nearest = torch.where(nearer.view(-1, 1, 1, 1), candidate, nearest).detach()
            w.grad = input_gradient((distance + c * lead.clamp(min=-confidence)).sum(), w)
            optimizer.step()
        return nearest

    return _in_batches(perturb, classifier, images, labels, batch_size)


def cw_l2_ball(
    classifier: nn.Module,
    images: Any,
    labels: Any,
    eps: float = 0.1,
    lr: float = 0.03,
    n_steps: int = 50,
    batch_size: int = 128,
) -> Tensor:
    """Carlini and Wagner's margin z_label - max_other z, descended within an L2 ball of radius eps around each image, untargeted.

    Each of n_steps steps has L2 length lr along the gradient and is projected back on the ball: Adam, which moves all pixels
    alike, would leave so small a ball at every step. Images, labels, result and errors as for `fgsm`, but the ball is L2.

    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> images = torch.full((1, 3, 2, 2), 0.5)
    >>> round(float((cw_l2_ball(classifier, images, torch.tensor([1]), eps=0.1) - images).norm()), 4)
    0.1
    """
    _check_steps(n_steps, eps=eps, lr=lr)

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        moved = x
        for _ in range(n_steps):
            moved = moved.detach().requires_grad_()
            lead = _lead(classifier, moved, y)
            gradient = input_gradient(lead.sum(), moved)
            change = moved.detach() - lr * gradient / _l2(gradient).clamp(min=1e-12) - x
            moved = (x + change * (eps / _l2(change).clamp(min=eps))).clamp(0, 1)  # clamping brings it nearer to x, not out
        return moved.detach()

    return _in_batches(perturb, classifier, images, labels, batch_size)


def cw_linf(
    classifier: nn.Module,
    images: Any,
    labels: Any,
    eps: float = 0.1,
    lr: float = 0.03,
    n_steps: int = 50,
    margin: float = 20.0,
    seed: int = 0,
    batch_size: int = 128,
) -> Tensor:
    """The CW of Hu et al. 2019 (without knowledge of their detector): targeted at a random class, in an L-inf ball of radius eps.

    Adam minimises max(max_other z - z_target + margin, 0) over the pixels, clipped to the ball and [0, 1] after every step. An
    image's target is uniform over the other classes, a function of (seed, the image's pixels). Images, labels, result and
    errors as for `fgsm`. The defaults are those of Hu et al.'s program.

    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    >>> images = torch.full((1, 3, 2, 2), 0.5)
    >>> change = cw_linf(classifier, images, torch.tensor([1]), eps=0.1) - images
    >>> round(float(change.abs().max()), 4)
    0.1
    """
    _check_steps(n_steps, eps=eps, lr=lr)
    checks.not_negative(margin, "margin")

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        low, high = linf_box(x, eps)
        target = random_targets(x, y, encode(classifier, x[:1], "classifier").shape[1], seed)
        moved = x.clone().requires_grad_()
        optimizer = torch.optim.Adam([moved], lr=lr)
        for _ in range(n_steps):
            lead = _lead(classifier, moved, target)
            moved.grad = input_gradient((margin - lead).clamp(min=0).sum(), moved)
            optimizer.step()
            with torch.no_grad():
                moved.clamp_(low, high)
        return moved.detach()

    return _in_batches(perturb, classifier, images, labels, batch_size)


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "cw_l2": cw_l2,
    "cw_l2_ball": cw_l2_ball,
    "cw_linf": cw_linf,
}


def accuracy(classifier: nn.Module, images: Any, labels: Any, batch_size: int = 512) -> float:
    """Share of images (N, 3, H, W), uint8 or [0, 1], whose largest logit is their label's (N,); wrong input raises ValueError.

    >>> brighter_is_1 = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> with torch.no_grad():
    ...     _ = brighter_is_1[1].weight.copy_(torch.tensor([[0.0], [1.0]])), brighter_is_1[1].bias.copy_(torch.tensor([6.0, 0.0]))
    >>> accuracy(brighter_is_1, torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)]), [0, 0])
    0.5
    """
    return float(correct(classifier, images, labels, batch_size).double().mean())


def correct(classifier: nn.Module, images: Any, labels: Any, batch_size: int = 512) -> Tensor:
    """Whether the largest logit of each image (N, 3, H, W), uint8 or [0, 1], is its label's (N,): (N,) bool on the CPU.

    >>> correct(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(3, 3, 2, 2), [0, 1, 0]).dtype
    torch.bool
    """
    x = checks.as_tensor(images, "images")
    y = checks.labels(labels, len(x) if x.ndim else 0)
    batch_size, found = checks.at_least(batch_size, "batch_size", 1), []
    with evaluating(classifier) as device, torch.no_grad():
        for some, their_labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = encode(classifier, checks.images(some).to(device), "classifier")
            found.append((logits.argmax(dim=1) == checks.in_classes(their_labels, logits.shape[1]).to(device)).cpu())
    return torch.cat(found)


def _in_batches(
    perturb: Callable[[Tensor, Tensor], Tensor], classifier: nn.Module, images: Any, labels: Any, batch_size: int
) -> Tensor:
    """perturb(images, labels), batch by batch on the classifier's device, gathered on the device of the images."""
    x = checks.images(images).detach()
    y = checks.labels(labels, len(x))
    checks.at_least(batch_size, "batch_size", 1)
    with evaluating(classifier) as device:
        checks.in_classes(y, count_classes(classifier, x[:1].to(device, copy=True)))
        attacked = torch.empty_like(x)
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            # Copies, for tensors made under inference_mode would refuse to take part in a gradient.
            attacked[part] = perturb(x[part].to(device, copy=True), y[part].to(device, copy=True))
    return attacked


@contextmanager
def evaluating(classifier: nn.Module) -> Iterator[torch.device]:
    """Eval mode with gradients, whatever surrounds the call; afterwards every submodule is in the mode it was in.

    The context gives the classifier's device; ValueError for what is no module.

    >>> classifier = nn.Dropout()
    >>> with torch.no_grad(), evaluating(classifier) as device:
    ...     print(classifier.training, torch.is_grad_enabled(), device)
    False True cpu
    >>> classifier.training
    True
    """
    if not isinstance(classifier, nn.Module):
        raise ValueError(f"classifier: found {type(classifier).__name__}, expected a torch.nn.Module from images to logits")
    modes = {module: module.training for module in classifier.modules()}
    classifier.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield device_of(classifier)
    finally:
        for module, training in modes.items():
            module.training = training


def count_classes(classifier: nn.Module, image: Tensor) -> int:
    """The number of logits for image (1, 3, H, W) float, which is made to require a gradient.

    ValueError when the classifier fails on it, when there are fewer than two, or when no gradient leads back to the image.

    >>> count_classes(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2))
    2
    """
    logits = encode(classifier, image.requires_grad_(), "classifier")
    if logits.shape[1] < 2:
        raise ValueError(f"classifier: returned {logits.shape[1]} logit per image, expected one per class, at least 2")
    input_gradient(logits.sum(), image)
    return logits.shape[1]


def _check_steps(n_steps: int, **sizes: float) -> None:
    """At least one step, and sizes (a radius, a step, a weight) that are positive and finite."""
    for name, size in sizes.items():
        checks.in_open_interval(size, name, high=math.inf)
    checks.at_least(n_steps, "n_steps", 1)


def input_gradient(loss: Tensor, at: Tensor, retain_graph: bool = False) -> Tensor:
    """The gradient of a scalar loss at a tensor, and nowhere else: none is left on the classifier's parameters.

    ValueError where none comes back, or none that is finite.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> input_gradient(x.square().sum(), x), x.grad
    (tensor([2., 4.]), None)
    """
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, at, retain_graph=retain_graph, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "classifier: found no gradient from logits to images, expected one (is there a no_grad or detach inside?)"
        )
    return checks.finite(gradient, "classifier's gradients")


def linf_box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest images within eps of x at every pixel and within [0, 1].

    >>> linf_box(torch.tensor([0.0, 0.5]), eps=0.25)
    (tensor([0.0000, 0.2500]), tensor([0.2500, 0.7500]))
    """
    return (x - eps).clamp(min=0), (x + eps).clamp(max=1)


def _l2(x: Tensor) -> Tensor:
    """The L2 norm of each image (N, 3, H, W) -> (N, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _lead(classifier: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """By how much the logit of an image's class exceeds its largest other one: (N, 3, H, W), (N,) -> (N,)."""
    logits = encode(classifier, x, "classifier")
    others = logits.scatter(1, classes[:, None], -math.inf).amax(dim=1)
    return logits.gather(1, classes[:, None])[:, 0] - others


def random_targets(x: Tensor, labels: Tensor, n_classes: int, seed: int) -> Tensor:
    """A class other than the label for each image, uniform, a function of (seed, pixels): (N,) int64.

    >>> random_targets(torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1]), n_classes=2, seed=0)
    tensor([1, 0, 1, 0])
    """
    draws = rng.uniform(seed, rng.image_keys(x), torch.tensor([rng.ATTACK_TARGET]), 1).flatten().double()
    return (labels + 1 + (draws * (n_classes - 1)).long()) % n_classes
