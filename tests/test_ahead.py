"""What is asked of a device when: on a CPU one thing after the other, on a GPU the next thing before the last is waited for."""

from contextlib import contextmanager
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


# --- streams that are none ------------------------------------------------------------------------------------------------


class Stream:
    def __init__(self, name, said):
        self.name, self.said = name, said

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")


class Kept:
    """A tensor that says for which stream its memory is kept."""

    def __init__(self, name, said):
        self.name, self.said = name, said

    def record_stream(self, stream):
        self.said.append(f"{self.name} kept for {stream.name}")


def test_a_gpu_makes_batches_beside_the_passes_which_wait_for_theirs(monkeypatch):
    said = []
    passes, beside = Stream("passes", said), Stream("beside", said)
    current = [passes]

    @contextmanager
    def within(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(ahead.torch.cuda, "Stream", lambda device: beside)
    monkeypatch.setattr(ahead.torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(ahead.torch.cuda, "stream", within)

    def batches():
        for i in range(2):
            said.append(f"batch {i} made in {current[-1].name}")
            yield Kept(f"views {i}", said), Kept(f"labels {i}", said)

    said += (f"used in {current[-1].name}" for _ in ahead.made_ahead(batches(), SimpleNamespace(type="cuda")))
    assert said.pop(0) == "beside waits for passes"
    assert said == [
        step
        for i in range(2)
        for step in (
            f"batch {i} made in beside",
            "passes waits for beside",
            f"views {i} kept for passes",
            f"labels {i} kept for passes",
            "used in passes",
        )
    ]


def test_what_is_sent_is_read_when_it_has_arrived(monkeypatch):
    said, there = [], torch.tensor([1.0, 2.0])

    class Event:
        def record(self, stream):
            said.append(f"recorded behind the copy in {stream}")

        def synchronize(self):
            said.append("waited for")

    class OnItsWay:
        def copy_(self, value, non_blocking):
            said.append(f"copied, {'waiting' if not non_blocking else 'nobody waits'}")
            return self

        def clone(self):
            said.append("read")
            return there

    def pinned(value, device, pin_memory):
        assert (device, pin_memory) == ("cpu", True)
        return OnItsWay()

    monkeypatch.setattr(ahead.torch, "empty_like", pinned)
    monkeypatch.setattr(ahead.torch.cuda, "Event", Event)
    monkeypatch.setattr(ahead.torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    sent = ahead.Sent(SimpleNamespace(is_cuda=True, device="cuda:1"))
    assert said == ["copied, nobody waits", "recorded behind the copy in the stream of cuda:1"]
    assert torch.equal(sent.read(), there)
    assert said[2:] == ["waited for", "read"]
