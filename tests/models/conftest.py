"""One thread per process: these models are small, and several test processes may share the machine."""

import torch

torch.set_num_threads(1)
