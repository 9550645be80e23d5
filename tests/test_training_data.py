"""What each step learns from: the same views whether they are made step by step or several steps at once."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from cadetlib import data, stream, training_data, training_settings
from cadetlib.training_settings import Settings


class Asked(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["contrastive", "supervised"])
@pytest.mark.parametrize("streamed", [False, True])
def test_views_made_for_several_steps_are_those_of_each_step(objective, streamed, tmp_path, monkeypatch):
    """Across the ends of epochs, begun and ended in the middle of one; each step asks for less."""
    images = data.load("digits").resized(8)[:15]
    chosen = Settings(objective=objective, image_size=8, batch_size=4, seed=5, workers=1, channels_last=True)
    if streamed:
        for i, pixels in enumerate(images.images):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:02}.png")
        images = data.folder_set(tmp_path)
    found, asked = {}, {}
    for at_once in (1, 2, 5):
        monkeypatch.setattr(training_data, "steps_at_once", lambda *_, n=at_once: n)
        with Asked() as operations:
            found[at_once] = list(training_data.batches(images, chosen, torch.device("cpu"), first=1, last=8))
        asked[at_once] = operations.count
    assert len(found[1]) == 7
    assert len({float(views.sum()) for views, _ in found[1]}) == 7
    for at_once in (2, 5):
        for (views, labels), (expected, of) in zip(found[at_once], found[1], strict=True):
            torch.testing.assert_close(views, expected, rtol=0, atol=1e-6)
            assert torch.equal(labels, of)
            assert views.is_contiguous(memory_format=torch.channels_last)
    assert asked[5] < asked[2] < asked[1]
    if streamed:
        return
    for step, (expected, labels) in enumerate(found[1], 1):
        epoch, index = next(stream.shares(15, 4, 5, step, step + 1))
        numbers = stream.view_numbers(epoch, len(expected) // 4)
        views = training_settings.train_views(chosen)(images.images[index].float() / 255, index, numbers)
        torch.testing.assert_close(expected, views, rtol=0, atol=1e-6)
        assert torch.equal(labels, images.labels[index])


def test_what_a_run_cannot_learn_from_is_refused(monkeypatch):
    unlabelled = replace(data.load("digits"), name="unlabelled", labels=None)
    monkeypatch.setattr(data, "load", lambda *_, **__: unlabelled)
    supervised = Settings(objective="supervised", image_size=8, batch_size=1797)
    with pytest.raises(ValueError, match="data: found no labels in unlabelled, expected some for the supervised objective"):
        training_data.training_images(supervised)
    contrastive = replace(supervised, objective="contrastive")
    assert len(training_data.training_images(contrastive)) == 1797  # one batch an epoch
    with pytest.raises(ValueError, match="batch_size: found 1798 with 1797 images, expected at most one batch an epoch"):
        training_data.training_images(replace(contrastive, batch_size=1798))
