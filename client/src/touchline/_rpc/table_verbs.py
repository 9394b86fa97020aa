"""The verbs of a client that create, change, drop and list tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from touchline._rpc.calls import RpcClient
from touchline._rpc.convert import counts_of, table_infos_of
from touchline.errors import InvalidArgumentError
from touchline.types import TableInfo
from touchline_protos import Counts
from touchline_protos.v1 import replay_pb2 as pb


class TableVerbs:
    """Base of :class:`touchline.ReplayClient`. A server of protocol 1.0 answers each verb with IncompatibleVersionError."""

    _rpc: RpcClient

    def create_table(self, table: str, **keys: Any) -> None:
        """Creates a table; the token needs the role admin. With a data_dir, the server remembers it over a restart.

        Creating it again with the same keys does nothing, so a lost answer is no harm.

        Args:
            table: name of 1 to 64 lower-case letters, digits, ``-`` and ``_``, with a letter first.
            keys: keys as in ``[tables.NAME]`` of the server's configuration: ``buffer_size=100_000, law="step"``. The default table has
                those that are left out.

        Raises:
            InvalidArgumentError: the name cannot be one or is taken, or a key or a value is wrong; the text names it.
        """
        request = pb.CreateTableRequest(table=table, config_toml="".join(_lines(keys)))
        self._rpc.unary("CreateTable", request.SerializeToString())

    def set_rate(self, table: str = "", **keys: float) -> None:
        """Changes a table's rate limit while the server runs; the token needs the role admin. Calls and streams that wait notice it.

        A table that was created at run time has it after a restart of the server as well, any other table its configured one.

        Args:
            table: name of the table; empty for the default table.
            keys: keys as in ``[tables.NAME.rate]`` of the server's configuration: ``samples_per_insert=4``. The others stay as they are.

        Raises:
            UnknownTableError: there is no table of this name; the text names those that exist.
            InvalidArgumentError: a key or a value is wrong; the text names it.
        """
        request = pb.SetTableRequest(table=table, config_toml="".join(_lines({"rate": keys})))
        self._rpc.unary("SetTable", request.SerializeToString())

    def drop_table(self, table: str) -> Counts:
        """Removes a table with its episodes, in memory and on disk; the token needs the role admin. Not retried.

        Streams of the table, and calls that wait for it, end with UnknownTableError. Other tables are not touched. A table that is in the
        server's configuration comes back, empty, at the next start.

        Args:
            table: name of the table. The default table cannot be dropped.

        Returns:
            The table's counts before.

        Raises:
            UnknownTableError: there is no table of this name; the text names those that exist.
            UnavailableError, DeadlineError: the table may or may not have been dropped.
        """
        answer = self._rpc.unary("DropTable", pb.DropTableRequest(table=table).SerializeToString(), retry=False)
        return counts_of(pb.DropTableResponse.FromString(answer).counts)

    def tables(self) -> dict[str, TableInfo]:
        """Returns the description of every table that the token may use, by name; the default table's name is empty, and it is first."""
        answer = pb.ListTablesResponse.FromString(self._rpc.unary("ListTables", pb.ListTablesRequest().SerializeToString()))
        return table_infos_of(answer.tables)


def _lines(keys: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the keys as lines of TOML; a mapping's keys follow its name and a dot."""
    for key, value in keys.items():
        name = f"{prefix}{key}"
        if re.fullmatch(r"\w+", key, re.ASCII) is None:
            raise InvalidArgumentError(f"{name}: expected a key of [tables.NAME]")
        if isinstance(value, Mapping):
            yield from _lines(value, f"{name}.")
        elif isinstance(value, str | bool | int | float):
            # JSON's notation of these is TOML's too, except for NaN and infinity, which the server refuses by the key's name.
            finite = not isinstance(value, float) or math.isfinite(value)
            yield f"{name} = {json.dumps(value) if finite else value}\n"
        else:
            raise InvalidArgumentError(f"{name}: {value!r}, expected a str, a number or a bool")
