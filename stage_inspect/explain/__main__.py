"""Entry point of explanations: ``granary explain RUN`` finds rules, exact and without a language model."""

from stage_inspect.explain.rules.command import main

if __name__ == "__main__":
    main()
