"""The inspection of a dictionary that attends, against a loop over positions: it reads whole contexts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.latents.folder import Latents
from shared.lm.head import LogitHead
from shared.sae import Lorsa
from shared.sae.contexts import Contexts, as_attended
from shared.sae.rows import decoder_rows
from shared.sae.sites import SiteWidths
from stage_inspect.finish.weights import logit_columns, stream_rows
from stage_inspect.inspect import inspect
from stage_inspect.scan import batches
from stage_inspect.scan.log import join
from tests.dense import attended
from tests.inspection import inspect_config, small_store
from tests.splicing import ATTENTION
from tests.variants import make

T, WIDTHS = 12, SiteWidths((9,), (7,))


def lorsa() -> Lorsa:
    made = make("lorsa", places=(ATTENTION, WIDTHS), normalisation="none").dictionary
    assert isinstance(made, Lorsa)
    return made


@torch.no_grad()
@pytest.mark.parametrize("packing", ["isolated", "joined"])
def test_equal_to_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", 2 * T)
    monkeypatch.setattr(batches, "ENCODE_ELEMENTS", T * 40)
    (reads,), (writes,) = ATTENTION.reads, ATTENTION.writes
    provenance = {"model": {"id": "synthetic"}, "packing": {"mode": packing}}
    store = small_store(
        tmp_path / "store", num_contexts=6, seq_len=T, hooks={reads: 9, writes: 7}, provenance=provenance
    )
    made = lorsa()
    made.save_pretrained(tmp_path / "sae")
    inspect(inspect_config(tmp_path))
    latents = Latents.open(tmp_path / "latents")

    all_of_them = range(store.num_contexts)
    segments = torch.from_numpy(store.segments(all_of_them)).long()
    mask = torch.from_numpy(np.array(store.mask(all_of_them)))
    x = torch.stack([store.read_context(reads, context) for context in all_of_them]).float()
    given = Contexts.of(x, as_attended(segments, isolated=packing == "isolated"), mask)
    z_NF = (attended(made, given).repeat_interleave(made.config.latents_per_head, 1) * made.W_enc).sum(2) + made.b_enc
    kept = torch.relu(z_NF).topk(4)
    f_NF = torch.zeros_like(z_NF).scatter(1, kept.indices, kept.values)
    places = mask.flatten().nonzero()[:, 0].numpy()
    assert latents.meta.counts["tokens"] == len(places)
    for latent, f_N in enumerate(f_NF.T.numpy()):
        assert latents.table["fired"][latent] == np.count_nonzero(f_N)
        assert latents.table["max"][latent] == pytest.approx(f_N.max(), rel=1e-4)
        for one in latents.top(latent):
            row = int(np.flatnonzero(places == one.context * T + one.position)[0])
            assert one.value == pytest.approx(f_N[row], rel=1e-4)


@torch.no_grad()
def test_its_logits_are_those_of_what_it_writes() -> None:
    made = lorsa()
    rows = stream_rows(made, decoder_rows(made), ATTENTION, WIDTHS)
    assert rows is not None
    torch.testing.assert_close(rows, made.denormalise(made.W_dec) - made.denormalise(torch.zeros_like(made.W_dec)))
    generator = torch.Generator().manual_seed(0)
    head = LogitHead(torch.randn(50, 7, generator=generator), torch.rand(7, generator=generator), is_centred=False)
    tops = join(list(logit_columns(rows, head)))["logits/top"]
    assert tops[3][0] == int(((made.W_dec[3] * head.gain_D) @ head.W_VD.T).argmax())
