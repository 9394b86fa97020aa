"""A peer's text stays on one line: in records of loggers and handlers, in errors, on terminals."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import unicodedata
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from touchline._actor.keys import Identity
from touchline._cli.terminal import print_error, print_line
from touchline._rpc.calls import translate
from touchline._rpc.convert import check_actor
from touchline.errors import InvalidArgumentError
from touchline_protos.log_lines import OneLine, escape, get_logger
from touchline_protos.types.names import MAX_NAME_CHARS, name_fault
from touchline_server.service.grpc_status import shorten

HOSTILE = "".join(map(chr, (*range(32), *range(127, 160), 0x2028, 0x2029, 0x200E, 0x202E, 0x2066, 0x61C, 0xD800))) + "a%s{}\\é字"
TEXTS = st.text(st.one_of(st.sampled_from(HOSTILE), st.characters()), max_size=40)
FORGED = "x\n2026-01-01 00:00:00,000 INFO    touchline_server.service.app: draining"


def written(log: logging.Logger, *, at_the_handler: bool = False) -> tuple[io.StringIO, logging.Handler]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    if at_the_handler:
        handler.addFilter(OneLine())
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG)
    return stream, handler


@given(TEXTS)
def test_escaped_text_is_one_printable_line(text: str) -> None:
    told = escape(text)

    assert told.isprintable()
    assert len(told.splitlines()) <= 1
    assert told == text or not text.isprintable()


@given(TEXTS, TEXTS)
def test_record_with_a_peers_text_is_one_line(first: str, second: str) -> None:
    log = get_logger("touchline.test_log_lines")
    stream, _ = written(log)

    log.warning("%s and %r, %d", first, second, 3)
    log.warning("%(one)s", {"one": first})
    log.warning("%s", ValueError(first))
    log.warning(ValueError(second))

    lines = stream.getvalue().split("\n")
    assert len(lines) == 5
    assert lines.pop() == ""
    assert all(line.startswith("WARNING touchline.test_log_lines: ") and line.isprintable() for line in lines)


@given(TEXTS)
def test_record_of_a_library_is_one_line_by_the_handlers_filter(text: str) -> None:
    log = logging.getLogger("a library's")
    stream, _ = written(log, at_the_handler=True)

    log.error(text)
    log.error("%s", text)

    assert len(stream.getvalue().split("\n")) == 3


@given(TEXTS, TEXTS)
def test_trace_with_a_peers_text_has_no_line_of_the_peers(text: str, note: str) -> None:
    log = get_logger("touchline.test_log_lines")
    stream, _ = written(log)

    try:
        try:
            raise KeyError(text)
        except KeyError:
            raise ValueError("an episode of " + text) from None
    except ValueError as error:
        error.add_note(note)
        log.exception("a call failed")

    lines = stream.getvalue().split("\n")
    assert all(re.match(r"ERROR |Traceback |  ", line) or not line for line in lines)
    assert sum("ValueError: an episode of" in line for line in lines) == 1
    assert all(line.isprintable() for line in lines)


def test_what_is_ours_keeps_its_lines() -> None:
    log = get_logger("touchline.test_log_lines")
    stream, _ = written(log)

    log.info("configuration:\n%s", "a = 1\nb = 2", extra={"own_lines": True})
    log.info("%d of %5.1f %s", 3, 2.5, "episodes")

    assert stream.getvalue() == (
        "INFO touchline.test_log_lines: configuration:\na = 1\nb = 2\nINFO touchline.test_log_lines: 3 of   2.5 episodes\n"
    )


def test_every_module_makes_its_logger_with_the_filter() -> None:
    root = Path(__file__).parents[3]
    modules = [file for part in ("protos", "client", "server") for file in (root / part / "src").rglob("*.py")]

    plain = [str(file) for file in modules if "getLogger(__name__)" in file.read_text("utf-8")]

    assert plain == []
    assert sum("get_logger(__name__)" in file.read_text("utf-8") for file in modules) > 20


class Failed(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details, self.trailing_metadata = (lambda: code), (lambda: details), tuple


@given(TEXTS, st.sampled_from(list(grpc.StatusCode)))
def test_error_texts_of_either_side_are_one_line(text: str, code: grpc.StatusCode) -> None:
    assert shorten(text).isprintable()
    assert str(translate(Failed(code, text), "127.0.0.1:1", tls=False)).isprintable()


@given(st.text(st.sampled_from(HOSTILE + "[red]a/bold"), max_size=30))
def test_terminal_shows_a_peers_text_on_one_line_and_without_markup(text: str) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_line(text)

    assert out.getvalue() == escape(text) + "\n"


def test_complaint_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(escape(FORGED))

    assert capsys.readouterr().err.count("\n") == 1


# Names


@pytest.mark.parametrize("one", [*map(chr, range(32)), *map(chr, range(127, 160)), *"\u2028\u2029\u202e\u2066\u200f\u061c", "\ud800"])
def test_name_with_a_character_that_controls_is_refused(one: str) -> None:
    fault = name_fault(f"robot{one}7")

    assert fault is not None
    assert f"U+{ord(one):04X}" in fault
    assert "position 5" in fault
    assert fault.isprintable()
    with pytest.raises(InvalidArgumentError, match=r"actor: .*U\+"):
        check_actor(f"robot{one}7")
    with pytest.raises(InvalidArgumentError, match=r"client_id: .*U\+"):
        Identity(f"robot{one}7")


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cf"]), min_size=1, max_size=MAX_NAME_CHARS))
def test_other_names_are_good_in_any_script(name: str) -> None:
    assert name_fault(name, min_chars=1) is None


@given(st.text(max_size=200))
def test_good_name_is_one_line_wherever_it_is_shown(name: str) -> None:
    if name_fault(name) is None:
        assert len(name) <= MAX_NAME_CHARS
        assert len(name.splitlines()) <= 1
        assert not any(unicodedata.category(one) == "Cc" for one in name)
