"""The command ``granary``: every stage and tool under one name, each imported when it is called."""

import difflib
import runpy
import sys

from granary.neighbours import shadowed

if (problem := shadowed()) is not None:  # before anything of ours is imported
    print(f"error: {problem}", file=sys.stderr)  # noqa: T201
    sys.exit(2)

from shared.launch.commands import COMMANDS, use_program

USAGE = """\
usage: granary COMMAND [key=value ...]

{commands}

  granary harvest name=mine corpus=text corpus.files='data/*.txt'
  granary train name=mine sae.k=32
  granary eval name=mine

granary COMMAND --help tells more of one; granary --version. Every key: docs/config.md.
"""

TOLD = dict.fromkeys(("-h", "--help", "help"), "usage") | dict.fromkeys(("-V", "--version", "version"), "version")


def main() -> None:
    """Run one subcommand as ``python -m`` would run its module; status 2 and one line for one that there is not."""
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else "--help"
    if name in TOLD:
        from shared.basics.versions import granary_version
        from shared.launch.outcome import ending_in_one_line

        with ending_in_one_line():
            print(usage() if TOLD[name] == "usage" else f"granary {granary_version()}\n", end="")  # noqa: T201
        return
    command = COMMANDS.get(name)
    if command is None:
        print(f"error: {unknown(name)}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    use_program(sys.argv[0])
    sys.argv[1:] = [*command.before, *arguments[1:]]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


def usage() -> str:
    """What there is, on one screen."""
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:<{width}}  {one.summary}" for name, one in COMMANDS.items()))


def unknown(name: str) -> str:
    """One line that names the nearest subcommands, or all."""
    close = difflib.get_close_matches(name, COMMANDS)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(COMMANDS)}"
    return f"granary has no command {name!r}: {hint}"


if __name__ == "__main__":
    main()
