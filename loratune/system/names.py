"""What a misspelt name may have meant."""

import difflib
from collections.abc import Iterable


def close_names(name: object, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The known names that are near, the nearest first."""
    return difflib.get_close_matches(str(name), list(known), n=most, cutoff=cutoff)


def nearest(name: object, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?`, the end of a sentence on an unknown name; "" when no known name is near."""
    near = close_names(name, known, most=most, cutoff=cutoff)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
