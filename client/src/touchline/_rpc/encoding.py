"""Episodes as messages, with the codec's errors as the client's."""

from __future__ import annotations

from touchline.errors import InvalidEpisodeError, TooLargeError
from touchline_protos.codec import CodecError, Episode, OversizeError, encode_add_episode


def encode_episode(episode: Episode, *, table: str) -> bytes:
    """Returns the message that adds an episode to a table.

    Raises:
        TooLargeError: no message can hold the episode.
        InvalidEpisodeError: the codec refuses the episode for another reason.
    """
    try:
        return encode_add_episode(episode, table=table)
    except CodecError as error:
        raise to_client_error(error) from None


def to_client_error(error: CodecError) -> InvalidEpisodeError | TooLargeError:
    """Returns the client's error for an episode that the codec refuses."""
    return TooLargeError(str(error)) if isinstance(error, OversizeError) else InvalidEpisodeError(str(error))
