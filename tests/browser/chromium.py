"""A headless Chromium that tells all it was asked to fetch and all it complained about."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PATIENCE = 60  # seconds: the machine may be busy


class Browser:
    """One window."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    @property
    def address(self) -> str:
        return str(self.driver.current_url)

    def go(self, url: str) -> None:
        """Open an address afresh and wait until its page is drawn."""
        self.driver.get("about:blank")
        self.driver.get(url)
        self.settle()

    def settle(self) -> None:
        """Wait until the page neither loads nor changes: three looks at it are alike."""
        looks: list[Any] = []

        def is_still() -> bool:
            state = self.run(
                "return document.querySelector('main:not([aria-busy]) h1') && [location.href,"
                " document.body.innerText.length, performance.getEntriesByType('resource').length]"
            )
            looks.append(state)
            return state is not None and looks[-3:] == [state] * 3

        self.wait(is_still)

    def wait(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < limit, "waited in vain"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(script)

    def text(self, selector: str) -> str:
        """Text of the first element, as it is drawn."""
        return str(self.run(f"return document.querySelector({json.dumps(selector)})?.innerText ?? ''")).strip()

    def press(self, *keys: str) -> None:
        """Keys, by their names where they have one, to what has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.driver).send_keys(*(getattr(Keys, key) if len(key) > 1 else key for key in keys)).perform()
        self.settle()

    def resize(self, width: int, height: int) -> None:
        """The size of what is shown; below 500 px a window can't be made as narrow."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, *, dark: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def console(self) -> list[str]:
        """What it complained about since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested(self) -> list[str]:
        """Every address it wanted since it was last asked."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return [url for url in found if url != "about:blank"]


def chromium_and_driver() -> tuple[str, str] | None:
    """The browser's program and its driver's, where both are installed."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return None if program is None or driver is None else (program, driver)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Skips, and says what to install, where there is no Chromium or no driver for it."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    installed = chromium_and_driver()
    if installed is None:
        pytest.skip("no Chromium, or no chromedriver: on Debian, apt-get install chromium chromium-driver")
    program, driver = installed
    options = webdriver.ChromeOptions()
    options.binary_location = program
    flags = "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking no-first-run"
    for flag in [*flags.split(), "disable-component-update", "disable-sync"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    try:
        running.set_script_timeout(PATIENCE)
        yield Browser(running)
    finally:
        running.quit()
