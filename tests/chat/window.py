"""The chat page in a browser, as one who reads and types: a profile of its own, and what went wrong in it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Locator, expect

WAIT_MS = 20_000  # for a condition on a busy machine
# All that has come is drawn: parts of the page are a frame behind others.
DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


class Window:
    """One page. It fails at its end if it asked another host for anything, or a script failed."""

    def __init__(
        self, browser: Browser, url: str, login: dict[str, str] | None = None, **options: object
    ) -> None:
        permissions = ["clipboard-read", "clipboard-write"]
        self._context = browser.new_context(permissions=permissions, **options)
        self._context.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        self.page = self._context.new_page()
        self.hosts: set[str] = set()
        self.faults: list[str] = []
        self.page.on("request", self._asked)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.url = url
        if login is not None:
            assert self._context.request.post(f"{url}/login", form=login).ok
        self.page.goto(url)

    def _asked(self, request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.netloc)

    def finish(self) -> None:
        self._context.close()
        assert self.hosts == {urlsplit(self.url).netloc}
        assert not self.faults

    @property
    def box(self) -> Locator:
        return self.page.locator("#message textarea")

    @property
    def bots(self) -> Locator:
        """What the model said, without the lines under it."""
        return self.page.locator('#chatbot [data-testid=bot]:not([aria-label$="a component of type html"])')

    @property
    def users(self) -> Locator:
        return self.page.locator("#chatbot [data-testid=user]")

    @property
    def stats(self) -> Locator:
        return self.page.locator("#chatbot .stats")

    @property
    def failures(self) -> Locator:
        return self.page.locator("#chatbot .failure")

    def send(self, text: str) -> None:
        """Types text and sends it; does not wait for the answer."""
        self.box.fill(text)
        self.box.press("Enter")

    def send_and_see(self, text: str) -> int:
        """Sends text; the status with which the page's server took it, or did not."""
        with self.page.expect_response("**/queue/join*") as taken:
            self.send(text)
        return taken.value.status

    def ask(self, text: str) -> str:
        """Sends text, and returns the whole answer to it."""
        asked = self.users.count()
        self.send(text)
        return self.answer(asked + 1)

    def answer(self, number: int) -> str:
        """The answer to the number-th question, which is the last, once it is whole."""
        expect(self.users).to_have_count(number)
        expect(self.stats).to_have_count(number)
        self.wait_idle()
        self.page.evaluate(DRAWN)
        return self.bots.last.get_attribute("aria-label").removeprefix("bot's message: ")

    def wait_idle(self) -> None:
        expect(self.page.locator("#message .submit-button")).to_be_visible()

    def button(self, title: str) -> Locator:
        """The last button of that title in the conversation."""
        return self.page.locator(f"#chatbot button[title='{title}']").last

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def open(self, section: str) -> None:
        """Unfolds a section at the side."""
        self.page.locator("#side").get_by_role("button", name=re.compile(section)).click()

    def upload(self, file: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.locator("#upload").click()
        chooser.value.set_files(file)

    def fill(self, field: str, value: str) -> None:
        self.page.locator(f"#{field} :is(input, textarea)").first.fill(value)
