"""Work with SAE folders: ``python -m shared.sae convert SRC DST --to saelens``."""

import argparse
from pathlib import Path

from rich.console import Console

from shared.basics.errors import GranaryError
from shared.launch.commands import program
from shared.launch.stage import fail

CONVERT = """\
Read an SAE folder of any known format and write it as another.

The source's format is found from its files. Input normalisation (scale, centre and scale) is folded into the
weights, and every latent keeps its value; what a format can't express is refused with the reason. So is a key or a
tensor of SRC that is not known and may change what the SAE computes; --ignore KEY leaves it out.

  format               files                                              read  written
  granary              config.json, sae.safetensors                       yes   yes
  saelens              cfg.json, sae_weights.safetensors                  yes   yes
  sparsify             cfg.json, sae.safetensors                          yes   TopK
  dictionary_learning  config.json, ae.pt                                 yes   yes
  opensae              config.json, model*.safetensors                    yes   TopK
  llama_scope          hyperparams.json, checkpoints/final.safetensors    yes   no
  gemma_scope          params.npz or params.safetensors                   yes   no
"""
EXAMPLES = """\
examples:
  {convert} runs/demo/sae exported --to saelens
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
        "--to", required=True, metavar="FORMAT", help="granary, saelens, sparsify, dictionary_learning or opensae"
    )
    command.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="leave out a key or tensor of SRC; may be repeated"
    )
    arguments = parser.parse_args(argv)
    from shared.sae.loading import convert

    try:
        found = convert(arguments.source, arguments.target, arguments.to, arguments.ignore)
    except GranaryError as error:
        fail(str(error))
    Console(soft_wrap=True).print(f"{arguments.target}: {found} to {arguments.to}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
