"""Sets of image files: not read before they are asked for, whole or refused, and listed by what a profile needs."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cadetlib import data, experiments, image_files, imagenet, profiles

FILES = ["n02/b.JPEG", "n02/a.JPEG", "n01/x/d.png", "n01/c.jpg", "n10/e.webp"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data root with a small set of files of different sizes."""
    monkeypatch.setenv("CADET_DATA", str(tmp_path))
    for i, name in enumerate(FILES):
        path = tmp_path / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(256, size=(9 + i, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "small" / "n01" / "notes.txt").write_text("no image")
    return tmp_path


def name_it(monkeypatch, n_images=5, n_classes=3):
    described = imagenet.Folder("small", n_images, n_classes, "put it there", "none published")
    monkeypatch.setitem(imagenet.SETS, "small", described)
    monkeypatch.setitem(data.SOURCES, "small", data._Source(data._files(described), described.get))


def test_files_are_listed_as_image_folder_does_and_read_only_when_asked(root, monkeypatch):
    name_it(monkeypatch)
    opened, read = [], image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda path, size: opened.append(path) or read(path, size))
    found = data.load("small")
    assert [os.fsdecode(file) for file in found.files] == ["n01/c.jpg", "n01/x/d.png", "n02/a.JPEG", "n02/b.JPEG", "n10/e.webp"]
    assert found.labels.tolist() == [0, 0, 1, 1, 2] and len(found) == 5 and found.name == "small"
    assert [found.path(i) for i in range(5)] == [root / "small" / path for path in image_files.images_below(root / "small")]
    chosen = experiments.some_of(found.of_classes([0, 1]), 3, seed=1)
    assert not opened
    resized = chosen.resized(8)
    assert sorted(opened) == sorted(chosen.path(i) for i in range(3)) and len(opened) == 3
    assert type(resized) is data.ImageSet and resized.images.shape == (3, 3, 8, 8)
    assert torch.equal(resized.images, torch.stack([read(chosen.path(i), 8) for i in range(3)]))
    assert torch.equal(resized.labels, chosen.labels)
    for index in (slice(1, 3), found.labels == 1, torch.tensor([4, 0])):
        assert found[index].files.tolist() == found.files[np.asarray(index) if torch.is_tensor(index) else index].tolist()
    with pytest.raises(ValueError, match="corruptions are made in memory"):
        data.load("small:jpeg-1")


def test_all_unreadable_files_are_named(root, monkeypatch):
    name_it(monkeypatch)
    for name in ("n02/a.JPEG", "n10/e.webp"):
        (root / "small" / name).write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(ValueError, match="small: found 2 unreadable images") as refusal:
        data.load("small").resized(8)
    assert "a.JPEG: found no readable" in str(refusal.value) and "e.webp: found no readable" in str(refusal.value)


def test_blocks_are_the_whole_read_a_few_files_at_a_time(root, monkeypatch, capsys):
    name_it(monkeypatch)
    whole = data.load("small").resized(8)
    opened = []
    monkeypatch.setattr(
        image_files, "read_image", lambda path, size, read=image_files.read_image: opened.append(path) or read(path, size)
    )
    for i, block in enumerate(data.load("small").blocks(8, n=2)):
        assert torch.equal(block.images, whole.images[2 * i : 2 * i + 2]) and len(opened) == min(2 * i + 2, 5)
    for name in ("n02/a.JPEG", "n10/e.webp"):
        (root / "small" / name).write_bytes(b"\xff\xd8\xff no image")
    flat = torch.nn.Flatten()
    with pytest.raises(ValueError, match="found 2 unreadable images, expected at most allow_unreadable = 1") as refusal:
        list(data.load("small", allow_unreadable=1).blocks(8, n=2))
    assert "a.JPEG" in str(refusal.value) and "e.webp" in str(refusal.value)  # of different blocks
    allowed = data.load("small", allow_unreadable=2)
    monkeypatch.setattr(data.FolderSet, "blocks", lambda self, size, n=1, blocks=data.FolderSet.blocks: blocks(self, size, 1))
    z, labels = experiments.features(flat, allowed, 8)
    assert torch.equal(z, whole.images[[0, 1, 3]].flatten(1) / 255) and labels.tolist() == [0, 0, 1]
    assert "LEFT OUT 2" in capsys.readouterr().out


