"""Make the bundled model again: a byte-level BPE tokenizer and a small LLaMA, trained on the standard library.

    python -m examples.bundled.make_model --out shared/bundled/model --compile

One step is 4096 tokens. Most steps see eight contexts of 512 tokens; every fourth step and the last quarter see
one context of 4096, so that all the positions a store may use are trained. The same seed, versions and machine give the
same model; another Python version has another corpus and gives another model.
"""

import argparse
import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from examples.bundled.measure import (
    POSITION_CONTEXTS,
    TokenArray,
    loss_by_position,
    next_token_loss,
    pack,
    token_stream,
    unigram_entropy,
)
from examples.bundled.record import provenance, save
from shared.basics.errors import GranaryError
from shared.bundled import stdlib

log = logging.getLogger(__name__)

BOS, EOS = "<s>", "</s>"

# LLaMA 3's split, with single digits: a vocabulary this small has better uses than numbers.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Recipe:
    """All that decides the model, besides the corpus and the versions."""

    steps: int
    seed: int = 0
    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    tokens_per_step: int = 4096
    short_length: int = 512
    """Context length in tokens of most steps: attention over 4096 is three times as slow on a CPU."""
    long_every: int = 4
    """Every so many steps the contexts have `max_position_embeddings` tokens."""
    long_at_end: float = 0.25
    """The share of the steps, at the end, that all have the long contexts."""
    bos_share: float = 0.5
    """The share of training contexts that begin with BOS; the others begin wherever the stream was cut."""
    peak_lr: float = 5e-3
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    """Applied to the layers' matrices, not to the embedding or the RMSNorm scales."""
    max_grad_norm: float = 1.0

    def context_length(self, step: int) -> int:
        """Tokens per context at `step`, counted from 0."""
        is_last_phase = step >= self.steps * (1 - self.long_at_end)
        if is_last_phase or step % self.long_every == self.long_every - 1:
            return self.max_position_embeddings
        return self.short_length

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero after the last step."""
        return self.peak_lr * min((step + 1) / self.warmup_steps, (self.steps - step) / self.steps)


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the train split; it puts BOS before every text by default."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for _, text in stdlib.documents("train")), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        # A document that spells "<s>" (the library's HTML tests do) must not forge a BOS.
        split_special_tokens=True,
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained float32 model; its weights depend on torch's global seed."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def sample_contexts(
    stream_N: TokenArray, length: int, count: int, bos_id: int, recipe: Recipe, rng: np.random.Generator
) -> torch.Tensor:
    """Windows of the stream at random offsets, int64 [count, length + 1]: inputs, and targets one further on."""
    starts = rng.integers(0, len(stream_N) - length, size=count)
    window = np.arange(length + 1)
    ids_BT = stream_N[starts[:, None] + window].astype(np.int64)
    ids_BT[rng.random(count) < recipe.bos_share, 0] = bos_id
    return torch.from_numpy(ids_BT)


def train(
    model: LlamaForCausalLM, stream_N: TokenArray, bos_id: int, recipe: Recipe, compile_step: bool
) -> list[dict[str, float]]:
    """Train in place, matmuls in bfloat16; returns the points of the loss curve (nats).

    Muon updates the layers' matrices, which at so few steps gets further than AdamW; AdamW updates the rest.
    """

    def mean_loss(ids_BT: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden_BTD = model.model(ids_BT[:, :-1], use_cache=False).last_hidden_state
            logits_BTV = model.lm_head(hidden_BTD)
            return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())

    loss_of = torch.compile(mean_loss, dynamic=False) if compile_step else mean_loss
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim < 2)]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.peak_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.peak_lr, betas=recipe.betas, weight_decay=0.0, fused=True),
    ]
    rng = np.random.default_rng(recipe.seed)
    curve: list[dict[str, float]] = []
    every = max(1, recipe.steps // 60)
    recent: list[float] = []
    began = time.monotonic()
    model.train()
    for step in range(recipe.steps):
        length = recipe.context_length(step)
        ids_BT = sample_contexts(stream_N, length, recipe.tokens_per_step // length, bos_id, recipe, rng)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = recipe.learning_rate(step)
        loss = loss_of(ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise GranaryError(f"training diverged at step {step}: lower Recipe.peak_lr or use another --seed")
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            curve.append({"step": step + 1, "train_loss": round(sum(recent) / len(recent), 4)})
            seconds = time.monotonic() - began
            left = seconds / (step + 1) * (recipe.steps - step - 1)
            rate = recipe.tokens_per_step * (step + 1) / seconds
            log.info(
                "step %d/%d  loss %.3f  %.0f tokens/s  %.1f min left",
                step + 1, recipe.steps, curve[-1]["train_loss"], rate, left / 60,
            )  # fmt: skip
            recent = []
    model.eval()
    return curve


def figures(model: LlamaForCausalLM, train_N: TokenArray, heldout_N: TokenArray, recipe: Recipe) -> dict[str, Any]:
    """What the finished model does on the held-out documents, in nats per token, with the weights as they are saved."""
    length = recipe.max_position_embeddings
    contexts_CT = pack(heldout_N, length)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": recipe.steps * recipe.tokens_per_step,
        "train_split_tokens": len(train_N),
        "heldout_split_tokens": len(heldout_N),
        "heldout_loss": round(float(next_token_loss(model, contexts_CT).mean()), 4),
        "heldout_unigram_entropy": round(unigram_entropy(contexts_CT), 4),
        "heldout_loss_by_position": loss_by_position(model, heldout_N[: POSITION_CONTEXTS * length], length),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled tokenizer and model on the standard library.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; its files are replaced")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of 4096 tokens (default 3000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--compile", action="store_true", help="torch.compile: half the time, needs a C++ compiler")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    recipe = Recipe(steps=args.steps, seed=args.seed)
    command = f"python -m examples.bundled.make_model --out shared/bundled/model --steps {args.steps}" + (
        f" --seed {args.seed} --threads {args.threads}" + (" --compile" if args.compile else "")
    )
    began = time.monotonic()
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe)
    log.info("tokenizer trained: %d tokens", len(tokenizer))

    train_documents = list(stdlib.documents("train"))
    order = np.random.default_rng(recipe.seed).permutation(len(train_documents))
    train_N = token_stream(tokenizer, (train_documents[i] for i in order))
    heldout_documents = list(stdlib.documents("heldout"))
    order = np.random.default_rng(recipe.seed).permutation(len(heldout_documents))
    heldout_N = token_stream(tokenizer, (heldout_documents[i] for i in order))
    log.info("corpus encoded: %d train and %d held-out tokens", len(train_N), len(heldout_N))

    model = new_model(recipe, tokenizer)
    assert isinstance(tokenizer.bos_token_id, int)
    curve = train(model, train_N, tokenizer.bos_token_id, recipe, args.compile)
    minutes = (time.monotonic() - began) / 60

    model.bfloat16()
    rounded = LlamaForCausalLM(model.config).eval()
    rounded.load_state_dict(model.state_dict())
    record = {
        **provenance(command),
        "recipe": asdict(recipe),
        **figures(rounded, train_N, heldout_N, recipe),
        "minutes": round(minutes, 1),
        "loss_curve": curve,
    }
    # The end of a document is a BOS in the training stream, so generation must stop there too.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id]
    )
    save(model, tokenizer, record, args.out)
    log.info(
        "held-out loss %.3f nats (unigram entropy %.3f)", record["heldout_loss"], record["heldout_unigram_entropy"]
    )
    log.info("by position: %s", record["heldout_loss_by_position"])
    log.info("written to %s", args.out)


if __name__ == "__main__":
    main()
