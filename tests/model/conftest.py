import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def engine_of():
    """Starts engines of settings, and after the test finds their books whole, with every block free again."""
    from ds_serve.config import Settings
    from ds_serve.rank import build_local_engine

    engines = []

    def start_engine(**settings):
        engines.append(build_local_engine(Settings(**settings)))
        return engines[-1]

    yield start_engine
    for engine in engines:
        stats = engine.stats()
        engine.close()
        engine.scheduler.check_integrity()
        assert stats.num_free_blocks == stats.num_blocks
