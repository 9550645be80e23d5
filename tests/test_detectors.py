"""Detectors against float64 formulas in numpy, pytorch-ood on images, finite differences, and outliers that all must see."""

from __future__ import annotations

import copy
import doctest
import inspect
import itertools
import pickle

import numpy as np
import pytest
import torch
from pytorch_ood import detector as ood
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from cadetlib import detectors, probe
from cadetlib.detectors import DETECTORS, ODIN, Detector, PostHoc, register, tune_odin
from cadetlib.embed import embed
from cadetlib.encoders import Classifier, ResNet

PAPER = ["MSP", "Energy", "ODIN", "MaxLogit", "KLMatching", "ReAct", "Mahalanobis", "Residual", "ViM"]
POST_HOC = [name for name, detector in DETECTORS.items() if detector.post_hoc]


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    images = F.interpolate(torch.from_numpy(data.images / 16).float()[:, None], size=16, mode="bilinear")
    return images.expand(-1, 3, -1, -1).clamp(0, 1).contiguous(), torch.from_numpy(data.target).long()


@pytest.fixture(scope="module")
def classifier(digits) -> Classifier:
    """A small network after three epochs on 1000 digits, in eval mode."""
    torch.manual_seed(0)
    encoder = ResNet("resnet10", width=4, stem="cifar", image_size=16)
    model = Classifier(encoder, nn.Linear(encoder.dim, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        for rows in torch.randperm(1000).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(digits[0][rows]), digits[1][rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def cached(classifier, digits) -> dict[str, torch.Tensor]:
    """Features and labels of the training digits, and features of other digits, some of them in negative."""
    images, labels = digits
    test = torch.cat([images[1000:1100], 1 - images[1100:1130]])
    train = images[:1000]
    return dict(
        train=embed(classifier.encoder, train), labels=labels[:1000], test=embed(classifier.encoder, test), images=train, new=test
    )


def numpy64(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [t.detach().double().numpy() for t in tensors]


def squared_mahalanobis(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    inverse = np.linalg.pinv(covariance, hermitian=True)
    return np.array([(row - mean) @ inverse @ (row - mean) for row in x])


def expected_scores(name: str, train, labels, test, weight, bias) -> np.ndarray:
    """Each method's formula, read off its paper, in float64."""
    logits, train_logits = test @ weight.T + bias, train @ weight.T + bias
    if name == "MSP":
        return softmax(logits, axis=1).max(axis=1)
    if name == "Energy":
        return logsumexp(logits, axis=1)
    if name == "MaxLogit":
        return logits.max(axis=1)
    if name == "ReAct":
        return logsumexp(np.minimum(test, np.quantile(train, 0.9)) @ weight.T + bias, axis=1)
    if name == "KLMatching":
        predicted = train_logits.argmax(axis=1)
        templates = [softmax(train_logits[predicted == k], axis=1).mean(axis=0) for k in np.unique(predicted)]
        log_p = log_softmax(logits, axis=1)
        return -np.min([(np.exp(log_p) * (log_p - np.log(t))).sum(axis=1) for t in templates], axis=0)
    if name == "GradNorm":
        return np.array([np.abs(np.outer(softmax(z) - 1 / len(z), x)).sum() for z, x in zip(logits, test, strict=True)])
    unit, unit_train = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (test, train))
    if name == "SSD":
        return -squared_mahalanobis(unit, unit_train.mean(axis=0), np.cov(unit_train.T, ddof=0))
    if name == "CSI-like":
        return (unit @ unit_train.T).max(axis=1) * np.linalg.norm(test, axis=1)
    if name == "kNN":
        return -np.sort(np.linalg.norm(unit[:, None] - unit_train[None], axis=2), axis=1)[:, 49]
    if name in ("Mahalanobis", "RMD"):
        means = {k: train[labels == k].mean(axis=0) for k in np.unique(labels)}
        around = np.stack([x - means[k] for x, k in zip(train, labels, strict=True)])
        distances = [squared_mahalanobis(test, mean, around.T @ around / len(train)) for mean in means.values()]
        background = squared_mahalanobis(test, train.mean(axis=0), np.cov(train.T, ddof=0))
        return -np.min(distances, axis=0) + (background if name == "RMD" else 0)
    origin = -np.linalg.pinv(weight) @ bias
    values, vectors = np.linalg.eig((train - origin).T @ (train - origin))
    principal = vectors[:, np.argsort(-values)[: train.shape[1] // 2]]
    residual, train_residual = (
        np.linalg.norm((x - origin) - (x - origin) @ principal @ principal.T, axis=1) for x in (test, train)
    )
    if name == "Residual":
        return -residual
    assert name == "ViM"
    return logsumexp(logits, axis=1) - train_logits.max(axis=1).mean() / train_residual.mean() * residual


FORMULAS = [*(name for name in PAPER if name != "ODIN"), "GradNorm", "SSD", "CSI-like", "kNN", "RMD"]


@pytest.mark.parametrize("name", FORMULAS)
def test_scores_are_the_papers_formula(name, cached, classifier):
    train, labels, test = cached["train"], cached["labels"], cached["test"]
    if name in ("Mahalanobis", "RMD"):  # one class without an image
        train, labels = train[labels != 3], labels[labels != 3]
    found = DETECTORS[name]().fit_features(train, labels, classifier.head).score_features(test)
    assert found.dtype == torch.float64 and found.shape == (len(test),)
    expected = expected_scores(name, *numpy64(train, labels, test, classifier.head.weight, classifier.head.bias))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def on_images(classifier: Classifier) -> dict[str, ood.Detector]:
    """pytorch-ood's detectors as its users build them, fed with images."""
    encoder, head = classifier.encoder, classifier.head
    maps = nn.Sequential(encoder, nn.Unflatten(1, (-1, 1, 1)))
    flat_head = nn.Sequential(nn.Flatten(), head)
    found = {
        "MSP": ood.MaxSoftmax(classifier),
        "Energy": ood.EnergyBased(classifier),
        "ODIN": ood.ODIN(classifier),
        "MaxLogit": ood.MaxLogit(classifier),
        "KLMatching": ood.KLMatching(classifier),
        "ViM": ood.ViM(encoder, head.in_features // 2, head.weight, head.bias),
        "kNN": ood.KNN(encoder),
        "GradNorm": ood.GradNorm(classifier, param_filter=lambda name: name == "head.weight"),
        "Entropy": ood.Entropy(classifier),
        "GEN": ood.GEN(classifier),
        "DICE": ood.DICE(encoder, head.weight, head.bias, p=0.7),
    }
    found |= {name: getattr(ood, name)(encoder) for name in ("Mahalanobis", "RMD")}
    found |= {name: getattr(ood, name)(maps, flat_head) for name in ("ReAct", "ASH", "SCALE", "VRA")}
    return found | {name: getattr(ood, name)(encoder, head) for name in ("LTS", "SHE", "NNGuide", "fDBD", "NCI", "PNML")}


LIBRARY = [name for name in DETECTORS if name not in ("Residual", "SSD", "CSI-like", "Hu", "HuSelfCalibrated")]


@pytest.mark.parametrize("name", LIBRARY)
def test_pytorch_ood_says_the_same_of_images(name, cached, classifier):
    peer = on_images(classifier)[name]
    peer.to("cpu").fit(list(zip(cached["images"].split(500), cached["labels"].split(500), strict=True)))
    expected = -peer.predict(cached["new"].clone()).double()
    detector = DETECTORS[name]()
    if name == "ODIN":
        found = detector.fit(classifier, cached["images"], cached["labels"]).score_samples(cached["new"])
    else:
        found = detector.fit_features(cached["train"], cached["labels"], classifier.head).score_features(cached["test"])
    if name == "Mahalanobis":  # half the distance, and a covariance that is a sum
        expected = expected * 2 * len(cached["images"])
    if name == "RMD":
        expected = expected * len(cached["images"])
    torch.testing.assert_close(found, expected, rtol=5e-4, atol=1e-3 * float(expected.std()))  # float32
    assert spearmanr(found, expected).statistic > 0.9999


@pytest.mark.parametrize("name", POST_HOC)
def test_images_and_cached_features_give_identical_scores_whoever_shares_the_batch(name, cached, classifier):
    on_features = DETECTORS[name]().fit_features(cached["train"], cached["labels"], classifier.head)
    detector = DETECTORS[name]().fit(classifier, cached["images"], cached["labels"].numpy())
    scores = on_features.score_features(cached["test"])
    assert torch.equal(detector.score_samples(cached["new"]), scores) and scores.unique().numel() > len(scores) / 2
    alone = torch.cat([on_features.score_features(row[None]) for row in cached["test"][-40:]])
    torch.testing.assert_close(alone, scores[-40:], rtol=1e-5, atol=1e-6)


class Pixels(nn.Module):
    """Pixels as features, so that an outlier is plain to see."""

    image_size = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


@pytest.fixture(scope="module")
def plain() -> tuple[Classifier, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A classifier of four classes, each with eight bright pixels of its own; its images; outliers, bright elsewhere."""
    generator = torch.Generator().manual_seed(0)
    own = torch.eye(4).repeat_interleave(8, dim=1)
    head = nn.Linear(48, 4)
    with torch.no_grad():
        head.weight.zero_()[:, :32] = own
        head.bias.copy_(torch.tensor([0.1, -0.1, 0.0, 0.05]))
    labels = torch.arange(240) % 4
    images = 0.05 * torch.rand(260, 48, generator=generator)
    images[:240, :32] += own[labels] * (0.6 + 0.3 * torch.rand(240, 32, generator=generator))
    images[240:, 32:] += 0.7
    images = images.view(-1, 3, 4, 4)
    return Classifier(Pixels(), head).requires_grad_(False), images[:240], labels, images[240:]


# Steps as long as the bright pixels' gap, so that walks end soon; Hu et al. 2019 themselves are tested beside their code.
WALKS = dict(sigma=0.1, lr=0.05, lr_untargeted=5.0, radius=1.0, cap_targeted=30, cap_untargeted=30, n_calibration=100)


@pytest.mark.parametrize("name", DETECTORS)
def test_larger_scores_are_more_in_distribution(name, plain):
    classifier, images, labels, outliers = plain
    detector = DETECTORS[name](**WALKS if name.startswith("Hu") else {}).fit(classifier, images[:200], labels[:200])
    inside, outside = detector.score_samples(images[200:]), detector.score_samples(outliers)
    assert inside.shape == (40,) and inside.dtype == torch.float64 and inside.device.type == "cpu"
    share = float((inside[:, None] > outside).double().mean())
    assert share >= 0.9 if name.startswith("Hu") else share == 1  # Hu's noise and targets are random
    assert isinstance(detector.needs_logits, bool) and not detector.tuned_on_anomalies


def odin_confidence(classifier: nn.Module, x: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.log_softmax(classifier(x) / temperature, dim=1).amax(dim=1)


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_odin_steps_along_the_gradient(temperature, classifier, cached):
    """Central differences in float64 at pixels drawn at random; ODIN's score is that of the image after the step."""
    double, x = copy.deepcopy(classifier).double(), cached["new"][:3]
    [signs], _ = detectors.odin_directions(classifier, x, [temperature])
    generator, n_clear = np.random.default_rng(0), 0
    with torch.no_grad():
        for i, pixel in itertools.product(range(3), generator.choice(768, size=40, replace=False)):
            bump = torch.zeros(768, dtype=torch.float64)
            bump[pixel] = 1e-6
            ends = [odin_confidence(double, x[[i]].double() + s * bump.view(1, 3, 16, 16), temperature) for s in (1, -1)]
            slope = float(ends[0] - ends[1]) / 2e-6 * temperature
            if abs(slope) > 1e-4:  # the sign of a smaller one is rounding
                assert float(signs[i].flatten()[pixel]) == np.sign(slope)
                n_clear += 1
        found = ODIN(temperature, step=0.05).fit(classifier, x).score_samples(x)
        moved = x.double() + 0.05 * signs.double()
        torch.testing.assert_close(found, odin_confidence(double, moved, temperature).exp(), rtol=1e-5, atol=0)
    assert n_clear > 60


def test_odin_sees_the_gradient_of_an_image_it_is_sure_of(plain):
    classifier, images, _, _ = plain
    sure = copy.deepcopy(classifier)
    sure.head.weight.mul_(100)
    assert float(sure(images[:1]).double().softmax(dim=1).max()) == 1
    [signs], _ = detectors.odin_directions(sure, images[:1], [1.0])
    assert (signs.flatten()[:8] == 1).all() and (signs.flatten()[8:32] == -1).any()


def test_odin_does_not_depend_on_the_batch_and_counts_its_passes(classifier, cached):
    passes = []
    counted = Classifier(classifier.encoder, classifier.head)
    handle = counted.encoder.register_forward_hook(lambda module, x, y: passes.append(len(y)))
    odin = ODIN().fit(counted, cached["images"])
    together = odin.score_samples(cached["new"][:20])
    assert passes == [20, 20]  # the backward pass, counted as two, makes it four
    alone = torch.cat([odin.score_samples(image[None]) for image in cached["new"][:20]])
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=0)
    assert ODIN.forwards == 4 and ODIN(step=0).forwards == 1
    passes.clear()
    detectors.odin_scores(counted, cached["new"][:2], [1, 10, 100, 1000], detectors.ODIN_STEPS)
    assert len(passes) == 1 + 4 * 10
    handle.remove()


def test_tuned_odin_is_the_best_of_the_grid_and_says_what_it_saw(classifier, digits):
    clean, odd = digits[0][1000:1040], 1 - digits[0][1100:1140]
    temperatures, steps = (1.0, 1000.0), (0.0, 0.0014, 0.2)
    tuned = tune_odin(classifier, clean, odd, temperatures, steps)
    for (temperature, step), auroc in tuned.grid_.items():
        one = ODIN(temperature, step).fit(classifier, clean)
        a, b = one.score_samples(clean), one.score_samples(odd)
        assert auroc == pytest.approx(float((a[:, None] > b).double().mean() + (a[:, None] == b).double().mean() / 2))
    assert set(tuned.grid_) == set(itertools.product(temperatures, steps)) and len(set(tuned.grid_.values())) > 3
    assert tuned.grid_[tuned.temperature, tuned.step] == max(tuned.grid_.values())
    assert tuned.tuned_on_anomalies and not ODIN().tuned_on_anomalies
    assert len(detectors.ODIN_TEMPERATURES) * len(detectors.ODIN_STEPS) == 4 * 11


@pytest.mark.parametrize("name", DETECTORS)
def test_fit_is_given_no_anomaly(name):
    """By their signatures, fit and fit_features take in-distribution data only."""
    methods = [getattr(DETECTORS[name], m) for m in ("fit", "fit_features") if hasattr(DETECTORS[name], m)]
    given = {parameter for method in methods for parameter in inspect.signature(method).parameters}
    assert given <= {"self", "classifier", "images", "features", "labels", "head"} and not DETECTORS[name].tuned_on_anomalies
    assert "anomalous_images" in inspect.signature(tune_odin).parameters


def test_the_registry_holds_the_papers_rows_first():
    assert list(DETECTORS)[: len(PAPER)] == PAPER
    assert {"kNN", "SSD", "CSI-like", "GradNorm", "ASH", "SHE", "NNGuide"} < set(POST_HOC)
    assert [name for name in DETECTORS if not DETECTORS[name].post_hoc] == ["ODIN", "Hu", "HuSelfCalibrated"]
    assert all(DETECTORS[name].forwards == 1 for name in POST_HOC)


def test_principal_dimensions_follow_the_rule():
    assert [detectors._principal_dimensions(d, None) for d in (1, 100, 767, 768, 2047, 2048)] == [0, 50, 383, 512, 512, 1000]
    with pytest.raises(ValueError, match="n_principal: found 100"):
        detectors._principal_dimensions(100, 100)


def test_a_class_that_is_never_predicted_has_no_template(cached, classifier):
    head = nn.Linear(32, 11)
    with torch.no_grad():
        head.weight[:10], head.bias[:10] = classifier.head.weight, classifier.head.bias
        head.weight[10], head.bias[10] = 0, -1e4
    ten, eleven = (
        DETECTORS["KLMatching"]().fit_features(cached["train"], cached["labels"], h).score_features(cached["test"])
        for h in (classifier.head, head)
    )
    torch.testing.assert_close(eleven, ten)


def test_a_detector_of_ones_own_takes_ten_lines(plain):
    @register("Brightness")
    class Brightness(PostHoc):
        """How near an image's brightness is to the training images'."""

        def learn(self, features, labels, head):
            self.mean_ = features.mean()

        def scores(self, features):
            return -(features.mean(dim=1) - self.mean_).abs()

    @register("Margin")
    def margin(logits):
        top = logits.topk(2).values
        return top[:, 0] - top[:, 1]

    classifier, images, labels, outliers = plain
    try:
        for name in ("Brightness", "Margin"):
            detector = DETECTORS[name]().fit(classifier, images, labels)
            assert detector.score_samples(images).min() > detector.score_samples(outliers).max()
        register("Margin")(margin)  # a cell of a notebook is run again
    finally:
        del DETECTORS["Brightness"], DETECTORS["Margin"]
    with pytest.raises(ValueError, match="name: found 'ViM', which is cadetlib's own"):
        register("ViM")(Brightness)
    assert doctest.testmod(detectors).failed == 0


def test_scores_of_ones_own_are_checked():
    class Wrong(PostHoc):
        def scores(self, features):
            return features

    with pytest.raises(ValueError, match=r"Wrong: found scores \(3, 2\), 0 of them NaN or infinite, expected \(3,\)"):
        Wrong().fit_features(torch.ones(3, 2)).score_features(torch.ones(3, 2))


Y, HEAD = torch.arange(60) % 3, nn.Linear(6, 3)
nn.init.eye_(HEAD.weight)
X = torch.rand(60, 6, generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(6)[Y]


@pytest.mark.parametrize("name", POST_HOC)
def test_wrong_features_labels_and_heads_are_refused(name):
    nan = X.clone()
    nan[0, 0] = float("nan")
    detector = DETECTORS[name]()
    for features, labels, head, message in [
        (X[:, :, None], Y, HEAD, r"features: found shape \(60, 6, 1\), expected \(N, D\)"),
        (nan, Y, HEAD, "features: found 1 NaN"),
        (X, Y[:-1], HEAD, r"labels: found shape \(59,\), expected \(60,\)"),
        (X, Y.float(), HEAD, "labels: found dtype torch.float32, expected integers"),
        (X, Y + 1, HEAD, "labels: found 1 to 3, expected 0 to 2"),
        (X, Y - 1, HEAD, "labels: found -1 to 1, expected 0 to 2"),
        (X, Y, nn.Sequential(HEAD), "head: found Sequential, expected torch.nn.Linear"),
        (X, Y, nn.Linear(5, 3), "features: found D = 6, expected 5, the head's input"),
    ]:
        with pytest.raises(ValueError, match=message):
            detector.fit_features(features, labels, head)
    with pytest.raises(ValueError, match="found no learned values, expected fit or fit_features before"):
        detector.score_features(X)
    with pytest.raises(ValueError, match="found no encoder, expected fit"):
        detector.score_samples(torch.rand(2, 3, 4, 4))
    detector.fit_features(X, Y, HEAD if detector.needs_logits else None)
    with pytest.raises(ValueError, match="features: found D = 5, expected 6, as in fit"):
        detector.score_features(X[:, :5])
    with pytest.raises(ValueError, match="features: found 1 NaN"):
        detector.score_features(nan)
    if detector.needs_labels:
        with pytest.raises(ValueError, match=f"labels: found None, expected .*, which {type(detector).__name__} needs"):
            detector.fit_features(X, None, HEAD)
    if detector.needs_logits:
        with pytest.raises(ValueError, match=r"head: found NoneType, expected torch\.nn\.Linear, which"):
            detector.fit_features(X, Y)


def test_what_each_detector_needs():
    """By their papers: distances to what was seen need no classifier, and only those to classes or of templates need labels."""
    of_features_alone = {"Mahalanobis", "RMD", "kNN", "SSD", "CSI-like"}
    assert {name for name in POST_HOC if not DETECTORS[name].needs_logits} == of_features_alone
    assert {name for name in POST_HOC if DETECTORS[name].needs_labels} == {"Mahalanobis", "RMD", "SHE"}


@pytest.mark.parametrize("name", DETECTORS)
def test_what_a_table_says_of_a_detector_is_there(name):
    said = {attribute: getattr(DETECTORS[name](), attribute) for attribute in Detector.__annotations__}
    assert all(type(value) is type(getattr(Detector, attribute)) for attribute, value in said.items())


@pytest.mark.parametrize("name", DETECTORS)
def test_wrong_classifiers_and_images_are_refused(name, plain):
    classifier, images, labels, _ = plain
    for wrong in [(classifier.forward, images, labels), (classifier, images * 2, labels), (classifier, images, labels[:-1])]:
        with pytest.raises(ValueError, match=r"(classifier|images|labels): found"):
            DETECTORS[name]().fit(*wrong)
    with pytest.raises(ValueError, match=r"classifier: found Linear, .*expected a"):
        DETECTORS[name]().fit(nn.Linear(5, 2), images, labels)
    with pytest.raises(ValueError, match=r"found (no|a Hu\w* without)"):
        DETECTORS[name]().score_samples(images)


def test_what_cannot_be_learned_is_refused(classifier):
    with pytest.raises(ValueError, match="no variation around the class means"):
        DETECTORS["Mahalanobis"]().fit_features(X[:3], Y[:3])
    with pytest.raises(ValueError, match=r"k: found 50, expected at most the 40"):
        DETECTORS["kNN"]().fit_features(X[:40])
    for name in ("Residual", "ViM"):
        with pytest.raises(ValueError, match="outside 3 principal dimensions"):
            DETECTORS[name]().fit_features(X[:2], Y[:2], HEAD)
    with pytest.raises(ValueError, match="labels: found 2 classes, expected each of the head's 3"):
        DETECTORS["SHE"]().fit_features(X, Y.clamp(max=1), HEAD)
    with pytest.raises(ValueError, match="step: found -1"):
        ODIN(step=-1).fit(classifier, torch.rand(1, 3, 16, 16)).score_samples(torch.rand(1, 3, 16, 16))


def test_a_constant_feature_counts_for_nothing_and_a_fit_on_features_forgets_the_encoder(plain):
    constant = torch.cat([X, torch.full((60, 1), 2.0)], dim=1)
    same, other = (DETECTORS["Mahalanobis"]().fit_features(x, Y).score_features(x) for x in (X, constant))
    torch.testing.assert_close(same, other)
    classifier, images, labels, _ = plain
    detector = DETECTORS["MSP"]().fit(classifier, images, labels).fit_features(X, Y, HEAD)
    with pytest.raises(ValueError, match="found no encoder"):
        detector.score_samples(images)


def test_a_shift_of_all_logits_changes_no_origin():
    """A probe's rows sum to 0 up to rounding, which the pseudo-inverse must not invert: its softmax is the same classifier."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.rand(90, 8, generator=generator) + 3 * torch.eye(8)[labels]
    head = probe.linear_probe(features, labels)
    before = DETECTORS["ViM"]().fit_features(features, labels, head)
    with torch.no_grad():
        head.bias += 1.0
    after = DETECTORS["ViM"]().fit_features(features, labels, head)
    torch.testing.assert_close(after.origin_, before.origin_, rtol=1e-3, atol=1e-4)
    assert float(before.origin_.norm()) < 100


def test_a_fit_that_fails_leaves_nothing_that_scores():
    detector = DETECTORS["ViM"]().fit_features(X, Y, HEAD)
    with pytest.raises(ValueError, match="residual"):
        detector.fit_features(X[:2].repeat(5, 1), Y[:10], HEAD)
    with pytest.raises(ValueError, match="expected fit or fit_features before"):
        detector.score_features(X)


@pytest.mark.parametrize("name", ["Energy", "ViM", "MaxLogit"])
def test_a_head_whose_bias_is_no_number_is_refused(name):
    head = copy.deepcopy(HEAD)
    with torch.no_grad():
        head.bias[0] = float("inf")
    with pytest.raises(ValueError, match="head's bias: found 1 NaN or infinite"):
        DETECTORS[name]().fit_features(X, Y, head)


def test_images_are_scored_at_the_size_of_the_fit():
    pooled = Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), nn.Linear(12, 2))
    detector = DETECTORS["MSP"]().fit(pooled, torch.rand(6, 3, 8, 8), torch.arange(6) % 2)
    with pytest.raises(ValueError, match=r"found \(3, 16, 16\), expected \(3, 8, 8\), as in fit"):
        detector.score_samples(torch.rand(2, 3, 16, 16))


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_cosines_know_no_scale(scale):
    for name in ("kNN", "SSD"):
        ours, scaled = (DETECTORS[name]().fit_features(X * by, Y).score_features(X[:9] * by) for by in (1.0, scale))
        torch.testing.assert_close(scaled, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", POST_HOC)
def test_a_fitted_detector_survives_pickling(name):
    detector = DETECTORS[name]().fit_features(X, Y, HEAD)
    again = pickle.loads(pickle.dumps(detector))
    assert type(again) is type(detector)
    assert torch.equal(again.score_features(X[:7]), detector.score_features(X[:7]))


def test_odin_says_so_where_no_gradient_comes_back():
    class Frozen(nn.Flatten):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    images, labels = torch.rand(8, 3, 4, 4), torch.arange(8) % 2
    classifier = Classifier(Frozen(), nn.Linear(48, 2))
    detector = DETECTORS["ODIN"](step=0.01).fit(classifier, images, labels)
    with pytest.raises(ValueError, match="found no gradient from logits to images, expected one"):
        detector.score_samples(images)
    assert len(DETECTORS["ODIN"](step=0.0).fit(classifier, images, labels).score_samples(images)) == 8


def test_a_class_that_no_image_is_predicted_as_is_said_where_it_is_needed():
    head = nn.Linear(4, 2)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([1e3, 0.0]))
    with pytest.raises(ValueError, match=r"found none that SHE can learn from .*, expected some of each class, predicted right"):
        DETECTORS["SHE"]().fit_features(torch.rand(20, 4), torch.arange(20) % 2, head)
