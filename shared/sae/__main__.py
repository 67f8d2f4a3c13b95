"""Work with SAE folders: ``python -m shared.sae convert SRC DST --to saelens``."""

import argparse
from pathlib import Path
from typing import Any

from shared.basics.documents import parse_json
from shared.basics.errors import GranaryError
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line
from shared.launch.terminal import ShownConsole

CONVERT = """\
Read an SAE folder of any known format and write it as another.

The source's format is found from its files. Input normalisation (scale, centre and scale) is folded into the
weights, and every latent keeps its value; what a format can't express is refused with the reason. So is a key or a
tensor of SRC that is not known and may change what the SAE computes; --ignore KEY leaves it out. A lone file of
weights is read by --as FORMAT, and --set KEY=VALUE gives what a format's settings, or a plain file, do not say.

  format               files                                              read  written
  granary              config.json, sae.safetensors                       yes   yes
  saelens              cfg.json, sae_weights.safetensors                  yes   yes
  sparsify             cfg.json, sae.safetensors                          yes   TopK
  dictionary_learning  config.json, ae.pt                                 yes   yes
  opensae              config.json, model*.safetensors                    yes   TopK
  llama_scope          hyperparams.json, checkpoints/final.safetensors    yes   no
  gemma_scope          params.npz or params.safetensors                   yes   no
  plain                one .pt, .safetensors or .npz, by --as plain       yes   no
  circuit_tracer       config.yaml, layer_*.safetensors or W_dec_*        no    transcoders of all layers, CLT
"""
EXAMPLES = """\
examples:
  {convert} runs/demo/sae exported --to saelens
  {convert} runs/mine/transcoders exported --to circuit_tracer
  {convert} ae.pt runs/found/sae --to granary --as dictionary_learning --set trainer.dict_class=AutoEncoder
  {convert} sae.pt runs/found/sae --to granary --as plain --set activation=topk --set k=32 --set pre_bias=true
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
    command.add_argument("source", metavar="SRC", help="folder of an SAE in any of these formats, or a hub id")
    command.add_argument("target", metavar="DST", type=Path, help="new or empty folder")
    command.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="granary, saelens, sparsify, dictionary_learning, opensae or circuit_tracer",
    )
    command.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="leave out a key or tensor of SRC; may be repeated"
    )
    command.add_argument("--as", dest="reads_as", metavar="FORMAT", help="read SRC, a folder or a lone file, as this")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that SRC lacks; may be repeated"
    )
    arguments = parser.parse_args(argv)
    with ending_in_one_line():
        from shared.sae.loading import convert
        from shared.sae.sets import SET_FORMATS, convert_set

        if arguments.to in SET_FORMATS:
            if arguments.ignore or arguments.reads_as or arguments.set:
                raise GranaryError(
                    f"--ignore, --as and --set are for other projects: {arguments.to} is written from ours"
                )
            found = convert_set(arguments.source, arguments.target, arguments.to)
        else:
            given = settings_of(arguments.set)
            found = convert(
                arguments.source, arguments.target, arguments.to, arguments.ignore, arguments.reads_as, given
            )
        ShownConsole(soft_wrap=True).print(f"{arguments.target}: {found} to {arguments.to}")


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
