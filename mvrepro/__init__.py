"""mvrepro: a replication of MV-Softmax (AAAI 2020, arXiv 1912.00833): losses, heads, training, protocols."""

__version__ = "0.1.0"
