"""cadetlib.paper against the paper's text where it is at hand (CADET_PAPER names the file), and against its own arithmetic."""

from __future__ import annotations

import doctest
import inspect
import os
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from cadetlib import attacks, paper, pretrain, profiles, training_settings


@pytest.fixture(scope="module")
def text() -> str:
    path = os.environ.get("CADET_PAPER", "")
    if not Path(path).is_file():
        pytest.skip("the paper's text is not at hand: set CADET_PAPER to the file")
    return Path(path).read_text(encoding="utf-8")


# How the paper prints our names. A cell left empty repeats the one above it.
PRINTED = {
    "ME": r"^ME~",
    "C2ST-L": r"^C2ST-L~",
    "MMD-D": r"^MMD-D~",
    "MMD": r"^MMD \+",
    "MMD-CC": r"^MMD-CC \+",
    "MSP": "^MSP ",
    "Energy": "^Energy ",
    "ODIN": "^ODIN ",
    "MaxLogit": "^MaxLogit ",
    "KLMatching": "^KL Matching ",
    "ReAct": "^ReAct ",
    "Mahalanobis": "^Mahalanobis ",
    "Residual": "^Residual ",
    "ViM": "^ViM ",
    "CADet": r"^CADet \(ours\)",
    "Hu": r"^Hu \(Hu et al., 2019\)$",
    "HuSelfCalibrated": r"\+ self-calibration$",
    "mean": "^Mean$",
    "variance": "^Var$",
    "m_in": r"^m\^{in}$",
    "m_out": r"^m\^{out}$",
    "gamma_m_out": r"^γm\^{out}$",
}


def lines_of_table(text: str, number: int) -> list[list[str]]:
    """The cells of Table `number`, line by line: what is divided by tabs after its caption."""
    after = text[re.search(rf"^Table {number}: ", text, re.M).end() :].split("\n")[1:]
    block = iter(after)
    lines = []
    for line in block:
        if "\t" in line:
            lines.append(line.split("\t"))
        elif lines:
            return lines
    raise AssertionError(f"no end of Table {number}")


def split_labels(cells: list[str]) -> tuple[list[str], list[float | None]]:
    is_number = [bool(re.fullmatch(r"-|\d+\.\d+(e-\d+)?", cell)) for cell in cells]
    first = is_number.index(True) if True in is_number else len(cells)
    return cells[:first], [None if cell == "-" else float(cell) for cell in cells[first:] if is_number[first]]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_every_number_is_as_printed(text, number):
    table = paper.TABLES[number]
    lines = [split_labels(cells) for cells in lines_of_table(text, number)]
    body = [(labels, numbers) for labels, numbers in lines if numbers]
    assert [numbers for _, numbers in body] == [list(numbers) for _, numbers in table.rows]
    last = [""] * len(body[0][0])
    for (labels, _), (keys, _) in zip(body, table.rows, strict=True):
        last = [new or old for new, old in zip(labels, last, strict=True)]
        named = dict(zip(table.row_keys, keys, strict=True))
        for name in ("test", "detector", "moment", "similarity"):
            if name in named:
                assert any(re.search(PRINTED[named[name]], label) for label in last), (named, last)
        if number in (1, 2) and named["encoder"] != "none":
            assert last[0].split(" + ")[1].startswith({"contrastive": "SimCLRv2", "supervised": "Supervised"}[named["encoder"]])
        if number == 4:
            assert (last[1] == "Yes") is named["tuned"] and last[2].lower() == named["encoder"]
        if number == 3:  # one merged cell for the first rows, whose word stands beside one of them
            assert named["encoder"] in (labels[1] or "Supervised").lower()


def test_columns_are_as_printed(text):
    headers = {number: lines_of_table(text, number)[:2] for number in paper.TABLES}
    assert headers[1][0][1:] == [f"n={size}" for (size,) in paper.TABLE_1.columns]
    assert [cell for cell in headers[2][0][1:] if cell] == list(dict.fromkeys(name for name, _ in paper.TABLE_2.columns))
    assert headers[2][1][1:] == [str(size) for _, size in paper.TABLE_2.columns]
    assert headers[3][0][2:] == [name for (name,) in paper.TABLE_3.columns]
    assert headers[4][0][3:] == [name for (name,) in paper.TABLE_4.columns]
    short = {"ImageNet": "IN-1K", "iNaturalist": "iNat", "ImageNet-O": "IN-O"}
    assert headers[5][0][2:] == [short.get(name, name) for (name,) in paper.TABLE_5.columns]


