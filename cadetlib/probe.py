"""How good are an encoder's features? Nearest neighbours and a linear classifier on frozen features, given labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadetlib import checks


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, tau: float = 0.07) -> float:
    """Share of test features whose k nearest training features by cosine vote for their label, votes weighted exp(sim / tau).

    train (n, D), test (m, D) features of any scale, labels (n,), (m,) from 0 (Wu et al. 2018's classifier). Wrong input raises
    ValueError.

    >>> train, test = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    >>> knn_accuracy(train, torch.tensor([0, 1]), test, torch.tensor([0, 0]), k=1)
    0.5
    """
    known, asked = (checks.unit(checks.embeddings(z, name).detach()) for z, name in ((train, "train"), (test, "test")))
    if known.shape[1] != asked.shape[1]:
        raise ValueError(f"test: found D = {asked.shape[1]}, expected {known.shape[1]}, as in train")
    asked = asked.to(known)
    voting = checks.classes(train_labels, len(known), "train_labels").to(known.device)
    truth = checks.classes(test_labels, len(asked), "test_labels").to(known.device)
    tau = checks.in_open_interval(tau, "tau", high=math.inf)
    similarity, index = (asked @ known.T).topk(min(checks.at_least(k, "k", 1), len(known)), dim=1)
    votes = torch.zeros(len(asked), int(voting.max()) + 1, dtype=torch.float32, device=known.device)
    votes.scatter_add_(1, voting[index], ((similarity.float() - similarity[:, :1].float()) / tau).exp())
    return float((votes.argmax(dim=1) == truth).double().mean())


def linear_probe(features: Tensor, labels: Tensor, penalty: float = 1e-3, max_iter: int = 200) -> nn.Linear:
    """A linear classifier on frozen features (N, D), labels (N,) from 0: logistic regression, L2 penalty per sample, by L-BFGS.

    Features are standardised for the fit and the scaling is folded into the returned layer, which takes them raw. Wrong input
    raises ValueError.

    >>> features, labels = torch.tensor([[1.0, 5.0], [2.0, 5.5], [8.0, 5.0], [9.0, 5.5]]), torch.tensor([0, 0, 1, 1])
    >>> linear_probe(features, labels)(features).argmax(dim=1)
    tensor([0, 0, 1, 1])
    """
    x = checks.features(features, at_least=2).double().cpu()
    y = checks.classes(labels, len(x)).cpu()
    penalty, max_iter = checks.not_negative(penalty, "penalty"), checks.at_least(max_iter, "max_iter", 1)
    mean, scale = x.mean(dim=0), x.std(dim=0).clamp(min=1e-8)
    unit = (x - mean) / scale
    weight = torch.zeros(int(y.max()) + 1, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, tolerance_change=1e-12, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(unit @ weight.T + bias, y) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    head = nn.utils.skip_init(nn.Linear, x.shape[1], len(weight))  # no draw from the global generator
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - weight @ (mean / scale))
    return head.requires_grad_(False)
