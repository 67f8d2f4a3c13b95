"""Explanations by a language model from the command line: ``granary explain RUN --endpoint URL --model NAME``."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shared.basics.errors import GranaryError
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line
from stage_inspect.find import latents_url

if TYPE_CHECKING:
    from shared.latents.folder import Latents
    from stage_inspect.explain.sides import Sides

EXPLAIN = """\
Ask a language model what each latent does, and test what it says on documents that it was not shown. Any
OpenAI-compatible endpoint: a model on this machine or a service. A key is read from an environment variable alone.
Answers are kept in the latents folder: the same command goes on where it was stopped, and pays for nothing twice.
"""
EXPLAINERS = ("default", "contrastive", "logits", "pictures")
SCORES = (
    "detection", "fuzzing", "fuzzing_active", "intruder", "simulation", "embedding", "surprisal", "intervention",
    "picture_detection",
)  # fmt: skip

TEXTS_SHOWN, PICTURES_SHOWN = 40, 8


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("explain"), description=EXPLAIN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, or a latents folder")
    add("--endpoint", metavar="URL", required=True, help="below which chat/completions is: http://localhost:8000/v1")
    add("--model", metavar="NAME", required=True, help="as the endpoint calls it")
    add("--latents", metavar="WHICH", help="0:128 or 3,7,9; default: all that ever fire")
    add("--explainer", choices=EXPLAINERS, default="default", help="what the model is shown (default)")
    add(
        "--of",
        metavar="METHOD",
        help="write none: score the explanations that are there of a method (rule, person ...)",
    )
    add("--scores", nargs="*", choices=SCORES, help="default: the first three; of pictures, the last")
    add("--train", type=int, metavar="N", help="examples that an explanation is made from (40; pictures: 8)")
    add(
        "--test",
        type=int,
        default=50,
        metavar="N",
        help="active examples that it is tested on, and as many silent (50)",
    )
    add("--store", metavar="URL", help="the store, where it has moved; it tells which parts are of one document")
    add("--seed", type=int, default=0, help="of which documents are for the test (0)")
    add("--embedding-model", metavar="NAME", help="for the score embedding")
    add("--steer", type=float, default=4.0, metavar="X", help="intervention: times the latent's largest value (4)")
    add("--dictionary", type=Path, metavar="FOLDER", help="intervention: the dictionary, where it has moved")
    add("--subject", metavar="MODEL", help="intervention: the model that was harvested, where it has moved")
    add("--no-logprobs", action="store_true", help="for an endpoint that refuses to be asked for log probabilities")
    add("--key-variable", metavar="NAME", default="GRANARY_API_KEY", help="environment variable with the key")
    add("--concurrency", type=int, default=8, metavar="N", help="requests side by side (8)")
    add("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for an answer (120)")
    add("--retries", type=int, default=5, metavar="N", help="tries after the first (5)")
    add("--max-tokens", type=int, metavar="N", help="tokens that this command may spend, read and written")
    add("--max-cost", type=float, metavar="X", help="money that it may spend, at these prices of a million tokens:")
    add("--price-in", type=float, default=0.0, metavar="X", help="of those the model reads")
    add("--price-out", type=float, default=0.0, metavar="X", help="of those it writes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run it; a wrong input is one line on stderr and status 2."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    with ending_in_one_line():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Explain and score; raises GranaryError for every wrong input before anything is asked."""
    from tqdm import tqdm

    from shared.basics.images import pillow
    from shared.latents.folder import Latents
    from stage_inspect.explain import language
    from stage_inspect.explain.endpoint.budget import Budget, Ceilings
    from stage_inspect.explain.endpoint.client import Asker, Endpoint
    from stage_inspect.explain.scores.scorer import Judge
    from stage_inspect.explain.steering import Steering
    from stage_inspect.export.facts import chosen_latents, words

    try:
        import httpx  # noqa: F401
    except ModuleNotFoundError:
        raise GranaryError("language models are asked by httpx: pip install 'granary-sae[explain]'") from None
    of_pictures = (arguments.of or arguments.explainer) == "pictures"
    if arguments.train is None:
        arguments.train = PICTURES_SHOWN if of_pictures else TEXTS_SHOWN
    if arguments.scores is None:
        arguments.scores = ["picture_detection"] if of_pictures else list(SCORES[:3])
    if arguments.train < 2 or arguments.test < 2:
        raise GranaryError("--train and --test are at least 2")
    if not 0 < arguments.steer < float("inf"):
        raise GranaryError("--steer is above 0")
    endpoint = Endpoint.of(
        arguments.endpoint, arguments.key_variable, arguments.concurrency, arguments.timeout, arguments.retries
    )
    budget = Budget(Ceilings(arguments.max_tokens, arguments.max_cost, arguments.price_in, arguments.price_out))
    latents = Latents.open(latents_url(arguments.run))
    if of_pictures or "picture_detection" in arguments.scores:
        pillow()
        if not latents.has_pictures:
            raise GranaryError(f"{latents.url} has no pictures: granary inspect a store with images, docs/vision.md")
    if not of_pictures or set(arguments.scores) - {"picture_detection"}:
        words(latents)
    numbers = [number for number in chosen_latents(arguments.latents, latents) if latents.table["fired"][number]]
    judge = Judge(endpoint.url, arguments.model, not arguments.no_logprobs, arguments.embedding_model)
    steering = None
    if "intervention" in arguments.scores:
        steering = Steering(latents, arguments.steer, arguments.seed, arguments.subject, arguments.dictionary)
    apart = sides(arguments, latents)
    plan = language.Plan(latents, numbers, judge, apart, arguments.train, arguments.test, steering)
    with language.alone(latents), Asker(endpoint, latents.notes, budget) as asker:
        if arguments.of is None:
            with tqdm(total=len(numbers), unit="latent", desc="explain") as bar:
                left_out = language.explain(plan, arguments.explainer, asker, bar.update)
            for number, why in list(left_out.items())[:5]:
                say(f"latent {number} has no explanation: {why}")
            if len(left_out) > 5:
                say(f"and {len(left_out) - 5:,} more have none")
        with tqdm(total=len(numbers), unit="latent", desc="score") as bar:
            author = None if arguments.of is not None else arguments.model
            method = arguments.of or arguments.explainer
            added = language.score(plan, method, author, arguments.scores, asker, bar.update)
    say(f"{added:,} scores added to {latents.url}: {budget.told()}, {budget.reused:,} answers were there")


def sides(arguments: argparse.Namespace, latents: "Latents") -> "Sides":
    """Which documents are for what. Raises GranaryError for a store that is named and is not the folder's."""
    from shared.store import Store
    from stage_inspect.explain.sides import Sides

    url = arguments.store or latents.meta.store["url"]
    try:
        store = Store.open(url)
        if store.plan.hash() != latents.meta.store.get("plan_hash"):
            raise GranaryError(f"{url} is not the store that {latents.url} was made of: give --store")
    except GranaryError as error:
        if arguments.store is not None:
            raise
        say(f"without the store, so no examples of the first document of a context: {error}")
        return Sides(None, arguments.seed)
    return Sides(store, arguments.seed)


def say(line: str) -> None:
    """One line for the reader."""
    print(line, flush=True)  # noqa: T201
