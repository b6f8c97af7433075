"""From a recipe's fractions and formats to the actions that each site may take."""

from __future__ import annotations

from collections.abc import Iterable

from compressor.errors import RecipeError
from compressor.plan import DROP, Action, ActionMenu, Formats, Site
from compressor.recipe import SearchSection


def menu(search: SearchSection, sites: Iterable[Site]) -> ActionMenu:
    """The actions of every site by its name, each once, in order of bytes from largest to smallest.

    Ties in bytes go by units kept, most first, then by the name of the format.

    Raises:
        RecipeError: a site has none.
    """
    return {site.name: _actions(search, site) for site in sites}


def _actions(search: SearchSection, site: Site) -> tuple[Action, ...]:
    if site.kind in ("embedding", "head"):
        keeps, formats = {site.units}, search.embedding_formats
    else:
        keeps, formats = kept_units(search, site), search.formats
    actions = {Action(keep, fmt) if keep else DROP for keep in keeps for fmt in formats if _possible(site, keep, fmt)}
    if not actions:
        widths = ", ".join(sorted({"{}x{}".format(*matrix.shape(site.units, site.units)) for matrix in site.matrices}))
        raise RecipeError(
            f"search.formats = {', '.join(formats)}: none suits {site.name}, whose matrices are {widths}; expected one that "
            "does not split an attention's input, and whose blocks divide what the matrices read; add another, fp16 say"
        )
    return tuple(sorted(actions, key=lambda action: (-site.size_bytes(action), -action.keep, action.format)))


def _possible(site: Site, keep: int, name: str) -> bool:
    """Whether a site can have a format: no attention one that splits its input, and of codebooks the blocks must divide what
    the matrices read."""
    if site.kind == "attention" and Formats.parse(name).splits_input:
        return False
    stored = site.stored(Action(keep, name))
    return all(
        matrix.shape(keep, site.units)[1] % format.block == 0 for matrix, format in stored if format.kind == "codebook"
    )


def kept_units(search: SearchSection, site: Site) -> set[int]:
    """Numbers of units that an attention, a feed-forward or an expert may keep, 0 where it is dropped.

    A fraction f of n units in multiples of m: m * round(f * n / m), at least m (and at most n) unless f is 0.
    """
    if site.kind == "attention":
        if search.attention_keep is None:
            return set(range(site.units + 1))
        fractions, multiple = search.attention_keep, 1
    else:
        fractions, multiple = search.ffn_keep, search.ffn_multiple
    return {_rounded(fraction, site.units, multiple) for fraction in fractions}


def _rounded(fraction: float, units: int, multiple: int) -> int:
    if fraction in (0.0, 1.0):
        return round(fraction * units)
    return min(units, max(multiple, multiple * int(fraction * units / multiple + 0.5)))
