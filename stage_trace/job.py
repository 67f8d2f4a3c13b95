"""One graph from a configuration: find, check, plan, trace, prune, certify, save, and say what came of it."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from shared.basics.config import ModelInput
from shared.basics.errors import GranaryError
from shared.basics.memory import return_freed_blocks
from shared.basics.units import human_bytes
from shared.lm import load_causal_lm, load_config, load_tokenizer, model_identity
from shared.lm.hookpoint import HookPoint
from shared.lm.recorded import ModelChoice
from shared.parallel import init_world
from shared.store.same_model import check_same_model
from stage_trace.attribution import AttributionGraph
from stage_trace.certificate import Certificate
from stage_trace.config import TraceSchema
from stage_trace.intervene import Mode
from stage_trace.nodes import Kind
from stage_trace.plan import ModelShape, plan
from stage_trace.prompt import encode
from stage_trace.session import Source
from stage_trace.sources import find_sources, need_any
from stage_trace.spliced import Spliced
from stage_trace.trace import TraceSettings, trace_sources

log = logging.getLogger(__name__)


def trace_text(cfg: TraceSchema) -> None:
    """Trace ``cfg.text`` and write the files; with ``dry_run``, only say what memory that needs."""
    _check(cfg)
    return_freed_blocks()  # the plan counts what is held, not what a heap keeps
    device = init_world(cfg.device.name, cfg.device.threads).device
    given = cfg.dictionaries if isinstance(cfg.dictionaries, list) else [cfg.dictionaries]
    sources = find_sources(list(map(str, given)), device)
    need_any(sources)
    chosen = _model(cfg.model, sources)
    if not cfg.model.allow_other:
        identity = model_identity(chosen.path, chosen.revision, chosen.dtype)
        for source in sources:
            check_same_model(source.name, {**source.model}, "the graph", {**identity})
    tokenizer = load_tokenizer(chosen.path, chosen.revision)
    ids, _ = encode(cfg.text, tokenizer)
    configs = [source.config for source in sources if source.config is not None]
    shape = ModelShape.of(load_config(chosen.path, chosen.revision))
    for line in plan(shape, configs, len(ids), chosen.dtype, cfg).lines():
        log.info("%s", line)
    if cfg.dry_run:
        return
    model = load_causal_lm(chosen.path, chosen.dtype, device=device, revision=chosen.revision)
    settings = TraceSettings(
        logit_mass=cfg.logits.mass,
        max_logits=cfg.logits.most,
        max_features=cfg.max_features,
        batch=cfg.batch,
        engine=cfg.engine.value,
        fixed=cfg.fixed,
    )
    graph = trace_sources(model, sources, cfg.text, tokenizer, settings)
    for line in summary(graph, sources):
        log.info("%s", line)
    spliced = graph.spliced()
    log.info("%s", _replaced(spliced, tokenizer))
    certificate = graph.certify(cfg.ablations, cfg.ranked) if cfg.ablations else None
    if certificate is not None:
        for line in _certified(certificate):
            log.info("%s", line)
    latents = [cfg.latents] if isinstance(cfg.latents, str) else cfg.latents
    pruned = graph.prune(cfg.prune.nodes, cfg.prune.edges)
    shown = sum(node.kind is Kind.feature for node in pruned.nodes)
    log.info("shown        %d features, %d nodes, %d edges", shown, len(pruned.nodes), len(pruned.edges))
    written = pruned.save(Path(cfg.out_dir), certificate=certificate, spliced=spliced, latents=latents)
    page = written[-1]
    log.info("open %s (%s)", page, human_bytes(page.stat().st_size))


def summary(graph: AttributionGraph, sources: list[Source]) -> list[str]:
    """What the graph is of, whether it adds up, and its scores."""
    strict, theirs = graph.scores["strict"], graph.scores["circuit-tracer"]
    taken = {place.own for source in sources for place in source.places}
    missing = [layer for layer in range(graph.columns.num_layers) if HookPoint(layer, "mlp_out") not in taken]
    attended = sorted(output.layer for output in taken if output.site == "attn_out")
    said = ", ".join(f"{node.text!r} {node.probability:.1%}" for node in graph.logits[:4])
    lines = [
        f"says         {said}",
        f"graph        {graph.columns.num_features:,} features, {len(graph.rows_RS):,} rows, every one adds up to"
        f" {graph.worst_gap:.0e}",
        f"replacement  {strict.replacement:.3f} strict, {theirs.replacement:.3f} by circuit-tracer's rule",
        f"completeness {strict.completeness:.3f} strict, {theirs.completeness:.3f} by circuit-tracer's rule",
    ]
    if attended:
        lines.insert(0, f"a lorsa stands in for the attention of layers {', '.join(map(str, attended))}")
    if missing:
        lines.insert(0, f"no transcoder stands in for layers {', '.join(map(str, missing))}: their MLPs are all error")
    return lines


def _replaced(spliced: Spliced, tokenizer: PreTrainedTokenizerBase) -> str:
    said = str(tokenizer.decode([spliced.said]))
    losses = "" if spliced.loss is None else f", loss {spliced.loss:.2f} for {spliced.loss_of_model:.2f} nats"
    return (
        f"spliced      with all dictionaries in their places says {said!r} {spliced.probability:.1%},"
        f" KL {spliced.kl_last:.2f} nats; over the prompt KL {spliced.kl:.2f}, the same token at {spliced.agreeing}"
        f" of {spliced.positions}{losses}"
    )


def _certified(certificate: Certificate) -> list[str]:
    found = [certificate.rank_correlation(mode) for mode in (Mode.frozen, Mode.norms, Mode.open)]
    if None in found:
        return ["certificate  too few features to rank"]
    held, norms, free = found
    influence = certificate.influence_correlation()
    lines = [
        f"certificate  {len(certificate.ablations)} features ablated: rank correlation of predicted and actual change"
        f" {held:.2f} with attention and norms held, {norms:.2f} with norms held, {free:.2f} all free"
    ]
    if influence is not None:
        lines.append(
            f"influence    {len(certificate.divergences)} features ablated, all free: rank correlation of influence and"
            f" KL {influence:.2f}"
        )
    return lines


def _check(cfg: TraceSchema) -> None:
    if not cfg.text.strip():
        raise GranaryError('give text="...", the prompt that the graph is of')
    for name, value, least in (
        ("logits.most", cfg.logits.most, 1),
        ("max_features", cfg.max_features, 1),
        ("batch", cfg.batch, 1),
        ("ablations", cfg.ablations, 0),
        ("ranked", cfg.ranked, 0),
    ):
        if value < least:
            raise GranaryError(f"{name}={value}: must be at least {least}")
    for name, share in (
        ("logits.mass", cfg.logits.mass),
        ("prune.nodes", cfg.prune.nodes),
        ("prune.edges", cfg.prune.edges),
    ):
        if not (math.isfinite(share) and 0 <= share <= 1):
            raise GranaryError(f"{name}={share}: a share lies between 0 and 1")


def _model(cfg: ModelInput, sources: list[Source]) -> ModelChoice:
    """What is configured, else what the first dictionary records."""
    recorded: Mapping[str, Any] = next((source.model for source in sources if source.model.get("id")), {})
    path, revision = cfg.path, cfg.revision
    if path is None:
        if not recorded:
            raise GranaryError("the dictionaries do not record their model: give model=PATH")
        path, revision = str(recorded["id"]), revision or recorded.get("revision")
    return ModelChoice(path, revision, recorded.get("dtype", "float32") if cfg.dtype is None else cfg.dtype.value)
