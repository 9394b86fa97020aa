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

class ColumnMemory(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COLUMN_MEMORY_UNSPECIFIED: _ClassVar[ColumnMemory]
    COLUMN_MEMORY_HOST: _ClassVar[ColumnMemory]
    COLUMN_MEMORY_CUDA: _ClassVar[ColumnMemory]

class StorageState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STORAGE_STATE_UNSPECIFIED: _ClassVar[StorageState]
    STORAGE_STATE_OK: _ClassVar[StorageState]
    STORAGE_STATE_FULL: _ClassVar[StorageState]
    STORAGE_STATE_FAILED: _ClassVar[StorageState]

class ServingState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVING_STATE_UNSPECIFIED: _ClassVar[ServingState]
    SERVING_STATE_RESTORING: _ClassVar[ServingState]
    SERVING_STATE_SERVING: _ClassVar[ServingState]
    SERVING_STATE_DRAINING: _ClassVar[ServingState]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_IDLE: _ClassVar[Verdict]
    VERDICT_BALANCED: _ClassVar[Verdict]
    VERDICT_LEARNERS_WAIT: _ClassVar[Verdict]
    VERDICT_ACTORS_WAIT: _ClassVar[Verdict]
    VERDICT_STORE_FULL: _ClassVar[Verdict]

class WaitCause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAIT_CAUSE_UNSPECIFIED: _ClassVar[WaitCause]
    WAIT_CAUSE_DATA: _ClassVar[WaitCause]
    WAIT_CAUSE_RATE: _ClassVar[WaitCause]
    WAIT_CAUSE_SAMPLING: _ClassVar[WaitCause]
    WAIT_CAUSE_BUDGET: _ClassVar[WaitCause]
    WAIT_CAUSE_THROTTLE: _ClassVar[WaitCause]
    WAIT_CAUSE_STORING: _ClassVar[WaitCause]

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_RING: _ClassVar[Transport]
    TRANSPORT_STREAM: _ClassVar[Transport]
    TRANSPORT_UNARY: _ClassVar[Transport]
    TRANSPORT_DEVICE: _ClassVar[Transport]
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
COLUMN_MEMORY_UNSPECIFIED: ColumnMemory
COLUMN_MEMORY_HOST: ColumnMemory
COLUMN_MEMORY_CUDA: ColumnMemory
STORAGE_STATE_UNSPECIFIED: StorageState
STORAGE_STATE_OK: StorageState
STORAGE_STATE_FULL: StorageState
STORAGE_STATE_FAILED: StorageState
SERVING_STATE_UNSPECIFIED: ServingState
SERVING_STATE_RESTORING: ServingState
SERVING_STATE_SERVING: ServingState
SERVING_STATE_DRAINING: ServingState
VERDICT_UNSPECIFIED: Verdict
VERDICT_IDLE: Verdict
VERDICT_BALANCED: Verdict
VERDICT_LEARNERS_WAIT: Verdict
VERDICT_ACTORS_WAIT: Verdict
VERDICT_STORE_FULL: Verdict
WAIT_CAUSE_UNSPECIFIED: WaitCause
WAIT_CAUSE_DATA: WaitCause
WAIT_CAUSE_RATE: WaitCause
WAIT_CAUSE_SAMPLING: WaitCause
WAIT_CAUSE_BUDGET: WaitCause
WAIT_CAUSE_THROTTLE: WaitCause
WAIT_CAUSE_STORING: WaitCause
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_RING: Transport
TRANSPORT_STREAM: Transport
TRANSPORT_UNARY: Transport
TRANSPORT_DEVICE: Transport

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
    __slots__ = ("table", "batch_size", "horizon", "law", "seed", "wait_s", "law_options", "pad", "mix", "when_empty", "learner_rank")
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
    LEARNER_RANK_FIELD_NUMBER: _ClassVar[int]
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
    learner_rank: LearnerRank
    def __init__(self, table: _Optional[str] = ..., batch_size: _Optional[int] = ..., horizon: _Optional[int] = ..., law: _Optional[_Union[Law, str]] = ..., seed: _Optional[int] = ..., wait_s: _Optional[float] = ..., law_options: _Optional[_Union[LawOptions, _Mapping]] = ..., pad: _Optional[_Union[Pad, str]] = ..., mix: _Optional[_Iterable[_Union[MixShare, _Mapping]]] = ..., when_empty: _Optional[_Union[WhenEmpty, str]] = ..., learner_rank: _Optional[_Union[LearnerRank, _Mapping]] = ...) -> None: ...

class LearnerRank(_message.Message):
    __slots__ = ("rank", "world_size", "job", "first_batch")
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    FIRST_BATCH_FIELD_NUMBER: _ClassVar[int]
    rank: int
    world_size: int
    job: str
    first_batch: int
    def __init__(self, rank: _Optional[int] = ..., world_size: _Optional[int] = ..., job: _Optional[str] = ..., first_batch: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("columns", "provenance", "actors", "store_generations")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    STORE_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedCompositeFieldContainer[Column]
    provenance: Provenance
    actors: _containers.RepeatedCompositeFieldContainer[ActorName]
    store_generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, columns: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., actors: _Optional[_Iterable[_Union[ActorName, _Mapping]]] = ..., store_generations: _Optional[_Iterable[int]] = ...) -> None: ...

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
    __slots__ = ("table", "episode_id", "start", "priorities", "store_generation")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    PRIORITIES_FIELD_NUMBER: _ClassVar[int]
    STORE_GENERATION_FIELD_NUMBER: _ClassVar[int]
    table: str
    episode_id: Tensor
    start: Tensor
    priorities: Tensor
    store_generation: int
    def __init__(self, table: _Optional[str] = ..., episode_id: _Optional[_Union[Tensor, _Mapping]] = ..., start: _Optional[_Union[Tensor, _Mapping]] = ..., priorities: _Optional[_Union[Tensor, _Mapping]] = ..., store_generation: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("sample", "credits", "max_batches_per_frame", "shared_memory_id", "rows")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCHES_PER_FRAME_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    sample: SampleRequest
    credits: int
    max_batches_per_frame: int
    shared_memory_id: str
    rows: RowsRequest
    def __init__(self, sample: _Optional[_Union[SampleRequest, _Mapping]] = ..., credits: _Optional[int] = ..., max_batches_per_frame: _Optional[int] = ..., shared_memory_id: _Optional[str] = ..., rows: _Optional[_Union[RowsRequest, _Mapping]] = ...) -> None: ...

class RowsRequest(_message.Message):
    __slots__ = ("host_columns", "cuda_devices")
    HOST_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    CUDA_DEVICES_FIELD_NUMBER: _ClassVar[int]
    host_columns: bool
    cuda_devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, host_columns: bool = ..., cuda_devices: _Optional[_Iterable[str]] = ...) -> None: ...

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
    __slots__ = ("actors", "forgotten")
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    actors: _containers.RepeatedCompositeFieldContainer[ActorName]
    forgotten: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, actors: _Optional[_Iterable[_Union[ActorName, _Mapping]]] = ..., forgotten: _Optional[_Iterable[int]] = ...) -> None: ...

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
    __slots__ = ("path", "size_bytes", "slots", "slot_size_bytes", "layout", "token", "refused", "rows", "rows_refused", "returns")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROWS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    RETURNS_FIELD_NUMBER: _ClassVar[int]
    path: str
    size_bytes: int
    slots: int
    slot_size_bytes: int
    layout: Batch
    token: bytes
    refused: str
    rows: RowsSetup
    rows_refused: str
    returns: ReturnSetup
    def __init__(self, path: _Optional[str] = ..., size_bytes: _Optional[int] = ..., slots: _Optional[int] = ..., slot_size_bytes: _Optional[int] = ..., layout: _Optional[_Union[Batch, _Mapping]] = ..., token: _Optional[bytes] = ..., refused: _Optional[str] = ..., rows: _Optional[_Union[RowsSetup, _Mapping]] = ..., rows_refused: _Optional[str] = ..., returns: _Optional[_Union[ReturnSetup, _Mapping]] = ...) -> None: ...

