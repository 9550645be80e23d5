"""The detectors that CADet is compared with (Tables 3 and 4) and seventeen more, behind one interface and one registry.

`DETECTORS[name]().fit(classifier, images, labels).score_samples(images)` gives scores, larger = more in-distribution. A
post-hoc detector reads nothing of an image but the classifier's penultimate features, so it also takes these from a cache:
`fit_features(features, labels, head).score_features(features)` gives the very same scores. No detector is given an anomaly
before it scores one, unless its `tuned_on_anomalies` says so. Where pytorch-ood 0.4.0 does what `methods.md` asks it does the
work, and its sign is turned; what is written here says why. Covariances, pseudo-inverses and logits are in float64.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from pytorch_ood import detector as ood
from torch import Tensor, nn

from cadetlib import checks, metrics
from cadetlib.attacks import evaluating, input_gradient
from cadetlib.embed import embed
from cadetlib.encoders import encode
from cadetlib.hu import Hu, HuSelfCalibrated

DETECTORS: dict[str, type[Any]] = {}
ODIN_TEMPERATURES = (1.0, 10.0, 100.0, 1000.0)
ODIN_STEPS = (0.0, 0.0005, 0.001, 0.0014, 0.002, 0.0024, 0.005, 0.01, 0.05, 0.1, 0.2)
_SIMILARITIES = 2**26  # of one block of nearest neighbours: 256 MB in float32

Entry = TypeVar("Entry", bound=Callable[..., Any])


class Detector:
    """What a table says of a detector besides its scores. Learned values end in _, settings are only stored by __init__.

    >>> {name: DETECTORS[name].needs_labels for name in ("MSP", "Mahalanobis")}
    {'MSP': False, 'Mahalanobis': True}
    >>> ODIN().forwards, ODIN(step=0.0).forwards
    (4.0, 1.0)
    """

    post_hoc: ClassVar[bool] = False  # needs features alone: has fit_features and score_features
    needs_logits: ClassVar[bool] = False  # needs the classifier's linear head
    needs_labels: ClassVar[bool] = False  # other than through the head; those that do not may be given labels=None
    tuned_on_anomalies: bool = False  # has seen anomalies before it scores
    forwards: float = 1.0  # cost of a score in forward passes per image, a backward pass counted as two

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its name in DETECTORS, where it has one: classes made from functions are found nowhere else."""
        name = next((name for name, entry in DETECTORS.items() if entry is type(self)), None)
        return (object.__new__, (type(self),), vars(self)) if name is None else (_unpickled, (name,), vars(self))


def _unpickled(name: str) -> Any:
    """A bare detector of DETECTORS, whose values pickle then sets."""
    return object.__new__(DETECTORS[name])


class PostHoc(Detector, ABC):
    """A detector on penultimate features: a subclass says what to `learn` of the training features and how it `scores` others.

    The methods here check input, embed images, and score in blocks of rows, each of which is scored on its own.

    >>> class Length(PostHoc):
    ...     def scores(self, features):
    ...         return features.norm(dim=1)
    >>> Length().fit_features(torch.rand(5, 2)).score_features(torch.tensor([[3.0, 4.0]]))
    tensor([5.], dtype=torch.float64)
    """

    post_hoc = True
    rows: ClassVar[int] = 1024  # scored at a time, which bounds memory

    def learn(self, features: Tensor, labels: Tensor, head: nn.Linear) -> None:
        """Set what `scores` needs from features (N, D) floating point, labels (N,) int64 and head.

        Labels and head are None when they were not given, which only detectors that need them refuse.
        """

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """features (n, D) -> (n,), larger = more in-distribution."""

    def logits(self, features: Tensor) -> Tensor:
        """The head's logits of features (n, D): (n, n_classes) float64."""
        return self.head_(features.double())

    def fit(self, classifier: Any, images: Any, labels: Any = None) -> Self:
        """fit_features on what classifier.encoder makes of images (N, 3, S, S), uint8 or [0, 1]; labels (N,) integers."""
        encoder, head = _parts(classifier)
        x = checks.as_tensor(images, "images")
        self.fit_features(embed(encoder, x), labels, head)
        self.encoder_: nn.Module | None = encoder
        self.image_shape_ = x.shape[1:]
        return self

    def score_samples(self, images: Any) -> Tensor:
        """Scores of images (N, 3, S, S): (N,) float64 on the CPU, larger = more in-distribution."""
        encoder = getattr(self, "encoder_", None)
        if encoder is None:
            raise ValueError(f"{type(self).__name__}: found no encoder, expected fit(classifier, images, labels) before")
        x = checks.as_tensor(images, "images")
        if x.ndim == 4 and x.shape[1:] != self.image_shape_:
            raise ValueError(
                f"images: found {tuple(x.shape[1:])}, expected {tuple(self.image_shape_)}, as in fit: resize them alike"
            )
        return self.score_features(embed(encoder, x))

    def fit_features(self, features: Any, labels: Any = None, head: nn.Linear | None = None) -> Self:
        """Learn from in-distribution features (N, D), their labels (N,) and the linear head that goes with them.

        Work is done on the features' device. ValueError for other shapes, labels outside the head's classes, NaN, and for
        labels or a head that are missing where `needs_labels` or `needs_logits`.
        """
        x = checks.features(features)
        _check_head(head, x.shape[1], self.needs_logits, type(self).__name__)
        y = _check_labels(labels, len(x), head, self.needs_labels, type(self).__name__)
        vars(self).pop("n_features_", None)  # should learning fail, nothing is left that scores
        self.encoder_ = None
        self.head_: Any = None if head is None else _copy(head, x.device, torch.float64)
        with torch.no_grad():
            self.learn(x, None if y is None else y.to(x.device), head)  # type: ignore[arg-type]
        self.n_features_, self.device_ = x.shape[1], x.device
        return self

    def score_features(self, features: Any) -> Tensor:
        """Scores of features (N, D): (N,) float64 on the CPU, larger = more in-distribution."""
        if not hasattr(self, "n_features_"):
            raise ValueError(f"{type(self).__name__}: found no learned values, expected fit or fit_features before")
        x = checks.features(features)
        if x.shape[1] != self.n_features_:
            raise ValueError(f"features: found D = {x.shape[1]}, expected {self.n_features_}, as in fit")
        with torch.no_grad():
            scores = [self.scores(block.to(self.device_)).double().cpu() for block in x.split(self.rows)]
        return _check_scores(torch.cat(scores), len(x), type(self).__name__)


