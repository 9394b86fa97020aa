"""Checks of the server behind the connection: its answer, versions, the token's roles, round trips, storage, and a table's data."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

from touchline._cli.doctor.findings import Finding, GaveUpError, Level, give_up
from touchline._rpc.calls import reason_of
from touchline._rpc.credentials import CA_VARIABLE, TOKEN_VARIABLE
from touchline.client import ReplayClient
from touchline.errors import (
    AccessDeniedError,
    DeadlineError,
    IncompatibleVersionError,
    InvalidArgumentError,
    TouchlineError,
    UnauthenticatedError,
    UnavailableError,
    UnknownTableError,
)
from touchline.types import ServerInfo
from touchline_protos import PROTOCOL_VERSION
from touchline_protos.log_lines import escape
from touchline_protos.types.reasons import Reason

ROUND_TRIPS = 50
"""Number of small calls that are timed."""

NO_TABLE = "doctor-no-such-table"
"""A name that no table has: an admin's call for it changes nothing."""

NO_EPISODE = (1 << 62) - 1
"""An id that no episode has."""


def ask_info(client: ReplayClient, timeout_s: float, *, tls: bool) -> tuple[ServerInfo, Finding]:
    """Returns the server's answer about the client's table, and what was found.

    Args:
        client: client of the server.
        timeout_s: longest wait for the answer.
        tls: whether the client uses TLS.

    Raises:
        GaveUpError: there is no such answer; its advice depends on the reason.
    """
    started_s = time.perf_counter()
    try:
        info = client.info(timeout_s=timeout_s)
    except TouchlineError as error:
        raise _no_answer(error, tls=tls) from error
    took_s = time.perf_counter() - started_s
    return info, Finding("answer", Level.OK, f"touchline-server {escape(info.version)} answers", figures={"first_answer_s": took_s})


def _no_answer(error: TouchlineError, *, tls: bool) -> GaveUpError:
    text, reason = escape(str(error)), reason_of(error)
    if isinstance(error, UnauthenticatedError):
        return give_up("token", text, f"Set {TOKEN_VARIABLE} to a token of the server's auth.tokens_file; see docs/security.md.")
    if isinstance(error, UnknownTableError):
        return give_up("table", text, "Give --table one of these names, or create it: touchline table create NAME.")
    if isinstance(error, AccessDeniedError):
        return give_up("token", text, "Use a token for this table, or name with --table one that the token is for.")
    if isinstance(error, IncompatibleVersionError):
        if reason:
            return give_up("version", text, "Install touchline and touchline-server of the same major version.")
        return give_up("answer", text, "Something other than a touchline-server listens there: correct the address or the port.")
    if reason == Reason.RESTORING:
        return give_up("answer", text, "Wait: the server is reading its durable store and answers once it is restored.")
    if reason == Reason.DRAINING:
        return give_up("answer", text, "The server is stopping: start it again.")
    if isinstance(error, UnavailableError | DeadlineError):
        security = f"{CA_VARIABLE} is set" if tls else f"{CA_VARIABLE} is not set"
        advice = f"Something accepts connections there and does not speak gRPC as this client does ({security}): check the port and TLS."
        return give_up("answer", text, advice)
    return give_up("answer", text, "See the server's log.")


def check_version(info: ServerInfo) -> Finding:
    """Compares the versions of client and server."""
    own = version("touchline")
    text = f"client {own}, server {escape(info.version)}; protocol {PROTOCOL_VERSION}, server's {escape(info.protocol_version)}"
    figures = {
        "client_version": own,
        "server_version": info.version,
        "client_protocol": PROTOCOL_VERSION,
        "server_protocol": info.protocol_version,
    }
    if info.protocol_version == PROTOCOL_VERSION:
        return Finding("version", Level.OK, text, figures=figures)
    older = "server" if _parts(info.protocol_version) < _parts(PROTOCOL_VERSION) else "client"
    return Finding("version", Level.NOTE, f"{text}: features of the newer one are refused with a sentence; update the {older}", "", figures)


def _parts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def check_roles(client: ReplayClient, *, has_token: bool) -> tuple[frozenset[str], Finding]:
    """Returns the roles of the client's token, and what was found. The calls that ask for it change nothing.

    The server names the roles in the text of a refusal, so one refused call is enough; without such a text each role is tried.
    """
    refusal = _refusal_of(lambda: client.set_rate(NO_TABLE))
    if refusal is None or "to call" not in refusal:  # a token that is confined to tables is refused for the table, not for its role
        text = "the token may do everything (admin)" if has_token else "the server asks for no token: everyone may do everything"
        return frozenset({"actor", "learner", "admin"}), Finding("token", Level.OK, text, figures={"roles": ["actor", "learner", "admin"]})
    named = re.search(r"the token '(?P<name>[^']*)' is for (?P<roles>[a-z ]+), expected", refusal)
    if named is not None:
        roles, who = frozenset(named["roles"].split(" and ")), f"the token {named['name']!r}"
    else:
        learner = _refusal_of(lambda: list(client.episodes(ids=[NO_EPISODE], skip_missing=True))) is None
        roles, who = frozenset({"learner"} if learner else {"actor"}), "the token"
    may = {"actor": "add episodes", "learner": "sample and read episodes"}
    text = f"{who} is for {' and '.join(sorted(roles))}: it may {' and '.join(may[role] for role in sorted(roles) if role in may)}"
    return roles, Finding("token", Level.OK, text, figures={"roles": sorted(roles)})


