"""Questions to CADet about view sums already made: one set, one number of views, one score at a time.

Table 5, Figure 2 and what else notebook 05 asks are such questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from cadetlib import cadet, embed, experiments, metrics
from cadetlib.experiments import IN_DISTRIBUTION, Pair, Row, Split


@dataclass(frozen=True)
class Asker:
    """Questions to CADet about view sums already made: in-distribution images, their splits, and sets of anomalies.

    >>> sets = {"in-distribution": torch.rand(20, 3, 8, 8), "PGD": torch.rand(20, 3, 8, 8)}
    >>> from cadetlib.views import EvalViews
    >>> sums = experiments.view_sums_of_sets(nn.Flatten(), sets, EvalViews(8), grid=[4], say=lambda _: None)
    >>> ask = Asker(sums, {"PGD": True}, experiments.splits(20, 2, n_reference=5, n_calibration=10))
    >>> row = ask("PGD", n_views=4)
    >>> row["anomaly"], len(row["splits"]), row["n_in"]
    ('PGD', 2, 5)
    >>> [len(values) for values in ask.fresh_p_values(n_views=4)]
    [5, 5]
    """

    sums: Mapping[str, embed.ViewSums]  # among them "in-distribution"
    paired: Mapping[str, bool]  # whether image i of a set was made from in-distribution image i
    divisions: Sequence[Split]

    @property
    def anomalies(self) -> list[str]:
        """Names of the sets that are not in-distribution."""
        return [name for name in self.sums if name != IN_DISTRIBUTION]

    def __call__(
        self,
        anomaly: str,
        n_views: int,
        score: Callable[[cadet.CADet, embed.ViewSums], Tensor] = cadet.CADet.score_sums,
        n_reference: int = 0,
    ) -> Row:
        """`summary` of the AUROC for one set of anomalies; with `n_reference`, from so many of the reference images.

        A score that does not hang on what a split is fitted on, such as m_in alone, has an interval for its test images alone.
        """
        pairs, images = self.pairs(anomaly, n_views, score, n_reference), self.images(anomaly)
        fitted = self.fitted(n_reference) if experiments.hangs_on_fit(pairs, images) else 0.0
        return {"anomaly": anomaly} | experiments.summary(pairs, images, fitted)

    def pairs(
        self,
        anomaly: str,
        n_views: int,
        score: Callable[[cadet.CADet, embed.ViewSums], Tensor] = cadet.CADet.score_sums,
        n_reference: int = 0,
    ) -> list[Pair]:
        """`pairs_of_splits` for one set of anomalies."""
        fewest = min(len(d.reference) for d in self.divisions)
        if n_reference > fewest:
            raise ValueError(f"n_reference: found {n_reference}, expected at most {fewest}, the reference images of a split")
        divisions = [replace(d, reference=d.reference[: n_reference or len(d.reference)]) for d in self.divisions]
        return experiments.pairs_of_splits(
            self.sums[IN_DISTRIBUTION], self.sums[anomaly], self.paired[anomaly], divisions, n_views, score
        )

    def auroc(self, anomaly: str, n_views: int, score: Callable[[cadet.CADet, embed.ViewSums], Tensor]) -> float:
        """The AUROC alone, the mean over splits."""
        return float(np.mean([metrics.auroc(*pair) for pair in self.pairs(anomaly, n_views, score)]))

    def images(self, anomaly: str) -> list[tuple[Tensor, Tensor]]:
        """`images_of_splits` for one set of anomalies."""
        return experiments.images_of_splits(self.divisions, self.paired[anomaly], len(self.sums[anomaly]))

    def fitted(self, n_reference: int = 0) -> float:
        """`fitted_share` of these splits."""
        return experiments.fitted_share(self.divisions, len(self.sums[IN_DISTRIBUTION]), n_reference)

    def over(self, name: str, anomaly: str, pairs: Sequence[Pair], others: Sequence[Pair], n_boot: int = 500) -> Row:
        """By how much the AUROC of `pairs` exceeds that of `others`, the same images' otherwise, with its interval.

        `others` may be of another set when both were made from the in-distribution images.
        """
        images = self.images(anomaly)
        found = metrics.splits_difference(pairs, others, n_boot=n_boot, images=images, fitted=self.fitted())
        return experiments.difference_over(name, found)

    def detector(self, n_views: int, split: int = 0) -> cadet.CADet:
        """CADet as fitted on one split."""
        division, held_out = self.divisions[split], self.sums[IN_DISTRIBUTION]
        fitted = cadet.CADet(nn.Identity(), n_views=n_views)
        return fitted.fit_sums(held_out[division.reference], held_out[division.calibration])

    def tested(self, name: str, split: int = 0) -> embed.ViewSums:
        """The sums of a set's images that a split tests: those made from its test images, or all."""
        sums = self.sums[name]
        return sums[self.divisions[split].test] if name == IN_DISTRIBUTION or self.paired[name] else sums

    def moments(self, n_views: int) -> dict[str, Row]:
        """Table 5: each value and the ends of its interval, which is for the draw of a set's images, are means over the splits.

        `gamma` is Eq. 7's, with its smallest and largest value over the splits as `gamma_low` and `gamma_high`.
        """
        gammas = self.gammas(n_views)
        weight = dict(gamma=float(np.mean(gammas)), gamma_low=min(gammas), gamma_high=max(gammas))
        detectors = [self.detector(n_views, split) for split in range(len(self.divisions))]
        columns = {}
        for name in self.sums:
            rows = [experiments.moments(self.tested(name, split), detector) for split, detector in enumerate(detectors)]
            columns[name] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} | weight | dict(n=rows[0]["n"])
        return columns

    def gammas(self, n_views: int) -> list[float]:
        """gamma of Eq. 7 on each split."""
        return [self.detector(n_views, split).gamma_ for split in range(len(self.divisions))]

    def points(self, n_views: int, most: int = 250) -> list[Row]:
        """m_in and gamma m_out of at most `most` images of each set, on the first split."""
        detector, found = self.detector(n_views), []
        for name in self.sums:
            m_in, m_out = detector.similarities_of_sums(self.tested(name)[:most])
            found.append(dict(set=name, m_in=m_in, gamma_m_out=detector.gamma_ * m_out))
        return found

    def p_values(self, name: str, n_views: int, split: int = 0) -> Tensor:
        """Eq. 8 for a set's tested images, on one split."""
        detector = self.detector(n_views, split)
        return cadet.p_values(detector.calibration_scores_, detector.score_sums(self.tested(name, split)))

    def fresh_p_values(self, n_views: int) -> list[list[float]]:
        """p-values of the in-distribution test images, for each split."""
        return [self.p_values(IN_DISTRIBUTION, n_views, split).tolist() for split in range(len(self.divisions))]

    def p_value_curves(self, n_views: int) -> list[Row]:
        """Sorted p-values of every set, on the first split."""
        kinds = {name: "in" if name == IN_DISTRIBUTION else "out" for name in self.sums}
        return [dict(name=n, kind=kind, p_values=self.p_values(n, n_views).sort().values.tolist()) for n, kind in kinds.items()]


