"""A page in a real browser, and everything that it asked for or complained of."""

from typing import Literal

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

Scheme = Literal["light", "dark"]


class Visit:
    """One page, opened."""

    def __init__(
        self, browser: Browser, url: str, *, width: int = 1280, scheme: Scheme = "light"
    ) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window; 0 or less where it fits."""
        found = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        return int(found)

    def serious_faults(self) -> list[tuple[str, str]]:
        """What axe finds that keeps people from reading the page, and where first."""
        found = Axe().run(self.page).response["violations"]
        return [
            (one["id"], one["nodes"][0]["html"][:200])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
