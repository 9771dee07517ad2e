"""No collection of garbage while modules are imported."""

import gc

import pytest

from sensorium.system.collector import no_collection


def test_what_was_imported_is_never_looked_at_again() -> None:
    before = gc.get_freeze_count()
    try:
        with no_collection():
            assert not gc.isenabled()
            kept: list[list[int]] = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()


def test_collections_go_on_after_a_failed_import() -> None:
    try:
        with pytest.raises(ImportError), no_collection():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
