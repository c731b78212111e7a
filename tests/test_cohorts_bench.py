"""`python -m bench cohorts`, in seconds: it must find Braze with exactly Mixpanel's membership."""

import json
from pathlib import Path

from test_bench import finished


def test_a_second_full_sync_sends_nothing(tmp_path: Path) -> None:
    """Four real processes; the benchmark fails if a member is missing."""
    code, out, err = finished("cohorts", "--members", "3000", "--json", "cohorts.json", cwd=tmp_path)
    assert code == 0, out + err
    (run,) = json.loads((tmp_path / "cohorts.json").read_text())["runs"]
    assert (run["points"], run["again_points"]) == (3000, 0)
    assert {entry.name for entry in tmp_path.iterdir()} == {"cohorts.json"}
