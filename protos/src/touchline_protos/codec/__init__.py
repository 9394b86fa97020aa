"""The codec: episodes and batches to and from protobuf messages, by hand, so that no payload is copied twice.

Encoders return ``bytes`` that the generated classes read, decoders read what the generated classes write, in any valid
encoding (fields in any order, unknown fields, packed or unpacked shapes). A singular sub-message that appears twice is
refused, not merged. Decoders treat messages as hostile: what is malformed raises :class:`CodecError` and nothing else.
"""

from touchline_protos.codec.batch_decoder import BatchDecoder, BodyLayout
from touchline_protos.codec.batch_encoder import BatchLayout, Piece, Segment
from touchline_protos.codec.download import EpisodeDecoder, EpisodeSelection
from touchline_protos.codec.episodes import decode_add_episode, encode_add_episode
from touchline_protos.codec.tensors import TensorSpec
from touchline_protos.codec.upload import LoadDecoder, encode_load, encode_loads
from touchline_protos.types.episode import CodecError, CodecLimits, Episode, EpisodeKey, OversizeError, StoredEpisode

__all__ = [
    "BatchDecoder",
    "BatchLayout",
    "BodyLayout",
    "CodecError",
    "CodecLimits",
    "Episode",
    "EpisodeDecoder",
    "EpisodeKey",
    "EpisodeSelection",
    "LoadDecoder",
    "OversizeError",
    "Piece",
    "Segment",
    "StoredEpisode",
    "TensorSpec",
    "decode_add_episode",
    "encode_add_episode",
    "encode_load",
    "encode_loads",
]
