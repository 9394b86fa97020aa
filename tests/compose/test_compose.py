"""``docker compose up`` as it stands, on a real engine: healthy in time, restarted and killed under load, nothing lost,
batches by shared memory between two containers that have nothing in common but ``/dev/shm``; the page, the command line and
Prometheus see what happens.

``make test-compose`` runs it.

The images are built, so pip's variables (PIP_INDEX_URL, PIP_FIND_LINKS, TORCH, ...) are those of the shell, as docs/containers.md says.
Prometheus is the image PROMETHEUS_IMAGE if that is set, otherwise one that is built from Debian's package. The project has a name, ports, a
tag and volumes of its own, and removes them; the images stay, for the next run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.certificates import Authority
from support.pages import request
from support.prometheus import ask, dashboard_queries, has_data
from support.service_calls import eventually
from touchline import ReplayClient, UnavailableError

ROOT = Path(__file__).parents[2]
TAG = "compose-test"
PROMETHEUS_IMAGE = os.environ.get("PROMETHEUS_IMAGE") or f"touchline-prometheus:{TAG}"
PROJECT = "touchline-compose-test"

BUILD_S = 3600
UP_S = 60
"""Bound for a server without episodes to become healthy, on a loaded machine; 6 s is usual."""
AGAIN_S = 120
"""Bound for it to be healthy again after a restart or a crash under load."""

SEEN_S = 120
"""Bound for a number to show up on the page or in Prometheus, on a loaded machine."""

ADDED_ROWS = 20
"""Rows of each episode that the test adds beside the actors'."""

pytestmark = [
    pytest.mark.skipif(os.environ.get("COMPOSE_TEST") != "1", reason="`make test-compose` runs it: it builds images"),
    pytest.mark.timeout(BUILD_S),
]


def reason_for_no_engine() -> str:
    """Returns why there is nothing to run this on; empty if there is."""
    if shutil.which("docker") is None:
        return "no docker command"
    for command in (["docker", "version"], ["docker", "compose", "version"]):
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if result.returncode:
            return f"`{' '.join(command)}`: {result.stderr.strip().splitlines()[-1] if result.stderr.strip() else result.returncode}"
    return ""


