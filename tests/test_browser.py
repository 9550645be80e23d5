"""The threshold explorer in JupyterLab in a real browser: moved by keyboard, its numbers read back, nothing asked of other hosts.

Screenshots are kept in outputs/screenshots/.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

from cadetlib import plots, thresholds

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-for-this-test"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (on Debian: apt-get install chromium)"),
]

CELLS = [
    "import json\nimport numpy as np\nfrom cadetlib import explored, widgets",
    'detectors = [explored.curves(row) for row in json.load(open("detectors.json"))]\npictures = dict(np.load("pictures.npz"))',
    'widgets.threshold_explorer(detectors, pictures, alpha=0.05, q=0.1, save_to="threshold.json")',
]


def rows():
    """Two detectors' scores, as notebook 06 saves them, of 300 images of each set."""
    import numpy as np

    found = []
    for seed, name in enumerate(("contrastive", "supervised")):
        generator = np.random.default_rng(seed)
        sets = []
        for set_name, kind, shift in (
            ("in-distribution", "in", 0),
            ("training", "in", 0.4),
            ("unseen", "out", -1),
            ("PGD", "out", -3),
        ):
            scores = generator.normal(shift, size=300)
            sets.append(dict(name=set_name, kind=kind, scores=np.sort(scores).tolist(), images=np.argsort(scores).tolist()))
        calibration = np.sort(generator.normal(size=199)).tolist()
        found.append(dict(name=name, fingerprint=f"of {name}", ties="paper", calibration_scores=calibration, sets=sets))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A notebook that shows the explorer, with what it shows, and the detectors read back."""
    import nbformat
    import numpy as np

    folder = tmp_path_factory.mktemp("lab")
    (folder / "detectors.json").write_text(json.dumps(rows()))
    generator = np.random.default_rng(0)
    names = [one["name"] for one in rows()[0]["sets"]]
    np.savez(folder / "pictures.npz", **{name: generator.integers(256, size=(300, 3, 16, 16), dtype=np.uint8) for name in names})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "explorer.ipynb")
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    """JupyterLab on 127.0.0.1, with settings of its own and without its question about news -> its address."""
    home = tmp_path_factory.mktemp("jupyter")
    (home / "labconfig").mkdir()
    disabled = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "labconfig" / "page_config.json").write_text(json.dumps(disabled))
    port = free_port()
    settings = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "open_browser": False, "root_dir": folder, "allow_root": True}
    command = [sys.executable, "-m", "jupyterlab", f"--IdentityProvider.token={TOKEN}", "--LabApp.extension_manager=readonly"]
    command += [f"--ServerApp.{name}={value}" for name, value in settings.items()]
    places = {
        name: str(home) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    }
    log = open(home / "log", "wb")
    server = subprocess.Popen(command, env=os.environ | places, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/api/status?token={TOKEN}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb?token={TOKEN}"
    finally:
        server.terminate()  # and its kernels with it
        server.wait(60)
        log.close()


@pytest.fixture(scope="module")
def page(lab):
    """The notebook, run, in a browser; `page.hosts` are those it asked anything of."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1750})
        page.set_default_timeout(120_000)
        page.hosts = set()
        page.on("request", lambda request: page.hosts.add(urlsplit(request.url).hostname))
        page.on("websocket", lambda websocket: page.hosts.add(urlsplit(websocket.url).hostname))
        page.goto(lab)
        page.locator("#jp-bottom-panel, .jp-StatusBar-Widget").get_by_text("| Idle").first.wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
        page.locator(".cadet-explorer .cadet-numbers").wait_for()
        yield page
        browser.close()


def screenshot(page, name):
    folder = ROOT / "outputs" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


def shown(page):
    cells = page.locator(".cadet-numbers td[data-set]")
    return {cell.get_attribute("data-set"): cell.inner_text() for cell in cells.all()}


def saved(page, folder):
    """Press Save; the threshold as it is in the file, for the detector that is chosen."""
    (folder / "threshold.json").unlink(missing_ok=True)
    page.get_by_role("button", name="Save", exact=True).click()
    page.wait_for_timeout(200)
    page.get_by_text("saved: threshold.json").wait_for()
    return json.loads((folder / "threshold.json").read_text())


def expected(row, names, threshold):
    """What the library says, from the rows that the notebook read."""
    from cadetlib import explored

    curves = thresholds.chosen(explored.curves(row)["curves"], names[0], names[1:])
    point = thresholds.operating_point(curves, len(row["calibration_scores"]), threshold)
    shares = {name: plots.share_text(share) for name, share in point["flagged"].items()}
    return shares | {"threshold": "", "promised": plots.share_text(point["expected"].expected)}


def test_the_slider_moves_and_the_numbers_are_the_library_s(page, folder):
    names = ["in-distribution", "unseen", "PGD"]
    assert shown(page) == expected(rows()[0], names, 0.05)
    before, marks = shown(page), page.locator(".cadet-explorer svg").first.inner_html()
    page.locator(".cadet-explorer .noUi-handle").first.focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("p => !document.querySelector('.cadet-numbers').innerText.includes(p)", arg=f"p ≤ {0.05:.4g}")
    page.locator(".cadet-numbers").get_by_text(re.compile(r"p ≤ 0\.1256")).wait_for()  # 0.05 times ten to the 0.4
    kept = saved(page, folder)
    assert kept["threshold"] == pytest.approx(0.05 * 10**0.4, rel=1e-6) and kept["detector"] == "of contrastive"
    assert shown(page) == expected(rows()[0], names, kept["threshold"]) != before
    assert page.locator(".cadet-explorer svg").first.inner_html() != marks
    assert page.locator(".cadet-examples img").count() == 24
    screenshot(page, "explorer")


def test_marks_lie_on_the_figure(page):
    picture, svg = (page.locator(f".cadet-explorer {kind}").first.bounding_box() for kind in ("img.widget-image", "svg"))
    assert svg == pytest.approx(picture, abs=1)


def test_another_detector_and_the_batch(page, folder):
    page.get_by_label("detector").select_option("supervised")
    page.wait_for_function("() => document.querySelector('.cadet-numbers').innerText.includes('199 calibration')")
    page.get_by_label("normal").select_option("training")
    page.locator(".cadet-numbers").get_by_text("false alarms: training").wait_for()
    kept = saved(page, folder)
    assert kept["detector"] == "of supervised"
    assert shown(page) == expected(rows()[1], ["training", "unseen", "PGD"], kept["threshold"])
    page.get_by_role("tab", name="A batch").click()
    page.locator(".cadet-batch").get_by_text("Benjamini–Hochberg").wait_for()
    screenshot(page, "batch")


def test_no_other_host_is_asked(page):
    assert page.hosts <= {"127.0.0.1", None}, page.hosts  # None: data: addresses, of the images inside the page
    assert "127.0.0.1" in page.hosts
