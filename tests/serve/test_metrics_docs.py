"""Documents of the metrics beside what is exported: docs/metrics.md, and the dashboard in configs/."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from scrapes import families, samples

ROOT = Path(__file__).parents[2]


def test_open_metrics_for_who_asks(server):
    plain = server.http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    accept = {"Accept": "application/openmetrics-text; version=1.0.0, text/plain; q=0.5"}
    answer = server.http.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    found = {family.name.removesuffix("_info") for family in parse_openmetrics(answer.text)}
    assert found == {name.removesuffix("_info") for name in families(plain.text)}
    assert "_created" not in plain.text + answer.text


def exported(text: str) -> set[str]:
    """Names as written in the text: counters with _total."""
    return set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))


def test_docs_name_what_is_exported_and_nothing_else(server):
    document = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(\S+?)` \| (\w+) \|([^|]*)\|", document, re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    text = server.http.get("/metrics").text
    mentioned = set(re.findall(r"(?:ds_serve|process)_\w+", document))
    assert mentioned <= exported(text) | {name for name, _ in samples(text)}
    assert documented.keys() == exported(text)
    for family in parse(text):
        name = family.name + "_total" if family.type == "counter" else family.name
        kind, labels = documented[name]
        assert kind == family.type or kind == "info" and name.endswith("_info")
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels, f"labels of {name}"


def expressions(dashboard: dict) -> list[str]:
    panels = [each for panel in dashboard["panels"] for each in (panel, *panel.get("panels", ()))]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_the_dashboard_asks_for_what_is_exported(server):
    server.chat()
    dashboard = json.loads((ROOT / "configs/grafana_dashboard.json").read_text())
    known = {name for name, _ in samples(server.http.get("/metrics").text)}
    asked = {
        name for each in expressions(dashboard) for name in re.findall(r"(?:ds_serve|process)_\w+", each)
    }
    assert asked and asked <= known, f"not exported: {asked - known}"
    unused = {name.removesuffix("_bucket") for name in known if not re.search("_(count|sum)$", name)} - {
        name.removesuffix("_bucket") for name in asked
    }
    assert not {name for name in unused if name.startswith("ds_serve")}, "every figure has a panel"
    assert all("${datasource}" in json.dumps(panel) for panel in dashboard["panels"] if "targets" in panel)
