"""The other two-sample tests of Table 1: ME, C2ST-S, C2ST-L, MMD-D, and one way to call them beside MMD and MMD-CC.

Each learns on one half of both samples what tells them apart, and tests on the other half, which the learning never saw:

    ME      mean embeddings at J learned locations (Chwialkowski et al. 2015, Jitkrittum et al. 2016)
    C2ST-S  accuracy of a classifier (Lopez-Paz & Oquab 2017)
    C2ST-L  difference of a classifier's mean logits (Cheng & Cloninger 2019)
    MMD-D   MMD with a learned deep kernel (Liu et al. 2020)
    MMD, MMD-CC   nothing to learn: cadetlib.mmd with the cosine kernel (Section 4)

All take embeddings (n, D) or images (n, 3, H, W). What sees images as images is the convolutional network of C2ST and MMD-D;
ME, MMD and MMD-CC see them as vectors of pixels. Networks are those of Liu et al., from whom the paper quotes these rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from cadetlib import checks, mmd
from cadetlib.mmd import TestResult

N_FEATURES = 300  # width of the learned features (Liu et al. 2020)
_TIE = 1e-12  # statistics of one split, summed in another order, differ by less, as a share of the values summed


# --- Samples, halves, batches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves:
    """Both samples in halves: learn on the first, test on the second.

    >>> x, y = torch.rand(10, 3), torch.rand(10, 3)
    >>> Halves(x[:5], y[:5], x[5:], y[5:]).x_test.shape
    torch.Size([5, 3])
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def _sample(values: Any, name: str) -> Tensor:
    """Images (n, 3, H, W) in [0, 1], float32, or embeddings (n, D), float64: of any scale until they are standardised."""
    x = checks.as_tensor(values, name)
    return checks.images(x, name) if x.ndim == 4 else checks.features(x, name=name).double()


def split_halves(x: Any, y: Any, generator: torch.Generator, at_least: int = 4) -> Halves:
    """Each sample in random order, cut in two: floor(n / 2) to learn on, the rest to test on.

    x, y: equal shapes (n, D) or (n, 3, H, W), n >= `at_least`; ValueError names what is not so.

    >>> halves = split_halves(torch.rand(9, 2), torch.rand(9, 2), torch.Generator().manual_seed(0))
    >>> len(halves.x_train), len(halves.x_test)
    (4, 5)
    """
    x, y = _sample(x, "x"), _sample(y, "y")
    if x.shape != y.shape:
        raise ValueError(f"found x {tuple(x.shape)}, y {tuple(y.shape)}; expected equal shapes: as many of each, of one kind")
    if len(x) < at_least:
        raise ValueError(f"x: found {len(x)} samples, expected at least {at_least}, since one half is for learning")
    x, y = (z[torch.randperm(len(z), generator=generator).to(z.device)] for z in (x, y))
    half = len(x) // 2
    return Halves(x[:half], y[:half], x[half:], y[half:])


def _standardised(halves: Halves) -> Halves:
    """Vectors centred, and divided by one number, so that learning starts alike at every scale; float64, from the training half.

    Divided by their largest value first: no square is 0 or infinite then.
    """
    parts = [z.flatten(1).double() for z in (halves.x_train, halves.y_train, halves.x_test, halves.y_test)]
    largest = float(torch.cat(parts[:2]).abs().max()) or 1.0
    parts = [z / largest for z in parts]
    pooled = torch.cat(parts[:2])
    mean = pooled.mean(dim=0)
    scale = float((pooled - mean).square().mean().sqrt()) or 1.0
    return Halves(*((z - mean) / scale for z in parts))


def _network_inputs(halves: Halves, image_size: int) -> Halves:
    """What the networks see: images at `image_size` and in [-1, 1] (Liu et al.), embeddings standardised."""
    if halves.x_train.ndim == 2:
        return Halves(*(z.float() for z in vars(_standardised(halves)).values()))

    def resized(images: Tensor) -> Tensor:
        return 2 * F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True) - 1

    return Halves(*(resized(z) for z in (halves.x_train, halves.y_train, halves.x_test, halves.y_test)))


def _batches(n: int, n_epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of each training step, of x and of y, in random orders. Batches hold `batch_size` or more: none is too small."""
    n_batches = max(1, n // batch_size)
    for _ in range(n_epochs):
        orders = (torch.randperm(n, generator=generator).tensor_split(n_batches) for _ in range(2))
        yield from zip(*orders, strict=True)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of vectors (n, D), (m, D) -> (n, m)."""
    cross = a @ b.T
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * cross).clamp(min=0)


