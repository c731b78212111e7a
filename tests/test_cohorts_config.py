"""The three profiles of use, and what the configuration of cohorts is refused for."""

from pathlib import Path

import pytest

from bridged.cohort_import import braze_target, membership_options
from bridged.config import load, masked
from bridged.errors import ConfigError

COHORTS = {
    "BRIDGED__COHORTS__ENABLED": "true",
    "BRIDGED__COHORTS__PASSWORD": "webhook-password",
    "BRIDGED__BRAZE__CLUSTER": "EU-01",
    "BRIDGED__BRAZE__REST_KEY": "rest-key-of-tests",
}
EXPORT = {"BRIDGED__MIXPANEL__TOKEN": "example-token"}
NO_PAGE = {"BRIDGED__ADMIN__LISTEN": ""}  # where the export's credential could be given later
NO_EXPORT = {"BRIDGED__MIXPANEL__EXPORT": "false"}


@pytest.mark.parametrize("environ", [EXPORT, COHORTS | NO_EXPORT, COHORTS | EXPORT])
@pytest.mark.parametrize("page", [{}, NO_PAGE])
def test_a_profile_demands_only_its_own_credentials(environ: dict[str, str], page: dict[str, str]) -> None:
    """The export's without cohorts, Braze's without an export, and both."""
    assert load(None, environ | page)


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        (NO_EXPORT, "nothing is left to be done"),
        (COHORTS | NO_PAGE, "mixpanel has no credential"),
        (COHORTS | NO_EXPORT | {"BRIDGED__BRAZE__REST_KEY": ""}, "braze has no key"),
        (COHORTS | NO_EXPORT | {"BRIDGED__BRAZE__CLUSTER": ""}, "braze.cluster is not set"),
        (COHORTS | NO_EXPORT | {"BRIDGED__BRAZE__URL": "https://user:secret@host"}, "braze.url: expected"),
        (COHORTS | NO_EXPORT | {"BRIDGED__BRAZE__PARTNER_KEY": "p"}, "needs braze.data_import_key"),
        (COHORTS | NO_EXPORT | {"BRIDGED__BRAZE__PARTNER_NAME": "a/b"}, "braze.partner_name"),
        (COHORTS | NO_EXPORT | {"BRIDGED__SOURCES__HTTP__LISTEN": ""}, "needs sources.http.listen"),
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__USERNAME": "a:b"}, "without a colon"),
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__USER_ID": " "}, "cohorts.user_id"),
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__USER_ID": 'My "id"'}, "cohorts.user_id: expected"),
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__USER_ID": "a\\b"}, "cohorts.user_id: expected"),
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__USER_ID": "a\udcff"}, "cohorts.user_id: expected"),
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__ATTRIBUTE": "$x"}, "cohorts.attribute"),
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__ATTRIBUTE": "external_id"}, "cohorts.attribute: external_id is"),
        (
            COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__ATTRIBUTE": "_merge_objects"},
            "cohorts.attribute: _merge_objects is",
        ),
        *[
            (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__ATTRIBUTE": name}, f"cohorts.attribute: {name} is")
            for name in ("push_token_import", "push_tokens", "email", "phone", "country", "subscription_groups")
        ],
        *[
            (
                COHORTS | NO_EXPORT | {f"BRIDGED__COHORTS__{key}": name},
                f"cohorts.{key.lower()}: it has blanks around it",
            )
            for key in ("USER_ID", "ATTRIBUTE")
            for name in ("crm_id ", "crm_id\u00a0")
        ],
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__USER_ID": " $user_id"}, "cohorts.user_id: it has blanks around it"),
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__PATH": "./spool.db"}, "the same file"),
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__PATH": "other/../spool.db"}, "the same file"),
        *[
            (
                COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__PATH": f"spool.db{suffix}"},
                f"cohorts.path: .*spool.db{suffix} is",
            )
            for suffix in ("-wal", "-shm", ".lock", ".reserve", ".settings.toml", ".settings.toml.part")
        ],
        *[
            (
                COHORTS | NO_EXPORT | {"BRIDGED__SPOOL__PATH": f"cohorts.db{suffix}"},
                f"cohorts.path: .*cohorts.db{suffix} would be",
            )
            for suffix in ("-wal", "-shm", ".lock")
        ],
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__PATH": "archive"}, "cohorts.path: .*archive is"),
        (COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__MAX_BYTES": "1MiB"}, "at least 16MiB"),
        (COHORTS | NO_EXPORT | {"BRIDGED__BRAZE__TIMEOUT": "0"}, "braze.timeout: more than 0s"),
        (COHORTS | NO_EXPORT | {"BRIDGED__BRAZE__PROBE_INTERVAL": "0s"}, "braze.probe_interval: more than 0s"),
        (
            COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__PASSWORD": "", "BRIDGED__SOURCES__HTTP__LISTEN": "0.0.0.0:80"},
            "set cohorts.password",
        ),
    ],
)
def test_what_can_t_work_is_refused_with_its_key(environ: dict[str, str], why: str) -> None:
    """At the start, not at the first page."""
    with pytest.raises(ConfigError, match=why):
        load(None, environ)


