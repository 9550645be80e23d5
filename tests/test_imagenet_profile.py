"""The dry run of the profile imagenet: the same parameters but for sizes and sets, every notebook once, and no result."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_report import PROFILE, drawn, folder, root  # noqa: F401 - fixtures

from cadetlib import attack_sets, claims, data, profiles, record, report, run_files

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "imagenet-dry-run"
VERDICTS = (claims.CONFIRMED, claims.IN_PART, claims.NOT, claims.UNDECIDED, claims.UNTESTED)

# In what a notebook of the dry run may differ from that of the profile that it tries: how much of it, and of which images.
SETS = {
    "00": {"data_sets", "data_required"},
    "01": {"data", "knn_data"},
    "02": {"reference", "shifted", "trained_shifted"},
    "03": {"in_distribution", "unseen"},
    "04": {"in_distribution", "training", "unseen"},
    "05": {"crop_sets", "training", "other_backbones", "precisions"},
    "06": {"other_normal"},
}
SIZES = {
    "01": {"processes", "batch_size", "epochs", "log_every", "knn_images", "snapshots"}
    | {"supervised_epochs", "supervised_batch_size"},
    "02": {"sizes", "n_samplings", "trained_sizes", "trained_n_samplings", "me_n_steps", "c2st_n_epochs", "mmd_d_n_epochs"},
    "03": {"n_held_out", "pgd_n_steps", "sizes", "n_draws"},
    "04": {"n_held_out", "n_training", "n_views", "view_grid", "n_reference", "n_calibration", "n_tuning", "n_hu", "n_unseen"}
    | {"pgd_n_steps", "cw_l2_n_steps", "cw_l2_ball_n_steps", "cw_linf_n_steps", "hu_cap_targeted", "hu_cap_untargeted"}
    | {"n_principal"},
    "05": {"reference_sizes", "crop_n_views", "study_n_images", "study_n_reference", "study_n_calibration", "study_n_views"}
    | {"study_strengths", "own_crop_scales", "own_n_views", "n_training", "precision_n_images"}
    | {"crop_scales", "study_crop_scales"},
    "06": {"n_other"},
    "07": {"image_size", "n_views"},
}


def test_the_dry_run_has_the_parameters_of_the_profile_but_for_sizes_and_sets():
    pairs = zip(profiles.notebooks_of("imagenet"), profiles.notebooks_of("imagenet-dry-run"), strict=True)
    for whole, dry in pairs:
        different = {k for k in whole.parameters if whole.parameters[k] != dry.parameters[k]} - {"profile", "dry_run"}
        assert different <= SETS.get(whole.number, set()) | SIZES.get(whole.number, set()), whole.name
        for name in different & SIZES.get(whole.number, set()):
            sizes = [largest(notebook.parameters[name]) for notebook in (dry, whole)]
            assert sizes[0] <= sizes[1], f"{whole.name}: {name} is larger in the dry run"
    marks = {profile: profiles.notebooks_of(profile)[0].parameters["dry_run"] for profile in ("imagenet", "imagenet-dry-run")}
    assert marks == {"imagenet": False, "imagenet-dry-run": True}


def largest(value):
    """A size, or the largest of several; 0 stands for all images."""
    return max(value) if isinstance(value, list) else value or math.inf


def test_a_dry_run_says_so_on_its_page_and_gives_no_verdict(folder, monkeypatch):  # noqa: F811 - a fixture
    """The results of the report's own tests as if they had been a dry run: the same numbers, and no verdict on them."""
    load = report._loaded

    def page(dry_run):
        monkeypatch.setattr(report, "_loaded", lambda *about: marked(load(*about), dry_run))
        return report.write(folder, PROFILE).read_text()

    usual, dry = page(dry_run=False), page(dry_run=True)
    assert report.DRY_RUN not in usual and any(f"</span> {verdict}</span>" in usual for verdict in VERDICTS)
    assert dry.count(report.DRY_RUN) == 1 and dry.index(report.DRY_RUN) < dry.index("<header>")
    assert re.search(r"\.dry-run \{ position: sticky; top: 0;", dry), "it has to stay in view beside every table"
    assert "<title>Dry run: " in dry and "Verdicts are computed" not in dry
    assert not [verdict for verdict in VERDICTS if f"</span> {verdict}</span>" in dry] and "dry run: no verdict" in dry


