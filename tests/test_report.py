"""The report: one file that loads nothing, says what was saved and no more, and can be read by everyone."""

import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from cadetlib import claims, parameters, plots, record, report, tables

PROFILE = "tiny"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</td><script>alert('x')</script><img src=x onerror=\"alert(1)\">{{ 7 * 7 }}"
PARAMETERS = {
    "01_pretraining": 'arch = "resnet10"\nepochs = 60\ndata = "squares"\nseed = 3\n',
    "02_cifar10_vs_cifar10_1": "trained_n_samplings = 5\nmmd_d_n_epochs = 10\n",
    "04_cadet_tables": 'in_distribution = "squares"\nvictim_name = "supervised"\nn_hu = 33\n',
    "05_ablations": "study_n_images = 222\nstudy_n_views = 9\n",
    "06_thresholds": "false_discovery_rate = 0.1\n",
}
ATTACKS = ("FGSM", "CW-L2", "PGD")  # in another order than the paper's
ENCODERS = ("contrastive", "supervised")


COMPARED = dict(detector="MSP", encoder="supervised", over_cadet=-0.1, over_cadet_low=-0.15, over_cadet_high=-0.05)


def cost(forwards):
    return dict(seconds=0.0625, forwards=float(forwards), aupr=0.5, fpr95=0.75, n_in=60, n_out=40, tuned=False)


def interval(rng, key="auroc"):
    value = rng.uniform(0.2, 0.8)
    return {key: value, "low": value - rng.uniform(0, 0.2), "high": value + rng.uniform(0, 0.2)}


PRECISION = [f"{name}_{which}" for name in ("m_in", "m_out", "score") for which in ("mean", "largest")]
PRECISION += ["rank", "p_value_largest", "forward_ms"]


def made_up(unseen="circles", file="a.png", reason="looked in /home/somebody/data for it") -> dict[str, dict]:
    """Results of the eight notebooks, all numbers different."""
    rng = np.random.default_rng(0)
    anomalies = (unseen, *ATTACKS)
    moments = ("mean_m_in", "mean_m_out", "mean_gamma_m_out", "variance_m_in", "variance_m_out")
    swept = dict(by_part=("score", ["m_in alone", "m_out alone", "score"]), by_views=("n_views", [2, 10, 50]))
    swept |= dict(by_gamma=("factor", [0.0, 1.0]), by_reference=("n_reference", [5, 9]), by_crop=("crop_scale", [0.3, 0.9]))
    quality = dict(knn_accuracy=0.91, linear_probe_accuracy=0.92, n_classes=7, n_features=16, n_parameters=12345, n_held_out=70)
    n = 12
    return {
        "00_setup": dict(sets=[], missing={}),
        "01_pretraining": dict(qualities=dict.fromkeys(ENCODERS, quality), logs={name: [] for name in ENCODERS}),
        "02_cifar10_vs_cifar10_1": dict(
            rows=[
                dict(test=test, encoder=encoder, shift=shift, n=size) | interval(rng, "rate")
                for encoder in ENCODERS
                for shift in ("no shift", "other-hands")
                for size in (150, 50)
                for test in ("MMD", "MMD-CC")
            ],
            missing={"triangles": reason},
            alpha=0.05,
            n_samplings=100,
            reference="squares",
            n_reference=500,
        ),
        "03_small_samples": dict(
            rows=[
                dict(test=test, encoder=encoder, anomaly=anomaly, n=size, ceiling=0.995, n_perm=100)
                | interval(rng)
                | dict(aupr=rng.random(), fpr95=rng.random())
                for anomaly in (unseen, "PGD", "FGSM")
                for size in (3, 5)
                for encoder in ENCODERS
                for test in ("MMD", "MMD-CC")
            ],
            missing={},
            n_draws=1000,
            n_perms=[100],
        ),
        "04_cadet_tables": dict(
            rows=[dict(detector="CADet", encoder=e, anomaly=a) | cost(50) | interval(rng) for e in ENCODERS for a in anomalies]
            + [COMPARED | cost(1) | interval(rng) | dict(anomaly=a) for a in anomalies],
            strength=[dict(images=a, accuracy=rng.random(), linf=rng.random(), l2=rng.random()) for a in ("clean", *ATTACKS)],
            missing={"pentagons": "get them"},
            sets=[dict(name=name, paired=name in ATTACKS, n=70) for name in ("in-distribution", *anomalies)],
            settings=dict(image_size=16, n_splits=5),
        ),
        "05_ablations": {
            name: [{"anomaly": a, column: value} | interval(rng) for a in anomalies for value in values]
            for name, (column, values) in swept.items()
        }
        | dict(
            moments={name: {moment: rng.random() for moment in moments} for name in ("in-distribution", *anomalies)},
            crop_n_views=20,
            without_snapshots=True,
            recipes_left_out=["blur: 0.5"],
            by_precision=[dict(dtype=dtype) | {key: rng.random() for key in PRECISION} for dtype in ("float32", "bfloat16")],
        ),
        "06_thresholds": dict(
            false_positive_rates=[dict(split=i, measured=0.05 + 0.01 * i, n=200) for i in range(3)],
            expected=dict(expected=0.05, low=0.03, high=0.08),
            n_calibration=299,
            alpha=0.05,
            batch=[
                {"anomaly": a, "n": 40}
                | {
                    f"{rule}_{what}": value
                    for rule in ("alpha", "bh")
                    for what, value in (("flagged", 7), ("false_discoveries", rng.random()), ("found", rng.random()))
                }
                for a in anomalies
            ],
        ),
        "07_your_own_images": dict(
            files=[file, *(f"{i}.png" for i in range(n - 1))],
            p_values=np.linspace(0.001, 1, n),
            m_in=rng.random(n),
            m_out=rng.random(n),
            flagged=[i < 2 for i in range(n)],
            alpha=0.05,
            n_reference=30,
            n_calibration=999,
            advice=[f"It hardly sees {file}."],
        ),
    }


