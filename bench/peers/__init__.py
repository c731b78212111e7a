"""bridged beside what a user would pick instead: the peers, their configurations, and one run of all of them.

`catalog` says what the peers are, `starting` how each is started, `run` measures them. The other files are
the peers' own: programs and configurations.
"""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark."""
    # Here, and not above: the peers' programs import this package too, and must not pay for what they don't use.
    from bench.peers import run  # noqa: PLC0415

    return run.main(argv)
