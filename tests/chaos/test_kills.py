"""Ten kills over one run, by a fixed seed: `make soak` has two hundred."""

import sys
from pathlib import Path

import pytest
from live_run import live_run
from soak import ORDER, digests_agree, lives_are_monotone, soak, table, trained_once

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def test_services_killed_in_transfers_and_checkpoints_cost_nothing_but_time(tmp_path: Path) -> None:
    # Blocks larger than a batch: nothing is asked of the models ahead, in parts that depend on what has come so far.
    with live_run(tmp_path, "--rollout.replicas=2", "--learner.micro_tokens=4096") as run:
        found = soak(run, kills=10, seed=270)  # in transfers and in checkpoints: two replicas, two learners, Redis
        assert run.stop() == 143
        audit = run.audit()
        sys.stdout.write(table(run, found, audit))
    assert audit["clean"] and audit["unaccounted"] == [] and audit["conflicts"] == {}
    assert trained_once(run)["twice"] == 0
    assert {kill.service.partition("-")[0] for kill in run.kills} == set(ORDER)
    assert lives_are_monotone(run.lines()) > 1
    again, same = digests_agree(run)
    assert again == same  # what a killed learner had published is made again to the bit
    assert "--resume" in run.terminal().splitlines()[-1]
