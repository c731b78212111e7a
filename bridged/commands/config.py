"""`bridged config`: the configuration as it reads now, with its secrets masked, or every key at its default."""

import argparse
import json

from bridged import config, config_text
from bridged.saved import read_for

EPILOG = """\
examples:
  bridged config                           the file, the environment and the defaults put together
  bridged config --default > config.toml   begin a configuration
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--default", action="store_true", help="every key at its default, as a commented config.toml")


def main(arguments: argparse.Namespace) -> int:
    """Prints."""
    if arguments.default:
        print(config_text.default_toml(), end="")
    else:
        path = config.find_config(arguments.config)
        configured = config.load(path)
        saved = read_for(configured)
        settings = saved.in_force(configured)
        about = {"file": str(path) if path else None, "overridden": saved.overridden(configured)}
        if saved.problem:
            about["problem"] = saved.problem
        print(json.dumps({**about, **config.masked(settings)}, indent=2))
    return 0
