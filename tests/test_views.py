"""Random views against torchvision: pixel for pixel given the same draws, and the draws against its distributions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms.v2 import functional as tv

from cadetlib import rng, views
from cadetlib.views import EvalViews, TrainViews

RATIO = (3 / 4, 4 / 3)
LUMA = 5e-4  # torchvision's luma has 0.2989 for red, where ITU-R 601 and PIL have 0.299


def images(n, size, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch):
    """What the parts of a view were given and gave: name -> list of (arguments, result)."""
    seen = {}

    def spy(name):
        real = getattr(views, name)

        def called(*arguments):
            result = real(*arguments)
            seen.setdefault(name, []).append((arguments, result))
            return result

        monkeypatch.setattr(views, name, called)

    for name in ("crop_boxes", "colour_jitter", "blur_matrices"):
        spy(name)
    return seen


@pytest.mark.parametrize("size", [16, 17, 32])
@pytest.mark.parametrize("crop_scale", [0.2, 0.75, 1.0])
def test_eval_views_are_torchvisions_crops_and_flips(size, crop_scale, calls):
    x = images(3, size)
    out = EvalViews(size, crop_scale)(x, n_views=20)
    assert out.shape == (3, 20, 3, size, size)
    boxes = calls["crop_boxes"][0][1]
    crops = torch.stack(
        [torch.stack([tv.resized_crop(x[i], *boxes[i, v].tolist(), [size, size]) for v in range(20)]) for i in range(3)]
    )
    flipped = (out - tv.horizontal_flip(crops)).abs().amax(dim=(2, 3, 4)) < 1e-5
    straight = (out - crops).abs().amax(dim=(2, 3, 4)) < 1e-5
    assert (flipped ^ straight).all()
    assert 15 <= flipped.sum() <= 45  # of 60


def test_without_flip_no_view_is_mirrored():
    x = images(2, 12)
    assert torch.equal(EvalViews(12, crop_scale=1.0, flip=False, ratio=(1, 1))(x, 8), x[:, None].expand(-1, 8, -1, -1, -1))


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.75, 0.75), (0.9, 1.0)])
def test_crop_boxes_are_distributed_as_torchvisions(size, scale):
    """(0.9, 1) sends every fifth draw or so to the fallback."""
    draws = torch.rand(20_000, 22, generator=torch.Generator().manual_seed(1))
    found = views.crop_boxes(draws, scale, RATIO, size).numpy()
    blank = torch.empty(1, size, size)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        expected = np.array([transforms.RandomResizedCrop.get_params(blank, scale, RATIO) for _ in range(3000)])
    for statistic in (
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: height / width,
        lambda top, left, height, width: top,
        lambda top, left, height, width: left,
        lambda top, left, height, width: size - height - top,
        lambda top, left, height, width: size - width - left,
        lambda top, left, height, width: (2 * top > size - height) * 2 + (2 * left > size - width),
    ):
        assert stats.ks_2samp(statistic(*found.T), statistic(*expected.T)).pvalue > 0.001


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (24, 25), (33, 7)])
def test_an_image_that_no_crop_fits_is_cut_as_torchvision_cuts_it(height, width):
    """Twice the image's area never fits: what is left is the centre, of the nearest aspect that is allowed."""
    found = views.crop_boxes(torch.rand(22), (2.0, 2.0), RATIO, height, width)
    expected = transforms.RandomResizedCrop.get_params(torch.empty(1, height, width), (2.0, 2.0), RATIO)
    assert found.tolist() == list(expected)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**62), chunk=st.integers(1, 7), order=st.permutations(range(4)))
