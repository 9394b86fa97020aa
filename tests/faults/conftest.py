"""Prints the counts of the fault tests at the end."""

from __future__ import annotations

import pytest

from support import fault_tally


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counted = fault_tally.summary()
    if counted:
        terminalreporter.section("faults")
        terminalreporter.write_line(counted)
