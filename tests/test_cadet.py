"""CADet against Algorithms 2 and 3 written as loops over stored views, the level its p-values promise, and its refusals."""

import argparse
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from cadetlib import cadet, embed, encoders, thresholds
from cadetlib.cadet import CADet, view_similarities
from cadetlib.views import EvalViews, resize_to

SETTINGS = dict(n_views=4, crop_scale=0.5, image_size=8, seed=3)


class Encoder(nn.Module):
    """A random convolution; `gain` changes what it does and not what it weighs."""

    def __init__(self, seed=0, gain=2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(seed)))
        self.gain = gain

    def forward(self, images):
        return (nn.functional.conv2d(images - 0.5, self.weight) * self.gain).tanh().mean(dim=(2, 3))


class Returns(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images):
        return self.features(images)


def images(n, seed=0, size=8):
    """Random images of random contrast, so that they differ in how much their crops do."""
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(n, 3, 1, 1, generator=generator)
    noise = torch.rand(n, 3, size, size, generator=generator) - 0.5
    return ((0.5 + noise * contrast) * 255).round().to(torch.uint8)


REFERENCE, CALIBRATION, TEST = images(12, seed=1), images(19, seed=2), images(7, seed=3)


@pytest.fixture
def detector():
    return CADet(Encoder(), **SETTINGS).fit(REFERENCE, CALIBRATION)


# --- the paper's loops ----------------------------------------------------------------------------------------------------


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def loop_similarities(z, reference, divisor):
    """Eq. 5 for the views z (n, D) of one image and the stored views (K, n, D) of the reference images."""
    n = len(z)
    m_in = sum(cosine(z[i], z[j]) for i, j in itertools.product(range(n), repeat=2) if i != j) / divisor
    m_out = sum(cosine(z[i], other[j]) for other in reference for i, j in itertools.product(range(n), repeat=2))
    return m_in, m_out / (n**2 * len(reference))


def loop_algorithms(reference, calibration, test, divisor):
    """Algorithms 2 and 3 on stored views -> gamma, scores and p-values of the test images."""
    m_in, m_out = zip(*(loop_similarities(z, reference, divisor) for z in calibration), strict=True)
    gamma = np.sqrt(np.var(m_in) / np.var(m_out))
    scores_val = [a + gamma * b for a, b in zip(m_in, m_out, strict=True)]
    scores, p_values = [], []
    for z in test:
        a, b = loop_similarities(z, reference, divisor)
        scores.append(a + gamma * b)
        rank = sum(score_val < scores[-1] for score_val in scores_val)
        p_values.append((rank + 1) / (len(scores_val) + 1))
    return gamma, scores, p_values


def test_the_detector_is_algorithms_2_and_3(detector):
    views = EvalViews(8, 0.5, seed=3)
    with torch.no_grad():
        stored = [
            detector.encoder(views(x / 255, 4).flatten(0, 1)).view(len(x), 4, -1).double().numpy()
            for x in (REFERENCE, CALIBRATION, TEST)
        ]
    gamma, scores, p_values = loop_algorithms(*stored, divisor=4 * 3)
    assert detector.gamma_ == pytest.approx(gamma, rel=1e-5)
    np.testing.assert_allclose(detector.score_samples(TEST), scores, atol=1e-6)
    np.testing.assert_array_equal(detector.p_values(TEST), p_values)
    m_in, m_out = zip(*(loop_similarities(z, stored[0], 12) for z in stored[2]), strict=True)
    np.testing.assert_allclose(detector.similarities(TEST), [m_in, m_out], atol=1e-6)
    assert 3 <= len(set(p_values))  # the test images spread over the calibration's
    # The printed divisor n (n + 1) scales gamma and the scores, and leaves the p-values.
    assert loop_algorithms(*stored, divisor=4 * 5)[2] == p_values


