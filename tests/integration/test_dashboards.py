"""Every metric that a panel or an alert asks for is exported by a service: the services' own registries say."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DEMO = ROOT / "tests" / "data" / "demo_run"
OF_PROMETHEUS = {"up": {"job", "instance"}}
OF_THE_SCRAPE = {"job", "instance"}
# What each service imports when it runs; the learner's figures are made by its steps: those of a real run are exported.
SERVICES = {
    "grader": "import services.grader.app",
    "rollout": "import services.rollout.app",
    "learner": (
        "import json, services.learner.loop, services.learner.observer, services.learner.metrics\n"
        "from services.learner.exported import export\n"
        f"rows = [json.loads(line) for line in open({str(DEMO / 'metrics.jsonl')!r})]\n"
        "export({name: value for row in rows for name, value in row.items() if value is not None})"
    ),
    "console": "import services.console.app",
}
TELL = """
import json, sys
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
found = {}
for collector in set(REGISTRY._names_to_collectors.values()):
    if isinstance(collector, MetricWrapperBase):
        for family in collector.describe():
            names = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
            for ending in names:
                found[family.name + ending] = [*collector._labelnames, *(["le"] if ending == "_bucket" else [])]
sys.stdout.write(json.dumps({name: labels for name, labels in found.items() if name.startswith("multiattempt_")}))
"""


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Metric -> its labels, of all services."""
    found: dict[str, set[str]] = {}
    for name, code in SERVICES.items():
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code + TELL], cwd=ROOT, capture_output=True, text=True, timeout=110
        )
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
        told: dict[str, list[str]] = json.loads(done.stdout[done.stdout.rindex('{"') :])
        assert told, name
        found |= {metric: set(labels) for metric, labels in told.items()}
    return found


def load_make() -> ModuleType:
    specification = importlib.util.spec_from_file_location("make_dashboards", DEPLOY / "grafana" / "make.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[tuple[str, str]]:
    """Where each is asked, and what."""
    found = [(rule["alert"], rule["expr"]) for rule in alerts()]
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            found += [(f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"]]
    return found


def asked(expression: str) -> list[tuple[str, set[str]]]:
    """(metric, labels it is asked by) of each selector; the labels of `by (...)` count for all of them."""
    grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
    selectors = re.findall(r"\b(multiattempt_\w+|up)\b(?:\{([^}]*)\})?", expression)
    return [(name, grouped | set(re.findall(r"(\w+)\s*(?:=|!)", labels))) for name, labels in selectors]


def test_every_metric_and_label_that_is_asked_for_is_exported(exported: dict[str, set[str]]) -> None:
    known = exported | OF_PROMETHEUS
    missing = [
        f"{where}: {name}{sorted(labels - known.get(name, set()) - OF_THE_SCRAPE) or ''}"
        for where, expression in expressions()
        for name, labels in asked(expression)
        if name not in known or labels - known[name] - OF_THE_SCRAPE
    ]
    assert len(expressions()) > 60 and missing == []


def test_legends_name_labels_that_there_are(exported: dict[str, set[str]]) -> None:
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel["targets"]:
                labels = {label for name, _ in asked(target["expr"]) for label in exported[name]} | OF_THE_SCRAPE
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, panel["title"]


def test_every_metric_says_its_unit_and_comes_from_one_service(exported: dict[str, set[str]]) -> None:
    for name in exported:
        assert not re.search(r"_(s|ms|mb|pct|percent)(_total|_bucket|_count|_sum)?$", name), name
        assert re.match(r"multiattempt_(grader|rollout|learner|ledger|registry|console)_", name), name


def test_the_reference_of_metrics_lists_all_and_no_other(exported: dict[str, set[str]]) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(multiattempt_\w+)`", page, re.MULTILINE))
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported}
    assert listed == families


def test_the_dashboards_are_what_their_script_writes() -> None:
    make = load_make()
    files = {path.stem: path.read_text(encoding="utf-8") for path in (DEPLOY / "grafana" / "dashboards").glob("*.json")}
    assert files == {name: make.render(name) for name in make.DASHBOARDS}
    assert set(files) == {"training", "rollout", "grader", "ledger", "weights"}


def test_alerts_say_how_bad_it_is_and_what_to_do() -> None:
    names = {rule["alert"] for rule in alerts()}
    assert {"ReplicaLost", "LearnerStarved", "GraderTimeouts", "Stale", "NonFinite"} <= names
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert len(rule["annotations"]["summary"]) > 10 and len(rule["annotations"]["description"]) > 10


def test_every_service_is_scraped_and_the_data_source_is_the_panels() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    assert {job["job_name"] for job in settings["scrape_configs"]} == set(SERVICES)
    folder = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    for _, panels in load_make().DASHBOARDS.items():
        made = load_make().dashboard("x", panels)
        assert {panel["datasource"]["uid"] for panel in made["panels"]} == {source["uid"]}