def test_the_cohorts_file_is_not_the_spools_by_another_name(tmp_path: Path) -> None:
    """A link to it, or to its folder: both are followed when they are opened. A neighbour of the spool is none of its files."""
    spool = {"BRIDGED__SPOOL__PATH": str(tmp_path / "real" / "spool.db")}
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "link.db").symlink_to(tmp_path / "real" / "spool.db")
    for path in ("link/spool.db", "link.db", "link/spool.db-wal"):
        with pytest.raises(ConfigError, match=r"cohorts\.path"):
            load(None, COHORTS | NO_EXPORT | spool | {"BRIDGED__COHORTS__PATH": str(tmp_path / path)})
    for path in ("link/spool.db.cohorts", "real/cohorts.db", "archive/cohorts.db"):
        assert load(None, COHORTS | NO_EXPORT | spool | {"BRIDGED__COHORTS__PATH": str(tmp_path / path)})


def test_an_attribute_may_be_spelled_as_people_like() -> None:
    """Names are told apart by their case at Braze, and blanks within are a part of them."""
    for name in ("Mixpanel cohorts", "Email", "my_email", "Größe"):
        assert load(None, COHORTS | NO_EXPORT | {"BRIDGED__COHORTS__ATTRIBUTE": name}).cohorts.attribute == name


def test_a_door_for_cohorts_alone_needs_no_bearer_token() -> None:
    """Mixpanel authenticates with Basic."""
    assert load(None, COHORTS | NO_EXPORT | {"BRIDGED__SOURCES__HTTP__LISTEN": "0.0.0.0:80"})
    with pytest.raises(ConfigError, match="bearer_token"):
        load(None, COHORTS | EXPORT | {"BRIDGED__SOURCES__HTTP__LISTEN": "0.0.0.0:80"})


def test_the_keys_are_secrets(tmp_path: Path) -> None:
    """They come from files as well, and are never shown."""
    (tmp_path / "key").write_text("rest-key-from-a-file\n")
    environ = COHORTS | NO_EXPORT | {"BRIDGED__BRAZE__REST_KEY": ""}
    environ["BRIDGED__BRAZE__REST_KEY_FILE"] = str(tmp_path / "key")
    config = load(None, environ)
    assert config.braze.rest_key == "rest-key-from-a-file"
    assert "rest-key" not in str(masked(config)["braze"]["rest_key"])
    assert masked(config)["cohorts"]["password"] == "********"
    assert "rest-key-from-a-file" not in repr(braze_target(config))


def test_a_cluster_that_braze_doesn_t_have() -> None:
    """Is refused with those that it has."""
    with pytest.raises(ConfigError, match=r"braze.cluster: .*US-01"):
        braze_target(load(None, COHORTS | NO_EXPORT | {"BRIDGED__BRAZE__CLUSTER": "XX-99"}))


def test_what_is_written_where_is_remembered() -> None:
    """Another cluster or attribute, or a partner's key, is another target; another key of the same workspace isn't."""
    base = COHORTS | NO_EXPORT
    changes = [
        {"BRIDGED__COHORTS__ATTRIBUTE": "other"},
        {"BRIDGED__BRAZE__CLUSTER": "US-01"},
        {"BRIDGED__BRAZE__PARTNER_KEY": "p", "BRIDGED__BRAZE__DATA_IMPORT_KEY": "d"},
    ]
    targets = [membership_options(load(None, base | change)).target for change in [{}, *changes]]
    assert len(set(targets)) == 4
    assert membership_options(load(None, base | {"BRIDGED__BRAZE__REST_KEY": "another-key"})).target == targets[0]
    assert not membership_options(load(None, base | changes[2])).by_name
