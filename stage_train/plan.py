"""The command ``python -m stage_train.plan``: what a run will need, before it starts; see ``stage_train.estimate``."""

from stage_train.estimate.__main__ import main

if __name__ == "__main__":
    main()
