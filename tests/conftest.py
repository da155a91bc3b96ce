"""One thread, no network, one seed: what every test needs to be fast and repeatable."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():  # then Triton's kernels run in its interpreter; before it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

# the models are so small that handing work to a second thread costs more than the work
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    torch.manual_seed(0)
    return 0
