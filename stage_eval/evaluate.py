"""An evaluation from configuration to files: check, measure, write, show.

Every rank does its share of both passes; rank 0 writes and prints.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError
from shared.basics.files import write_bytes, write_text
from shared.basics.run_folder import RunFolder
from shared.lm import load_causal_lm
from shared.lm.hookpoint import HookPoint
from shared.parallel import barrier, init_world, shutdown
from shared.store import HookStatistics, Store
from stage_eval.config import EvalSchema
from stage_eval.measure.data import EvaluationData, default_unit, load_data
from stage_eval.measure.decoder import decoder_structure
from stage_eval.measure.downstream import DownstreamSums, downstream_metrics
from stage_eval.measure.passes import Loaded, Plan, conditions_for, downstream_pass, reconstruction_pass
from stage_eval.measure.reconstruction import per_latent_figures
from stage_eval.results import assemble, run_context, write_json
from stage_eval.show.compare import compare, render_comparison
from stage_eval.show.plots import evaluation_plots
from stage_eval.show.report import render
from stage_eval.show.sweep_plots import latent_plots, sweep_plots
from stage_eval.show.table import print_tables
from stage_eval.show.theme import Plot, to_png
from stage_eval.sources import Source, find_sources, model_path

log = logging.getLogger(__name__)


def evaluate(cfg: EvalSchema) -> None:
    """Run the stage; raises GranaryError for every wrong input before any long work."""
    world = init_world(cfg.device.name, cfg.device.threads)
    store = Store.open(cfg.store.url)
    sources = find_sources(cfg.sae.path, store, cfg.hook)
    check_settings(cfg, sources)
    where = model_path(cfg.model, store) if cfg.downstream else None
    data = load_data(store, cfg.split, cfg.contexts)
    statistics = {hook: store.statistics(str(hook)) for hook in {source.hook for source in sources}}
    if world.is_main:
        announce(cfg, sources, data, where)
    model = None
    if where is not None:
        path, revision, dtype = where
        model = load_causal_lm(
            path, dtype, device=world.device, revision=revision, attn_implementation=cfg.model.attn_implementation
        )
    plan = Plan(world, cfg.batch_contexts or default_unit(store.seq_len), cfg.splice_bos)
    shared = run_context(cfg, store, data, where[0] if where else None, world.size)
    reports: list[dict[str, Any]] = []
    per_latent: list[dict[str, Tensor]] = []
    joint = None
    for start in range(0, len(sources), cfg.sae.per_pass):
        group = sources[start : start + cfg.sae.per_pass]
        found, latents, joint = measure(cfg, group, model, store, data, statistics, plan, shared)
        reports += found
        per_latent += latents
    if world.is_main:
        write(cfg, sources, reports, per_latent, joint)
    barrier()
    shutdown()


def check_settings(cfg: EvalSchema, sources: Sequence[Source]) -> None:
    """Raise GranaryError for settings that contradict one another or the SAEs."""
    if cfg.sae.per_pass < 1:
        raise GranaryError(f"sae.per_pass={cfg.sae.per_pass}: it must be at least 1")
    if cfg.batch_contexts is not None and cfg.batch_contexts < 1:
        raise GranaryError(f"batch_contexts={cfg.batch_contexts}: it must be at least 1, or null")
    if not cfg.joint:
        return
    if not cfg.downstream:
        raise GranaryError("joint=true splices all SAEs into the model: it needs downstream=true")
    hooks = [source.hook for source in sources]
    if len(set(hooks)) < len(hooks) or len(hooks) < 2:
        raise GranaryError("joint=true needs SAEs of two or more hooks, one per hook")
    if len(sources) > cfg.sae.per_pass:
        raise GranaryError(f"joint=true needs all {len(sources)} SAEs in one pass: set sae.per_pass={len(sources)}")


def announce(
    cfg: EvalSchema, sources: Sequence[Source], data: EvaluationData, where: tuple[str, str | None, str] | None
) -> None:
    """Say what will be evaluated, and how much work it is."""
    hooks = list(dict.fromkeys(source.hook for source in sources))
    passes = 1 + 2 * len(hooks) + len(sources) + (3 if cfg.joint else 0)
    lines = {
        "SAEs": f"{len(sources)} on {', '.join(map(str, hooks))}",
        "tokens": f"{data.num_tokens:,} trainable in {len(data.contexts):,} {cfg.split.value} contexts",
        "store": cfg.store.url,
        "model": f"{where[0]} in {where[2]}, {passes} forward passes per context" if where else "not run",
    }
    for name, text in lines.items():
        log.info("%-9s %s", name, text)


def measure(
    cfg: EvalSchema,
    sources: Sequence[Source],
    model: PreTrainedModel | None,
    store: Store,
    data: EvaluationData,
    statistics: dict[HookPoint, HookStatistics],
    plan: Plan,
    shared: dict[str, Any],
) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]], dict[str, Any] | None]:
    """Evaluations and per-latent figures of SAEs that are in memory together; the joint splice's where asked for."""
    device = plan.world.device
    saes = [Loaded(source.name, source.hook, source.load(device)) for source in sources]
    reconstructions, described = reconstruction_pass(saes, store, data, statistics, plan)
    losses: DownstreamSums | None = None
    joint = None
    if model is not None:
        conditions = conditions_for(saes, statistics, device, joint=cfg.joint)
        losses = downstream_pass(model, conditions, data, plan)
        if cfg.joint:
            hooks = [str(source.hook) for source in sources]
            joint = {"hooks": hooks, **downstream_metrics(losses, "sae joint", "zero joint", "mean joint")}
    reports = []
    if plan.world.is_main:
        for source, loaded, sums in zip(sources, saes, reconstructions, strict=True):
            decoder = decoder_structure(loaded.sae.W_dec, loaded.sae.W_enc, cfg.seed)
            reports.append(
                assemble(source, sums, described[source.hook], losses, decoder, statistics[source.hook], data, shared)
            )
    return reports, [per_latent_figures(sums) for sums in reconstructions], joint