def _median_off_diagonal(distances: Tensor) -> float:
    """Median over i < j of a matrix of distances (n, n); 1 when it is zero, since it serves as a scale."""
    i, j = torch.triu_indices(len(distances), len(distances), offset=1, device=distances.device)
    return float(distances[i, j].median()) or 1.0


# --- Networks -----------------------------------------------------------------------------------------------------------


def _featuriser(shape: tuple[int, ...]) -> nn.Sequential:
    """Inputs of one `shape` -> (N, 300). Images (3, S, S): the convolutions of Liu et al.; vectors (D,): D-128-128-300.

    Batch norm takes its statistics from the batch at hand, always: at test, from the two test halves together, as Liu et al.
    do. That treats all test points alike, so permuting them stays exact.
    """
    if len(shape) == 1:
        layers: list[nn.Module] = [nn.Linear(shape[0], 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2)]
        return nn.Sequential(*layers, nn.Linear(128, N_FEATURES))
    layers = []
    for n_in, n_out in ((3, 16), (16, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        if n_in > 3:
            layers.append(nn.BatchNorm2d(n_out, eps=0.8, track_running_stats=False))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (shape[-1] // 16) ** 2, N_FEATURES))


def _seeded(make: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    """A fresh module, initialised from the seed; the global random state is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        return make().to(device)


def _check_training(n_epochs: int, batch_size: int, n_perm: int, image_size: int) -> None:
    checks.at_least(n_epochs, "n_epochs", 1)
    checks.at_least(batch_size, "batch_size", 2)
    checks.at_least(n_perm, "n_perm", 1)
    if image_size < 16 or image_size % 16:
        raise ValueError(f"image_size: found {image_size}, expected a multiple of 16: four convolutions halve it")


# --- ME -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanEmbeddingResult:
    """What the ME test found. `p_value` comes from a known distribution, hence there is no null of permutations.

    >>> result = MeanEmbeddingResult(statistic=3.0, p_value=0.2, locations=torch.zeros(5, 2), width=1.0)
    >>> result.p_value <= 0.05
    False
    """

    statistic: float
    p_value: float
    locations: Tensor  # (J, D) where the samples differ most, in units of the standardised training half
    width: float  # of the Gaussian kernel, in the same units


def gaussian_features(points: Tensor, locations: Tensor, width: Tensor | float) -> Tensor:
    """exp(-|x - v|^2 / (2 width^2)): points (n, D), locations (J, D) -> (n, J).

    >>> gaussian_features(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0]]), width=1.0)  # 1 and exp(-2)
    tensor([[1.0000],
            [0.1353]])
    """
    return (-_squared_distances(points, locations) / (2 * width**2)).exp()


def mean_embedding_statistic(differences: Tensor, gamma: float = 1e-5) -> Tensor:
    """n W' (Sigma + gamma I)^-1 W, W the mean and Sigma the covariance of z_i = features of x_i - features of y_i, (n, J).

    >>> mean_embedding_statistic(torch.tensor([[1.0], [2.0], [3.0]]), gamma=0.0)
    tensor(12.)
    """
    n, n_locations = differences.shape
    mean = differences.mean(dim=0)
    centred = differences - mean
    ridge = gamma * torch.eye(n_locations, dtype=differences.dtype, device=differences.device)
    covariance = centred.T @ centred / (n - 1) + ridge
    return n * (mean @ torch.linalg.solve(covariance, mean))


def _learned_locations(
    x: Tensor, y: Tensor, n_locations: int, n_steps: int, learning_rate: float, gamma: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Locations (J, D) and width that maximise the statistic of x against y: Adam, from random points and the median width."""
    pooled = torch.cat([x, y])
    start = torch.randperm(len(pooled), generator=generator)[:n_locations].to(x.device)
    locations = pooled[start].clone().requires_grad_()
    median = _median_off_diagonal(_squared_distances(pooled, pooled))
    log_width = torch.tensor(median, dtype=x.dtype, device=x.device).log().div(2).requires_grad_()
    optimiser = torch.optim.Adam([locations, log_width], lr=learning_rate, maximize=True)
    for _ in range(n_steps):
        optimiser.zero_grad()
        features = gaussian_features(pooled, locations, log_width.exp())
        mean_embedding_statistic(features[: len(x)] - features[len(x) :], gamma).backward()
        optimiser.step()
    return locations.detach(), log_width.detach().exp()


def mean_embedding_p_value(statistic: float, n: int, n_locations: int, reference: str = "F") -> float:
    """p-value of the ME statistic of n test points of each sample, J locations; never 0 (smallest positive normal number).

    "chi2": chi-square with J degrees of freedom, the limit of many points and the published choice. "F": Hotelling's T^2,
    (n - J) / (J (n - 1)) times the statistic against F(J, n - J), which allows for the covariance being estimated.

    >>> round(mean_embedding_p_value(11.07, 10**6, 5, "chi2"), 3), round(mean_embedding_p_value(11.07, 25, 5), 3)
    (0.05, 0.15)
    """
    checks.one_of(reference, "reference", ("F", "chi2"))
    if reference == "chi2":
        p_value = stats.chi2.sf(statistic, n_locations)
    else:
        p_value = stats.f.sf(statistic * (n - n_locations) / (n_locations * (n - 1)), n_locations, n - n_locations)
    return max(float(p_value), sys.float_info.min)


def me_test(
    x: Any,
    y: Any,
    seed: int = 0,
    n_locations: int = 5,
    n_steps: int = 300,
    learning_rate: float = 0.05,
    gamma: float = 1e-5,
    reference: str = "F",
) -> MeanEmbeddingResult:
    """ME: do the mean embeddings of x and y differ at J locations, learned on one half, in the other half?

    x, y: (n, D) embeddings or (n, 3, H, W) images, taken as vectors of pixels; half of n must exceed J. Float64 throughout.
    The p-value is never 0. `reference` "chi2" is the published one (see `mean_embedding_p_value`); it rejects too often while
    half of n is not large against J, which is why "F" is the default. Measured at level 0.05 without a shift (J = 5, Gaussian
    samples, D = 16, 200 draws each): n = 50: chi2 0.165 [0.116, 0.224], F 0.060 [0.031, 0.102]; n = 100: chi2 0.095
    [0.058, 0.144], F 0.055 [0.028, 0.096]; n = 200: chi2 0.055 [0.028, 0.096], F 0.045 [0.021, 0.084].

    >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    >>> me_test(x, x + 2, n_steps=20).p_value < 0.001
    True
    """
    checks.at_least(n_locations, "n_locations", 1)
    checks.at_least(n_steps, "n_steps", 0)
    generator = torch.Generator().manual_seed(checks.seed(seed))
    halves = split_halves(x, y, generator, at_least=max(4, 2 * n_locations + 1))
    halves = _standardised(halves)
    locations, width = _learned_locations(halves.x_train, halves.y_train, n_locations, n_steps, learning_rate, gamma, generator)
    differences = gaussian_features(halves.x_test, locations, width) - gaussian_features(halves.y_test, locations, width)
    statistic = float(_learned(mean_embedding_statistic(differences, gamma)))
    p_value = mean_embedding_p_value(statistic, len(differences), n_locations, reference)
    return MeanEmbeddingResult(statistic, p_value, locations, float(width))


# --- C2ST ---------------------------------------------------------------------------------------------------------------


def _learned(values: Tensor) -> Tensor:
    """What a learned function gave, all numbers: NaN compares with nothing, and would pass for the smallest p-value."""
    if not bool(values.isfinite().all()):
        raise ValueError("found a statistic that is no number: training diverged; expected a smaller learning_rate")
    return values


def _permutation_result(values: Tensor, scale: float) -> TestResult:
    """`values`: the statistic, then those of the permutations; `scale` of what they sum, for ties."""
    _learned(values)
    statistic, null = float(values[0]), values[1:].cpu()
    null = torch.where((null - statistic).abs() <= _TIE * scale, torch.full_like(null, statistic), null)
    return TestResult(statistic, (1 + int((null >= statistic).sum())) / (1 + len(null)), null)


def permuted_mean_differences(values: Tensor, n_perm: int, generator: torch.Generator) -> Tensor:
    """Mean of the first half minus mean of the second, as they stand and for n_perm permutations of the halves.

    values: (2m,) -> (1 + n_perm,) float64. All at once: one product with a matrix of signs.

    >>> generator = torch.Generator().manual_seed(0)
    >>> values = permuted_mean_differences(torch.tensor([3.0, 1.0, 0.0, 0.0]), n_perm=5, generator=generator)
    >>> len(values), float(values[0])
    (6, 2.0)
    """
    m = len(values) // 2
    observed = torch.arange(2 * m)[None]
    ranks = torch.cat([observed, torch.rand(n_perm, 2 * m, generator=generator).argsort(dim=1)])
    signs = torch.where(ranks < m, 1.0, -1.0).double().to(values.device)
    return signs @ values.double() / m


def accuracy_test(logits: Tensor, n_perm: int, generator: torch.Generator) -> TestResult:
    """C2ST-S: accuracy of the classifier on test points (m of x, then m of y; x is called positive), permuting the labels.

    Accuracy = 1/2 + (mean of the predictions ±1 over x - mean over y) / 4. One-sided: a classifier worse than chance has not
    told the samples apart.

    >>> logits = torch.tensor([1.0, 2.0, -1.0, 3.0, -2.0, -1.0, -3.0, -1.0])  # four of x, one of them wrong, then four of y
    >>> accuracy_test(logits, n_perm=100, generator=torch.Generator().manual_seed(0)).statistic
    0.875
    """
    predictions = torch.where(logits > 0, 1.0, -1.0)
    return _permutation_result(0.5 + permuted_mean_differences(predictions, n_perm, generator) / 4, 1.0)


def logit_test(logits: Tensor, n_perm: int, generator: torch.Generator) -> TestResult:
    """C2ST-L: mean logit of x minus mean logit of y on test points (m of x, then m of y), permuting the labels.

    >>> logits = torch.tensor([1.0, 3.0, -1.0, -2.0])
    >>> logit_test(logits, n_perm=100, generator=torch.Generator().manual_seed(0)).statistic
    3.5
    """
    return _permutation_result(permuted_mean_differences(logits, n_perm, generator), float(logits.abs().max()))


def _classifier_logits(
    halves: Halves, n_epochs: int, batch_size: int, learning_rate: float, seed: int, generator: torch.Generator
) -> Tensor:
    """Train x (positive) against y on the first halves -> logits of the second, x before y, (2m,) float64."""
    x, y = halves.x_train, halves.y_train

    def make() -> nn.Module:
        return nn.Sequential(_featuriser(tuple(x.shape[1:])), nn.ReLU(), nn.Linear(N_FEATURES, 1))

    classifier = _seeded(make, seed, x.device)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=learning_rate)
    for i, j in _batches(len(x), n_epochs, batch_size, generator):
        logits = classifier(torch.cat([x[i.to(x.device)], y[j.to(x.device)]]))[:, 0]
        target = (torch.arange(len(logits), device=x.device) < len(i)).to(logits.dtype)
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(logits, target).backward()
        optimiser.step()
    with torch.no_grad():
        return _learned(classifier(torch.cat([halves.x_test, halves.y_test]))[:, 0].double())


