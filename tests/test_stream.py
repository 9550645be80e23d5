"""Images read from files as training goes on: torchvision's crops of the original, and the same run as from memory."""

import json
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from test_pretrain import TINY, last_checkpoint, log_of, tensors
from torchvision import transforms
from torchvision.transforms.v2 import functional as tv

from cadetlib import data, image_files, imagenet, pretrain, stream, training_settings, views
from cadetlib.training_settings import Settings
from cadetlib.views import TrainViews

RATIO = (3 / 4, 4 / 3)
CPU = torch.device("cpu")
N, SIDE = 66, 16
STREAMED = TINY | dict(data="squares", image_size=SIDE, width=8, batch_size=32, epochs=3, checkpoint_every=1, knn_every=0,
                       blur=0.5, greyscale=0.2, optimizer="sgd", learning_rate=0.0005, reduction="mean", tau=1.0)  # fmt: skip


def picture(height, width, seed=0):
    """Smooth colours, uint8 (height, width, 3)."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    return (smooth[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data root with square pictures in three sub-folders, as PNG; pooled features tell them apart, so that batch norm does
    not make much of the rounding to 8 bits."""
    root = tmp_path_factory.mktemp("root")
    for i in range(N):
        path = root / "squares" / "abc"[i * 3 // N] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(SIDE, SIDE, i) // 2 + np.random.default_rng(i).integers(128, size=3, dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def squares(folder, monkeypatch):
    """That set under a name, not read yet."""
    described = imagenet.Folder("squares", N, 3, "", "none published")
    monkeypatch.setenv("CADET_DATA", str(folder))
    monkeypatch.setitem(data.SOURCES, "squares", data._Source(data._files(described), "put it there"))
    return data.load("squares")


# --- which images a step takes -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(n=st.integers(8, 40), share=st.integers(1, 3), world=st.integers(1, 3), first=st.integers(0, 6), seed=st.integers(0, 99))
def test_processes_share_each_batch_and_every_start_goes_on(n, share, world, first, seed):
    if share * world > n:
        return
    size, last = share * world, 3 * (n // (share * world))
    whole = [(epoch, index.tolist()) for epoch, index in stream.shares(n, size, seed, 0, last)]
    parts = [list(stream.shares(n, size, seed, 0, last, rank, world)) for rank in range(world)]
    assert whole == [(same[0][0], [i for _, index in same for i in index.tolist()]) for same in zip(*parts, strict=True)]
    assert whole[first:] == [(epoch, index.tolist()) for epoch, index in stream.shares(n, size, seed, first, last)]
    for epoch in range(3):
        seen = Counter(i for e, index in whole if e == epoch for i in index)
        assert len(seen) == n // size * size and set(seen.values()) == {1}


# --- one image -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(375, 500), (120, 40), (30, 300)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.8, 1.0)])
def test_crop_boxes_of_oblong_images_are_torchvisions(height, width, scale):
    """In long images hardly a large crop fits: nearly all of them are then the centre."""
    draws = torch.rand(6000, 22, generator=torch.Generator().manual_seed(1))
    found = views.crop_boxes(draws, scale, RATIO, height, width).numpy()
    blank = torch.empty(1, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        expected = np.array([transforms.RandomResizedCrop.get_params(blank, scale, RATIO) for _ in range(2000)])
    for coordinate in range(4):
        assert stats.ks_2samp(found[:, coordinate], expected[:, coordinate]).pvalue > 0.001
    assert stats.ks_2samp(found[:, 2] / found[:, 3], expected[:, 2] / expected[:, 3]).pvalue > 0.001
    assert (found[:, 0] + found[:, 2]).max() <= height and (found[:, 1] + found[:, 3]).max() <= width and found.min() >= 0


def save_turned(image, path):
    exif = image.getexif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.png", lambda image, path: image.save(path)),
        ("a.jpg", lambda image, path: image.save(path, quality=95)),
        ("grey.jpg", lambda image, path: image.convert("L").save(path)),
        ("turned.jpg", save_turned),
        ("cmyk.jpg", lambda image, path: image.convert("CMYK").save(path, quality=95)),
    ],
)
def test_crops_are_torchvisions_of_the_whole_image(tmp_path, name, save):
    save(Image.fromarray(picture(75, 101)), tmp_path / name)
    asked = []
    boxes = torch.tensor([[3, 7, 60, 71], [0, 0, 75, 101], [70, 90, 5, 11]])
    found = stream.read_crops(tmp_path / name, lambda height, width: asked.append((height, width)) or boxes, 32)
    assert asked == [(75, 101)] and found.dtype == torch.uint8
    with Image.open(tmp_path / name) as opened:
        whole = image_files.upright_rgb(opened)
    for crop, box in zip(found, boxes.tolist(), strict=True):
        expected = np.asarray(tv.resized_crop(whole, *box, [32, 32], antialias=True))
        np.testing.assert_array_equal(crop.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("turned", [False, True])
def test_large_jpegs_are_decoded_no_larger_than_needed(tmp_path, monkeypatch, turned):
    image, path = Image.fromarray(picture(603, 805)), tmp_path / "large.jpg"
    save_turned(image, path) if turned else image.save(path, quality=95)
    sizes, decode = [], image_files.upright_rgb
    monkeypatch.setattr(image_files, "upright_rgb", lambda opened: sizes.append(opened.size) or decode(opened))
    for least, divisor in [(64, 2), (130, 4), (300, 8)]:
        box = torch.tensor([[603 - least, 11, least, 700], [0, 0, 603, 805]])
        found = stream.read_crops(path, lambda *_, box=box: box, 32)
        assert max(sizes.pop()) == -(-805 // divisor)
        for crop, one in zip(found, box.tolist(), strict=True):
            expected = np.asarray(tv.resized_crop(image, *one, [32, 32], antialias=True)).astype(int)
            assert np.abs(crop.permute(1, 2, 0).numpy() - expected).mean() < 1.5


# --- the same views and the same run as from memory ----------------------------------------------------------------------


@pytest.mark.parametrize("colours", [dict(jitter=0.0, greyscale=0.0, blur=0.0), {}])
def test_views_from_files_are_those_from_memory(squares, colours):
    make = TrainViews(SIDE, seed=7, **colours)
    crops = stream.Crops(squares, make, 2)
    state = torch.get_rng_state()
    x, labels, index = next(stream.batches(crops, N, 3, 1, 2, CPU, workers=1))
    assert torch.equal(torch.get_rng_state(), state), "the global random state is nobody's"
    assert sorted(index.tolist()) == list(range(N)) and torch.equal(labels, squares.labels[index])
    memory = squares.resized(SIDE).images[index] / 255
    for i, number in enumerate((2, 3)):  # the second epoch's
        gap = (make.after_crop(x[:, i], index, number) - make(memory, index, number)).abs()
        assert gap.mean() < 1 / 255 and (gap.amax() < 2 / 255 or colours == {})
        other = (make.after_crop(x[:, i], index, number) - make(memory, index, 5)).abs()
        assert other.mean() > 10 * gap.mean()


@pytest.fixture
def run(squares, tmp_path):
    """Train with STREAMED, changed so; returns the folder."""

    def train(name, **changed):
        assert pretrain.train(Settings(**(STREAMED | dict(output=str(tmp_path / name)) | changed))) == 0
        return tmp_path / name

    return train


def test_a_streamed_run_is_the_one_from_memory_and_goes_on_where_it_stopped(run):
    curves = [[line["loss"] for line in log_of(run(n, stream=n == "files"))] for n in ("memory", "files")]
    assert len(curves[0]) == 6 and curves[0] == pytest.approx(curves[1], abs=0.05)  # crops of 8 bits
    assert np.ptp(curves[0]) > 0.2, "there is a curve to compare"
    for steps, workers in ((1, 1), (3, 2)):  # within the first epoch, then within the second
        run("parts", stream=True, max_steps=steps, workers=workers)
    whole, parts = last_checkpoint(run("files", stream=True)), last_checkpoint(run("parts", stream=True))
    assert whole["step"] == parts["step"] == 6
    a, b = tensors(whole), tensors(parts)
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []


def test_supervised_and_evaluated_from_files(run):
    folder = run(
        "run", stream=True, objective="supervised", classes=[2, 0], batch_size=22, knn_every=1, knn_data="squares", knn_images=4
    )
    assert [line["step"] for line in log_of(folder) if "knn_accuracy" in line] == [2, 4, 6]  # 44 images of two classes
    assert last_checkpoint(folder)["model"]["head.bias"].shape == (2,)


def test_workers_outlive_a_signal_to_the_whole_group(squares):
    before = multiprocessing.active_children()
    made = stream.batches(stream.Crops(squares, TrainViews(SIDE), 2), 8, 0, 0, 12, CPU, workers=1)
    next(made)
    (worker,) = [child for child in multiprocessing.active_children() if child not in before]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert len(list(made)) == 11
    worker.join(20)
    assert worker.exitcode == 0


def test_only_sets_of_files_can_be_streamed(tmp_path):
    with pytest.raises(ValueError, match="stream: found digits-train, which is no set of image files, expected one of"):
        pretrain.train(Settings(**(TINY | dict(output=str(tmp_path), stream=True))))


def test_what_does_not_fit_in_memory_is_streamed_unasked():
    assert training_settings.is_streamed(Settings(data="imagenet-train")) and training_settings.is_streamed(
        Settings(data="x", stream=True)
    )
    assert not training_settings.is_streamed(Settings(data="imagenet-val")) and not training_settings.is_streamed(Settings())


# --- unreadable files ----------------------------------------------------------------------------------------------------


def damage(squares, monkeypatch, tmp_path):
    """A copy of the set in which one file is cut off and one is no image."""
    for i in range(N):
        path = tmp_path / "damaged" / os.fsdecode(squares.files[i])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(squares.path(i).read_bytes())
    files = [tmp_path / "damaged" / path for path in image_files.images_below(tmp_path / "damaged")]
    files[3].write_bytes(files[3].read_bytes()[:-60])
    files[20].write_text("no image")
    monkeypatch.setattr(data, "load", lambda name, **_: replace(squares, folder=tmp_path / "damaged"))
    return [str(files[i].relative_to(tmp_path / "damaged")) for i in (3, 20)]


def test_unreadable_images_stop_the_run_by_name_unless_so_many_are_allowed(squares, run, monkeypatch, tmp_path, capsys):
    bad = damage(squares, monkeypatch, tmp_path)
    for allowed in (0, 1):
        with pytest.raises(ValueError, match=f"found 2 unreadable images, .* allow_unreadable = {allowed}") as refusal:
            run("run", stream=True, allow_unreadable=allowed)
        assert all(name in str(refusal.value) for name in bad)
        assert not list((tmp_path / "run").glob("*.pt")) and not (tmp_path / "run" / stream.RECORD).exists()
    capsys.readouterr()
    folder = run("run", stream=True, allow_unreadable=2, batch_size=33)
    assert last_checkpoint(folder)["step"] == 3  # 64 images are one batch of 33
    said = capsys.readouterr().out
    assert all(f"LEFT OUT {name}: " in said for name in bad)
    assert sorted(json.loads((folder / stream.RECORD).read_text())["left_out"]) == sorted(bad)
    left = stream.readable(data.load("damaged"), folder, allow=2)
    assert len(left) == 64 and not {os.fsencode(name) for name in bad} & set(left.files)
    assert "decoding" not in capsys.readouterr().out, "a run that goes on need not look again"
    with pytest.raises(ValueError, match=r"allow so many; remove .*files\.json to look at the files again"):
        stream.readable(data.load("damaged"), folder, allow=1)
    with pytest.raises(ValueError, match=r"found other files below .* than this run began with"):
        stream.readable(data.load("damaged")[1:], folder, allow=2)


def test_fewer_readable_images_than_a_batch_are_refused(squares, run, monkeypatch, tmp_path):
    """66 files are a batch, the 64 that can be read are none: it has to be said before an epoch of no steps is counted."""
    damage(squares, monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="batch_size: found 66 with 64 readable images, expected at most one batch an epoch"):
        run("run", stream=True, allow_unreadable=2, batch_size=N)
    with pytest.raises(ValueError, match="batch_size: found 5 with 4 images, expected at most one batch an epoch"):
        next(stream.shares(4, 5, seed=0, first=0, last=1))


def test_a_file_that_breaks_later_is_named(squares, monkeypatch, tmp_path):
    names = damage(squares, monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=f"({'|'.join(names)}): found no readable image"):
        list(stream.batches(stream.Crops(data.load("damaged"), TrainViews(SIDE), 1), N, 0, 0, 1, CPU, workers=1))