def save(root: Path, results: dict[str, dict]) -> Path:
    """The results, each saved by a run of a notebook in the checkout `root` -> the results folder."""
    (root / "notebooks").mkdir(exist_ok=True)
    for name, found in results.items():
        source = f'profile = "{PROFILE}"\noutput = ""\n' + PARAMETERS.get(name, "")
        cell = dict(cell_type="code", metadata=dict(tags=["parameters"]), source=source, outputs=[], execution_count=None)
        notebook = dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell | {"id": "p"}])
        (root / "notebooks" / f"{name}.ipynb").write_text(json.dumps(notebook))
        run = record.start(name, {"profile": PROFILE})
        for needed in ("01_pretraining", "04_cadet_tables"):
            if name > needed and found is not None:
                run.need(needed)
        run.save(**found)
    return run.folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A checkout with results and figures, made once."""
    root = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CADET_ROOT", str(root))
        patch.delenv("CADET_RUN_ID", raising=False)
        folder = save(root, made_up())
        for notebook, names in report.FIGURES.items():
            run = record.Run(notebook, {}, folder, "", None, None, 0.0)
            for name in names:
                figure = Figure((2.5, 1))
                figure.text(0.1, 0.5, name)
                run.figure(figure, name, f'"{name}" & what is <seen> on it')
        report.write(folder, PROFILE)
    return root


@pytest.fixture
def root(drawn, tmp_path, monkeypatch):
    """A copy of that checkout, to be changed."""
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("CADET_ROOT", str(tmp_path))
    monkeypatch.delenv("CADET_RUN_ID", raising=False)
    return tmp_path


@pytest.fixture
def folder(root):
    return root / "outputs" / PROFILE


class Page(HTMLParser):
    """What a browser would find: tags with attributes, text, and tables as caption -> rows of cell texts."""

    VOID = ("meta", "img", "col", "path", "circle")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text, self.open, self.style, self.caption = "", [], "", ""
        self.contents: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "a" and "nav" in self.open:
            self.contents.append(dict(attributes)["href"])
        if tag == "table":
            self.caption, self.rows = "", []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag, f"{tag} closed out of order"
        if tag == "table":
            self.tables[self.caption or f"without caption {len(self.tables)}"] = [
                [" ".join(cell.split()) for cell in row] for row in self.rows
            ]

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
            return
        self.text += data
        if "caption" in self.open:
            self.caption += data
        elif self.open and set(self.open) & {"td", "th"}:
            self.rows[-1][-1] += data

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def lines(self, caption: str) -> dict[str, list[str]]:
        """The body of a table: label -> cells."""
        table = next(rows for title, rows in self.tables.items() if title.startswith(caption))
        return {row[0]: row[1:] for row in table}


def page_of(folder: Path) -> Page:
    return Page(report.write(folder, PROFILE).read_text())


def test_page_loads_nothing_and_is_complete(drawn):
    folder = drawn / "outputs" / PROFILE
    path = folder / "report.html"
    page = Page(path.read_text())
    assert path.stat().st_size < 3_000_000
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "video"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("srcset", "background", "action") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
    assert "url(" not in page.style and "@import" not in page.style
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes in page.attributes("a")]
    assert page.contents == [f"#{section}" for section in ids]
    assert {link for link in links if link.startswith("#")} == set(page.contents)
    notebooks = {link for link in links if not link.startswith("#")}
    assert notebooks == {f"{name}.ipynb" for name in (*report.NOTEBOOKS, "08_report")}
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1 and headings[0] == 1 and max(np.diff(headings)) <= 1
    assert page.attributes("html")[0]["lang"] == "en"
    assert {"width=device-width, initial-scale=1", "light dark"} <= {a.get("content") for a in page.attributes("meta")}


def test_every_figure_is_inside_with_its_alternative_text(drawn):
    folder = drawn / "outputs" / PROFILE
    images = Page((folder / "report.html").read_text()).attributes("img")
    names = [name for names in report.FIGURES.values() for name in names]
    assert {image["alt"] for image in images} == {f'"{name}" & what is <seen> on it' for name in names}
    assert len(images) == len(names)
    for image in images:
        name = re.search('"(.*)"', image["alt"]).group(1)
        drawn_as, pixels = ((folder / "figures" / f"{name}.{suffix}").read_bytes() for suffix in ("svg", "png"))
        inside = base64.b64decode(image["src"].split(",")[1])
        assert len(inside) <= min(len(drawn_as), len(pixels))
        if inside != drawn_as:  # then it is the very same pixels, packed better
            found, expected = (np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGBA")) for content in (inside, pixels))
            assert np.array_equal(found, expected)
        assert 0.9 < float(image["width"]) / int(re.search(rb'width="([\d.]+)pt"', drawn_as).group(1).split(b".")[0]) * 0.75 < 1.1


def test_a_claim_in_brief_shows_how_far_its_parts_reach():
    parts = tuple(claims.Part(str(value), float(value), value - 1.0, value + 1.0) for value in (3, 9, 1, 7, 5, 2))
    claim = claims.Claim("a", "text", "unit", "measure", "Table 1", 0.0, parts, claims.overall(parts, 0.0))
    assert [part.name for part in claim.in_brief()] == ["1", "2", "7", "9"]
    assert dataclasses.replace(claim, parts=parts[:5]).in_brief() == parts[:5]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (on Debian: apt-get install chromium)")
@pytest.mark.parametrize("profile", ["digits", "cifar10-cpu"])
def test_the_summary_of_what_is_kept_fits_a_screen(profile):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto((record.checkout() / "outputs" / "reference" / profile / "report.html").as_uri())
        assert page.evaluate("document.querySelector('table.claims').getBoundingClientRect().bottom") <= 800
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (on Debian: apt-get install chromium)")
def test_the_page_fits_a_phone_and_paper(drawn, tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto((drawn / "outputs" / PROFILE / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 688, "height": 1000})  # A4 less its margins
        assert page.evaluate("document.documentElement.scrollWidth") <= 688
        hidden = "[...document.querySelectorAll('details > :not(summary)')].filter(part => !part.checkVisibility()).length"
        assert page.evaluate(hidden) == 0, "what is folded on the screen must stand on paper"
        browser.close()


def test_kept_results_say_how_long_a_profile_takes(root):
    (root / "params" / PROFILE).mkdir(parents=True)
    assert report.minutes_of_profiles() == {PROFILE: "not run yet"}
    kept = root / "outputs" / "reference" / PROFILE
    shutil.copytree(root / "outputs" / PROFILE, kept)
    for name in report.NOTEBOOKS:
        document = json.loads((kept / f"{name}.json").read_text())
        document["provenance"] |= dict(seconds=90, hardware=dict(cpu="Z80", cores=1, memory_gib=None, gpus=[]))
        (kept / f"{name}.json").write_text(json.dumps(document))
    assert report.minutes_of_profiles() == {PROFILE: f"{1.5 * len(report.NOTEBOOKS)} minutes on Z80, 1 CPU core, no GPU"}
    document["provenance"]["git"] = dict(commit="0123", dirty=False)  # the last one, run again by another commit
    (kept / f"{name}.json").write_text(json.dumps(document))
    assert report.minutes_of_profiles()[PROFILE].startswith(f"at least {1.5 * len(report.NOTEBOOKS)} minutes")
    (kept / "05_ablations.json").unlink()
    assert report.minutes_of_profiles() == {PROFILE: "run in part: 00, 01, 02, 03, 04, 06, 07"}


def test_what_a_system_costs_and_whether_it_differs_from_cadet(drawn):
    folder = drawn / "outputs" / PROFILE
    page = Page((folder / "report.html").read_text())
    lines = page.lines("Cost and other measures")
    assert [lines[f"{name}, supervised"][:2] for name in ("MSP", "CADet")] == [["1", "62.5"], ["50", "62.5"]]
    assert lines["MSP, supervised"][3:5] == ["50.0", "75.0"]
    unseen = page.lines("AUROC (%), unseen classes")
    assert "below CADet" in unseen["MSP, supervised"][0] and "CADet" not in unseen["CADet, contrastive"][0]
    assert "Hu et al.’s detector was asked about 33 images" in page.text
    assert "222 images, 9 views" in page.text and "The epochs between are left out" in page.text
    assert "with 5 draws and fewer passes than published (10 for MMD-D)" in page.text


def percent(row):
    return f"{100 * row['auroc']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def test_tables_hold_what_was_saved_beside_the_papers(drawn):
    page, results = Page((drawn / "outputs" / PROFILE / "report.html").read_text()), made_up()
    n_cells = 0
    for shift, header in (("no shift", ["n = 150", "n = 50"]), ("other-hands", ["n = 150", "n = 50", "n = 2000"])):
        lines = page.lines(f"Rejection rate, {shift}")
        columns = lines["test, encoder"]
        assert columns[: len(header)] == header
        for row in results["02_cifar10_vs_cifar10_1"]["rows"]:
            if row["shift"] == shift:
                expected = f"{row['rate']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                assert lines[f"{row['test']}, {row['encoder']}"][columns.index(f"n = {row['n']}")] == expected
                n_cells += 1
    assert n_cells == 16
    labels = ["ME not run here", "C2ST-L not run here", "MMD-D not run here", "MMD, contrastive", "MMD-CC, contrastive"]
    assert list(lines)[2:7] == labels
    assert lines["MMD-CC, contrastive"][2:] == ["1.000", "1.000", "0.997", "0.686", "0.304", "0.150"]
    assert lines["ME not run here"] == ["–", "–", "0.588", *"–––––"]

    for anomaly, theirs in (
        ("circles", ["65.3", "73.2", "88.0", "97.7", "95.4", "99.2", "99.5", "99.5"]),
        ("PGD", ["70.5", "84.0", "96.6", "99.5"]),
        ("FGSM", []),  # which the paper's Table 2 does not have
    ):
        lines = page.lines(f"AUROC (%), {anomaly}")
        for row in results["03_small_samples"]["rows"]:
            if row["anomaly"] == anomaly:
                assert lines[f"{row['test']}, {row['encoder']}"][[3, 5].index(row["n"])] == percent(row)
        assert lines["MMD-CC, contrastive"][2:] == theirs

    three, four = page.lines("AUROC (%), unseen classes"), page.lines("AUROC (%), attacks")
    assert three["detector, encoder"] == ["circles", "iNaturalist", "ImageNet-O", "Average"]
    assert four["detector, encoder"] == ["PGD", "CW-L2", "FGSM", "PGD", "CW", "FGSM", "Average"]
    printed = dict(contrastive=(82.855, 94.88, 95.93, 97.56), supervised=(83.005, 75.25, 71.02, 83.45))
    for row in (r for r in results["04_cadet_tables"]["rows"] if r["detector"] == "CADet"):
        k = ["circles", "PGD", "CW-L2", "FGSM"].index(row["anomaly"])
        cell = [three[f"CADet, {row['encoder']}"][0], *four[f"CADet, {row['encoder']}"]][k]
        value = printed[row["encoder"]][k] / 100
        word = "above the paper" if row["low"] > value else "below the paper" if row["high"] < value else "agrees"
        assert cell == f"{percent(row)} {word}"
    assert three["CADet, contrastive"][1:] == ["83.42", "82.29", "82.86"]
    assert four["Hu tuned, contrastive not run here"] == ["–", "–", "–", "94.80", "95.19", "78.18", "89.39"]

    five = page.lines("Mean and variance")
    order = ["in-distribution (here)", "ImageNet (paper)", "circles (here)", "iNaturalist (paper)", "ImageNet-O (paper)"]
    order += ["PGD (here)", "PGD (paper)", "CW-L2 (here)", "CW (paper)", "FGSM (here)", "FGSM (paper)"]
    assert list(five) == ["images", *order]
    assert five["FGSM (paper)"] == ["0.948", "0.311", "0.069", "2.1e-04", "1.1e-03"]
    for name, row in results["05_ablations"]["moments"].items():
        assert five[f"{name} (here)"] == [f"{v:.3f}" if k.startswith("mean") else f"{v:.1e}" for k, v in row.items()]

    for name, heading, column in (
        ("by_part", "score", "score"),
        ("by_views", "views per image", "n_views"),
        ("by_gamma", "multiple of γ", "factor"),
        ("by_reference", "reference images", "n_reference"),
        ("by_crop", "area of a view", "crop_scale"),
    ):
        lines = page.lines(f"AUROC (%) by {heading}")
        rows = results["05_ablations"][name]
        assert sum(len(cells) for cells in lines.values()) == len(rows) + 1 + len(lines["anomaly"])
        for row in rows:
            column_name = str(row[column]).replace("_", "")  # m_in is set with a subscript
            assert lines[row["anomaly"]][lines["anomaly"].index(column_name)] == percent(row)

    for row in results["03_small_samples"]["rows"]:
        lines = page.lines(f"AUPR and FPR at 95 % TPR (%), {row['anomaly']}")
        column = [3, 5].index(row["n"])
        cells = lines[f"{row['test']}, {row['encoder']}"]
        assert [cells[column], cells[2 + column]] == [f"{100 * row['aupr']:.1f}", f"{100 * row['fpr95']:.1f}"]

    for row in results["05_ablations"]["by_precision"]:
        cells = page.lines("Change against float32")[row["dtype"]]
        assert (
            cells[0].split() == [f"{row['m_in_mean']:.2g}", "largest", f"{row['m_in_largest']:.2g}"]
            and cells[-1] == f"{row['forward_ms']:.3g}"
        )
    assert "Left out, since not trained here: blur: 0.5." in " ".join(page.text.split())

    for row in results["04_cadet_tables"]["strength"]:
        assert page.lines("The attacks")[row["images"]] == [
            f"{100 * row['accuracy']:.1f}", f"{row['linf']:.3f}", f"{row['l2']:.3f}"
        ]  # fmt: skip
    for row in results["06_thresholds"]["batch"]:
        shares = [f"{100 * row[f'{r}_{what}']:.1f}" for r in ("alpha", "bh") for what in ("false_discoveries", "found")]
        assert page.lines("A batch")[row["anomaly"]] == ["40", "7", *shares[:2], "7", *shares[2:]]
    own = results["07_your_own_images"]
    lines = page.lines("The 10 most anomalous")
    for i, file in enumerate(own["files"][:10]):
        numbers = [f"{own['p_values'][i]:.4f}", f"{own['m_in'][i]:.3f}", f"{own['m_out'][i]:.3f}", "yes" if i < 2 else "no"]
        assert lines[file] == numbers
    assert "10.png" not in page.text


def test_what_is_missing_is_named_and_not_filled(drawn):
    page = Page((drawn / "outputs" / PROFILE / "report.html").read_text())
    text = " ".join(page.text.split())
    assert "Left out, for want of the images: triangles, pentagons." in text
    assert "Left out: triangles. looked in .../data for it" in text and "/home" not in text
    assert "Left out: pentagons. get them" in text
    assert not any(re.search("triangles|pentagons", cell) for rows in page.tables.values() for row in rows for cell in row)


def test_provenance_and_hardware(folder, root, monkeypatch):
    text = " ".join(page_of(folder).text.split())
    assert "no GPU" in text and "no git" in text and "epochs = 60" in text and "seed 3" in text
    seconds = [record.load(folder / f"{name}.json")[1]["seconds"] for name in report.NOTEBOOKS]
    assert f"{sum(seconds) / 60:.1f} minutes" in text
    hardware = dict(cpu="Z80", cores=1, memory_gib=None, gpus=["H200", "H200"])
    monkeypatch.setattr(record, "hardware", lambda: hardware)
    monkeypatch.setattr(record, "git_state", lambda root: dict(commit="0123456789abcdef", dirty=True))
    save(root, made_up())
    page = page_of(folder)
    rows = page.lines("Where each result comes from")
    assert "Z80, 1 CPU core, 2 × H200" in " ".join(page.text.split()) and "no GPU" not in page.text
    assert all(rows[name][0] == "0123456789 and changes since" and rows[name][-1].endswith("H200") for name in report.NOTEBOOKS)


def test_outdated_results_are_said_to_be(folder, root):
    assert "Out of date" not in page_of(folder).text
    results = made_up()
    results["04_cadet_tables"]["settings"]["n_splits"] = 6
    save(root, {name: results[name] for name in ("01_pretraining", "04_cadet_tables")})
    text = " ".join(page_of(folder).text.split())
    assert re.findall(r"Out of date: (\S+) was made from an earlier result of (\S+)", text) == [
        (name, "04_cadet_tables") for name in ("05_ablations", "06_thresholds", "07_your_own_images")
    ]


def test_strings_from_results_stay_text(folder, root, monkeypatch):
    hardware = dict(cpu=HOSTILE, cores=2, memory_gib=1.0, gpus=[HOSTILE])
    monkeypatch.setattr(record, "hardware", lambda: hardware)
    save(root, made_up(HOSTILE, HOSTILE, HOSTILE))
    for about in (folder / "figures").glob("*.json"):
        about.write_text(json.dumps({"alt": f'"{HOSTILE}'}))
    page = page_of(folder)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and tags.count("img") == len(list((folder / "figures").glob("*.svg")))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert {image["alt"] for image in page.attributes("img")} == {f'"{HOSTILE}'}
    assert f"It hardly sees {HOSTILE}." in page.text
    assert HOSTILE in page.lines("The 10 most anomalous") and page.text.count("{{ 7 * 7 }}") > 10


def test_same_results_same_page(folder):
    assert report.write(folder, PROFILE).read_bytes() == report.write(folder, PROFILE).read_bytes()
    assert [path.name for path in folder.glob(".*")] == []


def test_missing_damaged_and_foreign_results_are_refused(folder, root):
    path = folder / "05_ablations.json"
    whole, before = path.read_text(), (folder / "report.html").read_bytes()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"needs 05_ablations.*python -m cadetlib.reproduce tiny --only 05"):
        report.write(folder, PROFILE)
    path.write_text(whole.replace("0.", "1.", 1))
    with pytest.raises(ValueError, match=r"05_ablations\.json: found results that do not match their digest"):
        report.write(folder, PROFILE)
    path.write_text(whole)
    with pytest.raises(ValueError, match="found results of profile 'tiny', expected 'other'"):
        report.write(folder, "other")
    figure = folder / "figures" / "04_figure_1b.svg"
    figure.rename(figure.with_suffix(".old"))
    with pytest.raises(FileNotFoundError, match=r"needs 04_cadet_tables.*04_figure_1b.svg.*--only 04"):
        report.write(folder, PROFILE)
    figure.with_suffix(".old").rename(figure)
    for name, key in (("01_pretraining", "qualities"), ("05_ablations", "by_views")):
        results = made_up()
        results[name] = {k: v for k, v in results[name].items() if k != key} | {"other": 1}
        save(root, results)
        with pytest.raises(ValueError, match=rf"found results without.*{key}"):
            report.write(folder, PROFILE)
    assert (folder / "report.html").read_bytes() == before


# --- colours ------------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_read_in_light_dark_and_print(drawn):
    style = Page((drawn / "outputs" / PROFILE / "report.html").read_text()).style
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    palettes = [dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    light, dark, printed = palettes
    assert printed == light and luminance(dark["page"]) < 0.05
    for palette in (light, dark):
        for name, colour in palette.items():
            for ground in ("page", "panel"):
                if name not in ("page", "panel", "line"):  # line: a rule between rows, no information
                    assert contrast(colour, palette[ground]) >= (3 if name == "mark" else 4.5), (name, ground)
    rest = re.sub(r":root \{.*?\}", "", style, flags=re.S)
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b|rgb|hsl", rest), "a colour outside the palettes"
    texts = re.findall(r"(?:^|[\s;{])color: ([^;}]+)", rest)
    assert set(texts) <= {"black", *(f"var(--{name})" for name in light if name not in ("mark", "line", "page", "panel"))}
    used = set(re.findall(r"var\(--([a-z]+)\)", rest))
    assert used == set(light) == set(dark)


def test_every_word_in_a_figure_stands_out():
    rows = [dict(anomaly=f"set {k}", n=n, auroc=0.1 * k, low=0, high=1) for k in range(8) for n in (1, 2)]
    figures = [
        plots.sweep(rows, "n", "views"),
        plots.detection([row | dict(detector=row["anomaly"], encoder="") for row in rows]),
    ]
    words = [text for figure in figures for text in figure.findobj(Text) if text.get_text().strip()]
    assert {text.get_text() for text in words} >= {"set 0", "set 7", "0.70"}
    dim = {text.get_text(): text.get_color() for text in words if contrast(to_hex(text.get_color()), "#ffffff") < 4.5}
    assert not dim


# --- verdicts -----------------------------------------------------------------------------------------------------------


def row(value, half=0.05, **keys):
    return dict(auroc=value, low=value - half, high=value + half) | keys


def cadet(encoder, anomaly, value, half=0.05):
    return row(value, half, detector="CADet", encoder=encoder, anomaly=anomaly)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.6, 0.7], "confirmed here"),
        ([0.6, 0.52], "confirmed in part"),
        ([0.6, 0.4], "confirmed in part"),
        ([0.52, 0.4], "not confirmed here"),
        ([0.4, 0.3], "not confirmed here"),
        ([0.52, 0.46], "undecided"),
        ([], "not tested here"),
    ],
)
def test_verdict_follows_from_the_intervals(values, verdict):
    rows = [cadet("contrastive", f"unseen {i}", value) for i, value in enumerate(values)]
    others = [cadet("contrastive", "PGD", 0.5), cadet("supervised", "unseen 0", 0.1), row(0.1, **{"detector": "MSP"} | {
        "encoder": "contrastive", "anomaly": "unseen 0"})]  # fmt: skip
    claim = claims.anomalies_seen([*others, *rows], {"PGD"}, attacked=False)
    assert claim.verdict == verdict
    assert [part.value for part in claim.parts] == pytest.approx([100 * value for value in values])
    assert all(part.paper == pytest.approx(82.855) for part in claim.parts)
    (attack,) = claims.anomalies_seen([*others, *rows], {"PGD"}, attacked=True).parts
    assert (attack.name, attack.paper) == ("PGD", 94.88)


def test_difference_covers_the_true_one_in_95_of_100_cases():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.7, 0.03, 20_000), rng.normal(0.6, 0.05, 20_000)
    covered = 0
    for x, y in zip(a, b, strict=True):
        part = claims.difference(row(x, 1.96 * 0.03), row(y, 1.96 * 0.05), "")
        covered += part.low <= 10 <= part.high
    assert covered / 20_000 == pytest.approx(0.95, abs=0.005)
    skewed = claims.difference(dict(auroc=0.9, low=0.8, high=0.92), dict(auroc=0.5, low=0.47, high=0.6), "", 1.5)
    assert (skewed.low, skewed.high) == pytest.approx((40 - np.hypot(10, 10), 40 + np.hypot(2, 3)))
    assert skewed.paper == 1.5


@pytest.mark.parametrize(("contrastive", "verdict"), [(0.9, "confirmed here"), (0.72, "undecided"), (0.5, "not confirmed here")])
def test_contrastive_against_supervised_counts_attacks_only(contrastive, verdict):
    rows = [cadet("contrastive", "FGSM", contrastive), cadet("supervised", "FGSM", 0.7)]
    rows += [cadet("contrastive", "circles", 0.1), cadet("supervised", "circles", 0.9)]
    claim = claims.contrastive_better(rows, {"FGSM"})
    assert claim.verdict == verdict and len(claim.parts) == 1
    assert claim.parts[0].paper == pytest.approx(97.56 - 83.45)


def rejecting(shift, rate, n=100, test="MMD", encoder="contrastive"):
    return dict(test=test, encoder=encoder, shift=shift, n=n, rate=rate, low=rate - 0.03, high=rate + 0.03)


@pytest.mark.parametrize(
    ("without", "rate", "verdict"),
    [
        (0.05, 0.3, "confirmed here"),
        (0.05, 0.1, "undecided"),
        (0.25, 0.3, "undecided"),
        (0.05, 0.01, "undecided"),
        (0.25, 0.01, "not confirmed here"),
    ],
)
def test_a_shift_is_detected_when_tests_reject_more_than_without(without, rate, verdict):
    rows = [rejecting("no shift", without), rejecting("hands", rate), rejecting("hands", 0.9, n=10)]
    rows += [rejecting("hands", 0.9, test="MMD-CC"), rejecting("hands", 0.9, encoder="supervised")]
    claim = claims.shifts_detected(rows, alpha=0.05)
    assert claim.verdict == verdict and claim.break_even == pytest.approx(100 * max(0.05, without + 0.03))
    assert claim.parts[0].paper is None and "under other shifts than the paper's CIFAR-10.1" in claim.unit
    published = claims.shifts_detected(
        [row | dict(shift=row["shift"].replace("hands", "cifar10.1-v6")) for row in rows], alpha=0.05
    )
    assert published.parts[0].paper == pytest.approx(32.5)  # Table 1 at the same n
    assert claims.shifts_detected(rows[:1], alpha=0.05).verdict == "not tested here"


def test_few_images_are_judged_at_the_smallest_n_under_each_encoder():
    cells = {("contrastive", 3): (0.5, 0.9), ("supervised", 3): (0.6, 0.9), ("contrastive", 20): (0.9, 0.5)}
    rows = [
        row(value, 0.02, test=test, encoder=encoder, anomaly="PGD", n=n, n_perm=100)
        for (encoder, n), values in cells.items()
        for test, value in zip(("MMD", "MMD-CC"), values, strict=True)
    ]
    claim = claims.small_samples_helped(rows)
    assert claim.verdict == "confirmed here"
    assert [part.value for part in claim.parts] == pytest.approx([40, 30])
    assert [part.paper for part in claim.parts] == pytest.approx([70.5 - 35.2, 57.4 - 20.0])


@pytest.mark.parametrize(("few", "verdict"), [(0.895, "confirmed here"), (0.88, "undecided"), (0.8, "not confirmed here")])
def test_few_views_may_cost_two_points_where_all_see_something(few, verdict):
    rows = [row(v, 0.005, anomaly="PGD", n_views=n) for n, v in ((2, 0.5), (5, 0.6), (10, few), (20, 0.9), (50, 0.9))]
    rows += [row(0.5, 0.05, anomaly="CW-L2", n_views=n) for n in (10, 50)]
    claim = claims.few_views_suffice(rows)
    assert claim.verdict == verdict and [part.name for part in claim.parts] == ["PGD"]
    assert claim.parts[0].value == pytest.approx(100 * (few - 0.9))
    same_images = [r | dict(over_most_views=few - 0.9, over_most_views_low=-0.019, over_most_views_high=0.0) for r in rows]
    assert claims.few_views_suffice(same_images).verdict == "confirmed here"
    assert claims.few_views_suffice(rows[:1]).verdict == "not tested here"


def test_each_similarity_has_its_own_anomalies():
    rows = [row(0.9, anomaly="PGD", score="m_in alone"), row(0.6, anomaly="PGD", score="m_out alone")]
    rows += [row(0.6, anomaly="circles", score="m_in alone"), row(0.9, anomaly="circles", score="m_out alone")]
    assert claims.similarities_divide_the_work(rows, {"PGD"}).verdict == "confirmed here"
    assert claims.similarities_divide_the_work(rows, {"circles"}).verdict == "not confirmed here"
    wide = [r | dict(over_other=0.1, over_other_low=-0.1, over_other_high=0.3) for r in rows]
    assert claims.similarities_divide_the_work(wide, {"PGD"}).verdict == "undecided"


def test_calibrated_p_values_pass_and_others_do_not():
    """Eq. 8 simulated: all splits' rates lie in the range at least 95 times in 100, and not much more often for one split."""
    rng = np.random.default_rng(2)
    n_calibration, n, alpha = 199, 300, 0.05

    def verdict(shift: float, n_splits: int) -> str:
        rates = []
        for split in range(n_splits):
            scores, fresh = rng.normal(size=n_calibration), rng.normal(size=n) - shift
            p = (1 + np.searchsorted(np.sort(scores), fresh)) / (1 + n_calibration)
            rates.append(dict(split=split, measured=float((p <= alpha).mean()), n=n))
        return claims.p_values_calibrated(rates, n_calibration, alpha).verdict

    honest = [verdict(0.0, 1) for _ in range(1500)]
    assert 0.94 < honest.count("confirmed here") / 1500 < 0.985 and "undecided" not in honest
    assert [verdict(0.0, 4) for _ in range(400)].count("confirmed here") / 400 > 0.93
    assert [verdict(0.8, 4) for _ in range(100)].count("not confirmed here") > 95


