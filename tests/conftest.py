from __future__ import annotations

import os

import torch

# Two threads wherever the tests run: enough to show races and reductions that depend on the split.
torch.set_num_threads(min(2, os.cpu_count() or 1))
