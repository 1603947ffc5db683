"""Make a CUDA build of PyTorch smaller where no GPU will ever be: run by the environment's own interpreter.

The loader refuses to import such a build unless the libraries that it is linked against are there. They stay; what is
loaded only on demand (most of cuDNN, cuSOLVER), headers, and Triton go. No file is changed. A package that keeps no
library is removed whole, so that the SBOM does not name it. A build without CUDA is left as it is.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

REMOVABLE = re.compile(r"(nvidia-.+|triton)", re.IGNORECASE)
LINKED_AT_IMPORT = ("libtorch_python.so", "libtorch_global_deps.so")
KEPT_BESIDE = re.compile(r"dist-info/|licen[cs]e|notice", re.IGNORECASE)


def linked_libraries(torch: Path) -> set[Path]:
    """Real paths of everything that importing ``torch`` makes the loader open."""
    found: set[Path] = set()
    for name in LINKED_AT_IMPORT:
        said = subprocess.run(
            ["/usr/bin/ldd", str(torch / "lib" / name)], capture_output=True, text=True, check=True
        ).stdout
        if "not found" in said:
            raise SystemExit(f"{name} is linked against what is not there:\n{said}")
        found |= {Path(path).resolve() for path in re.findall(r"=> (/\S+)", said)}
    return found


def remove_unlinked(package: metadata.Distribution, linked: set[Path]) -> int:
    """Remove the files of ``package`` that are not linked, all of them if none is; bytes freed."""
    files = [Path(str(package.locate_file(each))) for each in package.files or []]
    present = [path for path in files if path.is_file()]
    keeps = any(path.resolve() in linked for path in present)
    freed = 0
    for path in present:
        if keeps and (path.resolve() in linked or KEPT_BESIDE.search(str(path))):
            continue
        freed += path.stat().st_size
        path.unlink()
    return freed


def remove_empty_folders(root: Path) -> None:
    """Remove every folder below ``root`` that holds nothing."""
    for folder in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def main() -> int:
    """Slim the environment of this interpreter, then prove that PyTorch still trains in it."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("PyTorch is not installed")
    torch = Path(spec.origin).parent
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        sys.stdout.write("a build without CUDA: nothing to remove\n")
        return 0
    linked = linked_libraries(torch)
    packages = [each for each in metadata.distributions() if REMOVABLE.fullmatch(each.metadata["Name"])]
    freed = sum(remove_unlinked(package, linked) for package in packages)
    remove_empty_folders(torch.parent)
    trial = (
        "import torch, torchvision; m = torch.nn.Conv2d(3, 4, 3); m(torch.randn(2, 3, 8, 8)).sum().backward();"
        "torch.linalg.eigh(torch.eye(4)); torch.fft.fft(torch.ones(8)); assert not torch.cuda.is_available()"
    )
    subprocess.run([sys.executable, "-c", trial], check=True)
    sys.stdout.write(f"freed {freed / 1e6:.0f} MB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
