"""The card of what is published: a README.md that says, from the files' own records, what it is and how good it is."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from shared.latents.meta import Meta
from shared.sae.config import DictionaryConfig
from stage_eval.results.evaluation import Evaluation

KINDS = {"sae": "Sparse autoencoder", "clt": "Cross-layer transcoder", "molt": "Mixture of linear transforms"}
Row = tuple[str, str]


def dictionary_card(
    config: DictionaryConfig,
    provenance: Mapping[str, Any],
    scores: Evaluation | None,
    plots: Sequence[str],
    name: str,
) -> str:
    """The card of a dictionary, published as `name`; `plots` are paths of pictures beside it."""
    model = _of_model(provenance.get("model"))
    kind = KINDS.get(config.kind, config.kind.replace("_", " ").capitalize())
    where = "" if config.sites is None else f" of {config.sites}"
    parts = [
        _front(["sparse-autoencoder", "interpretability", config.kind], model),
        f"# {name}\n\n{kind}{where}, trained with Granary (`granary-sae`).\n",
        _code(
            "from granary import load",
            f"dictionary = load({_place(name)!r})",
            "latents = dictionary.encode(activations)",
        ),
        "## What it is\n\n" + _table(_facts(config, provenance)),
        "## Scores\n\n" + (_NOT_SCORED if scores is None else _table(_scores(scores)) + _measured(scores)),
        *(f"![{plot.rpartition('/')[2].removesuffix('.png').replace('_', ' ')}]({plot})\n" for plot in plots),
        _settings(provenance),
    ]
    return "\n".join(filter(None, parts))


def latents_card(meta: Meta, name: str) -> str:
    """The card of a latents folder, published as the data set `name`."""
    told = meta.dictionary
    sites = " to ".join(dict.fromkeys([*map(str, told.get("reads", ())), *map(str, told.get("writes", ()))]))
    rows = [
        ("Dictionary", f"{told.get('kind')}, {told.get('activation')}, {meta.num_latents:,} latents, {sites}"),
        ("Weights", f"sha256 {told.get('sha256')}"),
        ("Tokens", f"{meta.counts.get('tokens', 0):,} in {meta.counts.get('contexts', 0):,} contexts"),
        ("Documents", f"{meta.counts.get('documents', 0):,}"),
        ("Dead latents", f"{meta.counts.get('dead', 0):,}"),
        (
            "Examples of each latent",
            f"{meta.settings.get('top')} strongest, {meta.settings.get('sample')} drawn evenly",
        ),
        ("Model", str(_of_model(meta.model) or meta.model.get("id"))),
    ]
    parts = [
        _front(["interpretability", "latents"], _of_model(meta.model)),
        f"# {name}\n\nWhat each latent of a dictionary does, found with Granary (`granary-sae`).\n",
        _code(
            "from granary import Latents", f"latents = Latents.open({('hf://datasets/' + name)!r})", "latents.top(0)"
        ),
        "## What it is\n\n" + _table(rows),
    ]
    return "\n".join(parts)


_NOT_SCORED = "Not scored: `granary eval` does.\n"


def _front(tags: Sequence[str], model: str | None) -> str:
    """The head that the hub reads."""
    facts: dict[str, Any] = {"library_name": "granary", "tags": list(tags)}
    if model is not None:
        facts["base_model"] = model
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def _of_model(model: Any) -> str | None:
    """The id of a language model on the hub; None for a folder, and for one that nobody recorded."""
    name = model.get("id") if isinstance(model, dict) else None
    is_hub_id = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    return name if is_hub_id else None


def _place(name: str) -> str:
    """As `granary.load` takes it."""
    return name if name.count("/") < 2 else f"hf://{name}"


def _facts(config: DictionaryConfig, provenance: Mapping[str, Any]) -> Iterator[Row]:
    model = provenance.get("model") if isinstance(provenance.get("model"), dict) else {}
    yield "Kind", config.kind
    if config.sites is not None:
        yield "Reads", ", ".join(config.sites.reads)
        yield "Writes", ", ".join(config.sites.writes)
    yield (
        "Widths",
        " to ".join(dict.fromkeys(str(list(side))[1:-1] for side in (config.widths.reads, config.widths.writes))),
    )
    yield "Latents", f"{config.d_latent:,}"
    yield "Activation", config.activation + ("" if config.k is None else f", k {config.k}")
    yield "Normalisation", f"{config.normalisation}, held in the weights file"
    if model:
        revision = f" at {model['revision']}" if model.get("revision") else ""
        yield "Language model", f"{model.get('id')}{revision}, {model.get('dtype')}"
    if provenance.get("tokens"):
        yield "Trained on", f"{provenance['tokens']:,} tokens in {provenance.get('steps', 0):,} steps"
    if isinstance(versions := provenance.get("versions"), dict):
        yield "Made with", ", ".join(f"{name} {version}" for name, version in versions.items())


def _scores(scores: Evaluation) -> Iterator[Row]:
    """The headlines, each with its interval where it has one."""
    confidence: dict[str, Any] = dict(scores.reconstruction.confidence95)
    if scores.downstream is not None:
        confidence |= scores.downstream.confidence95
    for label, key in (
        ("FVU", "fvu"),
        ("L0", "l0"),
        ("Dead latents", "dead_fraction"),
        ("Cross-entropy, clean", "ce_clean"),
        ("Cross-entropy, spliced in", "ce_spliced"),
        ("Loss recovered", "loss_recovered"),
        ("KL", "kl"),
    ):
        value = getattr(scores, key)
        if value is not None:
            interval = confidence.get(key)
            between = f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
            yield label, f"{value:.4g}{between}"


def _measured(scores: Evaluation) -> str:
    corpus = scores.provenance.corpus or {}
    text = f" of {corpus['description']}" if corpus.get("description") else ""
    return (
        f"\nOn {scores.n_tokens:,} tokens{text} that it was not trained on; in brackets 95 % intervals over contexts.\n"
    )


def _settings(provenance: Mapping[str, Any]) -> str:
    """How it was trained, folded; what `granary train` was told."""
    told = provenance.get("config")
    if not isinstance(told, dict):
        return ""
    lines = "\n".join(f"{key}={json.dumps(value)}" for key, value in sorted(told.items()))
    return f"<details><summary>Training's configuration</summary>\n\n```\n{lines}\n```\n\n</details>\n"


def _table(rows: "Sequence[Row] | Iterator[Row]") -> str:
    body = "\n".join(f"| {_cell(label)} | {_cell(value)} |" for label, value in rows)
    return f"| | |\n|---|---|\n{body}\n"


def _cell(text: str) -> str:
    """Text of a cell: a name from a file must not end it, nor be taken for HTML."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return plain.replace("|", "\\|")


def _code(*lines: str) -> str:
    return "```python\n" + "\n".join(lines) + "\n```\n"
