"""The codec: encodes and decodes episodes and batches as protobuf messages by hand, so that no payload is copied twice.

Encoders return ``bytes`` that the generated classes can parse. Decoders accept every valid encoding that the generated classes produce
(fields in any order, unknown fields, packed or unpacked shapes), except that a singular submessage that appears twice is refused, not
merged. Decoders treat messages as hostile: a malformed one raises :class:`CodecError` and nothing else.

    wire            varints, tags, fields; messages that are filled in place
    tensors         tensors and columns; the alignment of payloads
    episodes        AddEpisodeRequest, and the Episode in other messages
    chunks          episodes too large for one message
    upload          LoadEpisodesRequest
    download        GetEpisodesResponse
    batch_encoder   SampleResponse, SampleStreamResponse, bodies of batches
    batch_parser    the Batch message
    batch_decoder   messages and bodies to batches
    buffer_pool     memory of received batches
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
