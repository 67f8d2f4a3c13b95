"""Mixtures: shares of tokens at every point, and parts that are told from one another."""

from pathlib import Path

import numpy as np
import pytest

from shared.basics.errors import GranaryError
from shared.lm import load_tokenizer
from stage_harvest.config import MixtureCorpus
from stage_harvest.corpus import open_corpus
from stage_harvest.tokens.encoder import TextEncoder
from stage_harvest.tokens.tokenise import Tokeniser


def mixture(tmp_path: Path, **changes: object) -> MixtureCorpus:
    rng = np.random.default_rng(0)
    for name, first in (("a", 100), ("b", 200), ("c", 300)):
        documents = [np.append(np.full(length, first), 2) for length in rng.integers(1, 40, 400)]
        np.save(tmp_path / f"{name}.npy", np.concatenate(documents))
    common = {"kind": "tokens", "document_end": 2}
    parts: dict[str, object] = {
        "small": {**common, "files": f"{tmp_path}/a.npy", "weight": 1},
        "large": {**common, "files": f"{tmp_path}/b.npy", "weight": 5},
        "middle": {**common, "files": f"{tmp_path}/c.npy", "weight": 2},
    }
    return MixtureCorpus(parts={**parts, **changes}, contexts=None, shuffle=False, shuffle_window=100)


def test_shares_hold_at_every_point(tmp_path: Path) -> None:
    cfg = mixture(tmp_path)
    tokenizer = load_tokenizer("bundled")
    tokeniser = Tokeniser(4096, tokenizer, None, TextEncoder(tokenizer.backend_tokenizer.to_str()))
    stream = list(tokeniser.corpus_ids(open_corpus(cfg), cfg, 0))
    kinds = np.concatenate([np.full(ids.size, ids[0]) for ids in stream])
    for end in range(1000, kinds.size, 500):
        shares = [(kinds[:end] == first).mean() for first in (100, 200, 300)]
        assert shares == pytest.approx([1 / 8, 5 / 8, 2 / 8], abs=80 / end)
    # It ends with the part that runs out first, which is the one with most weight.
    large = np.load(tmp_path / "b.npy")
    assert sum(ids.size for ids in stream if ids[0] == 200) == large.size


def test_identity_follows_parts_and_weights(tmp_path: Path) -> None:
    first = open_corpus(mixture(tmp_path))
    assert first.fingerprint() == open_corpus(mixture(tmp_path)).fingerprint()
    heavier = {"kind": "tokens", "document_end": 2, "files": f"{tmp_path}/a.npy", "weight": 2}
    assert open_corpus(mixture(tmp_path, small=heavier)).fingerprint() != first.fingerprint()
    assert first.description.startswith("mixture: 0.125 tokens: a.npy")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"kind": "stdlib"}, r"corpus\.parts\.small needs a kind and a weight"),
        ({"kind": "web", "weight": 1}, r"corpus\.parts\.small\.kind=web: choose from stdlib, text"),
        ({"kind": "text", "file": "x", "weight": 1}, r"corpus\.parts\.small: Key 'file' not in 'TextCorpus'"),
        ({"kind": "text", "weight": 1}, r"corpus\.parts\.small: .*missing mandatory value: files"),
        ({"kind": "stdlib", "weight": "much"}, r"corpus\.parts\.small: could not convert"),
        ({"kind": "stdlib", "weight": -1}, r"corpus\.parts\.small\.weight=-1\.0: it must be positive"),
        ({"kind": "text", "files": "/nowhere/*.txt", "weight": 1}, "no file matches"),
    ],
)
def test_a_wrong_part_is_named(tmp_path: Path, part: dict[str, object], message: str) -> None:
    with pytest.raises(GranaryError, match=message):
        open_corpus(mixture(tmp_path, small=part))


def test_no_parts() -> None:
    with pytest.raises(GranaryError, match=r"corpus\.parts is empty"):
        open_corpus(MixtureCorpus(parts={}, contexts=None, shuffle=False, shuffle_window=1))
