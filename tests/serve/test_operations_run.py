"""serve() in a process of its own: drain, second signals, keys from the environment, TLS, what it prints."""

import json
import resource
import shutil
import signal
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from test_server_run import assert_nothing_left, engine_pids, model, start, wait_ready  # noqa: F401

from ds_serve import cli
from ds_serve.config import Settings
from ds_serve.server import run

KEY = {"Authorization": "Bearer sk-hush"}
BODY = {"model": "tiny", "prompt": "hi", "stream": True}


def ended(process):
    """Exit code and stderr; stdout is at its end too, so that nothing keeps it open."""
    _, errors = process.communicate(timeout=20)
    return process.returncode, errors


def test_a_drain_lets_answers_end_and_nobody_in(start, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("DS_SERVE_API_KEYS", "sk-hush,sk-quiet")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # for what is started now
    try:
        process = start(step_s=0.3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    url = wait_ready(process)
    allowed, _ = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    assert allowed == min(hard if hard != resource.RLIM_INFINITY else 65536, 65536)
    [engine] = engine_pids(tmp_path)
    assert b"sk-" not in Path(f"/proc/{engine}/environ").read_bytes()
    with httpx.Client(base_url=url, headers=KEY, timeout=20) as client:  # keeps its connections
        assert client.get("/ready").status_code == 200
        with client.stream("POST", "/v1/completions", json=BODY) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while client.get("/ready").status_code == 200:
                pass
            refused = client.post("/v1/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert refused.headers["connection"] == "close"
            assert client.get("/health").status_code == 200
            assert "data: [DONE]" in list(lines)
    code, errors = ended(process)
    assert code == 0
    assert_nothing_left(tmp_path)
    settings = next(line for line in errors.splitlines() if "settings: " in line)
    described = json.loads(settings.partition("settings: ")[2])
    assert (described["accepted_api_keys"], described["served_model_name"]) == (2, "tiny")
    assert "port" in described and "drain_timeout" not in described
    assert "draining: 1 open requests" in errors and "sk-" not in errors
    logged = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert {line["status"] for line in logged if line["path"] == "/v1/completions"} == {200, 503}


def test_a_drain_that_takes_too_long_ends_answers_with_an_error(start, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("DS_SERVE_DRAIN_TIMEOUT", "0.2")
    monkeypatch.setenv("DS_SERVE_ACCESS_LOG", "false")
    process = start(step_s=0.7)
    url = wait_ready(process)
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=20) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
    code, errors = ended(process)
    assert code == 0 and "1 requests are cut off" in errors and "{" not in errors.partition("draining")[2]
    assert_nothing_left(tmp_path)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key that has a password, and a certificate that signed itself, for server and client."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=IP:127.0.0.1 -passout pass:hush -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return str(folder / "cert.pem"), str(folder / "key.pem")


def test_tls_and_a_second_signal(start, tmp_path, monkeypatch, certificate):  # noqa: F811
    cert, key = certificate
    for name, value in {
        "CERTFILE": cert,
        "KEYFILE": key,
        "KEYFILE_PASSWORD": "hush",
        "CA_CERTS": cert,
    }.items():
        monkeypatch.setenv(f"DS_SERVE_SSL_{name}", value)
    process = start(step_s=0.5, children=1)
    line = process.stdout.readline()
    assert " is served on https://127.0.0.1:" in line
    url = "https://127.0.0.1:" + line.rpartition(":")[2].removesuffix("/v1\n")
    stranger = ssl.create_default_context(cafile=cert)
    with pytest.raises(httpx.TransportError):  # it shows no certificate of its own
        httpx.get(f"{url}/health", verify=stranger)
    known = ssl.create_default_context(cafile=cert)
    known.load_cert_chain(cert, key, password="hush")
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY, verify=known, timeout=20) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/ready", verify=known).status_code == 200:
            pass
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            list(lines)
    code, errors = ended(process)
    assert code == 128 + signal.SIGTERM and "a second signal" in errors and "hush" not in errors
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("flag", ["--api-key", "--api-keys", "--ssl-keyfile-password"])
@pytest.mark.parametrize("given", [["sk-hush"], []])
def test_a_secret_is_no_flag(capsys, flag, given):
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "demo", flag, *given])
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and f"{flag}: others on this machine can read" in errors
    assert "DS_SERVE_" in errors and "hush" not in errors
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert f"{flag} " not in capsys.readouterr().out


def test_what_does_not_fit_is_told_before_anything_starts(certificate, tmp_path, capsys):
    cert, key = certificate
    (tmp_path / "keys").write_text("# none\n")
    for settings, words in [
        ({"ssl_certfile": cert, "ssl_keyfile": key, "ssl_keyfile_password": "wrong"}, "ssl_keyfile"),
        ({"ssl_certfile": cert, "ssl_keyfile": key}, "DS_SERVE_SSL_KEYFILE_PASSWORD"),
        ({"ssl_certfile": "/nowhere"}, "ssl_certfile /nowhere"),
        ({"api_key_file": str(tmp_path / "keys")}, "holds no key"),
        ({"api_key_file": "/nowhere"}, "/nowhere"),
    ]:
        assert run.serve(Settings(model="m", **settings)) == 1
        errors = capsys.readouterr().err
        assert words in errors and "wrong" not in errors and len(errors.splitlines()) == 1
    with pytest.raises(ValueError, match="ssl_keyfile: needs ssl_certfile"):
        Settings(model="m", ssl_keyfile=key)