# Where the paper says each setting: {} is its number.
SAID = {
    "optimizer": "the {} optimizer",
    "learning_rate": "learning rate {}",
    "momentum": "momentum {}",
    "weight_decay": "weight decay {}",
    "warmup_epochs": "for the first {} epochs linearly",
    "n_epochs": "until epoch {}",
    "tau": r"$\tau = {}$",
    "batch_size": "batch size of {}",
    "n_devices": "on {} V100 GPUs",
    "precision": "{} precision",
    "blur_probability": "Gaussian blur and horizontal flip with\n\nprobability {}",
    "flip_probability": "Gaussian blur and horizontal flip with\n\nprobability {}",
    "jitter_probability": "color jittering with probability {}",
    "greyscale_probability": "grayscale with probability {}",
    "train_crop_scale": "scale uniformly sampled in ${}$",
    "n_features": "final features of size {}",
    "head_layers": "{} fully connected",
    "head_hidden": "hidden layers of width {}",
    "head_output": "last layer projection to dimension {}",
    "table_1_samplings": "for {} different samplings",
    "table_1_n_perm": "$n_{perm} = {}$",
    "alpha": r"$\alpha = {}$",
    "table_2_samplings": "{} times across all of ImageNet",
    "crop_scale": "random crop scale to {}",
    "n_calibration": r"$|\{X_{val}^{(2)}\}| = {}$ in-distribution",
    "n_reference": r"$|\{X_{val}^{(1)}\}| = {}$ separate",
    "n_views": "{} transformations per sample",
    "pgd_eps": r"PGD: norm L_∞ , $\delta = {}$",
    "pgd_step": "step size {},",
    "pgd_n_steps": "step size 0.002, {} iterations",
    "cw_delta": r"CW: norm L_2 , $\delta = {}$",
    "cw_learning_rate": "learning rate of {},",
    "cw_n_steps": "0.03, and {} iterations",
    "fgsm_eps": r"FGSM: norm L_∞ , $\delta = {}$",
}
AS_PRINTED = {"weight_decay": "10^{-4}", "cw_delta": "0.10", "train_crop_scale": "[0.08, 1]", "head_layers": "three-layer"}


@pytest.mark.parametrize("name", paper.SETTINGS)
def test_every_setting_is_said_in_its_section(text, name):
    setting = paper.SETTINGS[name]
    starts = {m[1]: m.start() for m in re.finditer(r"^(\d(?:\.\d)?) [A-Z][^\n]*[a-z]$", text, re.M)}
    own = starts[setting.section]
    section = text[own : min(start for start in starts.values() if start > own)]
    assert SAID[name].replace("{}", AS_PRINTED.get(name, str(setting.value)), 1) in section


def printed_mean(numbers: list[float]) -> Decimal:
    exact = [Decimal(str(v)) for v in numbers]
    return (sum(exact) / len(exact)).quantize(Decimal("0.01"), ROUND_HALF_UP)


@pytest.mark.parametrize("number", [3, 4])
def test_averages_are_means_of_their_rows(number):
    frame = paper.table(number)
    for row, numbers in zip(frame.index, frame.to_numpy().tolist(), strict=True):
        assert printed_mean(numbers[:-1]) == Decimal(str(numbers[-1])), row


PARAMETERS = {  # the paper's setting -> the notebooks that have it, and its name there; the head has three layers by its code
    "01": "optimizer learning_rate momentum weight_decay warmup_epochs n_epochs=epochs tau batch_size n_devices=processes "
    "precision=dtype blur_probability=blur flip_probability=flip jitter_probability=jitter greyscale_probability=greyscale "
    "train_crop_scale=crop_scale head_hidden head_output=head_dim",
    "02": "table_1_samplings=n_samplings table_1_n_perm=n_perm alpha",
    "03": "table_2_samplings=n_draws pgd_eps pgd_step pgd_n_steps fgsm_eps",
    "04": "crop_scale n_calibration n_reference n_views pgd_eps pgd_step pgd_n_steps fgsm_eps cw_delta=cw_l2_c "
    "cw_delta=cw_l2_ball_eps cw_delta=cw_linf_eps "
    "cw_n_steps=cw_l2_n_steps cw_n_steps=cw_l2_ball_n_steps cw_n_steps=cw_linf_n_steps",
    "05": "n_views=crop_n_views",
}