def c2st_test(
    x: Any,
    y: Any,
    seed: int = 0,
    n_perm: int = 100,
    n_epochs: int = 1000,
    batch_size: int = 100,
    learning_rate: float = 2e-4,
    image_size: int = 64,
    statistic: Callable[[Tensor, int, torch.Generator], TestResult] = logit_test,
) -> TestResult:
    """C2ST: can a classifier, trained on one half of x and y, tell the other halves apart?

    x, y: (n, D) embeddings (an MLP D-128-128-300-1) or (n, 3, H, W) images (four convolutions at `image_size`), n >= 4.
    statistic: `logit_test` (C2ST-L) or `accuracy_test` (C2ST-S); accuracy takes few values, hence its permutation test is
    conservative in small samples.

    >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    >>> round(c2st_test(x, 3 - x, n_epochs=20).p_value, 2)  # the smallest of 100 permutations
    0.01
    """
    _check_training(n_epochs, batch_size, n_perm, image_size)
    generator = torch.Generator().manual_seed(checks.seed(seed))
    halves = _network_inputs(split_halves(x, y, generator), image_size)
    return statistic(_classifier_logits(halves, n_epochs, batch_size, learning_rate, seed, generator), n_perm, generator)


# --- MMD-D --------------------------------------------------------------------------------------------------------------


