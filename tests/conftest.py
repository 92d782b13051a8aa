"""The scripts lie one folder up, whichever way pytest is started; two threads are what the figures are measured with; and how
long an example takes says more about the machine's other work than about the code, so hypothesis sets no deadline."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined, which is when ssm_scan.py is imported
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
