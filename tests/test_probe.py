"""Nearest neighbours against a loop, linear probes against scikit-learn's logistic regression."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from cadetlib import probe


def labelled(n, dim=4, n_classes=3, seed=0, dtype=torch.float64):
    """Features of overlapping classes, of different scale and offset in each dimension."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=generator)
    centres = torch.randn(n_classes, dim, generator=torch.Generator().manual_seed(99))
    features = centres[labels] + 1.5 * torch.randn(n, dim, generator=generator)
    return (features * torch.logspace(-1, 1, dim) + torch.arange(dim)).to(dtype), labels


def loop_accuracy(train, train_labels, test, test_labels, k, tau):
    """Wu et al. 2018, Section 3.4: the k nearest by cosine similarity s vote with weight exp(s / tau)."""
    correct = 0
    for x, label in zip(test, test_labels, strict=True):
        similarity = [x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for y in train]
        votes = {}
        for i in sorted(range(len(train)), key=lambda i: -similarity[i])[:k]:
            votes[train_labels[i]] = votes.get(train_labels[i], 0) + np.exp(similarity[i] / tau)
        correct += max(votes, key=votes.get) == label
    return correct / len(test)


@settings(deadline=None, max_examples=30)
@given(
    k=st.integers(1, 30),
    tau=st.sampled_from([0.05, 0.07, 0.5, 10.0]),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_knn_accuracy_is_the_weighted_vote(k, tau, seed, dtype):
    (train, train_labels), (test, test_labels) = labelled(25, seed=seed, dtype=dtype), labelled(12, seed=seed + 1, dtype=dtype)
    found = probe.knn_accuracy(train, train_labels, test, test_labels, k, tau)
    expected = loop_accuracy(*(v.double().numpy() for v in (train, train_labels, test, test_labels)), k, tau)
    assert found == pytest.approx(expected)


def test_knn_accuracy_at_an_even_vote_is_scikit_learns():
    (train, train_labels), (test, test_labels) = labelled(200), labelled(100, seed=1)
    reference = KNeighborsClassifier(1, metric="cosine").fit(train, train_labels)
    assert probe.knn_accuracy(train, train_labels, test, test_labels, k=1) == reference.score(test, test_labels)
    assert probe.knn_accuracy(train * 7, train_labels, train, train_labels, k=1) == 1


@pytest.mark.parametrize("penalty", [0.001, 0.1])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_linear_probe_is_scikit_learns_logistic_regression(penalty, n_classes):
    x, y = labelled(150, n_classes=n_classes)
    head = probe.linear_probe(x.float(), y, penalty)
    scaled = (x - x.mean(dim=0)) / x.std(dim=0)
    if n_classes == 2:  # scikit-learn has one weight vector for two classes: half the penalty on their difference
        penalty = penalty / 2
    reference = LogisticRegression(C=1 / (len(x) * penalty), tol=1e-10, max_iter=10_000).fit(scaled, y)
    with torch.no_grad():
        probabilities = head(x.float()).softmax(dim=1)
    np.testing.assert_allclose(probabilities, reference.predict_proba(scaled), atol=1e-4)
    weight = (head.weight * x.std(dim=0)).numpy()  # on standardised features
    expected = reference.coef_ if n_classes > 2 else reference.coef_ * [[-0.5], [0.5]]
    np.testing.assert_allclose(weight, expected, atol=1e-3)
    assert head.weight.dtype == torch.float32 and not head.weight.requires_grad


def test_a_constant_feature_is_left_alone():
    x, y = labelled(60)
    x[:, 2] = 5.0
    head = probe.linear_probe(x, y)
    without = probe.linear_probe(x[:, [0, 1, 3]], y)
    torch.testing.assert_close(head(x.float()), without(x[:, [0, 1, 3]].float()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.ones(1, 2), torch.zeros(1, dtype=torch.int64), "features: found 1 samples, expected at least 2"),
        (torch.ones(3, 2), torch.zeros(4, dtype=torch.int64), r"labels: found shape \(4,\), expected \(3,\)"),
        (torch.ones(3, 2), torch.tensor([0, 1, -1]), "labels: found -1, expected whole numbers from 0"),
        (torch.full((3, 2), float("nan")), torch.tensor([0, 1, 1]), "features: found 6 NaN"),
    ],
)
def test_bad_features_and_labels_are_refused(features, labels, message):
    with pytest.raises(ValueError, match=message):
        probe.linear_probe(features, labels)


def test_bad_neighbours_are_refused():
    x, y = labelled(10)
    with pytest.raises(ValueError, match="k: found 0"):
        probe.knn_accuracy(x, y, x, y, k=0)
    with pytest.raises(ValueError, match="test: found a zero vector"):
        probe.knn_accuracy(x, y, x * 0, y)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_neighbours_know_no_scale_and_half_precision_none_of_its_own(scale):
    x, y = labelled(60, dtype=torch.float32)
    x = x + 3 * torch.eye(4)[y]
    at_one = probe.knn_accuracy(x[:40], y[:40], x[40:], y[40:])
    assert 0.5 < at_one == probe.knn_accuracy(x[:40] * scale, y[:40], x[40:] * scale, y[40:])
    near = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]]).half(), torch.tensor([[-1.0, 0.05]]).half()
    assert probe.knn_accuracy(near[0], torch.ones(3, dtype=torch.long), near[1], torch.ones(1, dtype=torch.long)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train_labels=torch.arange(30) % 3), r"train_labels: found shape \(30,\), expected \(20,\)"),
        (dict(test_labels=torch.zeros(7, 1, dtype=torch.long)), r"test_labels: found shape \(7, 1\), expected \(7,\)"),
        (dict(test_labels=-torch.ones(7, dtype=torch.long)), "test_labels: found -1"),
        (dict(test=torch.rand(7, 5)), "test: found D = 5, expected 4"),
        (dict(tau=0.0), "tau: found 0.0"),
    ],
)
def test_bad_neighbours_labels_are_refused(changes, message):
    given = dict(
        train=torch.rand(20, 4), train_labels=torch.arange(20) % 3, test=torch.rand(7, 4), test_labels=torch.arange(7) % 3
    )
    with pytest.raises(ValueError, match=message):
        probe.knn_accuracy(**given | changes)


def test_a_probe_leaves_the_random_state_and_the_gradients_alone_and_takes_a_zero_feature():
    x, y = labelled(40, dtype=torch.float32)
    x = torch.cat([torch.zeros(1, 4), x[1:] + 3 * torch.eye(4)[y[1:]]]).requires_grad_()
    state = torch.get_rng_state()
    head = probe.linear_probe(x, y.int())
    assert torch.equal(torch.get_rng_state(), state) and x.grad is None
    assert float((head(x).argmax(dim=1) == y).double().mean()) > 0.8
