"""Rates and shares of a replica, out of its metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.rollout.vitals import WINDOW_S, VitalSigns


def test_rates_are_of_the_last_seconds_and_shares_never_exceed_one() -> None:
    registry, now = CollectorRegistry(), 100.0
    tokens = Counter("multiattempt_rollout_tokens_sampled_total", "", registry=registry)
    idle = Counter("multiattempt_rollout_engine_idle_seconds_total", "", ["because"], registry=registry)
    grading = Histogram("multiattempt_rollout_grading_seconds", "", registry=registry)
    Gauge("multiattempt_rollout_sequences_running", "", registry=registry).set(3)
    signs = VitalSigns(lambda: now, registry=registry)
    first = signs()
    assert first["sequences"] == 3.0 and "tokens_per_s" not in first and first["grading_ms"] is None
    tokens.inc(100)
    idle.labels("tasks").inc(1)
    idle.labels("grading").inc(7)
    grading.observe(0.25)
    now += 4
    then = signs()
    assert (then["tokens_per_s"], then["share_idle_tasks"], then["share_idle_grading"]) == (25.0, 0.25, 1.0)
    assert then["grading_ms"] == 250.0
    now += WINDOW_S + 1
    signs()
    now += 1
    assert signs()["tokens_per_s"] == 0.0
