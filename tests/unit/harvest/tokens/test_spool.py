"""Where tokens lie until their store has them."""

import os
from pathlib import Path

from stage_harvest.tokens.spool import TokenSpool, discard


def test_what_a_harvest_that_died_had_spooled_goes_and_what_is_at_work_stays(tmp_path: Path) -> None:
    place, owner = str(tmp_path), "runs/demo/store"
    spool = TokenSpool(8, place, owner)
    discard(place, owner)
    assert spool.folder.is_dir()
    os.close(spool._lock)  # as the end of its process does
    discard(place, "another store")
    assert spool.folder.is_dir()
    discard(place, owner)
    assert list(tmp_path.iterdir()) == []
    discard(place, owner)
