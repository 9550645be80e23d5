"""What is kept is what verified, and small enough for git."""

import pytest

from cadetlib import keep, record


@pytest.fixture
def folder(checkout, write_notebook):
    """A results folder with one result, one figure and a report."""
    write_notebook("02_tables")
    run = record.start("02_tables", {"profile": "tiny"})
    run.save(rows=[1, 2])
    (run.folder / "figures").mkdir()
    (run.folder / "figures" / "02_a.png").write_bytes(b"picture")
    (run.folder / "figures" / "02_a.svg").write_bytes(b"larger picture")
    (run.folder / "report.html").write_text("report")
    (run.folder / "images.safetensors").write_bytes(b"too large to keep")
    return run.folder


def test_results_figures_and_report_are_kept_and_nothing_else(checkout, folder, capsys):
    assert keep.main(["tiny"]) == 0
    kept = checkout / "outputs" / "reference" / "tiny"
    files = sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())
    assert files == ["02_tables.json", "figures/02_a.png", "report.html"]
    assert record.load(kept / "02_tables.json")[0] == {"rows": [1, 2]}
    assert "kept 3 files" in capsys.readouterr().out


def test_a_damaged_result_is_not_kept(checkout, folder, capsys):
    path = folder / "02_tables.json"
    path.write_text(path.read_text().replace("[1, 2]", "[1, 3]").replace("[1,2]", "[1,3]"))
    assert keep.main(["tiny"]) == 1 and "02_tables.json" in capsys.readouterr().err
    assert not (checkout / "outputs" / "reference" / "tiny").exists()


def test_results_of_two_runs_are_not_kept_together(checkout, write_notebook, capsys):
    for name in ("01_pretraining", "04_cadet_tables"):
        write_notebook(name)
    record.start("01_pretraining", {"profile": "tiny"}).save(trained=1)
    later = record.start("04_cadet_tables", {"profile": "tiny"})
    later.need("01_pretraining")
    path = later.save(auroc=0.9)
    record.write_atomically(path.parent / "report.html", "<p>all of it</p>")
    assert keep.main(["tiny"]) == 0
    record.start("01_pretraining", {"profile": "tiny"}).save(trained=2)
    assert keep.main(["tiny"]) == 1
    assert "04_cadet_tables: found results made from another run of 01_pretraining" in capsys.readouterr().err


@pytest.mark.parametrize("what", [[], ["--encoder"]])
def test_nothing_of_a_dry_run_is_kept(checkout, write_notebook, what, capsys):
    write_notebook("01_pretraining")
    (checkout / "params" / "tiny" / "00_setup.yaml").write_text("dry_run: true\n")
    run = record.start("01_pretraining", {"profile": "tiny"})
    run.save(encoders={"contrastive": "encoder.safetensors"})
    assert keep.main(["tiny", *what]) == 1 and "found results of a dry run" in capsys.readouterr().err
    assert not (checkout / "outputs" / "reference").exists()


def test_what_git_should_not_hold_is_named(checkout, folder, capsys):
    (folder / "report.html").write_bytes(bytes(3 * 2**20 + 1))
    assert keep.main(["tiny"]) == 1
    assert "too large for git: report.html: 3.0 MiB" in capsys.readouterr().err