@settings(deadline=None, max_examples=30)
@given(
    n_images=st.integers(1, 3),
    n_views=st.integers(2, 5),
    dim=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_view_similarities_are_equation_5(n_images, n_views, dim, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(n_images, n_views, dim, generator=generator) * 10).to(dtype)
    reference = torch.randn(3, n_views, dim, generator=generator, dtype=torch.float64)
    mu = nn.functional.normalize(reference, dim=-1).mean(dim=(0, 1))
    m_in, m_out = view_similarities(z, mu)
    expected = [loop_similarities(v, reference.numpy(), n_views * (n_views - 1)) for v in z.double().numpy()]
    np.testing.assert_allclose(torch.stack([m_in, m_out], dim=1), expected, atol=1e-12)
    one = view_similarities(torch.ones(1, n_views, dim), torch.ones(dim) / dim**0.5)
    torch.testing.assert_close(torch.cat(one), torch.ones(2, dtype=torch.float64))


@settings(deadline=None, max_examples=50)
@given(calibration=st.lists(st.integers(-3, 3), min_size=1, max_size=9), scores=st.lists(st.integers(-4, 4), max_size=5))
def test_p_values_are_equation_8(calibration, scores):
    calibration, scores = np.array(calibration, dtype=float), np.array(scores, dtype=float)
    paper = [(sum(c < s for c in calibration) + 1) / (len(calibration) + 1) for s in scores]
    conservative = [(sum(c <= s for c in calibration) + 1) / (len(calibration) + 1) for s in scores]
    assert cadet.p_values(calibration, scores).tolist() == paper
    assert cadet.p_values(calibration, scores, ties="conservative").tolist() == conservative


# --- the level ------------------------------------------------------------------------------------------------------------


def test_p_values_of_fresh_images_are_uniform():
    """3,000 random divisions of one pool: the p-value of a fresh image is uniform on its grid, whatever the encoder."""
    detector = CADet(Encoder(), **SETTINGS)
    pool = detector.view_sums(images(150, seed=4))
    ranks, generator = [], torch.Generator().manual_seed(5)
    for _ in range(3000):
        order = torch.randperm(150, generator=generator)
        detector.fit_sums(pool[order[:5]], pool[order[5:24]])
        p = cadet.p_values(detector.calibration_scores_, detector.score_sums(pool[order[24:25]]))
        ranks.append(round(float(p) * 20))
    assert stats.chisquare(np.bincount(ranks, minlength=21)[1:]).pvalue > 0.001


@settings(deadline=None, max_examples=50)
@given(scores=st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_conservative_ties_keep_every_level_exactly(scores):
    """Under H0 each of the n + 1 scores is equally likely to be the test image's; count those with p <= alpha."""
    scores = np.array(scores, dtype=float)
    p = [float(cadet.p_values(np.delete(scores, i), scores[i : i + 1], "conservative")) for i in range(len(scores))]
    for rank in range(1, len(scores) + 1):
        alpha = rank / len(scores)
        assert np.mean(np.array(p) <= alpha) <= alpha


def test_predict_flags_p_values_up_to_alpha(detector):
    p = detector.p_values(CALIBRATION)
    assert sorted(p.tolist()) == [rank / 20 for rank in range(1, 20)]
    for alpha in (0.05, 0.15, 0.5, 0.95):  # the 19 calibration images themselves: exactly 20 alpha of them
        assert torch.equal(detector.predict(CALIBRATION, alpha), p <= alpha)
        assert int(detector.predict(CALIBRATION, alpha).sum()) == round(20 * alpha)
    assert torch.equal(detector.predict(TEST), detector.predict(TEST, alpha=0.05))


def test_ties_reach_the_p_values():
    strict, conservative = (CADet(Encoder(), **SETTINGS, ties=t).fit(REFERENCE, CALIBRATION) for t in ("paper", "conservative"))
    np.testing.assert_allclose(conservative.p_values(CALIBRATION) - strict.p_values(CALIBRATION), 1 / 20)


# --- what a score depends on ----------------------------------------------------------------------------------------------


def test_a_score_is_the_same_in_every_form_and_company(detector):
    expected = detector.score_samples(TEST)
    for form in (TEST / 255, TEST.double() / 255, TEST.numpy(), TEST.numpy() / 255.0):
        torch.testing.assert_close(detector.score_samples(form), expected, rtol=0, atol=1e-6)
    for i in range(7):
        torch.testing.assert_close(detector.score_samples(TEST[i : i + 1]), expected[i : i + 1], rtol=0, atol=1e-6)
    for batch_size in (1, 3, 5, 1000):
        detector.batch_size = batch_size
        torch.testing.assert_close(detector.score_samples(TEST.flip(0)), expected.flip(0), rtol=0, atol=1e-6)


def test_images_of_another_size_are_brought_to_the_detectors(detector):
    large = images(4, seed=6, size=13)
    torch.testing.assert_close(detector.score_samples(large), detector.score_samples(resize_to(large, 8)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", [{"seed": 4}, {"n_views": 5}, {"crop_scale": 0.6}, {"flip": False}, {"image_size": 9}])
def test_every_setting_matters(detector, change):
    other = CADet(Encoder(), **(SETTINGS | change)).fit(REFERENCE, CALIBRATION)
    assert not torch.allclose(other.score_samples(TEST), detector.score_samples(TEST), atol=1e-4)


# --- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"flip": False, "dtype": "bfloat16", "ties": "conservative"}])
def test_a_saved_detector_gives_identical_p_values(tmp_path, changes):
    detector = CADet(Encoder(), **(SETTINGS | changes)).fit(REFERENCE, CALIBRATION)
    detector.save(tmp_path / "new" / "detector.safetensors")
    loaded = CADet.load(tmp_path / "new" / "detector.safetensors", Encoder())
    assert torch.equal(loaded.score_samples(TEST), detector.score_samples(TEST))
    assert torch.equal(loaded.p_values(CALIBRATION), detector.p_values(CALIBRATION))
    assert loaded.settings() == detector.settings()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["detector.safetensors"]


def one_weight_changed():
    encoder = Encoder()
    with torch.no_grad():
        encoder.weight[5, 2, 2, 2] += 1e-6
    return encoder


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (one_weight_changed(), "found fingerprint"),
        (Encoder(seed=1), "found fingerprint"),
        (Encoder(gain=4.0), "found other features"),
    ],
)
def test_another_encoder_is_refused(detector, tmp_path, encoder, message):
    detector.save(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=message):
        CADet.load(tmp_path / "d.safetensors", encoder)


def test_encoders_without_weights_are_told_apart(tmp_path):
    def pooled(images):
        return nn.functional.avg_pool2d(images, 2).flatten(1)

    CADet(Returns(pooled), **SETTINGS).fit(REFERENCE, CALIBRATION).save(tmp_path / "d.safetensors")
    CADet.load(tmp_path / "d.safetensors", Returns(pooled))
    with pytest.raises(ValueError, match="found other features"):
        CADet.load(tmp_path / "d.safetensors", Returns(lambda x: nn.functional.max_pool2d(x, 2).flatten(1)))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "no readable safetensors"),
        (flip_a_bit, "does not match its digest"),
        (lambda path: torch.save({"mu": torch.ones(6)}, path), "no readable safetensors"),
        (lambda path: encoders.save_encoder(encoders.ResNet("resnet10", 2), path), "expected 'cadetlib.detector'"),
    ],
)
def test_damaged_and_foreign_files_are_refused(detector, tmp_path, damage, message):
    path = tmp_path / "d.safetensors"
    detector.save(path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        CADet.load(path, Encoder())


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no file d.safetensors"):
        CADet.load(tmp_path / "d.safetensors", Encoder())


# --- refused --------------------------------------------------------------------------------------------------------------

BAD_IMAGES = {
    "empty": (TEST[:0], "number of images: found 0"),
    "NaN": (torch.full((2, 3, 8, 8), float("nan")), "found 384 NaN or infinite"),
    "not divided by 255": (TEST.float(), r"expected \[0, 1\]"),
    "normalised": ((TEST / 255 - 0.5) / 0.2, r"expected \[0, 1\]"),
    "grey": (TEST[:, :1], r"found shape \(7, 1, 8, 8\), expected \(N, 3, H, W\)"),
    "channels last": (TEST.permute(0, 2, 3, 1), r"found shape \(7, 8, 8, 3\)"),
    "one image": (TEST[0], r"found shape \(3, 8, 8\)"),
    "whole numbers": (TEST.int(), "found dtype torch.int32"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_refused_everywhere(detector, bad, message):
    for call in (
        lambda: detector.fit(bad, CALIBRATION),
        lambda: detector.fit(REFERENCE, bad),
        lambda: detector.score_samples(bad),
        lambda: detector.p_values(bad),
        lambda: detector.predict(bad),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda x: x, r"encoder: returned \(48, 3, 8, 8\)"),
        (lambda x: x.mean(), r"encoder: returned \(\)"),
        (lambda x: x.flatten(1) * float("nan"), "NaN or infinite"),
        (lambda x: torch.zeros(len(x), 4), "zero vector"),
        (lambda x: torch.full((len(x), 4), 0.7), "expected both above"),
        (lambda x: 0.7 + 3e-7 * x.flatten(1), "expected both above"),
    ],
    ids=["maps", "scalar", "NaN", "zero", "constant", "constant but for rounding"],
)
def test_impossible_encoders_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        CADet(Returns(features), **SETTINGS).fit(REFERENCE, CALIBRATION)


def test_calibration_on_one_image_or_copies_of_it_is_refused(detector):
    fitted = detector.mu_, detector.gamma_, detector.calibration_scores_
    with pytest.raises(ValueError, match="number of calibration images: found 1"):
        detector.fit(REFERENCE[1:], CALIBRATION[:1])
    with pytest.raises(ValueError, match="are all calibration images the same"):
        detector.fit(REFERENCE[1:], CALIBRATION[:1].expand(9, -1, -1, -1))
    assert all(a is b for a, b in zip(fitted, (detector.mu_, detector.gamma_, detector.calibration_scores_), strict=True))


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, float("nan")])
def test_a_level_lies_between_0_and_1(detector, alpha):
    with pytest.raises(ValueError, match=f"alpha: found {alpha}"):
        detector.predict(TEST, alpha)


