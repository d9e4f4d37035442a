"""What is set beside the conversation: sampling, forms of output, tools, context, theme; small screens."""

import json

import jsonschema
from playwright.sync_api import expect

from ds_serve.chat.controls import EXAMPLE_SCHEMA

PHONE = {"width": 390, "height": 844}
# A PDF of one page with one line, as small as PDFs are.
LINES = "(The handbook of the blue house.) Tj 0 -14 Td " * 40
STREAM = f"BT /F1 12 Tf 72 720 Td {LINES} ET"
PDF = f"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 5 0 R>>>>/Contents 4 0 R>>endobj
4 0 obj<</Length {len(STREAM)}>>stream
{STREAM}
endstream endobj
5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj
trailer<</Root 1 0 R/Size 6>>
startxref
0
%%EOF
"""


def test_fields_reach_the_server_and_a_bad_one_is_named(window):
    window.open("Sampling")
    window.fill("max_tokens", "3")
    window.ask("Tell me a story")
    expect(window.stats).to_contain_text("3 tokens")
    window.fill("top_p", "much")
    window.send("Hello")
    toast = window.page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("top_p must be a number, not 'much'")
    window.fill("top_p", "7")
    window.send("Hello")
    expect(window.failures).to_contain_text("top_p")
    expect(window.failures).to_contain_text("Change what it names")


def test_an_answer_of_a_schema(window):
    window.open("Advanced")
    window.page.get_by_role("button", name="Example schema").click()
    expect(window.page.locator("#schema textarea")).to_have_value(EXAMPLE_SCHEMA)
    jsonschema.validate(json.loads(window.ask("Tell me about Anna")), json.loads(EXAMPLE_SCHEMA))


def test_a_tool_is_called_and_its_result_answered_to(window):
    window.open("Advanced")
    window.page.locator("#tools").get_by_label("clock").check()
    window.page.locator("#tool_choice").get_by_label("required").check()
    window.send("What time is it?")
    expect(window.page.locator("#chatbot")).to_contain_text("Calls clock")
    expect(window.page.locator("#chatbot")).to_contain_text("Result")
    expect(window.stats).to_have_count(2)  # of the call, and of the answer to its result
    window.wait_idle()
    expect(window.failures).to_have_count(0)


def test_an_uploaded_text_is_computed_once_and_kept(window, server, tmp_path):
    file = tmp_path / "handbook.pdf"
    file.write_text(PDF)
    window.upload(file)
    context = window.page.locator("#context")
    expect(context).to_contain_text("handbook.pdf")
    expect(context).to_contain_text("ready in")
    assert server.stats()["num_pinned_blocks"] > 0
    window.ask("What is the capital of France?")
    cached = window.page.evaluate(
        "() => document.querySelector('#chatbot .stats').innerText.match(/prompt (\\d+): (\\d+) from device/)"
    )
    assert int(cached[1]) > int(cached[2]) > 0.8 * int(cached[1])
    window.page.get_by_role("button", name="Remove").click()
    expect(context).to_have_text("")
    assert server.stats()["num_pinned_blocks"] == 0


def test_what_is_no_text_is_refused_with_a_sentence(window, tmp_path):
    file = tmp_path / "picture.txt"
    file.write_bytes(b"\0\1\2")
    window.upload(file)
    expect(window.page.locator("#context")).to_contain_text("picture.txt is no text file")


def test_a_system_prompt_and_a_context_that_is_too_long(window):
    window.open("Sampling")
    window.fill("temperature", "0")
    window.fill("system", "Your name is Max.")
    assert "Max" in window.ask("What is your name?")
    window.fill("system", "blue house " * 2000)
    window.box.click()
    expect(window.page.locator("#context")).to_contain_text("too long for the model")
    window.send("Hello")
    expect(window.failures).to_contain_text("too long for the model. Start a new chat")


def test_the_theme_is_switched_and_stays(window):
    dark = "document.body.classList.contains('dark')"
    assert not window.page.evaluate(dark)
    window.page.get_by_role("button", name="Light / dark").click()
    assert window.page.evaluate(dark)
    window.page.reload()
    window.page.wait_for_function(dark)


def test_a_phone_shows_all_without_scrolling_sideways(chat, open_page):
    window = open_page(chat.url, viewport=PHONE, has_touch=True, is_mobile=True, color_scheme="dark")
    window.ask("Tell me a story")
    for tab, part in (("Chat", "#message"), ("Engine", "#bar-kv-device"), ("Compare", "#compare-prompt")):
        window.tab(tab)
        expect(window.page.locator(part)).to_be_visible()
        assert window.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        box = window.page.locator(part).bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= PHONE["width"]
