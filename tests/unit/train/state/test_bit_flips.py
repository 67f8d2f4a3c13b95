"""One flipped bit in a store or a run: found when it is read, or of no effect on what is read. Never silent."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.sae.loading import load
from shared.store import Store
from shared.store.verify import verify
from stage_train.state.checkpoint import intact_checkpoint
from stage_train.state.integrity import fault_of
from stage_train.state.settle import identity_in
from tests.synthetic import synthetic_plan, synthetic_store
from tests.training import Runs, weights

pytestmark = pytest.mark.usefixtures("train_configs")

STORE = (
    "zarr.json", "*/*/*/zarr.json", "extents/*0.json", "extents/*.tokens.json", "manifest/*.json", "_COMPLETE.json",
    "tokens/c/*/*", "mask/c/*/*", "segments/c/*/*", "layers/**/c/*/*/*", "statistics/**/c/*/*/*",
)  # fmt: skip
CHECKPOINT = ("training.json", "tensors-*.safetensors", "digests.json")
DICTIONARY = ("config.json", "sae.safetensors")
BESIDE = ("train.yaml", "metrics.jsonl")
EACH = 12
"""Flips per kind of file: 17 kinds, and the pointer."""


def flipped(path: Path, rng: random.Random) -> Callable[[], None]:
    """Flip one bit; returns what puts it back. Every other time near an end, where lengths and closing marks are."""
    before = path.read_bytes()
    content = bytearray(before)
    near = min(64, len(content))
    place = rng.choice([rng.randrange(len(content)), rng.choice([rng.randrange(near), -1 - rng.randrange(near)])])
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return lambda: path.write_bytes(before) and None


def flips(folder: Path, patterns: tuple[str, ...], look: Callable[[Path], None]) -> int:
    """Call `look` with the file while a bit of it is flipped, `EACH` times per pattern."""
    rng, count = random.Random(7), 0
    for pattern in patterns:
        paths = sorted(path for path in folder.glob(pattern) if path.is_file())
        assert paths, pattern
        for _ in range(EACH):
            path = rng.choice(paths)
            restore = flipped(path, rng)
            try:
                look(path)
            finally:
                restore()
            count += 1
    return count


def all_of(store: Store) -> list[Any]:
    """Everything that is ever read of a store."""
    contexts = range(store.num_contexts)
    parts: list[Any] = [torch.from_numpy(getattr(store, name)(contexts)) for name in ("tokens", "mask", "segments")]
    for hook in store.hooks:
        parts += [store.read_context(hook, context) for context in contexts]
        figures = store.statistics(hook)
        parts += [torch.from_numpy(figures.mean), torch.from_numpy(figures.var)]
    return [*parts, store.summary(), store.digest()]


def same(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)) if torch.is_tensor(a) else a == b
        for a, b in zip(one, two, strict=True)
    )


def test_no_flipped_bit_is_silent(train: Runs) -> None:
    out, store, counts = train("a", "checkpoint.every=10", "checkpoint.keep=2"), train.folder / "small", []
    synthetic_store(store, synthetic_plan(num_contexts=5, seq_len=8, d_model=4, shard_contexts=2, chunk_tokens=4))
    expected = all_of(Store.open(store))

    def look_at_store(path: Path) -> None:
        assert not verify(str(store)).intact, path
        try:
            found = all_of(Store.open(store))
        except GranaryError:
            return
        assert same(found, expected), path

    counts.append(flips(store, STORE, look_at_store))
    newest = out / "checkpoints/step-00000042"
    counts.append(flips(newest, CHECKPOINT, lambda path: no_less(fault_of(newest), path)))
    pointed = {out / f"checkpoints/step-000000{step}" for step in (40, 42)}
    counts.append(flips(out / "checkpoints", ("latest",), lambda path: no_less(pointed & found_in(out), path)))
    tensors, held = weights(out), identity_in(out)

    def look_at_dictionary(path: Path) -> None:
        try:
            dictionary = load(out)
        except GranaryError:
            return
        found = dictionary.state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in tensors.items()), path

    counts.append(flips(out, DICTIONARY, look_at_dictionary))
    # What no result hangs on: the configuration is in the checkpoint, and metrics are read to be drawn.
    counts.append(flips(out, BESIDE, lambda path: no_less(identity_in(out) == held, path)))
    assert sum(counts) >= 200


def no_less(found: object, path: Path) -> None:
    assert found, path


def found_in(out: Path) -> set[Path | None]:
    """The checkpoint that would be used, and all there are where none can be: that is said."""
    try:
        return {intact_checkpoint(out / "checkpoints")}
    except GranaryError:
        return set((out / "checkpoints").iterdir())


def test_a_finished_run_whose_sae_is_damaged_exports_it_again(train: Runs) -> None:
    out = train("a")
    shutil.copytree(out, train.folder / "before")
    files = [out / "config.json", out / "sae.safetensors"]
    before = [path.read_bytes() for path in files]
    flipped_one = bytearray(before[1])
    flipped_one[-9] ^= 4
    for content in (flipped_one, before[1][:-50], b"", None):
        files[1].unlink()
        if content is not None:
            files[1].write_bytes(content)
        train("a")
        assert [path.read_bytes() for path in files] == before
    files[0].unlink()
    train("a")
    assert [path.read_bytes() for path in files] == before
