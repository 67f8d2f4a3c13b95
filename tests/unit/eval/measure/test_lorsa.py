"""Evaluation of a dictionary that reads whole contexts: a Lorsa that is the model's attention changes nothing."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from shared.lm import capture, packed_inputs
from shared.lm.hookpoint import HookPoint
from shared.sae.contexts import Contexts, as_attended
from shared.sae.sites import SiteWidths
from stage_eval.measure.downstream import CLEAN, Condition, Splice
from stage_eval.measure.passes import reconstruct
from stage_eval.measure.session import Loaded
from tests.splicing import ATTENTION, D, attention_itself, final_hidden, packed_batch, tiny_llama

READS, WRITES = (*ATTENTION.reads, *ATTENTION.writes)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@torch.no_grad()
@pytest.mark.parametrize("packing", ["isolated", "joined", "separate"])
def test_attention_in_its_own_place_changes_nothing(model: LlamaForCausalLM, packing: str) -> None:
    lorsa, run = attention_itself(model), packed_batch(packing)
    widths = SiteWidths((D,), (D,))
    splice = Splice(ATTENTION, reconstruct(Loaded("lorsa", ATTENTION, widths, lorsa)), widths.writes)
    clean = final_hidden(model, run, Condition(CLEAN))
    torch.testing.assert_close(final_hidden(model, run, Condition("lorsa", (splice,))), clean, atol=1e-4, rtol=1e-4)
    lorsa.b_K.add_(torch.randn_like(lorsa.b_K))
    assert float((final_hidden(model, run, Condition("lorsa", (splice,))) - clean).abs().max()) > 1e-2


@torch.no_grad()
def test_it_reads_documents_as_the_model_ran_them(model: LlamaForCausalLM) -> None:
    lorsa = attention_itself(model)
    for packing in ("isolated", "joined"):
        run = packed_batch(packing)
        seen: dict[HookPoint, Tensor]
        hooks = [HookPoint.parse(name) for name in (READS, WRITES)]
        with capture(model, hooks) as seen:
            model.base_model(**packed_inputs(model, run.tokens_BT, run.segments_BT, isolated=packing == "isolated"))
        documents_BT = as_attended(run.segments_BT, isolated=packing == "isolated")
        x = Contexts.of(seen[hooks[0]], documents_BT, run.replaced_BT)
        torch.testing.assert_close(lorsa(x).x_hat, x.counted(seen[hooks[1]]), atol=1e-5, rtol=1e-4)
