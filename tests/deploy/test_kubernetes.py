"""deploy/kubernetes against what the processes do, and the settings and metrics that there are."""

import tomllib
from ipaddress import ip_network
from typing import Any

import pytest

from cli.main import main
from core.addresses import AddressClass, network_table
from tests.support.deployment import DEPLOY, SETTINGS, documents, drain_seconds, port_of, unknown
from tests.support.metrics_page import ROWS
from tests.support.paths import ROOT

KUBERNETES = DEPLOY / "kubernetes"
[KUSTOMIZATION] = documents(KUBERNETES / "kustomization.yaml")
OBJECTS = [it for file in KUSTOMIZATION["resources"] for it in documents(KUBERNETES / file)]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def named(kind: str, name: str) -> Any:
    [found] = [it for it in OBJECTS if it["kind"] == kind and it["metadata"]["name"] == name]
    return found


def pod_specs() -> dict[str, Any]:
    """By the name of the workload."""
    specs = {}
    for it in OBJECTS:
        template = it.get("spec", {}).get("jobTemplate", it).get("spec", {}).get("template")
        if template:
            specs[it["metadata"]["name"]] = template["spec"]
    return specs


def settings() -> dict[str, str]:
    lines = (KUBERNETES / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def container(spec: Any) -> Any:
    [only] = spec["containers"]
    return only


def test_every_setting_is_known_and_no_secret_is_one() -> None:
    assert unknown(settings()) == []
    assert not {"WEBHOOK_DATABASE_URL", "WEBHOOK_ENCRYPTION_KEYS"} & settings().keys()
    mounted = {"database-url", "encryption-keys"}
    files = {value.rpartition("/") for name, value in settings().items() if "/run/secrets" in value}
    assert {name for _, _, name in files} == mounted
    for name, spec in pod_specs().items():
        [mount] = container(spec)["volumeMounts"]
        if name == "postrider-canary":
            # It has tokens instead, and no settings.
            assert "envFrom" not in container(spec)
            continue
        assert {directory for directory, _, _ in files} == {mount["mountPath"]}
        assert mount["readOnly"] is True


def test_every_file_is_applied_or_says_by_whom() -> None:
    here = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert here == set(KUSTOMIZATION["resources"])
    [image] = KUSTOMIZATION["images"]
    assert image["newTag"] == VERSION
    [label] = KUSTOMIZATION["labels"]
    assert label["pairs"]["app.kubernetes.io/version"] == VERSION


@pytest.mark.parametrize("name", pod_specs())
def test_a_pod_has_no_rights_and_knows_its_bounds(name: str) -> None:
    spec = pod_specs()[name]
    only = container(spec)
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        # Otherwise the user of the image could not read the secrets.
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    # A Service called webhook-… would become variables that no process starts with.
    assert spec["enableServiceLinks"] is False
    assert only["image"] == "postrider"
    assert {"cpu", "memory"} <= only["resources"]["requests"].keys()
    assert "memory" in only["resources"]["limits"]


@pytest.mark.parametrize("process", ["server", "delivery"])
def test_a_process_is_given_the_time_to_drain(process: str) -> None:
    spec = pod_specs()[f"postrider-{process}"]
    assert container(spec)["args"] == [process]
    before = container(spec).get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})
    drain = before["sleep"]["seconds"] + drain_seconds(settings(), process)
    assert spec["terminationGracePeriodSeconds"] >= drain + 5


