"""Prometheus's own tool over our configuration and alerts (Debian: `apt install prometheus`)."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
CASES = Path(__file__).with_name("alerts_test.yml")
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (apt install prometheus)")


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run([str(PROMTOOL), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_the_configuration_and_the_rules_are_prometheus_own() -> None:
    assert "is valid" in promtool("check", "config", FOLDER / "prometheus.yml")


@needs_promtool
def test_alerts_are_raised_by_what_they_are_for_and_not_by_a_run_in_order() -> None:
    assert "SUCCESS" in promtool("test", "rules", CASES)


def test_every_alert_is_raised_by_a_case() -> None:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    cases = CASES.read_text()
    assert {name for name in alerts if f'alertname="{name}"' not in cases} == set()
