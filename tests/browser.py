"""A real browser for tests of pages: Debian's chromium, driven by playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

HOW = "needs chromium and playwright: apt-get install chromium, pip install playwright"


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A playwright browser. Skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason=HOW)
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip(HOW)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Any, address: str, **settings: Any) -> Iterator[Any]:
    """A page whose console must stay free of errors. `settings`: of the browser context, such as viewport and color_scheme."""
    context = browser.new_context(**settings)
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    context.close()
    assert errors == []
