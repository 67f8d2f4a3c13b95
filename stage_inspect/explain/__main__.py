"""Say what latents do: ``granary explain RUN --endpoint URL --model NAME``."""

import sys

from stage_inspect.explain import language_command

if __name__ == "__main__":
    language_command.main(sys.argv[1:])
