"""The commands of this project, and how to write one so that it can be pasted: in the form that was used here.

Each can be started as ``granary eval ...`` and as ``python -m stage_eval ...``. What a stage suggests as the next
command takes the form in which it was started itself; its child processes inherit that.
"""

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

# How `granary` was started: "granary" or "python -m granary". Not there where a module was started by itself.
PROGRAM = "GRANARY_PROGRAM"


@dataclass(frozen=True)
class Command:
    """A subcommand of ``granary``: the module that does the work, and the arguments that come before the user's."""

    module: str
    summary: str
    before: tuple[str, ...] = ()


COMMANDS = {
    "harvest": Command("stage_harvest", "run a LLaMA over a corpus and write its activations to a store"),
    "train": Command("stage_train", "train a sparse autoencoder, or a transcoder, from a store"),
    "eval": Command("stage_eval", "score trained ones: FVU, L0, loss recovered, plots, report"),
    "inspect": Command("stage_inspect", "what each latent does: examples, tokens, logits, neighbours; find, export"),
    "explain": Command("stage_inspect.explain", "say what latents do, by rules or a language model, each with scores"),
    "explore": Command("stage_inspect.explorer", "pages that show what each latent does, served here or as files"),
    "trace": Command("stage_trace", "which latents made a model say what it says: an attribution graph of a text"),
    "sweep": Command("granary.sweep", "train a grid from one store (sae.k=8,16 ...), then compare it"),
    "transcoders": Command("granary.transcoders", "a transcoder per layer from one pass, scored alone and together"),
    "plan": Command("stage_train.plan", "memory per rank, reading and time of a training run, before it starts"),
    "packed": Command("stage_train.packed", "train the SAEs that a file lists from one pass over a store"),
    "export": Command("stage_train.export", "the SAE of a run's newest checkpoint"),
    "store": Command("shared.store", "look at, check or clean a store: info, ls, verify, drop-incomplete"),
    "push": Command("granary.hub", "publish a dictionary, or what its latents do, on the Hugging Face hub"),
    "convert": Command("shared.sae", "read and write folders of other projects; find a threshold", ("convert",)),
}


def program(name: str) -> str:
    """How this process's user writes the subcommand `name`: ``granary eval``, or ``python -m stage_eval``."""
    started_as = os.environ.get(PROGRAM)
    if started_as:
        return f"{started_as} {name}"
    command = COMMANDS[name]
    return " ".join(["python", "-m", command.module, *command.before])


def line(name: str, *arguments: str) -> str:
    """A command that a shell takes as it is: the subcommand `name` with `arguments`, each quoted where it must be."""
    return " ".join([program(name), *map(shlex.quote, arguments)])


def override(key: str, value: str) -> str:
    """``key=value`` in Hydra's grammar for a value that is text, whatever it holds; the shell is not thought of."""
    return f"{key}={value if _is_plain(value) else _hydra_quoted(value)}"


def started_by(argv0: str) -> str:
    """The program's own name, from ``sys.argv[0]``: that of ``python -m granary`` is the path of a file."""
    return "python -m granary" if Path(argv0).name == "__main__.py" else "granary"


def _is_plain(value: str) -> bool:
    """Whether Hydra reads `value` as this text without quotes: not as a number, a null, a list or two values."""
    if not re.fullmatch(r"[\w./:-]+", value, re.ASCII) or value.lower() in ("null", "true", "false"):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _hydra_quoted(value: str) -> str:
    # Backslashes count only before a quote, and there they are doubled; ${ would name another key.
    escaped = re.sub(r'(\\*)"', lambda found: found[1] * 2 + '\\"', value.replace("${", "\\${"))
    ending = re.search(r"\\*$", escaped)
    assert ending is not None
    return f'"{escaped}{ending[0]}"'


def use_program(argv0: str) -> None:
    """Note, for this process and those that it starts, that the user wrote ``granary`` or ``python -m granary``.

    The installed command does not look for modules in the working folder; its children, which are started by
    ``python -m``, then must not either: a folder ``conf`` or ``shared`` of the user's would be taken for ours.
    """
    os.environ[PROGRAM] = started_by(argv0)
    if os.environ[PROGRAM] == "granary" and "" not in sys.path and os.getcwd() not in sys.path:
        os.environ["PYTHONSAFEPATH"] = "1"
