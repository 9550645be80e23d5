"""Eq. 1 against loops written from the paper; loss and batch norm over two processes against one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn
from torch import multiprocessing as mp

from cadetlib import losses, synchronised

CHOICES = [(symmetric, reduction) for symmetric in (False, True) for reduction in ("sum", "mean")]


def paper_loss(z0, z1, tau):
    """Eq. 1 as printed: one-sided, a sum over i, j != i among the views of the anchors' own side."""

    def similarity(a, b):
        return a @ b / (a.norm() * b.norm())

    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(z0)):
        positive = torch.exp(similarity(z0[i], z1[i]) / tau)
        across = sum(torch.exp(similarity(z0[i], z1[j]) / tau) for j in range(len(z0)))
        within = sum(torch.exp(similarity(z0[i], z0[j]) / tau) for j in range(len(z0)) if j != i)
        total = total - torch.log(positive / (across + within))
    return total


def two_views(n, dim, seed=0):
    z = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [view.requires_grad_() for view in z]


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 6),
    dim=st.integers(1, 5),
    tau=st.floats(0.05, 5),
    seed=st.integers(0, 10**6),
    scale=st.floats(1e-3, 1e3),
    choice=st.sampled_from(CHOICES),
)
def test_info_nce_and_its_gradient_are_equation_1(n, dim, tau, seed, scale, choice):
    symmetric, reduction = choice
    z = two_views(n, dim, seed)
    expected = paper_loss(*z, tau) + (paper_loss(z[1], z[0], tau) if symmetric else 0)
    if reduction == "mean":
        expected = expected / (n * (2 if symmetric else 1))
    found = losses.info_nce(z[0] * scale, z[1] / scale, tau, symmetric, reduction)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, papers in zip(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), strict=True):
        torch.testing.assert_close(ours, papers, rtol=1e-7, atol=1e-9)


def test_the_defaults_are_the_papers():
    z = two_views(5, 3)
    torch.testing.assert_close(losses.info_nce(*z), paper_loss(*z, tau=0.1))


# --- two processes --------------------------------------------------------------------------------------------------------


def network():
    """A small network with batch norm over images and over features."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)
        )
        for norm in (model[1], model[5]):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        return model


def trained(model, x):
    """Two forward passes and one backward pass in training mode, one forward pass in evaluation mode."""
    x = x.clone().requires_grad_()
    model.train()
    model(x.detach() * 2 + 1)
    out = model(x)
    out.pow(3).sum().backward()
    weights = {name: p.grad for name, p in model.named_parameters()}
    running = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    model.eval()
    return dict(out=out.detach(), gradient=x.grad, weights=weights, running=running, evaluated=model(x).detach())


def batch():
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return x * torch.linspace(0.2, 3, 8).view(8, 1, 1, 1)  # the halves differ in scale, so that local statistics would show


def one_process(rank, world, folder):
    """What process `rank` computes of its half; the result goes to a file."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {}
    for choice in CHOICES:
        z = [view.detach().chunk(world)[rank].clone().requires_grad_() for view in two_views(6, 4)]
        loss = losses.info_nce(*z, 0.2, *choice)
        results[choice] = (loss.detach(), *torch.autograd.grad(loss, z))
    gradient = torch.ones(2 * world, 3)
    losses.gather(torch.zeros(2, 3, requires_grad=True)).backward(gradient)
    results["gradient"] = gradient
    model = synchronised.synchronised(network(), torch.device("cpu"))
    results["trained"] = trained(model, batch().chunk(world)[rank])
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The results of two gloo processes, started once for all the tests below."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(one_process, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_two_processes_share_the_loss_and_the_gradient_of_one(processes, choice):
    z = two_views(6, 4)
    expected = losses.info_nce(*z, 0.2, *choice)
    of_each = [result[choice] for result in processes]
    share = 2 if choice[1] == "mean" else 1  # processes average the mean and add up the sum
    torch.testing.assert_close(sum(loss for loss, *_ in of_each) / share, expected.detach(), rtol=0, atol=1e-9)
    for view, gradient in enumerate(torch.autograd.grad(expected, z), start=1):
        found = torch.cat([result[view] for result in of_each]) / share
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-9)


def test_gather_leaves_the_callers_gradient_alone(processes):
    assert all(torch.equal(result["gradient"], torch.ones(4, 3)) for result in processes)


def test_synchronised_batch_norm_over_two_processes_is_that_of_one(processes):
    expected = trained(network(), batch())
    first, second = (result["trained"] for result in processes)
    for name in ("out", "gradient", "evaluated"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), expected[name], rtol=1e-4, atol=1e-5, msg=name)
    for name, gradient in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name] + second["weights"][name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    for name, value in expected["running"].items():
        torch.testing.assert_close(first["running"][name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(first["running"][name], second["running"][name])


# --- refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("z0", "z1", "changes", "message"),
    [
        (torch.ones(3, 2), torch.ones(2, 2), {}, "equal shapes"),
        (torch.ones(3, 2), torch.ones(3, 2), {"tau": 0}, "tau: found 0"),
        (torch.ones(3, 2), torch.ones(3, 2), {"tau": float("nan")}, "tau: found nan"),
        (torch.ones(3, 2), torch.ones(3, 2), {"reduction": "none"}, "reduction: found 'none'"),
        (torch.ones(3, 2), torch.full((3, 2), float("inf")), {}, "z1: found 6 NaN or infinite"),
        (torch.zeros(3, 2), torch.ones(3, 2), {}, "z0: found a zero vector"),
        (torch.ones(3), torch.ones(3), {}, r"z0: found shape \(3,\)"),
    ],
)
def test_bad_embeddings_and_settings_are_refused(z0, z1, changes, message):
    with pytest.raises(ValueError, match=message):
        losses.info_nce(z0, z1, **changes)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_embeddings_is_of_no_account(scale):
    z0, z1 = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    scaled = (z0 * scale).requires_grad_()
    loss, expected = losses.info_nce(scaled, z1 * scale), losses.info_nce(z0.requires_grad_(), z1)
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    torch.testing.assert_close(scaled.grad * scale, z0.grad, rtol=1e-4, atol=1e-5)
