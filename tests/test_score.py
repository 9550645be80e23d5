"""The command line on folders as users have them: every file has a line, a stopped table is gone on with, p-values hold."""

import csv
import os
import re
import signal
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

from cadetlib import (
    cadet,
    chunks,
    data,
    encoders,
    gallery,
    image_files,
    processes,
    score,
    score_parts,
    score_table,
    thresholds,
)
from cadetlib.cadet import CADet

FORMATS = {"a.png": {}, "b.jpg": {}, "deep/er/c.webp": {}, "deep/d.tiff": {}, "e.gif": {}, "f.bmp": {}, "g.ppm": {}, "h.jp2": {}}
ODD_NAMES = ['comma, and "quotes".png', "line\nend.PNG", "<b>bold</b>.png", os.fsdecode(b"latin-\xe9.png")]


def picture(seed, side=20):
    generator = np.random.default_rng(seed)
    contrast = generator.uniform(0.1, 1, size=(1, 1, 3))
    return Image.fromarray((255 * (0.5 + contrast * (generator.random((side, side + 4, 3)) - 0.5))).astype(np.uint8))


def fill(folder, names, first_seed):
    for seed, name in enumerate(names, first_seed):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An encoder, a detector made by `fit`, and folders of images in many formats, with damaged files among them."""
    home = tmp_path_factory.mktemp("score")
    torch.manual_seed(0)
    encoders.save_encoder(encoders.ResNet("resnet10", width=4, stem="cifar", image_size=16), home / "encoder.safetensors")
    fill(home / "reference", [f"{i}.png" for i in range(12)], 100)
    fill(home / "calibration", [f"{i}.png" for i in range(39)], 200)
    images = fill(home / "images", [*FORMATS, *ODD_NAMES, *(f"more/{i:02d}.png" for i in range(12))], 300)
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:150])
    (images / "deep" / "empty.jpg").write_bytes(b"")
    (images / "gone.png").symlink_to("nowhere.png")
    (images / "notes.txt").write_text("no image")
    (images / "deep" / "round").symlink_to(images, target_is_directory=True)
    assert run("fit", home, "--n-views", 6, "--batch-size", 24, "--no-flip", "--seed", 5) == 0
    return home


def run(command, home, *more):
    given = {
        "fit": dict(encoder="encoder.safetensors", reference="reference", calibration="calibration", out="detector.safetensors"),
        "score": dict(detector="detector.safetensors", images="images"),
    }[command]
    options = [text for name, file in given.items() for text in (f"--{name}", str(home / file))]
    return score.main([command, *options, *map(str, more), "--batch-size", "24"])


def table(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def detector(home):
    return CADet.load(home / "detector.safetensors", encoders.load_encoder(home / "encoder.safetensors"), 24)


def test_fit_is_algorithm_2_on_the_folders(home, detector):
    expected = CADet(detector.encoder, **detector.settings())
    assert detector.settings() == dict(
        n_views=6, crop_scale=0.75, image_size=16, seed=5, flip=False, dtype="float32", ties="paper"
    )
    expected.fit(*(data.folder_images(home / part, 16).images for part in ("reference", "calibration")))
    torch.testing.assert_close(detector.mu_, expected.mu_, atol=1e-6, rtol=0)
    assert detector.gamma_ == pytest.approx(expected.gamma_, rel=1e-4)
    assert score.recorded_encoder(home / "detector.safetensors") == str(home / "encoder.safetensors")


def test_every_file_has_its_line_with_the_library_s_numbers(home, detector, tmp_path, capfd):
    out = tmp_path / "p.csv"
    assert run("score", home, "--out", out, "--alpha", 0.2) == score_table.SOME_FAILED
    rows = table(out)
    failed = {"broken.png", "deep/empty.jpg", "gone.png"}
    good = {*FORMATS, *ODD_NAMES, *(f"more/{i:02d}.png" for i in range(12))}
    assert set(rows) == failed | good and next(iter(open(out, "rb"))) == b"path,score,m_in,m_out,p_value,flagged,error\n"
    for path in good:
        image = image_files.read_image(home / "images" / path, 16)[None]
        m_in, m_out = (float(v) for v in detector.similarities(image))
        row = {key: float(rows[path][key]) for key in ("score", "m_in", "m_out", "p_value")}
        assert row == pytest.approx(
            dict(score=m_in + detector.gamma_ * m_out, m_in=m_in, m_out=m_out, p_value=float(detector.p_values(image))), abs=1e-6
        )
        assert rows[path]["flagged"] == str(bool(detector.predict(image, 0.2))) and not rows[path]["error"]
    assert {row["flagged"] for row in rows.values()} == {"True", "False", ""}
    for path in failed:
        assert rows[path]["error"] and not any(rows[path][key] for key in ("score", "p_value", "flagged"))
    said = capfd.readouterr().err
    assert "27 files, 24 scored" in said and "3 files could not be scored" in said and "1 .txt" in said and "broken.png" in said


def test_a_score_depends_on_its_image_alone_to_the_last_bit(home, detector, tmp_path, monkeypatch):
    run("score", home, "--out", tmp_path / "a.csv", "--workers", 1)
    monkeypatch.setattr(chunks, "_CHUNK", 5)
    run("score", home, "--out", tmp_path / "b.csv", "--workers", 3)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    passes = []
    detector.encoder.register_forward_hook(lambda module, given, _: passes.append(len(given[0])))
    for n in (1, 4, 5):
        chunks.view_sums(detector, torch.rand(n, 3, 16, 16))
    assert passes == [24] * 4, "convolutions round by the size of their batch, so that all must be filled up alike"
    alone = fill(tmp_path / "alone", ["x.png"], 300)  # the pixels of a.png
    run("score", home, "--out", tmp_path / "c.csv", "--images", alone)
    assert table(tmp_path / "c.csv")["x.png"]["score"] == table(tmp_path / "a.csv")["a.png"]["score"]
    run("score", home, "--out", tmp_path / "d.csv", "--images", home / "calibration")
    again = sorted(float(row["score"]) for row in table(tmp_path / "d.csv").values())
    assert again == detector.calibration_scores_.sort().values.tolist(), "copies of calibration images do not tie"


@pytest.mark.parametrize("cut", [0, 9, "line"])
def test_an_interrupted_table_is_gone_on_with(home, tmp_path, monkeypatch, cut, capfd):
    monkeypatch.setattr(chunks, "_CHUNK", 4)
    run("score", home, "--out", tmp_path / "whole.csv")
    whole, out, append, calls = (tmp_path / "whole.csv").read_bytes(), tmp_path / "p.csv", score_table.Table.append, []

    def stop_at_the_third(self, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, rows)

    monkeypatch.setattr(score_table.Table, "append", stop_at_the_third)
    assert run("score", home, "--out", out) == 130
    written = out.read_bytes()
    assert whole.startswith(written) and len(list(score_table.lines_of(out))) == 9
    out.write_bytes(written[:-cut] if cut and cut != "line" else written + b'"half a na' if cut else written)
    calls[:] = [0] * 3
    assert run("score", home, "--out", out) == score_table.SOME_FAILED
    assert out.read_bytes() == whole
    assert sum(calls[3:]) == 27 - 8 + (cut == 9), "lines that were there were computed again"
    assert run("score", home, "--out", out) == score_table.SOME_FAILED and out.read_bytes() == whole
    capfd.readouterr()
    assert run("score", home, "--out", out, "--alpha", 0.3) == 1 and "another threshold" in capfd.readouterr().err
    assert run("score", home, "--out", out, "--images", home / "calibration") == 1
    (tmp_path / "foreign.csv").write_text("mine\n1\n")
    assert run("score", home, "--out", tmp_path / "foreign.csv") == 1 and (tmp_path / "foreign.csv").read_text() == "mine\n1\n"


def test_looking_for_images_is_said_when_it_takes_long(tmp_path, monkeypatch, capfd):
    for i in range(30):
        (tmp_path / f"{i}.png").touch()
    assert chunks.listing(tmp_path).n_images == 30
    assert not capfd.readouterr().err
    monkeypatch.setattr(chunks, "_SILENT", 0.2)
    slow = image_files.files_below(tmp_path)
    monkeypatch.setattr(image_files, "files_below", lambda folder: (time.sleep(0.02) or path for path in slow))
    assert chunks.listing(tmp_path).n_images == 30
    assert re.search(r"looking for images: \d+ files", capfd.readouterr().err)


def test_no_more_than_two_chunks_are_held(home, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK", 4)
    decode, append, held, most = chunks.decode, score_table.Table.append, [0], []

    def count_in(*arguments):
        held[0] += 1
        most.append(held[0])
        return decode(*arguments)

    def count_out(self, rows):
        held[0] -= len(rows)
        append(self, rows)

    monkeypatch.setattr(chunks, "decode", count_in)
    monkeypatch.setattr(score_table.Table, "append", count_out)
    run("score", home, "--out", tmp_path / "p.csv", "--workers", 1)
    assert held == [0] and len(most) == 27 and max(most) <= 8


def test_fit_holds_no_more_for_more_images(home, detector, monkeypatch):
    """X_val(1) may be a whole training set: of 12 chunks, the images of three and the view sums of two are there at a time."""
    monkeypatch.setattr(chunks, "_CHUNK", 1)
    fitted = CADet(detector.encoder, **detector.settings(), batch_size=detector.n_views)  # an image a forward pass, and a chunk
    decode, sums_of_chunk, images, sums, most = chunks.decode, chunks.sums_of_chunk, [], [], [0, 0]

    def alive(references):
        return sum(reference() is not None for reference in references)

    def remember(*arguments):
        found = decode(*arguments)
        images.append(weakref.ref(found.image))
        return found

    def look(*arguments):
        found = sums_of_chunk(*arguments)
        sums.append(weakref.ref(found[1]))
        most[:] = max(most[0], alive(images)), max(most[1], alive(sums))
        return found

    monkeypatch.setattr(chunks, "decode", remember)
    monkeypatch.setattr(score, "sums_of_chunk", look)
    score.fit_folders(fitted, home / "reference", home / "calibration", workers=1)
    assert len(images) == len(sums) == 12 + 39 and most[0] <= 3 and most[1] <= 2


DAMAGED = {  # what Pillow raises of each
    "DecompressionBombError": ("bomb.ppm", b"P6 60000 60000 255 "),  # whoever believes it asks for 10 GB
    "UnidentifiedImageError": ("text.jpg", b"no image"),
    "ValueError": ("cut.ppm", b"P6 4 "),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_whatever_a_decoder_says_the_file_is_named(tmp_path, kind):
    name, content = DAMAGED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: found no readable image .*; replace or remove it") as caught:
        image_files.read_image(tmp_path / name, 8)
    assert type(caught.value.__cause__).__name__ == kind
    found = chunks.decode(tmp_path, name, 8)
    assert found.image is None and "found no readable image" in found.error and str(tmp_path) not in found.error


@pytest.mark.parametrize("error", [struct.error, EOFError, IndexError, ValueError, OSError, SyntaxError, ZeroDivisionError])
def test_errors_in_the_middle_of_a_file_are_the_file_s(tmp_path, monkeypatch, error):
    picture(0).save(tmp_path / "a.png")

    def fail(*_):
        raise error("unpack requires 4 bytes")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ValueError, match=r"a.png: found no readable image .unpack requires 4 bytes"):
        image_files.read_image(tmp_path / "a.png", 8)


class Blind(nn.Module):
    """Sees nothing in dark images."""

    def forward(self, images):
        mean = images.mean(dim=(2, 3))
        return torch.where(mean < 0.2, torch.nan, mean)


def test_an_image_without_features_is_an_error_of_its_own():
    detector = CADet(Blind(), n_views=3, image_size=8, batch_size=6)
    light = torch.randint(100, 200, (3, 3, 8, 8), dtype=torch.uint8)
    chunk = [chunks.Decoded(str(i), image) for i, image in enumerate([light[0], light[1] * 0, light[2]])]
    found, sums = chunks.sums_of_chunk(detector, [*chunk, chunks.Decoded("x", None, "broken")])
    assert [bool(item.error) for item in found] == [False, True, False, True] and "NaN" in found[1].error
    torch.testing.assert_close(sums.means, detector.view_sums(light[[0, 2]]).means, atol=0, rtol=0)
    alone, sums = chunks.sums_of_chunk(detector, chunk[1:2], none_before=True)
    assert "NaN" in alone[0].error and sums is None
    dark = [chunk[1], chunk[1]]
    assert all(item.error for item in chunks.sums_of_chunk(detector, dark)[0]), "others had features: it is these images"
    with pytest.raises(ValueError, match="NaN"):  # no image of several had any, and none before: the encoder's fault
        chunks.sums_of_chunk(detector, dark, none_before=True)


@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_lines_do_not_depend_on_the_chunks_they_came_in(tmp_path, monkeypatch, chunk):
    """An image without features has its line wherever it stands, alone too."""
    detector = CADet(Blind(), n_views=3, image_size=8, batch_size=3)
    detector.fit(*torch.randint(100, 200, (2, 9, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    images = fill(tmp_path / "images", [f"{i}.png" for i in range(8)], 0)
    Image.new("RGB", (8, 8)).save(images / "9.png")
    monkeypatch.setattr(chunks, "_CHUNK", chunk)
    score.score_folder(detector, images, tmp_path / "p.csv", 0.1)
    monkeypatch.setattr(chunks, "_CHUNK", 256)
    score.score_folder(detector, images, tmp_path / "whole.csv", 0.1)
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert [path for path, row in table(tmp_path / "p.csv").items() if row["error"]] == ["9.png"]


def test_what_can_be_read_again_has_the_line_of_a_run_without_errors(home, tmp_path, capfd):
    images, out = tmp_path / "images", tmp_path / "p.csv"
    fill(images, [f"{i}.png" for i in range(9)], 300)
    whole = {name: (images / name).read_bytes() for name in ("2.png", "5.png")}
    for name in whole:
        (images / name).write_bytes(b"cut")
    again = ["--images", images, "--out", out]
    assert run("score", home, *again) == score_table.SOME_FAILED and "with --retry" in capfd.readouterr().err
    before = out.read_bytes()
    assert run("score", home, *again, "--retry") == score_table.SOME_FAILED and out.read_bytes() == before, "still broken"
    (images / "2.png").write_bytes(whole["2.png"])
    assert run("score", home, *again) == score_table.SOME_FAILED and out.read_bytes() == before, "only when asked to"
    assert run("score", home, *again, "--retry") == score_table.SOME_FAILED and not table(out)["2.png"]["error"]
    (images / "5.png").write_bytes(whole["5.png"])
    fill(images, ["late.png"], 400)
    assert run("score", home, *again, "--retry") == 0
    assert run("score", home, "--images", images, "--out", tmp_path / "fresh.csv") == 0
    assert out.read_bytes() == (tmp_path / "fresh.csv").read_bytes()
    assert not [path.name for path in tmp_path.iterdir() if "replacing" in path.name]
    assert run("score", home, *again, "--retry", "--parts", 2) == 1 and "expected it without them" in capfd.readouterr().err


def test_a_table_cut_short_within_its_first_line_begins_anew(home, detector, tmp_path):
    settings, out = score.settings_of(detector, home / "images", 0.1), tmp_path / "p.csv"
    begun = score_table.Table(out, settings)
    whole = out.read_bytes()
    begun.file.close()
    out.write_bytes(whole[:7])
    score_table.Table(out, settings).append([["a.png", *[""] * 5, "gone"]])
    assert out.read_bytes().startswith(whole) and set(table(out)) == {"a.png"}


def test_a_table_that_is_written_anew_stays_locked(home, detector, tmp_path):
    written = score_table.Table(tmp_path / "p.csv", score.settings_of(detector, home / "images", 0.1))
    early = open(tmp_path / "p.csv", "ab")  # before it is replaced, as another process may
    with pytest.raises(OSError, match="full"):
        written.replace(iter([b"one", *map(fail, ["disk full"])]))
    assert (tmp_path / "p.csv").read_bytes() == score_table.line(score_table.COLUMNS)
    written.replace([score_table.line(score_table.COLUMNS)])
    with pytest.raises(ValueError, match="another process"):
        score_table.Table(tmp_path / "p.csv", score.settings_of(detector, home / "images", 0.1))
    written.append([["a.png", *[""] * 5, "gone"]])
    assert set(table(tmp_path / "p.csv")) == {"a.png"}
    early.close()


def fail(why):
    raise OSError(why)


def test_a_detector_finds_its_encoder_beside_it(detector, tmp_path):
    for name in ("encoder.safetensors", "simclr.ckpt"):
        (tmp_path / name).touch()
        detector.save(tmp_path / "d.safetensors", encoder_name=name)
        assert score.recorded_encoder(tmp_path / "d.safetensors") == str(tmp_path / name)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(home, tmp_path, capfd, device):
    assert run("score", home, "--out", tmp_path / "p.csv", "--device", device) == 1
    assert f"device: found '{device}'" in capfd.readouterr().err


def test_fit_asks_for_its_place_before_it_computes(home, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(score, "fit_folders", fail)
    assert run("fit", home, "--out", tmp_path) == 1 and "expected a file's name" in capfd.readouterr().err


def test_the_gallery_is_one_page_of_the_smallest_scores(home, tmp_path):
    page = tmp_path / "page.html"
    run("score", home, "--out", tmp_path / "p.csv", "--gallery", page, "--gallery-size", 24)
    text, rows = page.read_text(), table(tmp_path / "p.csv")
    order = sorted((row for row in rows.values() if row["score"]), key=lambda row: float(row["score"]))
    shown = [float(p) for p in re.findall(r"<b>p = ([\d.e-]+)</b>", text)]
    assert shown == pytest.approx([float(row["p_value"]) for row in order], rel=1e-3) and len(shown) == 24
    assert text.count('src="data:image/png;base64,') == 24 and not re.search("https?:|<script|<link|@import|url[(]", text)
    assert str(home) not in text and "<b>bold" not in text and "&lt;b&gt;bold" in text and "3 files could not be scored" in text


def test_what_cannot_be_promised_is_refused_with_what_would_do(home, tmp_path, capfd):
    assert run("score", home, "--out", tmp_path / "p.csv", "--alpha", 0.01) == 1
    assert "at least 99 calibration images" in capfd.readouterr().err and not (tmp_path / "p.csv").exists()
    assert run("fit", home, "--calibration", home / "reference") == 1 and "without a common image" in capfd.readouterr().err
    assert run("score", home, "--out", tmp_path / "p.csv", "--images", home / "none") == 1
    assert "found no folder" in capfd.readouterr().err
    for alpha in (0.5, 0.3, 0.05, 0.01, 0.001, 1 / 3, 0.07):
        needed = thresholds.calibration_needed(alpha)
        assert 1 / (needed + 1) <= alpha and (needed == 1 or 1 / needed > alpha)


def test_a_kept_threshold_is_accepted_for_its_detector_only(home, detector, tmp_path, capfd):
    kept = thresholds.write(tmp_path / "t.json", thresholds.guaranteed(0.25, detector.fingerprint(), 39), note="chosen by eye")
    out = tmp_path / "p.csv"
    run("score", home, "--out", out, "--threshold", kept)
    rows = [row for row in table(out).values() if row["flagged"]]
    assert {row["flagged"] == "True" for row in rows if float(row["p_value"]) <= 0.25} == {True}
    assert sum(row["flagged"] == "True" for row in rows) == sum(float(row["p_value"]) <= 0.25 for row in rows)
    images = data.folder_images(home / "calibration", 16).images
    assert torch.equal(detector.predict(images, threshold=kept), detector.p_values(images) <= 0.25)
    other = CADet(detector.encoder, **detector.settings() | {"seed": 6})
    other.mu_, other.gamma_, other.calibration_scores_ = detector.mu_, detector.gamma_, detector.calibration_scores_
    with pytest.raises(ValueError, match="another detector"):
        other.predict(images, threshold=kept)
    for damaged in ("{}", "[1]", "no json", kept.read_text().replace("0.25", "2.5")):
        (tmp_path / "bad.json").write_text(damaged)
        with pytest.raises(ValueError, match="expected a threshold written by"):
            detector.predict(images, threshold=tmp_path / "bad.json")
    assert run("score", home, "--out", out, "--threshold", kept, "--alpha", 0.1) == 1 and "one of them" in capfd.readouterr().err


# --- p-values hold --------------------------------------------------------------------------------------------------------


def chi_square(p_values, n_calibration):
    """Are p-values uniform on {1, ..., n + 1} / (n + 1)? The test's own p-value."""
    ranks = np.rint(np.asarray(p_values) * (n_calibration + 1)).astype(int) - 1
    return stats.chisquare(np.bincount(ranks, minlength=n_calibration + 1)).pvalue


