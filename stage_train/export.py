"""The command ``python -m stage_train.export``: an SAE from a run's newest checkpoint; see ``state.export``."""

from stage_train.state.export import main

if __name__ == "__main__":
    main()