def test_probes_and_policies_know_the_ports() -> None:
    grpc = port_of("WEBHOOK_LISTEN_ADDRESS")
    server, delivery = (
        container(pod_specs()[f"postrider-{name}"]) for name in ("server", "delivery")
    )
    assert {port["name"]: port["containerPort"] for port in server["ports"]} == {
        "grpc": grpc,
        "metrics": port_of("WEBHOOK_SERVER_METRICS_ADDRESS"),
    }
    assert {port["name"]: port["containerPort"] for port in delivery["ports"]} == {
        "metrics": port_of("WEBHOOK_DELIVERY_METRICS_ADDRESS")
    }
    # A restart does not repair an unavailable database.
    assert server["livenessProbe"]["grpc"] == {"port": grpc, "service": "liveness"}
    assert server["readinessProbe"]["grpc"] == {"port": grpc}
    assert delivery["livenessProbe"]["httpGet"] == {"path": "/live", "port": "metrics"}
    assert delivery["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "metrics"}


def test_canary_job_outlasts_its_own_deadlines() -> None:
    cron = named("CronJob", "postrider-canary")["spec"]
    job = cron["jobTemplate"]["spec"]
    template = job["template"]
    command, *options = container(template["spec"])["args"]
    given = dict(option.partition("=")[::2] for option in options)
    assert given.keys() <= {name for it in main.commands["canary"].params for name in it.opts}
    service = named("Service", "postrider-canary")["spec"]
    assert command == "canary"
    assert given["--listen"] == f"0.0.0.0:{service['ports'][0]['port']}"
    # The time after the timeout, to clean up and to start.
    assert job["activeDeadlineSeconds"] >= float(given["--timeout"]) + 30
    assert cron["concurrencyPolicy"] == "Forbid"
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    [client] = [it for it in OBJECTS if it["metadata"]["name"] == "postrider-calls"]
    allowed = client["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert allowed.items() <= template["metadata"]["labels"].items()


def test_budgets_services_and_scalers_are_of_pods_that_there_are() -> None:
    labels = [
        it["spec"]["template"]["metadata"]["labels"] for it in OBJECTS if it["kind"] == "Deployment"
    ]
    for it in OBJECTS:
        selector = it.get("spec", {}).get("selector", {})
        wanted = selector.get("matchLabels", selector)
        if it["kind"] in {"Deployment", "Service", "PodDisruptionBudget"}:
            if it["metadata"]["name"] == "postrider-canary":
                continue
            assert wanted in labels, it["metadata"]["name"]
        if it["kind"] == "HorizontalPodAutoscaler":
            target = it["spec"]["scaleTargetRef"]
            # Else every apply would undo what the scaler did.
            assert "replicas" not in named(target["kind"], target["name"])["spec"]


def test_scaler_metrics_exist_and_are_adapted() -> None:
    asked = {
        metric[kind]["metric"]["name"]
        for metric in named("HorizontalPodAutoscaler", "postrider-delivery")["spec"]["metrics"]
        if (kind := metric["type"].lower()) in {"external", "pods"}
    }
    [adapter] = documents(KUBERNETES / "monitoring/prometheus-adapter.yaml")
    rules = [*adapter["rules"]["external"], *adapter["rules"]["custom"]]
    assert {rule["name"]["as"] for rule in rules} == asked
    assert all(rule["seriesQuery"].startswith(rule["name"]["as"] + "{") for rule in rules)
    assert asked <= set(ROWS)


def test_jobs_of_prometheus_have_the_names_that_its_alerts_know() -> None:
    [monitor] = documents(KUBERNETES / "monitoring/pod-monitor.yaml")
    [label] = monitor["spec"]["selector"]["matchExpressions"]
    assert monitor["spec"]["jobLabel"] == label["key"]
    [scraped] = documents(DEPLOY / "prometheus/prometheus.yml")
    assert {job["job_name"] for job in scraped["scrape_configs"]} == set(label["values"])


def test_egress_reaches_only_the_public_internet() -> None:
    [rule] = named("NetworkPolicy", "postrider-internet")["spec"]["egress"]
    blocks = [it["ipBlock"] for it in rule["to"]]
    refused = [network for network, kind in network_table() if kind is not AddressClass.PUBLIC]
    public = {str(network) for network, kind in network_table() if kind is AddressClass.PUBLIC}
    assert {block["cidr"] for block in blocks} == public
    for block in blocks:
        whole = ip_network(block["cidr"])
        excepted = [ip_network(text) for text in block["except"]]
        inside = [it for it in refused if it.version == whole.version and it.subnet_of(whole)]  # type: ignore[arg-type]
        # As the dialler's table, no more and no less.
        assert all(any(it.subnet_of(other) for other in excepted) for it in inside)  # type: ignore[arg-type]
        assert all(other in inside for other in excepted)
    ports = {(it["port"], it["port"]) for it in rule["ports"]}
    assert ports == set(SETTINGS["WEBHOOK_ALLOWED_PORTS"])
