"""Fuzzes a target, guided by coverage: ``python -m support.coverage_fuzzing TARGET CORPUS [libFuzzer's options]``, ``-runs=1000`` for one.

CORPUS is a folder; good inputs are put into it first. Ends with an error, and the input in ``./crash-*``, if the target fails.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

# Imported before anything else imports them, so that they are instrumented.
with atheris.instrument_imports(include=["touchline_protos", "touchline_server.store.schema", "touchline_server.store.dedup"]):
    from support.fuzz_inputs import seeds
    from support.fuzzing import frame, targets


def main() -> None:
    name, corpus = sys.argv[1], Path(sys.argv[2])
    _, good = seeds(name)
    for number, messages in enumerate(good):
        (corpus / f"good-{number}").write_bytes(messages[0] if name == "adding" else frame(messages))
    logging.disable(logging.CRITICAL)  # each refusal is logged
    target = targets()[name]

    def one_input(data: bytes) -> None:
        target(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
