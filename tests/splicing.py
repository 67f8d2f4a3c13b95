"""What tests of intervention splice into: a LLaMA of three layers, prompts, its activations, a Lorsa that is its
attention."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shared.lm import capture
from shared.lm.attention import heads_of, shape_of
from shared.lm.hookpoint import HookPoint
from shared.sae import Lorsa
from shared.sae.sites import Sites, SiteWidths
from stage_eval.measure.downstream import Batch, Condition, Trunk
from tests.variants import make

D, F, K, VOCAB, BOS = 16, 40, 5, 50, 1
HOOK = "layers.1.resid_post"
ATTENTION = Sites(("layers.1.attn_in",), ("layers.1.attn_out",), "sequence")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def prompt(batch: int = 2, length: int = 7) -> Tensor:
    tokens = torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = BOS
    return tokens


def packed_batch(packing: str) -> Batch:
    """Two contexts of documents and padding, whose first token is not replaced."""
    tokens_BT = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(3))
    segments_BT = torch.tensor([[0] * 4 + [1] * 6 + [-1], [0] * 9 + [-1] * 2])
    if packing == "separate":
        segments_BT[0, 4:] = -1
    scored_BT = segments_BT >= 0
    replaced_BT = scored_BT.clone()
    replaced_BT[:, 0] = False
    return Batch(tokens_BT, segments_BT, packing, replaced_BT, scored_BT)


def final_hidden(model: PreTrainedModel, run: Batch, condition: Condition) -> Tensor:
    """Of a whole pass."""
    return Trunk(model, run).final_hidden(condition)


def activation(model: LlamaForCausalLM, hook: str = HOOK, **inputs: Any) -> Tensor:
    with torch.no_grad(), capture(model, [HookPoint.parse(hook)]) as captured:
        model(**inputs)
    return captured[HookPoint.parse(hook)]


@torch.no_grad()
def attention_itself(model: LlamaForCausalLM) -> Lorsa:
    """Each value of a head twice, as it is and negated: relu of both makes it up again."""
    heads, shape = heads_of(model, 1), shape_of(model, 1)
    form = {name: getattr(shape.form, name) for name in shape.form.__dataclass_fields__}
    given = {**form, "qk_heads": shape.heads, "qk_width": shape.width, "d_latent": 2 * shape.heads * shape.width}
    places = (ATTENTION, SiteWidths((D,), (D,)))
    made = make("lorsa", places=places, activation="relu", normalisation="none", unit_norm_decoder=False, **given)
    lorsa = made.dictionary
    assert isinstance(lorsa, Lorsa)
    lorsa.W_Q.copy_(heads.query_key.W_Q_GED)
    lorsa.W_K.copy_(heads.query_key.W_K_GED)
    W_O_HED = model.model.layers[1].self_attn.o_proj.weight.T.unflatten(0, (shape.heads, -1))
    lorsa.W_enc.copy_(torch.cat([heads.W_V_HED, -heads.W_V_HED], 1).flatten(0, 1))
    lorsa.W_dec.copy_(torch.cat([W_O_HED, -W_O_HED], 1).flatten(0, 1))
    return lorsa