def test_a_level_that_could_flag_nothing_is_refused(detector):
    with pytest.raises(ValueError, match=r"alpha: found 0.049 with 19 .* or at least 20 calibration images"):
        detector.predict(TEST, 0.049)
    enough = CADet(Encoder(), **SETTINGS).fit(REFERENCE, images(20, seed=8))
    assert enough.predict(TEST, 0.049).dtype == torch.bool


def test_before_fit_there_are_no_scores(tmp_path):
    detector = CADet(Encoder(), **SETTINGS)
    for call in (
        lambda: detector.similarities(TEST),
        lambda: detector.score_samples(TEST),
        lambda: detector.p_values(TEST),
        lambda: detector.predict(TEST),
        lambda: detector.save(tmp_path / "d.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"expected fit\(reference_images, calibration_images\) first"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_views": 1}, "n_views: found 1, expected a whole number of at least 2"),
        ({"n_views": 2.5}, "n_views: found 2.5"),
        ({"crop_scale": 0.0}, "crop_scale: found 0.0"),
        ({"crop_scale": 1.1}, "crop_scale: found 1.1"),
        ({"image_size": 1}, "image_size: found 1"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"dtype": "float8"}, "dtype: found 'float8'"),
        ({"ties": "random"}, "ties: found 'random'"),
    ],
)
def test_impossible_settings_are_refused_when_given(change, message):
    with pytest.raises(ValueError, match=message):
        CADet(Encoder(), **(SETTINGS | change))


