"""Builds the C++ kernels (`native/`) into the package when there is a compiler; the metadata is in pyproject.toml.

The result is no Python module but a plain shared library that `sensorium.kernels.cpu.library` opens with ctypes, so
neither Python's nor torch's version matters to it. Without a compiler the package installs all the same.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
COMMON = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
# The order matters to the linker: of an inline function that several files contain it keeps the first, which must be
# the one that every processor can run.
SOURCES = {
    "native/sensorium.cpp": [],
    "native/isa_portable.cpp": [],
    "native/isa_avx2.cpp": AVX2 if X86 else [],
    "native/isa_avx512.cpp": AVX512 if X86 else [],
    "native/isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"] if X86 else [],
}


class BuildKernels(build_ext):
    """Compiles every source with its own flags."""

    def build_extension(self, ext: Extension) -> None:
        objects = [
            built
            for source, flags in SOURCES.items()
            for built in self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=[*COMMON, *flags], depends=ext.depends
            )
        ]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, target_lang="c++", build_temp=self.build_temp)


setup(
    ext_modules=[
        Extension(
            "sensorium.kernels.cpu._native",
            sources=list(SOURCES),
            language="c++",
            optional=True,
            depends=sorted(str(path) for pattern in ("*.h", "*.inc") for path in Path("native").glob(pattern)),
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
