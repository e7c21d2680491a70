"""The graph of what is declared: names, the needs behind them, and what does not add up.

A need may be declared after those that need it. A cycle is refused by the declaration that would
close it, a name that nobody has declared when the manager is entered: before anything is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from failures import DependencyCycle, UnknownResource
from openings import Resource, inferred_needs, is_sync
from owners import ABANDONED, FAILED, Owner

NAME = re.compile(r"[^\x00-\x1f]{1,128}")


class Graph:
    """Owners by name, linked to those they need."""

    def __init__(self) -> None:
        self.by_name: dict[str, Owner] = {}
        self.needs: dict[str, tuple[str, ...]] = {}  # by name, also what is not declared yet
        self.in_order = True  # needs were always declared before those that need them
        self._awaited: dict[str, list[Owner]] = {}  # who needs what is not declared yet

    def link(self, owner: Owner, names: tuple[str, ...]) -> None:
        """Join; DependencyCycle if that would close one."""
        waiting = self._awaited.get(owner.name, ())
        if owner.name in names or (waiting and names):
            self._refuse_cycle(owner.name, names)
        self.by_name[owner.name] = owner
        self.needs[owner.name] = names
        for name in names:
            need = self.by_name.get(name)
            if need is None:
                self._awaited.setdefault(name, []).append(owner)
                self.in_order = False
            else:
                owner.needs.append(need)
                need.dependents.append(owner)
        if waiting:
            del self._awaited[owner.name]
            for dependent in waiting:
                dependent.needs.append(owner)
                owner.dependents.append(dependent)

    def forget(self, owner: Owner) -> None:
        """A late one that failed is no part of the graph; its name can be used again."""
        left_out = owner.optional and owner.state in (FAILED, ABANDONED)
        if self.by_name.get(owner.name) is owner and not left_out:
            for need in owner.needs:
                need.dependents.remove(owner)
            del self.by_name[owner.name]
            self._awaited.clear()

    def _refuse_cycle(self, start: str, names: tuple[str, ...]) -> None:
        """Look for a way back to the start; no recursion, chains may be long."""
        came_from: dict[str, str] = dict.fromkeys(reversed(names), start)
        stack = list(names)
        while stack:
            name = stack.pop()
            if name == start:
                path = [start]
                step = came_from[start]
                while step != start:
                    path.append(step)
                    step = came_from[step]
                cycle = [start, *reversed(path[1:]), start]
                raise DependencyCycle(
                    "Resources need each other in a circle: " + " -> ".join(cycle), cycle=cycle
                )
            for need in self.needs.get(name, ()):
                if need not in came_from:
                    came_from[need] = name
                    stack.append(need)

    def refuse_unknown(self, known_outside: Callable[[str], bool]) -> None:
        """UnknownResource if something is needed that is declared neither here nor around."""
        for name, users in self._awaited.items():
            if not known_outside(name):
                raise UnknownResource(
                    f"{users[0].name!r} needs {name!r}, which is not declared. Declared are: "
                    + (", ".join(self.by_name) or "none")
                )

    def free_name(self, resource: Any, name: str | None) -> str:
        """The name as given, if it is free, or one made of what the resource calls itself."""
        if name is not None:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError("A resource name is a string of 1 to 128 printable characters.")
            if name in self.by_name:
                raise ValueError(f"A resource named {name!r} exists already: choose another name.")
            return name
        given = getattr(resource, "name", None)
        if not isinstance(given, str) or not NAME.fullmatch(given):
            given = getattr(resource, "__name__", None) or type(resource).__name__.lstrip("_")
            given = "resource" if given == "<lambda>" else given
        candidate, number = given, 2
        while candidate in self.by_name:
            number = max(number, len(self.by_name))
            candidate, number = f"{given}-{number}", number + 1
        return candidate


def needs_of(resource: Any, needs: Any) -> tuple[str, ...]:
    """The names of what it needs: as given, or as it says itself."""
    if isinstance(needs, str):
        needs = (needs,)
    if needs:
        return tuple(need if isinstance(need, str) else need.name for need in needs)
    if isinstance(resource, Resource):
        return tuple(resource.needs)
    if callable(resource) and not is_sync(resource) and not hasattr(resource, "__aenter__"):
        return inferred_needs(resource)
    return ()