def test_too_few_images_leave_calibration_undecided():
    def verdict(measured, n, n_calibration):
        return claims.p_values_calibrated([dict(split=0, measured=measured, n=n)], n_calibration, 0.05).verdict

    assert verdict(0.0, 20, 99) == "undecided"
    assert verdict(0.0, 2000, 18) == "undecided"  # no p-value can be as small as 0.05
    assert verdict(0.05, 2000, 999) == "confirmed here"
    assert verdict(0.5, 20, 99) == "not confirmed here"
    assert claims.p_values_calibrated([], 99, 0.05).verdict == "not tested here"


def test_verdicts_beside_the_paper():
    rows = [
        cadet("contrastive", "CW-Linf", 0.96, 0.01),
        cadet("supervised", "circles", 0.7),
        cadet("contrastive", "PGD", 0.99, 0.005),
    ]
    rows += [row(0.9, detector="Mine", encoder="contrastive", anomaly="PGD"), cadet("supervised", "imagenet-o", 0.7)]
    found = report.verdicts(rows)
    assert [(f["verdict"], f["paper"], f["compared_with"]) for f in found] == [
        ("agrees", 95.93, "CW"),
        ("below", pytest.approx(83.005), "iNaturalist and ImageNet-O"),
        ("above", 94.88, "PGD"),
        ("no counterpart", None, ""),
        ("agrees", 70.73, "ImageNet-O"),
    ]
    assert found[0]["ours"] == "96.0 [95.0, 97.0]"
    assert record.plain(found) == found


