"""Real processes killed at random instants; ``tests/kill_campaign.py`` runs as many as one has time for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kill_campaign import make_campaign


@pytest.mark.slow
def test_killed_at_random_instants_the_project_opens_at_the_old_or_the_new_state(tmp_path: Path) -> None:
    campaign = make_campaign(tmp_path, seed=int(os.environ.get("TREELORA_KILL_SEED", "1")))
    wanted = int(os.environ.get("TREELORA_KILLS", "20"))
    while campaign.tried["killed"] < wanted:
        campaign.kill_one()
    assert campaign.tried["found at the old state"] + campaign.tried["found at the new state"] == wanted
    print(dict(campaign.tried))
