"""What people read is what the program does: config.toml, and every command, key, file and figure that the README names."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from bridged.admin.openapi import document
from bridged.cli import main
from bridged.config import keys, load
from bridged.config_text import default_toml
from bridged.currents.readme import events_markdown
from bridged.currents.table import EVENT_TYPES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- events:begin -->\n", "<!-- events:end -->"
TOKEN = {"BRIDGED__MIXPANEL__TOKEN": "example-token"}


@pytest.fixture(scope="module")
def readme() -> str:
    """The README's text."""
    return README.read_text(encoding="utf-8")


def code(text: str) -> list[str]:
    """The code of a Markdown text: the lines of its blocks, then what stands between single backticks."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ *```\w*\n.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)


def bridged(*arguments: str) -> str:
    """What a command prints, told to help."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--help"])
    assert end.value.code == 0, f"`bridged {' '.join(arguments)}` doesn't exist"
    return printed.getvalue()


# -- config.toml -------------------------------------------------------------------------------------------------------


def test_config_toml_is_what_the_program_would_write() -> None:
    """Every key, its default and its description: renew it with `python -m bridged config --default > config.toml`."""
    assert (ROOT / "config.toml").read_text(encoding="utf-8") == default_toml()


def test_config_toml_is_a_configuration() -> None:
    """With a token it starts the daemon, and changes nothing from the defaults."""
    assert load(ROOT / "config.toml", TOKEN) == load(None, TOKEN)


def test_config_toml_describes_every_key() -> None:
    """No key stands there without words of its own."""
    text = (ROOT / "config.toml").read_text(encoding="utf-8")
    assert re.findall(r"^([a-z_]+) = ", text, re.MULTILINE) == [key.path[-1] for key in keys()]
    assert re.findall(r"(?<!\.)\n([a-z_]+) = ", text) == []


# -- README.md ---------------------------------------------------------------------------------------------------------


def test_the_table_of_events_is_the_table(readme: str) -> None:
    """Made, not written: `BRIDGED_WRITE_README=1 python -m pytest tests/test_docs.py` renews it."""
    before, _, rest = readme.partition(BEGIN)
    table, _, after = rest.partition(END)
    assert after, f"the README has no {BEGIN.strip()} ... {END}"
    if os.environ.get("BRIDGED_WRITE_README") and table != events_markdown():
        README.write_text(before + BEGIN + events_markdown() + END + after, encoding="utf-8")
        pytest.fail("the README's table was renewed: look at it, and commit it")
    assert table == events_markdown()


def test_every_type_is_in_the_table_of_events_once() -> None:
    """Under both its names, with what its group is and whether it costs."""
    rows = [line.strip("| \n").split(" | ") for line in events_markdown().splitlines()]
    assert {len(row) for row in rows} <= {4, 5}
    assert [row[0] for row in rows[2:]] == [f"`{row.event_type}`" for row in EVENT_TYPES]
    by_type = {row[0].strip("`"): row[1:] for row in rows}
    assert by_type["users.canvas.Conversion"][:2] == ["Canvas Conversion Event", "Canvas Conversion"]
    assert by_type["users.messages.email.Send"] == ["Email Send", "Email Send", "message engagement", "yes"]
    assert by_type["users.messages.sms.CarrierSend"][-1] == "as `SMS Send to Carrier`"
    assert sum(row[-1] == "yes" for row in rows) == 14


