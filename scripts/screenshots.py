"""Takes README's pictures of the chat page, of the demo model at work: python scripts/screenshots.py

Needs Chromium on the PATH and the extras chat and test. Writes docs/images/*.png.
"""

from __future__ import annotations

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from playwright.sync_api import Page, expect, sync_playwright
from run_demo import started

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SIZE = {"width": 1180, "height": 850}
WAIT_MS = 60_000
HANDBOOK = "# Handbook of the blue house\n" + "The blue house has a garden, a kitchen and a red door.\n" * 30
SERVER_FLAGS = ("--num-blocks", "1024", "--host-cache", "32MiB", "--max-num-seqs", "8")
LOAD_REQUESTS, LOAD_TOKENS = 24, 400


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    expect.set_options(timeout=WAIT_MS)
    port, chat_port = _free_port(), _free_port()
    with started(str(port), str(chat_port), *SERVER_FLAGS), sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--hide-scrollbars"]
        )
        page = browser.new_page(viewport=SIZE)
        page.set_default_timeout(WAIT_MS)
        _open(page, f"http://127.0.0.1:{chat_port}")
        _chat(page)
        _engine(page, f"http://127.0.0.1:{port}")
        _compare(page)
        browser.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _open(page: Page, url: str) -> None:
    """Once the page is there: it starts after the server does."""
    with httpx.Client(transport=httpx.HTTPTransport(retries=10)) as http:
        http.get(url)
    page.goto(url)


def _chat(page: Page) -> None:
    page.locator("#side").get_by_role("button", name="Sampling").click()
    page.locator("#temperature textarea, #temperature input").fill("0")
    page.locator("#side").get_by_role("button", name="Sampling").click()
    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    file = {"name": "handbook.md", "mimeType": "text/markdown", "buffer": HANDBOOK.encode()}
    chooser.value.set_files(file)
    expect(page.locator("#context")).to_contain_text("ready in")
    for number, text in enumerate(["What is the capital of France?", "What is ds_serve?"], start=1):
        page.locator("#message textarea").fill(text)
        page.locator("#message textarea").press("Enter")
        expect(page.locator("#chatbot .stats")).to_have_count(number)
    expect(page.locator("#saved label")).to_have_count(1)
    page.locator("h1").click()
    page.screenshot(path=IMAGES / "chat.png")


def _engine(page: Page, url: str) -> None:
    """Under a load that is more than runs at once, with prompts that begin alike."""
    page.get_by_role("tab", name="Engine").click()
    body = {"model": "demo", "max_tokens": LOAD_TOKENS, "ignore_eos": True}
    with ThreadPoolExecutor(LOAD_REQUESTS) as pool:
        for number in range(LOAD_REQUESTS):
            prompt = f"{HANDBOOK}{number}"
            pool.submit(httpx.post, f"{url}/v1/completions", json=body | {"prompt": prompt}, timeout=600)
        expect(page.locator("#now-waiting")).not_to_have_text("0")
        page.wait_for_function(
            "document.querySelector('polyline.line-0').getAttribute('points').length > 300"
        )
        page.screenshot(path=IMAGES / "engine.png")


def _compare(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-prompt textarea").fill("Tell me a story")
    page.locator("#compare-prompt textarea").press("Enter")
    expect(page.locator("#compare-left .stats, #compare-right .stats")).to_have_count(2)
    page.screenshot(path=IMAGES / "compare.png")


if __name__ == "__main__":
    main()
