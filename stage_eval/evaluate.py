"""An evaluation from configuration to files: check, measure, write, show.

Every rank does its share of both passes; rank 0 writes and prints.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from torch import Tensor
from transformers import PreTrainedModel

from shared.basics.config import named_urls
from shared.basics.errors import GranaryError
from shared.basics.pages_link import link_pages
from shared.basics.run_folder import RunFolder
from shared.lm import load_causal_lm
from shared.lm.next_token import VocabularyHead, check_head
from shared.lm.recorded import ModelChoice, choose_model, without_next_token
from shared.parallel import barrier, init_world, shutdown
from shared.store import Store
from shared.store.beside import open_beside
from stage_eval.assemble import Measured, RunFacts, assemble
from stage_eval.config import EvalSchema
from stage_eval.measure.data import default_unit, load_data
from stage_eval.measure.decoder import decoder_figures
from stage_eval.measure.downstream import check_splices, joint_figures
from stage_eval.measure.passes import conditions_for, downstream_pass, reconstruction_pass
from stage_eval.measure.reconstruction import per_latent_figures
from stage_eval.measure.session import Loaded, PassSettings, Session
from stage_eval.output import (
    COMPARISON,
    EVALUATION,
    Staged,
    common_folder,
    result_folders,
    stage_comparison,
    stage_evaluation,
)
from stage_eval.results.comparison import Comparison, compare, least_fvu
from stage_eval.results.evaluation import Evaluation
from stage_eval.results.figures import DecoderFigures, JointDownstream
from stage_eval.results.supervised import SupervisedFigures
from stage_eval.sae_folders import Found, SAEFolder, find_saes
from stage_eval.show.table import print_tables
from stage_eval.supervised.labelled import Labelled

log = logging.getLogger(__name__)


@dataclass
class Results:
    """What the passes have found so far, one entry per SAE; empty but on rank 0."""

    evaluations: list[Evaluation]
    per_latent: list[dict[str, Tensor]]
    joint: JointDownstream | None = None


def evaluate(cfg: EvalSchema) -> None:
    """Run the stage; raises GranaryError for every wrong input before any long work."""
    world = init_world(cfg.device.name, cfg.device.threads)
    store = open_beside(cfg.store.url, named_urls(cfg.store.beside))
    cfg = without_language_model(cfg, store)
    found = find_saes(cfg.sae, store, cfg.hook)
    check_settings(cfg, found.folders)
    choice = choose_model(cfg.model, store) if cfg.downstream else None
    session = Session(
        world=world,
        store=store,
        data=load_data(store, cfg.split, cfg.contexts, cfg.kinds),
        statistics={site: store.statistics(site) for folder in found.folders for site in folder.sites.names},
        settings=PassSettings(
            unit_contexts=cfg.batch_contexts or default_unit(store.seq_len),
            splice_bos=cfg.splice_bos,
            joint=cfg.joint,
        ),
    )
    labelled = Labelled.draw(cfg, session) if cfg.supervised else None
    if world.is_main:
        announce(cfg, found, session, choice, labelled)
    model = None if choice is None else load_model(cfg, choice, session)
    facts = RunFacts.of(cfg, session, choice.path if choice else None)
    results = Results([], [])
    for start in range(0, len(found.folders), cfg.sae.per_pass):
        measure(found.folders[start : start + cfg.sae.per_pass], session, model, facts, cfg.seed, results, labelled)
    if world.is_main:
        write(cfg, found, results)
    barrier()
    shutdown()


def without_language_model(cfg: EvalSchema, store: Store) -> EvalSchema:
    """`cfg` as it is for this store: of a model that is no decoder there is no cross-entropy to be looked at."""
    model = without_next_token(store)
    if model is None or not cfg.downstream:
        return cfg
    log.info("%-9s no loss with the reconstruction spliced in: the store is of %s", "note", model)
    return replace(cfg, downstream=False)


def check_settings(cfg: EvalSchema, folders: Sequence[SAEFolder]) -> None:
    """Raise GranaryError for settings that contradict one another or the SAEs."""
    if cfg.sae.per_pass < 1:
        raise GranaryError(f"sae.per_pass={cfg.sae.per_pass}: it must be at least 1")
    if cfg.batch_contexts is not None and cfg.batch_contexts < 1:
        raise GranaryError(f"batch_contexts={cfg.batch_contexts}: it must be at least 1, or null")
    whole = [folder.path for folder in folders if folder.sites.unit != "token"]
    if cfg.supervised and whole:
        raise GranaryError(f"supervised=true draws single tokens, and {whole[0]} reads whole sequences")
    if not cfg.joint:
        return
    if not cfg.downstream:
        raise GranaryError("joint=true splices all SAEs into the model: it needs downstream=true")
    written = [site for folder in folders for site in folder.sites.writes]
    if len(set(written)) < len(written) or len(folders) < 2:
        raise GranaryError("joint=true needs SAEs of two or more hooks, one per hook")
    if len(folders) > cfg.sae.per_pass:
        raise GranaryError(f"joint=true needs all {len(folders)} SAEs in one pass: set sae.per_pass={len(folders)}")


def announce(
    cfg: EvalSchema, found: Found, session: Session, choice: ModelChoice | None, labelled: Labelled | None
) -> None:
    """Say what will be evaluated, how much work it is, and what is left out."""
    folders, data = found.folders, session.data
    places = list(dict.fromkeys(str(folder.sites) for folder in folders))
    written = {folder.sites.writes for folder in folders}
    passes = 1 + 2 * len(written) + len(folders) + (3 if cfg.joint else 0)
    lines = {
        "SAEs": f"{len(folders)} on {', '.join(places)}",
        "tokens": f"{data.num_tokens:,} trainable in {len(data.contexts):,} {cfg.split.value} contexts",
        "store": cfg.store.url,
        "model": f"{choice.path} in {choice.dtype}, {passes} forward passes per context" if choice else "not run",
    }
    if labelled is not None:
        sample = labelled.sample
        lines["labels"] = f"{len(sample.tasks)} tasks on {len(sample):,} tokens of {sum(sample.documents):,} documents"
    for name, text in lines.items():
        log.info("%-9s %s", name, text)
    for left in found.left_out:
        log.warning("%-9s %s", "left out", left.reason)


def load_model(cfg: EvalSchema, choice: ModelChoice, session: Session) -> PreTrainedModel:
    """The language model on this rank's device; raises GranaryError for one whose loss can't be computed here."""
    model = load_causal_lm(
        choice.path,
        choice.dtype,
        device=session.world.device,
        revision=choice.revision,
        attn_implementation=cfg.model.attn_implementation,
    )
    check_head(model, VocabularyHead(model))
    return model


def measure(
    folders: Sequence[SAEFolder],
    session: Session,
    model: PreTrainedModel | None,
    facts: RunFacts,
    seed: int,
    results: Results,
    labelled: Labelled | None = None,
) -> None:
    """Evaluate SAEs that are in memory together, and add what is found to `results`."""
    loaded = [folder.loaded(session.world.device) for folder in folders]
    conditions = conditions_for(loaded, session) if model is not None else []
    depths = check_splices(model, conditions) if model is not None else set()
    sums, described, diffs = reconstruction_pass(loaded, session)
    losses = downstream_pass(model, conditions, session, depths) if model is not None else None
    supervised = [] if labelled is None else labelled.figures(loaded, session)
    if not session.world.is_main:
        return
    of_labels: Sequence[SupervisedFigures | None] = supervised or [None] * len(loaded)
    for folder, one, summed, diff, figures in zip(folders, loaded, sums, diffs, of_labels, strict=True):
        measured = Measured(folder, summed, described, losses, decoder_of(one, seed), diff, figures)
        results.evaluations.append(assemble(measured, session, facts))
        results.per_latent.append(per_latent_figures(summed) | ({} if diff is None else diff.per_latent()))
    if losses is not None and session.settings.joint:
        results.joint = joint_figures(losses, [str(folder.sites) for folder in folders])


def decoder_of(one: Loaded, seed: int) -> DecoderFigures | None:
    """Figures of the decoder's rows; None for a dictionary whose decoder is no such matrix."""
    rows = one.dictionary.latent_rows("decoder")
    encoder = one.dictionary.latent_rows("encoder") if one.sites.is_autoencoder else None
    return None if rows is None else decoder_figures(rows, encoder, seed)


