"""One server on the demo model, one chat page in front of it, and one headless Chromium for all tests."""

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ranks")]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="package")
def browser():
    """Chromium, by playwright. In CI it is there; elsewhere the tests are skipped without it."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        reason = f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root cannot have a sandbox; small machines have a small /dev/shm.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        started = playwright.chromium.launch(executable_path=path, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="package")
def server(browser, tmp_path_factory):
    """A processes.Model on a port of its own; chat waits for it."""
    from processes import Model

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = Model(tmp_path_factory.mktemp("model"), port)
    running.launch()
    yield running
    running.kill()


@pytest.fixture(scope="package")
def chat(server, tmp_path_factory):
    """A processes.Chat on that server. It ends well, and has talked to this machine alone."""
    from processes import Chat

    with Chat(tmp_path_factory.mktemp("chat"), server.url) as running:  # both start at the same time
        server.wait_ready()
        yield running
        running.finish()


@pytest.fixture
def open_page(browser):
    """Opens a URL in a fresh profile and returns a window.Window; all must be without faults at the end."""
    from window import Window

    windows = []

    def open_(url, **options):
        windows.append(Window(browser, url, **options))
        return windows[-1]

    yield open_
    for window in windows:
        window.finish()


@pytest.fixture
def window(chat, open_page):
    """The page as a reader has it at first."""
    return open_page(chat.url)
