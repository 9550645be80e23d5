"""On a GPU: what a CPU computes, whatever the batch, with views made beside the passes. Skipped, with its reason, without one."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from cadetlib import ahead, data, embed, encoders, mmd, pretrain, run_files, training_data, training_settings
from cadetlib.cadet import CADet
from cadetlib.views import EvalViews, TrainViews

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SETTINGS = training_settings.Settings(
    data="digits-train", arch="resnet10", width=16, stem="cifar", image_size=16, head_hidden=32, head_dim=16, batch_size=64,
    epochs=3, warmup_epochs=1, optimizer="sgd", learning_rate=0.1, tau=0.2, symmetric=True, reduction="mean", dtype="bfloat16",
    channels_last=True, log_every=5, knn_every=1, knn_data="digits-test",
)  # fmt: skip


@pytest.fixture
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in full float32, to compare with a CPU's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return encoders.ResNet("resnet18", width=16, stem="cifar", image_size=32).eval()


def images(n: int, seed: int = 1) -> Tensor:
    """Smooth random images, as bytes."""
    small = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, 32, mode="bilinear").mul(255).byte()


@pytest.mark.parametrize("make", [TrainViews(32), TrainViews(32, blur=0.0, jitter_strength=0.5)])
def test_training_views_are_the_cpus(make: TrainViews) -> None:
    x, keys = images(200).float() / 255, torch.arange(200)
    here, there = make(x, keys, 3), make(x.cuda(), keys.cuda(), 3).cpu()
    assert (here - there).abs().max() < 1e-4
    assert (here != x).any()


def test_batches_of_several_steps_at_once_are_the_cpus() -> None:
    settings = replace(SETTINGS, image_size=32)
    assert training_data.steps_at_once(settings, torch.device("cuda")) > 6
    of = data.ImageSet("smooth", images(400), torch.arange(400))
    here, there = (list(training_data.batches(of, settings, torch.device(kind), first=2, last=14)) for kind in ("cpu", "cuda"))
    for (views, labels), (other, others) in zip(here, there, strict=True):
        assert (views - other.cpu()).abs().max() < 1e-4
        assert torch.equal(labels, others.cpu())


def test_views_of_bytes_are_the_cpus() -> None:
    views, x = EvalViews(32), images(100).float() / 255
    assert (views(x, 20) - views(x.cuda(), 20).cpu()).abs().max() < 1e-5


def test_views_made_ahead_are_those_made_in_turn() -> None:
    """With passes in the way that take long, read late, and over so many rounds that freed memory is used again."""
    views, keys, device = TrainViews(32, blur=0.0), torch.arange(512).cuda(), torch.device("cuda", torch.cuda.current_device())
    x, settings = images(512).cuda().float() / 255, replace(SETTINGS, image_size=32)
    a = torch.randn(4096, 4096, device=device)

    def made(n: int) -> Tensor:
        return training_data.training_views(views, x, keys, n, settings)

    batches = ahead.made_ahead(((made(n), keys) for n in itertools.count()), device)
    sums = []
    for _, (batch, _) in zip(range(30), batches, strict=False):
        product = torch.stack([(a @ a)[0, 0] for _ in range(5)]).sum()  # what keeps this stream busy
        sums.append((batch * 1000).round().double().sum() + 0 * product)
        del batch
    expected = [(made(n) * 1000).round().double().sum() for n in range(30)]
    assert torch.equal(torch.stack(sums), torch.stack(expected))
    assert len({float(value) for value in sums}) == 30


def test_a_number_sent_is_the_one_that_was_still_being_computed() -> None:
    a, ones = torch.randn(8192, 8192, device="cuda"), torch.ones(3, device="cuda")
    sent = []
    for i in range(5):
        a = a @ a / 100
        sent.append(ahead.Sent(i + ones.sum() + 0 * a[0, 0].nan_to_num(0, 0, 0)))
    assert [float(number.read()) for number in sent] == [3, 4, 5, 6, 7]


def test_views_are_made_of_images_that_are_still_being_made() -> None:
    """Such as an attack's: what is queued before the call comes before the views, though they have a stream of their own."""
    views, device = EvalViews(32), torch.device("cuda", torch.cuda.current_device())
    a, pixels = torch.randn(8192, 8192, device=device), images(64).cuda().float() / 255
    expected = embed.view_sums(nn.Flatten().to(device), pixels, views, grid=(4,)).m_in
    torch.cuda.synchronize()
    late = torch.zeros_like(pixels)
    for _ in range(20):
        a = a @ a / 100
    late += pixels + 0 * a[0, 0].nan_to_num(0, 0, 0)
    assert torch.equal(embed.view_sums(nn.Flatten().to(device), late, views, grid=(4,)).m_in, expected)


@pytest.mark.usefixtures("without_tf32")
def test_scores_are_the_cpus_and_do_not_depend_on_the_batch() -> None:
    net, reference, calibration, asked = encoder(), images(30, 1), images(60, 2), images(40, 3)
    on_cpu = CADet(net, n_views=10).fit(reference, calibration)
    on_gpu = CADet(encoder().cuda(), n_views=10).fit(reference, calibration)
    assert (on_cpu.batch_size, on_gpu.batch_size) == (1024, 8192)
    assert (on_cpu.score_samples(asked) - on_gpu.score_samples(asked)).abs().max() < 1e-4
    small = CADet(on_gpu.encoder, n_views=10, batch_size=30).fit(reference, calibration)
    assert (small.score_samples(asked) - on_gpu.score_samples(asked)).abs().max() < 1e-4
    assert torch.equal(on_gpu.score_samples(asked), on_gpu.score_samples(asked))


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.98), ("float16", 0.999)])
def test_lower_precisions_order_images_as_float32_does(dtype: str, least: float) -> None:
    net, reference, calibration, asked = encoder().cuda(), images(30, 1), images(60, 2), images(200, 3)
    scores = [CADet(net, 10, dtype=d).fit(reference, calibration).score_samples(asked) for d in ("float32", dtype)]
    assert spearmanr(*scores).statistic > least


def test_mmd_is_the_cpus() -> None:
    x, y = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0))
    y[:, 0] += 0.3
    here, there = mmd.mmd_test(x, y, 500, seed=3), mmd.mmd_test(x.cuda(), y.cuda(), 500, seed=3)
    assert here.p_value == pytest.approx(there.p_value, abs=1 / 500)
    assert here.statistic == pytest.approx(there.statistic, rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_training_learns_and_goes_on(tmp_path: Path, dtype: str) -> None:
    settings = replace(SETTINGS, output=str(tmp_path), dtype=dtype)
    assert pretrain.train(replace(settings, max_steps=20)) == 0
    assert pretrain.train(settings) == 0
    log = run_files.read_log(tmp_path / "log.jsonl")
    losses = [line["loss"] for line in log if "loss" in line]
    accuracies = [line["knn_accuracy"] for line in log if "knn_accuracy" in line]
    assert losses[-1] < losses[0] - 0.1
    assert accuracies[-1] > 0.6
    trained = encoders.load_encoder(tmp_path / run_files.ENCODER)
    features = embed.embed(encoders.placed(trained), images(4)[..., :16, :16])
    assert torch.isfinite(features).all()
