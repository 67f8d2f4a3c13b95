"""Which dictionaries a graph is made of, and whether they were taught the model that it is of."""

from collections.abc import Sequence
from pathlib import Path

import torch

from shared.basics.errors import GranaryError
from shared.sae.members import Member, members
from shared.sae.variants import Dictionary
from stage_trace.group_weights import GroupRows
from stage_trace.places import places_of
from stage_trace.session import Source, held_rows


def find_sources(paths: Sequence[str | Path], device: torch.device | str = "cpu") -> list[Source]:
    """The dictionaries that `paths` name: folders, folders of folders, globs, hub ids; none is loaded yet.

    Raises GranaryError for a path without dictionaries, and for one that is no stand-in of an MLP or of attention.
    """
    found = (_source(member) for path in paths for member in members(path, device))
    return list({source.name: source for source in found}.values())


def _source(member: Member) -> Source:
    """No more of it is in memory than what is being looked at: rows come from the file where they lie in one."""

    def rows(dictionary: Dictionary) -> Sequence[GroupRows]:
        return member.rows() or held_rows(dictionary)

    return Source(member.name, places_of(member.config, member.name), member.open, rows, member.config, member.model)


def of_dictionary(dictionary: Dictionary) -> Source:
    """One that is loaded."""
    name = f"the {dictionary.config.kind} of {dictionary.sites}"
    return Source(name, places_of(dictionary.config, name), lambda: dictionary)


def need_any(sources: Sequence[Source]) -> None:
    """Raise GranaryError where there is no dictionary at all."""
    if not sources:
        raise GranaryError("give at least one transcoder folder: granary trace RUN text=...")
