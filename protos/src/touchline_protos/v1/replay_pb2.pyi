from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_BOOL: _ClassVar[DType]
    DTYPE_UINT8: _ClassVar[DType]
    DTYPE_INT8: _ClassVar[DType]
    DTYPE_INT16: _ClassVar[DType]
    DTYPE_INT32: _ClassVar[DType]
    DTYPE_INT64: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT64: _ClassVar[DType]

class Law(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAW_UNSPECIFIED: _ClassVar[Law]
    LAW_EPISODE: _ClassVar[Law]
    LAW_STEP: _ClassVar[Law]
    LAW_RECENT: _ClassVar[Law]
    LAW_PRIORITIZED: _ClassVar[Law]
    LAW_FRESH_FIRST: _ClassVar[Law]
    LAW_TASK: _ClassVar[Law]

class Pad(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAD_UNSPECIFIED: _ClassVar[Pad]
    PAD_NONE: _ClassVar[Pad]
    PAD_END: _ClassVar[Pad]

class WhenEmpty(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WHEN_EMPTY_UNSPECIFIED: _ClassVar[WhenEmpty]
    WHEN_EMPTY_WAIT: _ClassVar[WhenEmpty]
    WHEN_EMPTY_OTHERS: _ClassVar[WhenEmpty]

class StorageState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STORAGE_STATE_UNSPECIFIED: _ClassVar[StorageState]
    STORAGE_STATE_OK: _ClassVar[StorageState]
    STORAGE_STATE_FULL: _ClassVar[StorageState]
    STORAGE_STATE_FAILED: _ClassVar[StorageState]
DTYPE_UNSPECIFIED: DType
DTYPE_BOOL: DType
DTYPE_UINT8: DType
DTYPE_INT8: DType
DTYPE_INT16: DType
DTYPE_INT32: DType
DTYPE_INT64: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT64: DType
LAW_UNSPECIFIED: Law
LAW_EPISODE: Law
LAW_STEP: Law
LAW_RECENT: Law
LAW_PRIORITIZED: Law
LAW_FRESH_FIRST: Law
LAW_TASK: Law
PAD_UNSPECIFIED: Pad
PAD_NONE: Pad
PAD_END: Pad
WHEN_EMPTY_UNSPECIFIED: WhenEmpty
WHEN_EMPTY_WAIT: WhenEmpty
WHEN_EMPTY_OTHERS: WhenEmpty
STORAGE_STATE_UNSPECIFIED: StorageState
STORAGE_STATE_OK: StorageState
STORAGE_STATE_FULL: StorageState
STORAGE_STATE_FAILED: StorageState

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "padding", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    padding: bytes
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., padding: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class Column(_message.Message):
    __slots__ = ("name", "tensor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensor: Tensor
    def __init__(self, name: _Optional[str] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class ColumnSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class EpisodeKey(_message.Message):
    __slots__ = ("client_id", "incarnation", "sequence")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    incarnation: int
    sequence: int
    def __init__(self, client_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class Episode(_message.Message):
    __slots__ = ("key", "actor", "policy_version", "columns")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    key: EpisodeKey
    actor: str
    policy_version: int
    columns: _containers.RepeatedCompositeFieldContainer[Column]
    def __init__(self, key: _Optional[_Union[EpisodeKey, _Mapping]] = ..., actor: _Optional[str] = ..., policy_version: _Optional[int] = ..., columns: _Optional[_Iterable[_Union[Column, _Mapping]]] = ...) -> None: ...

class Counts(_message.Message):
    __slots__ = ("steps_stored", "episodes_stored", "steps_added", "episodes_added", "steps_evicted", "episodes_evicted", "episodes_refused", "episodes_duplicate", "episodes_too_short")
    STEPS_STORED_FIELD_NUMBER: _ClassVar[int]
    EPISODES_STORED_FIELD_NUMBER: _ClassVar[int]
    STEPS_ADDED_FIELD_NUMBER: _ClassVar[int]
    EPISODES_ADDED_FIELD_NUMBER: _ClassVar[int]
    STEPS_EVICTED_FIELD_NUMBER: _ClassVar[int]
    EPISODES_EVICTED_FIELD_NUMBER: _ClassVar[int]
    EPISODES_REFUSED_FIELD_NUMBER: _ClassVar[int]
    EPISODES_DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    EPISODES_TOO_SHORT_FIELD_NUMBER: _ClassVar[int]
    steps_stored: int
    episodes_stored: int
    steps_added: int
    episodes_added: int
    steps_evicted: int
    episodes_evicted: int
    episodes_refused: int
    episodes_duplicate: int
    episodes_too_short: int
    def __init__(self, steps_stored: _Optional[int] = ..., episodes_stored: _Optional[int] = ..., steps_added: _Optional[int] = ..., episodes_added: _Optional[int] = ..., steps_evicted: _Optional[int] = ..., episodes_evicted: _Optional[int] = ..., episodes_refused: _Optional[int] = ..., episodes_duplicate: _Optional[int] = ..., episodes_too_short: _Optional[int] = ...) -> None: ...

class AddEpisodeRequest(_message.Message):
    __slots__ = ("table", "episode")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    EPISODE_FIELD_NUMBER: _ClassVar[int]
    table: str
    episode: Episode
    def __init__(self, table: _Optional[str] = ..., episode: _Optional[_Union[Episode, _Mapping]] = ...) -> None: ...

class AddEpisodeResponse(_message.Message):
    __slots__ = ("episode_id", "duplicate", "counts")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    episode_id: int
    duplicate: bool
    counts: Counts
    def __init__(self, episode_id: _Optional[int] = ..., duplicate: bool = ..., counts: _Optional[_Union[Counts, _Mapping]] = ...) -> None: ...

class LoadEpisodesRequest(_message.Message):
    __slots__ = ("table", "episodes", "episode", "header", "chunk")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    EPISODES_FIELD_NUMBER: _ClassVar[int]
    EPISODE_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    table: str
    episodes: _containers.RepeatedCompositeFieldContainer[Episode]
    episode: Episode
    header: EpisodeHeader
    chunk: ColumnChunk
    def __init__(self, table: _Optional[str] = ..., episodes: _Optional[_Iterable[_Union[Episode, _Mapping]]] = ..., episode: _Optional[_Union[Episode, _Mapping]] = ..., header: _Optional[_Union[EpisodeHeader, _Mapping]] = ..., chunk: _Optional[_Union[ColumnChunk, _Mapping]] = ...) -> None: ...

class EpisodeHeader(_message.Message):
    __slots__ = ("key", "actor", "policy_version", "length", "columns")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    key: EpisodeKey
    actor: str
    policy_version: int
    length: int
    columns: _containers.RepeatedCompositeFieldContainer[ColumnSpec]
    def __init__(self, key: _Optional[_Union[EpisodeKey, _Mapping]] = ..., actor: _Optional[str] = ..., policy_version: _Optional[int] = ..., length: _Optional[int] = ..., columns: _Optional[_Iterable[_Union[ColumnSpec, _Mapping]]] = ...) -> None: ...

class ColumnChunk(_message.Message):
    __slots__ = ("column", "offset_bytes", "data")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    column: int
    offset_bytes: int
    data: bytes
    def __init__(self, column: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class LoadEpisodesResponse(_message.Message):
    __slots__ = ("results", "counts")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[EpisodeResult]
    counts: Counts
    def __init__(self, results: _Optional[_Iterable[_Union[EpisodeResult, _Mapping]]] = ..., counts: _Optional[_Union[Counts, _Mapping]] = ...) -> None: ...

class EpisodeResult(_message.Message):
    __slots__ = ("key", "outcome", "episode_id", "reason")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[EpisodeResult.Outcome]
        OUTCOME_ACCEPTED: _ClassVar[EpisodeResult.Outcome]
        OUTCOME_DUPLICATE: _ClassVar[EpisodeResult.Outcome]
        OUTCOME_INVALID: _ClassVar[EpisodeResult.Outcome]
        OUTCOME_KEY_CONFLICT: _ClassVar[EpisodeResult.Outcome]
        OUTCOME_TOO_LARGE: _ClassVar[EpisodeResult.Outcome]
    OUTCOME_UNSPECIFIED: EpisodeResult.Outcome
    OUTCOME_ACCEPTED: EpisodeResult.Outcome
    OUTCOME_DUPLICATE: EpisodeResult.Outcome
    OUTCOME_INVALID: EpisodeResult.Outcome
    OUTCOME_KEY_CONFLICT: EpisodeResult.Outcome
    OUTCOME_TOO_LARGE: EpisodeResult.Outcome
    KEY_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: EpisodeKey
    outcome: EpisodeResult.Outcome
    episode_id: int
    reason: str
    def __init__(self, key: _Optional[_Union[EpisodeKey, _Mapping]] = ..., outcome: _Optional[_Union[EpisodeResult.Outcome, str]] = ..., episode_id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class SampleRequest(_message.Message):
    __slots__ = ("table", "batch_size", "horizon", "law", "seed", "wait_s", "law_options", "pad", "mix", "when_empty")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    LAW_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    LAW_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PAD_FIELD_NUMBER: _ClassVar[int]
    MIX_FIELD_NUMBER: _ClassVar[int]
    WHEN_EMPTY_FIELD_NUMBER: _ClassVar[int]
    table: str
    batch_size: int
    horizon: int
    law: Law
    seed: int
    wait_s: float
    law_options: LawOptions
    pad: Pad
    mix: _containers.RepeatedCompositeFieldContainer[MixShare]
    when_empty: WhenEmpty
    def __init__(self, table: _Optional[str] = ..., batch_size: _Optional[int] = ..., horizon: _Optional[int] = ..., law: _Optional[_Union[Law, str]] = ..., seed: _Optional[int] = ..., wait_s: _Optional[float] = ..., law_options: _Optional[_Union[LawOptions, _Mapping]] = ..., pad: _Optional[_Union[Pad, str]] = ..., mix: _Optional[_Iterable[_Union[MixShare, _Mapping]]] = ..., when_empty: _Optional[_Union[WhenEmpty, str]] = ...) -> None: ...

class LawOptions(_message.Message):
    __slots__ = ("recent_steps", "recent_half_life", "beta")
    RECENT_STEPS_FIELD_NUMBER: _ClassVar[int]
    RECENT_HALF_LIFE_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    recent_steps: int
    recent_half_life: float
    beta: float
    def __init__(self, recent_steps: _Optional[int] = ..., recent_half_life: _Optional[float] = ..., beta: _Optional[float] = ...) -> None: ...

class MixShare(_message.Message):
    __slots__ = ("table", "share")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    table: str
    share: float
    def __init__(self, table: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class SampleResponse(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("columns", "provenance", "actors")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedCompositeFieldContainer[Column]
    provenance: Provenance
    actors: _containers.RepeatedCompositeFieldContainer[ActorName]
    def __init__(self, columns: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., actors: _Optional[_Iterable[_Union[ActorName, _Mapping]]] = ...) -> None: ...

class Provenance(_message.Message):
    __slots__ = ("episode_id", "start", "actor", "policy_version", "probability", "weight", "table", "valid")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    VALID_FIELD_NUMBER: _ClassVar[int]
    episode_id: Tensor
    start: Tensor
    actor: Tensor
    policy_version: Tensor
    probability: Tensor
    weight: Tensor
    table: Tensor
    valid: Tensor
    def __init__(self, episode_id: _Optional[_Union[Tensor, _Mapping]] = ..., start: _Optional[_Union[Tensor, _Mapping]] = ..., actor: _Optional[_Union[Tensor, _Mapping]] = ..., policy_version: _Optional[_Union[Tensor, _Mapping]] = ..., probability: _Optional[_Union[Tensor, _Mapping]] = ..., weight: _Optional[_Union[Tensor, _Mapping]] = ..., table: _Optional[_Union[Tensor, _Mapping]] = ..., valid: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class ActorName(_message.Message):
    __slots__ = ("index", "name")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class UpdatePrioritiesRequest(_message.Message):
    __slots__ = ("table", "episode_id", "start", "priorities")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    PRIORITIES_FIELD_NUMBER: _ClassVar[int]
    table: str
    episode_id: Tensor
    start: Tensor
    priorities: Tensor
    def __init__(self, table: _Optional[str] = ..., episode_id: _Optional[_Union[Tensor, _Mapping]] = ..., start: _Optional[_Union[Tensor, _Mapping]] = ..., priorities: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class UpdatePrioritiesResponse(_message.Message):
    __slots__ = ("updated", "evicted")
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    updated: int
    evicted: int
    def __init__(self, updated: _Optional[int] = ..., evicted: _Optional[int] = ...) -> None: ...

class SampleStreamRequest(_message.Message):
    __slots__ = ("open", "credit", "ring")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    RING_FIELD_NUMBER: _ClassVar[int]
    open: SampleStreamOpen
    credit: SampleStreamCredit
    ring: RingAttachment
    def __init__(self, open: _Optional[_Union[SampleStreamOpen, _Mapping]] = ..., credit: _Optional[_Union[SampleStreamCredit, _Mapping]] = ..., ring: _Optional[_Union[RingAttachment, _Mapping]] = ...) -> None: ...

class SampleStreamOpen(_message.Message):
    __slots__ = ("sample", "credits", "max_batches_per_frame", "shared_memory_id")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCHES_PER_FRAME_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_ID_FIELD_NUMBER: _ClassVar[int]
    sample: SampleRequest
    credits: int
    max_batches_per_frame: int
    shared_memory_id: str
    def __init__(self, sample: _Optional[_Union[SampleRequest, _Mapping]] = ..., credits: _Optional[int] = ..., max_batches_per_frame: _Optional[int] = ..., shared_memory_id: _Optional[str] = ...) -> None: ...

class SampleStreamCredit(_message.Message):
    __slots__ = ("batches",)
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    batches: int
    def __init__(self, batches: _Optional[int] = ...) -> None: ...

class RingAttachment(_message.Message):
    __slots__ = ("attached", "reason")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    attached: bool
    reason: str
    def __init__(self, attached: bool = ..., reason: _Optional[str] = ...) -> None: ...

class SampleStreamResponse(_message.Message):
    __slots__ = ("group", "chunk", "ring", "actors")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RING_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    group: BatchGroup
    chunk: BatchChunk
    ring: RingSetup
    actors: ActorNames
    def __init__(self, group: _Optional[_Union[BatchGroup, _Mapping]] = ..., chunk: _Optional[_Union[BatchChunk, _Mapping]] = ..., ring: _Optional[_Union[RingSetup, _Mapping]] = ..., actors: _Optional[_Union[ActorNames, _Mapping]] = ...) -> None: ...

class ActorNames(_message.Message):
    __slots__ = ("actors",)
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    actors: _containers.RepeatedCompositeFieldContainer[ActorName]
    def __init__(self, actors: _Optional[_Iterable[_Union[ActorName, _Mapping]]] = ...) -> None: ...

class BatchGroup(_message.Message):
    __slots__ = ("batches",)
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    batches: _containers.RepeatedCompositeFieldContainer[Batch]
    def __init__(self, batches: _Optional[_Iterable[_Union[Batch, _Mapping]]] = ...) -> None: ...

class BatchChunk(_message.Message):
    __slots__ = ("header", "size_bytes", "offset_bytes", "padding", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: Batch
    size_bytes: int
    offset_bytes: int
    padding: bytes
    data: bytes
    def __init__(self, header: _Optional[_Union[Batch, _Mapping]] = ..., size_bytes: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., padding: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class RingSetup(_message.Message):
    __slots__ = ("path", "size_bytes", "slots", "slot_size_bytes", "layout", "token", "refused")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    path: str
    size_bytes: int
    slots: int
    slot_size_bytes: int
    layout: Batch
    token: bytes
    refused: str
    def __init__(self, path: _Optional[str] = ..., size_bytes: _Optional[int] = ..., slots: _Optional[int] = ..., slot_size_bytes: _Optional[int] = ..., layout: _Optional[_Union[Batch, _Mapping]] = ..., token: _Optional[bytes] = ..., refused: _Optional[str] = ...) -> None: ...

class GetEpisodesRequest(_message.Message):
    __slots__ = ("table", "episode_ids", "skip_missing", "first_episode_id", "last_episode_id", "actor", "newest", "columns", "max_frame_bytes")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    EPISODE_IDS_FIELD_NUMBER: _ClassVar[int]
    SKIP_MISSING_FIELD_NUMBER: _ClassVar[int]
    FIRST_EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    table: str
    episode_ids: _containers.RepeatedScalarFieldContainer[int]
    skip_missing: bool
    first_episode_id: int
    last_episode_id: int
    actor: str
    newest: int
    columns: _containers.RepeatedScalarFieldContainer[str]
    max_frame_bytes: int
    def __init__(self, table: _Optional[str] = ..., episode_ids: _Optional[_Iterable[int]] = ..., skip_missing: bool = ..., first_episode_id: _Optional[int] = ..., last_episode_id: _Optional[int] = ..., actor: _Optional[str] = ..., newest: _Optional[int] = ..., columns: _Optional[_Iterable[str]] = ..., max_frame_bytes: _Optional[int] = ...) -> None: ...

class GetEpisodesResponse(_message.Message):
    __slots__ = ("selection", "group", "header", "chunk", "evicted")
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    selection: EpisodeSelection
    group: EpisodeGroup
    header: StoredEpisodeHeader
    chunk: ColumnChunk
    evicted: EpisodeEvicted
    def __init__(self, selection: _Optional[_Union[EpisodeSelection, _Mapping]] = ..., group: _Optional[_Union[EpisodeGroup, _Mapping]] = ..., header: _Optional[_Union[StoredEpisodeHeader, _Mapping]] = ..., chunk: _Optional[_Union[ColumnChunk, _Mapping]] = ..., evicted: _Optional[_Union[EpisodeEvicted, _Mapping]] = ...) -> None: ...

class EpisodeSelection(_message.Message):
    __slots__ = ("first_episode_id", "last_episode_id", "episodes", "steps", "lineage")
    FIRST_EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    EPISODES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    first_episode_id: int
    last_episode_id: int
    episodes: int
    steps: int
    lineage: int
    def __init__(self, first_episode_id: _Optional[int] = ..., last_episode_id: _Optional[int] = ..., episodes: _Optional[int] = ..., steps: _Optional[int] = ..., lineage: _Optional[int] = ...) -> None: ...

class EpisodeGroup(_message.Message):
    __slots__ = ("episodes",)
    EPISODES_FIELD_NUMBER: _ClassVar[int]
    episodes: _containers.RepeatedCompositeFieldContainer[StoredEpisode]
    def __init__(self, episodes: _Optional[_Iterable[_Union[StoredEpisode, _Mapping]]] = ...) -> None: ...

class StoredEpisode(_message.Message):
    __slots__ = ("episode_id", "episode")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    EPISODE_FIELD_NUMBER: _ClassVar[int]
    episode_id: int
    episode: Episode
    def __init__(self, episode_id: _Optional[int] = ..., episode: _Optional[_Union[Episode, _Mapping]] = ...) -> None: ...

class StoredEpisodeHeader(_message.Message):
    __slots__ = ("episode_id", "header")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    episode_id: int
    header: EpisodeHeader
    def __init__(self, episode_id: _Optional[int] = ..., header: _Optional[_Union[EpisodeHeader, _Mapping]] = ...) -> None: ...

class EpisodeEvicted(_message.Message):
    __slots__ = ("episode_id",)
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    episode_id: int
    def __init__(self, episode_id: _Optional[int] = ...) -> None: ...

class ReadyRequest(_message.Message):
    __slots__ = ("table", "min_steps", "wait_s", "horizon")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    MIN_STEPS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    table: str
    min_steps: int
    wait_s: float
    horizon: int
    def __init__(self, table: _Optional[str] = ..., min_steps: _Optional[int] = ..., wait_s: _Optional[float] = ..., horizon: _Optional[int] = ...) -> None: ...

class ReadyResponse(_message.Message):
    __slots__ = ("can_sample", "min_steps_reached", "min_history", "counts", "horizon", "episodes_eligible", "longest_episode")
    CAN_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    MIN_STEPS_REACHED_FIELD_NUMBER: _ClassVar[int]
    MIN_HISTORY_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    EPISODES_ELIGIBLE_FIELD_NUMBER: _ClassVar[int]
    LONGEST_EPISODE_FIELD_NUMBER: _ClassVar[int]
    can_sample: bool
    min_steps_reached: bool
    min_history: int
    counts: Counts
    horizon: int
    episodes_eligible: int
    longest_episode: int
    def __init__(self, can_sample: bool = ..., min_steps_reached: bool = ..., min_history: _Optional[int] = ..., counts: _Optional[_Union[Counts, _Mapping]] = ..., horizon: _Optional[int] = ..., episodes_eligible: _Optional[int] = ..., longest_episode: _Optional[int] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: str
    def __init__(self, table: _Optional[str] = ...) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("version", "protocol_version", "config_toml", "columns", "device", "size_bytes", "capacity", "max_message_bytes", "counts", "storage_state", "storage_reason", "tables", "rate", "episodes_not_sampled")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_TOML_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    STORAGE_STATE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_REASON_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    EPISODES_NOT_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    version: str
    protocol_version: str
    config_toml: str
    columns: _containers.RepeatedCompositeFieldContainer[ColumnSpec]
    device: str
    size_bytes: int
    capacity: int
    max_message_bytes: int
    counts: Counts
    storage_state: StorageState
    storage_reason: str
    tables: _containers.RepeatedScalarFieldContainer[str]
    rate: RateInfo
    episodes_not_sampled: int
    def __init__(self, version: _Optional[str] = ..., protocol_version: _Optional[str] = ..., config_toml: _Optional[str] = ..., columns: _Optional[_Iterable[_Union[ColumnSpec, _Mapping]]] = ..., device: _Optional[str] = ..., size_bytes: _Optional[int] = ..., capacity: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., counts: _Optional[_Union[Counts, _Mapping]] = ..., storage_state: _Optional[_Union[StorageState, str]] = ..., storage_reason: _Optional[str] = ..., tables: _Optional[_Iterable[str]] = ..., rate: _Optional[_Union[RateInfo, _Mapping]] = ..., episodes_not_sampled: _Optional[int] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: str
    def __init__(self, table: _Optional[str] = ...) -> None: ...

class ClearResponse(_message.Message):
    __slots__ = ("counts",)
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    counts: Counts
    def __init__(self, counts: _Optional[_Union[Counts, _Mapping]] = ...) -> None: ...

class CreateTableRequest(_message.Message):
    __slots__ = ("table", "config_toml")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_TOML_FIELD_NUMBER: _ClassVar[int]
    table: str
    config_toml: str
    def __init__(self, table: _Optional[str] = ..., config_toml: _Optional[str] = ...) -> None: ...

class CreateTableResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RateInfo(_message.Message):
    __slots__ = ("samples_per_insert", "tolerance", "min_steps", "steps_added", "slices_delivered", "recent_steps_added", "recent_slices_delivered", "owed_slices", "adds_held", "batches_held", "adds", "batches")
    SAMPLES_PER_INSERT_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    MIN_STEPS_FIELD_NUMBER: _ClassVar[int]
    STEPS_ADDED_FIELD_NUMBER: _ClassVar[int]
    SLICES_DELIVERED_FIELD_NUMBER: _ClassVar[int]
    RECENT_STEPS_ADDED_FIELD_NUMBER: _ClassVar[int]
    RECENT_SLICES_DELIVERED_FIELD_NUMBER: _ClassVar[int]
    OWED_SLICES_FIELD_NUMBER: _ClassVar[int]
    ADDS_HELD_FIELD_NUMBER: _ClassVar[int]
    BATCHES_HELD_FIELD_NUMBER: _ClassVar[int]
    ADDS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    samples_per_insert: float
    tolerance: float
    min_steps: int
    steps_added: int
    slices_delivered: int
    recent_steps_added: int
    recent_slices_delivered: int
    owed_slices: float
    adds_held: int
    batches_held: int
    adds: _containers.RepeatedCompositeFieldContainer[RateWaiter]
    batches: _containers.RepeatedCompositeFieldContainer[RateWaiter]
    def __init__(self, samples_per_insert: _Optional[float] = ..., tolerance: _Optional[float] = ..., min_steps: _Optional[int] = ..., steps_added: _Optional[int] = ..., slices_delivered: _Optional[int] = ..., recent_steps_added: _Optional[int] = ..., recent_slices_delivered: _Optional[int] = ..., owed_slices: _Optional[float] = ..., adds_held: _Optional[int] = ..., batches_held: _Optional[int] = ..., adds: _Optional[_Iterable[_Union[RateWaiter, _Mapping]]] = ..., batches: _Optional[_Iterable[_Union[RateWaiter, _Mapping]]] = ...) -> None: ...

class RateWaiter(_message.Message):
    __slots__ = ("who", "waiting_s")
    WHO_FIELD_NUMBER: _ClassVar[int]
    WAITING_S_FIELD_NUMBER: _ClassVar[int]
    who: str
    waiting_s: float
    def __init__(self, who: _Optional[str] = ..., waiting_s: _Optional[float] = ...) -> None: ...

class SetTableRequest(_message.Message):
    __slots__ = ("table", "config_toml")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_TOML_FIELD_NUMBER: _ClassVar[int]
    table: str
    config_toml: str
    def __init__(self, table: _Optional[str] = ..., config_toml: _Optional[str] = ...) -> None: ...

class SetTableResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DropTableRequest(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: str
    def __init__(self, table: _Optional[str] = ...) -> None: ...

class DropTableResponse(_message.Message):
    __slots__ = ("counts",)
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    counts: Counts
    def __init__(self, counts: _Optional[_Union[Counts, _Mapping]] = ...) -> None: ...

class ListTablesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTablesResponse(_message.Message):
    __slots__ = ("tables",)
    TABLES_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[TableInfo]
    def __init__(self, tables: _Optional[_Iterable[_Union[TableInfo, _Mapping]]] = ...) -> None: ...

class TableInfo(_message.Message):
    __slots__ = ("table", "config_toml", "counts", "capacity", "device", "size_bytes", "storage_state", "storage_reason", "created")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_TOML_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORAGE_STATE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_REASON_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    table: str
    config_toml: str
    counts: Counts
    capacity: int
    device: str
    size_bytes: int
    storage_state: StorageState
    storage_reason: str
    created: bool
    def __init__(self, table: _Optional[str] = ..., config_toml: _Optional[str] = ..., counts: _Optional[_Union[Counts, _Mapping]] = ..., capacity: _Optional[int] = ..., device: _Optional[str] = ..., size_bytes: _Optional[int] = ..., storage_state: _Optional[_Union[StorageState, str]] = ..., storage_reason: _Optional[str] = ..., created: bool = ...) -> None: ...
