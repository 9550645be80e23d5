"""How good are an encoder's features? Nearest neighbours and a linear classifier on frozen features, given labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadetlib import checks


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, tau: float = 0.07) -> float:
    """Share of test features whose k nearest training features by cosine vote for their label, votes weighted exp(sim / tau).

    train (n, D), test (m, D) features of any scale, labels (n,), (m,) int64 (Wu et al. 2018's classifier).

    >>> train, test = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    >>> knn_accuracy(train, torch.tensor([0, 1]), test, torch.tensor([0, 0]), k=1)
    0.5
    """
    train, test = F.normalize(checks.embeddings(train, "train"), dim=1), F.normalize(checks.embeddings(test, "test"), dim=1)
    similarity, index = (test @ train.T).topk(min(checks.at_least(k, "k", 1), len(train)), dim=1)
    n_classes = int(max(train_labels.max(), test_labels.max())) + 1
    votes = torch.zeros(len(test), n_classes, dtype=similarity.dtype, device=test.device)
    votes.scatter_add_(1, train_labels.to(test.device)[index], ((similarity - 1) / tau).exp())
    return float((votes.argmax(dim=1) == test_labels.to(test.device)).double().mean())


def linear_probe(features: Tensor, labels: Tensor, penalty: float = 1e-3, max_iter: int = 200) -> nn.Linear:
    """A linear classifier on frozen features (N, D), labels (N,) int64: logistic regression, L2 penalty per sample, by L-BFGS.

    Features are standardised for the fit and the scaling is folded into the returned layer, which takes them raw.

    >>> features, labels = torch.tensor([[1.0, 5.0], [2.0, 5.5], [8.0, 5.0], [9.0, 5.5]]), torch.tensor([0, 0, 1, 1])
    >>> linear_probe(features, labels)(features).argmax(dim=1)
    tensor([0, 0, 1, 1])
    """
    x = checks.embeddings(features, "features", at_least=2).double().cpu()
    labels = labels.cpu()
    if labels.shape != (len(x),) or labels.min() < 0:
        raise ValueError(f"labels: found {tuple(labels.shape)}, expected ({len(x)},) whole numbers from 0")
    mean, scale = x.mean(dim=0), x.std(dim=0).clamp(min=1e-8)
    unit = (x - mean) / scale
    weight = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, tolerance_change=1e-12, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(unit @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    head = nn.Linear(x.shape[1], len(weight))
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - weight @ (mean / scale))
    return head.requires_grad_(False)
