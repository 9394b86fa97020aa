"""Episodes as the codec's messages; what it refuses is the client's error."""

from __future__ import annotations

from touchline.errors import InvalidEpisodeError, TooLargeError
from touchline_protos.codec import CodecError, Episode, OversizeError, encode_add_episode


def encode_episode(episode: Episode, *, table: str) -> bytes:
    """Returns an episode as the one message that adds it to a table.

    Raises:
        TooLargeError: no message can hold it.
        InvalidEpisodeError: the codec refuses it for anything else.
    """
    try:
        return encode_add_episode(episode, table=table)
    except CodecError as error:
        raise to_client_error(error) from None


def to_client_error(error: CodecError) -> InvalidEpisodeError | TooLargeError:
    """Returns the client's error of an episode that the codec refuses."""
    return TooLargeError(str(error)) if isinstance(error, OversizeError) else InvalidEpisodeError(str(error))
