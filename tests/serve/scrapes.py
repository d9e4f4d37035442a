"""What stands in the text of /metrics, for the tests of it."""

from __future__ import annotations

from collections import Counter

from prometheus_client.parser import text_string_to_metric_families as parse


def families(text: str) -> dict:
    """By name, as Prometheus sees them; a counter's name is without _total."""
    return {family.name: family for family in parse(text)}


def samples(text: str) -> Counter:
    """(name, labels as sorted pairs) -> value."""
    return Counter(
        {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in parse(text)
            for sample in family.samples
        }
    )