def register(name: str) -> Callable[[Entry], Entry]:
    """Enter a detector in DETECTORS under `name`: a subclass of PostHoc, a class of its own, or a function of logits.

    A function takes logits (n, n_classes) float64 and returns scores (n,). Cadetlib's own names cannot be taken.

    >>> @register("Centre")
    ... class Centre(PostHoc):
    ...     def learn(self, features, labels, head):
    ...         self.mean_ = features.mean(dim=0)
    ...
    ...     def scores(self, features):
    ...         return -(features - self.mean_).norm(dim=1)
    >>> detector = DETECTORS["Centre"]().fit_features(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> detector.score_features(torch.tensor([[2.0, 1.0], [2.0, 5.0]])).tolist()
    [-1.0, -5.0]

    >>> @register("Margin")
    ... def margin(logits):
    ...     top = logits.topk(2).values
    ...     return top[:, 0] - top[:, 1]
    >>> del DETECTORS["Centre"], DETECTORS["Margin"]
    """

    def enter(detector: Entry) -> Entry:
        if name in DETECTORS and DETECTORS[name].__module__.startswith("cadetlib.") > detector.__module__.startswith("cadetlib."):
            raise ValueError(f"name: found {name!r}, which is cadetlib's own, expected another name")
        DETECTORS[name] = detector if isinstance(detector, type) else _of_logits(detector)
        return detector

    return enter


def _of_logits(function: Callable[[Tensor], Tensor]) -> type[PostHoc]:
    """The post-hoc detector whose scores are a function of the logits."""

    def scores(self: PostHoc, features: Tensor) -> Tensor:
        return function(self.logits(features))

    about = {"__doc__": function.__doc__, "__module__": function.__module__, "needs_logits": True, "scores": scores}
    return type(function.__name__, (PostHoc,), about)


# Table 3, in the paper's order. Logits in float64 keep apart the confident images that float32 would all give probability 1.


@register("MSP")
def maximum_softmax(logits: Tensor) -> Tensor:
    """Maximum softmax probability (Hendrycks and Gimpel 2017).

    >>> maximum_softmax(torch.tensor([[0.0, 0.0], [0.0, 100.0]]))
    tensor([0.5000, 1.0000])
    """
    return -ood.MaxSoftmax.score(logits)


@register("Energy")
def energy(logits: Tensor) -> Tensor:
    """log sum exp of the logits, temperature 1 (Liu et al. 2020).

    >>> energy(torch.tensor([[2.0, 2.0]])) - math.log(2)
    tensor([2.])
    """
    return -ood.EnergyBased.score(logits)


