"""Memory may be asserted where time may not: it must not grow with the number of images."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("memory", Path(__file__).parents[1] / "benchmarks" / "memory.py")
memory = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(memory)


@pytest.mark.slow
def test_fit_and_score_need_as_much_memory_for_eight_times_the_images(tmp_path):
    """280 images more, resized to 192 pixels, would be 30 MiB if they were kept."""
    rows = memory.scoring(tmp_path, (40, 320), image_size=192, chunk=8)
    peaks = {(row["what"], row["n"]): row["peak_mib"] for row in rows}
    print(memory.shown(rows))
    for what in ("score fit", "score score"):
        assert peaks[what, 320] < peaks[what, 40] + 20, (
            f"found a peak that grows with the number of images:\n{memory.shown(rows)}"
        )
