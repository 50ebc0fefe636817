"""One thread for the tests: their tensors are tiny, and several threads waiting for each other are slower than one."""

import torch

torch.set_num_threads(1)
