"""Builds csrc/: the native library, the CUDA kernels where nvcc is, and the record of both. Metadata: pyproject.toml.

Nothing here may stop an installation. What cannot be built is left out, and daam_kernels/_build.json says why.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

PACKAGE = "daam_kernels"
LIBRARY, KERNELS, RECORD = PRODUCTS = ("_core.so", "_cuda.fatbin", "_build.json")
FATBIN = Path("csrc", "cuda", "fatbin.py")
PROGRAMS = ("compiler_so", "compiler_so_cxx", "linker_so", "linker_so_cxx")

# The sources choose instruction sets themselves. OpenMP stays out: a second pool of threads beside torch's would make
# both slow.
if sys.platform == "win32":
    COMPILE, LINK, LIBRARIES = ["/O2", "/std:c++17"], [], []
else:
    COMPILE = "-O2 -g0 -std=c++17 -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast".split()
    COMPILE.append("-Wno-psabi")  # says that vectors are passed otherwise between compilers: here they stay inside
    LINK = ["-Wl,-z,defs"] if sys.platform == "linux" else []  # what is missing fails here, not when it is loaded
    LIBRARIES = ["dl"] if sys.platform == "linux" else []


class BuildNative(build_ext):
    """Builds what it can of ``PRODUCTS``; the record always."""

    native_built = True  # until it is known better: an editable wheel asks for its tag before the build

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # _make says what may be kept

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # no Python tag: one library for all of them

    def get_export_symbols(self, ext):
        return []  # not a Python module: the header says what is exported

    def build_extension(self, ext):
        compile_all = self.compiler.compile

        def compile_at_once(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return sum(pool.map(lambda source: compile_all([source], **options), sources), [])

        self.compiler.compile = compile_at_once  # each instruction set is one long-running file
        output = Path(self.get_ext_fullpath(ext.name))
        programs = [getattr(self.compiler, name, None) for name in PROGRAMS]
        tools = [self.plat_name, programs, _compiler_version(self.compiler)]

        def make(kept):
            super(BuildNative, self).build_extension(ext)
            shutil.copy2(output, kept)

        _make(output, tools, make)

    def run(self):
        inplace, self.inplace = self.inplace, False
        built, sources = Path(self.build_lib, PACKAGE), Path(PACKAGE)
        for folder in (built, sources) if inplace else (built,):
            for name in PRODUCTS:
                (folder / name).unlink(missing_ok=True)  # an earlier build's
        built.mkdir(parents=True, exist_ok=True)
        native = _attempt(self._build_library)
        self.native_built = native["built"]
        record = {"native": native, "cuda": _attempt(lambda: self._build_kernels(built / KERNELS))}
        (built / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self.inplace = inplace
        if inplace:
            for product in self._products():
                shutil.copy2(product, sources)

    def get_outputs(self):
        return [str(product) for product in self._products()]

    def get_output_mapping(self):
        return {str(p): str(Path(PACKAGE, p.name)) for p in self._products()} if self.inplace else {}

    def _products(self):
        return [path for path in (Path(self.build_lib, PACKAGE, name) for name in PRODUCTS) if path.exists()]

    def _build_library(self):
        if os.environ.get("DAAM_KERNELS_NO_NATIVE", "0") not in ("", "0"):
            raise BaseError("it was left out on request (DAAM_KERNELS_NO_NATIVE)")
        super().run()
        return _compiler_version(self.compiler)

    def _build_kernels(self, output):
        if not self.native_built:
            raise BaseError("it is called through the native library, which was not built")
        if not FATBIN.exists():
            raise BaseError("csrc/cuda has no kernels")
        nvcc = _find_nvcc()
        if nvcc is None:
            raise BaseError("nvcc was not found")
        lines = _output([nvcc, "--version"]).splitlines()
        version = next((line for line in lines if "release" in line), "of an unknown release")
        command = runpy.run_path(str(FATBIN))["command"]
        _make(output, [nvcc, version], lambda kept: subprocess.run(command(nvcc, str(kept)), check=True))
        return f"nvcc: {version}"


class Wheel(bdist_wheel):
    """One wheel for every Python and torch of a platform; for every platform where no library was built."""

    def get_tag(self):
        self.root_is_pure = not self.get_finalized_command("build_ext").native_built
        return ("py3", "none", super().get_tag()[2])


def _make(output, tools, make):
    """Lets make(kept) write a file, unless it did so before from the same sources with the same tools; copies it.

    setuptools looks at times alone, and would keep what another compiler or other flags made.
    """
    kept = Path("build", "native", output.name)
    note = kept.with_suffix(".sha256")
    digest = sha256(repr(tools).encode())
    for path in (*SOURCES, *DEPENDS, __file__):
        digest.update(f"\0{path}\0".encode() + Path(path).read_bytes())
    if not (kept.exists() and note.exists() and note.read_text() == digest.hexdigest()):
        kept.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        make(kept)
        note.write_text(digest.hexdigest())
    shutil.copy2(kept, output)


def _attempt(build):
    try:
        return {"built": True, "detail": build()}
    except Exception as error:  # a compiler's name, flags and output may be anything
        expected = isinstance(error, (BaseError, CCompilerError, OSError))
        detail, cause = str(error) if expected else repr(error), error
        while cause is not None and not isinstance(cause, subprocess.CalledProcessError):
            cause = cause.__cause__ or cause.__context__  # setuptools' own words quote the whole command
        if cause is not None:
            detail = f"{cause.cmd[0]} failed with exit code {cause.returncode} (pip install -v shows what it printed)"
        print(f"{PACKAGE}: not built: {detail}", file=sys.stderr)
        return {"built": False, "detail": detail}


def _output(command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, errors="replace").stdout


def _compiler_version(compiler):
    if compiler.compiler_type != "unix":
        return compiler.compiler_type
    command = getattr(compiler, "compiler_so_cxx", compiler.compiler_so)
    programs = takewhile(lambda word: not word.startswith("-"), command)  # a launcher may come before the compiler
    return next(iter(_output([*programs, "--version"]).splitlines()), "a compiler of an unknown version")


def _find_nvcc():
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    in_toolkits = (shutil.which("nvcc", path=os.path.join(toolkit, "bin")) for toolkit in toolkits if toolkit)
    return shutil.which("nvcc") or next(filter(None, in_toolkits), None)


def _sources(*suffixes):
    files = (path for path in Path("csrc").rglob("*") if path.suffix in suffixes and "example" not in path.parts)
    return sorted(path.as_posix() for path in files)


SOURCES = _sources(".cpp")
DEPENDS = _sources(".h", ".cuh", ".cu", ".py")
library = Extension(
    f"{PACKAGE}.{Path(LIBRARY).stem}",
    sources=SOURCES,
    depends=DEPENDS,
    include_dirs=["csrc"],
    extra_compile_args=COMPILE,
    extra_link_args=LINK,
    libraries=LIBRARIES,
    language="c++",
)
setup(ext_modules=[library], cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
