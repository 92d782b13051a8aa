"""What all tests share: the path to the scripts, the number of threads, the `gpu` marker.

Two threads at most: a test that runs a script on a tiny model in this process leaves one, see
model.set_threads. Hypothesis has no deadline: on a shared machine the time of an example says little about
the code.
"""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before ssm_scan.py defines its kernels
sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(min(2, torch.get_num_threads()))
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU, skipped elsewhere")

def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
