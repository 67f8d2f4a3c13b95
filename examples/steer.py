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

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit
from shared.intervene.splice import SplicedModel
from shared.launch.outcome import ending_in_one_line
from shared.lm import load_causal_lm, load_tokenizer
from shared.sae import SAE
from shared.sae.loading import load_any

SHOWN = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example; a wrong input is one line on stderr and status 2."""
    arguments = parse(argv)
    with ending_in_one_line():
        run(arguments, Console(soft_wrap=True, highlight=False))


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
    edit = Edit([latent], "set", value)
    settings = {"max_new_tokens": arguments.tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    for name, edits in (("unchanged", []), (f"latent {latent} set to {value:.3g}", [edit])):
        full = SplicedModel(model, sae, hook, edits=edits).generate(ids, **settings)
        console.print(f"\n[bold]{name}[/bold]")
        console.print(continuation(tokenizer, ids, full), markup=False)
    draw(dense, words, effect(model, tokenizer, sae, hook, ids, edit), latent, arguments.out)
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


@torch.no_grad()
def effect(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sae: SAE, hook: str, ids: Tensor, edit: Edit
) -> list[tuple[str, float]]:
    """(token, change of its log-probability) of the next tokens that the edit favours and disfavours most.

    Among the tokens that either the unchanged or the steered model finds likely.
    """
    clean_V = model(ids).logits[0, -1].log_softmax(-1)
    steered_V = SplicedModel(model, sae, hook, edits=[edit])(ids).logits[0, -1].log_softmax(-1)
    likely = torch.maximum(clean_V, steered_V).topk(min(4 * SHOWN, len(clean_V))).indices
    change = (steered_V - clean_V)[likely]
    order = change.argsort(descending=True)
    chosen = torch.cat([order[: SHOWN // 2], order[-(SHOWN // 2) :]])
    return [(tokenizer.decode([int(likely[i])]), float(change[i])) for i in chosen]


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


def draw(dense: Tensor, words: Sequence[str], changes: Sequence[tuple[str, float]], latent: int, path: Path) -> None:
    """Strongest latents (rows) over tokens (columns), and what setting one of them does to the next token."""
    rows = dense.max(0).values.topk(min(2 * SHOWN, dense.shape[1])).indices.tolist()
    figure = Figure(figsize=(max(9.0, 0.4 * len(words) + 5), 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[max(2, len(words) / 6), 1.4])
    image = left.imshow(dense[:, rows].T, aspect="auto", cmap="YlOrBr")
    left.set_xticks(range(len(words)), [printable(word) for word in words], rotation=90)
    left.set_yticks(range(len(rows)), [str(row) for row in rows])
    left.set_ylabel("latent")
    left.set_title("Strongest latents on the text", loc="left")
    figure.colorbar(image, label="value", pad=0.01)
    places = range(len(changes))
    right.barh(places, [change for _, change in changes], color=["#2f7d5b" if c > 0 else "#b4483b" for _, c in changes])
    right.set_yticks(places, [printable(word) for word, _ in changes])
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.spines[["top", "right"]].set_visible(False)
    right.set_xlabel("change of log-probability, nats")
    right.set_title(f"Next token with latent {latent} set", loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def printable(word: str) -> str:
    """The token as a label: a lone $ would begin a formula, and a control character has no glyph."""
    return repr(word)[1:-1].replace("$", r"\$").replace(" ", "\u2423")


if __name__ == "__main__":
    main()
