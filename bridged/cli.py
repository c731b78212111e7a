"""The command line: argv in, an exit code out. A command's module is imported when it is the one that is wanted."""

import argparse
import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from bridged import __version__
from bridged.errors import NO_MORE_THREADS, BridgedError, wants_threads
from bridged.redaction import redacted

if TYPE_CHECKING:
    from bridged.settings import Config

# name -> the module with its add_arguments and main (none: it is here), one line for people
_COMMANDS = {
    "run": ("", "run the daemon"),
    "check": ("bridged.commands.check", "check the configuration, and with --online the credentials"),
    "config": ("bridged.commands.config", "print the configuration as it reads now, or the defaults"),
    "status": ("bridged.commands.status", "what the running daemon does"),
    "dead-letters": (
        "bridged.commands.dead_letters",
        "events that can't be delivered: list, show, replay, export, purge",
    ),
    "cohorts": (
        "bridged.commands.cohorts",
        "Mixpanel's cohorts in Braze: list, show, plan, allow, resync, forget",
    ),
    "replay": ("bridged.commands.replay", "hand expired events back that [retention] has archived"),
    "backfill": ("bridged.commands.backfill", "send files of Currents events to the running daemon"),
    "send-test-events": (
        "bridged.commands.send_test_events",
        "one example event per selected type, to the running daemon",
    ),
    "demo": (
        "bridged.commands.demo",
        "a day of events, and cohorts the other way, through a daemon and emulators on this machine",
    ),
    "emulator": ("bridged.emulator.command", "run the emulated Mixpanel, and with --braze-listen the emulated Braze"),
}
# Of a file that somebody named, the commands tell in their own words; what is left is standard output.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_DRAIN_S = 2.0  # so long the end waits for whoever reads the log
_WITHOUT_CONFIG = ("demo", "emulator")

_EPILOG = """\
examples:
  bridged demo                                see it work, without an account anywhere
  bridged config --default > config.toml      begin a configuration
  bridged check --config config.toml --online
  bridged run --config config.toml

The configuration is --config FILE, else $BRIDGED_CONFIG, else ./config.toml, else /etc/bridged/config.toml.
exit codes: 0 done, 1 failed, 2 usage, 69 Mixpanel or the daemon can't be reached, 74 file or disk, 78 configuration
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; gives its exit code: 0, 1 failure, 2 usage, 69 upstream, 74 I/O, 78 configuration."""
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: no letter is a reason to fail
    given = _command_first(list(sys.argv[1:] if argv is None else argv))
    # argparse allows a command's options to be spelled only after it, so the first word names it.
    wanted = next((word for word in given if not word.startswith("-")), "")
    try:
        try:
            arguments = _parser(wanted).parse_args(given)
            code = int(arguments.main(arguments) or 0)
        finally:
            # Here, where it can be told; at the interpreter's end it is a traceback.
            sys.stdout.flush()
    except BridgedError as error:
        print(redacted(f"bridged: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # The daemon prints nothing there: whatever pipe is broken, or disk full, it ends by a mistake.
        if isinstance(error, OSError) and wanted != "run":
            if isinstance(error, BrokenPipeError):
                # Whoever read our output has enough.
                _drop_output()
                return 0
            if error.filename is None and error.errno in _UNWRITABLE:
                _drop_output()
                print(f"bridged: can't write to standard output: {error.strerror}", file=sys.stderr)
                return 74
        if isinstance(error, FileNotFoundError) and error.filename is None and _has_no_folder():
            print("bridged: the working directory was removed\n  hint: cd into one that is there", file=sys.stderr)
            return 74
        if wants_threads(error):
            print("bridged: {}\n  hint: {}".format(*NO_MORE_THREADS), file=sys.stderr)
            return 74
        # A bug. As Python would tell it, but for what nobody shall read.
        sys.stderr.write(redacted(traceback.format_exc()))
        return 1
    return code


def _command_first(given: list[str]) -> list[str]:
    """`bridged --config FILE status` is what many other programs want; argparse wants a command's options behind it."""
    words = 2 if given[:1] == ["--config"] else 1 if given and given[0].startswith("--config=") else 0
    return given[words : words + 1] + given[:words] + given[words + 1 :] if len(given) > words else given


def _open_closed_streams() -> None:
    """Whoever started us may have closed standard input, output or error: nothing else may get their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one: those below it are open by now.
            opened = os.open(os.devnull, os.O_RDWR)
            if getattr(sys, name) is None:
                mode = "r" if number == 0 else "w"
                setattr(sys, name, open(opened, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  # for good


def _has_no_folder() -> bool:
    """Whether somebody has removed the working directory, as who clones anew what the shell is in."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _drop_output() -> None:
    """What is left in the buffer must not complain at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(wanted: str) -> argparse.ArgumentParser:
    """The parser of everything; only the wanted command knows its options."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="bridged",
        description="Delivers Braze Currents events to Mixpanel, and Mixpanel cohorts to Braze, durably: acked means on disk.",
        epilog=_EPILOG,
        formatter_class=style,
    )
    parser.add_argument("--version", action="version", version=f"bridged {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in _COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=style
        )
        main_: Callable[[argparse.Namespace], int] = _run
        if name not in _WITHOUT_CONFIG:
            command.add_argument("--config", metavar="FILE", help="the configuration (see `bridged --help`)")
        if module and name == wanted:
            loaded = import_module(module)
            loaded.add_arguments(command)
            command.epilog = getattr(loaded, "EPILOG", None)
            main_ = loaded.main
        command.set_defaults(main=main_)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    import asyncio  # noqa: PLC0415  # as everywhere here: other commands start faster without it
    import atexit  # noqa: PLC0415
    import signal  # noqa: PLC0415

    # It would end the process as long as nobody listens. Kept by the kernel, until `app` can read the configuration again.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    from bridged import memory, open_files  # noqa: PLC0415

    open_files.demand_enough()
    memory.only_grows()
    if "rich" not in sys.modules:
        # structlog imports it for tracebacks that `logs` doesn't ask for: a seventh of what a start takes.
        sys.modules["rich"] = None  # type: ignore[assignment]  # how an import is made to fail, as documented
        import structlog  # noqa: F401, PLC0415

        del sys.modules["rich"]
    import uvloop  # noqa: PLC0415

    from bridged import app, config, logs  # noqa: PLC0415

    def read() -> "Config":
        return config.load(config.find_config(arguments.config))

    with contextlib.suppress(io.UnsupportedOperation):  # a stream of whoever has called `main`
        # For whatever writes there from now on, the last words of `main` too.
        sys.stderr = output = logs.Output(sys.stderr)
        atexit.register(output.drain, _DRAIN_S)
    settings = read()
    logs.setup(settings.log.level, settings.log.format)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(app.run(settings, read, lambda: str(config.find_config(arguments.config) or "the environment")))
    return 0
