import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "model")]


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """What one rank answers to started.PROMPTS."""
    from started import DS_SERVE, PROMPTS, WANTED, Started

    command = (*DS_SERVE, "generate", "demo", *WANTED)
    with Started(tmp_path_factory.mktemp("one"), *command, stdin="\n".join(PROMPTS)) as one:
        one.end(0)
        found = one.out.read_text().splitlines()
    assert len(found) == len(PROMPTS) and all(found)
    return found
