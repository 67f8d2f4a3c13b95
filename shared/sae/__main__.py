"""Work with folders of dictionaries: ``python -m shared.sae convert SRC DST --to saelens``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.basics.documents import parse_json
from shared.basics.errors import GranaryError
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line
from shared.launch.terminal import ShownConsole
from shared.sae.sites import Sites

if TYPE_CHECKING:
    from shared.sae.loading import Change

CONVERT = """\
Read a folder of a dictionary of any known format and write it as another.

The source's format is found from its files. Input normalisation (scale, centre and scale) is folded into the
weights, and every latent keeps its value; what a format can't express is refused with the reason. So is a key or a
tensor of SRC that is not known and may change what the dictionary computes; --ignore KEY leaves it out. A lone file of
weights is read by --as FORMAT, and --set KEY=VALUE gives what a format's settings, or a plain file, do not say.

--threshold STORE makes a jumprelu dictionary of a topk or batchtopk one: the threshold that gives the same L0 on the
store's held-out tokens, and says which L0 and FVU it gives on others of them.

  format               files                                              read  written
  granary              config.json, sae.safetensors                       yes   yes
  saelens              cfg.json, sae_weights.safetensors                  yes   yes; transcoders: by a threshold
  sparsify             cfg.json, sae.safetensors                          yes   TopK, transcoders among them
  crosscoder_learning  config.json, final.pt or model.safetensors         yes   crosscoders: batchtopk, relu
  dictionary_learning  config.json, ae.pt                                 yes   yes
  opensae              config.json, model*.safetensors                    yes   TopK
  llama_scope          hyperparams.json, checkpoints/final.safetensors    yes   no
  llamascopium         config.json, sae_weights.safetensors: molt, lorsa  yes   no
  gemma_scope          params.npz or params.safetensors                   yes   no
  sae_made_easy        adapter_config.json, adapter_model.safetensors     yes   no
  saev                 sae.pt                                             yes   no
  prisma               config.json, n_images_*.pt                         yes   no
  plain                one .pt, .safetensors or .npz, by --as plain       yes   no
  circuit_tracer       config.yaml, layer_*.safetensors or W_dec_*        no    transcoders of all layers, CLT
"""
EXAMPLES = """\
examples:
  {convert} runs/demo/sae exported --to saelens
  {convert} runs/mine/transcoders exported --to circuit_tracer
  {convert} ae.pt runs/found/sae --to granary --as dictionary_learning --set trainer.dict_class=AutoEncoder
  {convert} sae.pt runs/found/sae --to granary --as plain --set activation=topk --set k=32 --set pre_bias=true
  {convert} runs/mine/transcoders exported --to circuit_tracer --threshold runs/mine/store
  {convert} downloaded/layer_20/width_16k/average_l0_71 runs/gemma/sae --to granary
"""


def main(argv: list[str] | None = None) -> None:
    """Run one command; a wrong input is one line on stderr and status 2."""
    raw = argparse.RawDescriptionHelpFormatter
    examples = EXAMPLES.format(convert=program("convert"))
    parser = argparse.ArgumentParser(
        prog=program("convert").removesuffix(" convert"),
        description="Work with SAE folders.",
        epilog=examples,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "convert",
        help="write an SAE folder in another project's format, or read one",
        description=CONVERT,
        epilog=examples,
        formatter_class=raw,
    )
    command.add_argument("source", metavar="SRC", help="folder in any of these formats, or a hub id")
    command.add_argument("target", metavar="DST", type=Path, help="new or empty folder")
    command.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="granary, saelens, sparsify, crosscoder_learning, dictionary_learning, opensae or circuit_tracer",
    )
    command.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="leave out a key or tensor of SRC; may be repeated"
    )
    command.add_argument("--as", dest="reads_as", metavar="FORMAT", help="read SRC, a folder or a lone file, as this")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that SRC lacks; may be repeated"
    )
    for side in ("reads", "writes"):
        command.add_argument(
            f"--{side}",
            metavar="SITES",
            help=f"sites that it {side}, a,b,..., where the files of SRC do not say",
        )
    command.add_argument("--threshold", metavar="STORE", help="find a threshold on this store's held-out tokens")
    command.add_argument("--l0", type=float, help="active latents per token that it shall give; default: the present k")
    command.add_argument("--per-latent", action="store_true", help="one threshold per latent, not one for all")
    command.add_argument("--contexts", type=int, metavar="N", help="held-out contexts to use; default: all")
    arguments = parser.parse_args(argv)
    with ending_in_one_line():
        from shared.sae.loading import convert
        from shared.sae.sets import SET_FORMATS, convert_set

        sites, console = given_sites(arguments.reads, arguments.writes), ShownConsole(soft_wrap=True)
        change = given_threshold(arguments, console.print)
        if arguments.to in SET_FORMATS:
            if arguments.ignore or arguments.reads_as or arguments.set or sites:
                told = "--ignore, --as, --set, --reads and --writes are for folders of other projects"
                raise GranaryError(f"{told}: {arguments.to} is written from ours")
            found = convert_set(arguments.source, arguments.target, arguments.to, change)
        else:
            found = convert(
                arguments.source,
                arguments.target,
                arguments.to,
                arguments.ignore,
                sites,
                change,
                reads_as=arguments.reads_as,
                given=settings_of(arguments.set),
            )
        console.print(f"{arguments.target}: {found} to {arguments.to}")


def given_sites(reads: str | None, writes: str | None) -> Sites | None:
    """Both sides as they are given, None where they are not; raises GranaryError for one of them alone."""
    if (reads is None) != (writes is None):
        raise GranaryError("--reads and --writes go together: give both")
    return None if reads is None or writes is None else Sites(tuple(reads.split(",")), tuple(writes.split(",")))


def given_threshold(arguments: argparse.Namespace, tell: Callable[[str], None]) -> "Change | None":
    """What --threshold does to a dictionary, None without it; raises GranaryError for its options alone."""
    if arguments.threshold is None:
        if arguments.l0 is not None or arguments.per_latent or arguments.contexts is not None:
            raise GranaryError("--l0, --per-latent and --contexts are for --threshold STORE: give it too")
        return None
    from shared.sae.calibrate import Threshold

    return Threshold(arguments.threshold, arguments.l0, arguments.per_latent, arguments.contexts, tell).apply


def settings_of(texts: list[str]) -> dict[str, Any]:
    """``trainer.k=32`` and the like as a document; values are JSON, or text where they are none."""
    made: dict[str, Any] = {}
    for text in texts:
        keys, equals, value = text.partition("=")
        *groups, last = keys.split(".")
        if not equals or not all((*groups, last)):
            raise GranaryError(f"--set {text}: write KEY=VALUE, such as --set activation=topk")
        inner = made
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise GranaryError(f"--set {text}: {group} has a value already")
        try:
            inner[last] = parse_json(value, text)
        except GranaryError:
            inner[last] = value
    return made


if __name__ == "__main__":
    main()
