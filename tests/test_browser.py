"""Notebook 06 in JupyterLab, and under Voila where that is installed, in a real browser: the slider is moved, numbers are read.

A small results folder stands in for those of notebooks 01 and 04: real digits, networks with random weights, so that anomalies
are hard to see and all shares lie between 0 and 1. The numbers on the page are compared with what the saved detectors say of
the images themselves. Screenshots are kept in outputs/screenshots/.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
import torch

from cadetlib import attack_sets, cadet, corruptions, data, encoders, experiments, explorer_html, metrics, record
from cadetlib.views import resize_to

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOILA = shutil.which("voila", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "06_thresholds.ipynb"
TOKEN = "a-token-for-this-test"
SETTINGS = dict(image_size=16, view_size=16, n_views=4, view_grid=[2, 4], crop_scale=0.75, flip=False, seed=0, dtype="float32")
SETTINGS |= dict(n_reference=20, n_calibration=99, n_splits=2, allow_unreadable=0)
N_IN, N_OUT, SIDE = 200, 80, SETTINGS["image_size"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (on Debian: apt-get install chromium)"),
]


def network(name):
    torch.manual_seed(len(name))
    return encoders.ResNet("resnet10", width=4, stem="cifar", image_size=SIDE).eval()


def images_of_04():
    """Digits 0 to 6, digits 7 to 9, and the former with noise, which stand in for the attacked ones."""
    normal = experiments.labelled("digits-test", range(7), N_IN).resized(SIDE).images
    unseen = experiments.anomalous(data.load("digits-7-to-9"), N_OUT, SIDE, "digits-test", N_IN, 0)
    noisy = corruptions.gaussian_noise(resize_to(normal, SIDE), 0.05).clamp(0, 1)
    return {"in-distribution": normal, "digits-7-to-9": unseen, "noise": noisy}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The notebook in a checkout that holds what it needs of notebooks 01 and 04 -> the results folder."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "notebooks").mkdir()
    for name in ("01_pretraining", "04_cadet_tables", "06_thresholds"):
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", root / "notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CADET_ROOT", str(root))
        run = record.start("01_pretraining", {"profile": "digits"})
        names = ("contrastive", "supervised")
        run.save(encoders={n: encoders.save_encoder(network(n), run.folder / n / "encoder.safetensors") for n in names})
        run, sets = record.start("04_cadet_tables", {"profile": "digits"}), images_of_04()
        about = [dict(name=name, paired=name == "noise", n=len(images)) for name, images in sets.items()]
        run.save(images=attack_sets.save_sets(run.folder, **sets), sets=about, settings=SETTINGS)
    return run.folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(command, ready, folder, home):
    """A server with settings of its own, until the block ends; it has started when `ready` answers."""
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    environment = os.environ | {name: str(home) for name in names} | {"CADET_ROOT": str(folder.parents[1])}
    environment.pop("CADET_RUN_ID", None)
    with open(home / "log", "wb") as log:
        process = subprocess.Popen([str(part) for part in command], env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                try:
                    urlopen(ready, timeout=5).close()
                    break
                except HTTPError:  # an answer too
                    break
                except OSError:
                    assert process.poll() is None, (home / "log").read_text()
                    time.sleep(0.2)
            yield
        finally:
            process.terminate()  # and its kernels with it
            process.wait(60)


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    """JupyterLab on 127.0.0.1, without its question about news -> its address."""
    home, port = tmp_path_factory.mktemp("jupyter"), free_port()
    (home / "labconfig").mkdir()
    disabled = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "labconfig" / "page_config.json").write_text(json.dumps(disabled))
    tracker = home / "lab" / "user-settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # every cell is drawn, in sight or not
    settings = dict(ip="127.0.0.1", port=port, port_retries=0, open_browser=False, allow_root=True)
    settings["root_dir"] = folder.parents[1]
    command = [sys.executable, "-m", "jupyterlab", f"--IdentityProvider.token={TOKEN}", "--LabApp.extension_manager=readonly"]
    command += [f"--ServerApp.{name}={value}" for name, value in settings.items()]
    address = f"http://127.0.0.1:{port}"
    with server(command, f"{address}/api/status?token={TOKEN}", folder, home):
        yield f"{address}/lab/tree/notebooks/{NOTEBOOK}?token={TOKEN}"


@pytest.fixture(scope="module")
def browser():
    """One for the whole file: Playwright starts once in a process at a time."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=["--no-sandbox"])
        yield browser
        browser.close()


def new_page(browser):
    """An empty page; `page.hosts` are those that it asked anything of."""
    page = browser.new_page(viewport={"width": 1500, "height": 1750})
    page.set_default_timeout(120_000)
    page.hosts = set()
    page.on("request", lambda request: page.hosts.add(urlsplit(request.url).hostname))
    page.on("websocket", lambda websocket: page.hosts.add(urlsplit(websocket.url).hostname))
    return page


@pytest.fixture(scope="module")
def page(lab, browser):
    """The notebook, run from its first cell to its last."""
    page = new_page(browser)
    page.goto(lab)
    page.locator("#jp-bottom-panel, .jp-StatusBar-Widget").get_by_text("| Idle").first.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
    wait_for_the_explorer(page)
    return page


