"""API keys and other secrets: how they are compared, read and kept out of what is shown. No server."""

import hmac

import pytest

from ds_serve.config import Settings
from ds_serve.server.keys import KeyRing
from ds_serve.server.run import forget_secrets


def test_every_digest_is_compared_whichever_fits(monkeypatch):
    compared = []

    def compare(a, b):
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    ring = KeyRing(["a", "bb", "ccc"])
    assert [ring.find(b"Bearer " + key) for key in (b"a", b"bb", b"ccc", b"", b"other" * 99)] == [
        1,
        2,
        3,
        0,
        0,
    ]
    assert compared == [(32, 32)] * 15


@pytest.mark.parametrize(
    ("text", "word"),
    [("", "holds no key"), ("# only\n\n", "holds no key"), ("secret one\n", "key 1"), ("sécret\n", "key 1")],
)
def test_a_file_without_good_keys_is_refused_and_not_repeated(tmp_path, text, word):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match=word) as caught:
        KeyRing.load(Settings(model="m", api_key_file=str(tmp_path / "keys")))
    assert "cret" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        KeyRing.load(Settings(model="m", api_key_file=str(tmp_path / "missing")))


def test_secrets_come_from_the_environment_and_go_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_SERVE_API_KEYS", "sk-hush, sk-quiet")
    monkeypatch.setenv("ds_serve_SSL_KEYFILE_PASSWORD", "sk-silent")
    (tmp_path / "file.yaml").write_text("ssl_certfile: c\n")
    for config in (None, str(tmp_path / "file.yaml")):
        settings = Settings.load(config, model="m", ssl_certfile="c")
        assert len(KeyRing.load(settings)) == 2
        assert settings.ssl_keyfile_password.get_secret_value() == "sk-silent"
        dumps = (repr(settings), settings.model_dump_json(), str(settings.model_dump()))
        assert not any("sk-" in dump for dump in dumps)
        forget_secrets()
        passed_on = Settings.model_validate_json(settings.model_dump_json())
        assert passed_on.api_keys == [] and passed_on.ssl_keyfile_password is None
        monkeypatch.setenv("DS_SERVE_API_KEYS", "sk-hush,sk-quiet")
        monkeypatch.setenv("ds_serve_SSL_KEYFILE_PASSWORD", "sk-silent")
    monkeypatch.setenv("DS_SERVE_API_KEYS", "")
    with pytest.raises(ValueError, match="api_keys"):
        Settings(model="m")
