"""Counter-based random numbers against Python's unbounded integers, published values and known distributions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cadetlib import rng

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15
INT64 = st.integers(-(2**63), 2**63 - 1)


def finaliser(h):
    """Of SplitMix64 (Steele, Lea, Flood 2014, figure 17), in unsigned arithmetic."""
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB % WORD
    return h ^ (h >> 31)


def paper_uniform(seed, key, stream, n):
    """A SplitMix64 generator whose state is the hash of seed, key and stream: the upper 24 bits of its outputs."""
    state = 0
    for word in (seed, key, stream):
        state = finaliser(((state ^ word % WORD) + GOLDEN) % WORD)
    return [(finaliser((state + i * GOLDEN) % WORD) >> 40) / 2**24 for i in range(1, n + 1)]


@settings(deadline=None, max_examples=50)
@given(seed=INT64, keys=st.lists(INT64, min_size=1, max_size=3), streams=st.lists(INT64, min_size=1, max_size=3))
def test_uniform_is_splitmix64_to_the_bit(seed, keys, streams):
    found = rng.uniform(seed, torch.tensor(keys), torch.tensor(streams), 4).tolist()
    assert found == [[paper_uniform(seed, key, stream, 4) for stream in streams] for key in keys]


def test_the_finaliser_gives_splitmix64s_published_outputs():
    """The first outputs of seed 1234567, as printed beside many implementations."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [finaliser((1234567 + i * GOLDEN) % WORD) for i in range(1, 6)] == published


@pytest.fixture(scope="module")
def draws():
    """Neighbouring seeds, keys, streams and positions: (16, 32, 32, 32) numbers."""
    return np.stack([rng.uniform(seed, torch.arange(32), torch.arange(32), 32).numpy() for seed in range(16)])


def chi_square_p(cells, n_cells):
    return stats.chisquare(np.bincount(cells.ravel(), minlength=n_cells)).pvalue


def test_draws_are_uniform_to_their_last_bits(draws):
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 0.001
    last_bits = (draws * 2**24).astype(np.int64) % 256
    assert chi_square_p(last_bits, 256) > 0.001


@pytest.mark.parametrize("axis", range(4), ids=["seed", "key", "stream", "position"])
def test_neighbouring_draws_are_independent(draws, axis):
    cell = (draws * 32).astype(np.int64)
    here, there = np.split(np.moveaxis(cell, axis, 0), 2)
    assert chi_square_p(here * 32 + there, 1024) > 0.001
    one, next_one = (np.moveaxis(cell, axis, 0)[start::2] for start in (0, 1))
    assert chi_square_p(one * 32 + next_one, 1024) > 0.001


def test_an_image_key_changes_with_every_pixel():
    image = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    variants = image.repeat(109, 1, 1, 1)
    for position in range(108):  # each pixel of each channel by the smallest step of an 8-bit image
        pixel = variants[position].view(-1)[position : position + 1]
        pixel += torch.where(pixel > 0.5, -1 / 255, 1 / 255)
    keys = rng.image_keys(torch.cat([variants, variants.flip(-1)[108:], variants.roll(1, 1)[108:]]))
    assert len(keys.unique()) == 111
    assert torch.equal(rng.image_keys(variants.flip(0)), keys[:109].flip(0))  # of the image alone
    assert torch.equal(rng.image_keys(image[None] + 1e-7), keys[108:109])  # and not of its last bits
    slight = image[None].clone()
    slight[0, 0, 0, 0] += 1e-4  # an attack's floating-point images may differ by less than 8 bits show
    assert not torch.equal(rng.image_keys(slight), keys[108:109])
