"""What is asked of a device when: on a CPU one thing after the other, on a GPU the next thing before the last is waited for."""

from types import SimpleNamespace

import pytest
import torch

from cadetlib import ahead


@pytest.fixture
def said(monkeypatch):
    """What happens in which order, on devices that are none."""
    said = []

    class Sent:
        def __init__(self, value):
            self.value = value
            said.append(f"sent {value}")

        def read(self):
            said.append(f"read {self.value}")
            return self.value

    monkeypatch.setattr(ahead, "Sent", Sent)
    monkeypatch.setattr(ahead, "made_ahead", lambda batches, _: batches)
    return said


def made(n, said):
    for i in range(n):
        said.append(f"made {i}")
        yield (i,)


def used(device, said, n, launch=lambda i: (10 * i,)):
    found = []
    for (value,) in ahead.results(launch, made(n, said), SimpleNamespace(type=device)):
        said.append(f"used {value}")
        found.append(value)
    return found


def test_a_cpu_makes_a_batch_when_the_last_result_is_used(said):
    assert used("cpu", said, 2) == [0, 10]
    assert said == ["made 0", "sent 0", "read 0", "used 0", "made 1", "sent 10", "read 10", "used 10"]


def test_a_gpu_has_been_asked_for_the_next_passes_when_a_result_is_read(said):
    assert used("cuda", said, 3) == [0, 10, 20]
    expected = "made 0, sent 0, made 1, sent 10, made 2, read 0, used 0, sent 20, read 10, used 10, read 20, used 20"
    assert ", ".join(said) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5])
def test_a_batch_without_a_result_gives_none(device, n, said):
    """As where an image's views are more than a batch."""
    assert used(device, said, n, launch=lambda i: (i,) if i % 2 else ()) == [i for i in range(n) if i % 2]


def test_what_is_sent_is_what_was_there():
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(ahead.Sent(value).read(), value)
