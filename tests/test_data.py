"""Named image sets, folders among them: the right images, in order; and no set that is missing or damaged."""

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from cadetlib import data
from cadetlib.data import ImageSet

PICTURE = np.random.default_rng(0).integers(256, size=(12, 12, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data root."""
    monkeypatch.setenv("CADET_DATA", str(tmp_path))
    return tmp_path


# --- digits ---------------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    found, expected = data.load("digits"), load_digits()
    assert found.images.dtype == torch.uint8 and found.labels.dtype == torch.int64
    np.testing.assert_allclose(found.images[:, 1] / 255, expected.images / 16, atol=0.5 / 255 + 1e-6)
    assert (found.images == found.images[:, :1]).all()
    assert found.labels.tolist() == expected.target.tolist()


def test_the_parts_of_the_digits_are_disjoint_complete_and_in_order():
    number = {image.numpy().tobytes(): i for i, image in enumerate(data.load("digits").images)}  # no digit comes twice
    labels = data.load("digits").labels
    parts = {name: data.load(f"digits-{name}") for name in ("train", "test", "first-writers", "last-writers")}
    numbers = {name: [number[image.numpy().tobytes()] for image in part.images] for name, part in parts.items()}
    for name, part in parts.items():
        assert numbers[name] == sorted(numbers[name])
        assert torch.equal(part.labels, labels[numbers[name]])
    assert len(numbers["train"]) == 797 and len(numbers["test"]) == 1000
    assert sorted(numbers["train"] + numbers["test"]) == list(range(1797))
    assert numbers["first-writers"] + numbers["last-writers"] == numbers["test"]
    assert torch.bincount(parts["train"].labels).min() > 60  # every digit is trained on


# --- sets and splits ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(n=st.integers(0, 60), shares=st.lists(st.floats(0, 1), max_size=4), seed=st.integers(0, 2**40))
def test_a_split_is_disjoint_and_the_same_every_time(n, shares, seed):
    sizes = {f"part {i}": int(share * n / len(shares)) for i, share in enumerate(shares)}
    parts = data.split(n, sizes, seed)
    assert {name: len(part) for name, part in parts.items()} == sizes
    together = torch.cat([torch.empty(0, dtype=torch.int64), *parts.values()]).tolist()
    assert len(set(together)) == len(together) and set(together) <= set(range(n))
    torch.random.manual_seed(seed % 7)
    again = data.split(n, sizes, seed)
    assert all(torch.equal(parts[name], again[name]) for name in sizes)


def test_a_split_is_random_and_seeded():
    found = torch.stack([data.split(6, {"a": 2, "b": 1}, seed)["b"][0] for seed in range(600)])
    assert torch.bincount(found, minlength=6).min() > 60  # of 100 expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"a": 6, "b": 5}, "found 10 images for .* expected at least 11"), ({"a": -1}, "size of a: found -1"), ({"a": 1.5}, "1.5")],
)
def test_impossible_splits_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        data.split(10, sizes, seed=0)


def test_a_set_is_chosen_from_with_its_labels():
    images = torch.arange(5 * 3 * 4 * 4).view(5, 3, 4, 4).to(torch.uint8)
    numbers = ImageSet("numbers", images, torch.tensor([2, 0, 1, 2, 0]))
    for chosen, expected in [
        (numbers[torch.tensor([3, 1])], [3, 1]),
        (numbers[1:3], [1, 2]),
        (numbers[numbers.labels == 2], [0, 3]),
        (numbers.of_classes([0, 1]), [1, 2, 4]),
        (numbers.of_classes([]), range(5)),
    ]:
        assert torch.equal(chosen.images, images[list(expected)]) and chosen.name == "numbers"
        assert torch.equal(chosen.labels, numbers.labels[list(expected)])
    unlabelled = ImageSet("unlabelled", images)
    assert unlabelled[:2].labels is None and len(unlabelled[:2]) == 2
    with pytest.raises(ValueError, match=r"unlabelled: found no labels, expected some to choose classes \[1\]"):
        unlabelled.of_classes([1])
    with pytest.raises(ValueError, match="wrong: found 4 labels for 5 images"):
        ImageSet("wrong", images, torch.zeros(4))


def test_resized_sets_stay_eight_bit():
    flat = torch.tensor([0, 7, 128, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 10, 14)
    resized = ImageSet("flat", flat, torch.arange(4)).resized(6)
    assert torch.equal(resized.images, flat[..., :6, :6]) and resized.labels.tolist() == [0, 1, 2, 3]
    assert torch.equal(resized.resized(6).images, resized.images)


# --- missing and damaged --------------------------------------------------------------------------------------------------

NEED_FILES = [name for name in data.SOURCES if not name.startswith("digits")]


@pytest.mark.parametrize("name", NEED_FILES)
def test_a_missing_set_is_said_with_its_name_the_root_and_the_step(root, name):
    with pytest.raises(FileNotFoundError) as refusal:
        data.load(name)
    message = str(refusal.value)
    assert message.startswith(f"{name}: ") and str(root) in message and "CADET_DATA" in message
    step = message.rpartition("; to get it, ")[2]
    if data.SOURCES[name].downloads:
        assert step == f"run `python -m cadetlib.data download {name}`"
    else:
        assert "put" in step
    assert not list(root.iterdir())


def test_what_is_missing_is_left_out_and_listed(root):
    found, reasons = data.available(["mnist-test", "digits-test", "flowers64"])
    assert [images.name for images in found] == ["digits-test"] and list(reasons) == ["mnist-test", "flowers64"]
    (line,) = data.missing(["digits", "flowers64"])
    assert str(root) in line, "a person is told where it was looked for"
    assert line.replace(str(root), "<data root>") == reasons["flowers64"], "results name no machine's folders"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"found no set named 'cifar11', expected one of \['digits'"):
        data.load("cifar11")


def write_archive(path, **arrays):
    path.parent.mkdir()
    np.savez(path, **arrays)


def truncated_archive(root):
    path = root / "svhn" / "svhn_train_first1083.npz"
    write_archive(path, images=np.zeros((3, 8, 8, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-40])
    return "svhn-first1083", "not a zip file"


def other_archive(root):
    write_archive(root / "svhn" / "svhn_train_first1083.npz", pictures=np.zeros((3, 8, 8, 3), np.uint8))
    return "svhn-first1083", "images"


def pickled_archive(root):
    write_archive(root / "svhn" / "svhn_train_first1083.npz", images=np.array([{}]))
    return "svhn-first1083", "allow_pickle"


def cifar10_1(root, images, labels):
    (root / "cifar10.1").mkdir()
    np.save(root / "cifar10.1" / "cifar10.1_v6_data.npy", images)
    np.save(root / "cifar10.1" / "cifar10.1_v6_labels.npy", labels)


def other_cifar10_1(root):
    cifar10_1(root, np.zeros((2000, 32, 32, 3), np.uint8), np.zeros(2000, np.int64))
    return "cifar10.1-v6", r"cifar10.1_v6_data.npy: found sha256 [0-9a-f]+…, expected 2997188e5816f5bd"


def mnist(root, images, labels=b"12345678\x01\x02"):
    (root / "mnist").mkdir()
    (root / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(images)
    (root / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return "mnist-test"


def other_mnist(root):
    return mnist(root, gzip.compress(bytes(16 + 784))), "found md5"


def truncated_mnist(root):
    return mnist(root, gzip.compress(os.urandom(16 + 784))[:-50]), "ended before"


@pytest.mark.parametrize(
    "damage", [truncated_archive, other_archive, pickled_archive, other_cifar10_1, other_mnist, truncated_mnist]
)
def test_damaged_and_foreign_files_are_refused(root, damage):
    name, message = damage(root)
    with pytest.raises(ValueError, match=f"^{name}: found no readable files .*{message}.*; to get them, ") as refusal:
        data.load(name)
    assert str(root) in str(refusal.value)


def test_small_sets_are_read_as_they_are_written(root, monkeypatch):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(2000, 32, 32, 3), dtype=np.uint8), rng.integers(10, size=2000)
    cifar10_1(root, images, labels)
    files = sorted((root / "cifar10.1").iterdir())
    monkeypatch.setattr(data, "CIFAR10_1_SHA256", {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    found = data.load("cifar10.1-v6")
    assert torch.equal(found.images, torch.from_numpy(images).permute(0, 3, 1, 2)) and found.labels.tolist() == labels.tolist()

    write_archive(root / "cifar100" / "cifar100_test_first2000.npz", images=images[:5], fine_labels=labels[:5].astype(np.uint8))
    found = data.load("cifar100-first2000")
    assert torch.equal(found.images, torch.from_numpy(images[:5]).permute(0, 3, 1, 2))
    assert found.labels.tolist() == labels[:5].tolist()

    numbers = rng.integers(256, size=(3, 28, 28), dtype=np.uint8)
    raw = bytes(16) + numbers.tobytes()
    digits = bytes(8) + bytes([7, 2, 1])
    digests = [hashlib.md5(content).hexdigest() for content in (raw, digits)]
    monkeypatch.setattr(data, "MNIST_MD5", dict(zip(data.MNIST_MD5, digests, strict=True)))
    mnist(root, gzip.compress(raw), digits)
    found = data.load("mnist-test")
    assert found.labels.tolist() == [7, 2, 1] and found.images.shape == (3, 3, 32, 32)
    assert torch.equal(found.images[:, 1, 2:30, 2:30], torch.from_numpy(numbers)) and int(found.images[..., :2].sum()) == 0


def test_cifar10_1_is_brought_when_asked_for_and_compared(root, monkeypatch):
    """The published files cannot be had here: torch's download is asked for the right ones, with the right digests."""
    asked = {}

    def bring(url, path, hash_prefix):
        asked[url.rpartition("/")[2]] = hash_prefix
        np.save(path, np.zeros(3))

    monkeypatch.setattr(data.torch.hub, "download_url_to_file", bring)
    with pytest.raises(ValueError, match="found sha256"):
        data.load("cifar10.1-v4", download=True)
    assert asked == {"cifar10.1_v4_data.npy": data.CIFAR10_1_SHA256["cifar10.1_v4_data.npy"]}
    asked.clear()
    with pytest.raises(ValueError, match="found sha256"):  # what is there and is another is brought again
        data.load("cifar10.1-v4", download=True)
    assert list(asked) == ["cifar10.1_v4_data.npy"]
    with pytest.raises(FileNotFoundError, match=r"data download cifar10\.1-v6"):
        data.load("cifar10.1-v6")


def test_mnist_is_compared_and_an_interrupted_download_begins_again(root, monkeypatch):
    rng = np.random.default_rng(0)
    content = {"t10k-images-idx3-ubyte.gz": bytes(16) + rng.bytes(2 * 28 * 28), "t10k-labels-idx1-ubyte.gz": bytes(8) + b"\7\2"}
    monkeypatch.setattr(data, "MNIST_MD5", {file: hashlib.md5(raw).hexdigest() for file, raw in content.items()})
    asked = []

    def bring(url, folder, md5):
        asked.append(url.rpartition("/")[2])
        folder.mkdir(exist_ok=True)
        (folder / asked[-1]).write_bytes(gzip.compress(content[asked[-1]]))

    monkeypatch.setattr("torchvision.datasets.utils.download_url", bring)
    first, second = content
    (root / "mnist").mkdir()
    (root / "mnist" / first).write_bytes(gzip.compress(content[first])[:-9])  # cut off
    with pytest.raises(ValueError, match=r"mnist-test: found no readable files .*data download mnist-test"):
        data.load("mnist-test")
    assert data.load("mnist-test", download=True).labels.tolist() == [7, 2] and asked == [first, second]
    data.load("mnist-test", download=True)
    assert asked == [first, second]
    (root / "mnist" / second).write_bytes(gzip.compress(content[second][:-1] + b"\3"))
    with pytest.raises(ValueError, match=f"{second}: found md5 .* unpacked, expected"):
        data.load("mnist-test")


# --- folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_labelled_by_sub_folder(tmp_path):
    for i, name in enumerate(["b/1.png", "b/0.png", "a/9.PNG", "c/d/5.png"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 14), (50 * i, 0, 0)).save(path)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    found = data.folder_images(tmp_path, 8)
    assert found.images.shape == (4, 3, 8, 8) and found.name == tmp_path.name
    assert found.images[:, 0, 0, 0].tolist() == [100, 50, 0, 150] and found.labels.tolist() == [0, 1, 1, 2]
    assert data.folder_images(tmp_path / "b", 8, name="bees").labels is None


def test_a_name_that_is_no_unicode_can_be_left_out_aloud(tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9.png")
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(b"cut")
    said = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")  # as a terminal is
    monkeypatch.setattr(sys, "stdout", said)
    assert len(data.folder_images(tmp_path, 12, allow_unreadable=1)) == 1
    said.flush()
    assert b"caf?.png: found no readable image" in said.buffer.getvalue()


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"found no image files below .* expected files ending in .png"):
        data.folder_images(tmp_path, 8)


# --- torchvision's sets ---------------------------------------------------------------------------------------------------


def test_svhn_comes_with_rows_and_columns_where_they_were(monkeypatch):
    """torchvision keeps SVHN as (N, 3, H, W) with `labels`, its other sets as (N, H, W, 3) with `targets`."""

    class SVHN:
        def __init__(self, folder, split, download):
            assert (split, download) == ("test", False)
            self.data, self.labels = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4), np.array([3, 9])

    monkeypatch.setattr("torchvision.datasets.SVHN", SVHN)
    found = data.load("svhn-test")
    assert torch.equal(found.images, torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)) and found.labels.tolist() == [3, 9]


