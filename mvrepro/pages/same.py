"""Whether two values, or two printed texts, are the same."""

import itertools
import math
import re
from typing import Any

from mvrepro.evidence.values import leaves

RTOL, ATOL = 1e-6, 1e-9  # noise in the last bits passes; a short printed number such as 57.3 is exact

# A number stands alone: versions (1.10.0), names (m0.35) and units (4.2px) are text, and so are integers. An exponent
# without a point follows one digit, as Python prints it: 1234567e8 may be the hash of a commit.
_NUMBER = re.compile(
    r"(?<![\w.])[+-]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[0-9]e[+-]?[0-9]+|(?i:nan|inf))(?!\w|\.[0-9])"
)


def text_difference(recorded: str, computed: str) -> str | None:
    """What keeps two outputs from agreeing, or None: numbers agree within RTOL or ATOL, all other text exactly."""
    for was, now in itertools.zip_longest(recorded.split("\n"), computed.split("\n")):
        if was is None or now is None or _NUMBER.split(was) != _NUMBER.split(now):
            old, new = ("no such line" if line is None else repr(line) for line in (was, now))
            return f"recorded {old}, running it again gives {new}"
        for old, new in zip(_NUMBER.findall(was), _NUMBER.findall(now), strict=True):
            if not _close(old, new):
                return f"recorded {old}, running it again gives {new}, in the line {was.strip()!r}"
    return None


def _close(old: str, new: str) -> bool:
    x, y = float(old), float(new)
    if not (math.isfinite(x) and math.isfinite(y)) or (old.endswith(".") and new.endswith(".")):
        return old == new  # nan, inf, and integers before a full stop are text
    return math.isclose(x, y, rel_tol=RTOL, abs_tol=ATOL)


def difference(old: Any, new: Any, where: str, tolerance: float = 1e-6) -> str:
    """ "" where both hold the same: numbers within tolerance (relative, or absolute below 1), all else exactly."""
    for place, a, b in leaves(old, new, where):
        numbers = isinstance(a, float | int) and isinstance(b, float | int) and type(a) is not bool
        if a != b and not (numbers and abs(a - b) <= tolerance * max(1.0, abs(a))):
            return f"{place} is {a!r} there and {b!r} here"
    return ""