@register("ODIN")
class ODIN(Detector):
    """Maximum softmax probability at temperature T after a step towards it in the image (Liang et al. 2018).

    score = max_c softmax(f(x') / T)_c with x' = x + step sign(grad_x log max_c softmax(f(x) / T)_c), which is not clipped to
    [0, 1]. `step` is in units of pixels in [0, 1] since normalisation belongs to the encoder; the original divides its step
    in normalised pixels by their deviation, which is the same. Defaults are the untuned ones of the original. Not
    pytorch-ood's class, since that cannot share forward and backward passes over a grid, nor see the gradient of an image
    whose probability rounds to 1. Cost: a forward, a backward (two) and a forward.

    >>> from cadetlib.encoders import Classifier
    >>> classifier, images = Classifier(nn.Flatten(), nn.Linear(12, 2)), torch.rand(4, 3, 2, 2)
    >>> scores = ODIN(temperature=10.0).fit(classifier, images).score_samples(images)
    >>> scores.shape, bool((scores >= 0.5).all())  # two classes
    (torch.Size([4]), True)
    """

    needs_logits = True
    forwards = 4.0

    def __init__(self, temperature: float = 1000.0, step: float = 0.0014, batch_size: int = 128) -> None:
        self.temperature, self.step, self.batch_size = temperature, step, batch_size
        if step == 0:
            self.forwards = 1.0  # there is no gradient to take

    def fit(self, classifier: Any, images: Any, labels: Any = None) -> Self:
        """Keep the classifier; images (N, 3, S, S) and labels (N,) are checked, and nothing is learned from them."""
        _, head = _parts(classifier)
        x = checks.as_tensor(images, "images")
        for block in x.split(1024) if x.ndim else [x]:
            checks.images(block)
        _check_labels(labels, len(x), head, self.needs_labels, type(self).__name__)
        self.classifier_ = classifier
        return self

    def score_samples(self, images: Any) -> Tensor:
        """Scores of images (N, 3, S, S): (N,) float64 on the CPU, larger = more in-distribution."""
        if not hasattr(self, "classifier_"):
            raise ValueError("ODIN: found no classifier, expected fit(classifier, images, labels) before")
        return odin_scores(self.classifier_, images, [self.temperature], [self.step], self.batch_size)[0, 0]


@register("MaxLogit")
def maximum_logit(logits: Tensor) -> Tensor:
    """Maximum logit (Hendrycks et al. 2022).

    >>> maximum_logit(torch.tensor([[1.0, 3.0]]))
    tensor([3.])
    """
    return -ood.MaxLogit.score(logits)


class _OfMaps(nn.Module):
    """A head on feature maps of one pixel, in float64; a class, for a function of its own could not be pickled."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, maps: Tensor) -> Tensor:
        return self.head(maps.flatten(1).double())


class _Library(PostHoc):
    """A detector of pytorch-ood on cached features. settings: keywords of its class, whose defaults hold otherwise."""

    library: ClassVar[Callable[..., Any]]  # (None for an encoder, head, **settings) -> the detector
    takes: ClassVar[str]  # "logits", "features" or "feature_maps"
    needs_logits = True
    needs_every_class: ClassVar[bool] = False  # would index out of its patterns otherwise

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def learn(self, features: Tensor, labels: Tensor | None, head: nn.Linear) -> None:
        if labels is None:  # it only reads whether they mark anomalies, by numbers below 0
            labels = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        if self.needs_every_class and len(labels.unique()) < head.out_features:
            raise ValueError(f"labels: found {len(labels.unique())} classes, expected each of the head's {head.out_features}")
        self.detector_ = type(self).library(None, self._head(features), **self.settings)
        try:
            getattr(self.detector_, f"fit_{self.takes}")(self._input(features), labels)
        except ValueError as error:  # the library's own words
            found = f"features: found none that {type(self).__name__} can learn from ({error})"
            raise ValueError(f"{found}, expected some of each class, predicted right by the head") from error

    def scores(self, features: Tensor) -> Tensor:
        return -getattr(self.detector_, f"predict_{self.takes}")(self._input(features))

    def _head(self, features: Tensor) -> Callable[[Tensor], Tensor]:
        if self.takes == "feature_maps":
            return _OfMaps(self.head_)
        return _copy(self.head_, features.device, torch.float32)  # its detectors on features cast these to float32

    def _input(self, features: Tensor) -> Tensor:
        if self.takes == "logits":
            return self.logits(features)
        return features.float() if self.takes == "features" else features.double()[:, :, None, None]


def _library(name: str, takes: str, library: Callable[..., Any], about: str, **attributes: Any) -> None:
    """Enter a detector of pytorch-ood."""
    attributes |= {"__doc__": about, "__module__": __name__, "takes": takes, "library": staticmethod(library)}
    register(name)(type(name, (_Library,), attributes))


_library(
    "KLMatching",
    "logits",
    lambda encoder, head, **settings: ood.KLMatching(encoder, **settings),
    """-min_k KL(softmax(f(x)) || mean softmax of the training images predicted as k) (Hendrycks et al. 2022).

    A class that is predicted for no training image has no template and is left out of the minimum.""",
)
_library(
    "ReAct",
    "feature_maps",
    ood.ReAct,
    """Energy of the logits of features clipped at a quantile of all training activations (Sun et al. 2021).

    percentile: that quantile, by default 0.9 as in the original; 0.99 is what ViM's comparison uses.""",
)