def by_part(ask: Asker, n_views: int) -> list[Row]:
    """`ask` each set of each similarity alone and of the score; `over_other`: what m_in has over m_out, and the other way round.

    >>> sets = {"in-distribution": torch.rand(20, 3, 8, 8), "noise": torch.rand(9, 3, 8, 8)}
    >>> from cadetlib.views import EvalViews
    >>> sums = experiments.view_sums_of_sets(nn.Flatten(), sets, EvalViews(8), grid=[4], say=lambda _: None)
    >>> rows = by_part(Asker(sums, {"noise": False}, experiments.splits(20, 2, n_reference=5, n_calibration=10)), n_views=4)
    >>> [(row["score"], "over_other" in row) for row in rows]
    [('m_in alone', True), ('m_out alone', True), ('score', False)]
    >>> rows[0]["over_other"] == -rows[1]["over_other"]
    True
    """
    scores = {"m_in alone": experiments.m_in_only, "m_out alone": experiments.m_out_only, "score": cadet.CADet.score_sums}
    others = {"m_in alone": experiments.m_out_only, "m_out alone": experiments.m_in_only}
    rows = []
    for anomaly in ask.anomalies:
        for name, score in scores.items():
            row = ask(anomaly, n_views, score) | {"score": name}
            if name in others:
                mine, theirs = (ask.pairs(anomaly, n_views, some) for some in (score, others[name]))
                row |= ask.over("other", anomaly, mine, theirs)
            rows.append(row)
    return rows


