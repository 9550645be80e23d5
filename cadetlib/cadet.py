"""CADet (Section 5): one score and one calibrated p-value per image from the similarities of its random views.

    d = CADet(encoder, image_size=32).fit(reference_images, calibration_images)
    d.p_values(images)          # small = anomalous
    d.predict(images, 0.05)     # True = anomaly, 5 % of in-distribution images on average

Algorithms 2 and 3 with their sums in closed form; the arithmetic of views and encoders is in `embed`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadetlib import checks, embed, encoders, thresholds
from cadetlib.views import EvalViews

TIES = ("paper", "conservative")
FORMAT = "cadetlib.detector"
_ROUNDING = 1e-10  # equal embeddings spread less, in spite of float32's rounding; those of different images far more


def view_similarities(z: Any, mu: Any) -> tuple[Tensor, Tensor]:
    """Eq. 5: similarity of an image's views among themselves and to the reference images' views.

    z: (N, n_views, D) embeddings of any scale; mu: (D,) mean unit embedding over all views of all reference images.
    -> m_in (N,), the mean over the n (n - 1) ordered pairs of views (the printed divisor n (n + 1) would cap it below 1), and
    m_out (N,), the mean over all pairs of a view of the image and a view of a reference image. float64.

    >>> view_similarities([[[1.0, 0.0], [0.0, 2.0]]], [1.0, 0.0])
    (tensor([0.], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    z = checks.embeddings(z, "z", n_dims=3)
    checks.at_least(z.shape[1], "n_views", 2)
    mu = checks.finite(checks.as_tensor(mu, "mu").double(), "mu").to(z.device)
    if mu.shape != z.shape[2:]:
        raise ValueError(f"mu: found shape {tuple(mu.shape)}, expected ({z.shape[2]},), the dimension of z's embeddings")
    m_in, means = embed.sums_of_views(z, (z.shape[1],))
    return m_in[:, 0], means[:, 0] @ mu


def out_similarity(means: Tensor, mu: Tensor) -> Tensor:
    """m_out of Eq. 5 from mean unit embeddings (N, D) and mu (D,) -> (N,) float64.

    Row by row, where a matrix product would round an image's value by how many others there are: copies of an image tie.

    >>> out_similarity(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([0.0, 0.5], dtype=torch.float64))
    tensor([0.0000, 0.4000], dtype=torch.float64)
    """
    return (means.double() * mu).sum(dim=-1)


def gamma(m_in: Tensor, m_out: Tensor) -> float:
    """Eq. 7: the weight that gives gamma * m_out the variance of m_in over the calibration images; (N,), (N,) -> float.

    >>> round(gamma(torch.tensor([0.90, 0.92, 0.94]), torch.tensor([0.1, 0.2, 0.3])), 6)
    0.2
    """
    checks.at_least(len(m_in), "number of calibration images", 2)
    if m_in.shape != m_out.shape:
        raise ValueError(f"found m_in {tuple(m_in.shape)} and m_out {tuple(m_out.shape)}, expected one of each per image")
    std_in, std_out = float(m_in.double().std()), float(m_out.double().std())
    if not min(std_in, std_out) > _ROUNDING:
        raise ValueError(
            f"calibration: found standard deviation {std_in:.3g} of m_in and {std_out:.3g} of m_out, expected both above "
            f"{_ROUNDING}: gamma (Eq. 7) is their ratio; are all calibration images the same, or the encoder constant?"
        )
    return std_in / std_out


def p_values(calibration_scores: Any, scores: Any, ties: str = "paper") -> Tensor:
    """Eq. 8: rank of each score among the calibration scores, from below -> (N,) in [1 / (n + 1), 1].

    ties="paper" counts calibration scores strictly below, as printed; "conservative" also counts equal ones, which keeps
    P(p <= alpha) <= alpha under H0 when scores tie.

    >>> p_values([0.1, 0.2, 0.3, 0.4], [0.05, 0.2, 0.9])
    tensor([0.2000, 0.4000, 1.0000], dtype=torch.float64)
    >>> p_values([0.1, 0.2, 0.3, 0.4], [0.05, 0.2, 0.9], ties="conservative")
    tensor([0.2000, 0.6000, 1.0000], dtype=torch.float64)
    """
    calibration = checks.finite(checks.as_tensor(calibration_scores, "calibration_scores"), "calibration_scores").double()
    scores = checks.finite(checks.as_tensor(scores, "scores"), "scores").double()
    if calibration.ndim != 1 or scores.ndim != 1 or not len(calibration):
        shapes = tuple(calibration.shape), tuple(scores.shape)
        raise ValueError(f"found calibration_scores {shapes[0]} and scores {shapes[1]}, expected (n,) with n >= 1 and (N,)")
    checks.one_of(ties, "ties", TIES)
    rank = torch.searchsorted(calibration.sort().values, scores.contiguous(), right=ties == "conservative")
    return (rank + 1).double() / (len(calibration) + 1)


def _module(encoder: Any) -> nn.Module:
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"encoder: found {type(encoder).__name__}, expected a torch.nn.Module (wrap a function in one)")
    return encoder


class CADet:
    """The detector of Algorithms 2 and 3.

    encoder: any module from images (N, 3, S, S) in [0, 1] to features (N, D); its device is where the work is done.
    n_views, crop_scale: Section 5.1; flip: whether a mirrored image is still the same thing (not so for digits);
    image_size: the side S to which all images are brought (resize, centre crop); seed: of the views; batch_size: views at a
    time (None: `embed.views_at_once`); dtype: "float32", "bfloat16" or "float16" forward passes; ties: see `p_values`.

    A view depends on (seed, pixels of the image, number of the view) alone: an image's score does not depend on the
    images it is scored with. After `fit`: mu_ (D,), gamma_, calibration_scores_ (n,).

    >>> detector = CADet(nn.Flatten(), n_views=8, image_size=8)  # an encoder whose features are the pixels
    >>> detector = detector.fit(torch.rand(10, 3, 8, 8), torch.rand(19, 3, 8, 8))
    >>> dots = torch.zeros(1, 3, 8, 8)
    >>> dots[:, :, ::3, ::3] = 1
    >>> round(float(detector.p_values(dots)), 4), detector.predict(dots, alpha=0.05)  # the smallest of 1 / (19 + 1)
    (0.05, tensor([True]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_views: int = 50,
        crop_scale: float = 0.75,
        image_size: int = 32,
        seed: int = 0,
        flip: bool = True,
        batch_size: int | None = None,
        dtype: str = "float32",
        ties: str = "paper",
    ) -> None:
        self.image_size = checks.at_least(image_size, "image_size", 2)
        self.views = EvalViews(self.image_size, crop_scale, flip, seed)
        self.encoder = _module(encoder)
        self.n_views = checks.at_least(n_views, "n_views", 2)
        self.crop_scale = float(crop_scale)
        self.seed = checks.seed(seed)
        self.flip = bool(flip)
        if batch_size is None:
            batch_size = embed.views_at_once(self.image_size, encoders.device_of(self.encoder))
        self.batch_size = checks.at_least(batch_size, "batch_size", 1)
        self.dtype = checks.one_of(dtype, "dtype", embed.DTYPES)
        self.ties = checks.one_of(ties, "ties", TIES)

    def view_sums(self, images: Any, keys: Tensor | None = None) -> embed.ViewSums:
        """m_in and mean unit embedding of each image, all that fitting and scoring need of it."""
        return embed.view_sums(
            self.encoder, images, self.views, (self.n_views,), keys, batch_size=self.batch_size, dtype=self.dtype
        )

    def fit(self, reference_images: Any, calibration_images: Any) -> CADet:
        """Algorithm 2 on X_val(1) and X_val(2): disjoint in-distribution images, (N, 3, H, W) uint8 or [0, 1]."""
        return self.fit_sums(self.view_sums(reference_images), self.view_sums(calibration_images))

    def fit_sums(self, reference: embed.ViewSums, calibration: embed.ViewSums) -> CADet:
        """`fit` from view sums already made, with at least n_views in their grid."""
        mu = reference.at(self.n_views)[1].double().mean(dim=0)
        m_in, means = calibration.at(self.n_views)
        return self.fit_similarities(mu, m_in, out_similarity(means, mu))

    def fit_similarities(self, mu: Tensor, m_in: Tensor, m_out: Tensor) -> CADet:
        """`fit` from mu (D,) and the calibration images' similarities to it and among their views, (n,) each."""
        weight = gamma(m_in, m_out)
        self.mu_, self.gamma_, self.calibration_scores_ = mu, weight, m_in + weight * m_out
        return self

    def similarities(self, images: Any) -> tuple[Tensor, Tensor]:
        """m_in (N,) and m_out (N,) of Eq. 5, float64."""
        self._check_fitted()
        return self.similarities_of_sums(self.view_sums(images))

    def similarities_of_sums(self, sums: embed.ViewSums) -> tuple[Tensor, Tensor]:
        """`similarities` from view sums already made."""
        m_in, means = sums.at(self.n_views)
        return m_in, out_similarity(means, self.mu_)

    def score_samples(self, images: Any) -> Tensor:
        """Eq. 6: m_in + gamma m_out of each image, (N,) float64; larger = more in-distribution."""
        self._check_fitted()
        return self.score_sums(self.view_sums(images))

    def score_sums(self, sums: embed.ViewSums) -> Tensor:
        """`score_samples` from view sums already made."""
        self._check_fitted()
        m_in, m_out = self.similarities_of_sums(sums)
        return m_in + self.gamma_ * m_out

    def p_values(self, images: Any) -> Tensor:
        """Eq. 8: (N,) in [1 / (n + 1), 1] for n calibration images; small = anomalous."""
        scores = self.score_samples(images)
        return p_values(self.calibration_scores_, scores, self.ties)

    def predict(self, images: Any, alpha: float = 0.05, threshold: Any = None) -> Tensor:
        """(N,) bool, True = anomaly (p-value <= alpha): of fresh in-distribution images, a share of alpha on average.

        threshold: instead of alpha, one that was kept for this very detector: the path of its JSON file, or what it holds.
        """
        checks.in_open_interval(alpha, "alpha")
        self._check_fitted()
        if threshold is not None:
            alpha = thresholds.read(threshold, self.fingerprint()).threshold
        else:
            thresholds.reachable(alpha, len(self.calibration_scores_))
        return self.p_values(images) <= alpha

    def _check_fitted(self) -> None:
        if not hasattr(self, "mu_"):
            raise ValueError("found a CADet without calibration, expected fit(reference_images, calibration_images) first")

    def settings(self) -> dict[str, Any]:
        """The settings that determine a score, besides the encoder and the images."""
        return dict(
            n_views=self.n_views,
            crop_scale=self.crop_scale,
            image_size=self.image_size,
            seed=self.seed,
            flip=self.flip,
            dtype=self.dtype,
            ties=self.ties,
        )

    def _fitted(self) -> dict[str, Tensor]:
        self._check_fitted()
        weight = torch.tensor(self.gamma_, dtype=torch.float64)
        return {"mu": self.mu_, "gamma": weight, "calibration_scores": self.calibration_scores_}

    def fingerprint(self) -> str:
        """sha256 of all that determines a p-value besides the image: encoder, settings and what was fitted."""
        return encoders.weights_digest(self._fitted(), self.settings() | {"encoder": encoders.fingerprint(self.encoder)})

    def save(self, path: str | Path, encoder_name: str = "") -> None:
        """Write the fitted detector (not its encoder, but `encoder_name`, for `load_encoder`) as safetensors, atomically."""
        tensors = self._fitted() | {"signature": embed.signature(self.encoder, self.image_size)}
        about = dict(settings=json.dumps(self.settings()), encoder=encoders.fingerprint(self.encoder), encoder_name=encoder_name)
        about["batch_size"] = str(self.batch_size)  # not a setting, but a batch of fewer views than an image's rounds otherwise
        encoders.write_safetensors(path, tensors, FORMAT, **about)

    @classmethod
    def load(cls, path: str | Path, encoder: nn.Module, batch_size: int | None = None) -> CADet:
        """A saved detector with the encoder it was fitted with; ValueError for another encoder or a damaged or foreign file.

        batch_size: views at a time; None: as when it was fitted.
        """
        tensors, metadata = encoders.read_safetensors(path, FORMAT)
        found = encoders.fingerprint(_module(encoder))
        needed = {"encoder", "settings", "mu", "gamma", "calibration_scores", "signature"}
        if lacking := needed - metadata.keys() - tensors.keys():
            raise ValueError(f"{Path(path).name}: found no {sorted(lacking)}, expected a detector written by CADet.save")
        if found != metadata["encoder"]:
            raise ValueError(
                f"encoder: found fingerprint {found[:12]}, expected {metadata['encoder'][:12]}: the detector was fitted with "
                "another encoder; load that one, or fit anew"
            )
        if batch_size is None:
            batch_size = int(metadata.get("batch_size", 1024))  # 1024: of files that do not say it yet
        detector = cls(encoder, **json.loads(metadata["settings"]), batch_size=batch_size)
        if not embed.same_signature(encoder, embed.signature(encoder, detector.image_size), tensors["signature"]):
            raise ValueError("encoder: found other features for the detector's probe images, expected those it was fitted with")
        detector.mu_ = tensors["mu"]
        detector.gamma_ = float(tensors["gamma"])
        detector.calibration_scores_ = tensors["calibration_scores"]
        return detector
