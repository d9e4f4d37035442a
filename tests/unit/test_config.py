"""Settings: sources in their order of strength, and what is refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from ds_serve.config import Settings, parse_bytes


def test_flag_beats_environment_beats_file(tmp_path, monkeypatch):
    file = tmp_path / "s.yaml"
    file.write_text("model: from-file\nmax_num_seqs: 3\nport: 1\nblock_size: 32\n")
    monkeypatch.setenv("DS_SERVE_MAX_NUM_SEQS", "4")
    monkeypatch.setenv("DS_SERVE_PORT", "2")
    settings = Settings.load(str(file), port=5)
    assert (settings.model, settings.max_num_seqs, settings.port) == ("from-file", 4, 5)
    assert (settings.block_size, settings.host) == (32, "127.0.0.1")
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("text", "bytes_"), [("8GiB", 8 << 30), ("1.5 MB", 1_500_000), ("512", 512), ("4k", 4000), (7, 7)]
)
def test_sizes(text, bytes_):
    assert Settings(model="m", kv_cache_memory=text).kv_cache_memory == bytes_


@pytest.mark.parametrize("text", ["8 apples", "GiB", "-1", "1e9", ""])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize("bad", [{"max_num_seq": 3}, {"port": 70000}, {"dtype": "int8"}, {"block_size": 0}])
def test_unknown_and_bad_settings_are_named(bad, tmp_path):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        Settings(model="m", **bad)
    file = tmp_path / "s.yaml"
    file.write_text("model: m\n" + "".join(f"{key}: {value}\n" for key, value in bad.items()))
    with pytest.raises(ValidationError, match=next(iter(bad))):
        Settings.load(str(file))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        Settings.load("nowhere.yaml")


@pytest.mark.parametrize(
    "given", ["fr=/a, de = /b=c", {"fr": Path("/a"), "de": "/b=c"}], ids=["a flag's text", "a mapping"]
)
def test_adapters(given):
    assert Settings(model="m", adapters=given).adapters == {"fr": "/a", "de": "/b=c"}
    assert Settings(model="m", adapters="").adapters == Settings(model="m").adapters == {}


def test_adapters_of_a_flag_or_the_environment_replace_a_files(tmp_path, monkeypatch):
    file = tmp_path / "s.yaml"
    file.write_text("model: m\nadapters:\n  fr: /a\n  de: /b\n")
    assert Settings.load(str(file)).adapters == {"fr": "/a", "de": "/b"}
    monkeypatch.setenv("DS_SERVE_ADAPTERS", "es=/c")
    assert Settings.load(str(file)).adapters == {"es": "/c"}
    assert Settings.load(str(file), adapters="it=/d").adapters == {"it": "/d"}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("fr", "NAME=DIRECTORY"),
        ("fr=", "NAME=DIRECTORY"),
        ("fr=/a,,de=/b", "NAME=DIRECTORY"),
        ("fr=/a,fr=/b", "given twice"),
        ({" fr": "/a"}, "blanks"),
        ({"": "/a"}, "empty"),
        ("m=/a", "the model's own name"),
    ],
)
def test_bad_adapters(given, why):
    with pytest.raises(ValidationError, match=why):
        Settings(model="somewhere/m", adapters=given)
