"""Which of a recipe's calls are a graph's, and in what the two differ.

A recipe belongs to a model: to its weights and to the places of its calls. Libraries name the same call in several
ways (a wrapper, a submodule compiled alone, another version of a tracer), and load the same weights in several forms;
neither makes another model of it. What differs is said, and thresholds are then checked on the inputs at hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from afbs_compile.errors import RecipeError
from afbs_compile.fingerprint import plain_name
from afbs_compile.found import FoundGraph
from afbs_compile.kernels.attend import machine
from afbs_compile.kernels.attend.engines import family_on
from afbs_compile.kernels.spec.selection import PREDICTOR_VERSION
from afbs_compile.passes.site import AttentionSite
from afbs_compile.recipe import GraphRecipe, Recipe, SiteRecipe
from afbs_compile.shards import Heads, fits, of_part
from afbs_compile.sketch import ROUNDING, Likeness, TensorSketch, likeness

Sites = Mapping[str, SiteRecipe]


@dataclass(frozen=True)
class Match:
    """What a recipe says of a graph.

    Attributes:
        sites: what was recorded of each call, by its name in the graph; calls that the recipe lacks are not in it.
        graph: the recorded graph, the first one where the calls are from several; number: its place in the recipe.
        differences: in what the model differs from the one that was calibrated, a clause each; empty where nothing
            does that could move an error.
    """

    sites: Sites
    graph: GraphRecipe
    number: int
    differences: tuple[str, ...]


def match(found: FoundGraph, recipe: Recipe) -> Match:
    """Find what a recipe recorded of a graph's calls.

    Raises:
        RecipeError: it was made for another model, device or predictor. The message lacks its subject, the recipe.
    """
    device = found.sites[0].device
    check_device(recipe, machine.kind(device), family_on(device))
    exact = [n for n, graph in enumerate(recipe.graphs) if (graph.graph, graph.weights) == (found.graph, found.weights)]
    if exact:
        number = _by_source(found, recipe, exact)
        sites = _sites(recipe, number, {site.name: site.name for site in found.sites})
        if all(site.dtype == _dtype(here) for here in found.sites if (site := sites.get(here.name)) and site.heads):
            return Match(_of_process(found, sites), recipe.graphs[number], number, ())
    return _akin(found, recipe)


def placed(names: Iterable[str], here: Sequence[TensorSketch], recipe: Recipe) -> dict[str, str]:
    """Names of recorded calls by those here of the modules that have the very same weights.

    What a module is called may be the name of another one there: a stage of a pipeline may number its layers from 0.

    Args:
        names: of modules; here: tensors of the model that they are part of.
    """
    everywhere = [sketch for graph in recipe.graphs for sketch in graph.tensors if sketch.digest]
    places: dict[str, set[str]] = {}
    for sketch in everywhere:
        places.setdefault(sketch.digest, set()).add(plain_name(sketch.name))
    known = {digest: place for digest, (place, *more) in places.items() if not more}
    mine = [(plain_name(sketch.name), known[sketch.digest]) for sketch in here if sketch.digest in known]
    calls = Counter(site.name for site in recipe.sites if site.heads)
    there = sorted((name for name, count in calls.items() if count == 1), key=len, reverse=True)
    found: dict[str, str] = {}
    for name in names:
        mark = plain_name(name)
        for place, other in mine:
            _, inside, rest = place.partition(mark)
            if inside and rest and other.endswith(rest):
                module = other.removesuffix(rest)
                found.update((name, call) for call in there[::-1] if module.endswith(plain_name(call)))
                break
    return found


def renamed_as(names: Sequence[str], recipe: Recipe) -> dict[str, SiteRecipe]:
    """What a recipe recorded of each of some modules, which may be named in another way there.

    Args:
        names: of the modules here, of which most make no call.
    """
    there = {site.name: site for site in recipe.sites if site.heads}
    best = {name: there[name] for name in names if name in there}  # another change has to fit more of them
    seen: set[tuple[str, str]] = set()
    for recorded in there:
        for change in [change for name in names if (change := _change(name, recorded)) and change not in seen]:
            seen.add(change)
            fitting = {name: there[other] for name in names if (other := _changed(name, change)) in there}
            best = max(best, fitting, key=len)
        if 2 * len(best) >= len(there):
            break
    return best


def check_device(recipe: Recipe, kind: str, family: str) -> None:
    """Refuse a recipe whose timings, or whose selection rule, are not this device's.

    Raises:
        RecipeError: as :func:`match`.
    """
    if recipe.predictor_version != PREDICTOR_VERSION:
        raise RecipeError(f"was made for predictor version {recipe.predictor_version}, this is {PREDICTOR_VERSION}.")
    if (recipe.device, recipe.engine) != (kind, family):
        raise RecipeError(f"was calibrated on {recipe.device} ({recipe.engine}), this model runs on {kind} ({family}).")


def _by_source(found: FoundGraph, recipe: Recipe, alike: Sequence[int]) -> int:
    """Only graphs that are alike in all else need their source to tell them apart."""
    same = [number for number in alike if recipe.graphs[number].source == found.source]
    if not same and len(alike) > 1:
        raise RecipeError("has several graphs like this one, all from other code.")
    return (same or alike)[0]


def _akin(found: FoundGraph, recipe: Recipe) -> Match:
    """The match of a graph that is not, bit by bit, one that was calibrated."""
    there = [sketch for graph in recipe.graphs for sketch in graph.tensors]
    alike = likeness(found.sketches, there)
    names = [site.name for site in found.sites]
    candidates = _candidates(found.sites, recipe)
    if not candidates:
        raise RecipeError(
            f"belongs to another model: its attention calls ({_few(site.name for site in recipe.sites)}) are not this "
            f"graph's ({_few(names)})."
        )
    if alike.foreign or (found.sketches and not there):
        raise RecipeError("belongs to another model: same architecture, other weights.")
    by_weights = placed(names, found.sketches, recipe)
    if len(by_weights) == len(names):
        candidates = [(_first_graph(recipe, by_weights), by_weights)]
    best = max(len(renamed) for _, renamed in candidates)
    candidates = [(number, renamed) for number, renamed in candidates if len(renamed) == best]
    numbers = [number for number, _ in candidates]
    chosen = _by_source(found, recipe, numbers) if len(candidates) > 1 and not found.tensors else numbers[0]
    renamed = dict(reversed(candidates))[chosen]
    sites = _sites(recipe, chosen, renamed)
    mine = _of_process(found, sites)
    return Match(mine, recipe.graphs[chosen], chosen, _differences(found, renamed, sites, alike))


def _sites(recipe: Recipe, number: int, renamed: Mapping[str, str]) -> Sites:
    everywhere = {site.name: site for site in (*recipe.sites, *recipe.graphs[number].sites)}
    return {here: everywhere[there] for here, there in renamed.items() if there in everywhere}


def _of_process(found: FoundGraph, sites: Sites) -> Sites:
    """What was recorded of the heads that this process has, where it has a part of them."""
    mine = dict(sites)
    for site in found.sites:
        recorded = sites.get(site.name)
        if recorded is not None and recorded.heads and fits(recorded, here := _heads(site)):
            mine[site.name] = of_part(site.name, recorded, here, found.part(site).number)
    return mine


def _heads(site: AttentionSite) -> Heads:
    return Heads(site.heads, site.kv_heads, site.head_dim)


def _candidates(sites: Sequence[AttentionSite], recipe: Recipe) -> list[tuple[int, dict[str, str]]]:
    """Every way to name a graph's calls as a recipe does: its graph, and the names there by those here.

    One graph of the recipe has all calls, or those of all its graphs do, if another version of a library breaks it
    elsewhere; a call may be missing where the recipe's samples never made it.
    """
    found = []
    for number, graph in enumerate(recipe.graphs):
        found += [(number, renamed) for renamed in _renamings(sites, graph.sites)]
    if len(recipe.graphs) > 1 and not any(len(renamed) == len(sites) for _, renamed in found):
        found += [(_first_graph(recipe, renamed), renamed) for renamed in _renamings(sites, recipe.sites)]
    return found


def _first_graph(recipe: Recipe, renamed: Mapping[str, str]) -> int:
    first = next(iter(renamed.values()))
    return next(n for n, graph in enumerate(recipe.graphs) if any(site.name == first for site in graph.sites))


def _renamings(sites: Sequence[AttentionSite], recorded: Sequence[SiteRecipe]) -> Iterator[dict[str, str]]:
    """Ways to name some calls as others are, all by the same change; the calls are alike in heads and sizes.

    The change is none, if names do as they are; of what names begin with; or, where that does not do, of anything but
    their numbers, in order.
    """
    there = {site.name: site for site in recorded if site.heads}

    def alike(site: AttentionSite, name: str) -> bool:
        other = there.get(name)
        return other is not None and fits(other, _heads(site))

    own = {site.name: site.name for site in sites if alike(site, site.name)}
    if len(own) == len(sites):
        yield own
        return
    seen: set[tuple[str, str]] = set()
    whole = False
    for name in sorted(there, key=lambda name: name != sites[0].name):  # the same name first
        change = _change(sites[0].name, name)
        if change is None or change in seen:
            continue
        seen.add(change)
        renamed = {site.name: _changed(site.name, change) for site in sites}
        fitting = {site.name: renamed[site.name] for site in sites if alike(site, renamed[site.name])}
        if 2 * len(fitting) >= len(sites):
            whole = whole or len(fitting) == len(sites)
            yield fitting
    if not whole and len(there) == len(sites):
        in_order = dict(zip((site.name for site in sites), there, strict=True))
        if all(alike(s, in_order[s.name]) and _numbers(s.name) == _numbers(in_order[s.name]) for s in sites):
            yield in_order


def _change(here: str, there: str) -> tuple[str, str] | None:
    """What the one name begins with and the other does not: ``("0.model", "model")``; they end alike."""
    a, b = here.split("."), there.split(".")
    same = 0
    while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    if same == 0:
        return None
    return ".".join(a[: len(a) - same]), ".".join(b[: len(b) - same])


def _changed(name: str, change: tuple[str, str]) -> str:
    before, after = change
    rest = name.removeprefix(before).removeprefix(".") if before else name
    if before and rest == name:
        return ""
    return f"{after}.{rest}" if after else rest


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def _differences(found: FoundGraph, renamed: Mapping[str, str], sites: Sites, alike: Likeness) -> tuple[str, ...]:
    """In what a model differs from the one that was calibrated."""
    said = []
    here, there = next(iter(renamed.items()))
    if here != there:
        said.append(f"its calls were named like {there}, here like {here}")
    was, now = sites[here].dtype, _dtype(found.sites[0])
    if was != now and not alike.dtypes:
        said.append(f"its calls computed in {was}, here in {now}")
    return (*said, *weight_differences(alike))


def weight_differences(alike: Likeness) -> tuple[str, ...]:
    """In what a model's weights differ, a clause each."""
    said = [f"its weights were {before}, here {now}" for before, now in alike.dtypes]
    if alike.distance > ROUNDING or (alike.distance > 0 and not alike.dtypes):
        said.append(
            f"its weights differ by {alike.distance:.2g} of their size: trained further, merged or quantised since"
        )
    if alike.unread:
        said.append(f"{alike.unread} of {alike.count} tensors cannot be read here")
    if alike.more:
        said.append(f"{alike.more} of {alike.count} tensors are new, as adapters are")
    return tuple(said) or (() if alike.same else ("its weights are not the same bit for bit",))


def _dtype(site: AttentionSite) -> str:
    return str(site.dtype).removeprefix("torch.")


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:2]) + (f" and {len(listed) - 2} more" if len(listed) > 2 else "")
