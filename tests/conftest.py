"""What several test files share: a checkout of tiny notebooks to run in."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side

import json
from collections.abc import Callable
from pathlib import Path

import pytest

PARAMETERS = 'profile = "tiny"  # the profile\noutput = ""  # folder of the results\n'


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout with the profile `tiny`, the one that record and reproduce work in."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params" / "tiny").mkdir(parents=True)
    monkeypatch.setenv("CADET_ROOT", str(tmp_path))
    for name in ("CADET_DATA", "CADET_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def write_notebook(checkout: Path) -> Callable[..., Path]:
    """Write notebooks/<name>.ipynb (parameters, `run = record.start(...)`, then the cells given) and its parameter file."""

    def write(name: str, *cells: str, parameters: str = "", yaml: str = "") -> Path:
        start = f'from cadetlib import record\n\nrun = record.start("{name}", globals())'
        code = [(PARAMETERS + parameters, ["parameters"]), (start, []), *((cell, []) for cell in cells)]
        document = {
            "nbformat": 4,
            "nbformat_minor": 5,
            "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
            "cells": [
                {
                    "id": f"cell-{i}",
                    "cell_type": "code",
                    "execution_count": None,
                    "metadata": {"tags": tags},
                    "outputs": [],
                    "source": source.splitlines(keepends=True),
                }
                for i, (source, tags) in enumerate(code)
            ],
        }
        path = checkout / "notebooks" / f"{name}.ipynb"
        path.write_text(json.dumps(document))
        (checkout / "params" / "tiny" / f"{name}.yaml").write_text(yaml)
        return path

    return write