@pytest.mark.parametrize(
    ("z", "mu", "message"),
    [
        (torch.ones(2, 3), torch.ones(3), r"z: found shape \(2, 3\), expected \(N, n_views, D\)"),
        (torch.ones(2, 1, 3), torch.ones(3), "n_views: found 1"),
        (torch.ones(2, 4, 3), torch.ones(4), r"mu: found shape \(4,\), expected \(3,\)"),
        (torch.full((2, 4, 3), float("nan")), torch.ones(3), "z: found 24 NaN"),
        (torch.ones(2, 4, 3), torch.full((3,), float("inf")), "mu: found 3 NaN or infinite"),
        (torch.zeros(2, 4, 3), torch.ones(3), "z: found a zero vector"),
    ],
)
def test_bad_embeddings_are_refused(z, mu, message):
    with pytest.raises(ValueError, match=message):
        view_similarities(z, mu)


@pytest.mark.parametrize(
    ("calibration", "scores", "message"),
    [
        ([], [1.0], "n >= 1"),
        ([float("nan")], [1.0], "calibration_scores: found 1 NaN"),
        ([1.0], [float("inf")], "scores: found 1 NaN or infinite"),
        ([[1.0]], [1.0], r"found calibration_scores \(1, 1\)"),
    ],
)
def test_bad_scores_are_refused(calibration, scores, message):
    with pytest.raises(ValueError, match=message):
        cadet.p_values(calibration, scores)
    with pytest.raises(ValueError, match="ties: found 'random', expected one of"):
        cadet.p_values([1.0, 2.0], [1.0], ties="random")


