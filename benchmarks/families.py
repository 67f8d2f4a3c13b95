"""Which families of decoders harvest documents as if alone: tiny random models, each tried in sdpa and eager attention.

    python benchmarks/families.py                 # the table of docs/families.md, some minutes
    python benchmarks/families.py --write         # and write it there
    python benchmarks/families.py llama mamba     # these only

Per family a model with small random weights is saved and loaded as a harvest loads it. ``isolated`` is what the probe
of a harvest says; where it lets the harvest go on, documents of other lengths are packed and compared with the whole
model of plain transformers in eager attention, one document at a time. ``separate`` does the same with
``packing=separate``.
A cell reads *right* with the largest relative difference of a position, or *refused*; the script fails on any other.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shared.basics.errors import GranaryError
from shared.lm import capture, load_trunk, packed_inputs
from shared.lm.hookpoint import HookPoint
from shared.lm.isolation import measure_isolation, position_differences, probe_lengths

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
VOCAB, LAYERS = 64, 4
TOLERANCE = 1e-3
TRUE_LENGTHS = (12, 40, 5, 100, 3, 60, 25, 9, 70)
SEQ_LEN = sum(TRUE_LENGTHS)

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 8.0,
    "long_factor": [1.0, 4.0, 16.0, 48.0], "short_factor": [1.0, 1.01, 1.02, 1.03],
}  # fmt: skip
WINDOW = {"sliding_window": 16}
GPT2_SIZES = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 512, "vocab_size": VOCAB}
CHUNK = {
    "attention_chunk_size": 16, "no_rope_layers": [1, 1, 1, 0], "intermediate_size_mlp": 48, "num_experts_per_tok": 1,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "qk_head_dim": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4,
}  # fmt: skip

# Name of a row: what is added to `SIZES` (None takes a key away), with the model type where it is not the name.
# transformers keeps and ignores a key that a configuration does not know.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, linear rope": {
        "model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    },
    "llama4_text": {**MOE, **CHUNK},
    "mistral": WINDOW,
    "ministral": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mixtral": {**MOE, **WINDOW},
    "qwen2": {},
    "qwen2, window": {"model_type": "qwen2", **WINDOW, "use_sliding_window": True, "max_window_layers": 0},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 24},
    "qwen3": {},
    "qwen3_moe": MOE,
    "qwen3_next": {
        **MOE, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "gemma": {},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text, bidirectional": {
        "model_type": "gemma3_text", **WINDOW, "query_pre_attn_scalar": 8, "use_bidirectional_attention": True,
    },
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gpt2": GPT2_SIZES,
    "gpt_neo": {"num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 16},
    "gptj": {**GPT2_SIZES, "rotary_dim": 4},
    "gpt_bigcode": {**GPT2_SIZES, "multi_query": True},
    "codegen": {**GPT2_SIZES, "rotary_dim": 4},
    "gpt_oss": {**MOE, **WINDOW},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 512},
    "falcon": {"head_dim": None, "new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "falcon, alibi": {
        "model_type": "falcon", "head_dim": None, "new_decoder_architecture": False, "multi_query": False,
        "alibi": True,
    },
    "phi": {},
    "phi3": {},
    "phi3, longrope": {"model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    "phimoe": MOE,
    "stablelm": {},
    "starcoder2": WINDOW,
    "persimmon": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": MOE,
    "cohere": {},
    "cohere2": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "nemotron": {},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0},
    "granitemoe": MOE,
    "granitemoehybrid": {
        **MOE, **MAMBA2, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"] * 2,
        "position_embedding_type": "nope",
    },
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "ernie4_5": {},
    "exaone4": {**WINDOW, "sliding_window_pattern": 2},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "arcee": {},
    "helium": {},
    "deepseek_v2": {**MOE, **MLA},
    "deepseek_v3": {**MOE, **MLA},
    "minimax": {**MOE, "block_size": 16, "layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "block_multiple_of": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "mamba": {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4},
    "jamba": {
        **MOE, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_dt_rank": 4, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "bamba": {**MAMBA2, "attn_layer_indices": [1, 3]},
    "zamba2": {
        **MAMBA2, "mamba_headdim": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 3], "chunk_size": 16, "layers_block_type": ["mamba", "hybrid"] * 2, "adapter_rank": 4,
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "rwkv": {"attention_hidden_size": 32, "context_length": 512},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One family's results."""

    name: str
    cells: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether every cell is right or refused."""
        return all(cell.startswith(("right", "refused")) for cell in self.cells)


def build(name: str, folder: Path) -> None:
    """Save a model of random weights large enough for every branch to matter; raises whatever transformers raises."""
    keys = {key: value for key, value in {**SIZES, "model_type": name, **FAMILIES[name]}.items() if value is not None}
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)


def documents(lengths: Sequence[int], seed: int) -> list[Tensor]:
    """Random ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def truth(folder: Path, hooks: Sequence[HookPoint], docs: Sequence[Tensor]) -> list[dict[HookPoint, Tensor]]:
    """The activations of each document alone, by the whole model as transformers runs it."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return [run(model, hooks, {"input_ids": doc[None], "use_cache": False}) for doc in docs]


def run(model: PreTrainedModel, hooks: Sequence[HookPoint], inputs: dict[str, Any]) -> dict[HookPoint, Tensor]:
    with torch.no_grad(), capture(model, hooks) as got:
        model(**inputs)
    return dict(got)


def worst(pairs: Iterator[tuple[dict[HookPoint, Tensor], dict[HookPoint, Tensor]]]) -> float:
    """Largest relative difference of a position, over documents and hooks."""
    return max(
        position_differences(got[hook][0], wanted[hook][0]).max().item() for got, wanted in pairs for hook in wanted
    )


def judged(figure: float) -> str:
    return f"right, {figure:.0e}" if figure <= TOLERANCE else f"WRONG, {figure:.0e}"


def isolated_cell(trunk: PreTrainedModel, hooks: Sequence[HookPoint], wanted: Sequence[dict[HookPoint, Tensor]]) -> str:
    """What a harvest with packing=isolated does: refused by the probe, or right or wrong."""
    probes = documents(probe_lengths(trunk.config, SEQ_LEN, 4 * SEQ_LEN), seed=1)
    try:
        if not measure_isolation(trunk, hooks, probes, seq_len=SEQ_LEN, batch_contexts=2).holds:
            return "refused"
    except GranaryError:
        return "refused"
    docs = documents(TRUE_LENGTHS, seed=2)
    tokens = torch.cat(docs)[None]
    segments = torch.repeat_interleave(torch.arange(len(docs)), torch.tensor(TRUE_LENGTHS))[None]
    packed = run(trunk, hooks, packed_inputs(trunk, tokens, segments, isolated=True))
    ends = torch.tensor(TRUE_LENGTHS).cumsum(0).tolist()
    cut = [
        {hook: x_BTD[:, end - length : end] for hook, x_BTD in packed.items()}
        for end, length in zip(ends, TRUE_LENGTHS, strict=True)
    ]
    return judged(worst(zip(cut, wanted, strict=True)))


def separate_cell(trunk: PreTrainedModel, hooks: Sequence[HookPoint], wanted: Sequence[dict[HookPoint, Tensor]]) -> str:
    """What a harvest with packing=separate does."""
    got = []
    for doc in documents(TRUE_LENGTHS, seed=2):
        ids = doc[None]
        got.append(run(trunk, hooks, packed_inputs(trunk, ids, torch.zeros_like(ids), isolated=False)))
    return judged(worst(zip(got, wanted, strict=True)))


def try_family(name: str) -> Row:
    """The row of one family; a family that granary refuses to load at all is refused in every cell."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build(name, folder)
        hooks = [HookPoint(layer, "resid_post") for layer in range(LAYERS - 1)]
        docs = documents(TRUE_LENGTHS, seed=2)
        cells: list[str] = []
        for attention in ("sdpa", "eager"):
            try:
                trunk = load_trunk(str(folder), num_layers=LAYERS - 1, attn_implementation=attention)
                wanted = truth(folder, hooks, docs)
            except GranaryError:
                cells += ["refused", "refused"]
                continue
            cells += [isolated_cell(trunk, hooks, wanted), separate_cell(trunk, hooks, wanted)]
    return Row(name, tuple(cells))


def quiet() -> None:
    """transformers speaks of missing kernels and of unknown keys: nothing to do with the question."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| family | isolated, sdpa | separate, sdpa | isolated, eager | separate, eager |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {row.name} | {' | '.join(row.cells)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--write", action="store_true", help="put the table into docs/families.md")
    arguments = parser.parse_args()
    quiet()
    rows = []
    for name in arguments.families:
        rows.append(try_family(name))
        print(rows[-1].name, *rows[-1].cells, sep=" | ", flush=True)
    if arguments.write:
        head, _, _ = PAGE.read_text(encoding="utf-8").partition("| family |")
        PAGE.write_text(head + table(rows) + "\n", encoding="utf-8")
    sys.exit(not all(row.is_sound for row in rows))


if __name__ == "__main__":
    main()
