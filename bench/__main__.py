"""`python -m bench NAME [options]` runs a benchmark; without a name it lists them."""

import errno
import importlib
import sys
from collections.abc import Sequence

QUESTIONS = {
    "all": "everything about speed, one after the other, some ten minutes; then the page",
    "report": "the page of results, with plots, from what the others wrote with --json",
    "path": "events/s through the whole daemon, and what one costs: loader, daemon and sink as three processes",
    "compare": "another checkout, or the bare daemon, beside this one: both alive, loaded in turns; ratios of pairs",
    "profile": "where the daemon's CPU goes, by thread and part, at full speed and at Mixpanel's ceiling (perf)",
    "latency": "how long an ack and a delivery take at a given rate: open loop, as installed",
    "backlog": "millions of events waiting: time to ready, drain rate, memory, size of the file",
    "scale": "cost per event against event size, type mix, share of bad events, backlog",
    "memory": "resident memory: idle, at full speed, and the slope of an hour's soak",
    "pace": "the rate loops against a model of Mixpanel's rolling minute, on many seeds",
    "floor": "the least that an event can cost: decode, map, encode, gzip, in one process with nothing around them",
    "decode": "what decoding costs: one tagged union, one decoder a type, an event at a time",
    "mapping": "what mapping costs: untouched, mapped, checked, with an odd event in the batch",
    "restart": "what a restart costs the senders: the daemon restarted under load, its sockets held by a service manager",
    "corrupt": "what damage costs: bits flipped and bytes cut off in a spool's files, and a start for each",
    "cohorts": "what a cohort costs: a full sync to Braze and a repeated one, and SIGKILL while it receives, sweeps, sends",
    "spool": "what durability costs: events a commit x synchronous, beside a bare write and fsync of the same bytes",
    "hostile": "what slow, endless, explosive and deaf clients cost: the daemon's memory, and an honest client's p99",
    "fuzz": "inputs that nobody sends, by the million, into decoder, framer and mapping: executions, and what broke",
    "crash": "what SIGKILL loses: the daemon dies again and again under load, and a ledger outside counts",
    "powercut": "what a power cut loses: the same on a file system that loses what wasn't synced (root)",
    "disk": "what a bad disk loses: full to the last byte, and failing at its k-th write and fsync (root, fiu-utils)",
    "outage": "what an outage costs that outlasts what is kept: expiry to the second, the archive, the file, and the way back",
    "peers": "bridged beside what a user would pick instead, on the same events and the same sink",
    "page": "what an open page costs: the daemon's CPU an event with and without a browser that shows it",
    "images": "what a power cut could leave: a recorded write log, replayed with unsynced writes dropped and torn",
}

# Where a name isn't that of its module.
_MODULES = {"all": "suite", "report": "page", "page": "watched"}
# What the machine doesn't give: no mistake of ours, whose place in the code would help somebody.
_DENIED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark that is named first; gives its exit code."""
    if not argv or argv[0] not in QUESTIONS:
        for name, question in QUESTIONS.items():
            print(f"{name:<8} {question}")
        print("\npython -m bench NAME --help tells a benchmark's options.")
        return 0 if not argv or argv[0] in {"-h", "--help"} else 2
    if sys.version_info < (3, 11):  # noqa: UP036  # that is what it is for
        return _failed(argv[0], f"Python 3.11 or later is needed, and {sys.executable} is {sys.version.split()[0]}")
    try:
        # Here, and not above: the list needs nothing that is installed.
        from bench.processes import BenchError, ended_by_signals  # noqa: PLC0415

        with ended_by_signals():
            try:
                code: int = importlib.import_module(f"bench.{_MODULES.get(argv[0], argv[0])}").main(argv[1:])
            except (BenchError, ExceptionGroup) as error:
                first: BaseException = error
                while isinstance(first, BaseExceptionGroup):
                    first = first.exceptions[0]
                if not isinstance(first, BenchError):
                    raise
                return _failed(argv[0], str(first))
    except ModuleNotFoundError as error:
        how = "install it, or use .venv/bin/python, to which `make bench` gives what nearly all benchmarks need"
        return _failed(argv[0], f"{sys.executable} has no package {error.name}: {how}")
    except OSError as error:
        if error.errno not in _DENIED:
            raise
        return _failed(argv[0], str(error))
    return code


def _failed(name: str, why: str) -> int:
    print(f"{name}: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
