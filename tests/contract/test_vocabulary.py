"""One vocabulary on both sides of the wire: errors, the reasons that stand for them, metadata keys and limits."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import grpc
import pytest

from touchline import errors as client_errors
from touchline._rpc.calls import ERROR_OF_REASON, ERROR_OF_STATUS
from touchline._rpc.convert import _ERROR_OF_OUTCOME
from touchline_protos.codec import CodecError
from touchline_protos.types import limits, metadata, names, reasons
from touchline_protos.types.episode import CodecLimits
from touchline_protos.types.reasons import Reason
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import Config
from touchline_server import errors as server_errors
from touchline_server.service import convert, grpc_status
from touchline_server.service.grpc_status import INTERNAL, STATUS_OF, Status, status_of

ROOT = Path(__file__).parents[2]
SOURCES = [file for part in ("protos", "client", "server") for file in sorted((ROOT / part / "src").rglob("*.py"))]

ABSTRACT = {server_errors.ReplayError, server_errors.UnavailableError}
"""Bases that are never raised themselves."""

STARTS_ONLY = {server_errors.StoreMismatchError, server_errors.StoreInUseError}
"""End the start of a server, before it could answer a call with them."""


def classes(module: ModuleType) -> dict[str, type[Exception]]:
    """Returns the error classes that a module defines, by name."""
    found = {name: value for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Exception)}
    return {name: value for name, value in found.items() if value.__module__ == module.__name__}


def statuses() -> Iterator[tuple[type[Exception], Status]]:
    """Yields every status that the service can answer with: of the errors in its table, of all that derive from them, and of any other."""
    for kind in {*STATUS_OF, *classes(server_errors).values()} - ABSTRACT - STARTS_ONLY:
        yield kind, status_of(kind("text"))
    yield Exception, INTERNAL


def faults(client_table: Mapping[str, type[Exception]]) -> list[str]:
    """Returns what is wrong with a client's table of reasons; a list of sentences."""
    found = []
    for kind, status in statuses():
        error = client_table.get(status.reason)
        bases = {base.__name__ for base in kind.__mro__}
        if status is INTERNAL and kind in classes(server_errors).values():
            found.append(f"{kind.__name__} has no status")
        elif error is None:
            found.append(f"{status.reason} ({kind.__name__}) has no row at the client")
        elif status is not INTERNAL and not issubclass(kind, CodecError) and error.__name__ not in bases:
            found.append(f"{kind.__name__} becomes {error.__name__}, whose name none of its bases has")
    return found


# Reasons


def test_every_reason_that_the_server_sends_has_a_row_of_the_same_name_at_the_client() -> None:
    assert faults(ERROR_OF_REASON) == []


def test_every_reason_is_sent_and_no_other() -> None:
    assert {status.reason for _, status in statuses()} == set(Reason) == set(ERROR_OF_REASON)
    assert all(isinstance(status.reason, Reason) for _, status in statuses())


def test_reason_without_a_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Status(grpc.StatusCode.UNAVAILABLE, "planted")  # type: ignore[arg-type]

    monkeypatch.setitem(STATUS_OF, server_errors.DrainingError, planted)

    assert faults(ERROR_OF_REASON) == ["planted (DrainingError) has no row at the client"]


def test_server_error_without_a_status_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(STATUS_OF, server_errors.NotReadyError)

    assert faults(ERROR_OF_REASON) == ["NotReadyError has no status"]


def test_reason_with_another_error_at_the_client_is_found() -> None:
    assert faults({**ERROR_OF_REASON, Reason.NOT_READY: client_errors.ClosedError}) == [
        "NotReadyError becomes ClosedError, whose name none of its bases has"
    ]


def test_every_status_code_has_a_row_at_the_client() -> None:
    assert set(ERROR_OF_STATUS) == set(grpc.StatusCode)


@pytest.mark.parametrize("kind", sorted(set(dict(statuses())) - {Exception}, key=lambda kind: kind.__name__))
def test_status_without_its_reason_means_an_error_of_the_same_branch(kind: type[Exception]) -> None:
    code, reason = status_of(kind("text"))

    # gRPC itself gives these two codes other meanings: a message over a limit, and a table that is not ready.
    expected = {Reason.OVER_LIMIT: client_errors.TooLargeError, Reason.INCOMPATIBLE_VERSION: client_errors.NotReadyError}
    if reason in expected:
        assert ERROR_OF_STATUS[code] is expected[reason]
    else:
        assert issubclass(ERROR_OF_REASON[reason], ERROR_OF_STATUS[code])


def test_every_outcome_of_an_episode_has_a_row_on_both_sides() -> None:
    outcomes = set(pb.EpisodeResult.Outcome.values()) - {pb.EpisodeResult.OUTCOME_UNSPECIFIED}
    stored = {pb.EpisodeResult.OUTCOME_ACCEPTED, pb.EpisodeResult.OUTCOME_DUPLICATE}

    assert set(_ERROR_OF_OUTCOME) == outcomes - stored
    assert set(convert._OUTCOME_OF.values()) == outcomes - stored
    for kind, outcome in convert._OUTCOME_OF.items():
        assert issubclass(kind, CodecError) or _ERROR_OF_OUTCOME[outcome].__name__ == kind.__name__


def test_bases_are_never_raised_themselves() -> None:
    raised = {
        node.exc.func.id
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        if "touchline_server" in file.parts
    }

    assert "DrainingError" in raised
    assert raised & {kind.__name__ for kind in ABSTRACT} == set()


# Errors


