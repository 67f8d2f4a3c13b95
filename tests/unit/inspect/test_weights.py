"""What the weights alone tell, against plain formulas."""

import numpy as np
import torch

from shared.latents.layout import LOGITS, NONE
from shared.lm.head import LogitHead
from shared.sae.config import SAEConfig
from shared.sae.rows import decoder_rows
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants import SAE
from stage_inspect.finish.weights import logit_columns, neighbour_columns, principal_plane, stream_rows
from stage_inspect.scan.log import join

D, F, V = 12, 30, 50
GENERATOR = torch.Generator().manual_seed(0)


def test_logit_weights() -> None:
    head = LogitHead(torch.randn(V, D, generator=GENERATOR), torch.rand(D, generator=GENERATOR), is_centred=False)
    rows = torch.randn(F, D, generator=GENERATOR)
    found = join(list(logit_columns(rows, head)))
    z = (rows * head.gain_D) @ head.W_VD.T
    z = (z - z.mean(1, keepdim=True)).numpy()
    for latent in range(F):
        order = np.argsort(-z[latent])
        assert found["logits/top"][latent].tolist() == order[:LOGITS].tolist()
        assert found["logits/bottom"][latent].tolist() == order[::-1][:LOGITS].tolist()
        assert np.allclose(found["logits/top_value"][latent], z[latent][order[:LOGITS]], atol=1e-5)
        assert found["logits/histogram"][latent].sum() == V
        assert np.isclose(found["table/logit_sd"][latent], z[latent].std(), rtol=1e-4)
        third = ((z[latent] - z[latent].mean()) ** 3).mean() / z[latent].std() ** 3
        assert np.isclose(found["table/logit_skew"][latent], third, atol=1e-3)
        assert np.isclose(found["table/logit_high"][latent], z[latent].max(), atol=1e-5)


def test_a_small_vocabulary_leaves_slots_empty() -> None:
    head = LogitHead(torch.randn(7, D, generator=GENERATOR), torch.ones(D), is_centred=True)
    found = join(list(logit_columns(torch.randn(3, D, generator=GENERATOR), head)))
    assert (found["logits/top"][:, 7:] == NONE).all()
    assert (found["logits/top"][:, :7] != NONE).all()


def test_neighbours_leave_out_oneself_and_rows_of_zeros() -> None:
    rows = torch.randn(F, D, generator=GENERATOR)
    rows[4] = 0
    rows[9] = rows[8]  # a twin: what is left out is oneself, not the first of the list
    found = join(list(neighbour_columns(rows)))
    latents, cosines = found["neighbours/latent"], found["neighbours/cosine"]
    assert latents[8][0] == 9
    assert latents[9][0] == 8
    assert np.isclose(cosines[8][0], 1)
    assert (latents[4] == NONE).all()
    assert not (latents == 4).any()
    assert not (latents == np.arange(F)[:, None]).any()


def test_directions_are_in_the_units_of_the_stream() -> None:
    sites = Sites.of("layers.1.resid_post")
    sae = SAE(SAEConfig(d_model=D, d_latent=F, k=3, normalisation="centre_scale", sites=sites))
    sae.input_scale.fill_(0.25)
    rows = stream_rows(sae, decoder_rows(sae), sites, SiteWidths((D,), (D,)))
    assert rows is not None
    one = sae.denormalise(sae.W_dec) - sae.denormalise(torch.zeros_like(sae.W_dec))
    assert torch.allclose(rows, one, atol=1e-6)
    elsewhere = Sites.of("layers.1.attn_in")
    assert stream_rows(sae, decoder_rows(sae), elsewhere, SiteWidths((D,), (D,))) is None


def test_the_map_is_the_plane_of_most_spread() -> None:
    rows = torch.randn(200, D, generator=GENERATOR) * torch.linspace(3, 0.1, D)
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    found = principal_plane(rows).double()
    spread = torch.linalg.eigvalsh(torch.cov(unit.T, correction=0)).flip(0)[:2]
    assert torch.allclose(found.var(0, correction=0), spread, rtol=1e-4)
