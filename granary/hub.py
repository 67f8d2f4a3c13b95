"""Publish a dictionary, or what its latents do, on the Hugging Face hub: ``granary push runs/demo/sae owner/name``.

A card (README.md) says where it comes from and how good it is: from the files' own records, nothing is asked. One
commit holds all. ``granary.load("owner/name")`` reads a dictionary back, and ``hf://owner/name/folder`` one of several.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granary.card import dictionary_card, latents_card
from shared.basics.errors import GranaryError, told_of
from shared.basics.run_folder import RunFolder
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line

CARD = "README.md"
LEFT_OUT = ("notes.sqlite", "parts")
"""Of a latents folder: notes of yours and answers of a language model, and what only a stopped inspection needs."""


@dataclass(frozen=True)
class Upload:
    """What goes to the hub: a repository's kind, its card, and files by their path there."""

    repo_type: str
    card: str
    files: dict[str, Path]


def push_to_hub(
    folder: str | Path, repo_id: str, *, path_in_repo: str = "", private: bool = False, token: str | None = None
) -> str:
    """Publish the dictionary or the latents folder in `folder` as `repo_id`, ``owner/name``; return its address.

    The repository is made where there is none. With `path_in_repo` several dictionaries share one, each with its card
    in its own folder. Raises GranaryError for a folder that is neither, and where the hub refuses.
    """
    upload = what_to_upload(Path(folder), _joined(repo_id, path_in_repo))
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    inside = path_in_repo.strip("/")
    added = [CommitOperationAdd(_joined(inside, CARD), upload.card.encode())]
    added += [CommitOperationAdd(_joined(inside, name), str(file)) for name, file in upload.files.items()]
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, repo_type=upload.repo_type, exist_ok=True)
        message = f"Upload {Path(folder).name} with granary"
        api.create_commit(repo_id, added, commit_message=message, repo_type=upload.repo_type)
    except HFValidationError as error:
        raise GranaryError(f"{repo_id}: {told_of(error)}") from None
    except (HfHubHTTPError, OSError, RuntimeError) as error:  # the last of a transfer that broke
        raise GranaryError(f"the hub did not take {repo_id}: {told_of(error)}; hf auth login, or --token") from None
    return str(address)


def what_to_upload(folder: Path, name: str) -> Upload:
    """The files of a dictionary or of a latents folder and their card, under the hub's name `name`."""
    if RunFolder(folder).has_dictionary:
        return _dictionary(folder, name)
    if (folder / "meta.json").is_file():
        from shared.latents import Latents

        card = latents_card(Latents.open(folder).meta, name)
        found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
        files = {str(path.relative_to(folder)): path for path in found}
        kept = {inside: path for inside, path in files.items() if inside.partition("/")[0] not in LEFT_OUT}
        return Upload("dataset", card, kept)
    inside = RunFolder(folder).sae
    hint = f"; push {inside}" if RunFolder(inside).has_dictionary else ""
    raise GranaryError(f"{folder} is no folder of a dictionary, nor of what latents do{hint}")


def _dictionary(folder: Path, name: str) -> Upload:
    from shared.sae import load
    from shared.sae.folder import describe
    from stage_eval.results.evaluation import Evaluation

    here = RunFolder(folder)
    dictionary, description = load(folder), describe(folder)  # which checks every byte
    files = {path.name: path for path in (here.config, here.weights, here.metrics, here.curves) if path.is_file()}
    scores: Evaluation | None = None
    plots: list[str] = []
    if (scored := _scored_in(folder)) is not None:
        from shared.basics.documents import read_json

        scores = Evaluation.from_json(read_json(scored.evaluation))
        pictures = sorted(scored.plots.glob("*.png"))
        plots = [f"plots/{picture.name}" for picture in pictures]
        files |= {scored.evaluation.name: scored.evaluation, **dict(zip(plots, pictures, strict=True))}
    card = dictionary_card(dictionary.config, description.provenance, scores, plots, name)
    return Upload("model", card, files)


def _scored_in(folder: Path) -> RunFolder | None:
    """Where this dictionary's scores lie: beside it, or in the run's folder; those of other weights are not its own."""
    from shared.basics.documents import read_json
    from shared.sae.for_store import weights_sha256

    digest = weights_sha256(folder)
    for place in (RunFolder(folder), RunFolder(folder.parent)):
        if place.evaluation.is_file():
            scored: Any = read_json(place.evaluation)
            if scored.get("provenance", {}).get("sae", {}).get("sha256") == digest:
                return place
    return None


def _joined(*parts: str) -> str:
    """A path on the hub; empty parts are left out."""
    return "/".join(filter(None, parts))


def main(argv: Sequence[str] | None = None) -> None:
    """Push one folder and print its address; status 2 and one line for what can't be."""
    parser = argparse.ArgumentParser(prog=program("push"), description=__doc__, formatter_class=_Raw)
    parser.add_argument("folder", help="of a dictionary (runs/demo/sae) or of what latents do (runs/demo/latents)")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the repository, made where there is none")
    parser.add_argument("--in", dest="inside", default="", metavar="FOLDER", help="a folder in the repository")
    parser.add_argument("--private", action="store_true", help="where the repository is made")
    parser.add_argument("--token", help="of the hub; else that of hf auth login, or HF_TOKEN")
    parser.add_argument("--card", action="store_true", help="print the card; nothing is uploaded")
    arguments = parser.parse_args(argv)
    with ending_in_one_line(None):
        if arguments.card:
            name = _joined(arguments.repo_id, arguments.inside)
            print(what_to_upload(Path(arguments.folder), name).card, end="")  # noqa: T201
            return
        address = push_to_hub(
            arguments.folder,
            arguments.repo_id,
            path_in_repo=arguments.inside,
            private=arguments.private,
            token=arguments.token,
        )
        print(address)  # noqa: T201


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


if __name__ == "__main__":
    main()
