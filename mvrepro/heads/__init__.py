"""Heads: the last layer of a face network and its loss.

margin   MarginHead, on one device: dense, or by the sweep
sharded  ShardedHead, its classes spread over ranks
sweep    the loss and its gradients without the B × K logits; both heads stand on it
chunks   what the sweep does with some of the classes at a time, on a CPU and on a GPU
"""

from mvrepro.heads.margin import MarginHead
from mvrepro.heads.sharded import ShardedHead

__all__ = ["MarginHead", "ShardedHead"]
