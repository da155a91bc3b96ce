"""Every kernel compiles for real GPUs, spills nothing, and takes no more registers and shared memory than before."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted(
    path.stem
    for path in (ROOT / "lit_peft" / "kernels").glob("*.py")
    if re.search(r"^@triton\.jit", path.read_text(), re.M)
)


@pytest.mark.parametrize("name", KERNELS)
def test_within_the_budget(name: str) -> None:
    """In a process of its own, where kernels are not interpreted."""
    quiet = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "lit_peft.kernels.aot", name],
        cwd=ROOT,
        env={**quiet, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,  # a kernel can hang the compiler
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
