"""The paper's tables from our rows, ours beside the paper's: data frames of text for notebooks, layouts for the report.

The images differ from the paper's except in the imagenet profile, so a table says what stands where, and a verdict compares
kinds of anomaly and not the same images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from cadetlib import attack_study, paper
from cadetlib.experiments import IN_DISTRIBUTION

Row = Mapping[str, Any]
PAPER_ATTACKS = {"FGSM": "FGSM", "PGD": "PGD", "CW-L2": "CW", "CW-L2-ball": "CW", "CW-Linf": "CW"}
UNSEEN = ("iNaturalist", "ImageNet-O")
PAPER_N_PERM = 100  # splits per test behind Table 2, whose ceiling is 1 - 0.5 / 101


def percent(row: Row) -> str:
    """AUROC in percent with its interval: "94.3 [92.1, 96.0]".

    >>> percent(dict(auroc=0.943, low=0.921, high=0.96))
    '94.3 [92.1, 96.0]'
    """
    return f"{100 * row['auroc']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def share(row: Row) -> str:
    """A rejection rate with its interval: "0.32 [0.23, 0.42]".

    >>> share(dict(rate=0.32, low=0.23, high=0.42))
    '0.32 [0.23, 0.42]'
    """
    return f"{row['rate']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _wide(cells: Iterable[tuple[Any, Any, str]], index: Sequence[str]) -> pd.DataFrame:
    """(row key, column, text) in order of appearance -> a data frame with empty text where there is no cell."""
    texts = {(row, column): text for row, column, text in cells}
    rows, columns = (list(dict.fromkeys(key[i] for key in texts)) for i in (0, 1))
    body = [[texts.get((row, column), "") for column in columns] for row in rows]
    return pd.DataFrame(body, index=pd.MultiIndex.from_tuples(rows, names=list(index)), columns=columns)


def table_1(rows: Sequence[Row]) -> pd.DataFrame:
    """Rejection rates by test, encoder and shift over sample sizes; the paper's below ours.

    >>> frame = table_1([dict(test="MMD", encoder="contrastive", shift="jpeg", n=50, rate=0.32, low=0.23, high=0.42)])
    >>> frame["n = 50"].to_dict()[("MMD", "contrastive", "jpeg")]
    '0.32 [0.23, 0.42]'
    """
    ours = [((r["test"], r["encoder"], r["shift"]), f"n = {r['n']}", share(r)) for r in rows]
    theirs = [
        ((r["test"], r["encoder"], "paper: CIFAR-10.1"), f"n = {r['size']}", f"{r['value']:.3g}")
        for r in paper.TABLE_1.records()
        if r["value"] is not None
    ]
    return _wide([*ours, *theirs], ("test", "encoder", "S_Q"))


def table_2(rows: Sequence[Row]) -> pd.DataFrame:
    """AUROC (%) of the tests' p-values by test, encoder, anomaly and number of splits, over n; the paper's below ours.

    >>> row = dict(test="MMD", encoder="contrastive", anomaly="PGD", n=3, n_perm=500, auroc=0.4, low=0.3, high=0.5)
    >>> frame = table_2([row])
    >>> [frame.loc[("MMD", "contrastive", what), "n = 3"] for what in ("PGD, 500 permutations", "paper: PGD")]
    ['40.0 [30.0, 50.0]', '35.2']
    """
    ours = [((r["test"], r["encoder"], _permuted(r)), f"n = {r['n']}", percent(r)) for r in rows]
    theirs = [
        ((r["test"], r["encoder"], f"paper: {r['distribution']}"), f"n = {r['size']}", f"{r['value']:.1f}")
        for r in paper.TABLE_2.records()
    ]
    return _wide([*ours, *theirs], ("test", "encoder", "anomaly"))


def table_2_details(rows: Sequence[Row]) -> pd.DataFrame:
    """What Table 2 leaves out: AUPR and FPR at 95 % TPR of the same p-values, half of the draws anomalous.

    >>> row = dict(test="MMD", encoder="contrastive", anomaly="PGD", n=3, n_perm=100, aupr=0.45, fpr95=0.9)
    >>> table_2_details([row]).loc[("MMD", "contrastive", "PGD"), "n = 3"]
    'AUPR 0.450, FPR95 0.900'
    """
    cells = [
        ((r["test"], r["encoder"], _permuted(r)), f"n = {r['n']}", f"AUPR {r['aupr']:.3f}, FPR95 {r['fpr95']:.3f}") for r in rows
    ]
    return _wide(cells, ("test", "encoder", "anomaly"))


def _permuted(row: Row) -> str:
    """An anomaly, with the number of permutations behind the p-values where it is not the paper's."""
    return row["anomaly"] if row["n_perm"] == PAPER_N_PERM else f"{row['anomaly']}, {row['n_perm']} permutations"


