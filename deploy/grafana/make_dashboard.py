"""Writes the Grafana dashboard, ``touchline.json``: rows of panels, each with its queries.

Run it after a change: ``python deploy/grafana/make_dashboard.py``. With ``--check`` it only says whether the file is what it would write.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).with_name("touchline.json")
"""The file with the dashboard."""

OF_TABLES = '{instance=~"$instance", table=~"$table"}'
"""Selector of the chosen servers and tables."""

OF_SERVERS = '{instance=~"$instance"}'
"""Selector of the chosen servers."""

OF_ADDS = 'instance=~"$instance", method=~"AddEpisode|LoadEpisodes"'
"""Selector of the calls that add."""

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
"""The data source that the reader of the dashboard chose."""

WIDTH, HEIGHT = 24, 8
"""Width of the dashboard and height of a row of panels, in Grafana's units."""


@dataclass(frozen=True)
class Panel:
    """One panel."""

    title: str
    unit: str
    """Grafana's name of the unit."""
    queries: dict[str, str]
    """PromQL by legend."""
    description: str
    kind: str = "timeseries"
    stack: bool = False


def behind(mean: str) -> str:
    """Returns the query for how far a mean policy version is behind the newest one."""
    return f"touchline_policy_version_newest{OF_TABLES} - {mean}{OF_TABLES}"


ROWS: dict[str, list[Panel]] = {
    "Who waits for whom": [
        Panel(
            "Verdict",
            "none",
            {"{{table}}: {{verdict}}": f"touchline_verdict{OF_TABLES} == 1"},
            "What each table's server says: balanced, idle, learners wait for data, actors wait, or refusing.",
            kind="stat",
        ),
        Panel(
            "Callers that wait, on average",
            "short",
            {
                "{{table}}: learners, {{cause}}": f"rate(touchline_learners_wait_seconds_total{OF_TABLES}[$__rate_interval])",
                "{{table}}: actors, {{cause}}": f"rate(touchline_actors_wait_seconds_total{OF_TABLES}[$__rate_interval])",
            },
            "Seconds waited a second, over all callers, by cause: 1 is one learner, or one actor, that waits all the time.",
        ),
        Panel(
            "Replay ratio: rows sampled per row added",
            "short",
            {
                "{{table}}": f"sum by (instance, table) (rate(touchline_steps_sampled_total{OF_TABLES}[5m])) "
                f"/ sum by (instance, table) (rate(touchline_steps_added_total{OF_TABLES}[5m]) > 0)",
            },
            "Over 5 minutes. A slice of horizon H counts H + 1 rows.",
        ),
    ],
    "In and out": [
        Panel(
            "Rows added a second",
            "rowsps",
            {"{{table}}": f"rate(touchline_steps_added_total{OF_TABLES}[$__rate_interval])"},
            "Rows of the episodes that were stored.",
        ),
        Panel(
            "Batches a second, by transport",
            "short",
            {"{{table}}: {{transport}}": f"rate(touchline_batches_delivered_total{OF_TABLES}[$__rate_interval])"},
            "The ring is shared memory on the server's host; stream and unary go through gRPC.",
        ),
        Panel(
            "Bytes a second",
            "Bps",
            {
                "{{table}}: in": f"rate(touchline_added_bytes_total{OF_TABLES}[$__rate_interval])",
                "{{table}}: out by {{transport}}": f"rate(touchline_delivered_bytes_total{OF_TABLES}[$__rate_interval])",
            },
            "Bytes of columns, without the messages around them.",
        ),
        Panel(
            "Time of an add, median and p99",
            "s",
            {
                f"{{{{method}}}}: {name}": f"histogram_quantile({q}, sum by (le, method) "
                f"(rate(touchline_call_duration_seconds_bucket{{{OF_ADDS}}}[5m])))"
                for name, q in (("median", 0.5), ("p99", 0.99))
            },
            "From the admission of an actor's call until all its episodes are stored as durably as configured.",
        ),
    ],
    "Store": [
        Panel(
            "Fill",
            "percentunit",
            {"{{table}}": f"touchline_steps_stored{OF_TABLES} / touchline_capacity_steps{OF_TABLES}"},
            "Rows stored, of the rows that the table can hold.",
        ),
        Panel(
            "Rows evicted a second",
            "rowsps",
            {"{{table}}": f"rate(touchline_steps_evicted_total{OF_TABLES}[$__rate_interval])"},
            "Rows that newer ones replaced, or that were cleared.",
        ),
        Panel(
            "Age of episodes",
            "s",
            {"{{table}}: {{of}}": f"touchline_age_seconds{OF_TABLES}"},
            "Of the oldest and of the median stored episode, and the mean of those sampled in the last minute.",
        ),
        Panel(
            "Policy versions behind the newest",
            "short",
            {
                "{{table}}: stored": behind("touchline_policy_version_stored_mean"),
                "{{table}}: sampled": behind("touchline_policy_version_sampled_mean"),
            },
            "Mean over the rows stored, and over the slices sampled in the last minute.",
        ),
    ],
    "Actors and refusals": [
        Panel(
            "Rows a second, by actor",
            "rowsps",
            {
                "{{table}}: {{actor}}": f"topk(20, rate(touchline_actor_steps_total{OF_TABLES}[1m]))",
            },
            "The 20 busiest. The server names a bounded number of actors; the rest are summed as (others).",
            stack=True,
        ),
        Panel(
            "Seconds since an actor's last episode",
            "s",
            {"{{table}}: {{actor}}": f"topk(20, touchline_actor_last_episode_age_seconds{OF_TABLES})"},
            "The 20 that have been silent longest.",
        ),
        Panel(
            "Refusals a minute, by reason",
            "short",
            {"{{reason}}": f"60 * rate(touchline_refusals_total{OF_SERVERS}[5m])"},
            "`touchline status` shows the last message of each reason.",
            stack=True,
        ),
        Panel(
            "Mean return of the newest episodes, by actor",
            "short",
            {"{{table}}: {{actor}}": f"topk(20, touchline_actor_mean_return{OF_TABLES})"},
            "Sum of the rewards of an episode.",
        ),
    ],
    "Disk": [
        Panel(
            "Not yet on the disk",
            "bytes",
            {"{{table}}": f"touchline_unsynced_bytes{OF_TABLES}"},
            "Bytes that were acknowledged and are not synced: what a power failure may cost, see docs/guarantees.md.",
        ),
        Panel(
            "fsync, median and p99",
            "s",
            {
                f"{{{{table}}}}: {name}": f"histogram_quantile({q}, sum by (le, table) "
                f"(rate(touchline_fsync_duration_seconds_bucket{OF_TABLES}[5m])))"
                for name, q in (("median", 0.5), ("p99", 0.99))
            },
            "Time of one fsync of the durable store.",
        ),
        Panel(
            "Store and free space",
            "bytes",
            {
                "{{table}}: store": f"touchline_store_file_bytes{OF_TABLES}",
                "{{table}}: free": f"touchline_store_disk_free_bytes{OF_TABLES}",
            },
            "Size of the store's files, and free space on their disk.",
        ),
    ],
    "Server": [
        Panel(
            "CPU by pool, in cores",
            "short",
            {"{{pool}}": f"touchline_pool_cpu_cores{OF_SERVERS}"},
            "The event loop receives and sends; the other pools store and gather.",
            stack=True,
        ),
        Panel(
            "Memory",
            "bytes",
            {
                "process": f"process_resident_memory_bytes{OF_SERVERS}",
                "rings": f"touchline_ring_bytes{OF_SERVERS}",
                "device": f"touchline_device_bytes{OF_SERVERS}",
            },
            "Resident memory of the process, shared memory of rings, and columns on a GPU.",
        ),
        Panel(
            "Delay of the event loop, p99",
            "s",
            {
                "p99": f"histogram_quantile(0.99, sum by (le) (rate(touchline_event_loop_delay_seconds_bucket{OF_SERVERS}[5m])))",
            },
            "How late the event loop is: above 0.1 s the server has too little CPU.",
        ),
        Panel(
            "Calls in progress",
            "short",
            {
                "calls": f"touchline_calls_in_progress{OF_SERVERS}",
                "of them streams": f"touchline_streams{OF_SERVERS}",
            },
            "Calls to the replay service.",
        ),
    ],
}
"""The panels, by the heading of their row."""


