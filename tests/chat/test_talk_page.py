"""Talking: answers come in pieces, can be stopped, asked for again, and taken back."""

from playwright.sync_api import expect

LONG = {"temperature": "0", "min_tokens": "1900", "max_tokens": "1900"}
WATCH = """() => {
  window.seen = [];
  const log = document.querySelector("#chatbot");
  new MutationObserver(() => {
    const bots = log.querySelectorAll('[data-testid=bot]:not([aria-label$="a component of type html"])');
    if (bots.length) window.seen.push(bots[bots.length - 1].ariaLabel.replace("bot's message: ", ""));
  }).observe(log, {subtree: true, childList: true, attributes: true});
}"""


def test_an_answer_comes_in_pieces_with_its_figures_below(window):
    window.open("Sampling")
    for field, value in {"temperature": "0", "min_tokens": "600", "max_tokens": "600"}.items():
        window.fill(field, value)
    window.page.evaluate(WATCH)
    text = window.ask("Tell me a story")
    assert text.startswith("Once upon a time")
    seen = [piece for piece in dict.fromkeys(window.page.evaluate("window.seen")) if piece not in ("", "…")]
    assert len(seen) >= 3
    assert [piece for piece in seen if not text.startswith(piece)] == []
    for figure in ("first token", "tokens/s", "prompt", "from device", "from host cache"):
        expect(window.stats).to_contain_text(figure)


def test_stop_keeps_the_text_and_ends_the_work(window, server):
    window.open("Sampling")
    for field, value in LONG.items():
        window.fill(field, value)
    window.send("Count to 20")
    expect(window.bots.last).to_contain_text("3")
    window.page.locator("#message .stop-button").click()
    window.wait_idle()
    server.wait_idle()
    kept = window.bots.last.inner_text()
    assert "3" in kept
    expect(window.stats).to_have_count(1)
    expect(window.stats).to_contain_text("or more")  # the count that a whole answer ends with never came
    for field in LONG:
        window.fill(field, "")
    assert window.ask("What is 2 + 3?")
    assert window.bots.first.inner_text() == kept


def test_copy_retry_edit_and_undo(window):
    window.open("Sampling")
    window.fill("temperature", "0")
    said = window.ask("What is the capital of France?")
    assert "Paris" in said
    window.button("Copy message").click()
    assert window.page.evaluate("navigator.clipboard.readText()").strip() == said
    window.fill("max_tokens", "2")
    window.button("Retry").click()
    expect(window.stats).to_contain_text("2 tokens")
    expect(window.bots).to_have_count(1)
    window.fill("max_tokens", "50")
    window.button("Edit").click()
    window.page.locator("#chatbot textarea").fill("What is the capital of Italy?")
    window.button("Submit").click()
    expect(window.bots.last).to_contain_text("Rome")
    window.wait_idle()
    expect(window.users).to_have_count(1)
    window.button("Undo").click()
    expect(window.users).to_have_count(0)
    expect(window.box).to_have_value("What is the capital of Italy?")


def test_conversations_stay_in_the_browser(window):
    saved = window.page.locator("#saved label")
    window.ask("My name is Anna.")
    expect(saved).to_have_count(1)
    window.page.get_by_role("button", name="New chat").click()
    expect(window.users).to_have_count(0)
    window.ask("What is 1 + 1?")
    expect(saved).to_have_count(2)
    window.page.reload()
    expect(window.users).to_contain_text(["What is 1 + 1?"])
    saved.filter(has_text="Anna").click()
    expect(window.users).to_contain_text(["My name is Anna."])
    window.page.get_by_role("button", name="Delete").click()
    expect(saved).to_have_count(1)
    expect(window.users).to_have_count(0)
    saved.first.click()
    window.button("Clear").click()
    expect(saved).to_have_count(0)


def test_markdown_is_drawn_and_scripts_are_not_run(window):
    window.ask("**bold** <img src=x onerror=\"document.title='run'\">\n\n```python\nprint(1)\n```")
    expect(window.users.locator("strong")).to_have_text("bold")
    expect(window.users.locator("pre code")).to_contain_text("print(1)")
    assert window.page.title() != "run"