def wait_for_the_explorer(page):
    """Until the last cell shows it, or one has failed: seconds, and minutes on a machine that is busy with other things."""
    explorer, failure = page.locator(".cadet-explorer .cadet-numbers"), page.get_by_text("Traceback (most recent call last)")
    explorer.or_(failure).first.wait_for(timeout=900_000)
    assert not failure.count(), failure.first.inner_text()


def screenshot(page, name):
    folder = ROOT / "outputs" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.locator(".cadet-explorer").evaluate("explorer => explorer.scrollIntoView()")
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


def expected(folder, name, normal, threshold):
    """What the saved detector says of the images themselves: the share of p-values at or below the threshold, for each set."""
    detector = cadet.CADet.load(folder / "detectors" / f"{name}.safetensors", network(name))
    sets, test = images_of_04(), experiments.splits(N_IN, 2, 20, 99, seed=0)[0].test
    seen = {"in-distribution": sets["in-distribution"][test], "noise": sets["noise"][test]}
    seen |= {
        "digits-7-to-9": sets["digits-7-to-9"],
        "digits-train": experiments.labelled("digits-train", range(7), 200).resized(SIDE).images,
    }
    shares = {one: (detector.p_values(seen[one]) <= threshold).double().mean() for one in (normal, "digits-7-to-9", "noise")}
    promise = metrics.beta_false_positive_interval(99, threshold).expected
    return {one: explorer_html.share_text(float(share)) for one, share in (shares | {"promised": promise}).items()} | {
        "threshold": ""
    }


def press(page, n):
    page.locator(".cadet-explorer .noUi-handle").first.focus()
    for _ in range(n):
        page.keyboard.press("ArrowRight")


def test_the_slider_moves_and_the_numbers_are_those_of_the_saved_detector(page, folder):
    before, marks = shown(page), page.locator(".cadet-explorer svg").first.inner_html()
    assert before == expected(folder, "contrastive", "in-distribution", 0.05)
    press(page, 40)
    page.locator(".cadet-numbers").get_by_text(re.compile(r"p ≤ 0\.1256")).wait_for()  # 0.05 times ten to the 0.4
    kept = saved(page, folder)
    assert kept["threshold"] == pytest.approx(0.05 * 10**0.4, rel=1e-6)
    assert shown(page) == expected(folder, "contrastive", "in-distribution", kept["threshold"]) != before
    assert page.locator(".cadet-explorer svg").first.inner_html() != marks
    false_alarms = round(kept["flagged"]["in-distribution"] * (N_IN - 20 - 99))
    assert page.locator(".cadet-examples img").count() == 8 + 8 + min(8, false_alarms) > 16
    screenshot(page, "explorer")


def test_marks_lie_on_the_figure(page):
    picture, svg = (page.locator(f".cadet-explorer {kind}").first.bounding_box() for kind in ("img.widget-image", "svg"))
    assert svg == pytest.approx(picture, abs=1)


def test_another_detector_and_the_batch(page, folder):
    page.get_by_label("detector").select_option("supervised")
    page.get_by_label("normal").select_option("digits-train")
    page.locator(".cadet-numbers").get_by_text("false alarms: digits-train").wait_for()
    kept = saved(page, folder)
    assert (
        kept["detector"] == cadet.CADet.load(folder / "detectors" / "supervised.safetensors", network("supervised")).fingerprint()
    )
    assert shown(page) == expected(folder, "supervised", "digits-train", kept["threshold"])
    page.get_by_role("tab", name="A batch").click()
    page.locator(".cadet-batch").get_by_text("Benjamini–Hochberg").wait_for()
    screenshot(page, "batch")


def test_no_other_host_is_asked(page):
    assert page.hosts <= {"127.0.0.1", None}, page.hosts  # None: data: addresses, of the images inside the page
    assert "127.0.0.1" in page.hosts


@pytest.mark.skipif(VOILA is None, reason="no voila beside this Python or on the PATH (pip install voila)")
def test_the_notebook_served_by_voila(folder, browser, tmp_path):
    """The same slider and numbers without Jupyter around them. Voila's page also asks a CDN for icons, and does without."""
    port = free_port()
    command = [VOILA, folder.parents[1] / "notebooks" / NOTEBOOK, "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}"]
    address = f"http://127.0.0.1:{port}"
    with server(command, f"{address}/voila/static/", folder, tmp_path):
        page = new_page(browser)
        page.goto(address, timeout=900_000, wait_until="commit")
        wait_for_the_explorer(page)
        assert shown(page) == expected(folder, "contrastive", "in-distribution", 0.05)
        press(page, 40)
        page.locator(".cadet-numbers").get_by_text(re.compile(r"p ≤ 0\.1256")).wait_for()
        assert shown(page) == expected(folder, "contrastive", "in-distribution", 0.05 * 10**0.4)
        assert page.hosts <= {"127.0.0.1", None, "cdn.jsdelivr.net"}, page.hosts
        screenshot(page, "voila")
