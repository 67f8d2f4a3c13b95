"""Documents to contexts: nothing lost, nothing invented, and the tokenizer's own ids."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.basics.errors import GranaryError
from shared.lm import SpecialIds
from stage_harvest.config import BosPlacement, LongDocuments, PackingMode, PackingSchema
from stage_harvest.tokens.packing import Context, Packer
from stage_harvest.tokens.spool import TokenSpool
from tests.examples import examples

BOS, EOS, PAD = 1, 2, 0
SPECIAL = SpecialIds(bos=BOS, eos=EOS, pad=PAD, all=(PAD, BOS, EOS))


def packer(seq_len: int, bos: str = "context", **changes: object) -> Packer:
    fields = {
        "mode": PackingMode.isolated,
        "seq_len": seq_len,
        "special": SPECIAL,
        "bos": BosPlacement(bos),
        "long_documents": LongDocuments.split,
        "drop_last": False,
        "mask_special": True,
        "mask_first": 0,
    }
    return Packer(**{**fields, **changes})  # type: ignore[arg-type]


def pack(documents: list[list[int]], seq_len: int, bos: str = "context", **changes: object) -> list[Context]:
    ids = [np.array(document, np.int32) for document in documents]
    return list(packer(seq_len, bos, **changes).pack(ids))


def rows(contexts: list[Context]) -> list[list[int]]:
    return [context.tokens_T.tolist() for context in contexts]


def test_bos_per_document_and_context() -> None:
    documents = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    assert rows(pack(documents, 4, "context")) == [[1, 5, 6, 7], [1, 8, 9, 10], [1, 11, 12, 1], [1, 13, 0, 0]]
    assert rows(pack(documents, 4, "document")) == [[1, 5, 6, 7], [1, 8, 9, 10], [11, 12, 1, 13]]
    assert rows(pack(documents, 4, "none")) == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 0, 0, 0]]
    assert rows(pack([[BOS, 5, 6]], 3, "document")) == [[1, 5, 6]]
    assert rows(pack([[BOS, 5, 6]], 3, "none")) == [[1, 5, 6]]


def test_segments_and_mask() -> None:
    first, last = pack([[5, 6, EOS], [8, 9]], 6)
    assert first.segments_T.tolist() == [0, 0, 0, 0, 1, 1]
    assert first.mask_T.tolist() == [False, True, True, False, False, True]
    assert last.tokens_T.tolist() == [1, 9, 0, 0, 0, 0]
    assert last.segments_T.tolist() == [0, 0, -1, -1, -1, -1]
    assert last.mask_T.tolist() == [False, True, False, False, False, False]
    first, last = pack([[5, 6, EOS], [8, 9]], 6, mask_special=False)
    assert first.mask_T.all()
    assert last.mask_T.tolist() == [True, True, False, False, False, False]


def test_truncated_documents_begin_at_their_start() -> None:
    documents = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14, 15]]
    contexts = pack(documents, 4, long_documents=LongDocuments.truncate)
    assert rows(contexts) == [[1, 5, 6, 7], [1, 11, 1, 12]]
    # A last place that has room for BOS alone is filled with it; the document follows whole.
    contexts = pack([[5, 6], [7, 8]], 4, long_documents=LongDocuments.truncate)
    assert rows(contexts) == [[1, 5, 6, 1], [1, 7, 8, 0]]


def test_the_last_context_may_be_dropped() -> None:
    assert len(pack([[5] * 7], 4, "none")) == 2
    assert len(pack([[5] * 7], 4, "none", drop_last=True)) == 1
    assert len(pack([[5] * 8], 4, "none", drop_last=True)) == 2
    assert pack([[], []], 4) == []


def test_separate_documents_share_no_context() -> None:
    documents = [[5, 6], [], [7, 8, 9, 10, 11], [12, 13, 14]]
    contexts = pack(documents, 4, "document", mode=PackingMode.separate)
    assert rows(contexts) == [[1, 5, 6, 0], [1, 7, 8, 9], [10, 11, 0, 0], [1, 12, 13, 14]]
    assert all(set(context.segments_T.tolist()) <= {0, -1} for context in contexts)
    contexts = pack(documents, 4, mode=PackingMode.separate, long_documents=LongDocuments.truncate)
    assert rows(contexts) == [[1, 5, 6, 0], [1, 7, 8, 9], [1, 12, 13, 14]]


@pytest.mark.parametrize(
    ("mode", "first", "masks"),
    [
        ("isolated", 0, ["111111", "11----"]),
        ("isolated", 1, ["011011", "01----"]),
        ("isolated", 2, ["001001", "00----"]),
        ("isolated", 5, ["000000", "00----"]),
        ("joined", 2, ["001111", "00----"]),
        ("separate", 1, ["011---", "01111-"]),
    ],
)
def test_the_first_positions_of_each_sequence_are_masked(mode: str, first: int, masks: list[str]) -> None:
    """Of documents, and of what goes on of them in the next context; where they are joined, of contexts."""
    contexts = pack([[5, 6, 7], [8, 9, 10, 11, 12]], 6, "none", mode=PackingMode(mode), mask_first=first)
    wanted = [[sign == "1" for sign in mask] for mask in masks]
    assert [context.mask_T.tolist() for context in contexts] == wanted


def schema(**changes: object) -> PackingSchema:
    fields = {
        "mode": PackingMode.isolated,
        "seq_len": 8,
        "bos": BosPlacement.context,
        "long_documents": LongDocuments.split,
        "drop_last": False,
        "mask_special": True,
        "mask_first": None,
    }
    return PackingSchema(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_first_position_is_masked_by_default_where_no_bos_takes_it() -> None:
    without = SpecialIds(bos=None, eos=EOS, pad=PAD, all=(PAD, EOS))
    assert Packer.from_config(schema(), SPECIAL).mask_first == 0
    assert Packer.from_config(schema(bos=BosPlacement.none), SPECIAL).mask_first == 1
    assert Packer.from_config(schema(), without).mask_first == 1
    assert Packer.from_config(schema(mask_first=0), without).mask_first == 0
    assert Packer.from_config(schema(mask_first=3), SPECIAL).mask_first == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 1}, "seq_len=1"),
        ({"mask_first": 8}, "mask_first=8: it must be at least 0 and below packing.seq_len"),
        ({"mask_first": -1}, "mask_first=-1"),
        ({"mode": PackingMode.separate, "drop_last": True}, "drop_last=true does not go with packing=separate"),
    ],
)
def test_settings_that_cannot_be_packed_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(GranaryError, match=message):
        Packer.from_config(schema(**changes), SPECIAL)


@settings(max_examples=examples(200))
@given(
    lengths=st.lists(st.integers(0, 30), max_size=12),
    seq_len=st.integers(2, 17),
    bos=st.sampled_from(["none", "document", "context"]),
)
def test_every_token_is_there_once_and_in_order(lengths: list[int], seq_len: int, bos: str) -> None:
    counter = iter(range(3, 10_000))
    documents = [[next(counter) for _ in range(length)] for length in lengths]
    contexts = pack(documents, seq_len, bos)
    text = [token for context in contexts for token in context.tokens_T[context.mask_T].tolist()]
    assert text == [token for document in documents for token in document]
    for number, context in enumerate(contexts):
        padding = context.segments_T == -1
        assert number == len(contexts) - 1 or not padding.any()
        assert (np.diff(padding.astype(int)) >= 0).all()  # padding is at the end
        assert (context.tokens_T[padding] == PAD).all()
        segments = context.segments_T[~padding]
        assert segments[0] == 0
        assert set(np.diff(segments).tolist()) <= {0, 1}
        starts = np.flatnonzero(np.diff(segments, prepend=-1))
        if bos == "context":
            assert (context.tokens_T[starts] == BOS).all()
        # Positions of one segment belong to one document.
        for segment in range(segments.max() + 1):
            own = {token for token in context.tokens_T[context.segments_T == segment].tolist() if token != BOS}
            assert any(own <= set(document) for document in documents)


# The spool


def test_spool_gives_back_what_it_got(tmp_path: Path) -> None:
    contexts = pack([[5, 6, 7], [8, 9, 10, 11]], 4)
    with TokenSpool(4, str(tmp_path), "store") as spool:
        spool.fill(contexts)
        assert spool.num_contexts == 3
        for name, field in (("tokens", "tokens_T"), ("mask", "mask_T"), ("segments", "segments_T")):
            array = spool.array(name)
            assert array.dtype == getattr(contexts[0], field).dtype
            assert np.array_equal(array, np.stack([getattr(context, field) for context in contexts]))
        with pytest.raises(GranaryError, match="another harvest is tokenising for store"):
            TokenSpool(4, str(tmp_path), "store")
        with TokenSpool(4, str(tmp_path), "another store"):
            pass
    assert not list(tmp_path.iterdir())


def test_spool_keeps_encoded_documents_after_an_error(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), TokenSpool(4, str(tmp_path), "store") as spool:
        (spool.encoded / "x.npy").write_bytes(b"ids")
        raise KeyError
    with TokenSpool(4, str(tmp_path), "store") as spool:
        assert (spool.encoded / "x.npy").read_bytes() == b"ids"
        assert spool.num_contexts == 0
    with contextlib.suppress(KeyError), TokenSpool(4, str(tmp_path), "store"):
        raise KeyError  # nothing worth keeping
    assert not list(tmp_path.iterdir())


def test_a_spool_folder_that_is_not_there() -> None:
    with pytest.raises(GranaryError, match="no spool folder under /proc/nowhere"):
        TokenSpool(4, "/proc/nowhere", "store")
