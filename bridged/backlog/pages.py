"""The pages of a spool's file and its WAL, read without SQLite, by their documented format (sqlite.org/fileformat2.html).

SQLite trusts its files: it stops reading a WAL at the first wrong frame, without a word about the commits behind it, and
can't open a file at all whose first page is damaged. Here every leaf page that isn't free is searched for rows of ours. A
segment carries its own checksum, so what is found is what was written, wherever it is found.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from bridged.backlog import tables
from bridged.backlog.records import STAGES
from bridged.backlog.segment import Segment
from bridged.backlog.tables import PAGE_BYTES

_WAL_HEADER: Final = 32
_FRAME_HEADER: Final = 24
_FRAME: Final = _FRAME_HEADER + PAGE_BYTES
_INDEX_HEADER: Final = 48  # twice, then how much of the WAL is in the file
_MAGIC: Final = {0x377F0682: "<", 0x377F0683: ">"}
_LEAF: Final = 0x0D
_INTERIOR: Final = 0x05
_FREE_PAGE: Final = 2  # in a pointer map
_MAX_PAYLOAD: Final = 2**27

Row = tuple[Any, ...]


class _Frame(NamedTuple):
    page: int
    size: int  # of the file in pages, after the commit that this frame ends; 0: it ends none
    at: int
    intact: bool


class _Wal:
    """The frames of the WAL's present generation."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes() if path.is_file() else b""
        self.frames: list[_Frame] = []
        self.valid = 0  # frames that SQLite will read
        self._read()
        # Frames that were committed, as the WAL's index says, and those of them that are in the file.
        committed, in_file = self._indexed(Path(f"{str(path).removesuffix('-wal')}-shm"))
        self.missing = max(0, committed - max(self.valid, in_file))
        # The file is ahead of what is left of the WAL: read over it, that would bring back pages as they once were.
        self.outrun = self.valid < in_file

    def _indexed(self, index: Path) -> tuple[int, int]:
        """What the WAL's index knows of this WAL; (0, 0) if it is of another one, or damaged.

        It is written after the frames, and the file, are on disk, so it never promises too much.
        """
        head = b""
        if index.is_file():
            with index.open("rb") as file:
                head = file.read(_INDEX_HEADER * 2 + 4)
        if len(head) < _INDEX_HEADER * 2 + 4 or head[:_INDEX_HEADER] != head[_INDEX_HEADER : 2 * _INDEX_HEADER]:
            return 0, 0
        frames, in_file = *struct.unpack_from("=I", head, 16), *struct.unpack_from("=I", head, 2 * _INDEX_HEADER)
        of_another_wal = len(self.data) >= _WAL_HEADER and head[32:40] != self.data[16:24]
        if not head[12] or of_another_wal or in_file > frames:
            return 0, 0
        return int(frames), int(in_file)

    def _read(self) -> None:
        header = self.data[:_WAL_HEADER]
        whole = (len(self.data) - _WAL_HEADER) // _FRAME
        if whole <= 0:
            return
        magic, *_, salt_1, salt_2, sum_1, sum_2 = struct.unpack(">8I", header)
        order = _MAGIC.get(magic, "<")
        header_intact = magic in _MAGIC and _sum(order, header[:24], 0, 0) == (sum_1, sum_2)
        if not header_intact:
            # Somebody may have cut the file to nothing while it was in use: what came later stands behind a hole.
            frames = range(_WAL_HEADER, _WAL_HEADER + whole * _FRAME, _FRAME)
            first = next((at for at in frames if any(self.data[at : at + 4])), _WAL_HEADER)
            salt_1, salt_2 = struct.unpack_from(">II", self.data, first + 8)
        contiguous = header_intact
        for at in range(_WAL_HEADER, _WAL_HEADER + whole * _FRAME, _FRAME):
            page, size, *salts, next_1, next_2 = struct.unpack_from(">6I", self.data, at)
            if salts != [salt_1, salt_2]:
                # What an earlier generation left. Behind a damaged header of a frame more of ours may come.
                contiguous = False
                sum_1, sum_2 = next_1, next_2
                continue
            body = self.data[at + _FRAME_HEADER : at + _FRAME]
            intact = _sum(order, body, *_sum(order, self.data[at : at + 8], sum_1, sum_2)) == (next_1, next_2)
            contiguous = contiguous and intact
            self.frames.append(_Frame(page, size, at + _FRAME_HEADER, intact))
            if contiguous and size:
                self.valid = len(self.frames)
            sum_1, sum_2 = next_1, next_2

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.data)

    @property
    def tail(self) -> list[_Frame]:
        """The frames that SQLite will not read."""
        return self.frames[self.valid :]

    @property
    def torn(self) -> bool:
        """Whether a commit was written that SQLite will not read: a power cut tore it before it was acked, or it was damaged."""
        return any(frame.size for frame in self.tail)

    @property
    def certain(self) -> bool:
        """Whether it was damaged: something was committed after it, so it was once whole on disk."""
        ends = [n for n, frame in enumerate(self.tail) if frame.size]
        return self.missing > 0 or (bool(ends) and any(frame.intact for frame in self.tail[ends[0] + 1 :]))


