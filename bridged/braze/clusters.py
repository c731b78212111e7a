"""Braze's clusters: which REST host belongs to the instance that a team's dashboard names. Pure.

Source: the table of instances in Braze's reference of API and SDK endpoints. A workspace lives on exactly one of them;
the key of another is refused with 401, like a wrong one.
"""

from typing import Final

HOSTS: Final = {
    **{f"US-0{number}": f"https://rest.iad-0{number}.braze.com" for number in range(1, 9)},
    "US-10": "https://rest.us-10.braze.com",
    "EU-01": "https://rest.fra-01.braze.eu",
    "EU-02": "https://rest.fra-02.braze.eu",
    "AU-01": "https://rest.au-01.braze.com",
    "ID-01": "https://rest.id-01.braze.com",
    "JP-01": "https://rest.jp-01.braze.com",
    "KR-01": "https://rest.kr-01.braze.com",
}


def host(cluster: str) -> str:
    """The REST host of a cluster, in any case of letters. Raises ValueError, which lists them, for one that isn't Braze's."""
    found = HOSTS.get(cluster.strip().upper())
    if found is None:
        raise ValueError(f"{cluster!r} is no cluster of Braze's: they are {', '.join(HOSTS)}")
    return found