def test_the_first_images_of_a_set_are_cut_from_the_whole_where_they_are_not_there_alone(monkeypatch, root):
    """So that whoever downloads the whole sets gets the very images of the kept results."""

    class SVHN:
        def __init__(self, folder, split, download):
            assert (split, download) == ("train", True)
            self.data, self.labels = np.zeros((1100, 3, 4, 4), np.uint8), np.arange(1100)
            self.data[:, 0, 0, 0] = np.arange(1100) % 256

    class CIFAR100:
        def __init__(self, folder, train, download):
            assert (train, download) == (False, True)
            self.data, self.targets = np.zeros((2100, 4, 4, 3), np.uint8), list(range(2100))

    monkeypatch.setattr("torchvision.datasets.SVHN", SVHN)
    monkeypatch.setattr("torchvision.datasets.CIFAR100", CIFAR100)
    whole = data.load("svhn-first1083", download=True)
    assert whole.images[:, 0, 0, 0].tolist() == [i % 256 for i in range(1083)] and whole.labels is None
    assert data.load("cifar100-first2000", download=True).labels.tolist() == list(range(2000))
    write_archive(root / "svhn" / "svhn_train_first1083.npz", images=np.moveaxis(whole.images.numpy(), 1, -1))
    alone = data.load("svhn-first1083")
    assert torch.equal(alone.images, whole.images) and alone.labels is None and alone.name == whole.name