def test_shared_errors_stand_in_the_same_tree_on_both_sides() -> None:
    server, client = classes(server_errors), classes(client_errors)
    shared = server.keys() & client.keys()

    def bases(kind: type[Exception]) -> set[str]:
        found = {"root" if base.__name__ in ("ReplayError", "TouchlineError") else base.__name__ for base in kind.__mro__}
        return found & {*shared, "root", "ValueError"}

    assert len(shared) == 12
    assert {name: bases(server[name]) for name in shared} == {name: bases(client[name]) for name in shared}


@pytest.mark.parametrize("module", [server_errors, client_errors])
def test_tree_in_the_docstring_is_the_tree_of_the_classes(module: ModuleType) -> None:
    drawn: dict[str, str] = {}
    stack: list[str] = []
    for indent, name in re.findall(r"^([│ ├└─]*)([A-Z]\w+Error)\b", module.__doc__ or "", re.MULTILINE):
        del stack[len(indent) // 4 :]
        drawn[name] = stack[-1] if stack else "Exception"
        stack.append(name)

    assert drawn == {name: kind.__mro__[1].__name__ for name, kind in classes(module).items()}


@pytest.mark.parametrize("module", ["touchline_server", "touchline_server.errors"])
@pytest.mark.parametrize(("old", "new"), server_errors.RENAMED.items())
def test_former_name_of_an_error_is_the_new_one_and_warns(module: str, old: str, new: str) -> None:
    imported = importlib.import_module(module)

    with pytest.warns(DeprecationWarning, match=rf"^{module}\.{old} is now {new}$") as caught:
        kind = getattr(imported, old)

    assert kind is getattr(server_errors, new)
    assert caught[0].filename == __file__
    assert old not in dir(imported)


@pytest.mark.parametrize("module", ["touchline_server", "touchline_server.errors"])
def test_name_that_never_was_is_an_attribute_error(module: str) -> None:
    with warnings.catch_warnings(), pytest.raises(AttributeError, match="has no attribute 'OverWorkedError'"):
        warnings.simplefilter("error")
        getattr(importlib.import_module(module), "OverWorkedError")  # noqa: B009


# Words that both sides know


def strings_of(file: Path) -> set[str]:
    """Returns the string constants of a module, except docstrings."""
    nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose}


def constants_of(source: str) -> dict[str, object]:
    """Returns the constants that a module defines, by name; None for a value that is not a plain number."""
    found: dict[str, object] = {}
    for node in ast.parse(source).body:
        for target in node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []:
            if isinstance(target, ast.Name) and target.id.isupper() and node.value is not None:
                numbers = all(isinstance(part, ast.Constant | ast.BinOp | ast.operator) for part in ast.walk(node.value))
                found[target.id] = eval(ast.unparse(node.value)) if numbers else None
    return found


def repeated_limits(sources: Mapping[str, str]) -> set[tuple[str, str]]:
    """Returns the (module, constant) that define a shared limit again: under its name, or as another limit on characters of 128."""
    shared = {*constants_of(Path(limits.__file__).read_text("utf-8")), "MAX_NAME_CHARS"}
    owners = {str(Path(module.__file__ or "").relative_to(ROOT)) for module in (limits, names)}
    return {
        (module, name)
        for module, source in sources.items()
        if module not in owners
        for name, value in constants_of(source).items()
        if name in shared or (name.endswith("_CHARS") and value == names.MAX_NAME_CHARS)
    }


def test_limits_that_both_sides_know_are_defined_once() -> None:
    sources = {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in SOURCES}

    assert names.MAX_NAME_CHARS == 128
    assert repeated_limits(sources) == set()


@pytest.mark.parametrize(
    "line", ["MAX_ID_CHARS = 128", "MAX_ACTOR_CHARS: int = 1 << 7", "MAX_REQUEST_BYTES = 2 * 1024 * 1024", "MAX_NAME_CHARS = 256"]
)
def test_limit_that_is_defined_again_is_found(line: str) -> None:
    assert repeated_limits({"planted.py": f"import os\n\n{line}\n"}) == {("planted.py", re.split(r"[ :]", line)[0])}


def test_configuration_takes_its_defaults_from_the_shared_limits() -> None:
    configured = Config().limits

    assert configured.max_message_bytes == limits.DEFAULT_MAX_MESSAGE_BYTES
    assert configured.max_request_bytes == limits.MAX_REQUEST_BYTES
    assert (configured.max_episode_bytes, configured.max_columns) == (CodecLimits().max_episode_bytes, CodecLimits().max_columns)


def test_metadata_keys_are_spelled_once() -> None:
    keys = {value for name, value in vars(metadata).items() if name.endswith("_METADATA_KEY")}

    spelled = {str(file.relative_to(ROOT)): strings_of(file) & keys for file in SOURCES}

    assert len(keys) == 7
    assert {file for file, found in spelled.items() if found} == {"protos/src/touchline_protos/types/metadata.py"}


def test_reasons_are_spelled_once() -> None:
    words = {reason.value for reason in Reason if "-" in reason.value}

    spelled = {str(file.relative_to(ROOT)) for file in SOURCES if strings_of(file) & words}

    assert spelled == {str(Path(reasons.__file__).relative_to(ROOT))}


def test_reasons_of_the_wires_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "wire.md").read_text("utf-8")

    named = {word for word in re.findall(r"`([a-z]+(?:-[a-z]+)*)`", page) if word in set(Reason)}

    assert named == set(Reason)
    assert grpc_status.REASON_METADATA_KEY in page