def by_views(ask: Asker, grid: Sequence[int]) -> list[Row]:
    """Figure 2: `ask` each set with each number of views; `over_most_views`: what it has over the largest, 0 or less as a rule.

    >>> sets = {"in-distribution": torch.rand(20, 3, 8, 8), "noise": torch.rand(9, 3, 8, 8)}
    >>> from cadetlib.views import EvalViews
    >>> sums = experiments.view_sums_of_sets(nn.Flatten(), sets, EvalViews(8), grid=[2, 4], say=lambda _: None)
    >>> rows = by_views(Asker(sums, {"noise": False}, experiments.splits(20, 2, n_reference=5, n_calibration=10)), grid=[2, 4])
    >>> [row["n_views"] for row in rows], rows[1]["over_most_views_high"]
    ([2, 4], 0.0)
    """
    rows = []
    for anomaly in ask.anomalies:
        most = ask.pairs(anomaly, max(grid))
        for n in grid:
            row = ask(anomaly, n) | {"n_views": n}
            rows.append(row | ask.over("most_views", anomaly, ask.pairs(anomaly, n), most))
    return rows


OTHER = {"reference": "calibration", "calibration": "reference"}  # of the two kinds of fitting images


def by_draw(ask: Asker, n_views: int, n_draws: int = 10, seed: int = 0) -> list[Row]:
    """How much hangs on which images were drawn? Standard deviations of each set's AUROC over draws of one kind of image.

    `reference`, `calibration`: over images that `redrawn` draws in each split, as for a mean of images drawn without replacement
    from a few, and brought to the number that a split has; None where there are too few to draw from. `test`: by the bootstrap,
    the fit held. All three are root mean squares over the splits.

    >>> sets = {"in-distribution": torch.rand(60, 3, 8, 8), "noise": torch.rand(9, 3, 8, 8)}
    >>> from cadetlib.views import EvalViews
    >>> sums = experiments.view_sums_of_sets(nn.Flatten(), sets, EvalViews(8), grid=[4], say=lambda _: None)
    >>> [row] = by_draw(Asker(sums, {"noise": False}, experiments.splits(60, 2, n_reference=10, n_calibration=30)), n_views=4)
    >>> list(row), row["n_reference"], row["n_test"]
    (['anomaly', 'reference', 'calibration', 'test', 'n_reference', 'n_calibration', 'n_test'], 10, 20)
    """
    drawn = {kind: [redrawn(division, kind, n_draws, seed) for division in ask.divisions] for kind in OTHER}
    rows = []
    for anomaly in ask.anomalies:
        row: Row = dict(anomaly=anomaly)
        for kind in OTHER:
            variances = []
            for division, tried in zip(ask.divisions, drawn[kind], strict=True):
                if not tried:
                    break
                values = [metrics.auroc(*pair) for pair in replace(ask, divisions=tried).pairs(anomaly, n_views)]
                n, wanted = (len(getattr(some, kind)) for some in (tried[0], division))
                pool = len(division.reference) + len(division.calibration) - len(getattr(tried[0], OTHER[kind]))
                variances.append(np.var(values, ddof=1) / (1 - n / pool) * n / wanted)
            row[kind] = float(np.sqrt(np.mean(variances))) if len(variances) == len(ask.divisions) else None
        paired = ask.paired[anomaly]
        intervals = [metrics.bootstrap_interval(*p, n_boot=200, paired=paired) for p in ask.pairs(anomaly, n_views)]
        row["test"] = float(np.sqrt(np.mean([((high - low) / 3.92) ** 2 for low, high in intervals])))
        rows.append(row | {f"n_{kind}": len(getattr(ask.divisions[0], kind)) for kind in (*OTHER, "test")})
    return rows


def redrawn(division: Split, kind: str, n_draws: int, seed: int) -> list[Split]:
    """A split with other images of one kind, "reference" or "calibration", and the same of the other, again and again.

    The fitting images are cut into two halves at random. One is the other kind; from the second are drawn as many as the split
    has of this kind, or half of it where that is less. None where half of it would be a single image.

    >>> (division,) = experiments.splits(20, 1, n_reference=4, n_calibration=8)
    >>> some = redrawn(division, "reference", n_draws=2, seed=0)
    >>> [len(one.reference) for one in some], torch.equal(some[0].calibration, some[1].calibration)
    ([3, 3], True)
    """
    generator = torch.Generator().manual_seed(seed)
    fitting = torch.cat([division.reference, division.calibration])
    fixed, pool = fitting[torch.randperm(len(fitting), generator=generator)].chunk(2)
    n = min(len(getattr(division, kind)), len(pool) // 2)
    if n < 2:
        return []
    drawn = (pool[torch.randperm(len(pool), generator=generator)[:n]] for _ in range(n_draws))
    return [replace(division, **{kind: some, OTHER[kind]: fixed}) for some in drawn]