def test_p_values_of_fresh_scores_are_uniform():
    generator = np.random.default_rng(1)
    draws = generator.gumbel(size=(6000, 20))
    p = [float(cadet.p_values(row[1:], row[:1])[0]) for row in draws]
    assert chi_square(p, 19) > 0.001
    for alpha in (0.05, 0.1, 0.5):
        assert stats.binomtest(int(np.sum(np.array(p) <= alpha)), len(p), alpha).pvalue > 0.001
    # One calibration set, many images: the share flagged follows the Beta distribution that the interval is of.
    fresh = stats.gumbel_r.ppf((np.arange(2000) + 0.5) / 2000)
    shares = np.array([float((cadet.p_values(row[1:], fresh) <= 0.1).double().mean()) for row in draws[:1000]])
    low, high = thresholds.promised(19, 0.1)[1:]
    assert stats.binomtest(int(np.sum((shares >= low) & (shares <= high))), 1000, 0.95).pvalue > 0.001


def test_equal_scores_keep_the_level_with_the_conservative_rule_only():
    draws = np.random.default_rng(2).integers(3, size=(3000, 20)).astype(float)  # three values: ties everywhere
    shares = {
        ties: [np.mean([float(cadet.p_values(row[1:], row[:1], ties)[0]) <= alpha for row in draws]) for alpha in (0.05, 0.35)]
        for ties in cadet.TIES
    }
    assert all(share <= alpha for share, alpha in zip(shares["conservative"], (0.05, 0.35), strict=True))
    assert shares["paper"][0] > 0.3, "Eq. 8 as printed counts ties in favour of an anomaly: expected far more than 5 %"


