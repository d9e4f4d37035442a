"""What cannot be served is refused at load, with a sentence that says why."""

from __future__ import annotations

import json
import os

import pytest
import transformers
from architectures import ONE_OF_EACH, REFUSED, is_known, tiny
from tiny_models import save

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.config import Settings
from ds_serve.model.loader import load

NAMES = REFUSED if os.environ.get("DS_SERVE_TEST_ALL") == "1" else ONE_OF_EACH


@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused_at_load_and_told_why(name, tmp_path):
    if not is_known(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = tiny(name)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name][2]) as refused:
        load(Settings(model=save(model, tmp_path), dtype="float32", max_model_len=64))
    said = str(refused.value).replace(str(tmp_path), "MODEL")
    assert type(model).__name__ in said or "MODEL" in said
    if path := os.environ.get("DS_SERVE_COVERAGE"):
        with open(path, "a") as out:
            out.write(json.dumps({"name": name, "model": type(model).__name__, "refused": said}) + "\n")