def test_so_many_unreadable_files_are_left_out_as_the_user_allows(root, monkeypatch, capsys):
    name_it(monkeypatch)
    whole = data.load("small").resized(8)
    for name in ("n02/a.JPEG", "n10/e.webp"):
        (root / "small" / name).write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(ValueError, match="found 2 unreadable images, expected at most allow_unreadable = 1"):
        data.load("small", allow_unreadable=1).resized(8)
    (left,), missing = data.available(["small"], allow_unreadable=2)
    left = left.of_classes([0, 1]).resized(8)
    assert missing == {} and left.labels.tolist() == [0, 0, 1]
    assert torch.equal(left.images, whole.images[[0, 1, 3]])
    said = capsys.readouterr().out
    assert "small: LEFT OUT 1 unreadable images:" in said and "a.JPEG: found no readable image" in said and "e.webp" not in said
    assert len(data.folder_images(root / "small", 8, allow_unreadable=2)) == 3
    with pytest.raises(ValueError, match="allow_unreadable"):
        data.load("small", allow_unreadable=-1)


@pytest.mark.parametrize(("n_images", "n_classes"), [(6, 3), (4, 3), (5, 2), (5, 0)])
def test_a_set_that_is_not_whole_does_not_go_by_its_name(root, monkeypatch, n_images, n_classes):
    name_it(monkeypatch, n_images, n_classes)
    with pytest.raises(ValueError, match=rf"small: .*found 5 images in 3 sub-folders of .*, expected {n_images} in "):
        data.load("small")


def test_a_flat_folder_has_no_labels_and_an_empty_one_is_missing(root, monkeypatch):
    flat = data.folder_set(root / "small" / "n02")
    assert flat.labels is None and len(flat) == 2 and flat[:1].labels is None
    (root / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="found no image files below"):
        data.folder_set(root / "none")


# --- what a profile needs ------------------------------------------------------------------------------------------------


@pytest.fixture
def profile(root, monkeypatch):
    """A checkout whose profile `tiny` names two sets."""
    monkeypatch.setenv("CADET_ROOT", str(root))
    folder = root / "params" / "tiny"
    folder.mkdir(parents=True)
    (folder / "01_pretraining.yaml").write_text("data: small\nknn_data: digits-test\n")
    (folder / "04_cadet_tables.yaml").write_text("in_distribution: digits-test\nunseen: [small, imagenet-o]\n")
    return "tiny"


def test_check_tells_of_a_profile_what_is_there_and_what_to_do(profile, root, monkeypatch, capsys):
    name_it(monkeypatch)
    monkeypatch.setattr(image_files, "read_image", None)  # counted, not read
    assert data.main(["check", profile]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[2:6]] == [
        ["set", "state", "images", "expected", "classes", "notebooks"],
        ["small", "there", "5", "5", "3", "01", "04"],
        ["digits-test", "there", "1000", "01", "04"],
        ["imagenet-o", "MISSING", "-", "2000", "200", "04"],
    ]
    told = "\n".join(lines[6:])
    assert "imagenet-o: found no " in told and "hendrycks/natural-adv-examples" in told and "checksum: none published" in told
    name_it(monkeypatch, n_images=6)
    assert data.main(["check", profile]) == 1
    assert "NOT RIGHT" in capsys.readouterr().out
    (root / "params" / "tiny" / "04_cadet_tables.yaml").write_text("in_distribution: digits-test\n")
    name_it(monkeypatch)
    assert data.main(["check", profile]) == 0


def test_checksums_are_those_torchvision_knows():
    from torchvision.datasets.imagenet import ARCHIVE_META

    for name, part in (("imagenet-train", "train"), ("imagenet-val", "val")):
        archive, md5 = ARCHIVE_META[part]
        known = imagenet.SETS[name]
        assert md5 in known.checksum and ARCHIVE_META["devkit"][1] in known.checksum and archive in known.get


# --- published lists -----------------------------------------------------------------------------------------------------


