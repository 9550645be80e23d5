"""Pretraining with something changed, so that what it makes of CADet can be seen: another width, no blur, fewer epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cadetlib import pretrain


def changed(given: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """The parameters of notebook 01 with a recipe's changes, "name=value name=value"; an own run, which keeps no snapshots.

    >>> changed({"width": 16, "blur": 0.5, "epochs": 240}, "width=8 epochs=40")
    {'width': 8, 'blur': 0.5, 'epochs': 40, 'snapshots': []}
    """
    pairs = [change.partition("=") for change in recipe.split()]
    if not pairs or any(name not in given or not text for name, _, text in pairs):
        raise ValueError(
            f"recipe: found {recipe!r}, expected 'name=value ...' with names of parameters such as {list(given)[:6]}"
        )
    return {**given, **{name: yaml.safe_load(text) for name, _, text in pairs}, "snapshots": []}


def obtain(given: Mapping[str, Any], recipes: Sequence[str], train: bool) -> tuple[dict[str, Path], list[str]]:
    """The encoder of each recipe, trained now or, without `train`, only when that is done; and the recipes left out.

    given: the parameters of notebook 01; all recipes are looked at before the first is trained.

    >>> obtain({"profile": "digits", "width": 16}, ["width=4"], train=False)
    ({}, ['width=4'])
    """
    for_each = {recipe: changed(given, recipe) for recipe in recipes}
    folders = {recipe: pretrain.run_folder(pretrain.settings_from(its)) for recipe, its in for_each.items()}
    if train:
        folders = {recipe: pretrain.launch(its) for recipe, its in for_each.items()}
    files = {recipe: folder / pretrain.ENCODER for recipe, folder in folders.items()}
    return {k: file for k, file in files.items() if file.is_file()}, [k for k, file in files.items() if not file.is_file()]