def _sum(order: str, data: bytes, one: int, two: int) -> tuple[int, int]:
    """The WAL's running checksum."""
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for a, b in zip(words[::2], words[1::2], strict=True):
        one = (one + a + two) & 0xFFFFFFFF
        two = (two + b + one) & 0xFFFFFFFF
    return one, two


class Pages:
    """The pages of a file and its WAL. Raises OSError when the file can't be opened."""

    def __init__(self, path: Path) -> None:
        self.wal = _Wal(Path(f"{path}-wal"))
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.count = -(-os.fstat(self._file).st_size // PAGE_BYTES)
        self._of_wal: dict[int, int] = {}
        for frame in self.wal.frames[: self.wal.valid]:
            self._of_wal[frame.page] = frame.at
            self.count = frame.size or self.count
        self.damaged = 0  # rows of segments whose checksum was wrong

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def page(self, number: int) -> bytes:
        """A page as of the last commit; empty if there is none."""
        at = self._of_wal.get(number)
        if at is not None:
            return self.wal.data[at : at + PAGE_BYTES]
        if not 0 < number <= self.count:
            return b""
        try:
            return os.pread(self._file, PAGE_BYTES, (number - 1) * PAGE_BYTES)
        except OSError:  # the disk doesn't give it back
            return b""

    def is_spool(self) -> bool:
        """Whether there is anything of ours in it."""
        return any(True for _ in self.rows())

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Everything of ours, in the order of the pages: the name of the table, and the row."""
        free = self._free()
        for number in range(1, self.count + 1):
            if number not in free:
                yield from self._rows_of(self.page(number), number)

    def strays(self) -> tuple[list[Segment], list[Row]]:
        """Segments and dead letters in the frames that SQLite doesn't read: the state before them stays what it is.

        A power cut may have kept the head of a frame and not its page: then an older WAL's page stands there, with rows that
        may have been settled since. Nobody was told of that commit, so nothing of such a frame is taken; where something
        was damaged that had been committed, all that is intact in it is.
        """
        tail = self.wal.tail if self.wal.certain else [frame for frame in self.wal.tail if frame.intact]
        segments: list[Segment] = []
        letters: list[Row] = []
        images: dict[int, list[_Frame]] = {}
        for frame in tail:
            images.setdefault(frame.page, []).append(frame)
        known = dict(self._of_wal)
        self._of_wal.update({page: frames[-1].at for page, frames in images.items()})
        seen: set[tuple[str, int]] = set()
        for page, frames in images.items():
            for frame in reversed(frames):
                for table, row in self._rows_of(self.wal.data[frame.at : frame.at + PAGE_BYTES], page):
                    if (table, row[0]) not in seen and table == "segments":
                        segments.append(Segment(*row))
                    elif (table, row[0]) not in seen and table == "dead_letters" and frame.intact and row[4] == "door":
                        letters.append(row)
                    seen.add((table, row[0]))
                if frame.intact:
                    break
        self._of_wal = known
        self.damaged = 0
        return sorted(segments, key=lambda segment: segment.id), sorted(letters, key=lambda row: row[0])

    def read_ahead(self, root: int) -> None:
        """Has the system read the leaves of a table, all at once; `root` is its first page.

        A start goes through all of them, and asked for one after the other each costs the disk's whole latency: with 10
        million events waiting 0.7 s in all instead of 0.1. Only a hint: what the WAL holds, or is damaged, doesn't matter.
        """
        level = [root]
        for _ in range(4):  # nobody's table is higher; a damaged one may be endless
            below: list[int] = []
            for number in level:
                page = self.page(number)
                if len(page) < PAGE_BYTES or page[0] != _INTERIOR:
                    return
                count = min(int.from_bytes(page[3:5], "big"), PAGE_BYTES // 2 - 6)
                cells = struct.unpack_from(f">{count}H", page, 12)
                below += [int.from_bytes(page[at : at + 4], "big") for at in cells]
                below.append(int.from_bytes(page[8:12], "big"))
            if len(below) > self.count:
                return
            for number in below:
                with contextlib.suppress(OSError):
                    at = max(0, number - 1) * PAGE_BYTES
                    os.posix_fadvise(self._file, at, PAGE_BYTES, os.POSIX_FADV_WILLNEED)
            level = below

    def _free(self) -> set[int]:
        """The pages of the free list; if that is damaged, those that the pointer map calls free."""
        head = self.page(1)[32:40]
        if len(head) < 8:
            return set()
        trunk, count = struct.unpack(">II", head)
        free: set[int] = set()
        while trunk and trunk not in free and len(free) < count:
            page = self.page(trunk)
            if len(page) < PAGE_BYTES:
                break
            free.add(trunk)
            trunk, leaves = struct.unpack_from(">II", page)
            if leaves > PAGE_BYTES // 4 - 2:
                break
            free.update(struct.unpack_from(f">{leaves}I", page, 8))
        if trunk or len(free) != count or not all(0 < number <= self.count for number in free):
            free = set()
            for at in range(2, self.count + 1, PAGE_BYTES // 5 + 1):
                kinds = self.page(at)[: PAGE_BYTES // 5 * 5 : 5]
                free.update(at + 1 + n for n, kind in enumerate(kinds) if kind == _FREE_PAGE)
        return free

    def _rows_of(self, page: bytes, number: int) -> Iterator[tuple[str, Row]]:
        head = 100 if number == 1 else 0
        if len(page) < head + 8 or page[head] != _LEAF:
            return
        count = int.from_bytes(page[head + 3 : head + 5], "big")
        for n in range(min(count, (PAGE_BYTES - head - 8) // 2)):
            at = int.from_bytes(page[head + 8 + 2 * n : head + 10 + 2 * n], "big")
            try:
                id_, payload = self._cell(page, at)
                found = _of_ours(id_, _record(payload))
            except (IndexError, ValueError, struct.error):
                continue
            if found and found[0] == "damaged":
                self.damaged += 1
            elif found:
                yield found

    def _cell(self, page: bytes, at: int) -> tuple[int, bytes]:
        """A cell of a leaf of a table: the row's id and its record."""
        size, at = _varint(page, at)
        id_, at = _varint(page, at)
        if not 0 < size < _MAX_PAYLOAD:
            raise ValueError("no row of ours")
        if id_ >= 2**63:
            id_ -= 2**64
        most, least = PAGE_BYTES - 35, (PAGE_BYTES - 12) * 32 // 255 - 23
        local = size
        if size > most:
            local = least + (size - least) % (PAGE_BYTES - 4)
            local = local if local <= most else least
        parts = [page[at : at + local]]
        if local < size:
            missing, following = size - local, int.from_bytes(page[at + local : at + local + 4], "big")
            while missing > 0:
                overflow = self.page(following)
                if len(overflow) < 5:
                    raise ValueError("the chain is broken")
                parts.append(overflow[4 : 4 + missing])
                missing -= len(parts[-1])
                following = int.from_bytes(overflow[:4], "big")
        return id_, b"".join(parts)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for n in range(8):
        byte = data[at + n]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + n + 1
    return value << 8 | data[at + 8], at + 9


def _record(payload: bytes) -> list[Any]:
    """The values of a record. Raises ValueError, IndexError or struct.error if it is none."""
    end, at = _varint(payload, 0)
    kinds = []
    while at < end:
        kind, at = _varint(payload, at)
        kinds.append(kind)
        if len(kinds) > 9:
            raise ValueError("more columns than any table of ours")
    values: list[Any] = []
    for kind in kinds:
        size = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0)[kind] if kind < 12 else (kind - 12) // 2
        part = payload[at : at + size]
        if len(part) != size:
            raise ValueError("cut off")
        at += size
        if kind == 0:
            values.append(None)
        elif kind == 7:
            values.append(struct.unpack(">d", part)[0])
        elif kind < 10:
            values.append(int.from_bytes(part, "big", signed=True) if kind < 7 else kind - 8)
        elif kind < 12:
            raise ValueError("no kind of value")
        else:
            values.append(part.decode() if kind % 2 else part)
    return values


def _of_ours(id_: int, values: list[Any]) -> tuple[str, Row] | None:
    """The table that a row can only be of, and the row as it is read by SQL: a segment without its checksum."""
    kinds = "".join({type(None): "-", int: "i", float: "f", str: "s", bytes: "b"}[type(value)] for value in values)
    numbers = kinds.replace("f", "i")
    if numbers == "-iiiibb":
        _, created_at, raw_bytes, raw_crc32, checksum, codes, block = values
        row = (id_, float(created_at), raw_bytes, raw_crc32, codes, block)
        return ("segments", row) if tables.intact((*row, checksum)) else ("damaged", row)
    if numbers == "-iiisissb" and values[4] in STAGES and 0 <= values[5] < 256:
        return "dead_letters", (id_, *map(float, values[1:3]), *values[3:])
    if kinds == "-s" and 0 <= id_ < 256:
        return "event_types", (id_, values[1])
    if kinds == "-bi" and id_ == 1:
        return "books", (values[1], values[2])
    return None
