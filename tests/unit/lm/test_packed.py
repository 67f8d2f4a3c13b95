"""Packed documents that do not see one another give the activations they have alone."""

import pytest
import torch
from transformers import AutoModel

from shared.lm.packed import DOCUMENT_SDPA, document_spans, packed_inputs, segment_positions
from tests.families import FAMILIES

LENGTHS = [[9, 6, 1, 4], [20], [3, 17]]  # per context, T = 20; longer and shorter than the sliding window of 4


def segments() -> torch.Tensor:
    rows = [[i for i, length in enumerate(lengths) for _ in range(length)] for lengths in LENGTHS]
    return torch.tensor(rows)


def test_positions_and_spans_restart_with_each_document() -> None:
    assert segment_positions(segments()[:1]).tolist() == [[*range(9), *range(6), 0, *range(4)]]
    assert document_spans(segments()) == [[(0, 9), (9, 15), (15, 16), (16, 20)], [(0, 20)], [(0, 3), (3, 20)]]


# Gemma 2 has softcapping, which sdpa lacks: load_trunk gives it eager attention.
CASES = [(family, "eager") for family in FAMILIES]
CASES += [(family, DOCUMENT_SDPA) for family in FAMILIES if family != "gemma2"]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_each_document_as_if_alone(family: str, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(FAMILIES[family](), attn_implementation=attention).eval().requires_grad_(False)
    ids = torch.randint(3, 50, (3, 20), generator=torch.Generator().manual_seed(1))
    packed = model(**packed_inputs(model, ids, segments(), isolated=True)).last_hidden_state
    joined = model(**packed_inputs(model, ids, segments(), isolated=False)).last_hidden_state
    model.set_attn_implementation("eager")
    for b, spans in enumerate(document_spans(segments())):
        for start, end in spans:
            alone = model(ids[b : b + 1, start:end], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(packed[b, start:end], alone, rtol=1e-4, atol=1e-5)
            if start > 0 and end - start > 1:  # the test sees a difference where there is one
                assert (joined[b, start:end] - alone).norm() > 1e-3 * alone.norm()
        assert end == 20
    whole = model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-5)
