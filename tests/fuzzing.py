"""Documents as a stranger may hand them over: each place of a JSON document in turn of another type, size or depth."""

import copy
import random
import resource
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from shared.basics.errors import GranaryError

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
WRONG: list[Any] = [
    None, True, -1, 0, 1, 3, 2**40, 10**30, -(10**30), 1.5, 1e308, float("nan"), float("inf"), "", "x", "../../x",
    "\0", "\ud800", "9" * 40, [], [None], [10**30], ["x", 1], {}, {"x": None}, {"": {}}, DEEP,
]  # fmt: skip
MOST_BYTES = 400 << 20
MOST_CHARACTERS = 2000


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document, its own first."""
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def mutants(document: Any, most: int, seed: int = 0) -> list[tuple[str, Any]]:
    """(what is wrong, document) for `most` of all mutants, chosen by `seed`: wrong values, missing and added keys."""
    every = [(path, wrong) for path in places(document) for wrong in [*WRONG, "remove", "add"]]
    chosen = random.Random(seed).sample(every, min(most, len(every)))
    return [
        (f"{'.'.join(map(str, path))} is {str(wrong)[:40]!r}", changed(document, path, wrong)) for path, wrong in chosen
    ]


def changed(document: Any, path: tuple[Any, ...], wrong: Any) -> Any:
    """A copy in which the value at `path` is `wrong`, gone, or has a key more."""
    if not path:
        return wrong
    made = copy.deepcopy(document)
    parent = made
    for key in path[:-1]:
        parent = parent[key]
    if wrong == "remove":
        del parent[path[-1]]
    elif wrong == "add" and isinstance(parent, dict):
        parent["unheard_of"] = parent[path[-1]]
    else:
        parent[path[-1]] = wrong
    return made


def survive(document: Any, use: Callable[[Any], object], most: int) -> int:
    """Use `most` mutants of a document, each of which must work or be refused in one line; returns how many work.

    A wrong value may be harmless. No other exception may come out, and memory must not grow by what a number says.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    use(copy.deepcopy(document))
    worked, faults = 0, []
    for what, mutant in mutants(document, most):
        try:
            use(mutant)
            worked += 1
        except GranaryError as error:
            if "\n" in str(error) or len(str(error)) > MOST_CHARACTERS:
                faults.append(f"{what}: {error}")
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(f"{what}: {type(error).__name__} in {frame.filename}:{frame.lineno}: {error}")
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(fault[:300] for fault in faults)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MOST_BYTES
    return worked
