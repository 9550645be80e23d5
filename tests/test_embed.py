"""View sums against double loops over views in float64, however they are batched, ordered, sharded or cached."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cadetlib import embed
from cadetlib.views import EvalViews, resize_to

VIEWS = EvalViews(image_size=8, crop_scale=0.5)
GRID = (2, 3, 6)


class Encoder(nn.Module):
    """A random convolution, in train mode, that remembers the sizes of the batches it was given."""

    def __init__(self, seed=0, gain=2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(seed)))
        self.dropout, self.gain, self.batches = nn.Dropout(0.5), gain, []

    def forward(self, images):
        self.batches.append(len(images))
        maps = nn.functional.conv2d(images - 0.5, self.weight)
        return self.dropout((maps * self.gain).tanh().mean(dim=(2, 3)))


def images(n=7, size=10, seed=0):
    return torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def loop_sums(z):
    """Eq. 5 for one image: mean similarity over i != j, and the mean unit embedding, from views z (n, D)."""
    unit = [v / np.linalg.norm(v) for v in np.asarray(z, dtype=np.float64)]
    n = len(unit)
    m_in = sum(unit[i] @ unit[j] for i, j in itertools.product(range(n), repeat=2) if i != j) / (n * (n - 1))
    return m_in, sum(unit) / n


def assert_same(found, expected, atol=1e-6):
    assert found.grid == expected.grid
    torch.testing.assert_close(found.m_in, expected.m_in, rtol=0, atol=atol)
    torch.testing.assert_close(found.means, expected.means, rtol=0, atol=atol)


def test_view_sums_are_the_double_loops_of_equation_5():
    encoder, x = Encoder().eval(), images()
    sums = embed.view_sums(encoder, x, VIEWS, GRID)
    with torch.no_grad():
        views = VIEWS(resize_to(x, 8), 6)
        z = encoder(views.flatten(0, 1)).view(7, 6, 5)
    for k, n in enumerate(GRID):
        m_in, means = zip(*(loop_sums(z[i, :n]) for i in range(7)), strict=True)
        np.testing.assert_allclose(sums.m_in[:, k], m_in, atol=1e-6)
        np.testing.assert_allclose(sums.means[:, k], means, atol=1e-6)
        assert torch.equal(sums.at(n)[0], sums.m_in[:, k]) and torch.equal(sums.at(n)[1], sums.means[:, k])
    assert sums.m_in.std() > 0.01  # the images differ in what is compared


def test_a_grid_in_one_pass_is_each_number_of_views_by_itself():
    encoder = Encoder()
    together = embed.view_sums(encoder, images(), VIEWS, GRID)
    assert sum(encoder.batches) == 7 * 6
    for n in GRID:
        alone = embed.view_sums(encoder, images(), VIEWS, (n,))
        torch.testing.assert_close(together.at(n), alone.at(n), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(batch_size=st.integers(1, 60), of=st.integers(1, 7), order=st.permutations(range(7)), with_keys=st.booleans())
def test_sums_depend_on_no_batch_order_or_shard(batch_size, of, order, with_keys):
    encoder, x, order = Encoder(), images(), list(order)
    keys = torch.arange(100, 107) if with_keys else None
    expected = embed.view_sums(encoder, x, VIEWS, GRID, keys)
    encoder.batches.clear()
    shards = [embed.view_sums(encoder, x, VIEWS, GRID, keys, (i, of), batch_size) for i in range(of)]
    assert max(encoder.batches) <= batch_size and sum(encoder.batches) == 7 * 6
    assert_same(embed.concatenate(shards), expected)
    shuffled = embed.view_sums(encoder, x[order], VIEWS, GRID, None if keys is None else keys[order], batch_size=batch_size)
    assert_same(shuffled, expected[order])
    assert len(expected[2:5]) == 3


def test_keys_stand_in_for_pixels():
    """Given keys, the views of changed images stay the same crops; without, another image means other crops."""
    x, encoder = images(), Encoder()
    keys = torch.arange(7)
    sums = embed.view_sums(encoder, x, VIEWS, GRID, keys)
    views = VIEWS(resize_to(x, 8), 6, keys=keys)
    with torch.no_grad():
        expected = loop_sums(encoder.eval()(views[3]))[0]
    assert float(sums.m_in[3, -1]) == pytest.approx(expected, abs=1e-6)
    assert not torch.allclose(sums.m_in, embed.view_sums(encoder, x, VIEWS, GRID, keys + 7).m_in, atol=1e-3)


def test_embed_is_the_encoder_in_eval_mode():
    encoder, x = Encoder(), images()
    assert encoder.training
    found = embed.embed(encoder, x, batch_size=3)
    assert encoder.batches == [3, 3, 1]
    assert encoder.training and not found.requires_grad and not found.is_inference()
    with torch.no_grad():
        torch.testing.assert_close(found, encoder.eval()(x / 255), rtol=0, atol=1e-6)
    torch.testing.assert_close(embed.embed(encoder, x.numpy() / 255.0), found, rtol=0, atol=1e-6)
    assert not encoder.training


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_close_and_not_equal(dtype):
    exact, found = (embed.embed(Encoder(), images(), dtype=d) for d in ("float32", dtype))
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.02
    sums = [embed.view_sums(Encoder(), images(), VIEWS, GRID, dtype=d).m_in for d in ("float32", dtype)]
    assert 0 < (sums[0] - sums[1]).abs().max() < 0.02


@pytest.mark.parametrize(("instructions", "expected"), [("amx_bf16", "bfloat16"), ("bf16", "bfloat16"), ("avx512_f", "float32")])
def test_auto_is_bfloat16_where_the_processor_multiplies_it(instructions, expected, monkeypatch):
    """Elsewhere float32, and whoever asks for bfloat16 all the same is told what it costs."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, instructions: True})
    assert embed.resolved_dtype("auto", torch.device("cpu")) == expected
    assert embed.resolved_dtype("float32", torch.device("cpu")) == "float32"
    with pytest.raises(ValueError, match="dtype: found 'float64', expected one of"):
        embed.resolved_dtype("float64")
    for dtype in ("float32", "bfloat16"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            embed.embed(Encoder(), images(), dtype=dtype)
        told = [str(warning.message) for warning in caught if "without instructions for it" in str(warning.message)]
        assert len(told) == (dtype == "bfloat16" != expected)


# --- the cache --------------------------------------------------------------------------------------------------------------


def cached(folder, encoder=None, x=None, views=VIEWS, grid=GRID, keys=None, dtype="float32", shard=(0, 1)):
    encoder = Encoder() if encoder is None else encoder
    return embed.view_sums(encoder, images() if x is None else x, views, grid, keys, shard, dtype=dtype, cache=folder)


def test_a_second_call_reads_the_first_ones_result(tmp_path):
    encoder = Encoder()
    first = cached(tmp_path / "new", encoder)
    encoder.batches.clear()
    second = cached(tmp_path / "new", encoder)
    assert encoder.batches == [2]  # the encoder's signature: is it still the same?
    assert first.grid == second.grid and torch.equal(first.m_in, second.m_in) and torch.equal(first.means, second.means)
    assert_same(first, embed.view_sums(encoder, images(), VIEWS, GRID), atol=0)
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_whatever_determines_a_sum_is_in_the_caches_key(tmp_path):
    one_weight, one_pixel = Encoder(), images()
    with torch.no_grad():
        one_weight.weight[0, 0, 0, 0] += 1e-6
    one_pixel[6, 2, 9, 9] ^= 1
    changes = [
        {},
        {"encoder": one_weight},
        {"x": one_pixel},
        {"x": images().flip(0)},
        {"x": images()[:6]},
        {"x": images() / 255},
        {"views": EvalViews(8, 0.5, seed=1)},
        {"views": EvalViews(8, 0.6)},
        {"views": EvalViews(8, 0.5, flip=False)},
        {"views": EvalViews(9, 0.5)},
        {"grid": (2, 6)},
        {"keys": torch.arange(7)},
        {"keys": torch.arange(7) + 1},
        {"dtype": "bfloat16"},
        {"shard": (0, 2)},
        {"shard": (1, 2)},
    ]
    with warnings.catch_warnings(action="error", category=UserWarning):
        for n_files, change in enumerate(changes, start=1):
            cached(tmp_path, **change)
            assert len(list(tmp_path.iterdir())) == n_files, change


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_said_and_made_anew(tmp_path, damage):
    expected = cached(tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.warns(UserWarning, match=rf"cache: {path.name}: found .*; computing anew"):
        assert_same(cached(tmp_path), expected, atol=0)
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert_same(cached(tmp_path), expected, atol=0)


def test_equal_weights_in_another_network_are_not_taken_for_the_same(tmp_path):
    cached(tmp_path, Encoder(gain=2))
    other = Encoder(gain=4)
    with pytest.warns(UserWarning, match="same weights and other features"):
        found = cached(tmp_path, other)
    assert_same(found, embed.view_sums(other, images(), VIEWS, GRID), atol=0)


# --- refused ----------------------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images):
        return self.features(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": images().float()}, r"found values in \[0, 255\], expected \[0, 1\]"),
        ({"images": images() / 255 - 0.01}, r"expected \[0, 1\]"),
        ({"images": torch.full((1, 3, 8, 8), float("nan"))}, "images: found 192 NaN"),
        ({"images": images()[:, :1]}, r"found shape \(7, 1, 10, 10\), expected \(N, 3, H, W\)"),
        ({"images": images()[0]}, r"expected \(N, 3, H, W\)"),
        ({"images": images()[:0]}, "found 0, expected a whole number of at least 1"),
        ({"images": images().long()}, "found dtype torch.int64, expected uint8 or floating point"),
        ({"images": "flowers"}, "images: found"),
        ({"encoder": Returns(lambda x: x)}, r"returned \(42, 3, 8, 8\) for 42 images"),
        ({"encoder": Returns(lambda x: x.flatten(1) * float("inf"))}, "NaN or infinite"),
        ({"encoder": Returns(lambda x: x.flatten(1) * 0)}, "encoder's features: found a zero vector"),
        ({"grid": ()}, "grid: found"),
        ({"grid": (6, 3)}, "expected increasing numbers of views"),
        ({"grid": (1, 3)}, "n_views: found 1, expected a whole number of at least 2"),
        ({"grid": (2, 2.5)}, "n_views: found 2.5"),
        ({"shard": (2, 2)}, r"shard: found \(2, 2\)"),
        ({"shard": (0, 9)}, "found none in this shard"),
        ({"keys": torch.arange(6)}, r"keys: found shape \(6,\), expected \(7,\)"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"dtype": "float8"}, "dtype: found 'float8'"),
    ],
)
def test_bad_input_is_refused_by_name(changes, message):
    arguments = {"encoder": Encoder(), "images": images(), "views": VIEWS, "grid": GRID} | changes
    with pytest.raises(ValueError, match=message):
        embed.view_sums(**arguments)


