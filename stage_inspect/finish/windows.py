"""The windows whose tokens are stored: those of records and of the pool, and their neighbours in the document."""

from collections.abc import Iterator

import numpy as np

from shared.latents.layout import NONE
from shared.store import Store
from stage_inspect.scan.log import Columns
from stage_inspect.scan.pairs import Ints
from stage_inspect.scan.pictures import Shown
from stage_inspect.scan.places import Places

CONTEXTS = 256  # read at a time


def window_rows(store: Store, wanted: Ints, window: int) -> Iterator[Columns]:
    """Rows of ``windows/*`` in the order of their places. `wanted`: places of windows, ascending."""
    T = store.seq_len
    contexts = np.unique(wanted // T)
    for start in range(0, len(contexts), CONTEXTS):
        some = contexts[start : start + CONTEXTS]
        tokens_BT, segments_BT = store.tokens(some), store.segments(some)
        places = Places.of(some, tokens_BT, segments_BT >= 0, segments_BT, window=window, isolated=True)
        begins = places.windows()
        chosen = np.isin(places.place_P[begins], wanted)
        # Its neighbours too: a record's text reaches into them.
        same = places.document_P[begins[1:]] == places.document_P[begins[:-1]]
        beside = chosen.copy()
        beside[:-1] |= chosen[1:] & same
        beside[1:] |= chosen[:-1] & same
        begins = begins[beside]
        at = begins[:, None] + np.arange(window)
        inside = at < places.document_end_P[begins][:, None]
        near = np.minimum(at, len(places.tokens_P) - 1)
        rows: Columns = {
            "windows/start": places.place_P[begins],
            "windows/segment": places.segment_P[begins],
            "windows/tokens": np.where(inside, places.tokens_P[near], NONE),
        }
        shown = Shown.of(store, some, places)
        if shown is not None:
            rows["windows/kind"] = np.where(inside, shown.kind_P[near], 0)
            rows["windows/image"] = np.where(inside, shown.image_P[near], NONE)
            rows["windows/cell"] = np.where(inside[..., None], shown.cell_P2[near], NONE)
        yield rows
