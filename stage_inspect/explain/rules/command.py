"""Find a rule for each latent and score it: ``granary explain runs/demo``."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.basics.config import Split
from shared.basics.errors import GranaryError
from shared.basics.files import write_text
from shared.launch.commands import line, program
from shared.launch.outcome import ending_in_one_line
from shared.launch.terminal import ShownConsole
from stage_inspect.find import latents_url

if TYPE_CHECKING:
    from shared.latents.notes import Made
    from stage_inspect.concepts.search import Inspected
    from stage_inspect.explain.rules.corpus import Corpus

AUTHOR = "granary"
SCORER = "rule_f1"
EXPLAIN = """\
A rule for each latent: a predicate on tokens that says when it fires, such as "token is ' self'; after '('". The rule
of the best F1 is found on one half of the documents; F1, precision and recall, with 95 % intervals over documents, are
those on the other half, at the true base rate. Exact, the same every time, and no language model is asked. Rules and
scores are kept in the notes, in the place of the rules that were there; what people wrote stays. With
--endpoint URL --model NAME a language model explains instead: granary explain --endpoint=URL --help tells how.
"""


def main(argv: list[str] | None = None) -> None:
    """Find rules; a wrong input is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog=program("explain"), description=EXPLAIN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a latents folder")
    parser.add_argument("--latents", metavar="WHICH", help="0:128 or 3,7,9; default: all")
    parser.add_argument("--tokens", type=int, default=500_000, help="about so many tokens are read (500000)")
    parser.add_argument("--split", choices=[split.value for split in Split], default="all", help="of the store")
    parser.add_argument(
        "--python", choices=("auto", "yes", "no"), default="auto", help="whether rules may name parts of Python source"
    )
    parser.add_argument("--sae", metavar="FOLDER", help="the dictionary, where it has moved")
    parser.add_argument("--store", metavar="URL", help="the store, where it has moved")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rules here")
    arguments = parser.parse_args(argv)
    with ending_in_one_line():
        explain(arguments)


def explain(arguments: argparse.Namespace) -> None:
    """Read, search, score, keep and say; raises GranaryError for every wrong input before the pass."""
    from tqdm import tqdm

    from shared.latents.folder import Latents
    from shared.latents.notes import RULE
    from shared.store.choose import choose_contexts
    from stage_inspect.concepts.search import Inspected
    from stage_inspect.explain.rules.corpus import choose_runs, most_tokens, read
    from stage_inspect.export.facts import chosen_latents

    if arguments.tokens < 1:
        raise GranaryError(f"--tokens {arguments.tokens}: at least 1")
    latents = Latents.open(latents_url(arguments.run))
    if not latents.notes.writable:
        raise GranaryError("notes at a URL can't be changed: copy the latents folder to this machine first")
    chosen = chosen_latents(arguments.latents, latents)
    inspected = Inspected.open(latents, arguments.sae, arguments.store)
    store = inspected.store
    contexts = choose_contexts(store, Split(arguments.split), None)
    runs = choose_runs(contexts, store.seq_len, min(arguments.tokens, most_tokens(inspected)))
    python = {"auto": None, "yes": True, "no": False}[arguments.python]
    with tqdm(total=sum(map(len, runs)) * store.seq_len, unit="tok", unit_scale=True, desc="read") as bar:
        corpus = read(inspected, runs, python=python, tell=bar.update)
    with tqdm(total=len(chosen), unit="latent", desc="rules") as bar:
        made = rules(inspected, corpus, chosen, bar.update)
    written = latents.notes.replace_explanations(RULE, AUTHOR, chosen, made)
    if arguments.json is not None:
        rows = [{"latent": one.latent, "text": one.text, **one.details, "scores": one.scores} for one in made]
        write_text(arguments.json, json.dumps(rows, indent=1) + "\n")
    say(corpus, made, written, arguments.run)


def rules(inspected: "Inspected", corpus: "Corpus", chosen: list[int], tell: Any) -> "list[Made]":
    """The rule of each of these latents that fires often enough to have one, with its score."""
    from shared.latents.notes import Made
    from stage_inspect.explain.rules.score import Scoring
    from stage_inspect.explain.rules.search import Search

    vocabulary = inspected.vocabulary
    search = Search(corpus.train, corpus.labels, vocabulary)
    scoring = Scoring(corpus.heldout, len(vocabulary))
    found = []
    for latent in chosen:
        one = search.find(latent)
        if one is not None:
            found.append((latent, one))
        tell(1)
    made = []
    for number, (latent, one) in enumerate(found):
        said_N = scoring.said(one.rule)
        measured, other = scoring.measure(said_N, latent), found[number - 1][1].rule
        fired = len(corpus.heldout.firing(latent)[0])
        details: dict[str, Any] = {
            "fires": "above 0", "fired": fired, "said": int(said_N.sum()), "tokens": corpus.heldout.num_tokens,
            "documents": len(corpus.heldout.heads), "base_rate": fired / corpus.heldout.num_tokens, "train_f1": one.f1,
        }  # fmt: skip
        if measured is None:
            details["why"] = "it fires on no token of the documents that rules are scored on"
            score: tuple[Any, ...] = (SCORER, None, None, None, details)
        else:
            controls = {"shuffled": scoring.measure(scoring.said(other), latent), "empty": scoring.any_token(latent)}
            details |= {"precision": measured.precision, "recall": measured.recall}
            details["controls"] = {name: control.record() for name, control in controls.items() if control is not None}
            details["failed"] = scoring.failures(said_N, latent)
            score = (SCORER, measured.value, measured.low, measured.high, details)
        rule = {"rule": one.rule.record(), "train_tokens": corpus.train.num_tokens,
                "train_documents": len(corpus.train.heads)}  # fmt: skip
        made.append(Made(latent, one.rule.text(vocabulary), rule, (score,)))
    return made


def say(corpus: "Corpus", made: "list[Made]", written: int, run: str) -> None:
    """How well the rules hold, those that hold best, and what to do with them."""
    from rich.markup import escape
    from rich.table import Table

    values = sorted(
        ((one.scores[0][1], one) for one in made if one.scores[0][1] is not None), key=lambda pair: -pair[0]
    )
    halves = f"found on {len(corpus.train.heads):,} documents, scored on {len(corpus.heldout.heads):,} others"
    table = Table(title=f"Rules of {len(made):,} latents, {halves}", title_justify="left")
    for name in ("latent", "F1", "95 %", "prec.", "recall"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("rule", max_width=70)
    for value, one in values[:10]:
        _, _, low, high, told = one.scores[0]
        between = "" if low is None or high is None else f"{low:.2f}-{high:.2f}"
        table.add_row(str(one.latent), f"{value:.3f}", between, f"{told['precision']:.3f}", f"{told['recall']:.3f}",
                      escape(one.text))  # fmt: skip
    console = ShownConsole(soft_wrap=True)
    console.print(table)
    above = {bar: sum(value >= bar for value, _ in values) for bar in (0.5, 0.8)}
    shares = ", ".join(f"{count:,} at {bar} or more" for bar, count in above.items())
    console.print(f"F1 on other documents: {shares}; {written:,} written to the notes", markup=False)
    console.print(f"next      {line('explore', run)}", markup=False)