def test_the_page_says_the_verdicts_that_follow(drawn):
    folder = drawn / "outputs" / PROFILE
    loaded = {name: record.read(folder / f"{name}.json") for name in report.NOTEBOOKS}
    page = Page((folder / "report.html").read_text())
    table = next(rows for rows in page.tables.values() if rows[0][0] == "The paper’s claim")
    judged = report.judged(loaded)
    assert len(table) == 1 + len(judged) and len({claim.text for claim in judged}) == 8
    for cells, claim in zip(table[1:], judged, strict=True):
        assert cells[0] == claim.text.replace("m_", "m") and cells[1].endswith(claim.verdict)
        some = claim.in_brief()
        assert len(some) == len(claim.parts) or f"the lowest and highest of {len(claim.parts)}" in cells[2]
        for part in claim.parts:
            form = "{:+.1f}" if claim.signed else "{:.1f}"
            value, low, high = (form.format(v).replace("-", "−") for v in (part.value, part.low, part.high))
            assert f"{value} [{low}, {high}]" in " ".join(page.text.split()), "the claim's section has all of its parts"
            assert part not in some or f"{part.name} {value} [{low}, {high}]" in cells[2]
            paper_is = f"{part.name} {value} [{low}, {high}], paper {form.format(part.paper or 0)}"
            assert part not in some or part.paper is None or paper_is in cells[2]


