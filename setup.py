"""Build: the compiled extension, and foldcp.pth in site-packages; the rest is in pyproject.toml.

The extension needs torch at build time, which an isolated build does not have (it would download
gigabytes): `pip install --no-build-isolation` builds it, plain `pip install` makes a package
without it and says so. FOLDCP_BUILD_CUDA=1 demands the CUDA part, 0 leaves it out, unset builds it
where nvcc is found. TORCH_CUDA_ARCH_LIST chooses chips.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup

from distutils.command.install_data import install_data  # isort: skip  # provided by setuptools

ROOT = Path(__file__).parent
VERSION = "0.1.0"
OLDEST_TORCH = "0x020b000000000000"  # stable interface of torch 2.11
CHIPS = "8.0+PTX;9.0a;10.0a;12.0+PTX"  # the PTX of sm_80 runs on what is not listed
HOST = ("module.c", "ops.cpp", "view.cpp", "shared_memory.cpp", "nccl.cpp", "nccl_abi.cpp")
CUDA = ("cuda_backend.cpp", "cuda_carriers.cpp", "pack.cu")


class InstallBesidePackages(install_data):
    """Installs data files into site-packages instead of the environment's root.

    Python reads .pth files only there. Regular and editable builds both run this command, so the
    file is listed in RECORD either way and `pip uninstall` removes it.
    """

    def finalize_options(self) -> None:
        self.set_undefined_options("install", ("install_lib", "install_dir"), ("root", "root"))
        super().finalize_options()


class DistributionWithData(Distribution):
    """Tells editable builds that there are data files: they ask for `has_data`."""

    def has_data(self) -> bool:
        return True


def find_cuda() -> Path | None:
    """The CUDA toolkit's folder; the nvcc on PATH may be a script that lies elsewhere."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        folder = os.environ.get(name)
        if folder and (Path(folder) / "bin" / "nvcc").exists():
            return Path(folder)
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "-v", "--dryrun", "-x", "cu", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.M)
    return Path(top[1]).resolve() if top else None


def gencode(chips: str) -> list[str]:
    """nvcc's options for a list such as "8.0;9.0a+PTX"; with any of them torch ignores the list."""
    options = []
    for chip in re.split(r"[ ;,]+", chips.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", chip)
        if found is None:
            sys.exit(f"foldcp: TORCH_CUDA_ARCH_LIST has {chip!r}; write it like {CHIPS}")
        number, variant, ptx = found[1] + found[2], found[3], found[4]
        options.append(f"-gencode=arch=compute_{number}{variant},code=sm_{number}{variant}")
        if ptx:  # of the plain chip: PTX of a variant runs on no other
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def extension() -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """What is built (for foldcp_kernels/_build_info.py), the extension and its build command."""
    mode = os.environ.get("FOLDCP_BUILD_CUDA", "")
    if mode not in ("", "0", "1"):
        sys.exit(f"foldcp: FOLDCP_BUILD_CUDA must be 0, 1 or unset, got {mode!r}")
    info: dict[str, Any] = {"built": False, "cuda": "", "chips": "", "torch": "", "why": ""}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        info["why"] = "torch was not there at build time: install with --no-build-isolation"
        if mode == "1":
            sys.exit(f"foldcp: FOLDCP_BUILD_CUDA=1, but {info['why']}")
        return info, [], {}
    cuda = None if mode == "0" else find_cuda()
    if mode == "1" and cuda is None:
        sys.exit("foldcp: FOLDCP_BUILD_CUDA=1, but nvcc was not found: set CUDA_HOME")
    chips = os.environ.get("TORCH_CUDA_ARCH_LIST") or CHIPS
    common = ["-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
    common += [f'-DFOLDCP_VERSION="{VERSION}"']
    sources, includes, folders, libraries = [*HOST], [], [], ["stdc++", "pthread", "dl"]
    if cuda is not None:
        cpp_extension.CUDA_HOME = str(cuda)  # None in a CPU build of torch
        common += ["-DFOLDCP_WITH_CUDA", "-DUSE_CUDA", f'-DFOLDCP_ARCHS="{chips}"']
        sources += CUDA
        includes, folders = [str(cuda / "include")], [str(cuda / "lib64")]
        libraries = ["cudart_static", "rt", *libraries]
        info |= {"cuda": _release(cuda), "chips": chips}
    info |= {"built": True, "torch": torch.__version__}
    if cuda is None:
        info["why"] = "FOLDCP_BUILD_CUDA=0" if mode == "0" else "nvcc was not found at build time"
    hidden = ["-fvisibility=hidden"]
    device = ["--threads", "2", "-Xcompiler", "-fvisibility=hidden", *gencode(chips)]
    made = cpp_extension.CppExtension(  # CUDAExtension links libtorch_cuda
        "foldcp_kernels._C",
        [f"csrc/{name}" for name in sources],
        include_dirs=includes,
        library_dirs=folders,
        libraries=libraries,
        py_limited_api=True,
        extra_compile_args={"cxx": [*common, *hidden], "nvcc": [*common, *device]},
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--as-needed", "-s"],
        depends=[str(p) for p in sorted((ROOT / "csrc").glob("*.h"))],
    )
    return info, [made], {"build_ext": cpp_extension.BuildExtension}


def _release(cuda: Path) -> str:
    said = subprocess.run([cuda / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    found = re.search(r"release ([\d.]+)", said.stdout)
    return found[1] if found else "unknown"


info, extensions, commands = extension()
what = "extension for CPU and CUDA" if info["cuda"] else "extension for CPU"
text = f"{what} ({info['chips'] or info['why']})" if info["built"] else f"none: {info['why']}"
print(f"foldcp: compiled part: {text}", file=sys.stderr)
(ROOT / "foldcp_kernels" / "_build_info.py").write_text(
    f'"""What setup.py built."""\n\nBUILD = {info!r}\n'
)
setup(
    version=VERSION,
    distclass=DistributionWithData,
    data_files=[("", ["foldcp.pth"])],
    ext_modules=extensions,
    cmdclass={"install_data": InstallBesidePackages, **commands},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
