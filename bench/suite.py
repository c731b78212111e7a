"""All benchmarks of speed, in a sensible order and of modest length, each with its figures in a file of its own.

    python -m bench all              some ten minutes
    python -m bench all --full       the figures of bench/README.md: an hour of soak, 10 million events, five runs each
    python -m bench report           the page, from those files

First what runs in one process and shows whether the machine is quiet, then what needs all of it.
"""

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench import page
from bench.processes import PROJECT, ended_by_signals

# What is run: options of the modest suite, and of the full one.
STEPS: Final[dict[str, tuple[Sequence[str], Sequence[str]]]] = {
    "pace": (["--runs", "20"], ["--runs", "200"]),
    "floor": (["--runs", "3"], ["--runs", "5"]),
    "decode": (["--runs", "3"], ["--runs", "5"]),
    "mapping": (["--runs", "3"], ["--runs", "5"]),
    "spool": (["--runs", "1", "--seconds", "0.5"], ["--runs", "5"]),
    "path": (["--runs", "3", "--seconds", "3"], ["--runs", "5"]),
    "latency": (["--runs", "1", "--seconds", "8"], ["--runs", "5", "--seconds", "20"]),
    "scale": (["--runs", "1"], ["--runs", "5", "--seconds", "4"]),
    "backlog": (["--events", "2000000", "--shrink-seconds", "90"], ["--runs", "3"]),
    "memory": (["--runs", "1", "--hours", "0.03"], ["--runs", "5"]),
    "peers": (["--runs", "1"], ["--runs", "5"]),
}
_END_S = 60.0


def main(argv: Sequence[str]) -> int:
    """Runs them, then makes the page. 1 when one of them failed; the others go on."""
    parser = argparse.ArgumentParser(prog="python -m bench all", description=(__doc__ or "").partition("\n\n")[0])
    names = lambda text: text.split(",")  # noqa: E731  # an option's type, used once
    parser.add_argument("--only", metavar="NAME,...", type=names, default=list(STEPS), help=f"of {', '.join(STEPS)}")
    parser.add_argument("--full", action="store_true", help="some two hours: the figures of bench/README.md")
    parser.add_argument("--results", type=Path, default=page.RESULTS, help="a folder; default %(default)s")
    parser.add_argument("--page", type=Path, default=page.PAGE, help="the page's folder; default %(default)s")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.only) - set(STEPS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    failed = []
    with ended_by_signals():
        for name, options in STEPS.items():
            if name not in arguments.only or importlib.util.find_spec(f"bench.{name}") is None:
                continue
            print(f"\n== {name} ==", flush=True)
            began = time.monotonic()
            file = (arguments.results / f"{name}.json").resolve()
            # What is in the file must be of this run.
            file.unlink(missing_ok=True)
            command = [sys.executable, "-m", "bench", name, *options[arguments.full], "--json", str(file)]
            code = _run(command)
            print(f"({name}: {time.monotonic() - began:.0f} s{f', exit code {code}' if code else ''})", flush=True)
            failed += [name] if code else []
    page.main(["--results", str(arguments.results), "--page", str(arguments.page)])
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def _run(command: Sequence[str]) -> int:
    """Its exit code. It is ended with us, whatever happens."""
    process = subprocess.Popen(command, env=_environment())
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