def test_a_training_that_had_ended_before_notebook_01_began_counts_in_the_time():
    """By its log: 40 steps of 100 images at 10 and then 60 at 20 images a second take 400 and 300 s."""
    log = [dict(step=40, images_per_second=10.0), dict(step=40, knn_accuracy=0.5), dict(step=100, images_per_second=20.0)]
    results = dict(
        logs=dict(contrastive=log, supervised=[dict(step=3, images_per_second=30.0)]), encoders=dict(contrastive="a/b")
    )
    parameters = dict(batch_size=100, supervised_batch_size=200)

    def loaded(seconds, results):
        return record.Loaded(results, dict(seconds=seconds, parameters=parameters), "")

    others, done = loaded(60.0, {}), loaded(10.0, results)
    assert report._minutes([others, done, others]) == pytest.approx((120 + 700 + 20) / 60)
    assert report._minutes([others, loaded(1000.0, results), others]) == pytest.approx((120 + 1000) / 60)
    kept = results | dict(encoders=dict(contrastive="contrastive-kept/encoder.safetensors"))
    assert report._minutes([others, loaded(10.0, kept), others]) == pytest.approx((120 + 20) / 60)


def test_claims_about_nothing_are_not_tested():
    found = [claims.shifts_detected([], 0.05), claims.small_samples_helped([]), claims.few_views_suffice([])]
    found += [claims.contrastive_better([], {"PGD"}), claims.similarities_divide_the_work([], {"PGD"})]
    assert {claim.verdict for claim in found} == {"not tested here"}


def test_the_sets_of_the_imagenet_profiles_stand_beside_their_own_columns():
    for profile in ("imagenet", "imagenet-pretrained"):
        given = parameters.read_yaml(record.checkout() / "params" / profile / "04_cadet_tables.yaml")
        assert [tables.counterparts(name) for name in given["unseen"]] == [("ImageNet-O",), ("iNaturalist",)]
    assert tables.paper_value("CADet", "supervised", "inaturalist-plants") == (95.28, "iNaturalist")


def test_a_dry_run_has_no_verdict_in_any_table():
    row = dict(detector="MSP", encoder="supervised", anomaly="PGD", auroc=0.9, low=0.8, high=0.95)
    rows = [row | dict(over_cadet=0.2, over_cadet_low=0.1, over_cadet_high=0.3)]

    def notes(judged):
        return [cell.note for line in tables.detection_layout(rows, 4, judged).lines for cell in line.cells]

    assert any("beats CADet" in note for note in notes(True)) and not any(notes(False))
