"""The same bits twice: what must be set before torch starts, and what after.

The instruction-set caps make x86 processors of different makes compute the same float32 sums (none of
them alone does); other architectures and GPUs differ, so results are compared by tolerance anyway.
"""

import os
import random

# Read when the libraries start, so the command line, the Makefile and the runner of notebooks set them first.
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTHONHASHSEED": "0",
}


def environment(threads: int) -> dict[str, str]:
    """This process's environment with the settings above and a fixed number of threads."""
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**os.environ, **ENVIRONMENT, **count}


def make_deterministic(seed: int, threads: int) -> None:
    """Seed every generator and let torch use deterministic algorithms only, without TF32.

    cuBLAS takes its setting at the first product of a process on a GPU: call this before it.
    """
    import numpy as np
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ENVIRONMENT["CUBLAS_WORKSPACE_CONFIG"])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (for what draws from the global generator)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
