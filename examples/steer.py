"""Load an SAE, see which latents fire on a text, steer the model with one of them, and draw it.

    python examples/steer.py runs/demo/sae --text "def read(self, path):" --out runs/demo/steer.png

Without --latent it steers with the latent that fires most strongly on the text. Any SAE folder will do whose format
`shared.sae.formats` knows; --model is only needed where the SAE does not record the model it was trained on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.cli import fail
from shared.errors import GranaryError
from shared.lm import load_causal_lm, load_tokenizer
from shared.sae import SAE
from shared.sae.edits import Edit
from shared.sae.formats import load_any
from shared.sae.intervene import SplicedModel

SHOWN = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example; a wrong input is one line on stderr and status 2."""
    arguments = parse(argv)
    try:
        run(arguments, Console(soft_wrap=True, highlight=False))
    except GranaryError as error:
        fail(str(error))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sae", help="folder of an SAE, or a hub id")
    parser.add_argument("--text", default="def read(self, path):\n    ")
    parser.add_argument("--model", help="model folder, hub id or bundled; default: what the SAE records")
    parser.add_argument("--latent", type=int, help="latent to steer with; default: the strongest on the text")
    parser.add_argument("--strength", type=float, default=2.0, help="times the latent's largest value on the text")
    parser.add_argument("--tokens", type=int, default=24, help="how many to generate")
    parser.add_argument("--out", type=Path, default=Path("steer.png"))
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Read, steer, draw."""
    sae, provenance = load_any(arguments.sae)
    model_path, hook = where(arguments.model, provenance)
    model, tokenizer = load_causal_lm(model_path), load_tokenizer(model_path)
    ids = tokenizer(arguments.text, return_tensors="pt").input_ids
    if tokenizer.bos_token_id is not None and ids[0, 0] != tokenizer.bos_token_id:
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)

    dense = read(model, sae, hook, ids)
    words = [tokenizer.decode([token]) for token in ids[0].tolist()]
    show_latents(dense, words, console)
    latent = int(dense.max(0).values.argmax()) if arguments.latent is None else arguments.latent
    value = arguments.strength * float(dense.max(0).values[latent])
    settings = {"max_new_tokens": arguments.tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    for name, edits in (("unchanged", []), (f"latent {latent} set to {value:.3g}", [Edit([latent], "set", value)])):
        full = SplicedModel(model, sae, hook, edits=edits).generate(ids, **settings)
        console.print(f"\n[bold]{name}[/bold]")
        console.print(continuation(tokenizer, ids, full), markup=False)
    draw(dense, words, arguments.out)
    console.print(f"\nfigure: {arguments.out}")


def where(model: str | None, provenance: dict[str, Any]) -> tuple[str, str]:
    """(model, hook), as given or as the SAE records them."""
    model = model or (provenance.get("model") or {}).get("id")
    hook = provenance.get("hook")
    if model is None or hook is None:
        raise GranaryError("the SAE does not record its model and hook: give --model, and train or convert it anew")
    return model, hook


def read(model: PreTrainedModel, sae: SAE, hook: str, ids: Tensor) -> Tensor:
    """Latents of every token of one text, dense [T, F]; BOS, which the SAE was not trained on, is set to zero."""
    spliced = SplicedModel(model, sae, hook)
    spliced(ids)
    features = spliced.features
    return features.before.to_dense(sae.config.d_latent)[0] * features.applied[0, :, None]


def show_latents(dense: Tensor, words: Sequence[str], console: Console) -> None:
    """The strongest latents and the tokens that they fire on."""
    table = Table("latent", "largest value", "fires on")
    for latent in dense.max(0).values.topk(min(SHOWN, dense.shape[1])).indices.tolist():
        order = dense[:, latent].argsort(descending=True)[:5].tolist()
        fires = [repr(words[token]) for token in order if dense[token, latent] > 0]
        if fires:
            table.add_row(str(latent), f"{float(dense[:, latent].max()):.3f}", " ".join(fires))
    console.print(table)


def continuation(tokenizer: PreTrainedTokenizerBase, ids: Tensor, full: Tensor) -> str:
    """The generated part as text."""
    return str(tokenizer.decode(full[0, ids.shape[1] :]))


def draw(dense: Tensor, words: Sequence[str], path: Path) -> None:
    """Strongest latents (rows) over tokens (columns)."""
    rows = dense.max(0).values.topk(min(2 * SHOWN, dense.shape[1])).indices
    figure = Figure(figsize=(max(4.0, 0.35 * len(words) + 2), 4.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(dense[:, rows].T, aspect="auto", cmap="YlOrBr")
    # A lone $ would begin a formula, and a control character has no glyph.
    axes.set_xticks(range(len(words)), [repr(word)[1:-1].replace("$", r"\$") for word in words], rotation=90)
    axes.set_yticks(range(len(rows)), [str(latent) for latent in rows.tolist()])
    axes.set_ylabel("latent")
    figure.colorbar(image, label="value")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
