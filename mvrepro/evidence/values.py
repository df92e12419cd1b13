"""Two nested values side by side, down to the numbers and words in them."""

from collections.abc import Iterator
from typing import Any


def leaves(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """(place, old, new) for each leaf; where the two differ in shape, the whole differing parts are one leaf.

    An item of a list is named by its "id" where it has one, else by its number.
    """
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            yield from leaves(old[key], new[key], f"{where}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            name = a["id"] if isinstance(a, dict) and "id" in a else i
            yield from leaves(a, b, f"{where}[{name}]")
    else:
        yield where, old, new
