"""How commands print: aligned columns of plain text, and nothing that could command the terminal."""

from collections.abc import Iterable, Sequence


def printable(text: object) -> str:
    """Text from outside made safe for a terminal: what controls it is replaced."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))


def agreed(question: str) -> bool:
    """Whether somebody at the terminal says y; the end of the input is a no."""
    try:
        return input(f"{printable(question)} [y/N] ").strip().lower() == "y"
    except EOFError:
        print()
        return False


def table(rows: Iterable[Sequence[object]], *, right: Iterable[int] = (), indent: str = "  ") -> str:
    """Rows as aligned columns; the columns in `right` hold numbers."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else printable(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    to_right = set(right)
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if at in to_right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append((indent + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def duration(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
