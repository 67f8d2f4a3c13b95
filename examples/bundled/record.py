"""What the bundled model's folder says about how it was made: `training.json` and the model card."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from examples.bundled.measure import POSITION_CONTEXTS
from shared.bundled import stdlib


def provenance(command: str) -> dict[str, Any]:
    """Which corpus, versions and machine made the model."""
    return {
        "command": command,
        "corpus": stdlib.description("train"),
        "corpus_hash": {
            "train": stdlib.content_hash(stdlib.documents("train")),
            "heldout": stdlib.content_hash(stdlib.documents("heldout")),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
    }


def model_card(record: dict[str, Any]) -> str:
    """The README.md of the model's folder, from what `training.json` says."""
    recipe = record["recipe"]
    by_position = record["heldout_loss_by_position"]
    change = by_position["2048-4096"] - by_position["512-1024"]
    position_tokens = POSITION_CONTEXTS * recipe["max_position_embeddings"]
    rows = "\n".join(f"| {bucket} | {loss:.3f} |" for bucket, loss in by_position.items())
    return f"""# Bundled LLaMA

A `LlamaForCausalLM` with {record["parameters"]:,} parameters ({recipe["num_hidden_layers"]} layers, d_model
{recipe["hidden_size"]}, {recipe["num_attention_heads"]} query and {recipe["num_key_value_heads"]} key-value heads, tied
embeddings, {recipe["max_position_embeddings"]} positions) and its own byte-level BPE tokenizer of
{recipe["vocab_size"]} tokens. It exists so that the demonstration and the tests run without a download. It has learnt
something about Python source and its documentation, and nothing else: do not use it for anything but trying Granary.

Trained on the {record["corpus"]}, for {recipe["steps"]} steps ({record["tokens_seen"] / 1e6:.1f} million tokens,
{record["tokens_seen"] / record["train_split_tokens"]:.1f} passes). The weights are stored as bfloat16 and load as
float32 with `dtype=torch.float32`. There is no padding token. Documents were joined as `[BOS] doc [BOS] doc ...`,
so the model ends a document with BOS, at which generation stops.

## Figures

On the held-out split ({record["heldout_split_tokens"]:,} tokens in files the model never saw), contexts of
{recipe["max_position_embeddings"]} tokens, in nats per token, with the saved weights computed in float32:

| | nats per token |
|---|---|
| loss | {record["heldout_loss"]:.3f} |
| unigram entropy of the same tokens | {record["heldout_unigram_entropy"]:.3f} |

By position in the context, on {position_tokens:,} of these tokens packed in eight ways, so that each bucket from 512 on
averages over the same ones:

| position | nats per token |
|---|---|
{rows}

From 512-1024 to 2048-4096 the loss changes by {change:+.3f} nats: above zero, the model does not gain from
more context.

`training.json` has the loss curve, the whole recipe, corpus hashes, versions and machine.

## Making it again

    {record["command"]}

The source it was trained on is Python's, under the PSF License Version 2.
"""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any], out: Path) -> None:
    """Write the Hugging Face folder, `training.json` and `README.md`."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")
    (out / "README.md").write_text(model_card(record), encoding="ascii")