def docker(*arguments: str, timeout_s: float = 300, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        ["docker", *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if check and result.returncode:
        pytest.fail(f"docker {' '.join(arguments)} exited with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
    return result


class Project:
    """The services of docker-compose.yml, with two actors."""

    def __init__(self) -> None:
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        self.port, self.http_port, self.prometheus_port = (probe.getsockname()[1] for probe in probes)
        for probe in probes:
            probe.close()
        self.address, self.page, self.prometheus = (f"127.0.0.1:{port}" for port in (self.port, self.http_port, self.prometheus_port))

    def compose(self, *arguments: str, timeout_s: float = 300, check: bool = True) -> subprocess.CompletedProcess[str]:
        # Large enough for everything that is played: an evicted episode could not be distinguished from a lost one.
        return docker(
            *("compose", "--project-name", PROJECT, *arguments),
            timeout_s=timeout_s,
            check=check,
            TOUCHLINE_TAG=TAG,
            TOUCHLINE_PORT=str(self.port),
            TOUCHLINE_HTTP_PORT=str(self.http_port),
            TOUCHLINE_HTTP__ENABLED="on",  # the other tests' servers have none
            PROMETHEUS_PORT=str(self.prometheus_port),
            PROMETHEUS_IMAGE=PROMETHEUS_IMAGE,
            TOUCHLINE_CONFIG__BUFFER_SIZE="2000000",
        )

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--all", "--quiet", service).stdout.split()

    def state(self, container: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(docker("inspect", "--format", "{{json .State}}", container).stdout)
        return state

    def wait_healthy(self, bound_s: float, since: float) -> float:
        """Returns the seconds from ``since``, of the monotonic clock, until the server was seen healthy."""
        (replay,) = self.containers("replay")
        while True:
            state = self.state(replay)
            if state["Status"] == "running" and state["Health"]["Status"] == "healthy":
                return time.monotonic() - since
            if time.monotonic() - since > bound_s:
                logs = self.compose("logs", "--tail", "30", "replay").stdout
                pytest.fail(f"not healthy within {bound_s} s: {json.dumps(state['Health'])}\n{logs}")
            time.sleep(0.5)

    def learner_reports(self) -> list[dict[str, Any]]:
        """Returns what the learner printed."""
        (learner,) = self.containers("learner")
        return [json.loads(line) for line in docker("logs", learner).stdout.splitlines()]

    def wait_for_batches(self, bound_s: float = AGAIN_S) -> dict[str, Any]:
        """Returns the learner's first report on batches that came after this call."""
        began, ends = time.time(), time.monotonic() + bound_s
        while True:
            # The first report after the call may still be about batches from before it.
            reports = [report for report in self.learner_reports() if report["time"] > began and report["batches_per_s"]]
            if len(reports) > 1:
                return reports[1]
            if time.monotonic() > ends:
                logs = self.compose("logs", "--tail", "30", "learner", "replay").stdout
                pytest.fail(f"no batches for the learner within {bound_s} s:\n{logs}")
            time.sleep(0.2)

    def rings_left(self) -> list[str]:
        """Returns the sockets of rings in ``/dev/shm``: none is there once its learner has the memory."""
        program = "import os; print(*[name for name in os.listdir('/dev/shm') if name.startswith('touchline')], sep='\\n', end='')"
        return self.compose("exec", "-T", "replay", "python", "-c", program).stdout.splitlines()

    def kill_server(self) -> None:
        """Sends SIGKILL to the server's own process, as the kernel does when memory runs out; Docker's part is to start it again."""
        program = (
            "import os, signal\n"
            "found = [int(pid) for pid in os.listdir('/proc') if pid.isdigit() and int(pid) > 1"
            " and b'touchline-server\\0serve' in open(f'/proc/{pid}/cmdline', 'rb').read()]\n"
            "assert len(found) == 1, found\n"
            "os.kill(found[0], signal.SIGKILL)"
        )
        killed = self.compose("exec", "-T", "replay", "python", "-c", program, check=False)
        # The container ends with its server, and may take this program along before it can say that all went well.
        assert killed.returncode in (0, 128 + signal.SIGKILL), killed.stderr


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    reason = reason_for_no_engine()
    if reason:
        pytest.skip(f"no Docker engine to be had: {reason}")
    project = Project()
    project.compose("--profile", "observe", "down", "--volumes", "--remove-orphans")
    project.compose("build", timeout_s=BUILD_S)
    try:
        yield project
    finally:
        project.compose("--profile", "observe", "down", "--volumes", "--remove-orphans", check=False)


class Adder(threading.Thread):
    """Adds copies of one episode, each marked by its number, for as long as it is not stopped; adds again what may not have been stored."""

    def __init__(self, address: str, columns: dict[str, np.ndarray]) -> None:
        super().__init__(name="adder")
        self._address, self._columns = address, columns
        self.acknowledged: list[int] = []
        self.unknown: list[int] = []
        """Given up after the client's own deadline: each may be stored or not."""
        self.error: BaseException | None = None
        self._stopped = threading.Event()

    def episode(self, number: int) -> dict[str, np.ndarray]:
        return self._columns | {"reward": np.full_like(self._columns["reward"], number)}

    def run(self) -> None:
        number = 0
        try:
            with ReplayClient(self._address, actor="adder") as client:
                while not self._stopped.is_set():
                    number += 1
                    try:
                        client.add(self.episode(number))
                        self.acknowledged.append(number)
                    except UnavailableError:
                        self.unknown.append(number)
                    self._stopped.wait(0.01)  # some 80 a second: load, and less than the buffer holds
        except BaseException as error:
            self.error = error

    def wait_for(self, more: int, bound_s: float = AGAIN_S) -> None:
        """Waits until ``more`` further episodes are acknowledged."""
        wanted, ends = len(self.acknowledged) + more, time.monotonic() + bound_s
        while len(self.acknowledged) < wanted:
            assert self.error is None, self.error
            assert time.monotonic() < ends, f"{len(self.acknowledged)} of {wanted} acknowledged within {bound_s} s"
            time.sleep(0.05)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        assert self.error is None, self.error


def test_compose_up_is_healthy_in_time_and_loses_nothing_by_restart_kill_and_stop(
    project: Project, record_property: Callable[[str, object], None]
) -> None:
    def note(name: str, value: object) -> None:
        record_property(name, value)
        print(f"  {name}: {value}")

    def check_ring(when: str) -> None:
        report = project.wait_for_batches()
        note(f"learner's batches after {when}", report["transport"])
        assert report["transport"] == "ring", report.get("transport_reason")
        assert project.rings_left() == []

    print()
    began = time.monotonic()
    project.compose("up", "--detach", "--scale", "actor=2", timeout_s=UP_S + 120)
    note("healthy after `up`, s", round(project.wait_healthy(UP_S, began), 1))
    with ReplayClient(project.address) as client:
        client.wait_until_ready(timeout_s=120)
        played = next(iter(client.episodes(newest=1))).columns
    adder = Adder(project.address, {name: column[:ADDED_ROWS] for name, column in played.items()})
    check_ring("`up`")
    adder.start()
    adder.wait_for(50)

    for number in (1, 2):
        began = time.monotonic()
        project.compose("restart", "replay")
        note(f"healthy after restart {number} under load, s", round(project.wait_healthy(AGAIN_S, began), 1))
        adder.wait_for(50)
        check_ring(f"restart {number}")
    project.compose("restart", "learner")
    check_ring("a restart of the learner")
    for number in (1, 2, 3):
        (replay,) = project.containers("replay")
        started = project.state(replay)["StartedAt"]
        began = time.monotonic()
        project.kill_server()
        while project.state(replay)["StartedAt"] == started:
            assert time.monotonic() - began < AGAIN_S, "Docker did not start it again"
            time.sleep(0.2)
        note(f"healthy after kill -9 {number} under load, s", round(project.wait_healthy(AGAIN_S, began), 1))
        adder.wait_for(50)
        check_ring(f"kill -9 {number}")
    adder.stop()

    actors = project.containers("actor")
    project.compose("stop", "actor", "learner")
    totals = [json.loads(docker("logs", actor).stdout.splitlines()[-1]) for actor in actors]
    with ReplayClient(project.address) as client:
        before = client.counts()
        check_stored(client, adder, totals)
    note("acknowledged to actors", [one["episodes_acknowledged"] for one in totals])
    note("acknowledged to the adder, of unknown outcome", (len(adder.acknowledged), len(adder.unknown)))
    note("learner's updates", project.learner_reports()[-1]["updates"])
    assert [project.state(container)["ExitCode"] for container in [*actors, *project.containers("learner")]] == [0, 0, 0]

    (replay,) = project.containers("replay")
    began = time.monotonic()
    project.compose("stop", "replay")
    note("orderly stop, s", round(time.monotonic() - began, 1))
    assert project.state(replay)["ExitCode"] == 0

    project.compose("down")  # the volume stays
    began = time.monotonic()
    project.compose("up", "--detach", "replay")
    note("healthy after `down` and `up`, s", round(project.wait_healthy(AGAIN_S, began), 1))
    with ReplayClient(project.address) as client:
        assert (client.counts().episodes_stored, client.counts().steps_stored) == (before.episodes_stored, before.steps_stored)
        check_stored(client, adder, totals)
    note("episodes, all of them stored once", before.episodes_stored)


def check_stored(client: ReplayClient, adder: Adder, totals: list[dict[str, int]]) -> None:
    """Asserts that what was acknowledged is stored, each once and as it was sent, and nothing else."""
    counts = client.counts()
    stored = [int(episode.columns["reward"].flat[0]) for episode in client.episodes(actor="adder", columns=["reward"])]
    assert len(set(stored)) == len(stored)
    assert set(adder.acknowledged) <= set(stored) <= {*adder.acknowledged, *adder.unknown}
    played = sum(one["episodes_acknowledged"] for one in totals)
    assert all(one["episodes_acknowledged"] == one["episodes_played"] for one in totals), totals
    assert (counts.episodes_stored, counts.episodes_evicted, counts.episodes_refused) == (played + len(stored), 0, 0)
    newest = next(iter(client.episodes(actor="adder", newest=1)))
    expected = adder.episode(stored[-1])
    assert {name: column.tobytes() for name, column in newest.columns.items()} == {n: c.tobytes() for n, c in expected.items()}


def command_line(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``touchline`` on this machine, outside of the containers."""
    environment = os.environ | {"TOUCHLINE_ADDRESS": project.address}
    return subprocess.run(
        [sys.executable, "-m", "touchline", *arguments], env=environment, capture_output=True, text=True, timeout=SEEN_S, check=False
    )


def hosts(project: Project, service: str) -> set[str]:
    return {docker("inspect", "--format", "{{.Config.Hostname}}", container).stdout.strip() for container in project.containers(service)}


def test_page_metrics_and_command_line_see_actors_and_learner(project: Project) -> None:
    project.compose("up", "--detach", "--scale", "actor=2")
    project.wait_healthy(AGAIN_S, time.monotonic())

    def complete() -> bool:
        """Returns whether both actors, and the learner at its ring, are in the page's status."""
        status = request(project.page, "/api/status").json
        names = " ".join(actor["name"] for actor in status["actors"])
        rings = [learner for learner in status["learners"] if learner["transport"] == "ring" and learner["batches"]]
        return bool(rings) and all(host in names for host in hosts(project, "actor"))

    eventually(complete, "both actors and the learner at its ring on the page", timeout_s=SEEN_S, every_s=0.5)
    page = request(project.page, "/")
    assert (page.status, "<!doctype html>" in page.text.lower()) == (200, True)
    assert request(project.page, "/healthz").text == "serving\n"
    metrics = request(project.page, "/metrics").text
    assert re.search(r'^touchline_batches_delivered_total\{.*transport="ring".*\} [1-9]', metrics, re.MULTILINE), metrics

    status = command_line(project, "status", "--json")
    top = command_line(project, "top", "--json", "--count", "2")
    doctor = command_line(project, "doctor", "--seconds", "0", "--json")
    assert (status.returncode, top.returncode) == (0, 0), status.stderr + top.stderr
    documents = [json.loads(document) for document in (status.stdout, *top.stdout.splitlines())]
    assert [[learner["transport"] for learner in document["learners"]] for document in documents] == [["ring"]] * 3
    assert documents[2]["time_unix_s"] > documents[1]["time_unix_s"]
    # Outside of the containers there is no ring; in the learner's there is.
    levels = {finding["check"]: finding["level"] for finding in json.loads(doctor.stdout)["findings"]}
    assert {check for check, level in levels.items() if level not in ("ok", "note")} == {"ring"}, doctor.stdout
    project.compose("exec", "-T", "learner", "touchline", "doctor", "--seconds", "0")


def test_profile_observe_adds_a_prometheus_that_scrapes_the_server(project: Project) -> None:
    if "PROMETHEUS_IMAGE" not in os.environ:
        given = [f"--build-arg=PYTHON_IMAGE={os.environ['PYTHON_IMAGE']}"] if "PYTHON_IMAGE" in os.environ else []
        folder = ROOT / "tests" / "compose" / "prometheus"
        docker("build", "--tag", PROMETHEUS_IMAGE, *given, str(folder), timeout_s=BUILD_S)
    project.compose("--profile", "observe", "up", "--detach", "--scale", "actor=2")

    address = project.prometheus
    eventually(lambda: has_data(address, 'up{job="touchline", instance="replay:8080"} == 1'), "a scrape", timeout_s=SEEN_S, every_s=0.5)
    # Nothing is refused here, so there is nothing to show.
    for query in (query for query in dashboard_queries(interval="30s") if "touchline_refusals_total" not in query):
        eventually(lambda query=query: has_data(address, query), f"data for {query}", timeout_s=SEEN_S, every_s=0.5)  # type: ignore[misc]
    rules = [rule for group in ask(address, "rules")["groups"] for rule in group["rules"]]
    assert rules
    assert [rule for rule in rules if rule["health"] == "err"] == []
    assert [one["labels"]["alertname"] for one in ask(address, "alerts")["alerts"] if one["state"] == "firing"] == []


def test_health_check_is_cheap_and_its_output_says_what_is_wrong(project: Project, tmp_path: Path) -> None:
    """A key that user 10001 cannot read, the commonest of them."""
    project.compose("up", "--detach", "replay")
    project.wait_healthy(AGAIN_S, time.monotonic())
    (replay,) = project.containers("replay")
    log = project.state(replay)["Health"]["Log"]
    assert [(check["ExitCode"], check["Output"].strip()) for check in log][-1] == (0, "127.0.0.1:50051: SERVING")

    pair = Authority(tmp_path).issue("own", "replay", "localhost")
    pair.key.chmod(0o600)
    if pair.key.stat().st_uid == 10001:
        pytest.skip("the files of this user are those of the container's")
    tmp_path.chmod(0o755)
    pair.cert.chmod(0o644)
    mounts = [f"--volume={path}:/tls/{name}:ro" for path, name in ((pair.cert, "server.pem"), (pair.key, "server.key"))]
    variables = ["--env=TOUCHLINE_TLS__CERT=/tls/server.pem", "--env=TOUCHLINE_TLS__KEY=/tls/server.key"]
    expected = "tls.key: /tls/server.key: Permission denied; make it readable by user 10001, which this process runs as"

    serve = docker("run", "--rm", *mounts, *variables, f"touchline-server:{TAG}", check=False)
    image = ("--entrypoint", "python", f"touchline-server:{TAG}")
    check = docker("run", "--rm", *mounts, *variables, *image, "-m", "touchline_server.service.healthcheck", check=False)

    assert (serve.returncode, expected in serve.stderr) == (2, True), serve.stderr
    assert (check.returncode, expected in check.stdout) == (1, True), check.stdout


def test_client_image_has_the_touchline_command(project: Project) -> None:
    arguments = re.findall(r"^ARG (PIP_\w+|PYTHON_IMAGE)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    given = [f"--build-arg={name}" for name in dict.fromkeys(arguments) if name in os.environ]
    image = f"touchline-client:{TAG}"
    docker("build", "--target", "client", "--tag", image, *given, ".", timeout_s=BUILD_S)

    shown = docker("run", "--rm", "--tmpfs", "/spool:uid=10001", image, "touchline", "spool", "show", "/spool", check=False)

    assert "needs typer" not in shown.stderr
    assert "spool" in docker("run", "--rm", image, "touchline", "spool", "--help").stdout
    program = "import touchline, importlib.util; print(importlib.util.find_spec('torch'))"
    assert docker("run", "--rm", image, "python", "-c", program).stdout == "None\n"
