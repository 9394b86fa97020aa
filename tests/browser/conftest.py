"""A headless Chromium for the tests of the web page: Debian's packages ``chromium`` and ``chromium-driver``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from support.browsing import show_as

MISSING = "no chromedriver; make test-browser installs Debian's chromium and chromium-driver"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser of all tests. Without one they are skipped, unless ``$BROWSER_TEST`` requires it."""
    if shutil.which("chromedriver") is None:
        if os.environ.get("BROWSER_TEST"):
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """The browser with a desktop's window, light, without cookies and choices of an earlier test. The test must leave no error behind."""
    show_as(chromium)
    chromium.get("about:blank")
    chromium.delete_all_cookies()
    chromium.get_log("browser")
    yield chromium
    errors = [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE" and "net::ERR_" not in entry["message"]]
    chromium.get("about:blank")
    assert errors == []