def write(cfg: EvalSchema, found: Found, results: Results) -> None:
    """Write what was measured, all of it or nothing, show it, and say where it is."""
    out, places = common_folder(cfg), result_folders(cfg, found.folders)
    several = len(found.folders) > 1
    with ExitStack() as stack:
        all_staged = []
        for place, evaluation, latents in zip(places, results.evaluations, results.per_latent, strict=True):
            staged = stack.enter_context(Staged(place, EVALUATION))
            stage_evaluation(staged, evaluation, latents, drawn=cfg.report)
            all_staged.append(staged)
        if several:
            links = [relative_link(place / "report.html", out) if cfg.report else None for place in places]
            comparison = compare(results.evaluations, links, results.joint, found.left_out)
            staged = stack.enter_context(Staged(out, COMPARISON))
            stage_comparison(staged, comparison, drawn=cfg.report)
            all_staged.append(staged)
        for staged in all_staged:
            staged.move_in()
            link_pages(RunFolder(staged.place).report)
            link_pages(RunFolder(staged.place).comparison_page)
    print_tables(results.evaluations, results.joint)
    if several:
        say_where_comparison(out, comparison)
    else:
        say_where(places[0], found.folders[0].path)


def say_where(place: Path, sae: str) -> None:
    """Name the files of one evaluation, and what to do with its SAE."""
    results = RunFolder(place)
    log.info("figures   %s", results.evaluation)
    if results.report.exists():
        log.info("plots     %s", results.plots)
        log.info("report    %s", results.report)
    log.info("next      from granary import load; sae = load(%r)", sae)


def say_where_comparison(out: Path, comparison: Comparison) -> None:
    """Name the files of a comparison, and what to do with the SAE of least FVU at the first of its sites."""
    log.info("figures   %s, and eval.json beside each SAE", out / "comparison.json")
    if RunFolder(out).comparison_page.exists():
        log.info("report    %s", RunFolder(out).comparison_page)
    best = least_fvu(next(iter(comparison.by_site.values())))
    log.info("next      from granary import load; sae = load(%r)", best.path)


def relative_link(target: Path, base: Path) -> str:
    """Address of `target` from a page in `base`, with the characters that addresses can't hold quoted."""
    return quote(os.path.relpath(target, base).replace(os.sep, "/"))