def test_published_lists_are_the_images_that_notebook_04_draws(root, monkeypatch):
    monkeypatch.setitem(imagenet.SETS, "many", imagenet.Folder("many", 40, 4, "put", "none published"))
    monkeypatch.setitem(data.SOURCES, "many", data._Source(data._files(imagenet.SETS["many"]), "put"))
    for i in range(40):
        path = root / "many" / str(i % 4) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(path)
    given = dict(in_distribution="many", classes=[], n_held_out=30, seed=5, n_splits=2, n_reference=4, n_calibration=9)
    lines = [line.split(",") for line in imagenet.one_table(imagenet.published_lists(given)).splitlines()]
    assert lines[0] == ["file", "split-0", "split-1"] and len(lines) == 31
    held_out = experiments.some_of(data.load("many"), 30, 5).resized(8).images[:, 0, 0, 0]  # as the notebook does
    for i, division in enumerate(experiments.splits(30, 2, 4, 9, seed=5)):
        for part, index in (("x_val_1", division.reference), ("x_val_2", division.calibration), ("test", division.test)):
            names = [name for name, *parts in lines[1:] if parts[i] == part]
            assert sorted(int(name.removesuffix(".png")) for name in names) == sorted(held_out[index].tolist())
    with pytest.raises(ValueError, match="in_distribution: found digits, expected a set of image files"):
        imagenet.published_lists(given | dict(in_distribution="digits"))


VAL = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 50_001)]  # of ImageNet's validation set, whoever unpacked it


def test_the_lists_of_the_profile_are_published_and_hold_wherever_the_set_is_unpacked(monkeypatch, tmp_path):
    (notebook,) = (n for n in profiles.notebooks_of("imagenet") if n.number == "04")
    published = (notebook.parameter_file.parent / "lists.csv").read_text()
    assert published == imagenet.one_table(imagenet.drawn(VAL, notebook.parameters))

    placeholder, rng = torch.empty(50_000, 3, 0, 0, dtype=torch.uint8), np.random.default_rng(0)
    paths = sorted(f"n{wnid:08d}/{name}" for wnid, name in zip(rng.permutation(50_000) % 1000, VAL, strict=True))
    labels = torch.tensor([int(path[1:9]) for path in paths])
    unpacked = data.FolderSet("imagenet-val", placeholder, labels, Path("val"), np.array([os.fsencode(path) for path in paths]))
    monkeypatch.setattr(data, "folder_set", lambda folder, name: unpacked)
    monkeypatch.setattr(data, "_existing", lambda path: path)
    found = data.load("imagenet-val")
    assert [os.path.basename(os.fsdecode(file)) for file in found.files] == VAL
    assert all(int(os.fsdecode(found.files[i])[1:9]) == int(found.labels[i]) for i in range(0, 50_000, 997))
    (first, *_) = imagenet.published_lists(notebook.parameters)
    assert imagenet.main([str(tmp_path / "lists.csv")]) == 0 and (tmp_path / "lists.csv").read_text() == published
    assert imagenet.main(["--help"]) == 2
    lines = [line.split(",") for line in published.splitlines()[1:]]
    for part in imagenet.PARTS:
        names = {os.path.basename(name) for name in first[part]}
        assert names == {name for name, of_first, *_ in lines if of_first == part}
    assert {part: len(first[part]) for part in imagenet.PARTS} == dict(x_val_1=300, x_val_2=2000, test=5000)


def test_the_parts_of_the_sample_share_no_class_and_have_three_images_of_each(root):
    wnids = [f"n{i:08d}" for i in range(63)]
    for wnid in wnids:
        (root / "imagenet-sample" / wnid).mkdir(parents=True)
        (root / "imagenet-sample" / wnid / "1.JPEG").touch()  # not read
    first, last = data.load("imagenet-sample-first57"), data.load("imagenet-sample-last6")
    assert [str(part.path(i).parent.name) for part in (first, last) for i in range(len(part))] == wnids
    assert first.labels.tolist() == [i for i in range(19) for _ in range(3)] and last.labels.tolist() == [19] * 3 + [20] * 3
    assert (first.name, last.name) == ("imagenet-sample-first57", "imagenet-sample-last6")


@pytest.mark.data
def test_the_sample_is_whole_and_read_as_pictures():
    if not (data.root() / "imagenet-sample").is_dir():
        pytest.skip("no imagenet-sample below the data root: set CADET_DATA")
    sample = data.load("imagenet-sample")
    assert len(sample) == 63 and sample.labels.tolist() == list(range(63))
    assert sample[:2].resized(64).images.float().std() > 20
