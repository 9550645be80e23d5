"""Two-sample tests by maximum mean discrepancy with the cosine kernel (Section 4): Eq. 4, MMD and MMD-CC (Algorithm 1).

Knows embeddings only: nothing of images, files or encoders. With unit embeddings z and K = Z Z^T, the signs s = +1 for a
sample of the first half of a split and -1 for the second turn Eq. 4 into

    n (n - 1) MMD^2 = s^T K s - tr K + 2 sum_i k(X_i, Y_i),

so that all permutations together are one matrix product. With a row of signs for each in S, s^T K s is the sum of a row of
(S K) * S, elementwise, or the squared length of a row of S Z, which takes less where Z is narrower than K. Subtracting the mean
from Z leaves Eq. 4 as it is (a term f(i) + f(j) cancels, because each i and j occurs once with each sign) and saves the digits
that float32 would lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cadetlib import checks

_BLOCKS = 8  # of rows of K in a large test: a ninth of the upper triangle more than needed is computed
_SHARING = 25  # draws of a few samples that share their splits
_TIE = 100  # two statistics that differ by fewer rounding errors than this are tied: small samples repeat splits exactly


@dataclass(frozen=True)
class TestResult:
    """What a two-sample test found. `p_value` = (1 + #{null >= statistic}) / (1 + n_perm), never 0 (Section 4).

    >>> same = torch.eye(4)
    >>> result = mmd_test(same, same, n_perm=99)
    >>> result.statistic <= result.null.max(), result.p_value > 0.05
    (tensor(True), True)
    """

    __test__ = False  # not a pytest class

    statistic: float
    p_value: float
    null: Tensor  # (n_perm,) statistics under random splits


def centred(*samples: Tensor) -> Tensor:
    """Unit embeddings of all samples (each (n_k, D)), stacked and shifted to mean zero -> (sum n_k, D).

    >>> centred(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]])
    """
    # In float64, block by block: what tells apart embeddings that are nearly alike is small against them.
    units = [checks.unit(block.double()) for sample in samples for block in sample.split(1024)]
    mean = torch.stack([block.sum(dim=0) for block in units]).sum(dim=0) / sum(map(len, units))
    return torch.cat([block.sub_(mean).to(samples[0].dtype) for block in units])


def _equal_sizes(**samples: Any) -> list[Tensor]:
    """The samples as floating tensors (n, D) of one shape and one dtype, n >= 2."""
    tensors = {name: checks.embeddings(x, name, at_least=2) for name, x in samples.items()}
    shapes = {name: tuple(z.shape) for name, z in tensors.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"found {found}; expected equal shapes (n, D): Eq. 4 pairs sample i with sample i")
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in tensors.values()) else torch.float32
    return [z.detach().to(dtype) for z in tensors.values()]


def mmd2_unbiased(x: Any, y: Any) -> float:
    """The unbiased estimator of Eq. 4 with the cosine kernel, i = j left out of the cross terms.

    x, y: (n, D), any scale, n >= 2. O(n D): the cosine kernel is linear in the unit embeddings.

    >>> mmd2_unbiased([[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]])
    2.0
    """
    return _mmd2(*_equal_sizes(x=x, y=y))


def _mmd2(x: Tensor, y: Tensor) -> float:
    """Eq. 4 of checked samples in float64, from the differences d_i of the unit embeddings of x_i and y_i.

    (|sum_i d_i|^2 - sum_i |d_i|^2) / (n (n - 1)): samples that are nearly alike lose no digits, and equal ones give 0.
    """
    n, d = len(x), checks.unit(x.double()) - checks.unit(y.double())
    total = d.sum(dim=0)
    return float((total @ total - torch.linalg.vecdot(d, d).sum()) / (n * (n - 1)))


def random_splits(n_draws: int, n_perm: int, size: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Random orders of `size` samples, whose first half is X and second half Y -> (n_draws, n_perm, size) int64 on `device`.

    The same on every device: drawn on the CPU, sorted where they are needed, equal numbers in the order in which they came.

    >>> splits = random_splits(1, 500, 6, torch.Generator().manual_seed(0))
    >>> splits.shape, splits[0, 0].sort().values.tolist()
    (torch.Size([1, 500, 6]), [0, 1, 2, 3, 4, 5])
    """
    return torch.rand(n_draws, n_perm, size, generator=generator).to(device).argsort(dim=-1, stable=True)


