"""One thread for the tests: their tensors are tiny, and several threads waiting for each other are slower than one.

Without a CUDA device, Triton's kernels run in its interpreter; it must be told before it is imported.
"""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
