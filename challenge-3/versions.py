"""Semantic versions (SemVer 2.0.0): what is one, and which of two is higher."""

import re
from dataclasses import dataclass, field
from functools import lru_cache

_NUMBER = r"(?:0|[1-9][0-9]*)"
_PRE = rf"(?:{_NUMBER}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_SEMVER = re.compile(
    rf"({_NUMBER})\.({_NUMBER})\.({_NUMBER})"
    rf"(?:-({_PRE}(?:\.{_PRE})*))?"
    r"(?:\+([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?"
)
LONGEST_VERSION = 128


@dataclass(frozen=True, order=True)
class Version:
    """A version; ordered by precedence, so that 1.0.0+a and 1.0.0+b are the same one."""

    precedence: tuple[object, ...]
    text: str = field(compare=False)
    is_release: bool = field(compare=False)

    def __str__(self) -> str:
        return self.text


@lru_cache(maxsize=4096)
def parse_version(text: object) -> Version | None:
    """The version that `text` spells, or None.

    `fullmatch`, since `$` would also accept a line end behind the version.
    """
    if not isinstance(text, str) or len(text) > LONGEST_VERSION:
        return None
    match = _SEMVER.fullmatch(text)
    if match is None:
        return None
    numbers = tuple(int(part) for part in match.group(1, 2, 3))
    pre = match[4]
    # Numbers stand below words, fewer parts below more, and no pre-release above any.
    rank: tuple[object, ...] = (
        (1,)
        if pre is None
        else (0, *((0, int(p), "") if p.isdigit() else (1, 0, p) for p in pre.split(".")))
    )
    return Version((*numbers, rank), text, pre is None)


def default_of(versions: list[Version]) -> Version:
    """The highest release; a pre-release only where nothing was released."""
    releases = [version for version in versions if version.is_release]
    return max(releases or versions)
