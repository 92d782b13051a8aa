"""The scripts lie one folder up, whichever way pytest is started; two threads are what the figures are measured with."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(min(2, torch.get_num_threads()))