def marked(loaded, dry_run):
    """Results of which those of 04 say whether they are of a dry run: one of a dry run is enough."""
    changed = dict(dry_run=dry_run) if loaded.provenance["notebook"] == "04_cadet_tables" else {}
    return loaded._replace(provenance=loaded.provenance | changed)


# --- the run itself: 63 real images of ImageNet at 224 pixels ---------------------------------------------------------------


@pytest.fixture(scope="module")
def output():
    """What the command prints; in the profile's own folder, so that what is done and unchanged is not done again."""
    missing = data.missing(["imagenet-sample", "flowers64", "flowers64-daisies-first24"])
    if missing:
        pytest.skip(missing[0])
    command = [sys.executable, "-m", "cadetlib.reproduce", "imagenet-dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CADET_ROOT": str(ROOT)}, timeout=4000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def results(number):
    (path,) = FOLDER.glob(f"{number}_*.json")
    return record.load(path)[0]


@pytest.mark.slow
@pytest.mark.data
def test_every_notebook_has_run_and_says_what_it_is(output):
    assert "this was a dry run: no number of it is a result" in output
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        provenance = record.load(FOLDER / f"{path.stem}.json")[1]
        assert provenance["parameters"]["profile"] == "imagenet-dry-run" and provenance["dry_run"] is True
    assert results("08")["dry_run"] == report.DRY_RUN and results("08")["verdicts"] == []
    page = (FOLDER / "report.html").read_text()
    assert report.DRY_RUN in page and not [verdict for verdict in VERDICTS if f"</span> {verdict}</span>" in page]


@pytest.mark.slow
@pytest.mark.data
def test_two_steps_on_two_processes_from_files(output):
    files = {name: FOLDER / file for name, file in results("01")["encoders"].items()}
    for name, file in files.items():
        steps = [line["step"] for line in run_files.read_log(file.with_name("log.jsonl")) if "loss" in line]
        assert steps == [1, 2], name
        assert len(json.loads(file.with_name("files.json").read_text())["left_out"]) == 0  # written by streamed runs alone
        assert yaml.safe_load(file.with_name("parameters.yaml").read_text())["processes"] == 2
    quality = results("01")["qualities"]["contrastive"]
    assert (quality["n_features"], quality["n_classes"]) == (2048, 19) and quality["n_parameters"] > 23_000_000


@pytest.mark.slow
@pytest.mark.data
def test_every_table_has_its_rows(output):
    tests = {row["test"] for row in results("02")["rows"]}
    assert tests == {"MMD", "MMD-CC", "ME", "C2ST-S", "C2ST-L", "MMD-D"}
    assert {row["anomaly"] for row in results("03")["rows"]} == {"imagenet-sample-last6", "flowers64-daisies-first24", "PGD"}
    given = {n.number: n.parameters for n in profiles.notebooks_of("imagenet-dry-run")}
    systems = {"CADet", *given["04"]["detectors"], "ODIN", "ODIN tuned", "Hu", "HuSelfCalibrated", "Hu tuned"}
    rows = results("04")["rows"]
    assert {row["detector"] for row in rows} == systems
    attacked = {attack_sets.ATTACK_NAMES[name] for name in given["04"]["attacks"]}
    for encoder in ("contrastive", "supervised"):
        assert {row["anomaly"] for row in rows if (row["detector"], row["encoder"]) == ("CADet", encoder)} == {
            *given["04"]["unseen"],
            *attacked,
        }
    assert set(results("05")["moments"]) == {"in-distribution", *given["04"]["unseen"], *attacked}
    images = attack_sets.load_sets(FOLDER, results("04")["images"])
    assert {tuple(x.shape[1:]) for x in images.values()} == {(3, 224, 224)} and images["in-distribution"].float().std() > 20
    assert len(results("06")["detectors"]) == 2 and len(results("07")["p_values"]) == 60