def test_a_view_depends_on_image_and_number_alone(seed, chunk, order):
    x, make = images(4, 8, seed % 1000), EvalViews(8, seed=seed)
    whole = make(x, 7)
    chunks = torch.cat([make(x, min(chunk, 7 - first), first) for first in range(0, 7, chunk)], dim=1)
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(make(x[list(order)], 7), whole[list(order)], rtol=0, atol=1e-6)
    torch.testing.assert_close(make(x[order[:1]], 7), whole[order[:1]], rtol=0, atol=1e-6)
    train, keys = TrainViews(8, seed=seed), torch.arange(10, 14)
    one = train(x, keys, 3)
    torch.testing.assert_close(train(x[list(order)], keys[list(order)], 3), one[list(order)], rtol=0, atol=1e-5)
    torch.testing.assert_close(train(x[order[:1]], keys[order[:1]], 3), one[order[:1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["seed", "number", "key", "pixel"])
def test_views_differ_where_they_should(change):
    x = images(1, 16)
    y = x.clone()
    y[0, 0, 0, 0] = 1 - y[0, 0, 0, 0]
    one = EvalViews(16)(x, 30)
    other = {
        "seed": lambda: EvalViews(16, seed=1)(x, 30),
        "number": lambda: EvalViews(16)(x, 30, first_view=30),
        "key": lambda: EvalViews(16)(x, 30, keys=torch.tensor([5])),
        "pixel": lambda: EvalViews(16)(y, 30),
    }[change]()
    equal = (one - other).abs().amax(dim=(0, 2, 3, 4)) < 0.1
    assert equal.sum() <= 2  # few boxes fit into 16 pixels: one may come twice


def test_equal_keys_mean_equal_boxes():
    x = images(2, 16)
    keys = torch.tensor([7, 7])
    pair = EvalViews(16)(torch.cat([x[:1], x[:1] * 0.5]), 10, keys=keys)
    torch.testing.assert_close(pair[1], pair[0] * 0.5)
    assert torch.equal(EvalViews(16)(x, 3), EvalViews(16)(x, 3, keys=rng.image_keys(x)))


def torchvision_jitter(image, order, factors):
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for which in order.tolist():
        image = steps[which](image, float(factors[which]))
    return image


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), strength=st.sampled_from([0.1, 0.5, 1.0]))
def test_colour_jitter_is_torchvisions_in_any_order(seed, strength):
    generator = torch.Generator().manual_seed(seed)
    x = images(6, 5, seed)
    x[0] = x[0, :1]  # grey: hue undefined
    x[1] = (x[1] * 2).round() / 2  # ties between channels
    order = torch.rand(6, 4, generator=generator).argsort(dim=1)
    factors = torch.rand(6, 4, generator=generator) * 2 * strength + 1 - strength
    factors[:, 3] = (factors[:, 3] - 1) / 2
    found = views.colour_jitter(x, order, factors)
    expected = torch.stack([torchvision_jitter(*each) for each in zip(x, order, factors, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=LUMA)
    chosen = torch.rand(6, generator=generator) < seed % 3 / 2  # none, some, all
    found = views.colour_jitter(x, order, factors, chosen)
    torch.testing.assert_close(found[chosen], expected[chosen], rtol=0, atol=LUMA)
    assert torch.equal(found[~chosen], x[~chosen])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), shift=st.floats(-0.5, 0.5))