def paper_value(detector: str, encoder: str, anomaly: str) -> tuple[float | None, str]:
    """The paper's AUROC (%) for the nearest kind of anomaly, and what it is of; None where the paper has no such cell.

    Attacks are compared by name, and so are the paper's two sets of unseen classes; any other set is one of unseen classes,
    beside the mean of the paper's two.

    >>> paper_value("CADet", "contrastive", "CW-Linf")
    (95.93, 'CW')
    >>> paper_value("kNN", "contrastive", "PGD")
    (None, '')
    """
    names = counterparts(anomaly)
    table = paper.TABLE_4 if anomaly in PAPER_ATTACKS else paper.TABLE_3
    found = [
        r["value"]
        for r in table.records()
        if (_printed_system(r), r["encoder"]) == (detector, encoder) and r["distribution"] in names
    ]
    return (sum(found) / len(found), " and ".join(names)) if found else (None, "")


def _printed_system(record: Row) -> str:
    """A row of the paper's under our name for it: Table 4 tunes ODIN and Hu et al.'s detector on the attacks."""
    return f"{record['detector']} tuned" if record.get("tuned") else str(record["detector"])


def counterparts(anomaly: str) -> tuple[str, ...]:
    """The paper's sets nearest to one of ours; none for in-distribution images after a corruption, which it does not have.

    >>> counterparts("CW-Linf"), counterparts("imagenet-o"), counterparts("inaturalist-plants")
    (('CW',), ('ImageNet-O',), ('iNaturalist',))
    >>> counterparts("digits-7-to-9"), counterparts("cifar10-test:jpeg-3")
    (('iNaturalist', 'ImageNet-O'), ())
    """
    if ":" in anomaly:
        return ()
    if anomaly in PAPER_ATTACKS:
        return (PAPER_ATTACKS[anomaly],)
    return tuple(name for name in UNSEEN if anomaly.lower().startswith(name.lower())) or UNSEEN


def table_3_and_4(rows: Sequence[Row]) -> pd.DataFrame:
    """AUROC (%) by detector and encoder over anomaly sets; below each of ours the paper's for the nearest kind of anomaly.

    >>> row = dict(detector="CADet", encoder="contrastive", anomaly="PGD", auroc=0.9, low=0.8, high=0.95)
    >>> table_3_and_4([row])["PGD"].to_dict()
    {('CADet', 'contrastive', 'ours'): '90.0 [80.0, 95.0]', ('CADet', 'contrastive', 'paper'): '94.9'}
    """
    cells: list[tuple[Any, Any, str]] = []
    for detector, encoder in dict.fromkeys((r["detector"], r["encoder"]) for r in rows):
        own = [r for r in rows if (r["detector"], r["encoder"]) == (detector, encoder)]
        cells += [((detector, encoder, "ours"), r["anomaly"], percent(r)) for r in own]
        theirs = [(r["anomaly"], paper_value(detector, encoder, r["anomaly"])[0]) for r in own]
        cells += [((detector, encoder, "paper"), name, f"{value:.1f}") for name, value in theirs if value is not None]
    return _wide(cells, ("detector", "encoder", ""))


