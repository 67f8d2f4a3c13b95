"""Sizes and times, to people and from them; versions of software."""

import platform

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.basics.errors import GranaryError
from shared.basics.units import human_bytes, human_time, parse_bytes, spans
from shared.basics.versions import software_versions


def test_sizes_for_people() -> None:
    shown = [human_bytes(size) for size in (0, 999, 1500, 2.5e9, 3e18)]
    assert shown == ["0 B", "999 B", "1.5 kB", "2.5 GB", "3000.0 PB"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2TB", 2 * 10**12), ("500 GB", 5 * 10**11), ("1.5TiB", 3 * 2**39), ("64k", 64_000), ("17", 17), (12, 12),
        ("9B", 9),
    ],
)  # fmt: skip
def test_sizes_from_people(text: str | int, size: int) -> None:
    assert parse_bytes(text, "store.window") == size


@pytest.mark.parametrize("text", ["", "many", "2XB", "-1GB", "5 iB", "1.GB"])
def test_what_is_no_size_is_one_line_that_names_the_key(text: str) -> None:
    with pytest.raises(GranaryError, match=r"store\.window=.* is not a size"):
        parse_bytes(text, "store.window")


@given(st.integers(0, 999_999_999_999_999))
def test_a_size_survives_being_shown_to_three_figures(size: int) -> None:
    assert parse_bytes(human_bytes(size), "size") == pytest.approx(size, rel=0.05, abs=0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (4.21, "4.2 s"), (99.9, "99.9 s"), (100, "2 min"), (720, "12 min"), (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
    ],
)  # fmt: skip
def test_times_for_people(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


def test_versions_are_those_that_run_here() -> None:
    found = software_versions("numpy")
    assert list(found) == ["granary", "numpy", "python"]
    assert found["numpy"] == numpy.__version__
    assert found["python"] == platform.python_version()


@pytest.mark.parametrize(
    ("numbers", "most", "text"),
    [
        ([], None, ""),
        ([0, 1, 2, 3, 4, 7, 9, 10], None, "0-4, 7, 9-10"),
        ([0, 2, 4], 3, "0, 2, 4"),
        ([0, 1, 3, 5, 7, 8], 3, "0-1, 3, 5, ..."),
    ],
)
def test_numbers_in_runs(numbers: list[int], most: int | None, text: str) -> None:
    assert spans(numbers, most) == text