def test_every_answer_of_the_http_door_is_told(readme: str) -> None:
    """Whoever sends events finds there what each of them means, and what Braze makes of it."""
    answers = document()["paths"]["/v1/currents"]["post"]["responses"]
    table = readme.partition("## Answers of the HTTP door\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE)
    assert {status for cell in cells for status in re.findall(r"\d{3}", cell)} == set(answers)


def test_every_key_is_told(readme: str) -> None:
    """Each is in the README, or the README sends its reader to config.toml, which has them all."""
    missing = [".".join(key.path) for key in keys() if key.path[-1] not in readme]
    assert not missing or "`config.toml` lists every key" in readme


def test_every_key_that_the_readme_names_exists(readme: str) -> None:
    """`[section] key`, and `key = value` in tables: a key that was renamed is noticed here."""
    known = {(".".join(key.path[:-1]), key.path[-1]) for key in keys()}
    sections = {section for section, _ in known}
    for piece in code(readme):
        for section, name in re.findall(r"^\[([a-z_.]+)\] ([a-z_]+)", piece):
            assert (section, name) in known, piece
        for section in re.findall(r"^\[([a-z_.]+)\]$", piece):
            assert section in sections or tuple(section.rsplit(".", 1)) in known, piece


def test_the_readmes_configurations_can_be_loaded(readme: str, tmp_path: Path) -> None:
    """What people copy works."""
    blocks = re.findall(r"^( *)```toml\n(.*?)^ *```", readme, re.MULTILINE | re.DOTALL)
    assert blocks
    for number, (indent, block) in enumerate(blocks):
        text = re.sub(f"^{indent}", "", block, flags=re.MULTILINE)
        assert tomllib.loads(text)
        path = tmp_path / f"{number}.toml"
        path.write_text(text, encoding="utf-8")
        assert load(path, {})


def test_every_command_that_the_readme_names_exists(readme: str) -> None:
    """With its subcommands and flags, by the program's own --help."""
    lines = [re.sub(r"^\S*/bridged ", "bridged ", piece) for piece in code(readme)]
    calls = {re.sub(r"\s+#.*", "", line) for line in lines if re.match(r"bridged [a-z]", line)}
    assert calls
    commands = re.findall(r"^    ([a-z][a-z-]+)\b", bridged(), re.MULTILINE)
    for call in sorted(calls):
        _, command, *rest = call.split()
        assert command in commands, call
        # An argument in capitals or with dots isn't a subcommand; neither is a number.
        path = [command, *([rest[0]] if command == "dead-letters" and rest else [])]
        text = bridged(*path)
        for flag in re.findall(r"(--[a-z-]+)", call):
            assert flag in text, call


def test_every_command_is_in_the_readme(readme: str) -> None:
    """Nobody has to find one by chance."""
    commands = re.findall(r"^    ([a-z][a-z-]+)\b", bridged(), re.MULTILINE)
    named = "\n".join(code(readme))
    assert [each for each in commands if f"bridged {each}" not in named and f"make {each}" not in named] == []


def test_every_file_that_the_readme_names_exists(readme: str) -> None:
    """The way through the program is the one that is there; a name alone stands for a neighbour of the one before."""
    folder = ROOT
    for piece in code(readme):
        if re.fullmatch(r"(bridged|systemd|tests|bench)/[\w./-]+", piece):
            folder = (ROOT / piece).parent
            assert (ROOT / piece).exists(), piece
        elif re.fullmatch(r"\w+\.py", piece):
            assert (folder / piece).exists(), piece


def test_every_make_target_that_the_readme_names_exists(readme: str) -> None:
    """The two commands that everybody tries first."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {match for piece in code(readme) for match in re.findall(r"^make ([a-z]+)", piece)}
    assert {"demo", "test"} <= targets <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_what_is_installed_is_where_the_service_finds_it(readme: str) -> None:
    """Each pip is that of the folder that the units' program lies in: the system's own refuses, or installs elsewhere."""
    (program,) = re.findall(r"^ExecStart=(\S+)", (ROOT / "systemd/bridged.service").read_text(), re.MULTILINE)
    pips = [word for piece in code(readme) for word in re.findall(r"(\S*)pip install", piece)]
    assert set(pips) == {"/opt/bridged/bin/"}
    assert f"ln -sf /opt/bridged/bin/bridged {program}" in readme
    assert readme.index("umask 022") < readme.index("/opt/bridged/bin/pip")


def test_the_readmes_figures(readme: str) -> None:
    """How many types there are, and how many of them have two spellings."""
    assert f"The {len(EVENT_TYPES)} event types" in readme
    assert f"the {sum(row.seed_name is not None for row in EVENT_TYPES)} types of that page" in readme


WORKS, DEAD, FAILS = "#!/bin/sh\n", "#!/nowhere/.venv/bin/python\n", "#!/bin/sh\nexit 1\n"


@pytest.mark.parametrize(
    ("bridged", "python", "installed", "kept"),
    [
        (WORKS, WORKS, True, True),
        (FAILS, WORKS, True, True),  # by a mistake in the source
        (DEAD, WORKS, True, False),  # it was moved
        (WORKS, FAILS, True, False),  # its packages are another Python's
        (DEAD, WORKS, False, True),  # it is being made
    ],
)
def test_an_environment_that_cannot_be_used_is_made_anew(
    tmp_path: Path, bridged: str, python: str, installed: bool, kept: bool
) -> None:
    """A clone that was moved, and a Python that was upgraded, need no `make clean`."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    for name, text in (("bridged", bridged), ("python", python)):
        (tmp_path / ".venv/bin" / name).write_text(text)
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    if installed:
        (tmp_path / ".venv/.installed").touch()
    said = subprocess.run(["make", "-n", "demo"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert ("-m venv .venv" not in said) == kept
    assert ".venv/bin/bridged demo" in said


def test_a_tool_that_a_distribution_lacks_keeps_no_other_away(tmp_path: Path) -> None:
    """Ubuntu has no package chromium: `make test` installs the others all the same, and says which is missing."""
    (tmp_path / "id").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "apt-get").write_text(
        f'#!/bin/sh\nfor last; do :; done\necho "$last" >> {tmp_path}/asked\ntest "$last" != chromium\n'
    )
    for name in ("id", "apt-get"):
        (tmp_path / name).chmod(0o755)
    for name in ("mkdir", "ln"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    make = shutil.which("make") or "make"
    result = subprocess.run(
        [make, "--no-print-directory", "-C", str(ROOT), "tools", f"MASKED={tmp_path}/masked/unit"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert "No package chromium here" in result.stdout
    asked = (tmp_path / "asked").read_text().split()
    assert {"npm", "strace", "prometheus", "fonts-dejavu-core", "chromium"} <= set(asked)
