"""``granary transcoders name=mine sae.k=16``: a transcoder for the MLP of every layer, from one pass over a store.

Each reads ``layers.L.mlp_in`` and writes ``layers.L.mlp_out``. The same as ``python -m stage_train -m packed=true
at_layer=0,1,... reads='layers.${at_layer}.mlp_in' writes='layers.${at_layer}.mlp_out'``, and then
``python -m stage_eval`` with all of them, one at a time and all at once.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from granary.sweep import is_grid, shared_arguments
from shared.basics.display import masked
from shared.basics.documents import typed_at
from shared.basics.errors import GranaryError
from shared.basics.run_folder import RunFolder
from shared.basics.yaml_file import read_yaml
from shared.launch.outcome import ending_in_one_line
from shared.launch.stage import run_child, spelt_out
from stage_train.config import TrainSchema

HELP = """\
usage: granary transcoders [key=value ...]

Train a transcoder from mlp_in to mlp_out of every layer that the store has (layer=0,3 chooses), all of them
from one pass, into runs/NAME/transcoders/layer_L (set=NAME names another folder); then score each by itself
and all at once. Takes what granary train takes (variant=skip_transcoder adds the linear map), and for the scores
contexts=N.
"""
FOLDER = "transcoders"
READS, WRITES = "layers.{}.mlp_in", "layers.{}.mlp_out"
OWN = ("layer=", "set=")
FREE = ("-m", "hydra.", "at_layer=", "nproc=")
"""What may differ between the parts of one set."""
OF_EVALUATION = ("contexts=", "split=")
"""What evaluation is told, and training does not know."""


def commands(arguments: Sequence[str], layers: Sequence[int]) -> tuple[list[str], list[str]]:
    """The arguments of training and those of evaluation, for transcoders of these layers."""
    given = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    evaluated = [argument for argument in given if argument.startswith(OF_EVALUATION)]
    taught = [argument for argument in given if argument not in evaluated and not argument.startswith(OWN)]
    folder = f"${{run_dir}}/{set_of(given)}"
    train = [
        "-m",
        "packed=true",
        *([] if any(argument.startswith("variant=") for argument in taught) else ["variant=transcoder"]),
        f"at_layer={','.join(map(str, layers))}",
        f"reads='{READS.format('${at_layer}')}'",
        f"writes='{WRITES.format('${at_layer}')}'",
        f"hydra.sweep.dir='{folder}'",
        "hydra.sweep.subdir='layer_${at_layer}'",
        *taught,
    ]
    paths = ",".join(f"'{folder}/layer_{layer}'" for layer in layers)
    where = [f"sae.path=[{paths}]", f"out_dir='{folder}'"]
    joint = [f"joint={'true' if len(layers) > 1 else 'false'}", f"sae.per_pass={len(layers)}"]
    return train, [*shared_arguments(taught), *evaluated, *where, *joint]


def check_same_set(folder: Path, train: Sequence[str]) -> None:
    """Raise GranaryError where `folder` holds a set that other words trained: its folders would be taken for this.

    A record that a full disk cut off says nothing: each run compares its own settings, too.
    """
    record = folder / "multirun.yaml"
    try:
        recorded = typed_at(read_yaml(record), "hydra.overrides.task", list[str], record)
    except GranaryError:
        return
    wanted_words = [masked(word) for word in spelt_out(train, TrainSchema)]  # as the record has them
    before, wanted = ({one for one in words if not one.startswith(FREE)} for words in (recorded, wanted_words))
    if before != wanted:
        raise GranaryError(
            f"{folder} holds a set that was trained with other settings ({', '.join(sorted(before ^ wanted))}): name "
            "this one by set=NAME"
        )


def layers_of(hooks: Sequence[str]) -> list[int]:
    """The layers whose MLP a store has on both sides, ascending."""
    found = (re.fullmatch(r"layers\.(\d+)\.mlp_in", hook) for hook in hooks)
    return sorted(int(match[1]) for match in found if match and WRITES.format(match[1]) in hooks)


def chosen_layers(arguments: Sequence[str]) -> list[int]:
    """Return what ``layer=0,3`` says, or all that the store has. Raises GranaryError where that is none."""
    values = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if "layer" in values:
        try:
            return sorted({int(part) for part in values["layer"].split(",")})
        except ValueError:
            raise GranaryError(f"layer={values['layer']}: numbers of layers, such as layer=0,3") from None
    from shared.store import Store

    url = values.get("store.url", "").strip("'\"") or str(RunFolder(run_dir_of(arguments)).store)
    store = Store.open(url)
    layers = layers_of(store.hooks)
    if not layers:
        raise GranaryError(
            f"the store at {store.url} has no layer with mlp_in and mlp_out: harvest with hooks.sites=[mlp_in,mlp_out]"
        )
    return layers


def run_dir_of(arguments: Sequence[str]) -> Path:
    """Folder of the study."""
    values = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    return Path(values.get("run_dir", f"runs/{values.get('name', 'demo')}").strip("'\""))


def set_of(arguments: Sequence[str]) -> str:
    """Name of the set's folder in it."""
    return next((argument.removeprefix("set=") for argument in arguments if argument.startswith("set=")), FOLDER)


def main() -> None:
    """Run both; the first that fails ends it with its status."""
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(HELP, end="")  # noqa: T201
        return
    with ending_in_one_line():
        if is_grid([argument for argument in arguments if not argument.startswith("layer=")]):
            raise GranaryError("granary transcoders trains one set: give each key one value, and each set its name")
        train, evaluate = commands(arguments, chosen_layers(arguments))
        check_same_set(run_dir_of(arguments) / set_of(arguments), train)
        run_child([sys.executable, "-m", "stage_train", *train])
        run_child([sys.executable, "-m", "stage_eval", *evaluate])


if __name__ == "__main__":
    main()
