"""Memory may be asserted where time may not: it must not grow with the number of images."""

import importlib.util
from pathlib import Path

import pytest
import torch

_SPEC = importlib.util.spec_from_file_location("memory", Path(__file__).parents[1] / "benchmarks" / "memory.py")
memory = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(memory)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """280 images more, resized to 192 pixels, would be 30 MiB if they were kept, and four times that as float32."""
    return memory.scoring(tmp_path_factory.mktemp("scoring"), (40, 320), image_size=192, chunk=8)


@pytest.mark.slow
def test_fit_and_score_need_as_much_memory_for_eight_times_the_images(rows):
    assert max(memory.grown(rows, "peak_mib").values()) < 20, (
        f"found a peak that grows with the number of images:\n{memory.shown(rows)}"
    )


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory it measures")
def test_fit_and_score_need_as_much_device_memory_for_eight_times_the_images(rows):
    assert max(memory.grown(rows, "device_mib").values()) < 5, (
        f"found a peak on the GPU that grows with the number of images:\n{memory.shown(rows)}"
    )


@pytest.mark.parametrize("kind", ["peak_mib", "device_mib"])
def test_a_peak_that_grows_is_found(kind):
    peaks = {"score fit": {40: 100.0, 320: 218.0}, "score score": {40: 90.0, 320: 90.5}}
    made_up = [{"what": what, "n": n, kind: mib} for n in (320, 40) for what, of in peaks.items() for mib in [of[n]]]
    assert memory.grown(made_up, kind) == {"score fit": 118.0, "score score": 0.5}
