"""The scripts lie one folder up, whichever way pytest is started; two threads are what the figures are measured with; and how
long an example takes says more about the machine's other work than about the code, so hypothesis sets no deadline."""

import sys
from pathlib import Path

import hypothesis
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(min(2, torch.get_num_threads()))
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
