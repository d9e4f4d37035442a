"""schemathesis: whatever the server's own OpenAPI document allows or forbids is answered as it says.

No 500, and no answer that takes long. Half of the requests keep to the document, half do not; the same ones
each time. Most of them go to the front over a fake engine, some to the real server.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import schemathesis
from asked import KEY
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ds_serve.config import Settings
from ds_serve.server.app import create_app
from ds_serve.server.front import Front
from ds_serve.server.keys import KeyRing
from ds_serve.text.defaults import GenerationDefaults

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

LONGEST_S = 10
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


def few(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],  # without shrinking: a failure tells its request
    )


@pytest.fixture(scope="session")
def front(tmp_path_factory):
    """The address of the front over a fake engine, behind the gate."""
    from fake_server import make_codec
    from gated_server import gated

    folder = tmp_path_factory.mktemp("front")
    with gated(make_codec(folder), folder, api_keys=[KEY], max_open_requests=4) as server:
        yield server


def document():
    """What create_app documents for a server with keys; the one that is served is compared with it."""
    backend = SimpleNamespace(retry_after_s=1, num_restarts=0)
    front = Front("any", GenerationDefaults(), backend, created=1)
    return create_app(front, Settings(model="any"), KeyRing([KEY])).openapi()


EXPECTED = {"not_a_server_error": {"expected-statuses": ["2xx", "4xx", "504"]}}  # X-Request-Timeout: 1e-9
schema = schemathesis.openapi.from_dict(
    document(), config=schemathesis.Config.from_dict({"checks": EXPECTED})
)


def ask(case, url, model):
    """The answer; the model is named rightly wherever a name is given."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = model
    return case.call(base_url=url, headers=AUTHORIZED, timeout=LONGEST_S)


def test_the_document_is_the_served_one(front):
    assert front.http.get("/openapi.json", headers=AUTHORIZED).json() == document()


@schema.parametrize()
@few(30)
def test_the_front_answers_as_documented(case, front):
    # What fields say together, and of the model, is not in the document: such data is refused by name.
    case.validate_response(ask(case, front.url, "fake"), excluded_checks=[positive_data_acceptance])


@schema.parametrize()
@few(8)
def test_the_server_answers_as_documented(case, server):
    case.validate_response(ask(case, server.url, "demo"), checks=[not_a_server_error])
