"""Block sizes that were measured to be best on this GPU; the launchers' own choice where nothing was measured.

``benchmarks/tune.py`` measures and writes the file. Nothing is tuned while training: block sizes decide the order of
sums, and a run must give the same bits twice.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_on_trial: dict[str, dict[str, int]] = {}


def tuning_file(gpu: str) -> Path:
    """Where the measured choices for a GPU model are kept."""
    # Asked for late: a user without a home, as in a container, need not have one.
    folder = os.environ.get("GRANARY_TUNING")
    return (
        Path(folder) if folder else Path.home() / ".cache" / "granary"
    ) / f"kernels-{gpu.replace(' ', '-').replace('/', '-')}.json"


def tuned(kernel: str, d_model: int, default: dict[str, int], *, num_pairs: int | None = None) -> dict[str, int]:
    """The measured choice for `kernel` at this width, else `default`; both map constexpr and launch options.

    `num_pairs`: picks of the whole batch, where the best choice depends on them; it holds for the same power of two.
    """
    name = key(kernel, d_model, num_pairs)
    if name in _on_trial:
        return default | _on_trial[name]
    if not torch.cuda.is_available():
        return default
    try:
        table = _table(torch.cuda.get_device_name())
    except RuntimeError:  # no home, and no folder named: nothing was ever measured
        return default
    return default | table.get(name, {})


@contextlib.contextmanager
def trial(choices: dict[str, dict[str, int]]) -> Iterator[None]:
    """Use these choices, by ``key``, within the context: for whoever measures them."""
    _on_trial.update(choices)
    try:
        yield
    finally:
        for name in choices:
            del _on_trial[name]


def key(kernel: str, d_model: int, num_pairs: int | None = None) -> str:
    """How the file names one choice."""
    return f"{kernel} d={d_model}" + ("" if num_pairs is None else f" pairs<2^{num_pairs.bit_length()}")


def save(gpu: str, choices: dict[str, dict[str, int]]) -> Path:
    """Merge choices into the GPU's file; returns its path."""
    path = tuning_file(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_read(path) | choices, indent=1, sort_keys=True) + "\n"
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)  # whole or not at all, for the ranks that read it
    _table.cache_clear()
    return path


@functools.cache
def _table(gpu: str) -> dict[str, dict[str, int]]:
    return _read(tuning_file(gpu))


def _read(path: Path) -> dict[str, dict[str, int]]:
    """The choices in a file; what is no table of whole numbers counts as not measured, so that no run fails by it."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        found = {str(name): dict(choice) for name, choice in table.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: choice for name, choice in found.items() if {type(size) for size in choice.values()} <= {int}}
