"""Build: the compiled extension, and foldcp.pth in site-packages; the rest is in pyproject.toml.

The extension needs torch at build time. An isolated build does not download it (gigabytes) but
takes the one of the environment that pip installs into; other torch of 2.11 or newer can load the
result. toolchain.py decides what is built. What does not compile is left out and said, unless
FOLDCP_BUILD_CUDA=1 demands the CUDA part; 0 leaves that out. TORCH_CUDA_ARCH_LIST chooses chips.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

from distutils.command.install_data import install_data  # isort: skip  # provided by setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder on the path
import toolchain  # noqa: E402

VERSION = re.findall(r'"(.+)"$', (ROOT / "foldcp/_version.py").read_text(), re.M)[-1]
NAME = "foldcp_kernels._C"
PARTS = ("sources", "include_dirs", "library_dirs", "libraries", "extra_compile_args")
INFO = Path("foldcp_kernels", "_build_info.py")
built: list[dict[str, Any]] = []  # what is built


class InstallBesidePackages(install_data):
    """Installs data files into site-packages, the only place where Python reads .pth files.

    Regular and editable builds both run this command, so that `pip uninstall` removes the file.
    """

    def finalize_options(self) -> None:
        self.set_undefined_options("install", ("install_lib", "install_dir"), ("root", "root"))
        super().finalize_options()


class BuildWithRecord(build_py):
    """Packages what is there now, and a record of what is compiled; nothing of another build."""

    def run(self) -> None:
        for package in () if self.editable_mode else ("foldcp", "foldcp_kernels"):
            shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()
        record(ROOT if self.editable_mode else Path(self.build_lib))


class DistributionWithData(Distribution):
    """Tells editable builds that there are data files: they ask for `has_data`."""

    def has_data(self) -> bool:
        return True


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: where it lies, its folders, its release, and chips that nvcc lists."""

    home: Path
    includes: list[str]
    libraries: list[str]
    release: str
    known: tuple[int, ...]
    fault: str


