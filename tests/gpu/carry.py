"""Collect packages that a machine with torch and transformers may lack, for another version of Python as well.

    PYTHONPATH=.:tests python -m gpu.carry FOLDER

They are found after the machine's own ones: FOLDER/sitecustomize.py appends FOLDER/site to the path. Only packages of
Python files, and libraries that do not depend on Python's version, can be carried: of bitsandbytes, those for CUDA 13.
"""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGES = (
    *("platformdirs", "prompt_toolkit", "wcwidth", "bitsandbytes", "accelerate", "psutil", "nvidia-ml-py", "filelock"),
    *("typer", "click", "rich", "markdown-it-py", "mdurl", "pygments", "shellingham"),
    *("pytest", "pytest-xdist", "execnet", "pluggy", "iniconfig", "packaging", "hypothesis", "sortedcontainers"),
)
_LIBRARIES = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so")
_APPEND = """import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "site"))
"""


def collect(folder: Path) -> list[str]:
    """Copy the packages, and return the names of those that are not installed here."""
    site, missing = folder / "site", list[str]()
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(_APPEND)
    for name in PACKAGES:
        try:
            files = distribution(name).files or ()
        except PackageNotFoundError:
            missing.append(name)
            continue
        for file in files:
            if ".." not in file.parts and "__pycache__" not in file.parts and _is_carried(file.name):
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(str(file.locate())), site / file)
    return missing


def _is_carried(name: str) -> bool:
    return name in _LIBRARIES or ".abi3." in name or not name.endswith(".so")


if __name__ == "__main__":
    lacking = collect(Path(sys.argv[1]))
    size = sum(each.stat().st_size for each in Path(sys.argv[1]).rglob("*") if each.is_file())
    print(f"{size / 2**20:.0f} MiB in {sys.argv[1]}; not installed here: {', '.join(lacking) or 'none'}")
