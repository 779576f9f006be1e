"""What the compiler made of the CUDA kernels: registers, stack, instructions, from the built library, without a GPU.

``python bench/cuda_report.py [LIBRARY]`` prints a table and fails if a kernel spills or a product waits for another.
The disassembler comes with the triton package. A kernel's registers are those of its launch; its warps trade them
(setmaxnreg) for the numbers in csrc/cuda/mixer_shape.h, which also has the shared memory.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "spin_kernels" / "libspin_cuda.so"
SIZE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.M)


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack: int  # bytes, spills included
    instructions: Counter[str]  # without their modifiers
    products: int  # of the tensor cores
    waits: int  # batches of products that end in a wait for all before them

    @property
    def spills(self) -> int:
        return self.stack + self.instructions["LDL"] + self.instructions["STL"]


def disassembler() -> str | None:
    """cuobjdump of triton, or of the CUDA toolkit."""
    if spec := importlib.util.find_spec("triton"):
        found = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if found.exists():
            return str(found)
    return shutil.which("cuobjdump")


def kernels_of(library: Path) -> list[Kernel]:
    """Every kernel in the library, by name as C++ writes it."""

    def run(*command: str, given: str | None = None) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, input=given).stdout

    tool = disassembler()
    sizes = {name: numbers for name, *numbers in SIZE.findall(run(tool, "--dump-resource-usage", str(library)))}
    codes = re.split(r"^\s+Function : (\S+)$", run(tool, "--dump-sass", str(library)), flags=re.M)[1:]
    code = dict(zip(codes[::2], codes[1::2], strict=True))
    names = run("c++filt", given="\n".join(sizes)).splitlines()
    return sorted(
        (described(name, sizes[symbol], code[symbol]) for symbol, name in zip(sizes, names, strict=True)),
        key=lambda kernel: kernel.name,
    )


def described(name: str, size: list[str], code: str) -> Kernel:
    found = INSTRUCTION.findall(code)
    products = [operands for operation, operands in found if operation.startswith("HGMMA")]
    return Kernel(
        name=re.sub(r"^void |spin::|hopper::|\(anonymous namespace\)::|\(.*\)$", "", name),
        registers=int(size[0]),
        stack=int(size[1]),
        instructions=Counter(operation.split(".")[0] for operation, _ in found),
        products=len(products),
        waits=sum("gsb0" in operands for operands in products),
    )


def main(library: Path = LIBRARY) -> int:
    if not library.exists() or disassembler() is None:
        print(f"expected {library}, built where nvcc is, and cuobjdump, of triton or the CUDA toolkit", file=sys.stderr)
        return 2
    failed = False
    print(f"{'kernel':<44} registers  stack  instructions  tensor cores  waits  multiply-adds  loads")
    for k in kernels_of(library):
        loads = sum(k.instructions[name] for name in ("LDS", "LDG"))
        print(
            f"{k.name:<44} {k.registers:>9}  {k.stack:>5}  {k.instructions.total():>12}  {k.products:>12}"
            f"  {k.waits:>5}  {k.instructions['FFMA']:>13}  {loads:>5}"
        )
        failed |= k.spills > 0 or k.waits > 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
