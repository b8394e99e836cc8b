"""The Kubernetes manifests: right by the cluster's schemas, right by our own settings, and locked down."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.contracts.config import load
from services.contracts.ledger import run_prefix

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUSTOMIZATIONS = ("base", "overlays/8-gpus", "overlays/4-hosts")
KUBERNETES = "1.32"
LUA = Path(__file__).parents[2] / "services" / "contracts" / "lua"

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here to render overlays with")

Manifest = dict[str, Any]


@cache
def rendered(kustomization: str) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / kustomization)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def written() -> list[Manifest]:
    """The base's files as they are."""
    resources = yaml.safe_load((FOLDER / "base" / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    texts = ((FOLDER / "base" / name).read_text(encoding="utf-8") for name in resources)
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def named(documents: list[Manifest], kind: str, name: str) -> Manifest:
    return next(d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name))


def pods(documents: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(name, pod specification) of everything that makes pods."""
    for document in documents:
        kind, name = document["kind"], document["metadata"]["name"]
        if kind in ("Deployment", "StatefulSet", "Job"):
            yield name, document["spec"]["template"]["spec"]
        elif kind == "JobSet":
            for job in document["spec"]["replicatedJobs"]:
                yield name, job["template"]["spec"]["template"]["spec"]


def validate(document: Manifest) -> None:
    """Against the cluster's schema; of JobSet, the job inside. KEDA's kinds have tests of their own."""
    match document["kind"]:
        case "ScaledObject" | "TriggerAuthentication":
            assert document["apiVersion"] == "keda.sh/v1alpha1"
        case "JobSet":
            assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
            assert set(document["spec"]) <= {"failurePolicy", "network", "replicatedJobs", "successPolicy"}
            for job in document["spec"]["replicatedJobs"]:
                assert set(job) == {"name", "replicas", "template"}
                metadata = {"name": job["name"]}
                validate(
                    {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job["template"]["spec"]}
                )
        case _:
            kubernetes_validate.validate(json.loads(json.dumps(document)), KUBERNETES, strict=True)


@pytest.mark.parametrize("document", written(), ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_each_manifest_is_valid(document: Manifest) -> None:
    validate(document)


def test_a_mistake_would_be_found() -> None:
    deployment = json.loads(json.dumps(named(written(), "Deployment", "rollout")))
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        validate(deployment)


@needs_kubectl
@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_what_kustomize_makes_is_valid(kustomization: str) -> None:
    for document in rendered(kustomization):
        validate(document)
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "multiattempt"


@pytest.mark.parametrize(("name", "pod"), pods(written()), ids=lambda value: value if isinstance(value, str) else "")
def test_no_container_may_do_more_than_it_must(name: str, pod: Manifest) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True and context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]
        for variable in container.get("env", ()):
            assert not any(word in variable["name"] for word in ("PASSWORD", "TOKEN", "KEY")) or (
                "valueFrom" in variable or variable["name"].endswith("_FILE")
            )
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted <= {v["name"] for v in pod["volumes"]} | ({"data"} if name == "redis" else set())


def test_the_grader_is_given_its_own_key_and_no_other_secret() -> None:
    pod = dict(pods(written()))["grader"]
    secrets = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert [item["key"] for secret in secrets for item in secret["items"]] == ["grader_api_key"]
    assert all("envFrom" not in container for container in pod["containers"])


def test_every_service_is_probed_and_its_disruption_bounded() -> None:
    documents = written()
    budgets = {d["metadata"]["name"]: d["spec"]["selector"] for d in documents if d["kind"] == "PodDisruptionBudget"}
    assert set(budgets) == {"redis", "grader", "rollout", "learner"}
    for name, pod in pods(documents):
        if name == "prepare":
            continue
        assert budgets[name] == {"matchLabels": {"app.kubernetes.io/name": name}}
        assert all({"startupProbe", "livenessProbe"} <= set(container) for container in pod["containers"])


def test_the_settings_are_ours(tmp_path: Path) -> None:
    environment = dict(named(written(), "ConfigMap", "settings")["data"])
    for name in environment:
        if name.endswith("_FILE"):
            (tmp_path / name).write_text("secret", encoding="utf-8")
            environment[name] = str(tmp_path / name)
    for _, pod in pods(written()):
        for variable in (v for container in pod["containers"] for v in container.get("env", ())):
            environment.setdefault(variable["name"], variable.get("value", "10.0.0.1"))
    config = load(None, env=environment)
    assert config.redis.url == "redis://:secret@redis:6379/0"
    assert (config.rollout.host, config.rollout.port, config.rollout.advertise_host) == ("0.0.0.0", 8100, "10.0.0.1")
    assert config.rollout.control_token == "secret"


def test_it_scales_on_the_stream_that_the_ledger_writes() -> None:
    documents = written()
    run = named(documents, "ConfigMap", "settings")["data"]["MULTIATTEMPT_RUN__NAME"]
    group = "local ROLLOUT = 'rollout'"
    assert group in (LUA / "prelude.lua").read_text(encoding="utf-8")
    for name in ("rollout", "grader"):
        scaled = named(documents, "ScaledObject", name)["spec"]
        assert scaled["scaleTargetRef"] == {"name": name}
        assert 1 <= scaled["minReplicaCount"] <= scaled["maxReplicaCount"]
        (trigger,) = scaled["triggers"]
        assert trigger["type"] == "redis-streams" and trigger["authenticationRef"] == {"name": "redis"}
        metadata = trigger["metadata"]
        assert (metadata["stream"], metadata["consumerGroup"]) == (f"{run_prefix(run)}tasks", "rollout")
        assert all(isinstance(value, str) for value in metadata.values())
        assert len({"lagCount", "pendingEntriesCount", "streamLength"} & set(metadata)) == 1
        assert "replicas" not in named(documents, "Deployment", name)["spec"]


@needs_kubectl
@pytest.mark.parametrize(
    ("overlay", "hosts", "gpus_per_host", "gpus_of_rollout"), [("8-gpus", 1, 4, 4), ("4-hosts", 2, 8, 16)]
)
def test_an_overlay_uses_just_the_gpus_it_is_named_for(
    overlay: str, hosts: int, gpus_per_host: int, gpus_of_rollout: int
) -> None:
    documents = rendered(f"overlays/{overlay}")
    job = named(documents, "JobSet", "learner")["spec"]["replicatedJobs"][0]["template"]["spec"]
    (learner,) = job["template"]["spec"]["containers"]
    environment = {variable["name"]: variable.get("value") for variable in learner["env"]}
    assert job["parallelism"] == job["completions"] == int(environment["NNODES"]) == hosts
    assert environment["MULTIATTEMPT_LEARNER__PROCESSES"] == str(gpus_per_host)
    assert learner["resources"]["limits"]["nvidia.com/gpu"] == str(gpus_per_host)
    (rollout,) = named(documents, "Deployment", "rollout")["spec"]["template"]["spec"]["containers"]
    per_replica = rollout["resources"]["limits"]["nvidia.com/gpu"]
    settings = named(documents, "ConfigMap", "settings")["data"]
    assert settings.get("MULTIATTEMPT_ROLLOUT__TENSOR_PARALLEL_SIZE", "1") == per_replica
    most = named(documents, "ScaledObject", "rollout")["spec"]["maxReplicaCount"]
    assert most * int(per_replica) == gpus_of_rollout
    images = {container["image"] for _, pod in pods(documents) for container in pod["containers"]}
    assert all(":" in image for image in images)


def test_nothing_is_reached_but_by_a_rule() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in written() if d["kind"] == "NetworkPolicy"}
    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    clients = policies["redis"]["ingress"][0]["from"][0]["podSelector"]["matchExpressions"][0]["values"]
    assert set(clients) == {"prepare", "rollout", "learner"}
    assert "egress" not in policies["grader"]  # it reads what models write, and asks nobody
