"""Compiles every kernel for real GPUs without one, and compares what it takes with the budget: `make aot`.

    python -m lit_peft.kernels.aot [--write] [MODULE ...]

Each module of this folder with kernels lists `BUILDS`. For every build and target: registers, bytes spilled, shared
memory, and which of the target's tensor-core instructions it uses. A file in `budgets/` holds them for each module, by
version of Triton; a build that takes more, spills, or does not fit fails. Works without torch.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lit_peft.kernels.build import Build

FOLDER = Path(__file__).parent
BUDGETS = FOLDER / "budgets"
# compute capability -> the most shared memory of one block, and its tensor-core instructions, the best first
TARGETS = {
    80: (166_912, ("mma.sync",)),
    90: (232_448, ("wgmma", "mma.sync")),
    100: (232_448, ("tcgen05.mma", "mma.sync")),
}
SLACK = 8  # registers: another ptxas may take a few more


class NoDevice:
    """Stands for Triton's driver: a target to compile for, and nothing to run on."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        """Return what is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """Return a number for it: another for each target, as Triton keeps what it compiled by this number."""
        return int(self.target.arch)

    def get_current_stream(self, device: int | None = None) -> int:
        """Return a number for a stream, which is never used."""
        return 0


class Pointer:
    """Stands for a tensor that begins at a multiple of 16 bytes."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        """Return an address that is a multiple of 16."""
        return 0


def names() -> list[str]:
    """Return the modules of this folder that hold kernels."""
    found = (module.name for module in pkgutil.iter_modules([str(FOLDER)]))
    return sorted(name for name in found if "@triton.jit" in (FOLDER / f"{name}.py").read_text() and name != "aot")


def builds(name: str) -> list[Build]:
    """Return the builds of a module."""
    return list(import_module(f"lit_peft.kernels.{name}").BUILDS)


def compiled(build: Build, capability: int) -> dict[str, Any]:
    """Return what a build takes on a target.

    Raises:
        RuntimeError: if no assembler accepts the program.
    """
    driver.set_active(NoDevice(capability))
    arguments = {
        key: Pointer(value) if isinstance(value, triton.language.dtype) else value
        for key, value in build.arguments.items()
    }
    kernel = build.kernel.warmup(**arguments, **build.options, grid=(1,))
    return {
        **_assembled(kernel.asm["ptx"], capability),
        "shared": kernel.metadata.shared,
        **_products(kernel.asm["ptx"], capability),
    }


def _assembled(program: str, capability: int) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(program)
        for tool in ("ptxas", "ptxas-blackwell"):  # the older one does not know newer programs
            if not (tools / tool).exists():
                continue
            target = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
            done = subprocess.run(
                [tools / tool, "-v", target, source, "-o", "/dev/null"], capture_output=True, text=True, check=False
            )
            said = done.stderr
            used, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
            if done.returncode == 0 and used and spilled:
                return {"registers": int(used[1]), "spilled": int(spilled[1])}
    raise RuntimeError(f"no assembler of this Triton accepts the program: {said.strip()[-300:]}")


def _products(program: str, capability: int) -> dict[str, str]:
    used = next((name for name in TARGETS[capability][1] if name in program), None)
    return {"products": used} if used else {}


def complaints(build: Build, capability: int, found: dict[str, Any], allowed: dict[str, Any] | None) -> Iterator[str]:
    """Yield what is wrong with what a build takes, against what the budget allows it."""
    where = f"{build.name} on sm_{capability}"
    if found["spilled"]:
        yield f"{where} spills {found['spilled']} bytes"
    if found["shared"] > TARGETS[capability][0]:
        yield f"{where} needs {found['shared']} bytes of shared memory, and {TARGETS[capability][0]} are there"
    if build.products and "products" not in found:
        yield f"{where} uses no tensor cores"
    if allowed is None:
        yield f"{where} has no budget. Run: python -m lit_peft.kernels.aot --write"
    elif found["registers"] > allowed["registers"] + SLACK or found["shared"] > allowed["shared"]:
        yield f"{where} takes {found}, and its budget is {allowed}"
    elif found.get("products") != allowed.get("products"):
        yield f"{where} multiplies with {found.get('products')}, and its budget says {allowed.get('products')}"


def written(budget: dict[str, Any]) -> str:
    """Return a module's budget as JSON, one line for each build and target: a change is read at a glance."""
    text = json.dumps(dict(sorted(budget.items())), indent=1)
    return (
        re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda match: "{" + re.sub(r"\s+", " ", match[1]) + "}", text) + "\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compile, compare or write; return 1 if a budget does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_peft.kernels.aot", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(names())}; default: all")
    parser.add_argument("--write", action="store_true", help="write what is found as the new budget of this Triton")
    args = parser.parse_args(arguments)
    wrong: list[str] = []
    for module in args.modules or names():
        file = BUDGETS / f"{module}.json"
        budget: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        mine = budget.get(triton.__version__, {})
        found: dict[str, Any] = {}
        for build in builds(module):
            found[build.name] = {f"sm_{target}": compiled(build, target) for target in TARGETS}
            for target in TARGETS:
                taken = found[build.name][f"sm_{target}"]
                allowed = taken if args.write else mine.get(build.name, {}).get(f"sm_{target}")
                wrong += [f"{module}: {said}" for said in complaints(build, target, taken, allowed)]
        if args.write:
            BUDGETS.mkdir(exist_ok=True)
            file.write_text(written(budget | {triton.__version__: found}))
        print(f"{module}: {len(found)} builds for {len(TARGETS)} targets, Triton {triton.__version__}", flush=True)
    for said in wrong:
        print(said, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
