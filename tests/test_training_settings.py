"""What a run is told: refused when it cannot be; schedule and optimizer against formulas and a step written by hand."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from cadetlib import pretrain, profiles, training_settings
from cadetlib.training_settings import Settings

TINY = dict(arch="resnet10", width=4, stem="cifar", image_size=8, head_hidden=16, head_dim=8, epochs=6)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1.2 / 20),  # the first step is the first of twenty equal ones
        (9, 0.6),
        (19, 1.2),  # the last of the warm-up
        (20, 1.2),  # the cosine begins at its top
        (60, 0.6),  # half of it
        (80, 1.2 * (2 - math.sqrt(2)) / 4),  # three quarters: (1 + cos 135 degrees) / 2
        (99, 1.2 * math.sin(math.pi / 160) ** 2),  # the last step is one short of zero
    ],
)
def test_learning_rate_at_its_corners(step, expected):
    paper = Settings(learning_rate=1.2, warmup_epochs=2, epochs=10)
    assert training_settings.learning_rate(step, 10, paper) == pytest.approx(expected, rel=1e-12)


def lars_by_hand(weights, gradients, buffers, rate, momentum, decay, trust=0.001):
    """You et al. 2017, with momentum as in torch's SGD; biases and batch norm (one dimension) take plain SGD steps."""
    for name, w in weights.items():
        g = gradients[name]
        if not ("bias" in name or "bn" in name):
            norm_w, norm_g = w.square().sum().sqrt(), g.square().sum().sqrt()
            g = (g + decay * w) * trust * norm_w / (norm_g + decay * norm_w)
        buffers[name] = momentum * buffers.get(name, 0) + g
        weights[name] = w - rate * buffers[name]


def sgd_by_hand(weights, gradients, buffers, rate, momentum, decay):
    """Nesterov's momentum as in Sutskever et al. 2013: the step goes along the gradient and the momentum that it leads to."""
    for name, w in weights.items():
        g = gradients[name] + (0 if "bias" in name or "bn" in name else decay * w)
        buffers[name] = momentum * buffers.get(name, 0) + g
        weights[name] = w - rate * (g + momentum * buffers[name])


@pytest.mark.parametrize("decay", [0.01, 0.0])
@pytest.mark.parametrize(("name", "by_hand"), [("lars", lars_by_hand), ("sgd", sgd_by_hand)])
def test_an_optimizer_is_the_written_one(name, by_hand, decay):
    """Weights are decayed and, by LARS, adapted, with and without decay; biases and batch norm are neither."""
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), linear=nn.Linear(5, 2))).double()
    settings = Settings(optimizer=name, momentum=0.8, weight_decay=decay, learning_rate=9.0)
    optimizer = training_settings.make_optimizer(model, settings)
    expected, buffers = {name: p.detach().clone() for name, p in model.named_parameters()}, {}
    for rate in (0.5, 2.0, 0.7):
        gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        by_hand(expected, gradients, buffers, rate, 0.8, decay)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_weight_decay_spares_biases_and_batch_norm(optimizer):
    model = pretrain.make_model(Settings(**TINY, optimizer=optimizer), 10)
    made = training_settings.make_optimizer(model, Settings(**TINY, optimizer=optimizer, weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    norms = {
        f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for k in ("weight", "bias")
    }
    plain = norms | {name for name in names.values() if name.endswith("bias")}
    found = {names[id(p)]: group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert found == {name: 0.0 if name in plain else 0.3 for name in names.values()}


@pytest.mark.parametrize(
    "wrong",
    [
        dict(objective="x"),
        dict(optimizer="x"),
        dict(reduction="x"),
        dict(dtype="x"),
        dict(epochs=0),
        dict(crop_scale=[0.5, 0.2]),
        dict(knn_images=0),
        dict(max_steps=-3),
        dict(warmup_epochs=-1),
        dict(flip=1.5),
        dict(knn_every=-1),
        dict(tau=0.0),
        dict(width=0),
    ],
)
def test_impossible_settings(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}: found"):
        Settings(**wrong)


def test_settings_from_a_profiles_parameters():
    given = TINY | dict(profile="tiny", supervised_epochs=3, supervised_crop_scale=[0.7, 1], learning_rate=1)
    contrastive, supervised = (training_settings.settings_from(given, name) for name in ("contrastive", "supervised"))
    assert (contrastive.epochs, supervised.epochs) == (6, 3)
    assert supervised.crop_scale == [0.7, 1.0] and type(supervised.learning_rate) is float
    root = Path(pretrain.__file__).parents[1]
    assert Path(contrastive.output) == root / "outputs" / "tiny" / "pretraining" / "contrastive"
    assert (contrastive.objective, supervised.objective) == ("contrastive", "supervised")
    elsewhere = training_settings.settings_from(given | dict(output="/tmp/elsewhere"), "supervised")
    assert Path(elsewhere.output) == Path("/tmp/elsewhere/pretraining/supervised")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(learning_rat=0.1), "learning_rat: unknown parameter, did you mean learning_rate"),
        (dict(supervised_epoch=1), "supervised_epoch: unknown parameter, did you mean supervised_epochs"),
        (dict(objective="supervised"), "objective: unknown parameter"),
        (dict(weight_decay="1e-3"), "weight_decay: found the string '1e-3', expected"),
        (dict(supervised_epochs=2.5), "supervised_epochs: found the number 2.5, expected"),
        (dict(symmetric=1), "symmetric: found the whole number 1, expected"),
        (dict(tau=0.1, optimizer="x"), "optimizer: found 'x', expected one of"),
    ],
)
def test_settings_from_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        training_settings.settings_from(wrong)


def test_the_defaults_are_the_papers():
    """Those that decide what is learned; that the profile has the paper's is for test_paper to say."""
    [given] = [notebook.parameters for notebook in profiles.notebooks_of("imagenet") if notebook.number == "01"]
    of_paper = training_settings.settings_from(given)
    differ = {name for name, value in asdict(Settings()).items() if value != asdict(of_paper)[name]}
    assert differ <= {*training_settings.OPERATION, "data", "channels_last", "stream"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_left_to_the_machine_is_never_another_one(dtype):
    then = asdict(Settings(dtype=dtype, log_every=3))
    assert not training_settings.different_settings(then, Settings(dtype="auto"))
    [said] = training_settings.different_settings(then | {"tau": 0.5}, Settings(dtype="auto"))
    assert said == "tau 0.5 (then) and 0.1 (now)"
    [said] = training_settings.different_settings(then, Settings(dtype="float16"))
    assert said == f"dtype {dtype!r} (then) and 'float16' (now)"
