"""What a name stands for on this machine: where it has no IPv6, `localhost` may say ::1 all the same."""

import asyncio
import socket

import pytest
from conftest import currents, free_port, ndjson

from bridged.addresses import of_this_machine

BOTH = "of-both.example"


@pytest.fixture
def names(monkeypatch):
    """A name with an address of this machine, twice, and one that it hasn't, as /etc/hosts has them where IPv6 is off."""
    real = socket.getaddrinfo

    def looked_up(host, *arguments, **named):
        if host != BOTH:
            return real(host, *arguments, **named)
        there = [(socket.AF_INET6, ("2001:db8::1", 0, 0, 0)), *[(socket.AF_INET, ("127.0.0.1", 0))] * 2]
        return [(family, socket.SOCK_STREAM, 6, "", at) for family, at in there]

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        (BOTH, ["127.0.0.1"]),
        ("127.0.0.1", ["127.0.0.1"]),
        ("0.0.0.0", ["0.0.0.0"]),
        ("192.0.2.1", ["192.0.2.1"]),  # not here: whoever listens says so
        ("nobody.invalid", ["nobody.invalid"]),
        ("a..b", ["a..b"]),
    ],
)
async def test_what_a_name_stands_for(names, host, addresses):
    """Only what this machine has, once; if that is nothing, what was asked for."""
    assert await of_this_machine(host) == addresses


async def test_every_door_listens_where_it_can(names, daemon, client):
    """An address that this machine lacks is no reason not to start, when the name has another."""
    ports = [free_port() for _ in range(3)]
    app = await daemon(
        admin__listen=f"{BOTH}:{ports[0]}",
        admin__token="admin-token-of-tests",
        sources__http__listen=f"{BOTH}:{ports[1]}",
        sources__http__bearer_token="bearer-token-of-tests",
        sources__stream__listen=f'["tcp:{BOTH}:{ports[2]}"]',
        sources__stream__allow_remote="true",
    )
    assert [app.admin.port, app.http.port, *app.stream.ports] == ports
    headers = {"Authorization": "Bearer bearer-token-of-tests"}
    async with client.post(
        f"http://127.0.0.1:{ports[1]}/v1/currents", json={"events": [currents()]}, headers=headers
    ) as answer:
        assert answer.status == 200
    async with client.get(f"http://127.0.0.1:{ports[0]}/healthz") as answer:
        assert answer.status == 200
    reader, writer = await asyncio.open_connection("127.0.0.1", ports[2])
    writer.write(b'{"acks":true}\n' + ndjson([currents()]))
    assert await reader.readline() == b'{"acked":1}\n'
    writer.close()
