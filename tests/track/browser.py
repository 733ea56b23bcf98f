"""A real browser for tests: Debian's chromium without a window, driven by playwright."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from playwright.sync_api import ConsoleMessage, Dialog, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 180_000.0  # milliseconds for an answer: a busy machine takes long to start a browser, or to draw a long page


def why_not() -> str | None:
    """Why there is no browser to test with."""
    if any(shutil.which(name) for name in NAMES):
        return None
    return f"none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)"


class Browser:
    """One page in a browser of its own. A context manager."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self._playwright = sync_playwright().start()
        program = next(path for name in NAMES if (path := shutil.which(name)))
        self._browser = self._playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=PATIENCE
        )
        self.page = self._browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(PATIENCE)
        self._problems: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self._problems.append(f"exception: {error}"))
        self.page.on("dialog", self._asked)
        self.page.on("request", self._requested)

    def open(self, url: str) -> None:
        """Load a page, and wait until it is there."""
        self._problems.clear()
        self.page.goto(url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.page.evaluate(expression)

    def click(self, selector: str, nth: int = 0) -> None:
        """A click of the left mouse button in the middle of an element, after it has been brought into view."""
        self.page.locator(selector).nth(nth).click()

    def press(self, key: str) -> None:
        """A key, as it is called in JavaScript (ArrowLeft, e)."""
        self.page.keyboard.press(key)

    def choose(self, selector: str, value: str) -> None:
        """Set a select or an input to a value, with the events that a user's choice has."""
        found = self.page.locator(selector)
        if found.evaluate("e => e.tagName") == "SELECT":
            found.select_option(value)
        else:
            found.fill(value)

    def colour_scheme(self, scheme: Any) -> None:
        self.page.emulate_media(color_scheme=scheme)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """What is in view as a PNG, or the whole page."""
        self.page.screenshot(path=path, full_page=whole)

    def problems(self) -> list[str]:
        """What has gone wrong since the page was opened: errors and warnings of the console, exceptions, dialogs, and
        requests but for the page itself."""
        self.page.evaluate("null")  # what the page has said before its answer has been heard by then
        return list(self._problems)

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self._problems.append(f"console: {message.text}")

    def _asked(self, dialog: Dialog) -> None:
        self._problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _requested(self, request: Request) -> None:
        if not request.is_navigation_request() and not request.url.startswith("data:"):
            self._problems.append(f"request: {request.url}")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._browser.close()
        self._playwright.stop()
