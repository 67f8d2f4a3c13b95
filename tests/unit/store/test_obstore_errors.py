"""What obstore's exceptions are taken for."""

import pytest

from shared.store.io.obstore import translated

exceptions = pytest.importorskip("obstore.exceptions")


def test_an_outage_whose_message_holds_the_digits_of_a_status_is_not_the_end_of_an_object() -> None:
    """It has to be waited for: a harvest ended here when a refused connection had taken 416 microseconds."""
    with pytest.raises(exceptions.GenericError), translated():
        raise exceptions.GenericError("Error performing PUT http://127.0.0.1/store in 416.3µs - connection refused")


@pytest.mark.parametrize("told", ["416 Range Not Satisfiable", "<Code>InvalidRange</Code>"])
def test_a_range_beyond_an_object_is_its_end(told: str) -> None:
    with pytest.raises(EOFError), translated():
        raise exceptions.GenericError(f"Server returned non-2xx status code: {told}")
