"""Gives pretended GPUs to every process with this folder in PYTHONPATH; its environment says how many, PRETEND_GPUS.

PRETEND_BF16=0: they know no bfloat16, and compute in fp16.
"""

import os
import sys
from pathlib import Path

if "PRETEND_GPUS" in os.environ and "multiprocessing.resource_tracker import" not in " ".join(sys.orig_argv):
    sys.path.append(str(Path(__file__).parents[1]))
    import pretend_cuda
    import pretend_nccl

    pretend_cuda.install(int(os.environ["PRETEND_GPUS"]), bf16=os.environ.get("PRETEND_BF16") != "0")
    pretend_nccl.install()
