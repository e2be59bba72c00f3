# SPDX-License-Identifier: Apache-2.0
"""Builds the native CPU kernels with ninja; everything else is in pyproject.toml.

Needs neither torch nor an OpenMP compiler flag: the kernels see raw pointers, and borrow the thread pool of the torch
that is loaded at run time. Each kernel source is compiled once for every instruction set and chosen on the machine
that runs it. Without a working compiler the install still succeeds; ``stoptome_kernels.backends()`` then says why the
native backend is missing.

Environment: ``CXX`` (compiler), ``STOPTOME_CXXFLAGS`` (appended, for instance ``-fsanitize=address``),
``STOPTOME_REQUIRE_NATIVE=1`` (fail without the native kernels).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU = Path("csrc/cpu")
COMMON = ["binding", "dispatch", "groups", "plan", "threads"]  # instruction-set independent
KERNELS = ["match", "merge", "norm", "conv", "attention"]  # compiled once for each instruction set
X86_64 = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
        "-Wno-maybe-uninitialized",
    ],  # GCC bug 105593: its own intrinsics trip the warning
}
# merge keeps every product and sum rounded on its own, so that all backends agree bit for bit; match, conv and
# attention gain from fma
CONTRACT = {
    "match": "-ffp-contract=fast",
    "merge": "-ffp-contract=off",
    "norm": "-ffp-contract=off",
    "conv": "-ffp-contract=fast",
    "attention": "-ffp-contract=fast",
}


def instruction_sets() -> dict[str, list[str]]:
    # macOS may build for two architectures at once, which no -m flag survives
    if platform.machine() in ("x86_64", "AMD64") and "universal2" not in sysconfig.get_platform():
        return X86_64
    return {"baseline": []}


def ninja() -> str:
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or "ninja"


def shell(path: object) -> str:
    """A path inside a command of build.ninja."""
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: object) -> str:
    """A path in a build line of build.ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes a build.ninja and runs it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        try:
            self.compile(target)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if os.environ.get("STOPTOME_REQUIRE_NATIVE"):
                raise
            target.unlink(missing_ok=True)  # of an earlier build: what does not compile must not be shipped
            detail = getattr(error, "stderr", None) or error
            print(
                f"stoptome_kernels: installing without the native CPU kernels: {str(detail).strip()[-400:]}",
                file=sys.stderr,
            )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def compile(self, target: Path) -> None:
        import pybind11

        root, temp = Path.cwd(), Path(self.build_temp).absolute()
        temp.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        asked = os.environ.get("CXX", "").replace("$", "$$")  # a command, perhaps with arguments
        compiler = asked or (shell(found) if found else "")
        if not compiler:
            raise OSError("no C++ compiler found (set CXX)")
        sets = instruction_sets()
        flags = [
            "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
            "-Wall", "-Wextra",
            *(f"-DSTK_HAVE_{name.upper()}" for name in sets),
        ]  # fmt: skip
        extra = os.environ.get("STOPTOME_CXXFLAGS", "").replace("$", "$$")
        headers = [sysconfig.get_path("include"), pybind11.get_include()]
        includes = " ".join(f"-isystem {shell(path)}" for path in headers)
        link = "-bundle -undefined dynamic_lookup"
        if sys.platform.startswith("linux"):
            link = "-shared -Wl,--as-needed,-z,relro,-z,now -ldl"  # what the loader resolves is read-only afterwards
        lines = [
            f"cxx = {compiler}",
            f"flags = {' '.join(flags)}",
            f"extra = {extra}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags $more $extra -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            f"  command = $cxx -o $out $in {link} $extra",
        ]
        objects = []

        def compile_one(name: str, source: str, more: str) -> None:
            lines.extend([f"build {name}.o: compile {escape(root / CPU / source)}.cpp", f"  more = {more}"])
            objects.append(f"{name}.o")

        for source in COMMON:
            compile_one(source, source, includes if source == "binding" else "")
        for isa, isa_flags in sets.items():
            for source in KERNELS:
                compile_one(f"{source}_{isa}", source, " ".join([*isa_flags, CONTRACT[source], f"-DSTK_ISA={isa}"]))
        lines.append(f"build {escape(target)}: link {' '.join(objects)}")
        (temp / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [ninja(), "-C", str(temp)] + (["-v"] if self.verbose else [])
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-4000:], file=sys.stderr)
            raise OSError(f"the C++ compiler failed (run with `pip install -v .` to see it): {compiler}")
        if self.verbose:
            print(done.stdout)


setup(
    ext_modules=[Extension("stoptome_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