def test_sums_over_another_number_of_views_are_refused():
    sums = embed.view_sums(Encoder(), CALIBRATION, EvalViews(8), (3,))
    with pytest.raises(ValueError, match=r"n_views: found 4, expected one of the grid \(3,\)"):
        CADet(Encoder(), **SETTINGS).fit_sums(sums, sums)


# --- whatever encoder, wherever the numbers come from -------------------------------------------------------------------------


def test_an_encoder_of_another_library_with_a_config_of_its_own(tmp_path):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 7))
    encoder.config = argparse.Namespace(dtype=torch.float32)  # JSON knows neither
    images = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fitted = CADet(encoder, n_views=4, image_size=4).fit(images[:10], images[10:])
    fitted.save(tmp_path / "detector.safetensors")
    again = CADet.load(tmp_path / "detector.safetensors", encoder)
    assert torch.equal(again.p_values(images), fitted.p_values(images)) and again.fingerprint() == fitted.fingerprint()
    with pytest.raises(ValueError, match=r"encoder: found function, expected a torch\.nn\.Module"):
        CADet(lambda x: x.flatten(1))
    with pytest.raises(ValueError, match="encoder: found NoneType"):
        CADet.load(tmp_path / "detector.safetensors", None)


def test_p_values_are_identical_after_loading_whatever_the_batch_was(tmp_path):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, 8))
    images = torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for batch_size in (1, 9, 64):
        fitted = CADet(encoder, n_views=10, image_size=32, batch_size=batch_size).fit(images[:10], images[10:])
        fitted.save(tmp_path / "detector.safetensors")
        again = CADet.load(tmp_path / "detector.safetensors", encoder)
        assert torch.equal(again.p_values(images[10:]), fitted.p_values(images[10:]))
        assert CADet.load(tmp_path / "detector.safetensors", encoder, batch_size=7).batch_size == 7
    with pytest.raises(ValueError, match="batch_size: found 0"):
        CADet.load(tmp_path / "detector.safetensors", encoder, batch_size=0)


def test_settings_of_numpy_are_saved_and_wrong_ones_named(tmp_path):
    images = torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    detector = CADet(nn.Flatten(), np.int64(3), np.float32(0.5), np.int64(4), seed=np.int64(2)).fit(images[:10], images[10:])
    detector.save(tmp_path / "detector.safetensors")
    assert CADet.load(tmp_path / "detector.safetensors", nn.Flatten()).settings() == detector.settings()
    (tmp_path / "any file").touch()
    assert (tmp_path / "detector.safetensors").stat().st_mode == (tmp_path / "any file").stat().st_mode
    for name, wrong in dict(seed=None, crop_scale="a", image_size="a", n_views=None).items():
        with pytest.raises(ValueError, match=f"{name}: found"):
            CADet(nn.Flatten(), **{name: wrong})


def test_encoders_without_weights_are_told_apart_by_little(tmp_path):
    class Shifted(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return (x + self.by).flatten(1)

    detector = CADet(Shifted(0.0), n_views=4, image_size=8).fit(torch.rand(4, 3, 8, 8), torch.rand(19, 3, 8, 8))
    detector.save(tmp_path / "detector.safetensors")
    CADet.load(tmp_path / "detector.safetensors", Shifted(0.0))
    with pytest.raises(ValueError, match="found other features"):
        CADet.load(tmp_path / "detector.safetensors", Shifted(0.004))
    encoders.write_safetensors(tmp_path / "half.safetensors", {"mu": torch.ones(2)}, cadet.FORMAT)
    with pytest.raises(ValueError, match=r"half\.safetensors: found no .*'gamma'"):
        CADet.load(tmp_path / "half.safetensors", Shifted(0.0))


def test_a_crop_smaller_than_a_pixel_is_refused_not_taken_for_the_whole():
    with pytest.raises(ValueError, match="less than a pixel of 8 x 8"):
        CADet(nn.Flatten(), crop_scale=1e-6, image_size=8)


def test_the_calibration_images_that_are_needed_are_the_least():
    for n in range(1, 3000):
        needed = thresholds.calibration_needed(1 / (n + 1))
        assert needed == n and thresholds.reachable(1 / (n + 1), n)
