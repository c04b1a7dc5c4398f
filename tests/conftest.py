"""Tests run on one CPU thread, as the runs they test do."""

import torch

torch.set_num_threads(1)
