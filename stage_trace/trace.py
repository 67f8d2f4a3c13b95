"""From a model, its transcoders and a prompt to a graph."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.basics.errors import GranaryError
from shared.lm import load_causal_lm, load_tokenizer
from shared.sae.variants import Dictionary
from stage_trace.attribution import AttributionGraph
from stage_trace.autograd import by_autograd
from stage_trace.graph import Prompt, make_nodes, with_influence
from stage_trace.nodes import Kind, Node
from stage_trace.prompt import encode, fixed_positions
from stage_trace.rows import build_matrix, wiring
from stage_trace.session import Session, Source, record
from stage_trace.sources import find_sources, need_any, of_dictionary
from stage_trace.sweep import sweep
from stage_trace.targets import Features, Logits, Targets, logit_targets

log = logging.getLogger(__name__)

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""How far a row's sum may be from what it explains, by the precision of the model; see ``rows.gap``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """What a graph is made of, beside model, dictionaries and prompt."""

    logit_mass: float = 0.95
    """Explain the fewest next tokens that are this likely together."""
    max_logits: int = 10
    max_features: int = 4096
    """Features with a row and a node of their own; what others give is counted as error."""
    batch: int = 128
    """Rows of one sweep."""
    engine: Literal["sweep", "autograd"] = "sweep"
    """autograd is the slow reference."""
    fixed: int | None = None
    """Leave out this many positions at the start; None: special tokens, and without BOS the first."""
    targets: tuple[int, ...] | None = None
    """Explain the logits of these tokens instead."""


def trace(
    model: PreTrainedModel | str,
    dictionaries: Sequence[Dictionary | str | Path] | str | Path,
    text: str | Sequence[int],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: TraceSettings | None = None,
) -> AttributionGraph:
    """The attribution graph of what `model` says after `text`.

    model         a transformers model, or what ``load_causal_lm`` takes: a folder, a hub id, ``bundled``
    dictionaries  transcoders of its MLPs and Lorsas of its attention, at most one of each per layer: loaded ones,
                  folders, or globs of folders
    text          the prompt, or its token ids; BOS is put before a text

    Raises GranaryError for a model or dictionaries that graphs do not know, and where a row does not add up.
    """
    settings = settings or TraceSettings()
    if isinstance(model, str):
        tokenizer = tokenizer or load_tokenizer(model)
        model = load_causal_lm(model)
    tokenizer = tokenizer or load_tokenizer(str(model.name_or_path))
    given = [dictionaries] if isinstance(dictionaries, str | Path) else list(dictionaries)
    sources: list[Source] = []
    for one in given:
        sources += [of_dictionary(one)] if isinstance(one, Dictionary) else find_sources([one], model.device)
    need_any(sources)
    return trace_sources(model, sources, text, tokenizer, settings)


def trace_sources(
    model: PreTrainedModel,
    sources: Sequence[Source],
    text: str | Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: TraceSettings,
) -> AttributionGraph:
    """The same of dictionaries that were found and checked."""
    ids, said = encode(text, tokenizer)
    tokens_T = torch.tensor(ids, device=model.device)
    fixed_T = fixed_positions(ids, tokenizer, settings.fixed).to(model.device)
    session = record(model, sources, tokens_T, fixed_T)
    pieces = tuple(str(tokenizer.decode([one])) for one in ids)
    names = tuple(source.name for source in sources)
    prompt = Prompt(said, tuple(ids), pieces, tuple(torch.nonzero(fixed_T).flatten().tolist()))
    return of_session(session, prompt, tokenizer, settings, names)


def of_session(
    session: Session,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    settings: TraceSettings,
    names: tuple[str, ...],
) -> AttributionGraph:
    """The graph of a recorded prompt."""
    logits = Logits.choose(session.recording.logits_V, settings.logit_mass, settings.max_logits, settings.targets)
    features = Features.of(session.replacement)
    matrix = build_matrix(
        partial(_engine, session, settings.engine),
        features,
        logit_targets(logits, session.parts, session.recording, len(session.columns.outputs)),
        logits.probabilities,
        session.columns,
        most=settings.max_features,
        batch=settings.batch,
    )
    tolerance = TOLERANCES[session.model.dtype]
    if not matrix.worst_gap <= tolerance:
        raise GranaryError(
            f"a row of the graph misses what it explains by {matrix.worst_gap:.1e} (allowed: {tolerance:.0e}): "
            "something that the model computes is not in the graph; try model.dtype=float32, and report this"
        )
    kept = session.replacement.num_latents - len(matrix.chosen)
    if kept:
        log.info("%d of %d features have no node: what they give is counted as error", kept, len(features))
    wires = wiring(
        features.output_N.cpu()[matrix.chosen], torch.arange(len(matrix.chosen)), logits.probabilities, matrix.columns
    )
    depth, T = matrix.columns.num_layers, len(prompt.ids)
    said = [
        Node(Kind.logit, depth + 1, T - 1, token, None, probability, str(tokenizer.decode([token])), number == 0)
        for number, (token, probability) in enumerate(
            zip(logits.tokens.tolist(), logits.probabilities.tolist(), strict=True)
        )
    ]
    nodes = make_nodes(session, matrix.chosen, matrix.columns, prompt.pieces)
    sources = with_influence(nodes, matrix.rows_RS, wires)
    return AttributionGraph(
        prompt,
        matrix.rows_RS,
        wires,
        matrix.columns,
        sources,
        tuple(said),
        matrix.worst_gap,
        session,
        lambda ids: str(tokenizer.decode(ids)),
        names=names,
    )


def _engine(session: Session, engine: str, targets: Targets) -> Tensor:
    arguments = (session.recording, session.replacement, session.columns, targets)
    if engine == "autograd":
        return by_autograd(session.model, session.parts, session.tokens_T, *arguments).rows_BS
    return sweep(session.parts, *arguments).rows_BS