def dashboard() -> dict[str, Any]:
    """Returns the dashboard as Grafana 9 and later import it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": _at(0, y, WIDTH, 1), "panels": []})
        width = WIDTH // len(row)
        for i, panel in enumerate(row):
            panels.append(_panel(panel, number=len(panels) + 1, position=_at(i * width, y + 1, width, HEIGHT)))
        y += HEIGHT + 1
    return {
        "uid": "touchline",
        "title": "Touchline",
        "description": "Replay servers: who waits for whom, what comes in and goes out, and the store.",
        "tags": ["touchline"],
        "schemaVersion": 38,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                _variable("instance", "Server", "label_values(touchline_info, instance)"),
                _variable("table", "Table", "label_values(touchline_steps_stored, table)"),
            ]
        },
        "panels": panels,
    }


def _panel(panel: Panel, *, number: int, position: dict[str, int]) -> dict[str, Any]:
    is_plot = panel.kind == "timeseries"
    custom = {"fillOpacity": 20 if panel.stack else 5, "showPoints": "never", "stacking": {"mode": "normal" if panel.stack else "none"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": position,
        "datasource": SOURCE,
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend, "datasource": SOURCE}
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom if is_plot else {}}, "overrides": []},
        "options": {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi"}} if is_plot else {"textMode": "name"},
    }


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "query": {"query": query, "refId": name},
        "datasource": SOURCE,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def main() -> int:
    """Writes the file, or with ``--check`` compares it; returns the exit code."""
    text = json.dumps(dashboard(), indent=2) + "\n"
    if "--check" in sys.argv[1:]:
        current = DASHBOARD.read_text() if DASHBOARD.exists() else ""
        if current != text:
            print(f"{DASHBOARD.name} is not what its panels say: run python deploy/grafana/{Path(__file__).name}", file=sys.stderr)
        return int(current != text)
    DASHBOARD.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
