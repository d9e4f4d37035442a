"""Objects made in an uncollected block are old afterwards, and collections go on as before."""

import gc

import pytest

from ds_serve.collect import uncollected


@pytest.fixture(autouse=True)
def gc_as_before():
    enabled = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if enabled else gc.disable)()


def test_nothing_is_collected_inside_and_what_is_made_is_old():
    gc.enable()
    gc.unfreeze()  # what a test before this one froze
    collections = gc.get_stats()[0]["collections"]
    with uncollected():
        made = [[index] for index in range(5_000)]
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert gc.get_stats()[0]["collections"] <= collections + 1  # none but one that was due
    old = {id(each) for each in gc.get_objects(generation=2)}
    assert all(id(each) in old for each in made)


def test_what_others_chose_stays():
    gc.disable()
    gc.freeze()
    with pytest.raises(ZeroDivisionError), uncollected():
        1 / 0  # noqa: B018
    assert not gc.isenabled() and gc.get_freeze_count() > 0
