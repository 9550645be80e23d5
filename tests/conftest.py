"""What several test files share: a checkout of tiny notebooks to run in, and a classifier of digits to attack."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from cadetlib import processes

processes.keep_freed_memory()  # as commands and notebooks do
PARAMETERS = 'profile = "tiny"  # the profile\noutput = ""  # folder of the results\n'


LONGEST = ("test_imagenet_profile.py", "test_digits_profile.py")  # whole profiles, minutes each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun last, one would keep one worker busy for minutes while the other has nothing to do."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


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


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 handwritten digits as images (N, 3, 8, 8) in [0, 1], and their labels."""
    data = load_digits()
    images = torch.from_numpy(data.images / 16).float()[:, None].expand(-1, 3, -1, -1).contiguous()
    return images, torch.from_numpy(data.target).long()


@pytest.fixture(scope="session")
def victim(digits) -> nn.Module:
    """A small convolutional classifier of the digits, in eval mode, trained on the first 1,200. Copy it to change it."""
    images, labels = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
            nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(6):
            for batch in torch.randperm(1200).split(64):
                loss = F.cross_entropy(net(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    net.zero_grad()
    return net.eval()
