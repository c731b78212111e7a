"""A bytewax dataflow with recovery: a file of events comes in, batches go out.

What makes bytewax recover is a source that can be read again: so the events must be in a file (or Kafka) already, and
what wrote them there is not part of this. An item of the flow is a whole batch of lines: an item for each event would
cost several times as much. After a crash it goes on at the last epoch, and sends what came since then again.

    python dataflow.py EVENTS_FILE MIXPANEL_URL
"""

import http.client
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import bytewax.operators as op
import msgspec
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.run import cli_main

from bench.peers.mapping import mixpanel_event

TOKEN = "0123456789abcdef0123456789abcdef"
BATCH_BYTES = 1_400_000  # some 2,000 events
EPOCH = timedelta(seconds=1)

decode_lines = msgspec.json.Decoder().decode_lines
encode_lines = msgspec.json.Encoder().encode_lines


class Tail(StatefulSourcePartition[bytes, int]):
    """The lines of a file that may not be there yet and may grow; the state is the offset."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path = path
        self._offset = offset

    def next_batch(self) -> list[bytes]:
        """At most one item: some 2,000 lines."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines, _, _ = file.read(BATCH_BYTES).rpartition(b"\n")
        self._offset += len(lines) + bool(lines)
        return [lines] if lines else []

    def snapshot(self) -> int:
        """Where to read on."""
        return self._offset


class File(FixedPartitionedSource[bytes, int]):
    def __init__(self, path: Path) -> None:
        self._path = path

    def list_parts(self) -> list[str]:
        """One file, one partition."""
        return [self._path.name]

    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> Tail:
        """Goes on where the last complete epoch ended."""
        return Tail(self._path, resume_state or 0)


class Import(StatelessSinkPartition[bytes]):
    """Posts batches, each until it is taken."""

    def __init__(self, url: str) -> None:
        self._client = http.client.HTTPConnection(urlsplit(url).netloc)

    def write_batch(self, items: list[bytes]) -> None:
        """The flow waits meanwhile: that is its backpressure."""
        for body in items:
            while not self._taken(body):
                time.sleep(0.5)

    def _taken(self, body: bytes) -> bool:
        headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}
        try:
            self._client.request("POST", "/import?strict=1", body, headers)
            answer = self._client.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            self._client.close()
            return False
        return answer.status < 500 and answer.status != 429


class Mixpanel(DynamicSink[bytes]):
    def __init__(self, url: str) -> None:
        self._url = url

    def build(self, step_id: str, worker_index: int, worker_count: int) -> Import:
        """A connection for each worker."""
        return Import(self._url)


def batch(lines: bytes) -> bytes:
    """Currents events as a body for /import."""
    packer = zlib.compressobj(1, wbits=31)
    body = encode_lines([mixpanel_event(event, TOKEN) for event in decode_lines(lines)])
    return packer.compress(body) + packer.flush()


def main(path: Path, url: str) -> None:
    """Runs until it is killed."""
    flow = Dataflow("bridge")
    op.output("mixpanel", op.map("batch", op.input("currents", flow, File(path)), batch), Mixpanel(url))
    recovery = Path("recovery")
    if not recovery.exists():
        recovery.mkdir()
        init_db_dir(recovery, 1)
    Path("ready").touch()
    cli_main(flow, workers_per_process=1, epoch_interval=EPOCH, recovery_config=RecoveryConfig(recovery))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
