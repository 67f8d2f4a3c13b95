"""The command ``python -m stage_train.packed``: train a list of SAEs from one pass; see ``stage_train.many``."""

from stage_train.many import main

if __name__ == "__main__":
    main()