def mmd_and_variance(gram: Tensor) -> tuple[Tensor, Tensor]:
    """MMD_u and the variance of sqrt(n) MMD_u under H1, from the Gram matrix (2n, 2n) of x and y together (Liu et al., Eq. 5).

    With h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j): MMD_u is the mean of h_ij over i != j, and the variance
    4 (mean_i (mean_j h_ij)^2 - (mean_ij h_ij)^2), i = j included.

    >>> gram = torch.eye(4)  # two points of x and two of y, each like itself alone
    >>> mmd_u, variance = mmd_and_variance(gram)
    >>> float(mmd_u), float(variance)
    (0.0, 0.0)
    """
    n = len(gram) // 2
    h = gram[:n, :n] + gram[n:, n:] - gram[:n, n:] - gram[n:, :n]
    mmd_u = (h.sum() - h.trace()) / (n * (n - 1))
    variance = 4 * (h.mean(dim=1).square().mean() - h.mean().square())
    return mmd_u, variance.clamp(min=0)


class DeepKernel(nn.Module):
    """((1 - e) exp(-|f(x) - f(y)|^2 / s0) + e) exp(-|x - y|^2 / s), with f, e, s0 and s learned (Liu et al. 2020).

    The widths start from the medians of the training half, at any scale of the data. Liu et al. start from constants, s0 = 0.005
    and s = 2048, where the medians of 200 CIFAR-10 images are 0.023 and 5139. e starts at 1e-10, as theirs does.

    >>> kernel, inputs = DeepKernel((2,)), torch.rand(6, 2)
    >>> kernel(inputs, torch.cdist(inputs, inputs) ** 2).shape
    torch.Size([6, 6])
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.featuriser = _featuriser(shape)
        self.log_s0 = nn.Parameter(torch.zeros(()))
        self.log_s = nn.Parameter(torch.zeros(()))
        self.logit_e = nn.Parameter(torch.logit(torch.tensor(1e-10, dtype=torch.float64)).float())

    @torch.no_grad()
    def start_widths(self, inputs: Tensor, distances: Tensor) -> None:
        """Set s0 and s to the median squared distances of features and of inputs; distances: `_squared_distances` of inputs."""
        features = self.featuriser(inputs)
        self.log_s0.fill_(_median_off_diagonal(_squared_distances(features, features))).log_()
        self.log_s.fill_(_median_off_diagonal(distances)).log_()

    def forward(self, inputs: Tensor, distances: Tensor) -> Tensor:
        """Inputs (N, ...) and their squared distances (N, N) -> Gram matrix (N, N)."""
        features = self.featuriser(inputs)
        e = self.logit_e.sigmoid()
        deep = (-_squared_distances(features, features) / self.log_s0.exp()).exp()
        return ((1 - e) * deep + e) * (-distances / self.log_s.exp()).exp()


def train_deep_kernel(
    x: Tensor, y: Tensor, n_epochs: int, batch_size: int, learning_rate: float, seed: int, generator: torch.Generator
) -> DeepKernel:
    """The kernel that maximises MMD_u / sqrt(variance + 1e-8) between x and y, network inputs of equal shapes.

    >>> x, y = torch.rand(20, 2), torch.rand(20, 2) + 1
    >>> generator = torch.Generator().manual_seed(0)
    >>> kernel = train_deep_kernel(x, y, n_epochs=2, batch_size=10, learning_rate=1e-3, seed=0, generator=generator)
    >>> kernel(x, torch.cdist(x, x) ** 2).shape
    torch.Size([20, 20])
    """
    shape = tuple(x.shape[1:])
    kernel = _seeded(lambda: DeepKernel(shape), seed, x.device)
    assert isinstance(kernel, DeepKernel)
    inputs = torch.cat([x, y])
    distances = _squared_distances(inputs.flatten(1), inputs.flatten(1))
    kernel.start_widths(inputs, distances)
    optimiser = torch.optim.Adam(kernel.parameters(), lr=learning_rate, maximize=True)
    for i, j in _batches(len(x), n_epochs, batch_size, generator):
        batch = torch.cat([i, len(x) + j]).to(x.device)
        mmd_u, variance = mmd_and_variance(kernel(inputs[batch], distances[batch][:, batch]))
        optimiser.zero_grad()
        (mmd_u / (variance + 1e-8).sqrt()).backward()
        optimiser.step()
    return kernel


def gram_permutation_test(gram: Tensor, n_perm: int, generator: torch.Generator) -> TestResult:
    """MMD_u of the first half of the rows against the second, by permutation; gram: (2n, 2n) of values in [0, 1].

    One Gram matrix serves every permutation (see cadetlib.mmd, whose signs and pairs these are).

    >>> gram = torch.block_diag(torch.ones(10, 10), torch.ones(10, 10))  # all of x alike, all of y alike, and nothing across
    >>> result = gram_permutation_test(gram, n_perm=99, generator=torch.Generator().manual_seed(0))
    >>> result.statistic, result.p_value
    (2.0, 0.01)
    """
    n = len(gram) // 2
    splits = torch.cat([torch.arange(2 * n).expand(1, 1, -1), mmd.random_splits(1, n_perm, 2 * n, generator)], dim=1)
    gram = gram.double()
    values = mmd.split_statistics(gram[None], splits.to(gram.device))[0]
    return _permutation_result((values - gram.trace()) / (n * (n - 1)), 1.0)


def mmd_d_test(
    x: Any,
    y: Any,
    seed: int = 0,
    n_perm: int = 100,
    n_epochs: int = 1000,
    batch_size: int = 100,
    learning_rate: float = 2e-4,
    image_size: int = 64,
) -> TestResult:
    """MMD-D: MMD with a deep kernel, learned on one half of x and y, tested on the other by permutation.

    x, y: (n, D) embeddings (features by an MLP D-128-128-300) or (n, 3, H, W) images (four convolutions at `image_size`),
    n >= 4. The defaults are those of Liu et al. on CIFAR-10.1. One core needs about 80 s for 200 images of each, 5 s for 200
    embeddings (D = 256), and C2ST about 75 s and 3 s: both grow with n and with `n_epochs`.

    >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    >>> round(mmd_d_test(x, 3 - x, n_epochs=5).p_value, 2)  # the smallest of 100 permutations
    0.01
    """
    _check_training(n_epochs, batch_size, n_perm, image_size)
    generator = torch.Generator().manual_seed(checks.seed(seed))
    halves = _network_inputs(split_halves(x, y, generator), image_size)
    kernel = train_deep_kernel(halves.x_train, halves.y_train, n_epochs, batch_size, learning_rate, seed, generator)
    inputs = torch.cat([halves.x_test, halves.y_test])
    with torch.no_grad():
        gram = kernel(inputs, _squared_distances(inputs.flatten(1), inputs.flatten(1)))
    return gram_permutation_test(gram, n_perm, generator)


# --- MMD, MMD-CC --------------------------------------------------------------------------------------------------------


def _vectors(values: Any, name: str) -> Tensor:
    """Embeddings as they are, images as vectors of pixels."""
    x = checks.as_tensor(values, name)
    return checks.images(x, name).flatten(1) if x.ndim == 4 else x


def pooled_mmd_test(x: Any, y: Any, seed: int = 0, n_perm: int = 500) -> TestResult:
    """MMD with the cosine kernel (`cadetlib.mmd.mmd_test`): x, y (n, D), or images taken as vectors of pixels.

    The paper's kernel is the cosine of an encoder's embeddings: embed images first, unless pixels are what you mean.

    >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    >>> round(pooled_mmd_test(x, x + 2, n_perm=99).p_value, 2)
    0.01
    """
    return mmd.mmd_test(_vectors(x, "x"), _vectors(y, "y"), n_perm, seed)


def clean_mmd_test(x: Any, y: Any, seed: int = 0, n_perm: int = 500) -> TestResult:
    """MMD-CC (`cadetlib.mmd.mmd_cc_test`): x holds 2n samples of the reference, S_P(1) its first n and S_P(2) its last n.

    y: n samples in question. Images are taken as vectors of pixels, as in `pooled_mmd_test`.

    >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    >>> round(clean_mmd_test(x, x[:30] + 2, n_perm=99).p_value, 2)
    0.01
    """
    x, y = _vectors(x, "x"), _vectors(y, "y")
    if len(x) != 2 * len(y):
        raise ValueError(f"found x with {len(x)} samples, y with {len(y)}; MMD-CC expects twice as many x: S_P(1), then S_P(2)")
    return mmd.mmd_cc_test(x[: len(y)], x[len(y) :], y, n_perm, seed)


TESTS: dict[str, Callable[..., TestResult | MeanEmbeddingResult]] = {
    "ME": me_test,
    "C2ST-S": partial(c2st_test, statistic=accuracy_test),
    "C2ST-L": c2st_test,
    "MMD-D": mmd_d_test,
    "MMD": pooled_mmd_test,
    "MMD-CC": clean_mmd_test,
}
