"""Run nvcc, and fail where ptxas tells of slow code: memory in place of registers, products one after the other.

Of the first ptxas would only warn and of the second only inform. Either makes a kernel another one than was measured.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
SERIAL = re.compile(r"\(C75\d\d\) .*")  # what ptxas has to say of wgmma; it names the function itself


def complaints(told: str) -> list[str]:
    """What must not be in ptxas's report of every function (``-v``), each with the function and its architecture."""
    found, function = [], "a function"
    for line in told.splitlines():
        if entry := ENTRY.search(line):
            function = f"{entry[1]} ({entry[2]})"
        memory = MEMORY.search(line)
        if memory is not None and any(map(int, memory.groups())):
            found.append(f"{function}: {memory[0]}")
        if serial := SERIAL.search(line):
            found.append(serial[0])
    return found


def main() -> None:
    """Run the command that the arguments make up."""
    done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    if done.returncode != 0:
        sys.exit(done.returncode)
    if found := complaints(done.stdout):
        Path(sys.argv[sys.argv.index("-o") + 1]).unlink()  # else it would pass for built the next time
        sys.exit("\n".join(["error: slow kernels; pyproject.toml names compilers that make none of these:", *found]))


if __name__ == "__main__":
    main()
