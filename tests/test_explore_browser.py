"""The page of ``opustomo explore`` in a real browser without a screen: what a person does, and what is seen then."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import headless
from headless import Page, served
from opustomo.analysis import picked
from opustomo.data.atomic import hold
from opustomo.data.pickles import load_labels
from opustomo.data.readers.relion import identities
from opustomo.data.star import read_star
from small_set import PARTICLES, SmallSet, analysed, hurry

pytestmark = pytest.mark.skipif(bool(headless.why_not()), reason=headless.why_not())

DRAWN = os.environ.get("OPUSTOMO_SCREENSHOT")  # a run, demo/run for docs/images/explore.png


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run at its second epoch, analysed."""
    return analysed(finished_run, tmp_path_factory.mktemp("browser") / "run", 1)


@pytest.fixture(scope="module")
def link(run: Path) -> Iterator[str]:
    with served(run) as (_, link):
        yield link


@pytest.fixture(scope="module")
def page(link: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests, which leave the page as they found it."""
    shown = Page(tmp_path_factory.mktemp("profile"))
    try:
        shown.open(link)
        shown.wait(
            lambda: shown.times("map-shown") and shown.js("document.querySelectorAll('#colour option').length > 12")
        )
        yield shown
    finally:
        shown.close()


def pixels(page: Page, name: str) -> np.ndarray:
    """(h, w, 3) of an element as it is seen."""
    return np.asarray(Image.open(BytesIO(page.find(name).screenshot_as_png)).convert("RGB"), np.int64)


def covered(picture: np.ndarray) -> float:
    """Part of a picture that is clearly coloured."""
    return float(((picture.max(-1) - picture.min(-1)) > 40).mean())


def rows_kept(run: Path, page: Page, name: str) -> np.ndarray:
    """What is selected, saved by the page and read back."""
    page.click("tab-act")
    page.set("name", name)
    page.click("#save button")
    page.wait(lambda: f"kept as {name}" in page.text("status"))
    page.click("tab-map")
    return picked.read_selection(run, name)


# what does not fit into the window, what can be used, and what has the focus and how that is seen
BEYOND = """[...document.querySelectorAll('#latent *, #map *, header *')].filter(e => {
  const b = e.getBoundingClientRect();
  return e.offsetParent && !e.closest('#legend') && e.tagName !== 'OPTION' && b.width &&
    (b.right > innerWidth + 1 || b.bottom > innerHeight + 1 || b.left < 0);
}).map(e => e.outerHTML.slice(0, 80))"""
USABLE = """[...document.querySelectorAll('button, input, select, #points, #molecule, #space')].filter(e =>
  e.offsetParent && !e.disabled && e.ariaSelected !== 'false').length"""
FOCUSED = """[[...document.querySelectorAll('body *')].indexOf(document.activeElement),
  getComputedStyle(document.activeElement).outlineStyle, document.activeElement.outerHTML.slice(0, 80)]"""
TABS = ("map", "particle", "tomograms", "act", "live")
AROUND_ALL = [(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98)]


def test_it_loads(page: Page, link: str) -> None:
    assert page.js("document.title") == "run · opustomo explore" and f"{PARTICLES} particles" in page.text("about")
    assert "token" not in page.js("location.href"), "the link stays in nobody's history"
    assert covered(pixels(page, "points")) > 0.002 and covered(pixels(page, "molecule")) > 0.02


def test_colours_follow_the_menu(page: Page) -> None:
    before = pixels(page, "points")
    assert "class 0" in page.text("legend")
    for name in ("evidence", "tomogram", "density", "turn"):
        page.choose("colour", name)
        page.wait(lambda before=before: np.abs(pixels(page, "points") - before).max() > 60)
        assert covered(pixels(page, "points")) > 0.002
        before = pixels(page, "points")
    page.choose("colour", "class:kmeans3")
    page.choose("x", "z:2")
    page.wait(lambda: np.abs(pixels(page, "points") - before).max() > 60)
    page.choose("x", "pc:1")


def test_lasso_box_and_set_operations(page: Page, run: Path) -> None:
    """The same counts as from the codes: all, a class, what is left of it, undone and done again."""
    labels = load_labels(run / "analyze.1" / "kmeans3" / "labels.pkl")
    sizes = np.bincount(labels)
    page.click("[data-tool=lasso]")
    page.drag("points", [*AROUND_ALL[:2], (0.98, 0.5), *AROUND_ALL[2:]][::-1])
    page.wait(lambda: "selected" in page.text("count") and page.times("lasso"))
    assert len(page.times("lasso")) == 1 and page.times("lasso")[0]["duration"] < 500
    everyone = int(page.text("count").split()[0])
    assert everyone >= PARTICLES - 4  # a tail may lie outside of what is shown
    page.click("#legend button:nth-child(2)")
    assert page.text("count") == f"{sizes[1]} selected"
    page.choose("mode", "add")
    page.click("#legend button:nth-child(3)")
    assert page.text("count") == f"{sizes[1] + sizes[2]} selected"
    page.choose("mode", "subtract")
    page.click("#legend button:nth-child(2)")
    assert page.text("count") == f"{sizes[2]} selected"
    page.click("undo")
    assert page.text("count") == f"{sizes[1] + sizes[2]} selected"
    page.keys("points", "i")
    assert page.text("count") == f"{sizes[0]} selected"
    page.choose("mode", "intersect")
    page.click("#legend button:nth-child(1)")
    assert np.array_equal(rows_kept(run, page, "zero"), np.flatnonzero(labels == 0))
    page.choose("mode", "replace")
    page.click("[data-tool=box]")
    page.drag("points", [(0.02, 0.02), (0.7, 0.7), (0.98, 0.98)][::-1])
    assert int(page.text("count").split()[0]) == everyone
    page.click("clear")
    page.click("[data-tool=pick]")


def test_a_lasso_takes_the_points_inside(page: Page, run: Path) -> None:
    """What is left of the middle of the picture has the smaller values of x."""
    page.click("[data-tool=box]")
    page.drag("points", [(0.02, 0.98), (0.3, 0.5), (0.5, 0.02)])
    left = rows_kept(run, page, "left")
    score = np.array(page.driver.execute_async_script(
        "const done = arguments[0]; fetch('/api/0/column?name=pc:1').then(r => r.arrayBuffer()).then(b => {"
        "const n = new DataView(b).getUint32(0, true); done(Array.from(new Float32Array(b, 4 + n))); });"
    ))  # fmt: skip
    inside = np.zeros(PARTICLES, bool)
    inside[left] = True
    assert 5 < len(left) < PARTICLES - 5
    # but for those above and below the picture
    assert (score[~inside] < score[inside].max()).sum() <= 4
    page.click("clear")
    page.click("[data-tool=pick]")


def test_range_and_nearest(page: Page, run: Path) -> None:
    page.choose("colour", "pc:1")
    page.wait(lambda: "Select this range" in page.text("legend"))
    page.click("range")
    many = int(page.text("count").split()[0])
    assert many >= PARTICLES - 4
    page.choose("colour", "class:kmeans3")
    page.click("tab-particle")
    page.wait(lambda: page.text("facts"))
    page.click("tab-map")
    page.set("k", 7)
    page.click("nearest")
    page.wait(lambda: page.text("count") == "7 selected")
    page.click("clear")


def click_on_a_point(page: Page) -> None:
    """On the first coloured spot of the scatter, away from the legend."""
    picture = pixels(page, "points")
    h, w, _ = picture.shape
    spots = np.argwhere((picture.max(-1) - picture.min(-1)) > 60)
    spots = spots[
        (spots[:, 1] < 0.6 * w) & (spots[:, 1] > 0.05 * w) & (spots[:, 0] > 0.1 * h) & (spots[:, 0] < 0.9 * h)
    ]
    y, x = spots[len(spots) // 2]
    page.drag("points", [(x / w, y / h)])


def test_a_click_decodes_a_map(page: Page) -> None:
    """The molecule appears, and is another one than the mean."""
    before = pixels(page, "molecule")
    page.map_after(lambda: click_on_a_point(page))
    page.wait(lambda: page.text("caption").startswith("particle "))
    after = pixels(page, "molecule")
    assert covered(after) > 0.02 and np.abs(after - before).max() > 60
    assert pixels(page, "slices").std() > 10


def test_the_contour_turns_and_the_colour(page: Page) -> None:
    wide = covered(pixels(page, "molecule"))
    page.set("level", 850)
    page.wait(lambda: covered(pixels(page, "molecule")) < 0.8 * wide)
    page.set("level", 350)
    page.wait(lambda: covered(pixels(page, "molecule")) > 0.9 * wide)
    before = pixels(page, "molecule")
    page.keys("molecule", "\ue014", "\ue014", "\ue014")  # right arrow
    page.wait(lambda: np.abs(pixels(page, "molecule") - before).max() > 40)
    page.set("tint", "#d55e00")
    page.wait(lambda: (lambda p: (p[..., 0] - p[..., 2]).max())(pixels(page, "molecule")) > 80)
    page.set("tint", "#5b9bd5")


def test_a_second_map_and_the_difference(page: Page) -> None:
    page.map_after(lambda: page.choose("what", "class:kmeans3:0"))
    assert page.text("command").endswith("--kmeans 3")
    page.click("hold")
    page.wait(lambda: page.find("fsc").is_displayed())
    page.map_after(lambda: page.choose("what", "class:kmeans3:2"))
    whole = covered(pixels(page, "molecule"))
    page.choose("show", "difference")  # the map in grey, and what it has more or less in colours
    page.wait(lambda: 0.0005 < covered(pixels(page, "molecule")) < 0.9 * whole)
    assert "less class 0 of k-means 3" in page.text("caption")
    assert pixels(page, "fsc").std() > 3
    page.click("hold")
    assert not page.find("fsc").is_displayed()


def test_a_series_and_its_movie(page: Page, run: Path) -> None:
    page.map_after(lambda: page.choose("what", "pc:1"))
    first = pixels(page, "molecule")
    page.map_after(lambda: page.set("step", 9))
    assert np.abs(pixels(page, "molecule") - first).max() > 40
    page.set("n", 3)
    page.wait(lambda: page.find("step").get_attribute("max") == "2")
    page.click("movie")
    page.wait(lambda: "movie pc:1: done" in page.text("jobs"))
    assert (run / "explore" / "pc1_3.1" / "reference.gif").read_bytes().startswith(b"GIF8")
    page.click("tab-map")


def test_a_drawn_way(page: Page, run: Path) -> None:
    """Two particles clicked one after the other give a series, and the command line that makes the same."""
    page.click("[data-tool=path]")
    picture = pixels(page, "points")
    spots = np.argwhere((picture.max(-1) - picture.min(-1)) > 60) / picture.shape[:2]
    spots = spots[
        (spots[:, 1] > 0.05) & (spots[:, 0] > 0.1) & (spots[:, 0] < 0.9) & ((spots[:, 1] < 0.6) | (spots[:, 0] > 0.5))
    ]
    for y, x in (spots[spots[:, 1].argmin()], spots[spots[:, 1].argmax()]):
        page.drag("points", [(x, y)])
    page.wait(lambda: "--path" in page.text("command"))
    words = page.text("command").split()
    assert words[:2] == ["opustomo", "volumes"] and words[words.index("--path") + 1].isdigit()
    page.set("n", 3)
    page.wait(lambda: "--points 3" in page.text("command"))
    page.click("movie")
    page.wait(lambda: "movie path" in page.text("jobs") and page.text("jobs").split("\n")[0].count("done"))
    page.click("tab-map")
    page.click("[data-tool=pick]")


def test_export_and_read_back(page: Page, run: Path, small_set: SmallSet) -> None:
    labels = load_labels(run / "analyze.1" / "kmeans3" / "labels.pkl")
    page.click("#legend button:nth-child(2)")
    rows = rows_kept(run, page, "one")
    assert np.array_equal(rows, np.flatnonzero(labels == 1))
    page.click("tab-act")
    buttons = page.driver.find_elements("xpath", "//div[b='one']/button[.='Write STAR']")
    buttons[0].click()
    page.wait(lambda: "STAR file of one: done" in page.text("jobs"))
    assert page.text("line").startswith("opustomo select") and "--selection one" in page.text("line")
    written = read_star(run / "selections" / "one" / "selected.star")
    assert np.array_equal(identities(written), identities(read_star(small_set.star))[rows])
    page.click("tab-map")
    page.click("clear")


def test_a_selection_is_loaded_and_classified_again(page: Page, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    page.click("#legend button:nth-child(1)")
    rows = rows_kept(run, page, "again")
    page.click("clear")
    page.click("tab-act")
    page.driver.find_element("xpath", "//div[b='again']/button[.='Select']").click()
    page.wait(lambda: page.text("count") == f"{len(rows)} selected")
    assert np.array_equal(rows_kept(run, page, "loaded"), rows)
    page.click("tab-act")
    page.set("clusters", 2)
    page.driver.find_element("xpath", "//div[b='again']/button[.='Classify again']").click()
    page.wait(lambda: "2 classes of again: done" in page.text("jobs"))
    assert "--selection again --clusters 2" in page.text("line")
    page.wait(lambda: page.js("document.querySelector('#colour option[value=\"class:filter.kmeans2\"]') !== null"))
    page.choose("colour", "class:filter.kmeans2")
    page.wait(lambda: len(page.driver.find_elements("css selector", "#legend button")) == 2)
    sizes = [int(page.text(f"#legend button:nth-child({i}) em")) for i in (1, 2)]
    labels = load_labels(run / "analyze.filter.1" / "kmeans2" / "labels.pkl", -1)
    assert sizes == np.bincount(labels[rows]).tolist() and set(labels[np.setdiff1d(np.arange(PARTICLES), rows)]) == {-1}
    page.click("tab-map")
    page.choose("what", "class:filter.kmeans2:1")
    page.wait(lambda: page.text("command").endswith("--filtered --kmeans 2"))
    page.choose("colour", "class:kmeans3")
    page.click("clear")


def test_a_particle_and_its_tomogram(page: Page) -> None:
    page.click("tab-particle")
    page.wait(lambda: len(page.driver.find_elements("css selector", "#pictures canvas")) == 12)
    told = page.text("facts")
    page.click("next")
    page.wait(lambda: page.text("facts") != told)
    assert (
        "in the STAR file" in page.text("facts")
        and "not known" not in page.text("facts")
        and pixels(page, "pictures").std() > 20
    )
    page.click("tab-tomograms")
    page.wait(lambda: covered(pixels(page, "space")) > 0.001)
    before = pixels(page, "space")
    page.keys("space", "\ue012", "\ue012")
    page.wait(lambda: np.abs(pixels(page, "space") - before).max() > 60)
    assert "particles" in page.text("shares")
    page.click("tab-map")


def test_it_can_be_used_with_the_keyboard_and_read_aloud(page: Page) -> None:
    page.keys("tab-map", "\ue014")
    assert page.find("tab-particle").get_attribute("aria-selected") == "true"
    page.keys("tab-particle", "\ue012")
    page.keys("points", "l")
    assert page.find("[data-tool=lasso]").get_attribute("aria-pressed") == "true"
    page.keys("points", "p")
    before = pixels(page, "ink")
    page.keys("points", "+", "+")
    page.wait(lambda: np.abs(pixels(page, "ink") - before).max() > 60)
    page.keys("points", "0")
    assert page.find("status").get_attribute("aria-live") == "polite"
    page.keys("#legend button:nth-child(2)", "\ue007")  # Enter
    assert page.text("count") == page.text("#legend button:nth-child(2) em") + " selected"
    page.choose("colour", "pc:1")
    page.wait(lambda: page.driver.find_elements("id", "range"))
    page.keys("range", "\ue007")
    assert int(page.text("count").split()[0]) >= PARTICLES - 4
    page.choose("colour", "class:kmeans3")
    page.keys("clear", "\ue007")


@pytest.mark.parametrize("tab", TABS)
def test_every_control_has_a_name_and_is_reached_by_tab(page: Page, tab: str) -> None:
    """The browser's own tree of what a screen reader is told, and a stop of the Tab key for every control."""
    page.click(f"tab-{tab}")
    page.wait(lambda: tab != "particle" or page.js("document.querySelectorAll('#pictures canvas').length"))
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen = [node for node in nodes if not node.get("ignored")]
    used = [node for node in seen if any(p["name"] == "focusable" and p["value"]["value"] for p in node["properties"])]
    used = [node for node in used if node["role"]["value"] not in ("RootWebArea", "MenuListPopup", "option")]
    images = [node for node in seen if node["role"]["value"] in ("image", "img")]
    assert [node for node in (*used, *images) if not node.get("name", {}).get("value")] == []
    assert len(used) >= page.js(USABLE) > 15
    stops = set()
    page.driver.execute_script("document.getElementById('epoch').focus()")
    for _ in range(page.js(USABLE)):
        page.press("\ue004")  # Tab
        place, outline, name = page.js(FOCUSED)
        assert place < 0 or outline != "none", f"{name}: it is not seen that this has the focus"
        stops.add(place)
    assert len(stops - {-1}) >= page.js(USABLE) - 1  # beyond the last comes the browser itself
    page.click("tab-map")


@pytest.mark.parametrize("size", [(1280, 720), (1920, 1080)], ids=str)
def test_everything_has_its_place(page: Page, size: tuple[int, int]) -> None:
    """Nothing is cut off at the size of a laptop's screen, nor needs scrolling."""
    page.size(*size)
    page.wait(lambda: page.js("innerWidth") == size[0])
    assert page.js(BEYOND) == []
    assert page.find("points").size["height"] > 0.6 * size[1] and page.find("molecule").size["height"] > 0.3 * size[1]
    page.size(1280, 720)


def test_a_running_training_is_watched(page: Page, run: Path, finished_run: Path) -> None:
    """State, curves, and the codes of the next epoch as soon as it is there."""
    page.click("tab-live")
    with (run / "run.log").open("a") as log:
        hold(log, run)
        log.write("2026-01-01 00:00:00 WARNING the codes have collapsed\n")
        log.flush()
        page.js("location.reload()")
        page.wait(lambda: page.js("document.readyState") == "complete" and page.times("map-shown"))
        page.click("tab-live")
        page.wait(lambda: "running" in page.text("state") and "left" in page.text("state"))
        assert "the codes have collapsed" in page.text("state")
        assert pixels(page, "bound").std() > 3
        assert page.find("epoch").get_attribute("value") == "1"
        for name in ("weights", "pose", "z"):
            shutil.copy(finished_run / f"{name}.2.pkl", run)
        page.wait(lambda: page.find("epoch").get_attribute("value") == "2")
        page.wait(lambda: covered(pixels(page, "points")) > 0.0005)
    page.click("tab-map")


def test_a_wrong_token_shows_no_page(page: Page, link: str) -> None:
    page.open(link[:-5] + "wrong")
    assert "a wrong token" in page.js("document.body.textContent") and not page.js("document.querySelector('canvas')")
    page.open(link)
    page.wait(lambda: page.times("map-shown"))


def test_no_complaint_and_nothing_beyond_this_machine(page: Page) -> None:
    """Of all that the tests above did: the refused page is the one complaint, and all addresses are here."""
    wrong = [line for line in page.complaints() if "403" not in line]
    assert wrong == []
    asked = [address for address in page.requests() if not address.startswith(("data:", "blob:", "chrome"))]
    assert len(asked) > 50 and all(address.startswith("http://127.0.0.1:") for address in asked)


def test_a_run_that_has_only_begun(page: Page, run: Path, tmp_path: Path) -> None:
    """Before the first epoch there is the training view, and it is told what is missing."""
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("run.log", "config.yaml"):
        shutil.copy(run / name, begun)
    with served(begun) as (_, link):
        page.open(link)
        page.wait(lambda: "No epoch has ended yet" in page.text("empty"))
        assert page.find("tab-live").get_attribute("aria-selected") == "true"
        for name in ("weights", "pose", "z"):
            shutil.copy(run / f"{name}.1.pkl", begun)
        page.js("location.reload()")
        page.wait(lambda: page.times("map-shown"))
    assert page.complaints() == []


def test_a_browser_without_webgl_is_told_so(page: Page, link: str) -> None:
    absent = {"source": "HTMLCanvasElement.prototype.getContext = () => null;"}
    script = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", absent)
    page.open(link)
    page.wait(lambda: "this browser has no WebGL: switch on" in page.text("status"))
    page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


@pytest.mark.skipif(not DRAWN, reason="only where OPUSTOMO_SCREENSHOT names a run, for the documents")
def test_the_picture_of_the_documents(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[1] / "docs" / "images" / "explore.png"
    run = Path(DRAWN or "").resolve()
    monkeypatch.chdir(run.parents[1])  # the page shows paths
    with served(run.relative_to(run.parents[1])) as (_, link):
        page.open(link)
        page.wait(lambda: page.times("map-shown"))
        classes = page.find("colour").get_attribute("value").removeprefix("class:")
        page.choose("x", "pc:1")
        page.choose("y", "pc:2")
        page.map_after(lambda: page.choose("what", f"class:{classes}:1"))
        page.click("hold")
        page.map_after(lambda: page.choose("what", f"class:{classes}:0"))
        page.choose("show", "difference")
        page.click("[data-tool=lasso]")
        page.drag("points", [(0.32 + 0.27 * np.cos(a), 0.2 + 0.22 * np.sin(a)) for a in np.linspace(0, 6.2, 40)])
        page.wait(lambda: "selected" in page.text("count"))
        page.js("document.activeElement.blur()")
        time.sleep(0.5)
        shown = Image.open(BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
        shown.save(path, optimize=True)
        assert path.stat().st_size < 400_000
