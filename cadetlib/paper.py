"""The numbers of the CADet paper's Tables 1 to 5 and its settings, as data, to stand beside ours.

Numbers are as printed, in the printed unit; a dash is None. Rows and columns carry the names that this package uses.
Knows nothing of results, figures or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import pandas as pd

Key = str | int | bool


@dataclass(frozen=True)
class Table:
    """One table, laid out as printed: `rows` are (keys, numbers), the numbers in the order of `columns`.

    >>> TABLE_1.records()[0]
    {'test': 'ME', 'encoder': 'none', 'size': 2000, 'value': 0.588}
    """

    number: int
    title: str
    section: str
    unit: str
    row_keys: tuple[str, ...]  # names of a row's keys
    column_keys: tuple[str, ...]  # names of a column's keys
    columns: tuple[tuple[Key, ...], ...]
    rows: tuple[tuple[tuple[Key, ...], tuple[float | None, ...]], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for keys, numbers in self.rows:
            if len(numbers) != len(self.columns) or len(keys) != len(self.row_keys):
                raise ValueError(f"Table {self.number}, row {keys}: found {len(numbers)} numbers for {len(self.columns)} columns")

    def records(self) -> list[dict[str, Any]]:
        """One dict for each printed number or dash: its keys by name, and "value"."""
        names = (*self.row_keys, *self.column_keys, "value")
        return [
            dict(zip(names, (*row, *column, number), strict=True))
            for row, numbers in self.rows
            for column, number in zip(self.columns, numbers, strict=True)
        ]


TABLE_1 = Table(
    number=1,
    title="Rejection rate of CIFAR-10 against CIFAR-10.1 at alpha = 0.05, ResNet-50",
    section="4.1",
    unit="rejection rate, fraction",
    row_keys=("test", "encoder"),
    column_keys=("size",),
    columns=((2000,), (1000,), (500,), (200,), (100,), (50,)),
    rows=(
        (("ME", "none"), (0.588, None, None, None, None, None)),
        (("C2ST-L", "none"), (0.529, None, None, None, None, None)),
        (("MMD-D", "none"), (0.744, None, None, None, None, None)),
        (("MMD", "contrastive"), (1.00, 1.00, 0.997, 0.702, 0.325, 0.154)),
        (("MMD-CC", "contrastive"), (1.00, 1.00, 0.997, 0.686, 0.304, 0.150)),
        (("MMD", "supervised"), (1.00, 1.00, 0.884, 0.305, 0.135, 0.103)),
        (("MMD-CC", "supervised"), (1.00, 1.00, 0.870, 0.298, 0.131, 0.096)),
    ),
    note="ME, C2ST-L and MMD-D are quoted by the paper from Liu et al. (2020a); they learn from the samples, without an encoder.",
)

TABLE_2 = Table(
    number=2,
    title="AUROC of two-sample tests on 3 to 20 samples, ResNet-50",
    section="4.2",
    unit="percent",
    row_keys=("test", "encoder"),
    column_keys=("distribution", "size"),
    columns=tuple((name, size) for name in ("ImageNet-O", "iNaturalist", "PGD") for size in (3, 5, 10, 20)),
    rows=(
        (("MMD", "contrastive"), (64.3, 72.4, 86.9, 97.6, 88.3, 97.6, 99.5, 99.5, 35.2, 53.8, 86.6, 98.8)),
        (("MMD-CC", "contrastive"), (65.3, 73.2, 88.0, 97.7, 95.4, 99.2, 99.5, 99.5, 70.5, 84.0, 96.6, 99.5)),
        (("MMD", "supervised"), (62.7, 69.7, 83.2, 96.4, 91.8, 98.7, 99.5, 99.5, 20.0, 22.5, 33.0, 57.5)),
        (("MMD-CC", "supervised"), (62.6, 71.0, 85.5, 97.2, 98.0, 99.5, 99.5, 99.5, 57.4, 61.3, 70.5, 85.8)),
    ),
    note="The ceiling of 99.5 is 100 (1 - 0.5 / 101): an AUROC of p-values that have 101 levels, so of 100 permutations.",
)

TABLE_3 = Table(
    number=3,
    title="AUROC of out-of-distribution detection on ImageNet, ResNet-50",
    section="5.1",
    unit="percent",
    row_keys=("detector", "encoder"),
    column_keys=("distribution",),
    columns=(("iNaturalist",), ("ImageNet-O",), ("Average",)),
    rows=(
        (("MSP", "supervised"), (88.58, 56.13, 72.36)),
        (("Energy", "supervised"), (80.50, 53.95, 67.23)),
        (("ODIN", "supervised"), (86.48, 52.87, 69.68)),
        (("MaxLogit", "supervised"), (86.42, 54.39, 70.41)),
        (("KLMatching", "supervised"), (90.48, 67.00, 78.74)),
        (("ReAct", "supervised"), (87.27, 68.02, 77.65)),
        (("Mahalanobis", "supervised"), (89.48, 80.15, 84.82)),
        (("Residual", "supervised"), (84.63, 81.15, 82.89)),
        (("ViM", "supervised"), (89.26, 81.02, 85.14)),
        (("CADet", "supervised"), (95.28, 70.73, 83.01)),
        (("CADet", "contrastive"), (83.42, 82.29, 82.86)),
    ),
)

TABLE_4 = Table(
    number=4,
    title="AUROC of adversarial detection on ImageNet, ResNet-50",
    section="5.1",
    unit="percent",
    row_keys=("detector", "tuned", "encoder"),  # tuned: on adversarial images
    column_keys=("distribution",),
    columns=(("PGD",), ("CW",), ("FGSM",), ("Average",)),
    rows=(
        (("ODIN", True, "supervised"), (62.30, 60.29, 68.10, 63.56)),
        (("ODIN", True, "contrastive"), (59.91, 60.23, 64.99, 61.71)),
        (("Hu", True, "supervised"), (84.31, 84.29, 77.95, 82.18)),
        (("Hu", True, "contrastive"), (94.80, 95.19, 78.18, 89.39)),
        (("HuSelfCalibrated", False, "supervised"), (66.40, 59.58, 71.02, 65.67)),
        (("HuSelfCalibrated", False, "contrastive"), (75.69, 75.74, 69.20, 73.54)),
        (("CADet", False, "supervised"), (75.25, 71.02, 83.45, 76.57)),
        (("CADet", False, "contrastive"), (94.88, 95.93, 97.56, 96.12)),
    ),
)

TABLE_5 = Table(
    number=5,
    title="Mean and variance of m_in and m_out, contrastive ResNet-50",
    section="6.2",
    unit="cosine similarity (variances: its square)",
    row_keys=("moment", "similarity"),
    column_keys=("distribution",),
    columns=(("ImageNet",), ("iNaturalist",), ("ImageNet-O",), ("PGD",), ("CW",), ("FGSM",)),
    rows=(
        (("mean", "m_in"), (0.972, 0.967, 0.969, 0.954, 0.954, 0.948)),
        (("mean", "m_out"), (0.321, 0.296, 0.275, 0.306, 0.302, 0.311)),
        (("mean", "gamma_m_out"), (0.071, 0.066, 0.061, 0.068, 0.067, 0.069)),
        (("variance", "m_in"), (8.3e-05, 7.8e-05, 1.0e-04, 2.1e-04, 2.0e-04, 2.1e-04)),
        (("variance", "m_out"), (1.7e-03, 7.0e-04, 2.3e-03, 7.0e-04, 1.7e-03, 1.1e-03)),
    ),
)

TABLES = {table.number: table for table in (TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_5)}


@dataclass(frozen=True)
class Setting:
    """A value that the paper states, the section that states it and what it is.

    >>> SETTINGS["tau"].value, SETTINGS["tau"].section
    (0.1, '3')
    """

    value: Any
    section: str
    meaning: str


SETTINGS = {
    "optimizer": Setting("LARS", "3", "of the contrastive pretraining"),
    "learning_rate": Setting(1.2, "3", "of LARS, at its peak"),
    "momentum": Setting(0.9, "3", "of LARS"),
    "weight_decay": Setting(1e-4, "3", "of LARS"),
    "warmup_epochs": Setting(40, "3", "learning rate linear, per iteration"),
    "n_epochs": Setting(800, "3", "learning rate then follows a cosine, per iteration"),
    "tau": Setting(0.1, "3", "temperature of Eq. 1"),
    "batch_size": Setting(1024, "3", "over all devices, whose embeddings Eq. 1 shares"),
    "n_devices": Setting(8, "3", "V100 GPUs"),
    "precision": Setting("fp32", "3", "of the contrastive pretraining"),
    "blur_probability": Setting(0.5, "3", "T_train"),
    "flip_probability": Setting(0.5, "3", "T_train"),
    "jitter_probability": Setting(0.8, "3", "T_train"),
    "greyscale_probability": Setting(0.2, "3", "T_train"),
    "train_crop_scale": Setting((0.08, 1), "3", "T_train: area fraction, uniform"),
    "n_features": Setting(2048, "3", "of the encoder, ResNet-50"),
    "head_layers": Setting(3, "3", "fully connected layers of the contrastive head"),
    "head_hidden": Setting(2048, "3", "width of the head's hidden layers"),
    "head_output": Setting(128, "3", "dimensions of the head's last layer"),
    "table_1_samplings": Setting(100, "4.1", "draws of S_P1, S_P2 and S_Q in Table 1"),
    "table_1_n_perm": Setting(500, "4.1", "permutations of each test in Table 1"),
    "alpha": Setting(0.05, "4.1", "level of the tests in Table 1"),
    "table_2_samplings": Setting(5000, "4.2", "draws of S_P1 and S_P2 in Table 2"),
    "crop_scale": Setting(0.75, "5.1", "T_eval: fixed scale of the random crop"),
    "n_calibration": Setting(2000, "5.1", "images in X_val(2)"),
    "n_reference": Setting(300, "5.1", "images in X_val(1)"),
    "n_views": Setting(50, "5.1", "transformations of each image"),
    "pgd_eps": Setting(0.02, "5.1", "PGD: radius, L-infinity"),
    "pgd_step": Setting(0.002, "5.1", "PGD: step size"),
    "pgd_n_steps": Setting(50, "5.1", "PGD: iterations"),
    "cw_delta": Setting(0.10, "5.1", "CW: delta, L2"),
    "cw_learning_rate": Setting(0.03, "5.1", "CW: learning rate"),
    "cw_n_steps": Setting(50, "5.1", "CW: iterations"),
    "fgsm_eps": Setting(0.05, "5.1", "FGSM: radius, L-infinity"),
}


def _table(number: int) -> Table:
    if number not in TABLES:
        raise ValueError(f"table: found {number!r}, expected one of {', '.join(map(str, TABLES))}")
    return TABLES[number]


def table(number: int) -> pd.DataFrame:
    """Table `number`, 1 to 5, laid out as printed: keys as index and columns, dashes NaN; attrs hold title, section, unit, note.

    >>> table(3).loc[("CADet", "contrastive"), "ImageNet-O"]
    np.float64(82.29)
    """
    t = _table(number)
    if len(t.column_keys) == 1:
        columns = pd.Index([column[0] for column in t.columns], name=t.column_keys[0])
    else:
        columns = pd.MultiIndex.from_tuples(t.columns, names=t.column_keys)
    index = pd.MultiIndex.from_tuples([keys for keys, _ in t.rows], names=t.row_keys)
    frame = pd.DataFrame([numbers for _, numbers in t.rows], index=index, columns=columns, dtype=float)
    frame.attrs.update(title=t.title, section=t.section, unit=t.unit, note=t.note)
    return frame


def _nearest_first(choices: list[Any], wanted: Any) -> list[Any]:
    def distance(choice: Any) -> float:
        if isinstance(choice, int) and isinstance(wanted, int):
            return abs(choice - wanted)
        return -SequenceMatcher(None, str(choice).lower(), str(wanted).lower()).ratio()

    return sorted(choices, key=distance)


def value(number: int, **keys: Key) -> float | None:
    """The one printed number of Table `number` that has these keys, in the table's unit; None where the paper prints a dash.

    A key that the others already decide may be left out. ValueError for a key or name that the table lacks, naming its own
    nearest first, and for keys that meet no number or several.

    >>> value(3, detector="CADet", encoder="contrastive", distribution="ImageNet-O")
    82.29
    >>> value(1, test="ME", size=2000), value(1, test="ME", size=50)
    (0.588, None)
    """
    records = _table(number).records()
    names = [name for name in records[0] if name != "value"]
    for name, wanted in keys.items():
        if name not in names:
            raise ValueError(f"Table {number}: found the key {name!r}, expected {', '.join(_nearest_first(names, name))}")
        choices = list(dict.fromkeys(record[name] for record in records))
        if wanted not in choices:
            expected = ", ".join(map(repr, _nearest_first(choices, wanted)))
            raise ValueError(f"Table {number}: found {name} = {wanted!r}, expected one of (nearest first) {expected}")
    agreement = [sum(record[name] == wanted for name, wanted in keys.items()) for record in records]
    nearest = [record for record, agreed in zip(records, agreement, strict=True) if agreed == max(agreement)]
    if max(agreement) == len(keys) and len(nearest) == 1:
        return nearest[0]["value"]
    what = f"{len(nearest)} numbers with" if max(agreement) == len(keys) else "no number with all of"
    examples = "; ".join(", ".join(f"{name}={record[name]!r}" for name in names) for record in nearest[:4])
    raise ValueError(f"Table {number}: found {what} {keys}, expected keys of exactly one, such as {examples}")
