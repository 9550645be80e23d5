"""The report: one self-contained page made of the saved results of notebooks 00 to 07, ours beside the paper's.

`gather` turns a results folder into plain data, `report.html.j2` sets it. The page loads nothing: figures are inside it.
Nothing is computed from images here, and the same results give the same page.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import PIL.Image
from markupsafe import Markup, escape

from cadetlib import claims, paper, record, tables

LINKS = "The links lead to the executed notebooks beside this page."  # words of the page; those of a kept one are `keep`'s
NOTEBOOKS = {
    "00_setup": "Setup",
    "01_pretraining": "Pretraining (Section 3)",
    "02_cifar10_vs_cifar10_1": "Two sets (Section 4.1)",
    "03_small_samples": "Few images (Section 4.2)",
    "04_cadet_tables": "CADet (Section 5)",
    "05_ablations": "What makes it work (Section 6)",
    "06_thresholds": "Thresholds (Eq. 8)",
    "07_your_own_images": "Your own images",
}
FIGURES = {
    "01_pretraining": ("01_training",),
    "02_cifar10_vs_cifar10_1": ("02_rejection_rates", "02_trained_tests", "02_figure_1a"),
    "03_small_samples": ("03_small_samples",),
    "04_cadet_tables": ("04_detection", "04_comparison", "04_figure_1b"),
    "05_ablations": (
        "05_similarities",
        "05_parts",
        "05_figure_2",
        "05_gamma",
        "05_reference",
        "05_crop",
        "05_attack_study",
        "05_backbones",
    ),
    "06_thresholds": ("06_calibration", "06_operating_point", "06_explorer", "06_examples"),
    "07_your_own_images": ("07_disturbances", "07_similarities", "07_most_anomalous"),
}
Row = Mapping[str, Any]
DRY_RUN = (
    "Dry run: everything was run once, on stand-ins for the images, with encoders that learned nothing and sizes far too small. "
    "No number here is a result."
)


class Figure(NamedTuple):
    """A figure inside the page: a data URI, its alternative text, its size in CSS pixels.

    >>> Figure("data:image/png;base64,", alt="ROC curves of CADet", width=400, height=300).alt
    'ROC curves of CADet'
    """

    uri: str
    alt: str
    width: int
    height: int


def write(folder: Path, profile: str) -> Path:
    """Make report.html in a results folder from the results and figures there -> its path.

    FileNotFoundError names the notebook whose results or figures are missing; ValueError says which results are damaged, of
    another profile, or of a notebook that has changed since.

    >>> write(Path("no-such-folder"), "digits")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: the report needs 00_setup, and found no no-such-folder/00_setup.json; run: python -m cadetlib.reproduce ...
    """
    try:
        page = _template().render(gather(folder, profile))
    except (KeyError, jinja2.UndefinedError) as error:
        raise ValueError(
            f"{folder}: found results without {error}, expected those of these notebooks; make them again: "
            f"python -m cadetlib.reproduce {profile} --force"
        ) from error
    return record.write_atomically(folder / "report.html", page)


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Our AUROCs (notebook 04's rows) beside the paper's for the nearest kind of anomaly, with a verdict, in percent.

    >>> row = dict(detector="CADet", encoder="contrastive", anomaly="FGSM", auroc=0.98, low=0.97, high=0.99)
    >>> verdicts([row])[0]["ours"], verdicts([row])[0]["paper"], verdicts([row])[0]["verdict"]
    ('98.0 [97.0, 99.0]', 97.56, 'agrees')
    """
    found = []
    for row in rows:
        value, of = tables.paper_value(row["detector"], row["encoder"], row["anomaly"])
        found.append(
            {key: row[key] for key in ("detector", "encoder", "anomaly")}
            | dict(ours=tables.percent(row), paper=value, compared_with=of, verdict=tables.verdict(row, value))
        )
    return found


