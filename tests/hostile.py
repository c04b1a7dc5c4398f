"""What tests of hostile input share: a limit on memory, and what lies outside."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def held_to(megabytes: int, code: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The code in a process of its own that gets no more memory than that on top of its imports,
    which `from ...` lines at the code's start are; sys.argv[1:] are the words."""
    lines = code.strip().splitlines()
    first = [line for line in lines if line.startswith(("from ", "import "))]
    limit = [
        "import resource, sys",
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()",
        f"resource.setrlimit(resource.RLIMIT_AS, (size + ({megabytes} << 20),) * 2)",
    ]
    text = "\n".join([*first, *limit, *(line for line in lines if line not in first)])
    return subprocess.run([sys.executable, "-c", text, *map(str, words)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, check=False)  # fmt: skip


def everything(folder: Path) -> dict[str, bytes | str]:
    """What lies in a folder, links by where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink()
        else path.read_bytes() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }  # fmt: skip


def peak() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