def test_shift_hue_is_torchvisions(seed, shift):
    x = images(3, 5, seed)
    x[0], x[1] = x[0, :1], (x[1] * 2).round() / 2
    expected = tv.adjust_hue(x, shift)
    torch.testing.assert_close(views.shift_hue(x, torch.full((3,), shift)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("size", "radius"), [(32, 1), (9, 3), (24, 11)])
def test_blur_is_torchvisions(size, radius):
    x, sigma = images(5, size), torch.tensor([0.1, 0.5, 1.0, 2.0, 0.0])
    matrix = views.blur_matrices(sigma, radius, size)[:, None]
    found = views.resample(x, matrix, matrix)[:, 0]
    expected = torch.stack([tv.gaussian_blur(x[i], [2 * radius + 1] * 2, [float(sigma[i])] * 2) for i in range(4)])
    torch.testing.assert_close(found[:4], expected, rtol=0, atol=1e-5)
    assert torch.equal(found[4], x[4])


@pytest.mark.parametrize("greyscale", [0.0, 1.0])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_training_view_is_crop_flip_jitter_grey_blur(flip, greyscale, calls):
    x, size = images(8, 40), 40
    out = TrainViews(size, flip=flip, jitter=1.0, greyscale=greyscale, blur=1.0)(x, torch.arange(8), view=5)
    boxes = calls["crop_boxes"][0][1][:, 0].tolist()
    (_, order, factors, _), _ = calls["colour_jitter"][0]
    sigma, radius, _ = calls["blur_matrices"][0][0]
    assert radius == 2  # a tenth of the image and no even number: SimCLRv2's
    for i in range(8):
        step = tv.resized_crop(x[i], *boxes[i], [size, size])
        step = tv.horizontal_flip(step) if flip else step
        step = torchvision_jitter(step, order[i], factors[i])
        step = tv.rgb_to_grayscale(step, 3) if greyscale else step
        step = tv.gaussian_blur(step, [5, 5], [float(sigma[i])] * 2)
        torch.testing.assert_close(out[i], step, rtol=0, atol=LUMA)


def test_several_training_views_at_once_are_each_of_them_in_turn():
    x, keys, make = images(6, 40), torch.arange(20, 26), TrainViews(40)
    each = torch.cat([make(x, keys, number) for number in (7, 4, 9)])
    torch.testing.assert_close(make(x, keys, [7, 4, 9]), each, rtol=0, atol=1e-5)
    crops = images(18, 40, seed=1).view(6, 3, 3, 40, 40)
    each = torch.cat([make.after_crop(crops[:, i], keys, number) for i, number in enumerate((7, 4, 9))])
    torch.testing.assert_close(make.after_crop(crops, keys, [7, 4, 9]), each, rtol=0, atol=1e-5)


def test_training_views_draw_what_simclrv2_draws(calls):
    """Section 3: jitter with probability 0.8, greyscale 0.2, blur and flip 0.5; strengths 0.8, 0.8, 0.8, 0.2."""
    n = 4000
    x = images(1, 8).expand(n, -1, -1, -1)
    out = TrainViews(8, crop_scale=(0.5, 1.0))(x, torch.arange(n), view=1)
    assert out.min() >= 0 and out.max() <= 1
    (_, order, factors, chosen), _ = calls["colour_jitter"][0]
    assert stats.binomtest(int(chosen.sum()), n, 0.8).pvalue > 0.001
    for which, (low, high) in enumerate([(0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2)]):
        assert stats.kstest(factors[:, which], "uniform", args=(low, high - low)).pvalue > 0.001
    assert stats.chisquare(order.unique(dim=0, return_counts=True)[1]).pvalue > 0.001
    assert len(order.unique(dim=0)) == 24
    sigma = calls["blur_matrices"][0][0][0]
    assert stats.binomtest(int((sigma > 0).sum()), n, 0.5).pvalue > 0.001
    assert stats.kstest(sigma[sigma > 0], "uniform", args=(0.1, 1.9)).pvalue > 0.001
    is_grey = (out.amax(dim=1) - out.amin(dim=1)).amax(dim=(1, 2)) < 1e-6
    assert stats.binomtest(int(is_grey.sum()), n, 0.2).pvalue > 0.001

    ramp = torch.linspace(0, 1, 8).expand(n, 3, 8, 8)
    plain = TrainViews(8, jitter=0, greyscale=0, blur=0)(ramp, torch.arange(n), view=1)
    mirrored = plain[..., 0].mean(dim=(1, 2)) > plain[..., -1].mean(dim=(1, 2))
    assert stats.binomtest(int(mirrored.sum()), n, 0.5).pvalue > 0.001


def test_probability_0_leaves_a_step_out():
    x = images(3, 12)
    out = TrainViews(12, (1.0, 1.0), flip=0, jitter=0, greyscale=0, blur=0, ratio=(1, 1))(x, torch.arange(3), 0)
    assert torch.equal(out, x)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 43), (20, 20), (10, 14)])
def test_resize_to_is_pillows_bilinear_and_the_centre(height, width):
    array = (np.random.default_rng(0).random((height, width, 3)) * 255).astype(np.uint8)
    found = views.resize_to(torch.from_numpy(array).permute(2, 0, 1)[None], 20)[0]
    scale = 20 / min(height, width)
    resized = np.asarray(Image.fromarray(array).resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR))
    top, left = (resized.shape[0] - 20) // 2, (resized.shape[1] - 20) // 2
    expected = resized[top : top + 20, left : left + 20].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(found, expected, atol=1.01 / 255)  # Pillow rounds to 8 bits after each direction


@pytest.mark.parametrize(("arguments", "message"), [((8, 0.0), "crop_scale"), ((8, 1.1), "crop_scale"), ((1,), "image_size")])
def test_impossible_views_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EvalViews(*arguments)