def test_only_download_downloads_and_only_what_it_can(monkeypatch, root):
    class CIFAR10:
        def __init__(self, folder, train, download):
            asked.append((folder, train, download))
            raise RuntimeError("offline")

    asked = []
    monkeypatch.setattr("torchvision.datasets.CIFAR10", CIFAR10)
    assert data.main(["check", "cifar10-train"]) == data.main(["download", "cifar10-test", "flowers64", "digits"]) == 1
    assert asked == [(root, True, False), (root, False, True)]


@pytest.fixture(scope="module")
def cifar():
    folder = data.root() / "cifar-10-batches-py"
    if not folder.is_dir():
        pytest.skip(f"no CIFAR-10 below the data root {data.root()}: set CADET_DATA, or download cifar10-test")
    return folder


@pytest.mark.data
def test_cifar10_is_whole_and_balanced(cifar):
    test = data.load("cifar10-test")  # compares md5, so what is unpickled next is the official file
    with open(cifar / "test_batch", "rb") as file:
        batch = pickle.load(file, encoding="bytes")
    assert torch.equal(test.images, torch.from_numpy(batch[b"data"]).view(10_000, 3, 32, 32))
    assert torch.bincount(test.labels).tolist() == [1000] * 10 and test.labels.tolist() == batch[b"labels"]
    train = data.load("cifar10-train")
    assert train.images.shape == (50_000, 3, 32, 32) and torch.bincount(train.labels).tolist() == [5000] * 10


