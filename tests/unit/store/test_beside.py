"""Stores of two models on the same tokens, read as one; refused, with what differs, unless the tokens are the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.store import Store, StorePlan
from shared.store.beside import open_beside

T, CONTEXTS, SITE = 8, 12, "layers.1.resid_post"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    """``make(name, ...)``: the URL of a small store; `width` and `seed` are of its activations."""

    def made(name: str, *, width: int = 6, seed: int = 0, upto: int | None = None, **given: Any) -> str:
        seq_len, contexts = given.pop("seq_len", T), given.pop("contexts", CONTEXTS)
        tokens = np.arange(contexts * seq_len, dtype=np.int32).reshape(contexts, seq_len) % 50
        mask, segments = np.ones_like(tokens, bool), np.zeros_like(tokens)
        for array, change in ((tokens, "tokens"), (mask, "mask"), (segments, "segments")):
            array[5, 3] = given.pop(change, array[5, 3])
        plan = StorePlan(
            num_contexts=contexts, seq_len=seq_len, hooks={SITE: width}, dtype=given.pop("dtype", "float32"),
            shard_contexts=given.pop("shard_contexts", 3), chunk_tokens=seq_len, codec="none", heldout_fraction=0.25,
            heldout_placement="last",
            provenance={"model": {"id": name}, "tokenizer": {"hash": given.pop("tokenizer", "t")}}, versions={},
        )  # fmt: skip
        assert not given
        store = Store.create(tmp_path / name, plan, tokens, mask, segments)
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(contexts, seq_len, width, generator=generator)
        for shard in store.pending()[:upto]:
            span = store.shard_contexts(shard)
            store.write_shard(shard, {SITE: values[span.start : span.stop].contiguous()})
        return str(tmp_path / name)

    return made


def test_f13_rows_of_both_are_the_same_token(make: Callable[..., str]) -> None:
    base, chat = make("base"), make("chat", width=4, seed=1, dtype="bfloat16")
    both, theirs = open_beside(base, [("chat", chat)]), Store.open(chat)
    assert both.hooks == [SITE, f"chat:{SITE}"]
    assert [both.width(hook) for hook in both.hooks] == [6, 4]
    assert [both.dtype_of(hook) for hook in both.hooks] == [torch.float32, torch.bfloat16]
    for context in (0, 7):
        assert torch.equal(both.read_context(SITE, context), Store.open(base).read_context(SITE, context))
        assert torch.equal(both.read_context(f"chat:{SITE}", context), theirs.read_context(SITE, context))
    assert np.allclose(both.statistics(f"chat:{SITE}").mean, theirs.statistics(SITE).mean)
    assert both.digest() not in (Store.open(base).digest(), theirs.digest())
    with pytest.raises(GranaryError, match="has no hook other:layers"):
        both.read_context(f"other:{SITE}", 0)
    assert open_beside(base, []).hooks == [SITE]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 49}, "their tokens differ"),
        ({"mask": False}, "their mask differ"),
        ({"segments": 1}, "their segments differ"),
        ({"seq_len": 4}, "tokens per context 8 and 4"),
        ({"contexts": 9}, "contexts 12 and 9"),
        ({"shard_contexts": 4}, "contexts per shard 3 and 4"),
        ({"tokenizer": "u"}, "tokenizer differ"),
    ],
)
def test_other_tokens_are_refused_with_what_differs(
    make: Callable[..., str], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(GranaryError, match=rf"holds other contexts than .*{message}.*harvest one model on the other"):
        open_beside(make("base"), [("chat", make("chat", **given))])


def test_a_shard_counts_when_all_have_it(make: Callable[..., str]) -> None:
    both = open_beside(make("base"), [("chat", make("chat", upto=2))])
    assert list(both.committed()) == [0, 1]
    assert both.contexts("train").tolist() == list(range(6))


def test_names(make: Callable[..., str]) -> None:
    base, chat = make("base"), make("chat")
    with pytest.raises(GranaryError, match=r"store\.beside name 'a:b'"):
        open_beside(base, [("a:b", chat)])
    with pytest.raises(GranaryError, match="give each store its own name"):
        open_beside(base, [("a", chat), ("a", chat)])
