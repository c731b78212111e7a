"""The official `mixpanel` package from PyPI: lines come in on a socket, threads with a BufferedConsumer each send them.

The package sends at most 50 events a request, as a form, uncompressed. Most of an event's cost is the interpreter's, so
more threads than a few gain nothing. Nothing is acked, and what is queued or buffered is in memory.

    python consumer.py LISTEN_PORT MIXPANEL_URL
"""

import json
import queue
import socket
import sys
import threading

from mixpanel import BufferedConsumer, Mixpanel, ServiceAccountCredentials

from bench.peers.mapping import mixpanel_event

TOKEN = "0123456789abcdef0123456789abcdef"
THREADS = 2
FLUSH_S = 0.2


def work(lines: "queue.Queue[list[bytes]]", url: str) -> None:
    """Sends what comes; what is buffered goes when nothing more comes for a moment."""
    consumer = BufferedConsumer(max_size=50, import_url=f"{url}/import")
    client = Mixpanel(TOKEN, consumer, credentials=ServiceAccountCredentials("user", "secret", "1"))
    while True:
        try:
            chunk = lines.get(timeout=FLUSH_S)
        except queue.Empty:
            consumer.flush()
            continue
        for line in chunk:
            event = mixpanel_event(json.loads(line), TOKEN)
            properties = event["properties"]
            client.import_data(None, properties["distinct_id"], event["event"], properties["time"], properties)


def main(port: int, url: str) -> None:
    """Reads one connection after the other, for ever."""
    lines: queue.Queue[list[bytes]] = queue.Queue(100)
    for _ in range(THREADS):
        threading.Thread(target=work, args=(lines, url), daemon=True).start()
    server = socket.create_server(("127.0.0.1", port))
    while True:
        connection, _ = server.accept()
        with connection:
            rest = b""
            while data := connection.recv(65536):
                *complete, rest = (rest + data).split(b"\n")
                lines.put(complete)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
