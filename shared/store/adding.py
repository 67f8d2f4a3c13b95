"""Adding sites to a store that exists: where such a harvest writes, and what it must share with the store."""

from shared.basics.errors import GranaryError
from shared.store.added import FOLDER, AddedIO, addition_name, additions
from shared.store.format import layout
from shared.store.format.extent import read_extents
from shared.store.format.layout import StorePlan
from shared.store.format.site_path import check_sites
from shared.store.store import Store


def place_of_addition(store: Store, plan: StorePlan) -> AddedIO:
    """What `Store.create` takes to add the sites of `plan`, a harvest of the store's own tokens, to `store`.

    Raises GranaryError, and writes nothing, for another model, where the store has such a site already or is getting it
    from another harvest, and for a store with a window.
    """
    url = store.url
    if store.window is not None:
        raise GranaryError(f"{url} has store.window, and no site can be added to it: harvest into another store.url")
    place = AddedIO(store.io, addition_name(plan))
    if place.size(layout.extent_key(0)) is not None:
        return place
    models = ({"model": one.provenance.get("model")} for one in (store.plan, plan))
    difference = layout.describe_difference(*models)
    if difference:
        raise GranaryError(
            f"{url} is of another model: {difference}; harvest this one beside it, into its own store.url"
        )
    present = [hook for hook in plan.hooks if hook in store.hooks]
    if present:
        raise GranaryError(f"{url} has {', '.join(present)} already: name only the hooks to add, or another store.url")
    for other in additions(store.io):
        for extent in read_extents(other):
            if extent.plan.hooks.keys() & plan.hooks.keys():
                difference = layout.describe_difference(extent.plan.identity(), plan.identity())
                raise GranaryError(
                    f"another harvest is adding sites to {url}: {difference}; give its settings to finish it, or delete"
                    f" {url}/{FOLDER}/{other.name} to give it up"
                )
    check_sites([*store.hooks, *plan.hooks], scaled=plan.dtype == "int8")
    return place