class RowsSetup(_message.Message):
    __slots__ = ("tables", "tensors", "steps")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[SharedTable]
    tensors: _containers.RepeatedCompositeFieldContainer[GatheredTensor]
    steps: int
    def __init__(self, tables: _Optional[_Iterable[_Union[SharedTable, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[GatheredTensor, _Mapping]]] = ..., steps: _Optional[int] = ...) -> None: ...

class SharedTable(_message.Message):
    __slots__ = ("memory", "size_bytes", "cuda_device", "cuda_handle", "rows", "offset_bytes")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CUDA_DEVICE_FIELD_NUMBER: _ClassVar[int]
    CUDA_HANDLE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    memory: ColumnMemory
    size_bytes: int
    cuda_device: str
    cuda_handle: bytes
    rows: int
    offset_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, memory: _Optional[_Union[ColumnMemory, str]] = ..., size_bytes: _Optional[int] = ..., cuda_device: _Optional[str] = ..., cuda_handle: _Optional[bytes] = ..., rows: _Optional[int] = ..., offset_bytes: _Optional[_Iterable[int]] = ...) -> None: ...

class GatheredTensor(_message.Message):
    __slots__ = ("first_step", "steps")
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    first_step: int
    steps: int
    def __init__(self, first_step: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class ReturnSetup(_message.Message):
    __slots__ = ("offset", "transitions", "batch_size")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TRANSITIONS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    offset: int
    transitions: int
    batch_size: int
    def __init__(self, offset: _Optional[int] = ..., transitions: _Optional[int] = ..., batch_size: _Optional[int] = ...) -> None: ...

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
    tables: _containers.RepeatedCompositeFieldContainer[TableInfo]
    rate: RateInfo
    episodes_not_sampled: int
    def __init__(self, version: _Optional[str] = ..., protocol_version: _Optional[str] = ..., config_toml: _Optional[str] = ..., columns: _Optional[_Iterable[_Union[ColumnSpec, _Mapping]]] = ..., device: _Optional[str] = ..., size_bytes: _Optional[int] = ..., capacity: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., counts: _Optional[_Union[Counts, _Mapping]] = ..., storage_state: _Optional[_Union[StorageState, str]] = ..., storage_reason: _Optional[str] = ..., tables: _Optional[_Iterable[_Union[TableInfo, _Mapping]]] = ..., rate: _Optional[_Union[RateInfo, _Mapping]] = ..., episodes_not_sampled: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("samples_per_insert", "tolerance", "min_steps", "steps_added", "slices_delivered", "recent_steps_added", "recent_slices_delivered", "owed_slices", "adds_held", "batches_held", "adds", "batches", "adds_wait_for", "batches_wait_for")
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
    ADDS_WAIT_FOR_FIELD_NUMBER: _ClassVar[int]
    BATCHES_WAIT_FOR_FIELD_NUMBER: _ClassVar[int]
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
    adds_wait_for: str
    batches_wait_for: str
    def __init__(self, samples_per_insert: _Optional[float] = ..., tolerance: _Optional[float] = ..., min_steps: _Optional[int] = ..., steps_added: _Optional[int] = ..., slices_delivered: _Optional[int] = ..., recent_steps_added: _Optional[int] = ..., recent_slices_delivered: _Optional[int] = ..., owed_slices: _Optional[float] = ..., adds_held: _Optional[int] = ..., batches_held: _Optional[int] = ..., adds: _Optional[_Iterable[_Union[RateWaiter, _Mapping]]] = ..., batches: _Optional[_Iterable[_Union[RateWaiter, _Mapping]]] = ..., adds_wait_for: _Optional[str] = ..., batches_wait_for: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("table", "config_toml", "counts", "capacity", "device", "size_bytes", "storage_state", "storage_reason", "created", "law", "episodes_not_sampled", "rate")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_TOML_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORAGE_STATE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_REASON_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    LAW_FIELD_NUMBER: _ClassVar[int]
    EPISODES_NOT_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    table: str
    config_toml: str
    counts: Counts
    capacity: int
    device: str
    size_bytes: int
    storage_state: StorageState
    storage_reason: str
    created: bool
    law: str
    episodes_not_sampled: int
    rate: RateInfo
    def __init__(self, table: _Optional[str] = ..., config_toml: _Optional[str] = ..., counts: _Optional[_Union[Counts, _Mapping]] = ..., capacity: _Optional[int] = ..., device: _Optional[str] = ..., size_bytes: _Optional[int] = ..., storage_state: _Optional[_Union[StorageState, str]] = ..., storage_reason: _Optional[str] = ..., created: bool = ..., law: _Optional[str] = ..., episodes_not_sampled: _Optional[int] = ..., rate: _Optional[_Union[RateInfo, _Mapping]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("tables", "interval_s", "newest_episodes")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    NEWEST_EPISODES_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedScalarFieldContainer[str]
    interval_s: float
    newest_episodes: int
    def __init__(self, tables: _Optional[_Iterable[str]] = ..., interval_s: _Optional[float] = ..., newest_episodes: _Optional[int] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("server", "tables", "actors", "learners", "refusals", "time_unix_s")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    LEARNERS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    server: ServerState
    tables: _containers.RepeatedCompositeFieldContainer[TableStatus]
    actors: _containers.RepeatedCompositeFieldContainer[ActorStatus]
    learners: _containers.RepeatedCompositeFieldContainer[LearnerStatus]
    refusals: _containers.RepeatedCompositeFieldContainer[RefusalStatus]
    time_unix_s: float
    def __init__(self, server: _Optional[_Union[ServerState, _Mapping]] = ..., tables: _Optional[_Iterable[_Union[TableStatus, _Mapping]]] = ..., actors: _Optional[_Iterable[_Union[ActorStatus, _Mapping]]] = ..., learners: _Optional[_Iterable[_Union[LearnerStatus, _Mapping]]] = ..., refusals: _Optional[_Iterable[_Union[RefusalStatus, _Mapping]]] = ..., time_unix_s: _Optional[float] = ...) -> None: ...

class ServerState(_message.Message):
    __slots__ = ("version", "protocol_version", "state", "uptime_s", "memory_bytes", "ring_bytes", "device_bytes", "cpu_share", "pools", "loop_delay", "connections", "calls", "streams", "receive_bytes", "receive_limit_bytes", "send_bytes", "send_limit_bytes", "methods")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    RING_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_SHARE_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    LOOP_DELAY_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEND_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEND_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    version: str
    protocol_version: str
    state: ServingState
    uptime_s: float
    memory_bytes: int
    ring_bytes: int
    device_bytes: int
    cpu_share: float
    pools: _containers.RepeatedCompositeFieldContainer[PoolStatus]
    loop_delay: LatencyStatus
    connections: int
    calls: int
    streams: int
    receive_bytes: int
    receive_limit_bytes: int
    send_bytes: int
    send_limit_bytes: int
    methods: _containers.RepeatedCompositeFieldContainer[MethodStatus]
    def __init__(self, version: _Optional[str] = ..., protocol_version: _Optional[str] = ..., state: _Optional[_Union[ServingState, str]] = ..., uptime_s: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., ring_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., cpu_share: _Optional[float] = ..., pools: _Optional[_Iterable[_Union[PoolStatus, _Mapping]]] = ..., loop_delay: _Optional[_Union[LatencyStatus, _Mapping]] = ..., connections: _Optional[int] = ..., calls: _Optional[int] = ..., streams: _Optional[int] = ..., receive_bytes: _Optional[int] = ..., receive_limit_bytes: _Optional[int] = ..., send_bytes: _Optional[int] = ..., send_limit_bytes: _Optional[int] = ..., methods: _Optional[_Iterable[_Union[MethodStatus, _Mapping]]] = ...) -> None: ...

class PoolStatus(_message.Message):
    __slots__ = ("name", "threads", "busy", "queued", "cpu_share")
    NAME_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    CPU_SHARE_FIELD_NUMBER: _ClassVar[int]
    name: str
    threads: int
    busy: int
    queued: int
    cpu_share: float
    def __init__(self, name: _Optional[str] = ..., threads: _Optional[int] = ..., busy: _Optional[int] = ..., queued: _Optional[int] = ..., cpu_share: _Optional[float] = ...) -> None: ...

class LatencyStatus(_message.Message):
    __slots__ = ("count", "sum_s", "p50_s", "p99_s", "bounds_s", "buckets")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SUM_S_FIELD_NUMBER: _ClassVar[int]
    P50_S_FIELD_NUMBER: _ClassVar[int]
    P99_S_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_S_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    count: int
    sum_s: float
    p50_s: float
    p99_s: float
    bounds_s: _containers.RepeatedScalarFieldContainer[float]
    buckets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, count: _Optional[int] = ..., sum_s: _Optional[float] = ..., p50_s: _Optional[float] = ..., p99_s: _Optional[float] = ..., bounds_s: _Optional[_Iterable[float]] = ..., buckets: _Optional[_Iterable[int]] = ...) -> None: ...

class MethodStatus(_message.Message):
    __slots__ = ("method", "failed", "latency")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    method: str
    failed: int
    latency: LatencyStatus
    def __init__(self, method: _Optional[str] = ..., failed: _Optional[int] = ..., latency: _Optional[_Union[LatencyStatus, _Mapping]] = ...) -> None: ...

class WaitStatus(_message.Message):
    __slots__ = ("learners", "cause", "waited_s", "waiting", "total_s")
    LEARNERS_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    learners: bool
    cause: WaitCause
    waited_s: float
    waiting: int
    total_s: float
    def __init__(self, learners: bool = ..., cause: _Optional[_Union[WaitCause, str]] = ..., waited_s: _Optional[float] = ..., waiting: _Optional[int] = ..., total_s: _Optional[float] = ...) -> None: ...

class TableStatus(_message.Message):
    __slots__ = ("table", "counts", "capacity", "size_bytes", "device", "verdict", "verdict_text", "learners_waited_s", "actors_waited_s", "waits", "flows", "seconds_until_full", "oldest_stored_s", "median_stored_s", "mean_sampled_s", "newest_policy_version", "mean_stored_policy_version", "mean_sampled_policy_version", "episodes_not_sampled", "episodes_eligible", "rate", "durability", "newest")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_TEXT_FIELD_NUMBER: _ClassVar[int]
    LEARNERS_WAITED_S_FIELD_NUMBER: _ClassVar[int]
    ACTORS_WAITED_S_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    FLOWS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_UNTIL_FULL_FIELD_NUMBER: _ClassVar[int]
    OLDEST_STORED_S_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_STORED_S_FIELD_NUMBER: _ClassVar[int]
    MEAN_SAMPLED_S_FIELD_NUMBER: _ClassVar[int]
    NEWEST_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    MEAN_STORED_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    MEAN_SAMPLED_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPISODES_NOT_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    EPISODES_ELIGIBLE_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    table: str
    counts: Counts
    capacity: int
    size_bytes: int
    device: str
    verdict: Verdict
    verdict_text: str
    learners_waited_s: float
    actors_waited_s: float
    waits: _containers.RepeatedCompositeFieldContainer[WaitStatus]
    flows: _containers.RepeatedCompositeFieldContainer[FlowStatus]
    seconds_until_full: float
    oldest_stored_s: float
    median_stored_s: float
    mean_sampled_s: float
    newest_policy_version: int
    mean_stored_policy_version: float
    mean_sampled_policy_version: float
    episodes_not_sampled: int
    episodes_eligible: int
    rate: RateInfo
    durability: DurabilityStatus
    newest: _containers.RepeatedCompositeFieldContainer[EpisodeSummary]
    def __init__(self, table: _Optional[str] = ..., counts: _Optional[_Union[Counts, _Mapping]] = ..., capacity: _Optional[int] = ..., size_bytes: _Optional[int] = ..., device: _Optional[str] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., verdict_text: _Optional[str] = ..., learners_waited_s: _Optional[float] = ..., actors_waited_s: _Optional[float] = ..., waits: _Optional[_Iterable[_Union[WaitStatus, _Mapping]]] = ..., flows: _Optional[_Iterable[_Union[FlowStatus, _Mapping]]] = ..., seconds_until_full: _Optional[float] = ..., oldest_stored_s: _Optional[float] = ..., median_stored_s: _Optional[float] = ..., mean_sampled_s: _Optional[float] = ..., newest_policy_version: _Optional[int] = ..., mean_stored_policy_version: _Optional[float] = ..., mean_sampled_policy_version: _Optional[float] = ..., episodes_not_sampled: _Optional[int] = ..., episodes_eligible: _Optional[int] = ..., rate: _Optional[_Union[RateInfo, _Mapping]] = ..., durability: _Optional[_Union[DurabilityStatus, _Mapping]] = ..., newest: _Optional[_Iterable[_Union[EpisodeSummary, _Mapping]]] = ...) -> None: ...

class FlowStatus(_message.Message):
    __slots__ = ("window_s", "span_s", "episodes_in", "rows_in", "bytes_in", "rows_evicted", "episodes_evicted", "delivered")
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    SPAN_S_FIELD_NUMBER: _ClassVar[int]
    EPISODES_IN_FIELD_NUMBER: _ClassVar[int]
    ROWS_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    ROWS_EVICTED_FIELD_NUMBER: _ClassVar[int]
    EPISODES_EVICTED_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_FIELD_NUMBER: _ClassVar[int]
    window_s: float
    span_s: float
    episodes_in: int
    rows_in: int
    bytes_in: int
    rows_evicted: int
    episodes_evicted: int
    delivered: _containers.RepeatedCompositeFieldContainer[DeliveredStatus]
    def __init__(self, window_s: _Optional[float] = ..., span_s: _Optional[float] = ..., episodes_in: _Optional[int] = ..., rows_in: _Optional[int] = ..., bytes_in: _Optional[int] = ..., rows_evicted: _Optional[int] = ..., episodes_evicted: _Optional[int] = ..., delivered: _Optional[_Iterable[_Union[DeliveredStatus, _Mapping]]] = ...) -> None: ...

class DeliveredStatus(_message.Message):
    __slots__ = ("transport", "batches", "slices", "rows", "bytes")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    transport: Transport
    batches: int
    slices: int
    rows: int
    bytes: int
    def __init__(self, transport: _Optional[_Union[Transport, str]] = ..., batches: _Optional[int] = ..., slices: _Optional[int] = ..., rows: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class DurabilityStatus(_message.Message):
    __slots__ = ("mode", "state", "reason", "pending_episodes", "pending_bytes", "unsynced_s", "sync", "file_bytes", "disk_free_bytes", "last_snapshot_unix_s", "restored", "restored_rows", "restore_rows")
    MODE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PENDING_EPISODES_FIELD_NUMBER: _ClassVar[int]
    PENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNSYNCED_S_FIELD_NUMBER: _ClassVar[int]
    SYNC_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_SNAPSHOT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    RESTORED_ROWS_FIELD_NUMBER: _ClassVar[int]
    RESTORE_ROWS_FIELD_NUMBER: _ClassVar[int]
    mode: str
    state: StorageState
    reason: str
    pending_episodes: int
    pending_bytes: int
    unsynced_s: float
    sync: LatencyStatus
    file_bytes: int
    disk_free_bytes: int
    last_snapshot_unix_s: float
    restored: bool
    restored_rows: int
    restore_rows: int
    def __init__(self, mode: _Optional[str] = ..., state: _Optional[_Union[StorageState, str]] = ..., reason: _Optional[str] = ..., pending_episodes: _Optional[int] = ..., pending_bytes: _Optional[int] = ..., unsynced_s: _Optional[float] = ..., sync: _Optional[_Union[LatencyStatus, _Mapping]] = ..., file_bytes: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., last_snapshot_unix_s: _Optional[float] = ..., restored: bool = ..., restored_rows: _Optional[int] = ..., restore_rows: _Optional[int] = ...) -> None: ...

class EpisodeSummary(_message.Message):
    __slots__ = ("episode_id", "actor", "rows", "reward_sum", "bytes", "age_s", "policy_version")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    REWARD_SUM_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    episode_id: int
    actor: str
    rows: int
    reward_sum: float
    bytes: int
    age_s: float
    policy_version: int
    def __init__(self, episode_id: _Optional[int] = ..., actor: _Optional[str] = ..., rows: _Optional[int] = ..., reward_sum: _Optional[float] = ..., bytes: _Optional[int] = ..., age_s: _Optional[float] = ..., policy_version: _Optional[int] = ...) -> None: ...

class ActorStatus(_message.Message):
    __slots__ = ("table", "name", "address", "client_version", "last_episode_age_s", "episodes", "rows", "rows_per_s", "mean_rows", "mean_reward_sum", "policy_version", "duplicates", "refused", "waited_s", "spool_episodes", "spool_bytes", "others")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_EPISODE_AGE_S_FIELD_NUMBER: _ClassVar[int]
    EPISODES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MEAN_ROWS_FIELD_NUMBER: _ClassVar[int]
    MEAN_REWARD_SUM_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    SPOOL_EPISODES_FIELD_NUMBER: _ClassVar[int]
    SPOOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    table: str
    name: str
    address: str
    client_version: str
    last_episode_age_s: float
    episodes: int
    rows: int
    rows_per_s: float
    mean_rows: float
    mean_reward_sum: float
    policy_version: int
    duplicates: int
    refused: int
    waited_s: float
    spool_episodes: int
    spool_bytes: int
    others: int
    def __init__(self, table: _Optional[str] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., client_version: _Optional[str] = ..., last_episode_age_s: _Optional[float] = ..., episodes: _Optional[int] = ..., rows: _Optional[int] = ..., rows_per_s: _Optional[float] = ..., mean_rows: _Optional[float] = ..., mean_reward_sum: _Optional[float] = ..., policy_version: _Optional[int] = ..., duplicates: _Optional[int] = ..., refused: _Optional[int] = ..., waited_s: _Optional[float] = ..., spool_episodes: _Optional[int] = ..., spool_bytes: _Optional[int] = ..., others: _Optional[int] = ...) -> None: ...

class LearnerStatus(_message.Message):
    __slots__ = ("learner_id", "address", "client_version", "tables", "transport", "ring_refused", "batch_size", "horizon", "connected_s", "credits", "pending_bytes", "batches", "batches_per_s", "wait", "waits_share", "others")
    LEARNER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    RING_REFUSED_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_S_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    PENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    BATCHES_PER_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    WAITS_SHARE_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    learner_id: int
    address: str
    client_version: str
    tables: _containers.RepeatedScalarFieldContainer[str]
    transport: Transport
    ring_refused: str
    batch_size: int
    horizon: int
    connected_s: float
    credits: int
    pending_bytes: int
    batches: int
    batches_per_s: float
    wait: LatencyStatus
    waits_share: float
    others: int
    def __init__(self, learner_id: _Optional[int] = ..., address: _Optional[str] = ..., client_version: _Optional[str] = ..., tables: _Optional[_Iterable[str]] = ..., transport: _Optional[_Union[Transport, str]] = ..., ring_refused: _Optional[str] = ..., batch_size: _Optional[int] = ..., horizon: _Optional[int] = ..., connected_s: _Optional[float] = ..., credits: _Optional[int] = ..., pending_bytes: _Optional[int] = ..., batches: _Optional[int] = ..., batches_per_s: _Optional[float] = ..., wait: _Optional[_Union[LatencyStatus, _Mapping]] = ..., waits_share: _Optional[float] = ..., others: _Optional[int] = ...) -> None: ...

class RefusalStatus(_message.Message):
    __slots__ = ("reason", "table", "count", "last_message", "last_who", "last_unix_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LAST_WHO_FIELD_NUMBER: _ClassVar[int]
    LAST_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    reason: str
    table: str
    count: int
    last_message: str
    last_who: str
    last_unix_s: float
    def __init__(self, reason: _Optional[str] = ..., table: _Optional[str] = ..., count: _Optional[int] = ..., last_message: _Optional[str] = ..., last_who: _Optional[str] = ..., last_unix_s: _Optional[float] = ...) -> None: ...