@pytest.mark.parametrize("profile", ["imagenet", "imagenet-pretrained"])
def test_the_profile_has_the_papers_settings(profile):
    as_we_say = {"LARS": "lars", "fp32": "float32", (0.08, 1): [0.08, 1.0]}
    given, asked = {n.number: n.parameters for n in profiles.notebooks_of(profile)}, set()
    for number, names in PARAMETERS.items():
        for name, _, ours in (entry.partition("=") for entry in names.split()):
            value = paper.SETTINGS[name].value
            assert given[number][ours or name] == as_we_say.get(value, value), f"{number}: {name}"
            asked.add(name)
    # The rest is said otherwise: the encoder's features by its width, the head's layers by the code, CW's step by its default.
    assert set(paper.SETTINGS) - asked == {"n_features", "head_layers", "cw_learning_rate"}
    settings = training_settings.settings_from(given["01"])
    model = pretrain.make_model(settings, 1)
    assert model.encoder.dim == paper.SETTINGS["n_features"].value
    assert sum(isinstance(layer, nn.Linear) for layer in model.head.modules()) == paper.SETTINGS["head_layers"].value
    for attack in (attacks.cw_l2, attacks.cw_l2_ball, attacks.cw_linf):
        assert inspect.signature(attack).parameters["lr"].default == paper.SETTINGS["cw_learning_rate"].value


def test_ceiling_of_table_2_is_that_of_p_values_of_100_permutations():
    assert paper.table(2).to_numpy().max() == round(100 * (1 - 0.5 / 101), 1)


def test_one_gamma_explains_table_5():
    frame = paper.table(5)
    from_means = frame.loc[("mean", "gamma_m_out")] / frame.loc[("mean", "m_out")]
    variance = frame.loc["variance", "ImageNet"]
    gamma = np.sqrt(variance["m_in"] / variance["m_out"])  # Eq. 7
    assert round(gamma, 3) == round(from_means["ImageNet"], 3) == 0.221
    possible = [
        (bound + sign * 0.0005) / (mean - sign * 0.0005)
        for sign in (-1, 1)
        for bound, mean in zip(frame.loc[("mean", "gamma_m_out")], frame.loc[("mean", "m_out")], strict=True)
    ]
    assert max(possible[:6]) < gamma < min(possible[6:])  # within the printed rounding of every column


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_value_and_table_agree_on_every_number(number):
    frame, records = paper.table(number), paper.TABLES[number].records()
    flat = frame.to_numpy().ravel().tolist()
    assert len(flat) == len(records)
    for record, cell in zip(records, flat, strict=True):
        found = paper.value(number, **{name: key for name, key in record.items() if name != "value"})
        assert found == record["value"] and (np.isnan(cell) if found is None else cell == found)
    assert frame.attrs["unit"] and frame.attrs["section"]


@pytest.mark.parametrize(
    ("number", "keys", "message"),
    [
        (6, {}, "table: found 6, expected one of 1, 2, 3, 4, 5"),
        (3, {"detektor": "CADet"}, "found the key 'detektor', expected detector,"),
        (3, {"detector": "KL Matching"}, r"found detector = 'KL Matching', expected one of \(nearest first\) 'KLMatching'"),
        (1, {"test": "MMD", "size": 2001}, r"found size = 2001, expected one of \(nearest first\) 2000"),
        (3, {"detector": "CADet", "distribution": "iNaturalist"}, "found 2 numbers with .* encoder='contrastive'"),
        (3, {"detector": "ViM", "encoder": "contrastive", "distribution": "Average"}, "found no number with .*detector='ViM'"),
    ],
)
def test_keys_that_meet_no_single_number_are_named(number, keys, message):
    with pytest.raises(ValueError, match=message):
        paper.value(number, **keys)


def test_examples_in_docstrings():
    assert doctest.testmod(paper).failed == 0
