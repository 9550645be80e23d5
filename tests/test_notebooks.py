"""Notebooks and their parameter files as they are kept: every value declared, every file fitting, nothing left over."""

import inspect
import json
import re
from pathlib import Path

import pytest

from cadetlib import parameters, profiles
from cadetlib.attack_sets import attack_settings
from cadetlib.attacks import ATTACKS
from cadetlib.data import SOURCES

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = sorted(p.name for p in (ROOT / "params").iterdir() if p.is_dir())


def test_there_are_nine_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(9)]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_parameter_file_fits_its_notebook(profile):
    assert [n.name for n in profiles.notebooks_of(profile)] == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_digits_profile_is_the_notebooks_defaults(path):
    """nbval and JupyterLab run the defaults; they must be a profile that people can name."""
    declared = {k: p.value for k, p in parameters.declared(path).items() if k != "output"}
    assert declared == parameters.read_yaml(ROOT / "params" / "digits" / f"{path.stem}.yaml")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_clean_and_readable(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["cells"][0]["cell_type"] == "markdown" and "".join(notebook["cells"][0]["source"]).startswith("# ")
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "stored outputs: run nbstripout on it"
    assert not any("class " in "".join(cell["source"]) or "def " in "".join(cell["source"]) for cell in code)
    comments = {name: parameter.comment for name, parameter in parameters.declared(path).items()}
    assert comments["profile"] and comments["output"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_network_of_a_notebook_is_put_on_the_gpu(path):
    """`load_encoder` leaves it on the CPU, where a run with a GPU would be right and endless."""
    code = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not [
        line for line in "\n".join(code).splitlines() if re.search(r"(?<!placed\()encoders\.load_(encoder|classifier)\(", line)
    ]


@pytest.mark.parametrize("profile", PROFILES)
def test_named_sets_and_attacks_exist(profile):
    for notebook in profiles.notebooks_of(profile):
        given = notebook.parameters
        names = [given.get(k) for k in ("in_distribution", "reference", "data", "knn_data") if given.get(k)]
        names += given.get("unseen", []) + given.get("shifted", []) + given.get("data_sets", []) + given.get("data_required", [])
        assert {name.partition(":")[0] for name in names} <= set(SOURCES), f"{profile}/{notebook.name}"
        assert set(given.get("attacks", [])) <= set(ATTACKS), f"{profile}/{notebook.name}"


@pytest.mark.parametrize("profile", PROFILES)
def test_how_long_each_attack_iterates_is_a_parameter(profile):
    """Tables 3 and 4 make all attacks, and a try of them must be short: none may fall back on its function's own iterations."""
    given = {n.number: n.parameters for n in profiles.notebooks_of(profile)}["04"]
    iterated = {name for name, attack in ATTACKS.items() if "n_steps" in inspect.signature(attack).parameters}
    assert iterated == {name for name in given["attacks"] if "n_steps" in attack_settings(name, given)}


@pytest.mark.parametrize("profile", PROFILES)
def test_notebooks_of_a_profile_agree(profile):
    """03 attacks and 02 to 04 look at images in the size and with the attacks that 01 and 04 use."""
    given = {n.name[:2]: n.parameters for n in profiles.notebooks_of(profile)}
    assert {given[k]["image_size"] for k in ("01", "02", "03", "04")} == {given["01"]["image_size"]}
    assert given["01"]["classes"] == given["03"]["classes"] == given["04"]["classes"] == given["05"]["classes"]
    assert given["03"]["victim_name"] == given["04"]["victim_name"]
    assert given["04"]["training"] == given["05"]["training"] == given["01"]["data"]
    assert given["03"]["n_held_out"] == given["04"]["n_held_out"], "the attacks of 03 would be made again for 04"
    shared = set(given["03"]) & set(given["04"]) & {k for k in given["04"] if any(k.startswith(a + "_") for a in ATTACKS)}
    assert shared and all(given["03"][k] == given["04"][k] for k in shared)
    assert max(given["04"]["view_grid"]) == given["04"]["n_views"]
    assert max(given["05"]["reference_sizes"]) <= given["04"]["n_reference"]
