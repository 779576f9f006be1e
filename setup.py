"""Runs CMake and Ninja (CMakeLists.txt describes the build); everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
        arguments = [f"-DSPIN_OUTPUT_DIR={output}", f"-DPython_EXECUTABLE={sys.executable}"]
        arguments.append(f"-DCMAKE_BUILD_TYPE={'Debug' if os.environ.get('DEBUG') == '1' else 'Release'}")
        arguments += [f"-D{name}={os.environ[name]}" for name in ("SPIN_CUDA", "SPIN_CUDA_ARCHS") if name in os.environ]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *arguments], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def copy_extensions_to_source(self):  # of an editable install
        for library in (Path(self.build_lib) / "spin_kernels").glob("*.so"):
            self.copy_file(str(library), str(ROOT / "spin_kernels"))


# One extension stands for all libraries of the build: CMake puts them side by side.
setup(ext_modules=[Extension("spin_kernels.spin_runtime", sources=[])], cmdclass={"build_ext": CMakeBuild})
