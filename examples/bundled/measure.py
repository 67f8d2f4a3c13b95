"""How good the bundled model is: next-token loss on packed contexts, by position, beside the unigram entropy.

Legend: N tokens of a stream, C contexts, T tokens per context.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from shared.bundled.stdlib import Document

TokenArray = npt.NDArray[np.int32]

POSITION_BUCKETS: tuple[tuple[int, int], ...] = ((1, 128), (128, 512), (512, 1024), (1024, 2048), (2048, 4096))
"""Half-open ranges of the predicted token's position in its context; position 0 has no prediction."""

POSITION_CONTEXTS = 16
"""Contexts of held-out text whose loss `training.json` gives by position; each is read once per rotation."""


def token_stream(tokenizer: PreTrainedTokenizerBase, corpus: Iterable[Document]) -> TokenArray:
    """The corpus as one int32 [N] stream, `[BOS] doc [BOS] doc ...`, in the order given."""
    bos = tokenizer.bos_token_id
    parts = []
    for _, text in corpus:
        parts.append(np.asarray([bos, *tokenizer.encode(text, add_special_tokens=False)], dtype=np.int32))
    return np.concatenate(parts)


def pack(stream_N: TokenArray, length: int) -> TokenArray:
    """Cut the stream into contexts [C, T] of exactly `length` tokens; the rest at the end is dropped."""
    contexts = len(stream_N) // length
    return stream_N[: contexts * length].reshape(contexts, length)


def unigram_entropy(tokens: TokenArray) -> float:
    """Entropy in nats of the empirical token distribution.

    No predictor that ignores the context has a lower mean loss on these tokens.
    """
    counts = np.bincount(tokens.reshape(-1))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@torch.inference_mode()
def next_token_loss(model: LlamaForCausalLM, contexts_CT: TokenArray, batch_size: int = 1) -> torch.Tensor:
    """Cross-entropy in nats of each token given those before it in its context: float64 [C, T-1].

    Column t is the loss of the token at position t + 1.
    """
    rows = []
    for start in range(0, len(contexts_CT), batch_size):
        ids_BT = torch.from_numpy(contexts_CT[start : start + batch_size].astype(np.int64))
        logits_BTV = model(ids_BT, use_cache=False).logits[:, :-1].float()
        # Flattened and not transposed: the log-softmax over a strided vocabulary is many times as slow.
        loss_N = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        rows.append(loss_N.double().view(len(ids_BT), -1))
    return torch.cat(rows)


def loss_by_position(
    model: LlamaForCausalLM, stream_N: TokenArray, length: int = 4096, rotations: int = 8
) -> dict[str, float]:
    """Mean loss in nats for each of `POSITION_BUCKETS`, keyed "start-end", on contexts packed from `stream_N`.

    The stream is packed `rotations` times, each time begun length / rotations tokens further on. A bucket at least
    that wide averages over every token, so such buckets differ in position alone and not in the text that fell there.
    """
    whole_N = pack(stream_N, length).reshape(-1)
    per_position = torch.zeros(length - 1, dtype=torch.float64)
    for turn in range(rotations):
        contexts_CT = pack(np.roll(whole_N, -turn * (length // rotations)), length)
        per_position += next_token_loss(model, contexts_CT).mean(dim=0) / rotations
    return {
        f"{start}-{end}": round(float(per_position[start - 1 : end - 1].mean()), 4)
        for start, end in POSITION_BUCKETS
        if end <= length
    }
