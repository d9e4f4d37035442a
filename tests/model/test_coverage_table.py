"""docs/models.md: its rows are the table of architectures, and it says what was recorded."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from architectures import REFUSED, SERVED

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from coverage_table import document

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_documents_rows_are_the_tables_architectures():
    served, refused = DOCUMENT.read_text().split("\n## Refused\n")
    grids = r"(?: \S+ \|){5}$"
    assert set(re.findall(rf"^\| (\S+) \| \w+ \|{grids}", served, re.M)) == set(SERVED)
    assert set(re.findall(r"^\| (\S+) \| .+ \|$", refused, re.M)) - {"architecture"} == set(REFUSED)
    assert "**fails**" not in served


def test_the_document_says_what_was_recorded():
    right = {"name": "llama", "model": "LlamaForCausalLM", "same_tokens": True, "error": None}
    text = document(
        [
            right | {"grid": [1, 1], "difference": 0.5},
            right | {"grid": [1, 1], "difference": 1.2e-5},
            right | {"grid": [2, 1], "difference": 3.0, "same_tokens": False},
            {"name": "llama", "model": "LlamaForCausalLM", "grid": [1, 2], "refused": "Llama: no stages"},
            {"name": "mamba", "model": "MambaForCausalLM", "refused": "Mamba keeps state"},
        ],
        "transformers 5",
        "today",
    )
    assert "| llama | LlamaForCausalLM | 1e-05 | **fails** | untried | refused | untried |" in text
    assert "- llama: Llama: no stages" in text
    assert "| mamba | Mamba keeps state |" in text
    assert "| tp=2 | 0 | 0 | 1 |" in text