def gather(folder: Path, profile: str) -> dict[str, Any]:
    """Everything the page shows, as plain data; errors as in `write`.

    >>> gather(Path("no-such-folder"), "digits")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: the report needs 00_setup, and found no no-such-folder/00_setup.json; run: python -m cadetlib.reproduce ...
    """
    loaded = {name: _loaded(folder, name, profile) for name in NOTEBOOKS}
    results = {name[:2]: found.results for name, found in loaded.items()}
    provenance = {name: found.provenance for name, found in loaded.items()}
    return {
        "profile": profile,
        "dry_run": DRY_RUN if _of_a_dry_run(loaded) else "",
        "notebooks": NOTEBOOKS,
        "results": results,
        "provenance": provenance,
        "parameters": {name[:2]: found["parameters"] for name, found in provenance.items()},
        "figures": {name: _figure(folder, notebook, name, profile) for notebook, names in FIGURES.items() for name in names},
        "claims": judged(loaded),
        "layouts": _layouts(results, judged=not _of_a_dry_run(loaded)),
        "counts": _counted([row["verdict"] for row in verdicts(results["04"]["rows"])]),
        "as_in_table_2": tables.paper_n_perm(results["03"]["rows"])[0],
        "tuned": sorted({r["detector"] for r in paper.TABLE_4.records() if r["tuned"]}),
        "missing": _missing(results),
        "outdated": _outdated(loaded),
        "hardware": _counted([_machine(p["hardware"]) for p in provenance.values()]),
        "minutes": _minutes(list(loaded.values())),
        "at_least": _at_least(list(loaded.values())),
        "encoder_was_kept": _encoder_was_kept(results["01"]),
        "most_anomalous": _most_anomalous(results["07"]),
        "odd": [f for file, f in zip(results["07"]["files"], results["07"]["flagged"], strict=True) if file.startswith("odd")],
        "links": LINKS,
        "machine": _machine,
    }


def judged(loaded: Mapping[str, record.Loaded]) -> list[claims.Claim]:
    """The paper's claims with their verdicts, in the paper's order; results of a dry run give none. loaded: as in NOTEBOOKS.

    >>> kept = record.checkout() / "outputs" / "reference" / "digits"
    >>> loaded = {name: record.read(kept / f"{name}.json") for name in NOTEBOOKS}
    >>> [claim.text for claim in judged(loaded)][2:4]
    ['CADet sees unseen classes', 'CADet sees attacks']
    """
    results = {name[:2]: found.results for name, found in loaded.items()}
    attacks = {row["name"] for row in results["04"]["sets"] if row["paired"]}
    rows = results["04"]["rows"]
    found = [
        claims.shifts_detected(results["02"]["rows"], results["02"]["alpha"]),
        claims.small_samples_helped(results["03"]["rows"]),
        claims.anomalies_seen(rows, attacks, attacked=False),
        claims.anomalies_seen(rows, attacks, attacked=True),
        claims.contrastive_better(rows, attacks),
        claims.similarities_divide_the_work(results["05"]["by_part"], attacks),
        claims.few_views_suffice(results["05"]["by_views"]),
        claims.p_values_calibrated(results["06"]["false_positive_rates"], results["06"]["n_calibration"], results["06"]["alpha"]),
    ]
    return [replace(claim, verdict=claims.NO_VERDICT) for claim in found] if _of_a_dry_run(loaded) else found


def suggested_profile(n_gpus: int, missing: Collection[str]) -> str:
    """The largest profile for a machine with so many GPUs that lacks these image sets, of "imagenet-train" and "cifar10-train".

    >>> suggested_profile(0, {"imagenet-train"}), suggested_profile(1, {"imagenet-train"}), suggested_profile(8, set())
    ('cifar10-cpu', 'cifar10', 'imagenet')
    """
    if n_gpus and "imagenet-train" not in missing:
        return "imagenet" if n_gpus >= 4 else "imagenet-pretrained"
    if "cifar10-train" not in missing:
        return "cifar10" if n_gpus else "cifar10-cpu"
    return "digits"


def minutes_of_profiles() -> dict[str, str]:
    """For each profile of params/: how long notebooks 00 to 07 took when its kept results were made, and on what machine.

    From the provenance under outputs/reference/; which notebooks were run where not all are kept.

    >>> minutes_of_profiles()["imagenet-dry-run"]
    'not run yet'
    """
    root = record.checkout()
    folders = sorted(path for path in (root / "params").iterdir() if path.is_dir())
    return {folder.name: _minutes_kept(root / "outputs" / "reference" / folder.name) for folder in folders}