def test_p_values_of_a_real_encoder_are_uniform_over_splits():
    torch.manual_seed(1)
    encoder = encoders.ResNet("resnet10", width=4, stem="cifar", image_size=16)
    digits = data.load("digits-test").resized(16).images[:120]
    detector = CADet(encoder, n_views=4, image_size=16, flip=False)
    sums = detector.view_sums(digits)
    order = torch.rand(4000, len(digits), generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    p = []
    for split in order:
        reference, calibration, test = split[:15], split[15:54], split[54:55]
        detector.fit_sums(sums[reference], sums[calibration])
        p += cadet.p_values(detector.calibration_scores_, detector.score_sums(sums[test])).tolist()
    assert chi_square(p, 39) > 0.001


# --- parts ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """What a single process writes: the table, and what is stated beside it."""
    out = tmp_path_factory.mktemp("whole") / "p.csv"
    run("score", home, "--out", out)
    return out.read_bytes(), Path(f"{out}.settings.json").read_bytes()


def written(out):
    return out.read_bytes(), Path(f"{out}.settings.json").read_bytes()


@pytest.mark.parametrize("n", [1, 3, 30])  # of 27 files: some parts of 30 are empty
def test_parts_are_the_single_process_s_table_byte_for_byte(home, tmp_path, monkeypatch, whole, n, capfd):
    out = tmp_path / "p.csv"
    for i in range(n, 0, -1):
        assert run("score", home, "--out", out, "--part", f"{i}/{n}") in (0, score_table.SOME_FAILED) and not out.exists()
    monkeypatch.setattr(score_parts, "_begin", None)  # all parts are there: no process is started
    capfd.readouterr()
    assert run("score", home, "--out", out, "--parts", n) == score_table.SOME_FAILED
    assert "27 files, 24 scored" in capfd.readouterr().err
    assert written(out) == whole and len(list(tmp_path.iterdir())) == 2
    assert run("score", home, "--out", out, "--parts", n) == run("score", home, "--out", out) == score_table.SOME_FAILED
    assert written(out) == whole, "a merged table is a finished one"


def test_a_merge_names_what_it_lacks_and_writes_nothing(home, tmp_path, capfd, whole):
    out, images = tmp_path / "p.csv", fill(tmp_path / "images", [f"{i}.png" for i in range(8)], 500)
    folder = ["--images", images, "--out", out]

    def parts(*numbers, options=()):
        return [run("score", home, *folder, "--part", f"{i}/4", *options) for i in numbers]

    def refused(*options):
        capfd.readouterr()
        assert run("score", home, *folder, "--merge", 4, *options) == 1 and not out.exists()
        assert not list(tmp_path.glob(".*")), "half a table was left"
        return capfd.readouterr().err

    assert parts(1, 3) + parts(4, options=["--alpha", 0.3]) == [0, 0, 0]
    third = tmp_path / "p.csv.part-3-of-4"
    scored = third.read_bytes()
    third.write_bytes(scored[:-3])
    said = refused()
    assert re.findall(r"part-(.)-of-4: found (no such table|. files in it|a table of another threshold), expected", said) == [
        ("2", "no such table"),
        ("3", "1 files in it"),
        ("4", "a table of another threshold"),
    ]
    assert parts(4) == [1] and "part-4-of-4: found a file of another threshold" in capfd.readouterr().err
    (tmp_path / "p.csv.part-4-of-4").unlink()
    assert parts(2, 3, 4) == [0, 0, 0] and third.read_bytes() == scored, "an unfinished part was not gone on with"
    lines = scored.splitlines(keepends=True)
    third.write_bytes(scored + lines[-1])
    assert "part-3-of-4: found 3 files in it, expected 2" in refused()
    third.write_bytes(b"".join([lines[0], *lines[:0:-1]]))
    assert "part-3-of-4: found the file '5.png' in it, expected '4.png' here" in refused()
    third.write_bytes(scored)
    picture(1).save(images / "new.png")
    said = refused()
    assert all(f"part-{i}-of-4: found a table of another listing" in said for i in range(1, 5))
    (images / "new.png").unlink()
    other = home / "other.safetensors"
    assert run("fit", home, "--n-views", 6, "--seed", 6, "--out", other) == 0
    assert "part-2-of-4: found a table of another detector" in refused("--detector", other)
    assert run("score", home, *folder, "--merge", 4) == 0 and len(table(out)) == 8
    picture(1).save(images / "new.png")
    assert run("score", home, *folder, "--merge", 4) == 1 and "lacks 1 files" in capfd.readouterr().err
    for wrong in ("0/4", "5/4", "2", "-1/4", "a/b"):
        assert run("score", home, *folder, f"--part={wrong}") == 1 and "expected I/N with I from 1 to N" in capfd.readouterr().err


def test_each_gpu_has_a_process_that_goes_on_with_its_part(home, tmp_path, monkeypatch, whole, capfd):
    """Two real processes; which GPU they are told of is seen, though there is none here."""
    out, popen, begun = tmp_path / "p.csv", subprocess.Popen, []

    def spy(command, **options):
        begun.append((command[-1], options["env"]["CUDA_VISIBLE_DEVICES"]))
        return popen(command, **options)

    run("score", home, "--out", out, "--part", "2/2")
    second = tmp_path / "p.csv.part-2-of-2"
    second.write_bytes(b"".join(second.read_bytes().splitlines(keepends=True)[:5]) + b"cut")
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["3", "7"])
    monkeypatch.setattr(subprocess, "Popen", spy)
    assert run("score", home, "--out", out, "--gpus", "1,0", "--device", "cpu") == 1 and "one GPU" in capfd.readouterr().err
    assert run("score", home, "--out", out, "--gpus", "1,0") == score_table.SOME_FAILED
    assert begun == [("--part=1/2", "7"), ("--part=2/2", "3")]
    assert written(out) == whole and len(list(tmp_path.iterdir())) == 2


