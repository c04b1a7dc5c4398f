"""Tests run on one CPU thread and in true float32, as the runs they test do, and the GPU's kernels
in Triton's interpreter where there is no GPU."""

import os

import torch

torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # as in training
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch puts off
