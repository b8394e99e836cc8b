"""Writes the dashboards beside it: `python deploy/grafana/make.py`. A test says whether the files are what it writes.

A panel is (title, unit, {legend: expression}); three stand in a row.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Panel = tuple[str, str, Mapping[str, str]]

FOLDER = Path(__file__).with_name("dashboards")
COLUMNS, WIDTH, HEIGHT = 3, 8, 8


def quantiles(name: str, by: str = "") -> dict[str, str]:
    """Median and 99th percentile of a histogram."""
    group = f"le, {by}" if by else "le"
    return {
        f"p{round(100 * q)}": f"histogram_quantile({q}, sum by ({group}) (rate({name}_bucket[$__rate_interval])))"
        for q in (0.5, 0.99)
    }


def rate(name: str, by: str = "", labels: str = "") -> str:
    """Per second, summed."""
    return f"sum{f' by ({by})' if by else ''} (rate({name}{labels}[$__rate_interval]))"


L, R, G, W = "multiattempt_learner_", "multiattempt_rollout_", "multiattempt_grader_", "multiattempt_ledger_"

DASHBOARDS: dict[str, Sequence[Panel]] = {
    "training": [
        ("Reward", "none", {"mean": f"{L}reward", "allowed {{allowed}}": f"{L}allowed_reward"}),
        ("Accuracy by attempt", "percentunit",
         {"dialogue": f"{L}accuracy_last_ratio", "attempt {{attempt}}": f"{L}attempt_accuracy_ratio"}),
        ("Response length", "none", {"mean tokens": f"{L}response_tokens", "longest": f"{L}response_tokens_max"}),
        ("KL divergence, nats per token", "none",
         {"to the reference": f"{L}kl_ref_nats", "to the sampling policy": f"{L}kl_behaviour_nats"}),
        ("Staleness, versions", "none",
         {"mean": f"{L}staleness_mean_versions", "oldest": f"{L}staleness_max_versions"}),
        ("Throughput", "none", {"dialogues/s": f"{L}dialogues_per_second"}),
        ("The learner's time", "percentunit", {"{{phase}}": rate(f"{L}phase_seconds_total", "phase")}),
        ("Step", "s", {"whole": f"{L}step_seconds", "publishing": f"{L}publish_seconds"}),
        ("Version", "none", {"version": f"{L}version"}),
        ("Entropy, nats per token", "none", {"policy": f"{L}entropy_nats"}),
        ("Loss", "none", {"policy": f"{L}policy_loss", "value": f"{L}value_loss"}),
        ("Gradient norm", "none", {"actor": f"{L}grad_norm", "critic": f"{L}critic_grad_norm"}),
        ("Clipped, effective sample", "percentunit",
         {"clipped": f"{L}clip_fraction_ratio", "effective sample": f"{L}importance_ess_ratio"}),
        ("Discarded dialogues per step", "none",
         {"dropped": f"{L}dropped_dialogues", "too old": f"{L}dropped_stale_dialogues",
          "masked": f"{L}masked_dialogues"}),
        ("Not finite, skipped steps", "none", {"skipped": f"{L}nonfinite_steps"}),
    ],
    "rollout": [
        ("Replicas", "none", {"{{state}}": "multiattempt_registry_replicas"}),
        ("Sampled tokens/s", "none", {"{{instance}}": rate(f"{R}tokens_sampled_total", "instance")}),
        ("Dialogues/s", "none", {"{{outcome}}": rate(f"{R}dialogues_total", "outcome")}),
        ("Sequences", "none", {"running {{instance}}": f"{R}sequences_running",
                               "waiting {{instance}}": f"{R}sequences_waiting"}),
        ("Dialogues under way", "none", {"{{instance}}": f"{R}dialogues_running"}),
        ("KV cache", "percentunit", {"{{instance}}": f"{R}kv_cache_used_ratio"}),
        ("Idle share of the engines", "percentunit",
         {"{{because}} {{instance}}": rate(f"{R}engine_idle_seconds_total", "because, instance")}),
        ("First token", "s", quantiles(f"{R}first_token_seconds")),
        ("Verdict, waiting included", "s", quantiles(f"{R}grading_seconds")),
        ("Dialogue", "s", quantiles(f"{R}dialogue_seconds")),
        ("Verdicts/s", "none", {"{{verdict}}": rate(f"{R}attempts_total", "verdict")}),
        ("Prefix cache", "percentunit",
         {"found": f"{rate(f'{R}prompt_tokens_cached_total')} / {rate(f'{R}prompt_tokens_total')}"}),
        ("Preemptions/s", "none", {"{{instance}}": rate(f"{R}preemptions_total", "instance")}),
        ("Versions behind, oldest dialogue", "none", {"{{instance}}": f"{R}staleness_versions"}),
    ],
    "grader": [
        ("Items/s", "none", {"{{verdict}}": rate(f"{G}items_total", "verdict")}),
        ("Deciding layer", "none", {"{{method}}": rate(f"{G}items_total", "method")}),
        ("Time of an item in a worker", "s", quantiles(f"{G}item_seconds")),
        ("Queue", "none", {"{{instance}}": f"{G}queue_items"}),
        ("Workers ready", "none", {"{{instance}}": f"{G}workers_ready"}),
        ("Workers lost/s", "none", {"{{cause}}": rate(f"{G}worker_failures_total", "cause")}),
        ("Share of time-outs", "percentunit", {"time-outs": rate(f"{G}items_total", labels='{verdict="timeout"}')
                                               + " / " + rate(f"{G}items_total")}),
        ("From the cache", "percentunit", {"hits": f"{rate(f'{G}cache_hits_total')} / {rate(f'{G}items_total')}"}),
        ("Workers recycled/s", "none", {"recycled": rate(f"{G}workers_recycled_total")}),
    ],
    "ledger": [
        ("Tasks", "none", {"{{state}}": f"{W}tasks"}),
        ("Trajectories", "none", {"{{state}}": f"{W}trajectories"}),
        ("Dead letters", "none", {"dead": f"{W}dead_letters"}),
        ("Redis' memory", "bytes", {"used": f"{W}redis_memory_bytes"}),
        ("Issued per step", "none", {"tasks": f"{L}issued_tasks"}),
        ("Completed/s", "none", {"{{outcome}}": rate(f"{R}dialogues_total", "outcome")}),
        ("Replicas lost", "none", {"lost": "increase(multiattempt_registry_replicas_lost_total[$__rate_interval])"}),
    ],
    "weights": [
        ("Version", "none", {"learner": f"{L}version", "{{instance}}": f"{R}weight_version"}),
        ("Furthest behind", "none", {"versions": "multiattempt_registry_replica_versions_behind"}),
        ("Publishing", "s", {"whole": f"{L}publish_seconds", "{{phase}}": f"{L}publish_phase_seconds"}),
        ("Generation stood still", "s", quantiles(f"{R}weight_pause_seconds")),
        ("Receiving", "s", quantiles(f"{R}weight_receive_seconds")),
        ("Swaps/s", "none", {"{{outcome}}": rate(f"{R}weight_swaps_total", "outcome")}),
        ("Replicas of a publication", "none", {"updated": f"{L}replicas", "dropped": f"{L}replicas_dropped"}),
        ("Tokens by age", "percentunit", {"{{versions}} versions": f"{L}token_staleness_ratio"}),
    ],
}  # fmt: skip


def dashboard(name: str, panels: Sequence[Panel]) -> dict[str, Any]:
    """Grafana's JSON."""
    return {
        "uid": f"multiattempt-{name}",
        "title": name.capitalize(),
        "tags": ["multiattempt"],
        "schemaVersion": 41,
        "refresh": "5s",
        "time": {"from": "now-1h", "to": "now"},
        "editable": False,
        "graphTooltip": 1,
        "links": [{"type": "dashboards", "tags": ["multiattempt"], "title": "Dashboards", "asDropdown": False}],
        "panels": [_panel(i, *panel) for i, panel in enumerate(panels)],
    }


def _panel(number: int, title: str, unit: str, series: Mapping[str, str]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "prometheus"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": number % COLUMNS * WIDTH, "y": number // COLUMNS * HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"lineWidth": 1, "fillOpacity": 4}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend, "datasource": source}
            for i, (legend, expression) in enumerate(series.items())
        ],
    }


def render(name: str) -> str:
    """The file of a dashboard."""
    return json.dumps(dashboard(name, DASHBOARDS[name]), indent=1) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(render(each), encoding="utf-8")
