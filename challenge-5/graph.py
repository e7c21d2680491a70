"""Who waits for whom: only edges between unfinished tasks are in memory, as numbers."""

from collections.abc import Iterable, Mapping

from errors import CyclicDependency

SHOWN = 10  # tasks of a cycle


class Graph:
    """Counts what each pending task still waits for: its unfinished parents, and its time."""

    def __init__(self) -> None:
        self._waiting: dict[int, int] = {}
        self._children: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, child: int, parents: Iterable[int], *, for_time: bool = False) -> None:
        """A task waits for these parents, and for its time."""
        number = int(for_time)
        for parent in parents:
            self._children.setdefault(parent, []).append(child)
            number += 1
        self._waiting[child] = self._waiting.get(child, 0) + number

    def met(self, child: int) -> bool:
        """One thing that it waited for has come; True when that was the last."""
        left = self._waiting.get(child, 0) - 1
        if left > 0:
            self._waiting[child] = left
        return left == 0 and self._waiting.pop(child, None) is not None

    def drop(self, child: int) -> None:
        """It waits no more."""
        self._waiting.pop(child, None)

    def has_children(self, parent: int) -> bool:
        """Does anything wait for it?"""
        return parent in self._children

    def leave(self, parent: int) -> list[int]:
        """The parent has ended; these waited for it and wait still for their other parts."""
        return [c for c in self._children.pop(parent, ()) if c in self._waiting]


def check_acyclic(parents: Mapping[str, Iterable[str]]) -> None:
    """Raise CyclicDependency naming the cycle if tasks of a batch wait for each other."""
    done: set[str] = set()
    for start in parents:
        if start in done:
            continue
        path: list[str] = []
        on_path: set[str] = set()
        stack: list[tuple[str, bool]] = [(start, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                on_path.discard(path.pop())
                done.add(node)
                continue
            if node in done:
                continue
            path.append(node)
            on_path.add(node)
            stack.append((node, True))
            for parent in parents[node]:
                if parent in on_path:
                    cycle = [*path[path.index(parent) :], parent]
                    if len(cycle) == 2:
                        raise CyclicDependency(
                            f"Task {parent!r} depends on itself. Nothing was submitted."
                        )
                    raise CyclicDependency(
                        f"These tasks wait for each other: {_shown(cycle)}. Nothing was submitted."
                    )
                if parent in parents and parent not in done:
                    stack.append((parent, False))


def _shown(cycle: list[str]) -> str:
    names = [repr(each) for each in cycle]
    if len(names) > SHOWN:
        names[SHOWN // 2 : -SHOWN // 2] = [f"… {len(names) - SHOWN:,} more …"]
    return " -> ".join(names)