def _refusal_of(call: Callable[[], object]) -> str | None:
    """Returns the text with which the server refuses a call for lack of a role; None if it does not."""
    try:
        call()
    except AccessDeniedError as error:
        return str(error)
    except (InvalidArgumentError, IncompatibleVersionError):
        return None
    return None


def check_round_trip(client: ReplayClient) -> Finding:
    """Times small calls."""
    took_s = []
    for _ in range(ROUND_TRIPS):
        started_s = time.perf_counter()
        client.ready_state()
        took_s.append(time.perf_counter() - started_s)
    median_s, worst_s = statistics.median(took_s), max(took_s)
    text = f"{ROUND_TRIPS} round trips: median {median_s * 1e3:.2f} ms, longest {worst_s * 1e3:.1f} ms"
    return Finding("round_trip", Level.OK, text, figures={"median_s": median_s, "max_s": worst_s, "calls": ROUND_TRIPS})


def check_storage(info: ServerInfo) -> Finding:
    """Reports whether episodes survive a restart, and whether the store takes them now."""
    if info.storage_state == "full":
        advice = "Free space on the disk of the server's storage.data_dir: adding resumes by itself."
        return Finding("storage", Level.FAILED, f"the durable store takes no episodes: {escape(info.storage_reason)}", advice)
    if info.storage_state == "failed":
        advice = "Repair the disk, then restart the server, which verifies what is stored; until then nothing more is stored."
        return Finding("storage", Level.FAILED, f"the durable store failed: {escape(info.storage_reason)}", advice)
    counts = info.counts
    where = "on disk, they survive a restart" if info.storage_state else "in memory, a restart loses them"
    share = counts.steps_stored / info.capacity if info.capacity else 0.0
    text = f"{counts.episodes_stored:,} episodes, {counts.steps_stored:,} of {info.capacity:,} steps ({share:.0%}); {where}"
    figures = {"episodes_stored": counts.episodes_stored, "steps_stored": counts.steps_stored, "capacity": info.capacity}
    return Finding("storage", Level.OK, text, figures=figures)


def check_data(client: ReplayClient) -> Finding:
    """Reports whether anything can be sampled, and if not, why."""
    state = client.ready_state()
    counts = state.counts
    figures = {
        "can_sample": state.can_sample,
        "horizon": state.horizon,
        "longest_episode": state.longest_episode,
        "episodes_eligible": state.episodes_eligible,
    }
    if not counts.episodes_stored:
        refused = f"; {counts.episodes_refused:,} were refused, the server's log says why" if counts.episodes_refused else ""
        advice = "Start an actor, or load a data set: touchline load FILE."
        return Finding("data", Level.WARNING, f"the table is empty: nothing can be sampled{refused}", advice, figures)
    if not state.can_sample:
        advice = f"Add episodes of at least {state.horizon + 1} rows, sample with a smaller horizon, or pad slices (sampling.pad = 'end')."
        return Finding("data", Level.WARNING, f"nothing can be sampled: {state.describe()}", advice, figures)
    short = counts.episodes_stored - state.episodes_eligible
    text = f"{state.episodes_eligible:,} of {counts.episodes_stored:,} episodes can be sampled at horizon {state.horizon}"
    if not state.min_steps_reached:
        wait = f"; wait_until_ready() waits for {state.min_history:,} steps, {counts.steps_stored:,} are stored"
        return Finding("data", Level.NOTE, text + wait, figures=figures)
    return Finding("data", Level.NOTE if short else Level.OK, f"{text}; {short:,} are too short" if short else text, figures=figures)


def check_rate(info: ServerInfo) -> Finding:
    """Reports whether the table's rate limit holds callers back."""
    rate = info.rate
    if rate is None:
        return Finding("rate_limit", Level.OK, "no rate limit")
    ratio = f"{rate.ratio:.2f}" if rate.ratio is not None else "no"
    text = f"rate limit of {rate.samples_per_insert:g} slices a step, {ratio} so far"
    figures = {"samples_per_insert": rate.samples_per_insert, "ratio": rate.ratio, "owed_slices": rate.owed_slices}
    figures |= {"batches_held": rate.batches_held, "adds_held": rate.adds_held}
    stored = info.counts.steps_stored
    if stored < rate.min_steps:
        advice = f"Add {rate.min_steps - stored:,} more steps, or lower the limit: touchline table set rate.min_steps=N."
        text = f"{text}; batches wait for {rate.min_steps:,} steps, {stored:,} are stored"
        return Finding("rate_limit", Level.WARNING, text, advice, figures)
    if rate.batches_held:
        advice = "Learners wait for data: add actors, or raise the limit: touchline table set rate.samples_per_insert=N."
        return Finding("rate_limit", Level.WARNING, f"{text}; it holds {rate.batches_held} learners back", advice, figures)
    if rate.adds_held:
        advice = "Actors wait for learners: start a learner or lower the limit: touchline table set rate.samples_per_insert=N."
        return Finding("rate_limit", Level.WARNING, f"{text}; it holds {rate.adds_held} actors back", advice, figures)
    return Finding("rate_limit", Level.OK, f"{text}; it holds no caller back now", figures=figures)