def _of_a_dry_run(loaded: Mapping[str, record.Loaded]) -> bool:
    return any(found.provenance.get("dry_run") for found in loaded.values())


def _minutes_kept(kept: Path) -> str:
    there = [name for name in NOTEBOOKS if (kept / f"{name}.json").exists()]
    if len(there) < len(NOTEBOOKS):
        return f"run in part: {', '.join(name[:2] for name in there)}" if there else "not run yet"
    loaded = [record.result(kept / f"{name}.json") for name in NOTEBOOKS]
    minutes = _minutes(loaded)
    pretraining = " without pretraining" if _encoder_was_kept(loaded[1].results) else ""
    return f"{_at_least(loaded)}{minutes:.1f} minutes{pretraining} on {_machine(loaded[1].provenance['hardware'])}"


def _at_least(loaded: Sequence[record.Loaded]) -> str:
    """ "at least " for results of several commits: what was run again later found in the cache what the first run had to make."""
    commits = {json.dumps(found.provenance["git"], sort_keys=True) for found in loaded}
    return "at least " if len(commits) > 1 else ""


def _minutes(loaded: Sequence[record.Loaded]) -> float:
    """What the notebooks took, in their order; 01 as long as its trainings, also those that had ended before it began."""
    seconds = [found.provenance["seconds"] for found in loaded]
    return (sum(seconds) + max(0.0, _training_seconds(loaded[1]) - seconds[1])) / 60


def _training_seconds(pretrained: record.Loaded) -> float:
    """Seconds of the trainings by their own logs; a contrastive encoder that was there already took none."""
    given, total = pretrained.provenance["parameters"], 0.0
    for objective, log in pretrained.results["logs"].items():
        if objective == "contrastive" and _encoder_was_kept(pretrained.results):
            continue
        batch = "batch_size" if objective == "contrastive" else "supervised_batch_size"
        timed = [line for line in log if "images_per_second" in line]
        steps = pairwise([0, *(line["step"] for line in timed)])
        total += sum((b - a) * given[batch] / line["images_per_second"] for (a, b), line in zip(steps, timed, strict=True))
    return total


def _encoder_was_kept(pretrained: Row) -> bool:
    """Whether notebook 01 took the contrastive encoder that this project or others keep, and did not train one."""
    file = pretrained.get("encoders", {}).get("contrastive", "")
    return "-kept/" in file or "-taken-" in file


def _layouts(results: Mapping[str, Row], judged: bool) -> dict[str, Any]:
    ablations = results["05"]
    sweeps = {
        "by_part": ("score", "score"),
        "by_views": ("n_views", "views per image"),
        "by_gamma": ("factor", "multiple of γ"),
        "by_reference": ("n_reference", "reference images"),
        "by_crop": ("crop_scale", "area of a view"),
    }
    return {name: tables.sweep_layout(ablations[name], *about) for name, about in sweeps.items()} | {
        "table_1": tables.table_1_layouts(results["02"]["rows"]),
        "table_2": tables.table_2_layouts(results["03"]["rows"]),
        "table_2_details": tables.table_2_details_layouts(results["03"]["rows"]),
        "table_3": tables.detection_layout(results["04"]["rows"], 3, judged),
        "table_4": tables.detection_layout(results["04"]["rows"], 4, judged),
        "cost": tables.cost_layout(results["04"]["rows"]),
        "table_5": tables.table_5_layout(ablations["moments"]),
        "precision": tables.precision_layout(ablations["by_precision"]),
    }


def _loaded(folder: Path, name: str, profile: str) -> record.Loaded:
    path = folder / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(_run_first(path, name, profile))
    found = record.read(path)
    theirs = found.provenance.get("parameters", {}).get("profile")
    if theirs != profile:
        raise ValueError(f"{path}: found results of profile {theirs!r}, expected {profile!r}; give each profile its own folder")
    return found