def to_cadet(row: Row) -> str:
    """How a system stands to CADet on the same images: "+1.2 [0.3, 2.1]", in percentage points of AUROC; "" for CADet itself.

    >>> to_cadet(dict(over_cadet=-0.012, over_cadet_low=-0.03, over_cadet_high=0.006)), to_cadet(dict(detector="CADet"))
    ('−1.2 [−3.0, +0.6]', '')
    """
    if "over_cadet" not in row:
        return ""
    value, low, high = (f"{100 * row[f'over_cadet{end}']:+.1f}".replace("-", "−") for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def details(rows: Sequence[Row]) -> pd.DataFrame:
    """All that Tables 3 and 4 leave out: AUPR, FPR at 95 % TPR, the difference to CADet, seconds and passes per image.

    Last the AUROC on images that the victim got right against attacks that fooled it, with the numbers of both.

    >>> row = dict(detector="MSP", encoder="supervised", anomaly="PGD", auroc=0.6, low=0.5, high=0.7, aupr=0.55, fpr95=0.9)
    >>> frame = details([row | dict(seconds=0.002, forwards=1.0, n_in=100, n_out=50)])
    >>> frame.loc[("PGD", "MSP", "supervised"), ["FPR95", "ms / image", "images"]].tolist()
    ['0.900', '2', '100 + 50']
    """
    lines = [
        {
            "AUROC (%)": percent(row),
            "AUPR": f"{row['aupr']:.3f}",
            "FPR95": f"{row['fpr95']:.3f}",
            "AUROC − CADet's": to_cadet(row),
            "ms / image": f"{1000 * row['seconds']:.3g}",
            "passes / image": f"{row['forwards']:.4g}",
            "images": f"{row['n_in']} + {row['n_out']}",
            "AUROC (%), attacks that fooled": _successful(row),
        }
        for row in rows
    ]
    keys = [(row["anomaly"], row["detector"], row["encoder"]) for row in rows]
    index = pd.MultiIndex.from_tuples(keys, names=["anomaly", "detector", "encoder"])
    return pd.DataFrame(lines, index=index).sort_index(level="anomaly", sort_remaining=False)


def _successful(row: Row) -> str:
    """AUROC on the images that published programs count, and how many these are; empty where there is no attack."""
    if "auroc_successful" not in row:
        return ""
    found = {key: row[f"{key}_successful"] for key in ("auroc", "low", "high", "n_in", "n_out")}
    return f"{percent(found)}, {found['n_in']} + {found['n_out']}"


def precision(rows: Sequence[Row]) -> pd.DataFrame:
    """What half precision does to scores: differences to float32 in units of each similarity's spread over images.

    >>> row = dict(dtype="bfloat16", m_in_mean=0.006, m_in_largest=0.025, m_out_mean=0.002, m_out_largest=0.015, forward_ms=6.3)
    >>> frame = precision([row | dict(score_mean=0.01, score_largest=0.03, rank=0.99983, p_value_largest=0.0196)])
    >>> frame.loc["bfloat16", ["m_in: mean", "rank", "ms / view"]].tolist()
    ['0.006', '0.99983', '6.3']
    """
    names = ("m_in", "m_out", "score")
    lines = [
        {f"{name}: {which}": f"{row[f'{name}_{which}']:.2g}" for name in names for which in ("mean", "largest")}
        | {
            "rank": f"{row['rank']:.5f}",
            "p-value: largest change": f"{row['p_value_largest']:.2g}",
            "ms / view": f"{row['forward_ms']:.3g}",
        }
        for row in rows
    ]
    return pd.DataFrame(lines, index=pd.Index([row["dtype"] for row in rows], name="forward passes"))


def attacks_seen(rows: Sequence[Row], encoder: str) -> list[str]:
    """A paragraph for each attack of notebook 05's study: what is seen of it in the common setting, and in the three best.

    rows: of `attack_study.Study.rows`, for several factors, among them "encoder", whose value `encoder` is the common setting.
    The best settings were found by looking at attacks, and are no promise.

    >>> here, near = (dict(factor="encoder", value="contrastive"), dict(factor="area of a view", value=0.9))
    >>> rows = [here | dict(anomaly=name, auroc=0.5, low=0.4, high=0.6) for name in ("PGD", attack_study.CONTROL)]
    >>> rows += [near | dict(anomaly=name, auroc=0.7, low=0.6, high=0.8) for name in ("PGD", attack_study.CONTROL)]
    >>> print(*attacks_seen(rows, "contrastive"))
    PGD: 50.0 [40.0, 60.0], not seen (the paper, on ImageNet: 94.9). Of 2 settings it is seen as an attack in 0, as noise in 1:
      70.0 [60.0, 80.0], seen as noise: area of a view 0.9
    """
    by_attack: dict[str, dict[tuple[str, Any], Row]] = {}
    for row in rows:
        by_attack.setdefault(row["anomaly"], {})[row["factor"], row["value"]] = row
    here, signs = ("encoder", encoder), by_attack.pop(attack_study.CONTROL)
    paragraphs = []
    for name, own in by_attack.items():
        # Random signs have no victim: where only the victim differs they are those of the common setting.
        seen = {place: attack_study.how_seen(row, signs.get(place, signs[here])) for place, row in own.items()}
        once = {(row["auroc"], row["low"], row["high"]): place for place, row in own.items()}  # the common one is of many factors
        counts = Counter(seen[place] for place in once.values())
        printed = paper_value("CADet", "contrastive", name)[0]
        paragraph = (
            f"{name}: {percent(own[here])}, {seen[here]} (the paper, on ImageNet: {printed:.1f}). Of {len(once)} settings it is "
            f"seen as an attack in {counts['seen as an attack']}, as noise in {counts['seen as noise']}:"
        )
        best = sorted(once.values(), key=lambda place: -own[place]["auroc"])[:3]
        lines = [f"  {percent(own[place])}, {seen[place]}: {place[0]} {place[1]}" for place in best if seen[place] != "not seen"]
        paragraphs.append("\n".join([paragraph, *lines]))
    return paragraphs


def draws(rows: Sequence[Row]) -> pd.DataFrame:
    """What the draw of each kind of image moves (`questions.by_draw`): percentage points of AUROC, by set and encoder.

    >>> row = dict(anomaly="PGD", encoder="contrastive", reference=0.014, calibration=0.003, test=0.013)
    >>> draws([row | dict(n_reference=200, n_calibration=500, n_test=300)]).loc[("PGD", "contrastive")].tolist()
    [1.4, 0.3, 1.3]
    """
    kinds = {f"{kind} ({rows[0][f'n_{kind}']})": kind for kind in ("reference", "calibration", "test")}
    cells = [
        {"anomaly": r["anomaly"], "encoder": r["encoder"]}
        | {k: float("nan") if r[v] is None else 100 * r[v] for k, v in kinds.items()}
        for r in rows
    ]
    return pd.DataFrame(cells).set_index(["anomaly", "encoder"]).sort_index(level=0, sort_remaining=False).round(1)


def table_5(columns: Mapping[str, Row]) -> pd.DataFrame:
    """Mean and variance of m_in and m_out for each set, with intervals, in the paper's layout; set -> moments.

    The last line is γ with its range over splits. Older results, which lack intervals or γ, are shown without.

    >>> column = dict(mean_m_in=0.95, mean_m_out=0.3, mean_gamma_m_out=0.07, variance_m_in=2e-4, variance_m_out=1e-3)
    >>> frame = table_5({"PGD": column})
    >>> frame.loc[("mean", "m_in"), "PGD"], frame.loc[("variance", "m_in"), "PGD"]
    ('0.950', '2.0e-04')
    """
    lines = {
        ("mean", "m_in"): "mean_m_in",
        ("mean", "m_out"): "mean_m_out",
        ("mean", "γ m_out"): "mean_gamma_m_out",
        ("variance", "m_in"): "variance_m_in",
        ("variance", "m_out"): "variance_m_out",
        ("weight", "γ"): "gamma",
    }
    shown = {place: key for place, key in lines.items() if all(key in row for row in columns.values())}
    body = [[_moment(row, key) for row in columns.values()] for key in shown.values()]
    return pd.DataFrame(body, index=pd.MultiIndex.from_tuples(shown), columns=list(columns))


def _moment(row: Row, key: str) -> str:
    """A value of Table 5 with its interval, where it has one: "0.954 [0.951, 0.957]".

    >>> _moment(dict(mean_m_in=0.954, variance_m_in=2.1e-4, variance_m_in_low=1.9e-4, variance_m_in_high=2.4e-4), "variance_m_in")
    '2.1e-04 [1.9e-04, 2.4e-04]'
    """
    form = ".1e" if key.startswith("variance") else ".3f"
    interval = f" [{row[f'{key}_low']:{form}}, {row[f'{key}_high']:{form}}]" if f"{key}_low" in row else ""
    return f"{row[key]:{form}}{interval}"


def verdict(row: Row, value: float | None) -> str:
    """How our AUROC stands to the paper's: "above", "below", "agrees" (inside our interval), or "no counterpart".

    >>> row = dict(auroc=0.9, low=0.85, high=0.95)
    >>> verdict(row, 94.9), verdict(row, 80.0), verdict(row, 97.0), verdict(row, None)
    ('agrees', 'above', 'below', 'no counterpart')
    """
    if value is None:
        return "no counterpart"
    if row["low"] <= value / 100 <= row["high"]:
        return "agrees"
    return "above" if row["auroc"] > value / 100 else "below"


# --- layouts: what the report's page sets -------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A number as text, its interval, and a word on it.

    >>> Cell("94.3", interval="[92.1, 96.0]").text, Cell().text
    ('94.3', '–')
    """

    text: str = "–"
    interval: str = ""
    note: str = ""


class Line(NamedTuple):
    """A row: its label, a word on it, and its cells, column by column.

    >>> Line("MSP, supervised", note="not run here", cells=[Cell(), Cell("88.6")]).label
    'MSP, supervised'
    """

    label: str
    note: str
    cells: list[Cell]


class Layout(NamedTuple):
    """A table to be set: groups of columns, each a heading and its columns' names, over lines.

    >>> layout = beside("AUROC (%)", "detector", {"here": {("CADet", "PGD"): Cell("90.0")}})
    >>> layout.groups, [line.label for line in layout.lines]
    ([('here', ['PGD'])], ['CADet'])
    """

    caption: str
    corner: str  # what the labels are
    groups: list[tuple[str, list[str]]]
    lines: list[Line]


Cells = Mapping[tuple[str, str], Cell]  # (label, column) -> cell


def beside(caption: str, corner: str, groups: Mapping[str, Cells], order: Sequence[str] = ()) -> Layout:
    """Groups of cells side by side, ours first; labels in the `order` given, then as they come. A gap says that it is one.

    >>> ours, theirs = {("CADet", "PGD"): Cell("90.0")}, {("CADet", "PGD"): Cell("94.9"), ("Hu", "PGD"): Cell("84.3")}
    >>> layout = beside("AUROC (%)", "detector", {"here": ours, "paper": theirs})
    >>> [(line.label, [cell.text for cell in line.cells], line.note) for line in layout.lines]
    [('CADet', ['90.0', '94.9'], ''), ('Hu', ['–', '84.3'], 'not run here')]
    """
    known = dict.fromkeys(label for cells in groups.values() for label, _ in cells)
    labels = [label for label in dict.fromkeys([*order, *known]) if label in known]
    columns = {name: list(dict.fromkeys(column for _, column in cells)) for name, cells in groups.items()}
    ours = {label for label, _ in next(iter(groups.values()))}
    lines = [
        Line(
            label,
            "" if label in ours else "not run here",
            [cells.get((label, column), Cell()) for name, cells in groups.items() for column in columns[name]],
        )
        for label in labels
    ]
    return Layout(caption, corner, [(name, found) for name, found in columns.items() if found], lines)


def _cell(text: str, note: str = "") -> Cell:
    """ "94.3 [92.1, 96.0]" -> the number and its interval apart."""
    number, _, interval = text.partition(" ")
    return Cell(number, interval, note)


def _system(name: str, encoder: str) -> str:
    return name if encoder == "none" else f"{name}, {encoder}"


def _labels(table: paper.Table) -> list[str]:
    name = _printed_system if "detector" in table.row_keys else lambda r: str(r["test"])
    return [_system(name(r), r["encoder"]) for r in table.records()]


def table_1_layouts(rows: Sequence[Row]) -> list[Layout]:
    """Table 1, a layout for each shift, ours beside the paper's; "no shift", which the paper leaves out, stands alone.

    >>> row = dict(test="MMD", encoder="contrastive", shift="jpeg", n=50, rate=0.32, low=0.23, high=0.42)
    >>> [[name for name, _ in layout.groups] for layout in table_1_layouts([row, row | dict(shift="no shift")])]
    [['here: jpeg', 'paper: CIFAR-10.1'], ['here: no shift']]
    """
    theirs = {
        (_system(r["test"], r["encoder"]), f"n = {r['size']}"): Cell(f"{r['value']:.3f}")
        for r in paper.TABLE_1.records()
        if r["value"] is not None
    }
    layouts = []
    for shift in dict.fromkeys(r["shift"] for r in rows):
        ours = {(_system(r["test"], r["encoder"]), f"n = {r['n']}"): _cell(share(r)) for r in rows if r["shift"] == shift}
        groups: dict[str, Cells] = {f"here: {shift}": ours}
        if shift != "no shift":
            groups["paper: CIFAR-10.1"] = theirs
        layouts.append(beside(f"Rejection rate, {shift}", "test, encoder", groups, _labels(paper.TABLE_1)))
    return layouts


def paper_n_perm(rows: Sequence[Row]) -> list[Row]:
    """Table 2's rows with the paper's number of splits, or with the smallest there is: one for each cell.

    >>> [row["n_perm"] for row in paper_n_perm([dict(n_perm=100), dict(n_perm=500)])]
    [100]
    """
    fewest = min((r["n_perm"] for r in rows), default=0)
    return [r for r in rows if r["n_perm"] == (PAPER_N_PERM if any(q["n_perm"] == PAPER_N_PERM for q in rows) else fewest)]


def table_2_layouts(rows: Sequence[Row]) -> list[Layout]:
    """Table 2, a layout for each of our kinds of anomaly, beside the paper's nearest.

    >>> row = dict(test="MMD", encoder="contrastive", anomaly="PGD", n=3, n_perm=100, auroc=0.4, low=0.3, high=0.5)
    >>> [[name for name, _ in layout.groups] for layout in table_2_layouts([row])]
    [['here: PGD', 'paper: PGD']]
    """
    layouts = []
    for anomaly in dict.fromkeys(r["anomaly"] for r in rows):
        ours = {
            (_system(r["test"], r["encoder"]), f"n = {r['n']}"): _cell(percent(r))
            for r in paper_n_perm(rows)
            if r["anomaly"] == anomaly
        }
        groups: dict[str, Cells] = {f"here: {anomaly}": ours}
        for name in dict.fromkeys(str(name) for name, _ in paper.TABLE_2.columns if name in counterparts(anomaly)):
            theirs = [r for r in paper.TABLE_2.records() if r["distribution"] == name]
            cells = {(_system(r["test"], r["encoder"]), f"n = {r['size']}"): Cell(f"{r['value']:.1f}") for r in theirs}
            groups[f"paper: {name}"] = cells
        layouts.append(beside(f"AUROC (%), {anomaly}", "test, encoder", groups, _labels(paper.TABLE_2)))
    return layouts


def table_2_details_layouts(rows: Sequence[Row]) -> list[Layout]:
    """`table_2_details` for the report, with the number of splits of the paper.

    >>> row = dict(test="MMD", encoder="contrastive", anomaly="PGD", n=3, n_perm=100, aupr=0.45, fpr95=0.9)
    >>> [layout] = table_2_details_layouts([row])
    >>> [cell.text for cell in layout.lines[0].cells]
    ['45.0', '90.0']
    """
    chosen = paper_n_perm(rows)
    return [
        beside(
            f"AUPR and FPR at 95 % TPR (%), {anomaly}",
            "test, encoder",
            {
                heading: {
                    (_system(r["test"], r["encoder"]), f"n = {r['n']}"): Cell(f"{100 * r[key]:.1f}")
                    for r in chosen
                    if r["anomaly"] == anomaly
                }
                for key, heading in (("aupr", "AUPR"), ("fpr95", "FPR at 95 % TPR"))
            },
        )
        for anomaly in dict.fromkeys(r["anomaly"] for r in rows)
    ]


def detection_layout(rows: Sequence[Row], number: int, judged: bool = True) -> Layout:
    """Table 3 (unseen classes) or 4 (attacks): AUROC (%) of ours, each with its verdict if `judged`, beside the paper's table.

    >>> row = dict(detector="CADet", encoder="contrastive", anomaly="PGD", auroc=0.9, low=0.8, high=0.95)
    >>> line = next(line for line in detection_layout([row], number=4).lines if line.label == "CADet, contrastive")
    >>> line.cells[0], line.cells[1].text
    (Cell(text='90.0', interval='[80.0, 95.0]', note='agrees'), '94.88')
    """
    table = paper.TABLES[number]
    printed = [column[0] for column in table.columns]
    own = [r for r in rows if (r["anomaly"] in PAPER_ATTACKS) == (number == 4)]
    own.sort(key=lambda r: min((printed.index(name) for name in counterparts(r["anomaly"])), default=len(printed)))
    ours = {(_system(r["detector"], r["encoder"]), r["anomaly"]): _cell(percent(r), _note(r) if judged else "") for r in own}
    theirs = {
        (_system(_printed_system(r), r["encoder"]), r["distribution"]): Cell(f"{r['value']:.2f}")
        for r in table.records()
        if r["value"] is not None
    }
    kind = "attacks" if number == 4 else "unseen classes"
    return beside(f"AUROC (%), {kind}", "detector, encoder", {"here": ours, "paper: ImageNet": theirs}, _labels(table))


def _note(row: Row) -> str:
    """The verdict beside the paper's number, where there is one, and on which side of CADet it is, where that is sure."""
    value = paper_value(row["detector"], row["encoder"], row["anomaly"])[0]
    against = verdict(row, value)
    notes = [] if value is None else [against if against == "agrees" else f"{against} the paper"]
    if row.get("over_cadet_low", 0) > 0:
        notes.append("beats CADet")
    if row.get("over_cadet_high", 0) < 0:
        notes.append("below CADet")
    return ", ".join(notes)


def cost_layout(rows: Sequence[Row]) -> Layout:
    """What a system asks for an image: passes through the network and milliseconds, and how it ranks by mean AUROC.

    >>> row = dict(detector="MSP", encoder="supervised", auroc=0.6, aupr=0.55, fpr95=0.9, seconds=0.002, forwards=1.0)
    >>> layout = cost_layout([row, row | dict(auroc=0.8)])
    >>> dict(zip(layout.groups[0][1], [cell.text for cell in layout.lines[0].cells], strict=True))["mean AUROC (%)"]
    '70.0'
    """
    systems: dict[str, list[Row]] = {}
    for row in rows:
        systems.setdefault(_system(row["detector"], row["encoder"]), []).append(row)
    cells: dict[tuple[str, str], Cell] = {}
    for system, own in systems.items():
        cells[system, "passes per image"] = Cell(f"{own[0]['forwards']:.4g}")
        cells[system, "ms per image"] = Cell(f"{1000 * own[0]['seconds']:.3g}")
        for key, name in (("auroc", "mean AUROC (%)"), ("aupr", "mean AUPR (%)"), ("fpr95", "mean FPR at 95 % TPR (%)")):
            cells[system, name] = Cell(f"{100 * sum(row[key] for row in own) / len(own):.1f}")
        cells[system, "sets"] = Cell(str(len(own)))
    return beside("Cost and other measures, over the sets a system was asked about", "detector, encoder", {"": cells})


def table_5_layout(columns: Mapping[str, Row]) -> Layout:
    """Table 5, a line for each set: each of ours above the paper's nearest; set -> moments, as in `table_5`.

    >>> column = dict(mean_m_in=0.95, mean_m_out=0.3, mean_gamma_m_out=0.07, variance_m_in=2e-4, variance_m_out=1e-3)
    >>> [(line.label, line.cells[0].text) for line in table_5_layout({"PGD": column}).lines if "PGD" in line.label]
    [('PGD (here)', '0.950'), ('PGD (paper)', '0.954')]
    """
    forms = ("mean m_in", "mean m_out", "mean gamma_m_out", "variance m_in", "variance m_out")
    cells = {
        (f"{name} (here)", form): _cell(_moment(row, form.replace(" ", "_"))) for name, row in columns.items() for form in forms
    }
    for r in paper.TABLE_5.records():
        key = f"{r['moment']}_{r['similarity']}"
        if r["value"] is not None:
            cells[f"{r['distribution']} (paper)", key.replace("_", " ", 1)] = _cell(_moment({key: r["value"]}, key))
    order: list[str] = []
    for names in (("ImageNet",), UNSEEN, ("PGD",), ("CW",), ("FGSM",)):
        near = [name for name in columns if ("ImageNet",) == names and name == IN_DISTRIBUTION]
        near += [name for name in columns if name != IN_DISTRIBUTION and set(counterparts(name)) <= set(names)]
        order += [f"{name} (here)" for name in near] + [f"{name} (paper)" for name in names]
    weight = next((_moment(row, "gamma") for row in columns.values() if "gamma" in row), "")
    caption = "Mean and variance of the similarities" + (f"; γ = {weight}, its range over splits" if weight else "")
    layout = beside(caption, "images", {"": cells}, order)
    return layout._replace(groups=[("", [form.replace("gamma_m", "γ m") for form in forms])])


def precision_layout(rows: Sequence[Row]) -> Layout:
    """`precision` for the report.

    >>> row = dict(dtype="bfloat16", m_in_mean=0.006, m_in_largest=0.025, m_out_mean=0.002, m_out_largest=0.015, forward_ms=6.3)
    >>> layout = precision_layout([row | dict(score_mean=0.01, score_largest=0.03, rank=0.99983, p_value_largest=0.0196)])
    >>> layout.lines[0].label, layout.lines[0].cells[0].text
    ('bfloat16', '0.006')
    """
    change = {
        (row["dtype"], name): Cell(f"{row[f'{name}_mean']:.2g}", f"largest {row[f'{name}_largest']:.2g}")
        for row in rows
        for name in ("m_in", "m_out", "score")
    }
    frame = precision(rows)
    others = {(dtype, column): Cell(frame.loc[dtype, column]) for dtype in frame.index for column in frame.columns[6:]}
    groups = {"in standard deviations over images": change, "ranks and cost": others}
    return beside("Change against float32", "forward passes", groups)


def sweep_layout(rows: Sequence[Row], column: str, heading: str) -> Layout:
    """AUROC (%) of each anomaly over the values of one setting.

    >>> rows = [dict(anomaly="PGD", n_views=n, auroc=n / 100, low=0.0, high=1.0) for n in (10, 50)]
    >>> layout = sweep_layout(rows, "n_views", "number of views")
    >>> layout.groups, [cell.text for cell in layout.lines[0].cells]
    ([('number of views', ['10', '50'])], ['10.0', '50.0'])
    """
    cells = {(r["anomaly"], str(r[column])): _cell(percent(r)) for r in rows}
    return beside(f"AUROC (%) by {heading}", "anomaly", {heading: cells})
