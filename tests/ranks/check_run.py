"""Started on every rank: `ds-serve check` of each model of a JSON file over all ranks.

    check_run.py FILE

FILE holds a list of settings. Models are loaded as their config.json's `spoil` says (tests/model/broken.py).
Rank 0 prints a JSON line a model: the certificate, or {"error"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from broken import break_where_asked

from ds_serve.checking import check
from ds_serve.config import Settings
from ds_serve.launch import ranks
from ds_serve.rank import follow


def main() -> int:
    break_where_asked()
    rank_env = ranks()
    if rank_env is not None and rank_env.rank > 0:
        return follow()
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        try:
            line = check(Settings(**settings)).to_json()
        except Exception as error:
            line = json.dumps({"error": f"{type(error).__name__}: {error}"})
        print(json.dumps(json.loads(line)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
