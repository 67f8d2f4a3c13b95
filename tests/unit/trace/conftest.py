"""One graph of the bundled model and random transcoders, for all tests that only look at it."""

import pytest

from stage_trace.attribution import AttributionGraph
from stage_trace.trace import trace
from tests.tracing import bundled_transcoder

TEXT = "def f(x):\n    </script><b>"


@pytest.fixture(scope="package")
def graph() -> AttributionGraph:
    return trace("bundled", [bundled_transcoder(layer) for layer in range(4)], TEXT)
