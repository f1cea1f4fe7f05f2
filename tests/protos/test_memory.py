"""A process is light, and gives back what it has used."""

from __future__ import annotations

import subprocess
import sys

GROWTH = """
import sys
from pathlib import Path
from umbel.memory import give_back_what_is_freed

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "frugal":
    assert give_back_what_is_freed()
before = resident()
buffers = [bytearray(b"x") * 100_000 for _ in range(200)]
pins = [bytearray(2_000) for _ in range(1_000)]  # some lie above the buffers, so that the heap can't shrink past them
del buffers
print(resident() - before)
"""
IMPORTS = """
import sys
import umbel_client.agent, umbel_client.cli, umbel_client.grpc_channel, umbel.runtime.onnx
print("importlib.metadata" in sys.modules)
"""


def told_by(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_buffers_that_are_freed_go_back_to_the_system() -> None:
    assert int(told_by(GROWTH, "frugal")) < 5_000_000
    assert int(told_by(GROWTH, "as it is")) > 15_000_000


def test_an_agent_does_not_read_package_metadata() -> None:
    """That alone would be 3 MB."""
    assert told_by(IMPORTS) == "False"
