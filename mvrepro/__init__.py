"""mvrepro: a replication of MV-Softmax (AAAI 2020, arXiv 1912.00833): losses, heads, training, protocols.

>>> from mvrepro import LOSSES, MarginHead
>>> head = MarginHead("MV-AM-Softmax-a", embedding_dim=512, num_classes=1000)
>>> loss = head(torch.randn(8, 512), torch.arange(8))

Imports nothing until it is asked: `python -m mvrepro --help` needs no torch.
"""

import importlib
from typing import Any

__version__ = "0.2.0"
__all__ = ["LOSSES", "MarginHead", "ShardedHead"]

_PUBLIC = {"LOSSES": "losses", "MarginHead": "heads.margin", "ShardedHead": "heads.sharded"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"mvrepro.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'mvrepro' has no attribute {name!r}")