def write(
    cfg: EvalSchema,
    sources: Sequence[Source],
    reports: Sequence[dict[str, Any]],
    per_latent: Sequence[dict[str, Tensor]],
    joint: dict[str, Any] | None,
) -> None:
    """Write what was measured, show it, and say where it is."""
    out = Path(cfg.out_dir)
    files = RunFolder(out)
    several = len(sources) > 1
    for source, report, latents in zip(sources, reports, per_latent, strict=True):
        folder = report_folder(source, out) if several else out
        write_report(folder, report)
        write_bytes(RunFolder(folder).latent_figures, save(latents))
    print_tables(reports)
    if several:
        links = [relative_link(RunFolder(report_folder(source, out)).report, out) for source in sources]
        comparison = compare(reports, links, joint)
        write_json(files.comparison, comparison)
        write_text(files.comparison_page, render_comparison(comparison))
        write_plots(files.plots, [*sweep_plots(comparison["rows"]), *latent_plots(comparison["rows"])])
        log.info("figures   %s, and eval.json beside each SAE", files.comparison)
        log.info("report    %s", files.comparison_page)
        best = min(comparison["rows"], key=lambda row: row["fvu"])
        log.info('next      from shared.sae import SAE; sae = SAE.from_pretrained("%s")', best["path"])
    else:
        log.info("figures   %s", files.evaluation)
        log.info("plots     %s", files.plots)
        log.info("report    %s", files.report)
        log.info('next      from shared.sae import SAE; sae = SAE.from_pretrained("%s")', sources[0].path)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """eval.json, plots/ and report.html of one SAE."""
    files = RunFolder(folder)
    write_json(files.evaluation, report)
    write_plots(files.plots, evaluation_plots(report))
    write_text(files.report, render(report))


def write_plots(folder: Path, plots: Sequence[Plot]) -> None:
    """The plots as PNG."""
    for plot in plots:
        write_bytes(folder / f"{plot.name}.png", to_png(plot))


def report_folder(source: Source, out: Path) -> Path:
    """Beside the SAE; under `out` for one that came from a hub."""
    beside = Path(source.path)
    return beside if beside.is_dir() else out / source.path.replace("/", "--")


def relative_link(target: Path, base: Path) -> str:
    """Address of `target` from a page in `base`, with the characters that addresses can't hold quoted."""
    return quote(os.path.relpath(target, base).replace(os.sep, "/"))
