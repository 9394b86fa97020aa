"""Questions to a running Prometheus."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).parents[2] / "deploy"


def ask(address: str, path: str, **parameters: str) -> Any:
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"http://{address}/api/v1/{path}?{query}", timeout=10) as answer:
        return json.load(answer)["data"]


def has_data(address: str, query: str) -> bool:
    try:
        return bool(ask(address, "query", query=query)["result"])
    except OSError:
        return False  # it is starting


def dashboard_queries(*, interval: str) -> list[str]:
    """Returns the dashboard's queries, for all servers and tables; rates are of the last ``interval``, a few scrapes long."""
    dashboard = json.loads((DEPLOY / "grafana" / "touchline.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [query.replace("$instance", ".*").replace("$table", ".*").replace("$__rate_interval", interval) for query in queries]
