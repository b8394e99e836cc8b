"""The processes that `doctor --gpu` starts, over gloo between two CPU processes."""

import pytest

from services.cli.gpu import probe

pytestmark = pytest.mark.integration
PROBE = "services.contracts.weights.probe"


def test_weights_travel_a_silent_peer_is_noticed_and_a_new_group_serves() -> None:
    found = list(probe(PROBE, "gloo", "cpu", "--mb", "40"))  # three buckets
    assert [(finding.check, finding.good) for finding in found] == [
        ("gloo: transfer", True),
        ("gloo: silent peer", True),
        ("gloo: new group", True),
    ]


def test_a_probe_that_hangs_or_fails_is_a_finding() -> None:
    [finding] = probe(PROBE, "gloo", "cpu", timeout_s=0.1)
    assert not finding.good and "not done within 0.1 s" in finding.result
    [finding] = probe("services.no_such_probe")
    assert not finding.good and "No module named" in finding.result
