"""The table of public releases is what the installed SAELens says of them."""

import gzip
import json

import pytest

from tests.peers.make_releases import TABLE, releases

pytestmark = pytest.mark.peers


def test_the_table_is_made_of_the_installed_saelens() -> None:
    assert json.loads(gzip.decompress(TABLE.read_bytes())) == releases(), "run tests/peers/make_releases.py"
