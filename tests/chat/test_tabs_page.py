"""The other tabs, a server that goes away, and who may in."""

import re
from concurrent.futures import ThreadPoolExecutor

import httpx
from playwright.sync_api import expect
from processes import Chat

LONG = {"temperature": "0", "min_tokens": "1900", "max_tokens": "1900"}
BUSY = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True}
ABOVE_ZERO = re.compile(r"^[1-9][\d,]*$")


def test_the_engine_tab_follows_the_load(window, server):
    window.tab("Engine")
    running, rate = window.page.locator("#now-running"), window.page.locator("#now-tokens-s")
    expect(running).to_have_text("0")
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(httpx.post, f"{server.url}/v1/completions", json=BUSY, timeout=120) for _ in range(4)
        ]
        expect(running).to_have_text(ABOVE_ZERO)
        expect(rate).to_have_text(ABOVE_ZERO)
        expect(window.page.locator("#bar-kv-device")).not_to_contain_text("0.0%")
        expect(window.page.locator("#bar-stage-0-busy")).not_to_contain_text("0.0%")
        expect(window.page.locator("#bar-kv-host")).to_contain_text("blocks")
        assert all(call.result().status_code == 200 for call in calls)
    expect(running).to_have_text("0")
    drawn = window.page.locator("#engine-plots polyline.line-0").first.get_attribute("points")
    assert len({point.split(",")[1] for point in drawn.split()}) > 1


def test_two_settings_side_by_side(window):
    window.tab("Compare")
    window.fill("right-max_tokens", "4")
    window.fill("compare-prompt", "Tell me a story")
    window.page.locator("#compare-prompt textarea").press("Enter")
    expect(window.page.locator("#compare-right .stats")).to_contain_text("4 tokens")
    expect(window.page.locator("#compare-left .stats")).to_contain_text("tokens/s")
    texts = [window.page.locator(f"#{side}-answer").inner_text() for side in ("left", "right")]
    assert len(texts[0]) > len(texts[1]) > 0


def test_a_login_is_asked_for_and_the_queue_has_an_end(server, open_page, tmp_path):
    logins = tmp_path / "logins"
    logins.write_text("# who may in\nanna:hard to guess\n")
    limits = ("--max-answers", 1, "--max-queue", 1)
    with Chat(tmp_path / "chat", server.url, "--auth", f"@{logins}", *limits) as chat:
        assert httpx.get(f"{chat.url}/config").status_code == 401
        wrong = {"username": "anna", "password": "anna"}
        assert httpx.post(f"{chat.url}/login", data=wrong).status_code == 400
        window = open_page(chat.url)
        window.page.get_by_label("username").fill("anna")
        window.page.get_by_label("password").fill("hard to guess")
        window.page.get_by_role("button", name="Login").click()
        expect(window.box).to_be_visible()
        login = {"username": "anna", "password": "hard to guess"}
        others = [open_page(chat.url, login=login) for _ in range(2)]
        window.open("Sampling")
        for field, value in LONG.items():
            window.fill(field, value)
        window.send("Count to 20")
        expect(window.bots.last).to_contain_text("3")
        waiting, refused = (other.send_and_see("Hello") for other in others)
        assert (waiting, refused) == (200, 503)
        expect(others[1].page.get_by_test_id("toast-body")).to_contain_text("busy")
        window.page.locator("#message .stop-button").click()
        assert others[0].answer(1)
        chat.finish()


def test_the_server_dies_and_comes_back(window, server):
    window.open("Sampling")
    for field, value in LONG.items():
        window.fill(field, value)
    window.send("Count to 20")
    expect(window.bots.last).to_contain_text("3")
    server.kill()
    expect(window.failures).to_contain_text("The connection broke")
    window.wait_idle()
    expect(window.bots.last).to_contain_text("3")
    window.tab("Engine")
    expect(window.page.locator("#engine-now")).to_contain_text("No server answers")
    window.tab("Chat")
    window.button("Retry").click()
    expect(window.failures).to_contain_text("No server answers at")
    window.wait_idle()
    server.launch()
    server.wait_ready()
    for field in ("min_tokens", "max_tokens"):
        window.fill(field, "")
    window.button("Retry").click()
    expect(window.stats).to_have_count(1)
    expect(window.failures).to_have_count(0)
    window.wait_idle()
    assert window.bots.last.inner_text().startswith("1")
