"""Scores of latents, from one forward and one backward pass, rank them as ablating each of them does."""

import pathlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import granary
from shared.sae import SAE, SAEConfig
from stage_trace.certificate import spearman

pytestmark = pytest.mark.slow

PROMPTS = {
    "code": [
        "def read(self, path):\n    return path.",
        "class Store:\n    def __init__(self",
        "for i in range(",
        "import os\nimport sys\n\ndef main(",
        "    if not isinstance(value, int):\n        raise TypeError(",
        "try:\n    import json\nexcept ImportError:\n    json =",
        "    for key, value in self.items():\n        if key in",
        '"""Return the number of items in the list.\n\n    The list may be',
    ],
    "stories": [
        "Once upon a time, there was a little",
        "Tom and Sue went to the park to",
        "The dog was very happy because he",
        "She opened the box and saw a big",
        "One day, the boy found a red",
        'Mom said, "You can play with',
    ],
}
RECIPE = ["stream.batch_size=1024", "logger.progress=false", "device.threads=1"]


@pytest.mark.parametrize("kind", PROMPTS)
def test_scores_rank_latents_as_exact_ablation_does(kind: str, request: pytest.FixtureRequest) -> None:
    """Every active latent at every token, each ablated alone by a plain hook."""
    if kind == "stories":
        data: Path = request.getfixturevalue("realdata")
        folder, layer = str(data / "stories260K-hf"), 3
        texts = (data / "text/tinystories_train.txt").read_text()[:2_000_000].split("<|endoftext|>")
    else:
        folder, layer = "bundled", 2
        library = Path(pathlib.__file__).parent
        library = library if library.name != "pathlib" else library.parent
        texts = [file.read_text(encoding="utf-8") for file in sorted(library.glob("*.py"))]
    model, tokenizer = granary.load_causal_lm(folder), granary.load_tokenizer(folder)
    hook = f"layers.{layer}.resid_post"
    rows = [tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids for text in texts]
    with granary.attach(model, {hook: SAEConfig(k=32, expansion=8)}) as saes:
        granary.fit(saes, [one for one in rows if one.shape[1] > 8], tokens=200_000, overrides=RECIPE)
        sae = saes[hook]
    found = [correlation(model, tokenizer, sae, layer, text) for text in PROMPTS[kind]]
    print(f"rank correlation, {kind}:", *(f"{one:.3f}" for one in found))  # noqa: T201
    assert sum(found) / len(found) >= 0.9
    assert min(found) >= 0.8


def correlation(model: Any, tokenizer: Any, sae: SAE, layer: int, text: str) -> float:
    """Spearman's, over the active latents of a prompt."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        first, second = model(ids).logits[0, -1].topk(2).indices.tolist()
    found = granary.attribute(
        model,
        sae,
        {"input_ids": ids},
        lambda out: out.logits[0, -1, first] - out.logits[0, -1, second],
        f"layers.{layer}.resid_post",
    )
    places, ends = (found.latents.indices[0] >= 0).nonzero(), []
    for part in places.split(128):

        def without(_module: Any, _args: Any, x: Tensor, part: Tensor = part) -> Tensor:
            x = x.clone()
            for row, (position, slot) in enumerate(part.tolist()):
                latent = found.latents.indices[0, position, slot]
                x[row, position] -= found.latents.values[0, position, slot] * sae.W_dec[latent] / sae.input_scale
            return x

        handle = model.model.layers[layer].register_forward_hook(without)
        with torch.no_grad():
            logits = model(ids.expand(len(part), -1)).logits[:, -1]
        handle.remove()
        ends.append(logits[:, first] - logits[:, second])
    return spearman(found.scores[0][places[:, 0], places[:, 1]], found.metric - torch.cat(ends))
