"""Debian's Chromium without a screen, driven by Selenium: nothing is downloaded, WebGL is drawn by the processor."""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-unsafe-swiftshader",
    "--hide-scrollbars", "--no-default-browser-check", "--disable-extensions",
)  # fmt: skip
PATIENCE = 40.0  # seconds


def why_not() -> str:
    """Why there is no browser here, "" where there is one."""
    if browser_path() is None or shutil.which("chromedriver") is None:
        return "no Chromium here (apt-get install chromium chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (make setup)"
    return ""


def browser_path() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A window of 1280 x 720 and what a person does in it."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 720) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = browser_path() or ""
        for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        downloads = {"download.default_directory": str(profile / "downloads")}
        options.add_experimental_option("prefs", downloads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the driver's own start
            self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.size(width, height)

    def size(self, width: int, height: int) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def close(self) -> None:
        self.driver.quit()

    def open(self, link: str) -> None:
        self.driver.get(link)

    def find(self, name: str) -> Any:
        """By id, else by selector."""
        kind = "id" if name.replace("-", "").isalnum() else "css selector"
        return self.driver.find_element(kind, name)

    def click(self, name: str) -> None:
        self.find(name).click()

    def text(self, name: str) -> str:
        return str(self.find(name).text)

    def choose(self, name: str, value: str) -> None:
        """An entry of a menu."""
        from selenium.webdriver.support.ui import Select

        Select(self.find(name)).select_by_value(value)

    def set(self, name: str, value: object) -> None:
        """A slider or a field."""
        script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        script += "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind));"
        self.driver.execute_script(script, name, value)

    def keys(self, name: str, *keys: str) -> None:
        self.find(name).send_keys(*keys)

    def press(self, *keys: str) -> None:
        """Keys, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def drag(self, name: str, points: list[tuple[float, float]]) -> None:
        """Through points in parts of the element's width and height from its upper left; one point: a click."""
        from selenium.webdriver.common.action_chains import ActionChains

        element = self.find(name)
        size, actions = element.size, ActionChains(self.driver, duration=0)
        places = [(round((x - 0.5) * size["width"]), round((y - 0.5) * size["height"])) for x, y in points]
        actions.move_to_element_with_offset(element, *places[0]).click_and_hold()
        for place in places[1:]:
            actions.move_to_element_with_offset(element, *place)
        actions.release().perform()

    def js(self, expression: str) -> Any:
        return self.driver.execute_script(f"return {expression}")

    def times(self, name: str) -> list[dict[str, float]]:
        """Marks and measures of the page's own clock, in ms."""
        return list(
            self.js(f"performance.getEntriesByName({name!r}).map(e => ({{start: e.startTime, duration: e.duration}}))")
        )

    def wait(self, what: Callable[[], Any], patience: float = PATIENCE) -> Any:
        """Until it is true, and what it is then."""
        end, found = time.monotonic() + patience, None
        while not found:
            assert time.monotonic() < end, f"did not come about; the page says: {self.text('status')}"
            time.sleep(0.02)
            found = what()
        return found

    def map_after(self, act: Callable[[], Any]) -> None:
        """Do it, and wait for the map that it leads to."""
        before = len(self.times("map-shown"))
        act()
        self.wait(lambda: len(self.times("map-shown")) > before)
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def complaints(self) -> list[str]:
        """What the console has said; software WebGL warns that reading pixels is slow."""
        return [entry["message"] for entry in self.driver.get_log("browser") if "ReadPixels" not in entry["message"]]

    def requests(self) -> list[str]:
        """Addresses that were asked for."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@contextmanager
def served(*runs: Path) -> Iterator[tuple[Any, str]]:
    """A server of these runs in a thread, and its link."""
    from opustomo.explore.server import open_server

    server = open_server(runs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/?token={server.token}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        for desk in server.desks:
            desk.close()
