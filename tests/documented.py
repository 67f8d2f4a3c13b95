"""The commands of README.md and docs/*.md, and how each is made small enough to be run by a test."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")))
BEGINS = re.compile(r"(make|granary|python|sbatch|pip|torchrun|[A-Z]+=\S+) ")

# Commands that no test here can run, by a part of each, and why.
NOT_RUN = {
    "corpus=hub": "needs the network: the model and the data set are on the hub",
    "sbatch ": "needs Slurm: tests/cluster runs docs/slurm.sbatch",
    "hydra/launcher=slurm": "needs Slurm: tests/cluster runs harvest, train and eval so",
    "RDZV=": "needs a second machine: tests/distributed runs two agents on one",
    "path/to/vit": "needs a model of images: tests/unit/harvest/factory/test_media.py harvests two kinds",
    "path/to/whisper": "needs a model of sounds: tests/unit/harvest/factory/test_media.py harvests two kinds",
    "path/to/bert": "needs an encoder: tests/unit/harvest/factory/test_encoder.py harvests four kinds",
    "name=net": "needs the page's own model: tests/pipeline/test_harvest_factory.py runs it",
    "pip install": "needs the network",
    "make explore": "needs a latents folder, and serves until it is stopped: tests/pipeline/test_explore.py runs it",
    "granary trace R": "needs a transcoder of each layer: tests/pipeline/test_trace.py runs it",
    "granary trace runs/": "needs a transcoder of each layer: tests/pipeline/test_trace.py runs it",
    "--endpoint": "needs a language model that listens: tests/pipeline/test_explain.py runs it against a stub",
    "supervised=true": "needs dozens of documents: tests/pipeline/test_eval_supervised.py runs it",
    "granary explore": "needs a latents folder, and serves until it is stopped: tests/pipeline/test_explore.py runs it",
}

# Words of a command that stand for something large or for something of the reader's own; "" leaves the word out.
STAND_INS = (
    (r"\.\.\.", ""),
    (r"&", ""),
    (r"model=(/path/or/hub-id|path/to/llama|path/to/chat|llama31_8b|stories260K-hf)", "model=bundled"),
    (r"corpus\.files=tinystories_train\.txt", "corpus.files=data/*.txt"),
    (r"packing\.seq_len=\d{3,}", ""),
    (r"corpus\.contexts=\d{4,}", ""),
    (r"schedule\.tokens=[\d_]{5,}", "schedule.tokens=2_000"),
    (r"hooks\.layers=8(?![\d,])", "hooks.layers=2"),
    (r"hook=layers\.16\.resid_post", "hook=layers.2.resid_post"),
    (r"hook=layers\.8\.resid_post,layers\.16\.resid_post", "hook=layers.1.resid_post,layers.2.resid_post"),
    (
        r"reads=\[layers\.8\.resid_post,chat:layers\.8\.resid_post\]",
        "reads=[layers.2.resid_post,chat:layers.2.resid_post]",
    ),
    (r"reads=\[layers\.2\.resid_post,layers\.3\.resid_post\]", "reads=[layers.1.resid_post,layers.2.resid_post]"),
    (r"at_layer=0,1,2", "at_layer=1,2"),
    (r"hooks\.layers=\[0,1,2,3,4\]", "hooks.layers=[0,1]"),
    (r"hooks\.layers=\[0,8,16-20\]", "hooks.layers=[0,1-2]"),
    (r"stream\.batch_size=\d+", "stream.batch_size=256"),
    (r"nproc=8|--nproc-per-node=(8|16)", "{0}=2"),
    (r"URL", "runs/demo/store"),
)
# What makes a stage small; a key that the command gives itself stays as it is given.
SMALL = {
    "stage_harvest": ("name=demo", "debug=tiny_harvest"),
    "stage_train": ("name=demo", "debug=tiny_train", "schedule.tokens=2_000"),
    "stage_eval": ("name=demo", "debug=tiny_eval"),
    "stage_inspect": ("name=demo", "contexts=2"),
    "transcoders": ("name=demo", "debug=tiny_train", "schedule.tokens=2_000", "contexts=2"),
    "weights": ("--tokens=1000",),  # of granary trace
    "examples/shapes.py": ("--pictures=64", "--heldout=16", "--steps=1"),
    "examples/shape_latents.py": ("--pictures=16", "--steered=1"),
}
STAGES = {"harvest": "stage_harvest", "train": "stage_train", "eval": "stage_eval", "inspect": "stage_inspect"}
TOOLS = ("find", "regions", "box", "export", "import")  # of granary inspect: they take no keys


@dataclass(frozen=True)
class Block:
    """Commands that stand together on a page and are run one after the other."""

    page: str
    line: int
    commands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runnable(self) -> tuple[str, ...]:
        """Those that a test can run."""
        return tuple(one for one in self.commands if not any(part in one for part in NOT_RUN))


def blocks() -> Iterator[Block]:
    """All of them, in the order of the pages: of fences marked bash or sh, and of lines indented by four spaces."""
    for page in PAGES:
        lines = (REPOSITORY / page).read_text(encoding="utf-8").splitlines()
        number = 0
        while number < len(lines):
            if lines[number].startswith("```"):
                end = next(n for n in range(number + 1, len(lines)) if lines[n].startswith("```"))
                found = lines[number + 1 : end] if lines[number][3:] in ("bash", "sh") else []
            elif lines[number].startswith("    "):
                end = next((n for n in range(number, len(lines)) if not lines[n].startswith("    ")), len(lines))
                found = [line[4:] for line in lines[number:end]]
            else:
                number += 1
                continue
            commands = tuple(one for one in joined(found) if BEGINS.match(f"{one} "))
            if commands:
                yield Block(page, number + 1, commands)
            number = end + 1


def joined(lines: list[str]) -> Iterator[str]:
    """One string for each command, whose lines may end in a backslash."""
    pending = ""
    for line in lines:
        pending += line.strip()
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        yield pending
        pending = ""


def calls(command: str) -> Iterator[tuple[str, list[str]]]:
    """What to run for a command: modules, or scripts by their paths, with arguments that are small."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        small = [re.sub("NPROC=8", "NPROC=2", word) for word in words]
        # What make would run, without making the virtual environment anew.
        done = subprocess.run([*small, "-n", "-o", "setup"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            python, flag, module, *arguments = shlex.split(line)
            assert (Path(python).name, flag) == ("python", "-m"), line
            yield module, made_small(module, arguments)
    elif words[0] == "granary":
        stage = "" if words[2:3] and words[2] in TOOLS else STAGES.get(words[1], words[1])
        yield "granary", [words[1], *made_small(stage, words[2:])]
    else:
        assert words[0] == "python", command
        if words[1] == "-m":
            yield words[2], made_small(words[2], words[3:])
            return
        yield str(REPOSITORY / words[1]), made_small(words[1], words[2:])


def made_small(module: str, arguments: list[str]) -> list[str]:
    """With stand-ins for what is large, and what makes the stage small."""
    kept = []
    for word in arguments:
        for pattern, replacement in STAND_INS:
            if re.fullmatch(pattern, word):
                word = replacement.format(word.partition("=")[0])
        if word:
            kept.append(word)
    stage = next((name for name in (module, *arguments) if name in SMALL), None)
    given = {word.partition("=")[0] for word in kept}
    if "run_dir" in given:
        given.add("name")
    return [*kept, *(word for word in SMALL.get(stage or "", ()) if word.partition("=")[0] not in given)]