def split_statistics(gram: Tensor, splits: Tensor) -> Tensor:
    """Eq. 4 for every split at once, without its factor and trace: s^T K s + 2 sum_i k(X_i, Y_i).

    gram: (B, 2n, 2n); splits: (B, P, 2n) -> (B, P) float64.

    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    >>> gram, as_it_is = (z @ z.T)[None], torch.arange(4).view(1, 1, 4)
    >>> float(split_statistics(gram, as_it_is) - gram[0].trace()) / (2 * 1) == mmd2_unbiased(z[:2], z[2:])
    True
    """
    signs, partner = _signs_and_partners(splits, gram.dtype)
    quadratic = ((signs @ gram) * signs).sum(-1, dtype=torch.float64)
    # Each pair is met from both of its ends, which is the factor 2.
    return quadratic + gram.gather(1, partner).sum(-1, dtype=torch.float64)


def _signs_and_partners(splits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each split and sample: the side it is on (+1, -1) and the sample it is paired with; both like `splits` (..., 2n)."""
    n = splits.shape[-1] // 2
    side = torch.ones(2 * n, dtype=dtype, device=splits.device)
    side[n:] = -1
    signs = torch.empty(splits.shape, dtype=dtype, device=splits.device).scatter_(-1, splits, side.expand(splits.shape))
    partner = torch.empty_like(splits).scatter_(-1, splits, splits.roll(n, dims=-1))
    return signs, partner


def _paired_sums(z: Tensor, partner: Tensor, step: int) -> Tensor:
    """2 sum_i k(X_i, Y_i) of each split from the upper triangle of K, `step` rows at a time: (2n, D), (P, 2n) -> (P,) float64."""
    total = torch.zeros(len(partner), dtype=torch.float64, device=z.device)
    for start in range(0, len(z), step):
        rows = z[start : start + step]
        columns = z[start:] @ rows.T  # K is symmetric
        mate = partner[:, start : start + step] - start
        # A pair within the block is met from both of its ends, one that leads out of it from here alone (below 0: before).
        times = (mate >= 0).to(z.dtype) + (mate >= len(rows))
        total += (columns.gather(0, mate.clamp(min=0)) * times).sum(-1, dtype=torch.float64)
        del columns  # else the next block is made beside this one, and twice the bytes are held
    return total


def _split_sums(z: Tensor, signs: Tensor, partner: Tensor, max_bytes: int) -> Tensor:
    """s^T K s + 2 sum_i k(X_i, Y_i) for splits (P, 2n) of the rows of z (2n, D), K `max_bytes` at a time -> (P,) float64."""
    size = len(z)
    step = max(1, min(max(256, -(-size // _BLOCKS)), max_bytes // (size * z.element_size())))
    if size <= min(step, z.shape[1]):  # K is whole in one block and no larger than Z
        gram = z @ z.T
        quadratic = ((signs @ gram) * signs).sum(-1, dtype=torch.float64)
        return quadratic + gram.gather(0, partner).sum(-1, dtype=torch.float64)
    return (signs @ z).square().sum(-1, dtype=torch.float64) + _paired_sums(z, partner, step)


def _null(z: Tensor, trace: float, n_perm: int, seed: int, max_bytes: int) -> Tensor:
    """Eq. 4 for `n_perm` random splits of the rows of z (2n, D) -> (n_perm,) float64."""
    n = len(z) // 2
    splits = random_splits(1, n_perm, 2 * n, torch.Generator().manual_seed(checks.seed(seed)), z.device)[0]
    return (_split_sums(z, *_signs_and_partners(splits, z.dtype), max_bytes) - trace) / (n * (n - 1))


def _tie_width(spread: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Half-width of a tie: some rounding errors of a statistic whose kernel values spread by `spread` (root mean square)."""
    eps = torch.finfo(dtype).eps
    return _TIE * eps * (spread + eps) / n


def _result(statistic: float, z: Tensor, n_perm: int, seed: int, max_bytes: int) -> TestResult:
    squares = torch.linalg.vecdot(z, z).double()  # the diagonal of K
    null = _null(z, float(squares.sum()), n_perm, seed, max_bytes)
    tie = _tie_width(squares.mean(), len(z) // 2, z.dtype)
    null = torch.where((null - statistic).abs() <= tie, torch.full_like(null, statistic), null).cpu()
    return TestResult(statistic, (1 + int((null >= statistic).sum())) / (1 + n_perm), null)


def mmd_test(x: Any, y: Any, n_perm: int = 500, seed: int = 0, max_bytes: int = 2**30) -> TestResult:
    """MMD two-sample test by permutation of the pooled samples (Section 4).

    x, y: (n, D) embeddings of any scale, n >= 2. `max_bytes` bounds the block of the Gram matrix held at a time: beside it,
    memory grows as n, and time as n^2. It changes the null statistics by rounding at most. float32 samples are computed in
    float32, float64 samples in float64. H0: both come from one distribution.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> mmd_test(x, x + 1, n_perm=99).p_value
    0.01
    """
    checks.at_least(n_perm, "n_perm", 1)
    checks.at_least(max_bytes, "max_bytes", 1)
    x, y = _equal_sizes(x=x, y=y)
    return _result(_mmd2(x, y), centred(x, y), n_perm, seed, max_bytes)


def mmd_cc_test(x1: Any, x2: Any, y: Any, n_perm: int = 500, seed: int = 0, max_bytes: int = 2**30) -> TestResult:
    """MMD with clean calibration (Algorithm 1): statistic from (x1, y), null from random splits of x1 and x2 together.

    x1, x2: disjoint samples (n, D) of the reference distribution; y: (n, D), the sample in question.
    Its level is close to nominal but not exact, since the statistic is not one of the splits: report it beside the power.
    max_bytes: as in `mmd_test`.

    >>> x1, x2 = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    >>> mmd_cc_test(x1, x2, x1 + 1, n_perm=99).p_value
    0.01
    """
    checks.at_least(n_perm, "n_perm", 1)
    checks.at_least(max_bytes, "max_bytes", 1)
    x1, x2, y = _equal_sizes(x1=x1, x2=x2, y=y)
    return _result(_mmd2(x1, y), centred(x1, x2), n_perm, seed, max_bytes)


@dataclass(frozen=True)
class DrawnTests:
    """Many tests on draws from one pool: each field (B,) float64.

    >>> tests = DrawnTests(torch.zeros(2), mmd=torch.tensor([0.01, 0.4]), mmd_cc=torch.tensor([0.01, 0.5]))
    >>> float((tests.mmd <= 0.05).double().mean())  # the power over two draws
    0.5
    """

    statistic: Tensor
    mmd: Tensor  # p-values of the MMD test of (x1, y)
    mmd_cc: Tensor  # p-values of MMD-CC of (x1, x2, y)


def test_shifts(z: Tensor, x1: Tensor, x2: Tensor, ys: Sequence[Tensor], n_perm: int = 500, seed: int = 0) -> list[DrawnTests]:
    """MMD and MMD-CC for B draws of large samples from one pool, each draw against several samples y: one result for each of ys.

    z: (M, D) `centred` embeddings; x1, x2 and each of ys: (B, n) int64 indices of its rows. Same tests as `mmd_test` and
    `mmd_cc_test`; splits are drawn anew for each draw and shared by its tests, and the null of MMD-CC, which knows no y, is
    computed once. K of one pair of samples, (2n, 2n), is held at a time. `test_draws` is faster for many draws of few samples.

    >>> pool = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    >>> z = centred(torch.cat([pool, pool[:20] + 1]))  # 60 images, and 20 shifted ones
    >>> x1, x2, same, shifted = torch.arange(80).view(4, 1, 20)
    >>> [tests.mmd.tolist()[0] <= 0.05 for tests in test_shifts(z, x1, x2, [same, shifted], n_perm=99)]
    [False, True]
    """
    checks.at_least(n_perm, "n_perm", 1)
    if not all(index.shape == x1.shape for index in (x2, *ys)) or x1.ndim != 2 or x1.shape[1] < 2:
        shapes = [tuple(index.shape) for index in (x1, x2, *ys)]
        raise ValueError(f"found indices of shapes {shapes}; expected equal (B, n), n >= 2")
    n = x1.shape[1]
    z = z.double() if n <= 256 else z  # small samples repeat splits exactly
    generator = torch.Generator().manual_seed(checks.seed(seed))
    found = torch.empty(len(ys), 3, len(x1), dtype=torch.float64)
    for b, (a, clean) in enumerate(zip(x1, x2, strict=True)):
        splits = random_splits(1, n_perm, 2 * n, generator, z.device)[0]
        signs = _signs_and_partners(splits, z.dtype)[0]
        pairs = splits[:, :n] * (2 * n) + splits[:, n:]  # where k(X_i, Y_i) stand in K, row after row
        without = _Pool.of(z[torch.cat([a, clean])], signs, pairs)
        for k, y in enumerate(ys):
            with_y = _Pool.of(z[torch.cat([a, y[b]])], signs, pairs)
            statistic = with_y.statistic
            p_values = with_y.p_value(statistic), without.p_value(statistic)
            found[k, :, b] = torch.tensor([statistic, *p_values], dtype=torch.float64)  # float32's 0.05 would be more than 0.05
    return [DrawnTests(*rows) for rows in found]


test_shifts.__test__ = False  # type: ignore[attr-defined]  # not a pytest function


@dataclass(frozen=True)
class _Pool:
    """Two samples of one size: Eq. 4 as they are and under random splits, and the half-width of a tie."""

    statistic: float
    null: Tensor  # (n_perm,)
    tie: Tensor

    @classmethod
    def of(cls, z: Tensor, signs: Tensor, pairs: Tensor) -> _Pool:
        """From centred embeddings (2n, D), the first sample above the second, and splits: signs (P, 2n), pairs (P, n)."""
        n, gram = len(z) // 2, z @ z.T
        squares = torch.linalg.vecdot(z, z).double()
        x, y = z.double().split(n)
        difference = x.sum(0) - y.sum(0)
        statistic = difference @ difference - squares.sum() + 2 * torch.linalg.vecdot(x, y).sum()
        quadratic = (signs @ z).square() if z.shape[1] < 2 * n else (signs @ gram) * signs
        paired = gram.flatten()[pairs].sum(-1, dtype=torch.float64)
        null = quadratic.sum(-1, dtype=torch.float64) + 2 * paired - squares.sum()
        return cls(float(statistic) / (n * (n - 1)), null / (n * (n - 1)), _tie_width(squares.mean(), n, z.dtype))

    def p_value(self, statistic: float) -> float:
        """(1 + #{null >= statistic}) / (1 + n_perm), ties counted."""
        return (1 + int((self.null >= statistic - self.tie).sum())) / (1 + len(self.null))


def test_draws(
    gram: Tensor, x1: Tensor, x2: Tensor, y: Tensor, n_perm: int = 500, seed: int = 0, max_bytes: int = 2**28
) -> DrawnTests:
    """MMD and MMD-CC for B draws of sample indices from one pool, whose Gram matrix is computed once.

    gram: (M, M) = Z Z^T of `centred` embeddings; x1, x2, y: (B, n) int64 indices of its rows. Same tests as `mmd_test` and
    `mmd_cc_test`. Eq. 4 is linear in K, so that one matrix product serves all splits of many draws, which share their splits:
    a p-value is what it would be with splits of its own, and as they are drawn anew for every few draws, what p-values have in
    common (at n = 3, how often the few different splits were drawn) averages out.

    >>> z = centred(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    >>> x1, x2, y = torch.stack([torch.randperm(40)[:30].view(3, 10) for _ in range(100)], dim=1)  # a hundred draws of 3 x 10
    >>> tests = test_draws(z @ z.T, x1, x2, y, n_perm=99)
    >>> tests.mmd.shape, bool((tests.mmd >= 0.01).all())
    (torch.Size([100]), True)
    """
    checks.at_least(n_perm, "n_perm", 1)
    if not (x1.shape == x2.shape == y.shape and x1.ndim == 2 and x1.shape[1] >= 2):
        raise ValueError(f"found x1 {tuple(x1.shape)}, x2 {tuple(x2.shape)}, y {tuple(y.shape)}; expected equal (B, n), n >= 2")
    n = x1.shape[1]
    generator = torch.Generator().manual_seed(checks.seed(seed))
    parts = []
    for some in torch.arange(len(x1)).split(_SHARING):
        splits = random_splits(1, n_perm, 2 * n, generator, gram.device)[0]
        a, b, c = (index[some] for index in (x1, x2, y))
        statistic, mmd = _tests_of_pairs(gram, a, c, None, splits, max_bytes)
        _, mmd_cc = _tests_of_pairs(gram, a, b, statistic, splits, max_bytes)
        parts.append(torch.stack([statistic, mmd, mmd_cc]))
    return DrawnTests(*torch.cat(parts, dim=1))


test_draws.__test__ = False  # type: ignore[attr-defined]  # not a pytest function


def shared_split_statistics(gram: Tensor, splits: Tensor, max_bytes: int = 2**28) -> Tensor:
    """`split_statistics` where all draws share their splits: gram (B, 2n, 2n), splits (P, 2n) -> (B, P) float64.

    s^T K s + 2 sum_i k(X_i, Y_i) is the inner product of K with s s^T plus a one at each pair, in both of its orders.
    max_bytes: of those weights, held at a time.

    >>> z = torch.randn(5, 6, 8, dtype=torch.float64)  # five draws of 3 + 3 samples
    >>> splits = random_splits(1, 20, 6, torch.Generator().manual_seed(0))
    >>> shared, each = shared_split_statistics(z @ z.mT, splits[0]), split_statistics(z @ z.mT, splits.expand(5, -1, -1))
    >>> torch.allclose(shared, each)
    True
    """
    parts = []
    for some in splits.split(max(1, max_bytes // (8 * splits.shape[1] ** 2))):
        signs, partner = _signs_and_partners(some, gram.dtype)
        weights = signs[:, :, None] * signs[:, None, :]
        weights.scatter_add_(2, partner[:, :, None], torch.ones_like(weights[:, :, :1]))
        parts.append(gram.flatten(1) @ weights.flatten(1).T)
    return torch.cat(parts, dim=1).double()


def _tests_of_pairs(
    gram: Tensor, x: Tensor, y: Tensor, statistic: Tensor | None, splits: Tensor, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """Statistic (given, or of x against y) and p-value of each draw under splits of its x and y; x, y (B, n) -> (B,), (B,)."""
    n = x.shape[1]
    both = torch.cat([x, y], dim=1).to(gram.device)
    k = gram[both[:, :, None], both[:, None, :]].double()
    unsplit = torch.arange(2 * n, device=gram.device)[None]
    values = shared_split_statistics(k, torch.cat([unsplit, splits]), max_bytes)
    diagonal = k.diagonal(dim1=-2, dim2=-1)
    values = ((values - diagonal.sum(-1, keepdim=True)) / (n * (n - 1))).cpu()
    statistic = values[:, 0] if statistic is None else statistic
    tie = _tie_width(diagonal.mean(-1, keepdim=True).cpu(), n, gram.dtype)
    p_value = (1 + (values[:, 1:] >= statistic[:, None] - tie).sum(1)).double() / (1 + len(splits))
    return statistic, p_value
