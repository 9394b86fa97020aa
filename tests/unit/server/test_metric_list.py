"""Metrics for Prometheus: every metric of the list is rendered from a snapshot, and what stands in deploy/ asks only for those."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from touchline_protos import Counts
from touchline_protos.types.status import (
    LATENCY_BOUNDS_S,
    ActorStatus,
    DeliveredStatus,
    DurabilityStatus,
    FlowStatus,
    LatencyStatus,
    LearnerStatus,
    MethodStatus,
    PoolStatus,
    RateInfo,
    RefusalStatus,
    ServerState,
    ServerStatus,
    ServingState,
    TableStatus,
    Transport,
    Verdict,
    WaitCause,
    WaitStatus,
)
from touchline_server.http.metric_list import METRICS
from touchline_server.http.prometheus import PrometheusExporter

DEPLOY = Path(__file__).parents[3] / "deploy"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"

LATENCY = LatencyStatus(
    count=6, sum_s=0.5, bounds_s=LATENCY_BOUNDS_S, buckets=tuple(3 if one in (4, 20) else 0 for one in range(len(LATENCY_BOUNDS_S) + 1))
)


def delivered(transport: Transport, scale: int) -> DeliveredStatus:
    return DeliveredStatus(transport, batches=scale, slices=10 * scale, rows=40 * scale, bytes=400 * scale)


def snapshot() -> ServerStatus:
    """Returns a snapshot in which nothing that a metric shows is left out."""
    flows = (
        FlowStatus(window_s=60.0, rows_in=1),
        FlowStatus(window_s=0.0, episodes_in=5, rows_in=50, bytes_in=500, rows_evicted=7, episodes_evicted=1,
                   delivered=(delivered(Transport.RING, 3), delivered(Transport.UNARY, 1))),
    )  # fmt: skip
    durability = DurabilityStatus(
        mode="batch", state="full", pending_episodes=2, pending_bytes=200, unsynced_s=0.25, sync=LATENCY, file_bytes=4096,
        disk_free_bytes=8192, last_snapshot_unix_s=1e9, restored=True, restored_rows=30, restore_rows=40,
    )  # fmt: skip
    rate = RateInfo(4.0, 64.0, 100, 50, 190, 5, 20, 10.0, 1, 2, (), ())
    waits = (WaitStatus(True, WaitCause.DATA, 3.0, 1, 33.0), WaitStatus(False, WaitCause.STORING, 1.0, 0, 11.0))
    table = TableStatus(
        counts=Counts(steps_stored=43, episodes_stored=4, episodes_refused=6, episodes_duplicate=2), capacity=1000, size_bytes=10_000,
        device="cpu", verdict=Verdict.LEARNERS_WAIT, waits=waits, flows=flows, oldest_stored_s=90.0, median_stored_s=30.0,
        mean_sampled_s=20.0, newest_policy_version=9, mean_stored_policy_version=7.5, mean_sampled_policy_version=8.0,
        episodes_not_sampled=1, rate=rate, durability=durability,
    )  # fmt: skip
    return ServerStatus(
        server=ServerState(
            version="0.2.0", protocol_version="1.2", state=ServingState.SERVING, uptime_s=100.0, loop_delay=LATENCY,
            pools=(PoolStatus("event-loop", 1, 1, 0, 0.4),), methods=(MethodStatus("AddEpisode", 2, LATENCY),),
        ),
        tables=(table, TableStatus(table='de"mos\\x\n')),
        actors=(
            ActorStatus(name="anna", episodes=4, rows=40, mean_reward_sum=1.5, last_episode_age_s=2.0, spool_episodes=3),
            ActorStatus(name="silent", refused=1),
            ActorStatus(episodes=10, rows=100, mean_reward_sum=1.0, last_episode_age_s=1.0, others=7),
        ),
        learners=(
            LearnerStatus(transport=Transport.RING, pending_bytes=64),
            LearnerStatus(transport=Transport.RING, pending_bytes=8, others=3),
        ),
        refusals=(RefusalStatus("invalid-episode", "", 6), RefusalStatus("unauthenticated", None, 2)),
    )  # fmt: skip


def rendered(accept: str = "") -> str:
    text, content_type = PrometheusExporter().render(snapshot(), accept)
    assert ("openmetrics" in content_type) == ("openmetrics" in accept)
    return text.decode()


def values() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = parse_text(rendered())
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


@pytest.mark.parametrize(("accept", "parse"), [("", parse_text), (OPENMETRICS, parse_openmetrics)])
def test_every_metric_has_samples_and_its_help(accept: str, parse: object) -> None:
    families = {family.name: family for family in parse(rendered(accept))}  # type: ignore[operator]

    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")] if metric.kind == "counter" else families[metric.name]
        assert family.samples, metric.name
        assert family.type == metric.kind
        assert family.documentation == metric.help


def test_values_and_labels() -> None:
    found = values()
    default = ("table", "default")

    assert found["touchline_steps_added_total", (default,)] == 50
    assert found["touchline_batches_delivered_total", (default, ("transport", "ring"))] == 3
    assert found["touchline_learners", (("transport", "ring"),)] == 4
    assert found["touchline_learners", (("transport", "stream"),)] == 0
    assert found["touchline_learner_pending_bytes", ()] == 72
    assert found["touchline_actors_wait_seconds_total", (("cause", "storing"), default)] == 11
    assert found["touchline_refusals_total", (("reason", "unauthenticated"), ("table", ""))] == 2
    assert found["touchline_refusals_total", (("reason", "invalid-episode"), default)] == 6
    assert {verdict: found["touchline_verdict", (default, ("verdict", verdict))] for verdict in ("balanced", "learners_wait")} == {
        "balanced": 0,
        "learners_wait": 1,
    }
    assert {state: found["touchline_store_state", (("state", state), default)] for state in ("ok", "full", "failed")} == {
        "ok": 0,
        "full": 1,
        "failed": 0,
    }
    assert found["touchline_steps_stored", (("table", 'de"mos\\x\n'),)] == 0


def test_histograms_are_cumulative_and_end_with_all() -> None:
    found = values()
    buckets = [value for (name, _), value in found.items() if name == "touchline_event_loop_delay_seconds_bucket"]

    assert buckets == sorted(buckets) and buckets[3:5] == [0, 3] and buckets[-1] == 6
    assert found["touchline_event_loop_delay_seconds_count", ()] == 6
    assert found["touchline_event_loop_delay_seconds_sum", ()] == 0.5


def test_actors_that_are_summed_have_sums_only_and_unknown_values_are_left_out() -> None:
    found = values()
    of = {name: dict(labels)["actor"] for (name, labels) in found if name.startswith("touchline_actor_")}
    assert set(of) == {metric.name for metric in METRICS if metric.name.startswith("touchline_actor_")}

    def actors(name: str) -> set[str]:
        return {dict(labels)["actor"] for (one, labels) in found if one == name}

    assert actors("touchline_actor_episodes_total") == {"anna", "silent", "(others)"}
    assert actors("touchline_actor_mean_return") == {"anna"}
    assert actors("touchline_actor_last_episode_age_seconds") == {"anna"}
    assert actors("touchline_actor_spool_episodes") == {"anna"}


def test_a_snapshot_without_anything_renders() -> None:
    assert b"touchline_state" in PrometheusExporter().render(ServerStatus(), OPENMETRICS)[0]


def test_dashboard_and_alerts_ask_for_metrics_that_exist() -> None:
    known = {metric.name for metric in METRICS}
    known |= {f"{metric.name}_{part}" for metric in METRICS if metric.kind == "histogram" for part in ("bucket", "sum", "count")}
    dashboard = json.loads((DEPLOY / "grafana" / "touchline.json").read_text())
    texts = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    texts += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    texts += [(DEPLOY / "prometheus" / "alerts.yml").read_text()]

    assert len(texts) > 30
    assert {name for text in texts for name in re.findall(r"\btouchline_\w+", text)} <= known


def test_the_dashboard_is_what_its_panels_say() -> None:
    command = [sys.executable, str(DEPLOY / "grafana" / "make_dashboard.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        ["check", "metrics"],
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_finds_nothing_wrong(command: list[str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: Debian has it in the package prometheus")
    given = rendered() if command[1] == "metrics" else ""
    result = subprocess.run([promtool, *command], input=given, capture_output=True, text=True, cwd=DEPLOY / "prometheus", check=False)
    assert result.returncode == 0, result.stdout + result.stderr
