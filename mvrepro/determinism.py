"""The same bits twice: what must be set before torch starts, and what after.

The instruction-set caps make x86 processors of different makes compute the same float32 sums (none of
them alone does). MKL's cosine, which A-Softmax alone needs, differs between processors all the same, as do other
architectures and GPUs, so results are compared by tolerance.
"""

import os
import random

# Read when the libraries start, so the command line, the Makefile and the runner of notebooks set them first.
CAPS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
# what glibc gives back to the system, the next step takes again page by page: a twentieth of the time
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
ENVIRONMENT = {**CAPS, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONHASHSEED": "0"}


def environment(threads: int, *, portable: bool = True) -> dict[str, str]:
    """This process's environment with the settings above and a fixed number of threads.

    portable: with the caps; without them the bits are those of one kind of processor, a quarter sooner.
    """
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    found = {**os.environ, **ENVIRONMENT, **ALLOCATION, **count}
    return found if portable else {name: value for name, value in found.items() if name not in CAPS}


def set_environment(threads: int, *, portable: bool = True) -> None:
    """`environment` for this process, and for those that it starts; before it loads the libraries."""
    wanted = environment(threads, portable=portable)
    for name in CAPS:  # which make exports
        os.environ.pop(name, None)
    os.environ.update(wanted)


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
    # nothing here reads memory before it is written, and filling it took a sixth of the time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
