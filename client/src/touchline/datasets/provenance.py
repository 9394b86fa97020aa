"""The origin of an episode, as data sets store it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from touchline.datasets.errors import DatasetError
from touchline.datasets.source import escape, unescape
from touchline_protos.codec import EpisodeKey


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of an episode: what is stored beside its columns."""

    id: int = -1
    """Id that the server gave it; -1 if unknown. For reference only: a load gives the episode a new id."""
    key: EpisodeKey | None = None
    """Key under which it was stored; None if unknown."""
    actor: str = ""
    """Name of the actor that played it."""
    policy_version: int = 0
    """Version of the policy that acted."""

    def attributes(self) -> dict[str, Any]:
        """Returns the origin as a flat mapping of texts and integers."""
        flat: dict[str, Any] = {"id": self.id, "actor": escape(self.actor), "policy_version": self.policy_version}
        if self.key is not None:
            flat |= {
                "key_client_id": escape(self.key.client_id),
                "key_incarnation": self.key.incarnation,
                "key_sequence": self.key.sequence,
            }
        return flat

    @classmethod
    def of_attributes(cls, flat: Mapping[str, Any]) -> Provenance:
        """Returns the origin that :meth:`attributes` made a mapping of. Each attribute may be missing.

        Raises:
            DatasetError: an attribute has the wrong type.
        """
        try:
            key = None
            if "key_client_id" in flat:
                key = EpisodeKey(
                    unescape(_text(flat["key_client_id"])), int(flat.get("key_incarnation", 0)), int(flat.get("key_sequence", 0))
                )
            return cls(int(flat.get("id", -1)), key, unescape(_text(flat.get("actor", ""))), int(flat.get("policy_version", 0)))
        except (TypeError, ValueError) as error:
            raise DatasetError(f"id, actor, policy_version or key_*: {error}") from None

    def json(self) -> str:
        """Returns the origin as JSON."""
        return json.dumps(self.attributes())

    @classmethod
    def of_json(cls, text: str | bytes) -> Provenance:
        """Returns the origin that :meth:`json` encoded.

        Raises:
            DatasetError: it is not a JSON object of such attributes.
            ValueError: it is not JSON.
        """
        flat = json.loads(text)
        if not isinstance(flat, dict):
            raise DatasetError(f"{type(flat).__name__}, expected an object")
        return cls.of_attributes(flat)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__}, expected text")
    return value