def test_sums_that_are_not_there_are_refused():
    sums = embed.view_sums(Encoder(), images(), VIEWS, GRID)
    with pytest.raises(ValueError, match=r"n_views: found 5, expected one of the grid \(2, 3, 6\)"):
        sums.at(5)
    with pytest.raises(ValueError, match="equal grids"):
        embed.concatenate([sums, embed.view_sums(Encoder(), images(), VIEWS, (2,))])
    with pytest.raises(ValueError, match="at least one part"):
        embed.concatenate([])


def test_an_encoder_that_writes_into_its_input_writes_into_no_image_of_the_caller():
    class Doubling(nn.Module):
        def forward(self, x):
            return x.mul_(2).flatten(1)

    x = torch.rand(3, 3, 4, 4)
    before = x.clone()
    torch.testing.assert_close(embed.embed(Doubling(), x), 2 * before.flatten(1))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_come_in_the_dtype_of_the_weights(dtype):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    x = torch.rand(3, 3, 4, 4)
    expected = embed.embed(encoder, x)
    torch.testing.assert_close(embed.embed(encoder.to(dtype), x), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("images", [torch.tensor(0.5), [torch.rand(3, 4, 4).requires_grad_()]])
def test_what_is_no_batch_of_images_is_refused(images):
    for of in (lambda: embed.embed(nn.Flatten(), images), lambda: embed.view_sums(nn.Flatten(), images, EvalViews(4))):
        with pytest.raises(ValueError, match="images"):
            of()
