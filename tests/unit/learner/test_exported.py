"""Figures of a step as metrics: units in the names, families with labels."""

import pytest
from learner_data import make_trajectory
from prometheus_client import REGISTRY

from services.learner.exported import export, metric_of
from services.learner.metrics import summarise


@pytest.mark.parametrize(
    ("figure", "name", "labels"),
    [
        ("step_s", "step_seconds", {}),
        ("dialogues_per_s", "dialogues_per_second", {}),
        ("accuracy_last", "accuracy_last_ratio", {}),
        ("accuracy_attempt_3", "attempt_accuracy_ratio", {"attempt": "3"}),
        ("staleness_mean", "staleness_mean_versions", {}),
        ("staleness_2", "token_staleness_ratio", {"versions": "2"}),
        ("publish_s", "publish_seconds", {}),
        ("publish_commit_s", "publish_phase_seconds", {"phase": "commit"}),
        ("kl_ref", "kl_ref_nats", {}),
        ("something_new", "something_new", {}),
    ],
)
def test_the_name_says_the_unit(figure: str, name: str, labels: dict[str, str]) -> None:
    assert metric_of(figure) == (f"multiattempt_learner_{name}", labels)


def test_a_steps_figures_are_exported() -> None:
    figures = summarise([make_trajectory(i) for i in range(4)], version=2)
    export(figures)
    for figure, value in figures.items():
        name, labels = metric_of(figure)
        assert REGISTRY.get_sample_value(name, dict(labels)) == value