def test_a_process_that_dies_fails_the_whole_by_name(home, tmp_path, monkeypatch, capfd):
    popen, begun = subprocess.Popen, []

    def kill_the_second(command, **options):
        begun.append(popen(command, **options))
        if command[-1] == "--part=2/3":
            begun[-1].kill()
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", kill_the_second)
    assert run("score", home, "--out", tmp_path / "p.csv", "--parts", 3) == 1
    said = capfd.readouterr().err
    assert "part 2/3: found its process ended by SIGKILL" in said and "p.csv.part-2-of-3" in said
    assert len(begun) == 3 and all(process.returncode == -signal.SIGTERM for process in (begun[0], begun[2]))
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_parts_end_with_their_parent(home, tmp_path):
    options = ["--detector", home / "detector.safetensors", "--images", home / "images", "--out", tmp_path / "p.csv"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "cadetlib.score", "score", *map(str, options), "--parts", "2"], stderr=subprocess.DEVNULL
    )
    deadline, children = time.monotonic() + 120, []
    while len(children) < 2 and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        children = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=20)
    for process in alive:
        process.kill()
    assert len(gone) == 2 and not (tmp_path / "p.csv").exists()


def test_two_processes_at_one_table_are_refused(home, tmp_path, capfd):
    held = score_table._held(tmp_path / "p.csv")
    assert run("score", home, "--out", tmp_path / "p.csv") == 1
    assert "found another process at work on it" in capfd.readouterr().err
    held.close()
    assert run("score", home, "--out", tmp_path / "p.csv") == score_table.SOME_FAILED


def test_a_gallery_goes_on_without_an_image_that_has_gone(tmp_path):
    row = dict(path="gone.png", flagged="True", p_value="0.01")
    text, side = gallery._item(tmp_path, row)
    assert "gone.png" in text and side == 64
