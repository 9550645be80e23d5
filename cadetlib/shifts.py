"""Section 4 as functions of embeddings: whether a test notices that two sets of images differ, row by row of Tables 1 and 2."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadetlib import encoders, metrics, mmd, two_sample
from cadetlib.experiments import Row

NO_SHIFT = "no shift"  # S_Q drawn from the reference itself


def draws_without_overlap(pool: Tensor, n_draws: int, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """For each draw, disjoint random samples of the indices `pool`, of the given sizes -> one (n_draws, size) each.

    >>> first, second = draws_without_overlap(torch.arange(10), n_draws=5, sizes=(3, 7), seed=0)
    >>> first.shape, second.shape, torch.cat([first, second], dim=1).sort().values[0].tolist()
    (torch.Size([5, 3]), torch.Size([5, 7]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    needed = sum(sizes)
    if needed > len(pool):
        raise ValueError(
            f"found {len(pool)} images to draw {list(sizes)} disjoint ones from, expected at least {needed}; lower n"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n_draws, len(pool), generator=generator).argsort(dim=1)[:, :needed]
    return list(pool[order].split(list(sizes), dim=1))


def rejection_rates(
    reference: Tensor,
    others: Mapping[str, Tensor],
    sizes: Sequence[int],
    n_samplings: int = 100,
    n_perm: int = 500,
    alpha: float = 0.05,
    seed: int = 0,
    paired: Collection[str] = (),
) -> list[Row]:
    """Table 1: how often MMD and MMD-CC reject at `alpha`, over draws of n samples from finite pools of embeddings.

    reference: (N, D), the pool of S_P(1) and S_P(2); others: name -> (M, D), the pool of S_Q. A row "no shift" takes S_Q from
    the reference as well: the type-I error. paired: names of pools that were made from the reference image by image, of which
    no image is drawn together with its original. Draws from a finite pool overlap, so the interval (Clopper-Pearson) is about
    the draws and not about other pools. Each row keeps its p-values.

    >>> reference = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = rejection_rates(reference, {"far": reference + 3}, sizes=[20], n_samplings=10, n_perm=99)
    >>> [(row["test"], row["shift"], row["rate"]) for row in rows if row["shift"] == "far"]
    [('MMD', 'far', 1.0), ('MMD-CC', 'far', 1.0)]
    """
    pools = {NO_SHIFT: reference[:0], **others}
    z = mmd.centred(torch.cat([reference, *others.values()])).to(encoders.default_device())
    begins = dict(zip(pools, np.cumsum([0, *(len(pool) for pool in pools.values())]).tolist(), strict=False))
    rows = []
    for n in sizes:
        draws = {k: _draws_of_shift(len(reference), len(v), k in paired, n, n_samplings, seed) for k, v in pools.items()}
        x1, x2, _ = draws[NO_SHIFT]  # and so of every other: a seed draws the same ones
        ys = [y + begins[name] for name, (_, _, y) in draws.items()]
        for name, tests in zip(pools, mmd.test_shifts(z, x1, x2, ys, n_perm, seed), strict=True):
            rows += [_rejections(test, name, n, p, alpha) for test, p in (("MMD", tests.mmd), ("MMD-CC", tests.mmd_cc))]
    return sorted(rows, key=lambda row: list(pools).index(row["shift"]))


def _draws_of_shift(n_reference: int, n_other: int, paired: bool, n: int, n_draws: int, seed: int) -> list[Tensor]:
    """Indices of S_P(1), S_P(2) and S_Q in the reference with the other pool below it; none (0) means no shift."""
    ours = torch.arange(n_reference)
    if n_other and not paired:
        (y,) = draws_without_overlap(n_reference + torch.arange(n_other), n_draws, (n,), seed + 1)
        return [*draws_without_overlap(ours, n_draws, (n, n), seed), y]
    x1, x2, y = draws_without_overlap(ours, n_draws, (n, n, n), seed)
    return [x1, x2, y + n_reference if n_other else y]


def _rejections(test: str, shift: str, n: int, p_values: Tensor, alpha: float) -> Row:
    """A cell of Table 1: the share of p-values at most alpha, with its interval."""
    rejected = int((p_values <= alpha).sum())
    low, high = metrics.binomial_interval(rejected, len(p_values))
    return dict(test=test, shift=shift, n=n, rate=rejected / len(p_values), low=low, high=high, p_values=p_values.tolist())


def shift_to_show(rows: Sequence[Row]) -> str:
    """The shift of Figure 1a: CIFAR-10.1, the paper's, where it is; else the one whose rates under MMD-CC lie nearest one half.

    Where all tests reject, or none, the figure's lines lie upon one another.

    >>> row = dict(encoder="contrastive", test="MMD-CC", n=50)
    >>> rates = dict(noise=1.0, blur=0.6) | {"no shift": 0.5}
    >>> shift_to_show([row | dict(shift=shift, rate=rate) for shift, rate in rates.items()])
    'blur'
    """
    rates: dict[str, list[float]] = {}
    for row in rows:
        if (row["encoder"], row["test"]) == ("contrastive", "MMD-CC") and row["shift"] != NO_SHIFT:
            rates.setdefault(row["shift"], []).append(row["rate"])
    published = [shift for shift in rates if shift.startswith("cifar10.1")]
    if not rates:
        return NO_SHIFT
    return min(published or rates, key=lambda shift: abs(sum(rates[shift]) / len(rates[shift]) - 0.5))


def trained_rejection_rates(
    tests: Mapping[str, Mapping[str, Any]],
    reference: Tensor,
    others: Mapping[str, Tensor],
    sizes: Sequence[int],
    n_samplings: int = 10,
    alpha: float = 0.05,
    seed: int = 0,
    paired: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> list[Row]:
    """The rows of Table 1 that learn from the samples they test: name in two_sample.TESTS -> its settings.

    reference (N, 3, H, W), others: name -> (M, 3, H, W): images, as these tests see no encoder. n counts the samples of a set,
    of which each test trains on half. The rest as in `rejection_rates`; the seconds a test took stand in each row.

    >>> reference = torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> settings = {"ME": dict(n_locations=1, n_steps=5)}
    >>> rows = trained_rejection_rates(settings, reference, {"dark": reference / 4}, [20], n_samplings=3, say=lambda _: None)
    >>> rows[-1]["test"], rows[-1]["shift"], rows[-1]["rate"]
    ('ME', 'dark', 1.0)
    """
    rows = []
    for shift, other in {NO_SHIFT: reference[:0], **others}.items():
        pool = torch.cat([reference, other]).to(encoders.default_device())
        for n in sizes:
            x, _, y = _draws_of_shift(len(reference), len(other), shift in paired, n, n_samplings, seed)
            for name, settings in tests.items():
                began = time.perf_counter()
                run = two_sample.TESTS[name]
                p = [run(pool[a], pool[b], seed=seed + i, **settings).p_value for i, (a, b) in enumerate(zip(x, y, strict=True))]
                seconds = (time.perf_counter() - began) / n_samplings
                p_values = torch.tensor(p, dtype=torch.float64)
                rows.append(_rejections(name, shift, n, p_values, alpha) | dict(encoder="none", seconds=seconds))
                say(f"{name}, {shift}, n = {n}: rejects {rows[-1]['rate']:.2f}, {seconds:.2f} s a test")
    return rows


def small_sample_aurocs(
    reference: Tensor,
    anomalies: Mapping[str, Tensor],
    sizes: Sequence[int] = (3, 5, 10, 20),
    n_draws: int = 5000,
    n_perms: Sequence[int] = (100,),
    seed: int = 0,
    paired: Collection[str] = (),
) -> list[Row]:
    """Table 2: AUROC of the tests' p-values, S_Q in-distribution against S_Q anomalous, for samples of n images.

    reference: (N, D) in-distribution embeddings, from which S_P(1), S_P(2) and the in-distribution S_Q are drawn, disjoint;
    anomalies: name -> (M, D); paired: names of those made from the reference image by image, drawn from images that are in no
    other sample. `ceiling` is the AUROC that p-values of n_perm splits reach on average when every anomalous draw has the
    smallest p-value: 1 - 0.5 / (n_perm + 1). `level` is the rejection rate at 0.05 without anomalies.

    >>> reference = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    >>> rows = small_sample_aurocs(reference, {"far": reference + 3}, sizes=[10], n_draws=50)
    >>> [(row["test"], row["n"], row["auroc"] > 0.9, round(row["ceiling"], 4)) for row in rows]
    [('MMD', 10, True, 0.995), ('MMD-CC', 10, True, 0.995)]
    """
    rows = []
    for name, anomalous in anomalies.items():
        z = mmd.centred(torch.cat([reference, anomalous])).to(encoders.default_device())
        gram = z @ z.T
        for n in sizes:
            x1, x2, y_in, y_out = _draws_of_anomaly(len(reference), len(anomalous), name in paired, n, n_draws, seed)
            for n_perm in n_perms:
                normal = mmd.test_draws(gram, x1, x2, y_in, n_perm, seed)
                odd = mmd.test_draws(gram, x1, x2, y_out, n_perm, seed + 1)
                tests = (("MMD", normal.mmd.cpu(), odd.mmd.cpu()), ("MMD-CC", normal.mmd_cc.cpu(), odd.mmd_cc.cpu()))
                for test, p_in, p_out in tests:
                    low, high = metrics.bootstrap_interval(p_in, p_out, n_boot=200)
                    level = float((p_in <= 0.05).double().mean())
                    rows.append(
                        dict(test=test, anomaly=name, n=n, auroc=metrics.auroc(p_in, p_out), low=low, high=high, level=level)
                        | dict(aupr=metrics.aupr(p_in, p_out), fpr95=metrics.fpr_at_tpr(p_in, p_out))
                        | dict(ceiling=1 - 0.5 / (n_perm + 1), n_perm=n_perm)
                    )
    return rows


def _draws_of_anomaly(n_reference: int, n_odd: int, paired: bool, n: int, n_draws: int, seed: int) -> list[Tensor]:
    """Indices of S_P(1), S_P(2) and of both S_Q, in-distribution and anomalous, the anomalies lying below the reference."""
    ours = torch.arange(n_reference)
    if paired:
        x1, x2, y_in, y_out = draws_without_overlap(ours, n_draws, (n, n, n, n), seed)
        return [x1, x2, y_in, y_out + n_reference]
    (y_out,) = draws_without_overlap(n_reference + torch.arange(n_odd), n_draws, (n,), seed + 1)
    return [*draws_without_overlap(ours, n_draws, (n, n, n), seed), y_out]
