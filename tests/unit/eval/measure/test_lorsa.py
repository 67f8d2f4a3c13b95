"""Evaluation of a dictionary that reads whole contexts: a Lorsa that is the model's attention changes nothing."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from shared.lm import capture, packed_inputs
from shared.lm.attention import heads_of, shape_of
from shared.lm.hookpoint import HookPoint
from shared.sae import Lorsa
from shared.sae.contexts import Contexts
from shared.sae.sites import Sites, SiteWidths
from stage_eval.measure.downstream import CLEAN, Batch, Condition, Splice, as_attended, final_hidden
from stage_eval.measure.passes import reconstruct
from stage_eval.measure.session import Loaded
from tests.splicing import D, tiny_llama
from tests.variants import make

READS, WRITES = "layers.1.attn_in", "layers.1.attn_out"
SITES = Sites((READS,), (WRITES,), "sequence")
T = 11


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@torch.no_grad()
def attention_itself(model: LlamaForCausalLM) -> Lorsa:
    """Each value of a head twice, as it is and negated: relu of both makes it up again."""
    heads, shape = heads_of(model, 1), shape_of(model, 1)
    form = {name: getattr(shape.form, name) for name in shape.form.__dataclass_fields__}
    given = {**form, "qk_heads": shape.heads, "qk_width": shape.width, "d_latent": 2 * shape.heads * shape.width}
    places = (SITES, SiteWidths((D,), (D,)))
    made = make("lorsa", places=places, activation="relu", normalisation="none", unit_norm_decoder=False, **given)
    lorsa = made.dictionary
    assert isinstance(lorsa, Lorsa)
    lorsa.W_Q.copy_(heads.query_key.W_Q_GED)
    lorsa.W_K.copy_(heads.query_key.W_K_GED)
    W_O_HED = model.model.layers[1].self_attn.o_proj.weight.T.unflatten(0, (shape.heads, -1))
    lorsa.W_enc.copy_(torch.cat([heads.W_V_HED, -heads.W_V_HED], 1).flatten(0, 1))
    lorsa.W_dec.copy_(torch.cat([W_O_HED, -W_O_HED], 1).flatten(0, 1))
    return lorsa


def batch(packing: str) -> Batch:
    """Two contexts of documents and padding, whose first token of each document is not replaced."""
    tokens_BT = torch.randint(3, 50, (2, T), generator=torch.Generator().manual_seed(3))
    segments_BT = torch.tensor([[0] * 4 + [1] * 6 + [-1], [0] * 9 + [-1] * 2])
    if packing == "separate":
        segments_BT[0, 4:] = -1
    scored_BT = segments_BT >= 0
    replaced_BT = scored_BT.clone()
    replaced_BT[:, 0] = False
    return Batch(tokens_BT, segments_BT, packing, replaced_BT, scored_BT)


@torch.no_grad()
@pytest.mark.parametrize("packing", ["isolated", "joined", "separate"])
def test_attention_in_its_own_place_changes_nothing(model: LlamaForCausalLM, packing: str) -> None:
    lorsa, run = attention_itself(model), batch(packing)
    widths = SiteWidths((D,), (D,))
    splice = Splice(SITES, reconstruct(Loaded("lorsa", SITES, widths, lorsa)), widths.writes)
    clean = final_hidden(model, run, Condition(CLEAN))
    torch.testing.assert_close(final_hidden(model, run, Condition("lorsa", (splice,))), clean, atol=1e-4, rtol=1e-4)
    lorsa.b_K.add_(torch.randn_like(lorsa.b_K))
    assert float((final_hidden(model, run, Condition("lorsa", (splice,))) - clean).abs().max()) > 1e-2


@torch.no_grad()
def test_it_reads_documents_as_the_model_ran_them(model: LlamaForCausalLM) -> None:
    lorsa = attention_itself(model)
    for packing in ("isolated", "joined"):
        run = batch(packing)
        seen: dict[HookPoint, Tensor]
        hooks = [HookPoint.parse(name) for name in (READS, WRITES)]
        with capture(model, hooks) as seen:
            model.base_model(**packed_inputs(model, run.tokens_BT, run.segments_BT, isolated=packing == "isolated"))
        documents_BT = as_attended(run.segments_BT, isolated=packing == "isolated")
        x = Contexts.of(seen[hooks[0]], documents_BT, run.replaced_BT)
        torch.testing.assert_close(lorsa(x).x_hat, x.counted(seen[hooks[1]]), atol=1e-5, rtol=1e-4)
