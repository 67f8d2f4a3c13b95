"""Say what latents do: ``granary explain RUN`` by rules; with ``--endpoint URL --model NAME`` by a language model."""

import sys

if __name__ == "__main__":
    if any(argument.split("=")[0] == "--endpoint" for argument in sys.argv[1:]):
        from stage_inspect.explain.language_command import main
    else:
        from stage_inspect.explain.rules.command import main
    main(sys.argv[1:])