def _run_first(path: Path, name: str, profile: str) -> str:
    return f"the report needs {name}, and found no {path}; run: python -m cadetlib.reproduce {profile} --only {name[:2]}"


def _figure(folder: Path, notebook: str, name: str, profile: str) -> Figure:
    """The SVG or the pixels of a figure, whichever is smaller; as an image, so that nothing in it can act on the page."""
    svg, png, about = (folder / "figures" / f"{name}.{suffix}" for suffix in ("svg", "png", "json"))
    for path in (svg, png, about):
        if not path.exists():
            raise FileNotFoundError(_run_first(path, notebook, profile))
    drawn, pixels = svg.read_bytes(), png.read_bytes()
    width, height = (int.from_bytes(pixels[at : at + 4], "big") * 96 // 200 for at in (16, 20))  # drawn at 200 pixels an inch
    packed = _webp(pixels)
    kind, content = ("svg+xml", drawn) if len(drawn) <= len(packed) else ("webp", packed)
    alt = json.loads(about.read_text())["alt"]
    return Figure(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", alt, width, height)


def _webp(png: bytes) -> bytes:
    """The same pixels, exactly, in half the bytes."""
    packed = io.BytesIO()
    PIL.Image.open(io.BytesIO(png)).save(packed, "WEBP", lossless=True, method=6)
    return packed.getvalue()


def _missing(results: Mapping[str, Row]) -> dict[str, str]:
    """Image sets that some notebook looked for in vain -> the reason it gave."""
    found = {name: reason for result in results.values() for name, reason in result.get("missing", {}).items()}
    return {name: _without_folders(reason.removeprefix(f"{name}: ")) for name, reason in found.items()}


def _without_folders(text: str) -> str:
    """A text without this machine's folders: an absolute path keeps its last part.

    >>> _without_folders("found no /home/me/data/mnist (see https://example.org/a/b)")
    'found no .../mnist (see https://example.org/a/b)'
    >>> _without_folders("found no <data root>/cifar10.1/cifar10.1_v6_data.npy")
    'found no <data root>/cifar10.1/cifar10.1_v6_data.npy'
    """
    return re.sub(r"(?<![\w:/.>])[~/](?:[^\s/]*/)+", ".../", text)


def _outdated(loaded: Mapping[str, record.Loaded]) -> list[tuple[str, str]]:
    """(notebook, input): results made from an earlier version of their input than the one in the folder."""
    return [
        (name, needed)
        for name, found in loaded.items()
        for needed, digest in found.provenance.get("needed", {}).items()
        if needed in loaded and loaded[needed].digest != digest
    ]


def _machine(hardware: Row) -> str:
    """The hardware of a run in words; a GPU only when there was one."""
    memory = f", {hardware['memory_gib']:g} GiB" if hardware["memory_gib"] else ""
    gpus = "".join(f", {count} × {name}" for name, count in _counted(hardware["gpus"]).items())
    return f"{hardware['cpu']}, {hardware['cores']} CPU core{'s' * (hardware['cores'] != 1)}{memory}{gpus or ', no GPU'}"


def _counted(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


def _most_anomalous(own: Row, n: int = 10) -> list[dict[str, Any]]:
    """The n images with the smallest p-values, ties by intra-similarity."""
    columns = ("files", "p_values", "m_in", "m_out", "flagged")
    images = [dict(zip(columns, values, strict=True)) for values in zip(*(own[c] for c in columns), strict=True)]
    return sorted(images, key=lambda image: (image["p_values"], image["m_in"]))[:n]


def _maths(text: Any) -> Markup:
    """Text as HTML, escaped, in which m_in and m_out have subscripts, and long names of sets may break at their colon.

    >>> _maths("m_in < 1 of digits:jpeg-1")
    Markup('m<sub>in</sub> &lt; 1 of digits:<wbr>jpeg-1')
    """
    page = re.sub(r"\bm_(in|out)\b", r"m<sub>\1</sub>", str(escape(text)))
    return Markup(re.sub(r"(?<=\w):(?=[a-z])", ":<wbr>", page))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["maths"] = _maths
    return environment.from_string(resources.files("cadetlib").joinpath("report.html.j2").read_text(encoding="utf-8"))
