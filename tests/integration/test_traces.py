"""Traces: a program that has set up OpenTelemetry gets spans of its episodes and batches, across client and server."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import json, os, sys, threading
import numpy as np
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

from touchline import EpisodeWriter, ReplayClient
from touchline_server import Config
from touchline_server.service.app import ServerThread

def play(writer, rows):
    for i in range(rows):
        writer.append({"obs": np.zeros(3, np.float32), "action": np.zeros(1, np.float32), "reward": np.float32(0)})
    writer.end_episode()

with ServerThread(Config(server={"port": 0})) as server, ReplayClient(server.address) as client:
    with EpisodeWriter(client, actor="anna") as writer:
        for _ in range(episodes := int(sys.argv[1])):
            play(writer, 8)
    with trace.get_tracer("learner").start_as_current_span("train"):
        client.sample(batch_size=4, horizon=3)
    with client.batches(batch_size=4, horizon=3, seed=1) as batches:
        transport = ""
        for _ in range(6):
            next(batches)
        transport = batches.transport
    try:
        client.sample(batch_size=4, horizon=100)
    except Exception:
        pass
spans = [
    {
        "name": span.name,
        "trace": span.context.trace_id,
        "id": span.context.span_id,
        "parent": span.parent.span_id if span.parent else None,
        "links": [link.context.span_id for link in span.links],
        "kind": span.kind.name,
        "attributes": dict(span.attributes),
        "events": [event.name for event in span.events],
        "status": span.status.status_code.name,
        "start": span.start_time,
        "end": span.end_time,
    }
    for span in exporter.get_finished_spans()
]
print(json.dumps({"transport": transport, "spans": spans}))
"""


def traced(episodes: int) -> dict[str, Any]:
    """Returns what a program recorded that plays, samples and streams; a provider can be set only once in a process."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(episodes)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return traced(episodes=20)


def named(recorded: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [span for span in recorded["spans"] if span["name"] == name]


def test_each_episode_has_a_span_from_its_first_row_to_its_acknowledgement(recorded: dict[str, Any]) -> None:
    episodes = named(recorded, "touchline.episode")
    assert len(episodes) == 20
    for span in episodes:
        assert span["attributes"] == {"touchline.table": "", "touchline.actor": "anna", "touchline.rows": 8, "touchline.policy_version": 0}
        assert span["events"][0] == "ended" and span["start"] < span["end"] and span["status"] == "UNSET"


def test_the_servers_span_of_an_add_belongs_to_the_episodes_that_it_stored(recorded: dict[str, Any]) -> None:
    episodes = {span["id"]: span for span in named(recorded, "touchline.episode")}
    calls = {span["id"]: span for span in named(recorded, "touchline.send")}
    covered: set[int] = set()
    for store in named(recorded, "touchline.store"):
        assert store["kind"] == "SERVER"
        if store["parent"] in episodes:
            assert store["trace"] == episodes[store["parent"]]["trace"]
            covered.add(store["parent"])
        else:
            call = calls[store["parent"]]
            assert store["trace"] == call["trace"] and len(call["links"]) == call["attributes"]["touchline.episodes"] > 1
            covered.update(call["links"])
    assert covered == set(episodes)


def test_a_batch_has_a_span_from_its_draw_to_its_handing_over(recorded: dict[str, Any]) -> None:
    (train,) = named(recorded, "train")
    batches = named(recorded, "touchline.batch")
    assert [span["trace"] for span in batches if span["parent"] == train["id"]] == [train["trace"]]
    handed_over = [span for span in batches if span["parent"] is None and not span["attributes"].get("touchline.cancelled")]
    assert len(handed_over) >= 6, recorded["transport"]
    assert {(span["attributes"]["touchline.batch_size"], span["attributes"]["touchline.horizon"]) for span in handed_over} == {(4, 3)}


def test_a_program_without_opentelemetry_imports_none_of_it() -> None:
    program = PROGRAM[PROGRAM.index("from touchline import") : PROGRAM.index("    with trace.get_tracer")]
    check = "import sys, numpy as np\n" + program + "\nassert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    result = subprocess.run([sys.executable, "-c", check, "3"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
