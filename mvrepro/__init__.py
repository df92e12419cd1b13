"""mvrepro: a replication of MV-Softmax (AAAI 2020, arXiv 1912.00833): losses, heads, training, protocols.

>>> from mvrepro import LOSSES, MarginHead
>>> head = MarginHead("MV-AM-Softmax-a", embedding_dim=512, num_classes=1000)
>>> loss = head(torch.randn(8, 512), torch.arange(8))

Imports nothing until it is asked: `python -m mvrepro --help` needs no torch.
"""

import importlib
import sys
from typing import Any

__version__ = "0.2.0"
__all__ = ["LOSSES", "MarginHead", "ShardedHead"]

_PUBLIC = {"LOSSES": "losses", "MarginHead": "heads", "ShardedHead": "heads"}

# Modules of version 0.1, and where what they had is now.
_TABLE = """
fused:heads.sweep sharded:heads.sharded backbones:networks backbones_large:networks bridge:interchange
export:interchange data:images.small faces:images.photographs formats:images align:preparation.align
fetch:preparation.fetch
train:training scale:training tasks:training.tasks checkpoint:training.checkpoint runs:evidence.runs
stats:evidence.stats claims:evidence.claims claims_table:evidence.claims published:evidence.published
compare:evidence.compare values:evidence.compare report:pages.report plots:pages.plots notebook:pages.notebook
nbcheck:pages.check
"""
MOVED = dict(pair.split(":") for pair in _TABLE.split())


class _Moved:
    """The last in sys.meta_path, asked for what no other finds: a module that has moved says where to."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        package, _, old = name.partition(".")
        if package == "mvrepro" and old in MOVED:
            raise ImportError(f"{name} is mvrepro.{MOVED[old]} now")
        if name == "mvrepro.bench":
            raise ImportError(f"{name} is benchmarks.head now, beside the package")


sys.meta_path.append(_Moved)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"mvrepro.{_PUBLIC[name]}"), name)
    where = f": it is mvrepro.{MOVED[name]} now" if name in MOVED else ""
    raise AttributeError(f"module 'mvrepro' has no attribute {name!r}{where}")
