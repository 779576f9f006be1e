"""What the build checks of the libraries it makes (csrc/core/one_owner.sh)."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "csrc/core/one_owner.sh"
COMPILER, AR, NM = (shutil.which(name) for name in ("c++", "ar", "nm"))


@pytest.mark.skipif(not (COMPILER and AR and NM), reason="a compiler and binutils are needed")
@pytest.mark.parametrize(
    ("files", "symbol"),
    [
        ({"kernels_a": "struct A", "kernels_b": "struct B"}, None),
        ({"kernels_a": "int", "kernels_b": "int"}, "_Z5twiceIiEvv"),
        ({"kernels_a": "struct A", "run": "struct A"}, "_Z5twiceI1AEvv"),
        ({"network": "int", "run": "int", "kernels_a": "struct A"}, None),
    ],
    ids=["apart", "of two instruction sets", "of one and another file", "of other files"],
)
def test_functions_of_one_instruction_set(files: dict[str, str], symbol: str | None, tmp_path: Path) -> None:
    for name, argument in files.items():
        source = f"template <class T> __attribute__((noinline)) void twice() {{}} template void twice<{argument}>();"
        (tmp_path / f"{name}.cpp").write_text(source)
        subprocess.run([COMPILER, "-O2", "-c", f"{name}.cpp"], cwd=tmp_path, check=True)
    subprocess.run([AR, "rc", "core.a", *(f"{name}.o" for name in files)], cwd=tmp_path, check=True)
    run = subprocess.run(["sh", SCRIPT, NM, tmp_path / "core.a"], capture_output=True, text=True)
    assert run.returncode == (symbol is not None), run.stderr
    if symbol is not None:
        assert run.stderr.split()[-1] == symbol
    assert subprocess.run(["sh", SCRIPT, NM, tmp_path / "none.a"], capture_output=True).returncode != 0
