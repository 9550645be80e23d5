"""Pretraining with something changed, so that what it makes of CADet can be seen: another width, no blur, fewer epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cadetlib import record, run_files, trained, training_settings


def changed(given: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """The parameters of notebook 01 with a recipe's changes, "name: value, name: value"; a run of its own, without snapshots.

    >>> changed({"width": 16, "blur": 0.5, "epochs": 240}, "width: 8, epochs: 40")
    {'width': 8, 'blur': 0.5, 'epochs': 40, 'snapshots': []}
    """
    try:
        changes = yaml.safe_load(f"{{{recipe}}}")
    except yaml.YAMLError:
        changes = {}
    if not changes or any(name not in given or value is None for name, value in changes.items()):
        known = ", ".join(list(given)[:6])
        raise ValueError(f"recipe: found {recipe!r}, expected 'name: value, ...' with names of parameters such as {known}")
    return {**given, **changes, "snapshots": []}


def obtain(given: Mapping[str, Any], recipes: Sequence[str], train: bool) -> tuple[dict[str, Path], list[str]]:
    """The encoder of each recipe, trained now or, without `train`, only when that is done; and the recipes left out.

    given: the parameters of notebook 01; all recipes are looked at before the first is trained.

    >>> obtain({"profile": "digits", "width": 16}, ["width: 4"], train=False)
    ({}, ['width: 4'])
    """
    for_each = {recipe: changed(given, recipe) for recipe in recipes}
    folders = {recipe: training_settings.run_folder(training_settings.settings_from(its)) for recipe, its in for_each.items()}
    if train:
        for folder in folders.values() if record.forced() else ():
            record.set_aside(folder)
        folders = {recipe: trained.launch(its) for recipe, its in for_each.items()}
    files = {recipe: folder / run_files.ENCODER for recipe, folder in folders.items()}
    return {k: file for k, file in files.items() if file.is_file()}, [k for k, file in files.items() if not file.is_file()]
