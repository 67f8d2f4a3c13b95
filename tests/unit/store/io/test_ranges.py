"""How one read of an object is cut into requests."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shared.store.io.remote import RANGE_BYTES, cuts

MIB = 1 << 20


@given(offset=st.integers(0, 1 << 32), total=st.integers(1, 200 * MIB))
def test_cuts_cover_the_read_in_requests_of_a_fair_size(offset, total):
    bounds = cuts(offset, total)
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    assert bounds[0] == 0
    assert sum(sizes) == total
    assert max(sizes) <= RANGE_BYTES * 5 // 4
    assert len(sizes) == 1 or min(sizes) >= RANGE_BYTES // 8
    assert all((offset + cut) % RANGE_BYTES == 0 for cut in bounds[1:-1])


def test_a_checksum_behind_a_chunk_is_no_request_of_its_own():
    for slot in range(4):
        assert len(cuts(slot * (8 * MIB + 4), 8 * MIB + 4)) == 2
        assert len(cuts(slot * (32 * MIB + 16), 32 * MIB + 16)) == 5
