"""A profile as it will be run: its notebooks, the parameters of each, and what they need that is not there.

All that can be wrong is found before anything starts: names, types, files, needs, data and weights.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadetlib import parameters, record


@dataclass(frozen=True)
class Notebook:
    """One notebook of a profile, as it will be run.

    >>> [notebook.number for notebook in notebooks_of("digits")][:3]
    ['00', '01', '02']
    """

    name: str
    path: Path
    parameter_file: Path
    parameters: dict[str, Any]
    needs: tuple[str, ...]  # the earlier notebooks whose results it reads
    source: str  # digest of its cells, outputs left out

    @property
    def number(self) -> str:
        """The digits before the first underscore."""
        return self.name.split("_")[0]

    @property
    def processes(self) -> int:
        """How many it starts at a time, one a GPU."""
        return max(1, int(self.parameters.get("processes", 1)))


def notebooks_of(profile: str, root: Path | None = None) -> list[Notebook]:
    """Every notebook of the checkout with the parameters of `profile`, in order.

    One ValueError lists all that is wrong: an unknown profile, a notebook without its parameter file or the reverse, unknown
    names, wrong types, a need of what is no earlier notebook.

    >>> notebooks_of("digits")[1].name
    '01_pretraining'
    """
    root = root or record.checkout()
    profiles = sorted(p.name for p in (root / "params").glob("*") if p.is_dir())
    if profile not in profiles:
        raise ValueError(f"profile: found {profile!r}, expected one of {', '.join(profiles) or f'the folders of {root}/params'}")
    paths = sorted(p for p in (root / "notebooks").glob("*.ipynb") if re.fullmatch(r"\d\d_\w+", p.stem))  # no Untitled, no -Copy1
    if not paths:
        raise ValueError(f"{root}/notebooks: found no notebooks, expected NN_name.ipynb")
    names = [path.stem for path in paths]
    files = {path.stem: path for path in sorted((root / "params" / profile).glob("*.yaml"))}
    problems = [f"{files[name]}: found no notebooks/{name}.ipynb that it belongs to" for name in files if name not in names]
    found = []
    for i, path in enumerate(paths):
        try:
            found.append(_notebook(path, root / "params" / profile, names[:i]))
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _notebook(path: Path, folder: Path, earlier: Sequence[str]) -> Notebook:
    """One notebook with the parameters of the profile whose files are in `folder`."""
    file = folder / f"{path.stem}.yaml"
    if not file.exists():
        raise FileNotFoundError(f"{file}: found no such file, expected the parameters of {path.name} (it may be empty)")
    defaults = {name: parameter.value for name, parameter in parameters.declared(path).items()}
    merged = parameters.validate(defaults, parameters.read_yaml(file), file)
    if merged.get("profile") != folder.name:
        raise ValueError(f"{file}: profile: found {merged.get('profile')!r}, expected {folder.name!r}, the name of its folder")
    if merged.pop("output", None) != "":
        raise ValueError(f"{path}, {file}: output: expected a parameter that is '' (another folder is named with --output)")
    cells = parameters.read_notebook(path)
    needs = tuple(dict.fromkeys(name for cell in cells if cell["cell_type"] == "code" for name in _needs(cell["source"], path)))
    unknown = [name for name in needs if name not in earlier]
    if unknown:
        raise ValueError(f"{path}: found need({unknown[0]!r}), expected an earlier notebook: {', '.join(earlier) or 'none'}")
    source = record.digest([[cell["cell_type"], cell["source"]] for cell in cells])
    return Notebook(path.stem, path, file, merged, needs, source)


def _needs(source: str, path: Path) -> list[str]:
    """The names in the calls `run.need("...")` of one cell, read without running it."""
    calls = [node for node in ast.walk(_tree(source, path)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "need"]
    for call in calls:
        if len(call.args) != 1 or not isinstance(call.args[0], ast.Constant):
            raise ValueError(f'{path}: found `{ast.unparse(call)}`, expected the name itself, as in run.need("01_pretraining")')
    return [str(call.args[0].value) for call in calls if isinstance(call.args[0], ast.Constant)]


def _tree(source: str, path: Path) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager  # a cell with %magics or !commands

        try:
            return ast.parse(TransformerManager().transform_cell(source))
        except SyntaxError as error:
            raise ValueError(f"{path}: found a cell that is no Python: {error}") from error


def select(notebooks: Sequence[Notebook], only: str | None) -> list[Notebook]:
    """The notebooks of `--only`, a comma-separated list of numbers or names; all of them for None.

    >>> [notebook.name for notebook in select(notebooks_of("digits"), "0,08_report")]
    ['00_setup', '08_report']
    """
    if only is None:
        return list(notebooks)
    wanted = [item.strip() for item in only.split(",")]
    wanted = [item.zfill(2) if item.isdecimal() else item for item in wanted]
    known = {n.number for n in notebooks} | {n.name for n in notebooks}
    unknown = [item for item in wanted if item not in known]
    if unknown:
        raise ValueError(f"--only: found {only!r}, expected numbers or names out of {', '.join(n.name for n in notebooks)}")
    return [n for n in notebooks if n.number in wanted or n.name in wanted]


def missing_data(notebooks: Sequence[Notebook]) -> list[str]:
    """For each image set that a notebook lists in its parameter `data_required` and that is not there, what to do about it.

    >>> missing_data(notebooks_of("digits"))
    []
    """
    names = [name for notebook in notebooks for name in notebook.parameters.get("data_required", [])]
    if not names:
        return []
    from cadetlib import data

    return data.missing(list(dict.fromkeys(names)))


def missing_weights(notebooks: Sequence[Notebook]) -> list[str]:
    """For each encoder or attacked classifier of others that a notebook is to use and that is not there, what to do about it.

    >>> missing_weights(notebooks_of("digits"))
    []
    """
    taken = [n.parameters for n in notebooks if n.parameters.get("pretrained") or n.parameters.get("supervised_pretrained")]
    others = [name for n in notebooks for name in n.parameters.get("other_backbones", [])]
    victims = [name for n in notebooks for name in [n.parameters.get("victim_name", ""), *n.parameters.get("study_victims", [])]]
    others += [name for name in victims if name.startswith("cifar:")]  # the others are of notebook 01
    if not (taken or others):
        return []
    from cadetlib import backbones, trained

    others += [name for given in taken for name in trained.public_weights(given)]
    return [line for given in taken for line in trained.missing_weights(given)] + backbones.missing(others)