class Gaussians(NamedTuple):
    """Normal distributions that share a covariance: see `tied_gaussians`.

    >>> standard = Gaussians(means=torch.zeros(1, 2, dtype=torch.float64), whitener=torch.eye(2, dtype=torch.float64))
    >>> standard.distances(torch.tensor([[3.0, 4.0]])).round(decimals=4)
    tensor([[25.]], dtype=torch.float64)
    """

    means: Tensor  # (K, D) float64
    whitener: Tensor  # (D, rank) float64: whitener whitener^T = pinv(covariance)

    def distances(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distances of features (n, D) to each mean: (n, K) float64."""
        return torch.cdist((features.double() - self.means[0]) @ self.whitener, (self.means - self.means[0]) @ self.whitener) ** 2


def tied_gaussians(features: Tensor, labels: Tensor) -> Gaussians:
    """Mean of each class that occurs in labels (N,), and covariance of features (N, D) around their class means, in float64.

    Directions in which the features do not vary at all are left out, as by the covariance's pseudo-inverse. ValueError when
    there is no other.

    >>> features, labels = torch.tensor([[0.0, 1.0], [2.0, -1.0], [10.0, 1.0], [12.0, -1.0]]), torch.tensor([0, 0, 1, 1])
    >>> tied_gaussians(features, labels).means
    tensor([[ 1.,  0.],
            [11.,  0.]], dtype=torch.float64)
    """
    classes, which, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(classes), features.shape[1], dtype=torch.float64, device=features.device)
    for block, index in zip(features.split(4096), which.split(4096), strict=True):
        sums.index_add_(0, index, block.double())
    means = sums / counts[:, None]
    variances, directions = torch.linalg.eigh(second_moment(features, means, which))
    kept = variances > variances[-1] * len(variances) * torch.finfo(torch.float64).eps  # pinv's own tolerance
    if not kept.any():
        raise ValueError("features: found no variation around the class means, expected several different images per class")
    return Gaussians(means, directions[:, kept] / variances[kept].sqrt())


def second_moment(features: Tensor, centres: Tensor, which: Tensor) -> Tensor:
    """Mean of (x - c)(x - c)^T over features x (N, D), c = centres[which] (K, D), (N,): (D, D) float64.

    >>> second_moment(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(1, 2), torch.tensor([0, 0]))
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]], dtype=torch.float64)
    """
    total = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for block, index in zip(features.split(4096), which.split(4096), strict=True):  # no float64 copy of all the features
        away = block.double() - centres[index]
        total.addmm_(away.T, away)
    return total / len(features)


@register("Mahalanobis")
class Mahalanobis(PostHoc):
    """-min_k of the squared Mahalanobis distance to class mean k, with a tied covariance (Lee et al. 2018).

    Penultimate features only, no step in the image. Not pytorch-ood's class, whose means and covariance are float32 and whose
    covariance, a sum with 1e-6 on its diagonal, makes a feature that is constant in training dominate the distance.

    >>> features, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [10.0, 2.0], [10.0, -2.0]]), torch.tensor([0, 0, 1, 1])
    >>> detector = Mahalanobis().fit_features(features, labels)
    >>> detector.score_features(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])).round(decimals=4)  # variances 0.5 and 2
    tensor([-0., -2., -2.], dtype=torch.float64)
    """

    needs_labels = True

    def learn(self, features: Tensor, labels: Tensor, head: nn.Linear) -> None:
        self.gaussians_ = tied_gaussians(features, labels)

    def scores(self, features: Tensor) -> Tensor:
        return -self.gaussians_.distances(features).amin(dim=1)


@register("Residual")
class Residual(PostHoc):
    """-|P (x - u)|: length of the part of the feature x outside the training features' principal space (Wang et al. 2022).

    u = -pinv(W) b is the origin at which the head's logits vanish; the principal space is spanned by the n_principal largest
    eigenvectors of the mean of (x - u)(x - u)^T. By default 1000 of D >= 2048 dimensions, 512 of D >= 768 (both as in the
    original), and D // 2 of fewer. ValueError when the training features have no part outside that space: it is then too large,
    or the features too few, to tell anything by.

    >>> head = nn.Linear(2, 2, bias=False)
    >>> detector = Residual(n_principal=1).fit_features(torch.tensor([[3.0, 0.1], [-3.0, 0.1]]), head=head)
    >>> detector.score_features(torch.tensor([[5.0, 0.0], [5.0, 2.0]])).round(decimals=4)  # the principal space is the first axis
    tensor([-0., -2.], dtype=torch.float64)
    """

    needs_logits = True

    def __init__(self, n_principal: int | None = None) -> None:
        self.n_principal = n_principal

    def learn(self, features: Tensor, labels: Tensor, head: nn.Linear) -> None:
        n_kept = features.shape[1] - _principal_dimensions(features.shape[1], self.n_principal)
        weight, bias = self.head_.weight, self.head_.bias
        # At the precision of the head: rows that sum to 0, as a probe's do, do so up to its rounding, which must not be inverted.
        tolerance = max(weight.shape) * torch.finfo(head.weight.dtype).eps
        self.origin_ = torch.zeros_like(weight[0]) if bias is None else -torch.linalg.pinv(weight, rtol=tolerance) @ bias
        which = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        moment = second_moment(features, self.origin_[None], which)
        self.complement_ = torch.linalg.eigh(moment).eigenvectors[:, :n_kept]  # ascending eigenvalues
        blocks = features.split(self.rows)
        self.residual_ = float(torch.cat([self.residuals(block) for block in blocks]).mean())
        length = float(torch.cat([(block.double() - self.origin_).norm(dim=1) for block in blocks]).mean())
        if self.residual_ <= 1e-9 * length:
            raise ValueError(
                f"features: found a mean residual of {self.residual_:.3g} outside {features.shape[1] - n_kept} principal "
                "dimensions, expected more than rounding; fit on more images or lower n_principal"
            )

    def residuals(self, features: Tensor) -> Tensor:
        """|P (x - u)| of features x (n, D): (n,) float64."""
        return ((features.double() - self.origin_) @ self.complement_).norm(dim=1)

    def scores(self, features: Tensor) -> Tensor:
        return -self.residuals(features)


@register("ViM")
class ViM(Residual):
    """log sum exp of the logits - alpha * residual (Wang et al. 2022), the residual and its n_principal as in `Residual`.

    alpha = mean largest logit / mean residual on the training features. Not pytorch-ood's class, which computes in float32 and
    has no rule for the number of dimensions.

    >>> head = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.eye_(head.weight)
    >>> detector = ViM(n_principal=1).fit_features(torch.tensor([[1.0, 0.1], [3.0, -0.1]]), head=head)
    >>> inside, outside = detector.score_features(torch.tensor([[2.0, 0.0], [2.0, 5.0]]))
    >>> bool(inside > outside)  # although the logits of the second are larger
    True
    """

    def learn(self, features: Tensor, labels: Tensor, head: nn.Linear) -> None:
        super().learn(features, labels, head)
        largest = torch.cat([self.logits(block).amax(dim=1) for block in features.split(self.rows)])
        self.alpha_ = float(largest.mean()) / self.residual_

    def scores(self, features: Tensor) -> Tensor:
        return self.logits(features).logsumexp(dim=1) - self.alpha_ * self.residuals(features)


register("Hu")(Hu)
register("HuSelfCalibrated")(HuSelfCalibrated)


# Relatives of CADet that need neither labels nor logits: for them, fit_features(features) is enough.


@register("SSD")
class SSD(PostHoc):
    """-squared Mahalanobis distance of the unit feature to the training features' one mean (Sehwag et al. 2021).

    Their label-free detector with its one cluster, on whatever (contrastive) encoder it is given; not their training.

    >>> detector = SSD().fit_features(torch.tensor([[9.0, 1.0], [1.0, 0.0], [9.0, -1.0]]))
    >>> near, opposite = detector.score_features(torch.tensor([[5.0, 0.1], [-5.0, 0.1]]))
    >>> bool(near > opposite)
    True
    """

    def learn(self, features: Tensor, labels: Tensor, head: nn.Linear) -> None:
        one_cluster = torch.zeros(len(features), dtype=torch.int64, device=features.device)
        self.gaussians_ = tied_gaussians(_unit(features), one_cluster)

    def scores(self, features: Tensor) -> Tensor:
        return -self.gaussians_.distances(_unit(features))[:, 0]


@register("CSI-like")
class CSILike(PostHoc):
    """max_m cos(x, x_m) * |x| over training features x_m: the contrastive part of CSI's score (Tack et al. 2020, Eq. 6).

    It is that formula on the encoder it is given. It is not CSI: no training with shifted images as negatives, no classifier
    of the shift, no sum over shifted copies of the image, and the features are the encoder's, not the projection head's.

    >>> detector = CSILike().fit_features(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> detector.score_features(torch.tensor([[3.0, 0.0], [-3.0, 0.0]])) + 0.0
    tensor([3., 0.], dtype=torch.float64)
    """

    def learn(self, features: Tensor, labels: Tensor, head: nn.Linear) -> None:
        self.bank_ = _unit(features)

    def scores(self, features: Tensor) -> Tensor:
        best = nearest(_unit(features), self.bank_, 1)[:, 0]
        return (features.double() * self.bank_[best].double()).sum(dim=1)


@register("kNN")
class KNN(PostHoc):
    """-Euclidean distance of the unit feature to its k-th nearest unit training feature (Sun et al. 2022).

    k = 50 is theirs for CIFAR-10 (200 for CIFAR-100, 1000 for ImageNet). Not pytorch-ood's class, whose search takes every
    core there is; here it is blocks of one matrix product, and the distance found is computed again in float64.

    >>> detector = KNN(k=1).fit_features(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> detector.score_features(torch.tensor([[0.0, 7.0], [-1.0, 0.0]])).round(decimals=4)
    tensor([-0.0000, -1.4142], dtype=torch.float64)
    """

    def __init__(self, k: int = 50) -> None:
        self.k = k

    def learn(self, features: Tensor, labels: Tensor, head: nn.Linear) -> None:
        if checks.at_least(self.k, "k", 1) > len(features):
            raise ValueError(f"k: found {self.k}, expected at most the {len(features)} training features")
        self.bank_ = _unit(features)

    def scores(self, features: Tensor) -> Tensor:
        unit = _unit(features)
        kth = self.bank_[nearest(unit, self.bank_, self.k)[:, -1]]
        return -(unit.double() - kth.double()).norm(dim=1)


def nearest(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the k rows of bank (m, D) with the largest inner products with queries (n, D), largest first.

    >>> nearest(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]]), k=2)
    tensor([[1, 2]])
    """
    blocks = queries.to(bank.dtype).split(max(1, _SIMILARITIES // len(bank)))
    return torch.cat([(block @ bank.T).topk(k, dim=1).indices for block in blocks])


# Beyond the paper.


@register("RMD")
class RMD(Mahalanobis):
    """-min_k (d_k - d_0): Mahalanobis distance relative to that of one normal for all classes (Ren et al. 2021).

    Not pytorch-ood's class, for `Mahalanobis`' reasons.

    >>> features, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [10.0, 2.0], [10.0, -2.0]]), torch.tensor([0, 0, 1, 1])
    >>> detector = RMD().fit_features(features, labels)
    >>> of_a_class, between = detector.score_features(torch.tensor([[0.0, 0.0], [5.0, 0.0]]))
    >>> bool(of_a_class > between)
    True
    """

    def learn(self, features: Tensor, labels: Tensor, head: nn.Linear) -> None:
        super().learn(features, labels, head)
        self.background_ = tied_gaussians(features, torch.zeros_like(labels))

    def scores(self, features: Tensor) -> Tensor:
        return super().scores(features) + self.background_.distances(features)[:, 0]


@register("GradNorm")
class GradNorm(PostHoc):
    """L1 norm of the gradient by the head's weights of the cross entropy to the uniform distribution (Huang et al. 2021).

    That gradient is (softmax(f) - 1/C) x^T, an outer product, whose norm is the product of theirs: no gradient is taken.

    >>> head = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(head.weight)  # probabilities 1/2: as uniform as can be
    >>> GradNorm().fit_features(torch.rand(5, 2), head=head).score_features(torch.tensor([[3.0, 4.0]]))
    tensor([0.], dtype=torch.float64)
    """

    needs_logits = True

    def scores(self, features: Tensor) -> Tensor:
        probabilities = self.logits(features).softmax(dim=1)
        return (probabilities - 1 / probabilities.shape[1]).abs().sum(dim=1) * features.double().abs().sum(dim=1)


@register("Entropy")
def negative_entropy(logits: Tensor) -> Tensor:
    """-entropy of the softmax (Chan et al. 2021).

    >>> negative_entropy(torch.tensor([[0.0, 0.0]])) + math.log(2)
    tensor([0.])
    """
    return -ood.Entropy.score(logits)


@register("GEN")
def generalized_entropy(logits: Tensor) -> Tensor:
    """-mean of (p (1 - p))^0.1 over all classes' probabilities p (Liu et al. 2023).

    >>> sure, unsure = generalized_entropy(torch.tensor([[9.0, 0.0], [0.0, 0.0]]))
    >>> bool(sure > unsure), round(float(unsure), 4)  # 0.25^0.1
    (True, -0.8706)
    """
    return -ood.GEN.score(logits)


_SHAPED = "Energy after activation shaping, for features that are not negative"
_library("ASH", "feature_maps", ood.ASH, f"{_SHAPED}: ASH-S at 0.65, settings percentile, variant (Djurisic et al. 2023).")
_library("SCALE", "feature_maps", ood.SCALE, f"{_SHAPED}: at 0.65, setting percentile (Xu et al. 2024).")
_library("VRA", "feature_maps", ood.VRA, "Energy of features clipped at each one's 0.01 and 0.99 quantiles (Xu et al. 2023).")
_library("LTS", "features", ood.LTS, f"{_SHAPED}: logits scaled by the top 5 %, setting p (Djurisic et al. 2024).")
_library(
    "DICE",
    "features",
    lambda encoder, head, p=0.7, **settings: ood.DICE(encoder, head.weight, _bias(head), p, **settings),
    "Energy of a head without the share p of weights that contribute least on training features (Sun and Li 2022).",
    rows=64,  # it multiplies each feature with all weights before it sums
)
_library(
    "SHE",
    "features",
    ood.SHE,
    "Inner product with the mean feature of the predicted class's correctly classified images (Zhang et al. 2023).",
    needs_labels=True,
    needs_every_class=True,
)
_library("NNGuide", "features", ood.NNGuide, "Energy times similarity to the k = 10 nearest energies (Park et al. 2023).")
_library("fDBD", "features", ood.fDBD, "Mean distance to the decision boundaries, over that to the mean (Liu and Qin 2024).")
_library("NCI", "features", ood.NCI, "Projection on the predicted class's weights, alpha = 0 (Liu and Qin 2025).")
_library("PNML", "features", ood.PNML, "-regret of the last layer's normalised maximum likelihood (Bibas et al. 2021).")


# ODIN's passes, and its tuning.


def odin_scores(
    classifier: nn.Module, images: Any, temperatures: Sequence[float], steps: Sequence[float], batch_size: int = 128
) -> Tensor:
    """ODIN's scores of images (N, 3, S, S) at every temperature and step: (n_temperatures, n_steps, N) float64 on the CPU.

    One forward pass serves all temperatures, one backward pass per temperature all its steps; one forward pass per
    temperature and step > 0 remains.

    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> odin_scores(classifier, torch.rand(4, 3, 2, 2), temperatures=[1.0, 1000.0], steps=[0.0, 0.001, 0.01]).shape
    torch.Size([2, 3, 4])
    """
    for step, temperature in [(step, temperature) for step in steps for temperature in temperatures]:
        checks.not_negative(step, "step")
        checks.in_open_interval(temperature, "temperature", high=math.inf)
    x = checks.as_tensor(images, "images")
    checks.at_least(len(x), "number of images", 1)
    with evaluating(classifier) as device:
        parts = [
            _odin_grid(classifier, checks.images(batch.to(device, copy=True)), temperatures, steps).cpu()
            for batch in x.split(checks.at_least(batch_size, "batch_size", 1))
        ]
    return torch.cat(parts, dim=2)


def _odin_grid(classifier: nn.Module, x: Tensor, temperatures: Sequence[float], steps: Sequence[float]) -> Tensor:
    """odin_scores of one batch (n, 3, S, S) float32, in eval mode with gradients on."""
    signs, logits = odin_directions(classifier, x, temperatures if any(steps) else [])
    signs = signs or [x] * len(temperatures)

    def at(temperature: float, sign: Tensor, step: float) -> Tensor:
        moved = encode(classifier, x + step * sign, "classifier").double() if step else logits
        return -ood.MaxSoftmax.score(moved, temperature)

    with torch.no_grad():
        return torch.stack([torch.stack([at(t, sign, s) for s in steps]) for t, sign in zip(temperatures, signs, strict=True)])


def odin_directions(classifier: nn.Module, x: Tensor, temperatures: Sequence[float]) -> tuple[list[Tensor], Tensor]:
    """Signs of the gradient of max_c softmax(f(x) / T)_c at images x (n, 3, S, S), for each T, and the logits f(x) float64.

    For the largest logit z, max_c softmax = sigmoid(z / T - log sum exp(others / T)). The gradient of the sigmoid's argument has
    the same signs, and does not vanish where the sigmoid has rounded to 1.

    >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> directions, logits = odin_directions(classifier, torch.rand(4, 3, 2, 2), temperatures=[1.0, 10.0])
    >>> torch.stack(directions).shape, logits.shape
    (torch.Size([2, 4, 3, 2, 2]), torch.Size([4, 2]))
    """
    x = x.detach().requires_grad_()
    logits = encode(classifier, x, "classifier").double()
    largest, predicted = logits.max(dim=1)
    others = logits.scatter(1, predicted[:, None], -math.inf)
    leads = [(largest - t * (others / t).logsumexp(dim=1)).sum() for t in temperatures]
    return [input_gradient(lead, x, retain_graph=True).sign() for lead in leads], logits.detach()


def tune_odin(
    classifier: Any,
    clean_images: Any,
    anomalous_images: Any,
    temperatures: Sequence[float] = ODIN_TEMPERATURES,
    steps: Sequence[float] = ODIN_STEPS,
    batch_size: int = 128,
) -> ODIN:
    """The ODIN whose temperature and step best separate clean from anomalous images: tuned on anomalies, and it says so.

    The largest AUROC of the grid wins, the first of equal ones. The result, ready to score, has grid_: (temperature, step) ->
    AUROC, and tuned_on_anomalies = True. Its AUROC on the images given here is optimistic: report it on others.

    >>> from cadetlib.encoders import Classifier
    >>> classifier, clean = Classifier(nn.Flatten(), nn.Linear(12, 2)), torch.rand(4, 3, 2, 2)
    >>> tuned = tune_odin(classifier, clean, clean, temperatures=[10.0, 100.0], steps=[0.0])
    >>> tuned.grid_, tuned.temperature  # nothing to choose by: the first
    ({(10.0, 0.0): 0.5, (100.0, 0.0): 0.5}, 10.0)
    """
    if not temperatures or not steps:
        raise ValueError(f"found temperatures {temperatures}, steps {steps}; expected at least one of each")
    clean, anomalous = (odin_scores(classifier, x, temperatures, steps, batch_size) for x in (clean_images, anomalous_images))
    grid = {
        (temperature, step): metrics.auroc(clean[i, j], anomalous[i, j])
        for i, temperature in enumerate(temperatures)
        for j, step in enumerate(steps)
    }
    tuned = ODIN(*max(grid, key=grid.__getitem__), batch_size).fit(classifier, clean_images)
    tuned.grid_, tuned.tuned_on_anomalies = grid, True  # type: ignore[attr-defined]
    return tuned


# What is refused, and small steps.


def _parts(classifier: Any) -> tuple[nn.Module, nn.Linear]:
    """classifier.encoder and classifier.head, as cadetlib.encoders.Classifier has them."""
    encoder, head = getattr(classifier, "encoder", None), getattr(classifier, "head", None)
    if not isinstance(classifier, nn.Module) or not isinstance(encoder, nn.Module):
        raise ValueError(f"classifier: found {type(classifier).__name__}, expected a cadetlib.encoders.Classifier(encoder, head)")
    if not isinstance(head, nn.Linear):
        raise ValueError(f"head: found {type(head).__name__}, expected torch.nn.Linear")
    return encoder, head


def _check_head(head: Any, n_features: int, needed: bool, name: str) -> None:
    if head is None and not needed:
        return
    if not isinstance(head, nn.Linear):
        raise ValueError(f"head: found {type(head).__name__}, expected torch.nn.Linear{', which ' + name + ' needs' * needed}")
    if head.in_features != n_features:
        raise ValueError(f"features: found D = {n_features}, expected {head.in_features}, the head's input")
    checks.finite(head.weight.detach(), "head's weights")
    checks.finite(_bias(head).detach(), "head's bias")


def _check_labels(labels: Any, n: int, head: nn.Linear | None, needed: bool, name: str) -> Tensor | None:
    """Labels (n,) int64, from 0 and within the head's classes when there is one; None when there are none and none are needed."""
    if labels is None:
        if needed:
            raise ValueError(f"labels: found None, expected ({n},) integers, which {name} needs")
        return None
    y = checks.labels(labels, n)
    return checks.in_classes(y, int(y.max()) + 1 if head is None else head.out_features)


def _check_scores(scores: Tensor, n: int, name: str) -> Tensor:
    if scores.shape != (n,) or not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).sum())
        raise ValueError(f"{name}: found scores {tuple(scores.shape)}, {bad} of them NaN or infinite, expected ({n},) numbers")
    return scores


def _copy(head: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    return copy.deepcopy(head).to(device, dtype).requires_grad_(False)


def _bias(head: nn.Linear) -> Tensor:
    return head.weight.new_zeros(head.out_features) if head.bias is None else head.bias


def _principal_dimensions(n_features: int, wanted: int | None) -> int:
    if wanted is None:
        return 1000 if n_features >= 2048 else 512 if n_features >= 768 else n_features // 2
    if checks.at_least(wanted, "n_principal", 0) >= n_features:
        raise ValueError(f"n_principal: found {wanted}, expected fewer than the features' {n_features} dimensions")
    return wanted


def _unit(features: Tensor) -> Tensor:
    """Features (n, D) at length 1; a zero feature stays zero, so that its similarity to anything is 0."""
    return checks.unit(features)
