"""What the process gives back to the system."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

HOLES = """
import asyncio, contextlib
from bridged import memory

def resident_mb():
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * 4096 / 1e6

async def holes():
    memory._TRIM_S = 0.1
    kept = [bytes(100_000) for _ in range(1_000)][::10]
    with_holes = resident_mb()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(memory.keep_small(), 1)
    return with_holes, resident_mb(), len(kept)

print(*asyncio.run(holes()))
"""


def test_holes_go_back_to_the_system():
    """What a burst leaves between blocks that are in use isn't kept for ever. A process of its own, whose heap is known."""
    ran = subprocess.run(
        [sys.executable, "-c", HOLES], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    with_holes, without, _ = map(float, ran.stdout.split())
    assert with_holes - without > 40  # MB, of 90


CONNECTIONS = """
import gc
from bridged import memory

memory.only_grows()
memory.settle()
full = []
gc.callbacks.append(lambda phase, info: full.append(phase) if info["generation"] == 2 else None)
kept = [[number] for number in range(400_000)]  # as tracked by the collector as 4,000 connections are
print(len(full), len(kept))
"""


def test_thousands_of_new_connections_stop_nobody_for_a_look_at_all_objects():
    """With 5,000 connections such a look takes 250 ms, and each wave of new ones would bring another."""
    ran = subprocess.run(
        [sys.executable, "-c", CONNECTIONS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.split() == ["0", "400000"]
