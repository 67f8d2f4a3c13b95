"""The first weights of a run from a dictionary on disk: ``init_from``."""

from shared.basics.errors import GranaryError
from shared.sae.loading import load
from shared.sae.variants import Dictionary

# What may differ without a weight meaning something else.
FREE = ("k",)


def copy_weights(dictionary: Dictionary, folder: str) -> None:
    """Fill weights, thresholds and normalisation with those of a folder or hub id, of any format that loads.

    Raises GranaryError naming what is not alike.
    """
    source = load(folder)
    there, here = (
        {"kind": made.config.kind, "widths": made.config.widths, **made.config.own_fields()}
        for made in (source, dictionary)
    )
    unlike = [
        f"{name} is {there.get(name)} there, {value} here"
        for name, value in here.items()
        if name not in FREE and there.get(name) != value
    ]
    if unlike:
        raise GranaryError(f"init_from={folder} is another dictionary: {'; '.join(unlike)}; give what it has")
    dictionary.load_state_dict(source.state_dict())