def find_toolkit() -> Toolkit | None:
    """The CUDA toolkit; the nvcc on PATH may be a script that lies elsewhere."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    named = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    nvcc = next(filter(shutil.which, [*named, "nvcc", "/usr/local/cuda/bin/nvcc"]), None)
    if nvcc is None:
        return None
    nvcc = shutil.which(nvcc)
    output = _ask([nvcc, "-v", "--dryrun", "-x", "cu", "/dev/null"])
    top = re.search(r"^#\$ TOP=(.*)$", output, re.M)
    home = Path(top[1] if top else Path(nvcc).resolve().parent.parent).resolve()
    # Distributions and conda keep headers and libraries elsewhere; nvcc knows where.
    includes = [*re.findall(r'"-I([^"]+)"', output), str(home / "include"), "/usr/include"]
    libraries = [*re.findall(r'"-L([^"]+)"', output), str(home / "lib64"), str(home / "lib")]
    release = re.search(r"release (\d+\.\d+)", _ask([nvcc, "--version"]))
    fault = "" if release else f"{nvcc} does not run: repair it, or set CUDA_HOME"
    for folders, file in ((includes, "cuda_runtime.h"), (libraries, "libcudart_static.a")):
        places = [*folders, *(map(str, Path("/usr/lib").glob("*-linux-gnu")))]
        if not fault and not any(Path(folder, file).is_file() for folder in places):
            fault = f"{home} has nvcc but no {file}: install the rest, or set CUDA_HOME"
    known = re.findall(r"^sm_(\d+)$", _ask([nvcc, "--list-gpu-code"]), re.M)
    folders = [list(filter(os.path.isdir, places)) for places in (includes[:-1], libraries)]
    return Toolkit(home, *folders, release[1] if release else "", tuple(map(int, known)), fault)


def _ask(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def find_torch() -> tuple[Any, str]:
    """torch with its extension builder, or None and why; an isolated build looks past its walls."""
    for outside in (False, True):
        if outside:
            sys.path.extend(p for p in _environment() if p not in sys.path)
        try:
            import torch
            import torch.utils.cpp_extension

            return torch, ""
        except ModuleNotFoundError as error:
            if error.name != "torch":
                return None, f"torch does not import ({error}): repair it"
        except Exception as error:
            reason = toolchain.first_error("", str(error))
            return None, f"torch does not import ({type(error).__name__}: {reason}): repair it"
    return None, f"there was no torch when it was built: {toolchain.AGAIN}"


def _environment() -> list[str]:
    """Where this interpreter looks for packages when pip has put no walls around it."""
    walls = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environ = {name: value for name, value in os.environ.items() if name not in walls}
    command = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    return list(filter(os.path.isdir, done.stdout.splitlines()))


def compiler_fault() -> str:
    """Why C++20 code that includes Python.h does not compile, "" where it does."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["c++", sysconfig.get_config_var("CXX") or "g++"]
    words = next((w for w in map(shlex.split, names) if w and shutil.which(w[0])), None)
    if words is None:
        name = f"CXX={asked} was" if asked else "no C++ compiler was"
        return f"{name} not found: install g++ 10 or newer, or set CXX"
    include = sysconfig.get_path("include")
    command = [*words, *shlex.split(os.environ.get("CPPFLAGS", "")), "-std=c++20"]
    command += ["-fsyntax-only", f"-I{include}", "-x", "c++", "-"]
    code = "#include <concepts>\n#include <Python.h>\nstatic_assert(std::same_as<int, int>);\n"
    try:
        done = subprocess.run(command, input=code, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{words[0]} does not run ({error}): install g++ 10 or newer, or set CXX"
    if done.returncode == 0:
        return ""
    if "Python.h" in done.stderr:
        return f"Python.h is not in {include}: install python3-dev"
    reason = toolchain.first_error(done.stderr, done.stderr)
    return f"{words[0]} compiles no C++20 ({reason}): install g++ 10 or newer, or set CXX"


def driver() -> int:
    """Major version of CUDA that this machine's driver runs, 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value // 1000


def look(torch: Any, torch_fault: str, toolkit: Toolkit | None) -> toolchain.Facts:
    """The facts that decide."""
    return toolchain.Facts(
        mode=os.environ.get("FOLDCP_BUILD_CUDA", ""),
        chips=os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        torch=torch.__version__ if torch else "",
        torch_fault=torch_fault,
        torch_cuda=(torch.version.cuda or "") if torch else "",
        rocm=bool(torch and torch.version.hip),
        compiler_fault=compiler_fault() if torch else "",
        nvcc=toolkit.release if toolkit else "",
        nvcc_fault=toolkit.fault if toolkit else "nvcc was not found: set CUDA_HOME to a toolkit",
        known=toolkit.known if toolkit else (),
        driver=driver(),
    )


def extension(plan: toolchain.Plan, torch: Any, toolkit: Toolkit | None) -> Any:
    """The extension that a plan names."""
    cuda = toolkit if plan.parts == "cuda" else None
    return torch.utils.cpp_extension.CppExtension(  # CUDAExtension links libtorch_cuda
        NAME,
        include_dirs=[str(ROOT / "csrc"), *(cuda.includes if cuda else [])],
        library_dirs=cuda.libraries if cuda else [],
        py_limited_api=True,
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--as-needed", "-s"],
        depends=[str(p) for p in sorted((ROOT / "csrc").rglob("*.h"))],
        **toolchain.recipe(plan, VERSION),
    )


@contextmanager
def recorded() -> Iterator[Callable[[], str]]:
    """Keeps what compilers print, and still shows it."""
    with tempfile.NamedTemporaryFile(prefix="foldcp-build-") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        before = [os.dup(1), os.dup(2)]
        tee = subprocess.Popen(["tee", log.name], stdin=subprocess.PIPE)
        for stream in (1, 2):
            os.dup2(tee.stdin.fileno(), stream)

        def stop() -> str:
            while before:
                os.dup2(before[-1], len(before))
                os.close(before.pop())
            tee.stdin.close()
            tee.wait()
            return Path(log.name).read_text(errors="replace")

        try:
            yield stop
        finally:
            stop()


def builder(plan: toolchain.Plan, torch: Any, toolkit: Toolkit | None, mode: str) -> type:
    """The command that builds a plan, and what is left of it when it does not compile."""
    helper = torch.utils.cpp_extension
    if plan.parts == "cuda":
        helper.CUDA_HOME = str(toolkit.home)  # None in a CPU build of torch
        if torch.version.cuda and plan.cuda.split(".")[0] != torch.version.cuda.split(".")[0]:
            helper._check_cuda_version = lambda *_: None  # refuses what toolchain.py allowed

    class Build(helper.BuildExtension):
        def run(self) -> None:
            attempt, fresh = plan, {"inplace": self.inplace, "compiler": self.compiler}
            while attempt.parts != "none":
                self.__dict__.update(fresh)
                wanted = extension(attempt, torch, toolkit)
                for part in PARTS:
                    setattr(self.extensions[0], part, getattr(wanted, part))
                with recorded() as log:
                    try:
                        super().run()
                        break
                    except Exception as error:
                        reason = toolchain.first_error(log(), str(error))
                        attempt = toolchain.fall_back(attempt, reason)
                if mode == "1":
                    sys.exit(f"foldcp: FOLDCP_BUILD_CUDA=1, but {attempt.why}")
                tell(attempt, torch)
            if attempt.parts == "none":
                self.extensions.clear()  # of the distribution too: nobody asks for its file
            record(ROOT if fresh["inplace"] else Path(self.build_lib))

    return Build


def tell(plan: toolchain.Plan, torch: Any) -> None:
    """Say what is built; `record` has `foldcp doctor` repeat it."""
    print(f"foldcp: compiled part: {plan.line()}", file=sys.stderr, flush=True)
    built[:] = [plan.info(torch.__version__ if torch else "")]


def record(folder: Path) -> None:
    """Leave what was told last beside the modules that a folder has."""
    (folder / INFO).write_text(f'"""Facts of what setup.py built."""\n\nBUILD = {built[0]!r}\n')


def main() -> None:
    """Decide, and hand over to setuptools."""
    torch, fault = find_torch()
    toolkit = find_toolkit()
    facts = look(torch, fault, toolkit)
    try:
        plan = toolchain.decide(facts)
    except toolchain.Refused as error:
        sys.exit(f"foldcp: {error}")
    tell(plan, torch)
    compiled = plan.parts != "none"
    commands = {"build_ext": builder(plan, torch, toolkit, facts.mode)} if compiled else {}
    setup(
        version=VERSION,
        distclass=DistributionWithData,
        data_files=[("", ["foldcp.pth"])],
        ext_modules=[extension(plan, torch, toolkit)] if compiled else [],
        cmdclass={"install_data": InstallBesidePackages, "build_py": BuildWithRecord, **commands},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if compiled else {},
    )


main()
