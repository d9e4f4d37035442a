"""Saved conversations, documents, metrics, plots and logins, without a browser."""

import pytest

from ds_serve.chat import arguments, document, saved
from ds_serve.chat.engine import Sample, parse, rate
from ds_serve.chat.plots import Series, nice, plot

EXPOSITION = """# HELP ds_serve_kv_blocks KV blocks
# TYPE ds_serve_kv_blocks gauge
ds_serve_kv_blocks{state="used",tier="device"} 3.0
ds_serve_kv_blocks{state="free",tier="host"} 5.0
ds_serve_cached_tokens_total{tier="host"} 16.0
ds_serve_output_tokens_total 100.0
ds_serve_output_tokens_per_request_bucket{le="1.0"} 7.0
"""


def chat(number, text="Hello"):
    turns = [{"role": "user", "content": f"{text} {number}"}, {"role": "assistant", "content": "Hi"}]
    return saved.new_chat() | {"id": str(number), "turns": turns}


def test_the_newest_chats_are_kept_and_the_oldest_go():
    store = saved.empty()
    for number in range(60):
        store = saved.put(store, chat(number))
    assert saved.choices(store)[0] == ("Hello 59", "59") and store["current"] == "59"
    assert len(store["chats"]) == 50
    store = saved.put(store, chat(30))
    assert [each["id"] for each in store["chats"][:2]] == ["30", "59"] and len(store["chats"]) == 50


def test_a_browser_is_given_no_more_than_it_can_keep():
    store = saved.empty()
    for number in range(5):
        store = saved.put(store, chat(number, "x" * 1_000_000))
    assert [each["id"] for each in store["chats"]] == ["4", "3"]


def test_what_a_browser_sends_is_checked():
    good = chat(1)
    bad = [None, {"id": "2"}, good | {"turns": ["x"]}, good | {"turns": [{"role": "user"}]}]
    assert saved.checked({"current": "1", "chats": [*bad, good]}) == {"current": "1", "chats": [good]}
    for nothing in (None, [], {"chats": 3}, "x"):
        assert saved.checked(nothing) == saved.empty()


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.exe", b"x", "ends in .txt, .md, .pdf"),
        ("a.txt", b" \n", "has no text"),
        ("a.txt", b"\0x", "no text file"),
        ("a.pdf", b"%PDF-nonsense", "cannot be read as a PDF"),
        ("a.md", b"x" * 1_000_001, "more than 1,000,000 characters"),
    ],
)
def test_a_file_without_text_is_refused_by_name(tmp_path, name, data, told):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=told) as refused:
        document.read(str(tmp_path / "file"), name)
    assert name in str(refused.value)


def test_a_text_is_read_whatever_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfh\xe9llo\n")
    assert document.read(str(tmp_path / "file"), "A.TXT") == "h\ufffdllo"


def test_metrics_are_told_apart_by_label():
    sample = Sample(10.0, parse(EXPOSITION))
    assert sample.get("kv_blocks", "used", "device") == 3 and sample.get("kv_blocks", "free", "host") == 5
    assert sample.get("output_tokens") == 100 and sample.sum("cached_tokens") == 16
    assert sample.get("unknown") == 0


def test_a_rate_is_never_below_zero():
    old, new = (Sample(at, {("output_tokens",): value}) for at, value in ((10.0, 100.0), (12.0, 160.0)))
    assert rate(old, new, lambda s: s.get("output_tokens")) == 30
    restarted = Sample(14.0, {("output_tokens",): 5.0})
    assert rate(new, restarted, lambda s: s.get("output_tokens")) == 0


def test_a_plot_ends_at_now_and_holds_its_span():
    points = [(0.0, 9.0), (100.0, 0.0), (160.0, 30.0)]
    drawn = plot("<b>", [Series("a", points)], 120)
    assert 'points="150.0,100.0 300.0,40.0"' in drawn and "&lt;b&gt;" in drawn and ">50<" in drawn
    assert [nice(value) for value in (0, 1, 1.5, 3, 20, 21, 999)] == [1, 1, 2, 5, 20, 50, 1000]


def test_logins_come_from_the_flag_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "logins"
    file.write_text("# all\nanna:a:b\n\nbob:c\n")
    assert arguments.logins({"auth": "anna:x"}) == [("anna", "x")]
    assert arguments.logins({"auth": f"@{file}"}) == [("anna", "a:b"), ("bob", "c")]
    assert arguments.logins({"auth": None}) == []
    monkeypatch.setenv(arguments.LOGIN_VARIABLE, "eve:y")
    assert arguments.logins({"auth": None}) == [("eve", "y")]
    for bad in ("secret", ":x", "anna:", "", "@nowhere"):
        with pytest.raises(ValueError, match="--auth") as refused:
            arguments.logins({"auth": bad})
        assert "secret" not in str(refused.value)