@pytest.mark.data
def test_a_flipped_byte_in_cifar10_is_refused(cifar, root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for path in cifar.iterdir():
        (folder / path.name).symlink_to(path)
    content = bytearray((cifar / "test_batch").read_bytes())
    content[20_000_000] ^= 1
    (folder / "test_batch").unlink()
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar10-test: found no readable files .*another md5.*; to get them, run"):
        data.load("cifar10-test")
    with pytest.raises(ValueError, match="another md5"):  # damaged is not missing: no run goes on without it
        data.available(["cifar10-test"])


# --- the command line -----------------------------------------------------------------------------------------------------


def test_check_says_what_is_there_and_exits_0():
    command = [sys.executable, "-m", "cadetlib.data", "check", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(data.__file__).parents[1], timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["digits", "1797", "images"]), done.stderr


def test_any_folder_is_a_set_by_its_path(root, capsys):
    for path in ("pets/cat/1.png", "pets/dog/1.png", "pets/dog/2.png"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PICTURE).save(root / path)
    relative, absolute = data.load("folder:pets"), data.load(f"folder:{root / 'pets' / 'dog'}")
    assert relative.name == "folder:pets" and relative.labels.tolist() == [0, 1, 1] and len(absolute) == 2
    np.testing.assert_array_equal(relative.resized(12).images[2].permute(1, 2, 0), PICTURE)
    with pytest.raises(FileNotFoundError, match=r"found no folder .*wolves"):
        data.load("folder:wolves")
    with pytest.raises(ValueError, match=r"no set named '/pets', expected one of .* or folder:PATH"):
        data.load("/pets")
    assert data.main(["check", "folder:pets"]) == 0 and "3 images" in capsys.readouterr().out


def test_a_profile_can_be_downloaded(root, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(data, "load", lambda name, download=False: asked.append((name, download)) or [])
    assert data.main(["download", "cifar10"]) == 0 and ("cifar10-train", True) in asked
    asked.clear()
    assert data.main(["check", "cifar10"]) == 0 and ("cifar10-train", False) in asked


def test_check_says_what_is_missing_and_exits_1(root, capsys):
    assert data.main(["check", "digits", "cifar10-test", "cifar11"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["digits", "cifar10-test", "cifar11"]
    assert "MISSING: cifar10-test: " in lines[1] and "run `python -m cadetlib.data download cifar10-test`" in lines[1]
    assert "expected one of" in lines[2]
    assert data.main([]) == data.main(["fetch"]) == 2
    assert "usage: " in capsys.readouterr().err
