from services.wire import target_pb2 as _target_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Signature(_message.Message):
    __slots__ = ("fingerprint", "layer_ids", "hidden_size", "dtype")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYER_IDS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    layer_ids: _containers.RepeatedScalarFieldContainer[int]
    hidden_size: int
    dtype: _target_pb2.WireDtype
    def __init__(self, fingerprint: _Optional[str] = ..., layer_ids: _Optional[_Iterable[int]] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[_Union[_target_pb2.WireDtype, str]] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("wire_version", "signature", "table", "redis_url", "prefix", "max_chunk_bytes", "max_tokens")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    REDIS_URL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    signature: Signature
    table: Table
    redis_url: str
    prefix: str
    max_chunk_bytes: int
    max_tokens: int
    def __init__(self, wire_version: _Optional[int] = ..., signature: _Optional[_Union[Signature, _Mapping]] = ..., table: _Optional[_Union[Table, _Mapping]] = ..., redis_url: _Optional[str] = ..., prefix: _Optional[str] = ..., max_chunk_bytes: _Optional[int] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class Table(_message.Message):
    __slots__ = ("resident_bytes", "peak_bytes", "wanted_bytes", "capacity_bytes", "num_ready", "num_ready_uses", "num_leased", "num_inserting", "inserts", "samples", "deletes", "sealed", "generation", "max_times_sampled", "selector", "min_size", "samples_per_insert", "min_diff", "max_diff", "difference", "can_insert", "can_sample")
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    WANTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_READY_FIELD_NUMBER: _ClassVar[int]
    NUM_READY_USES_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASED_FIELD_NUMBER: _ClassVar[int]
    NUM_INSERTING_FIELD_NUMBER: _ClassVar[int]
    INSERTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    DELETES_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MAX_TIMES_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    MIN_SIZE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_PER_INSERT_FIELD_NUMBER: _ClassVar[int]
    MIN_DIFF_FIELD_NUMBER: _ClassVar[int]
    MAX_DIFF_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    CAN_INSERT_FIELD_NUMBER: _ClassVar[int]
    CAN_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    resident_bytes: int
    peak_bytes: int
    wanted_bytes: int
    capacity_bytes: int
    num_ready: int
    num_ready_uses: int
    num_leased: int
    num_inserting: int
    inserts: int
    samples: int
    deletes: int
    sealed: bool
    generation: int
    max_times_sampled: int
    selector: str
    min_size: int
    samples_per_insert: int
    min_diff: int
    max_diff: int
    difference: int
    can_insert: bool
    can_sample: bool
    def __init__(self, resident_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., wanted_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., num_ready: _Optional[int] = ..., num_ready_uses: _Optional[int] = ..., num_leased: _Optional[int] = ..., num_inserting: _Optional[int] = ..., inserts: _Optional[int] = ..., samples: _Optional[int] = ..., deletes: _Optional[int] = ..., sealed: _Optional[bool] = ..., generation: _Optional[int] = ..., max_times_sampled: _Optional[int] = ..., selector: _Optional[str] = ..., min_size: _Optional[int] = ..., samples_per_insert: _Optional[int] = ..., min_diff: _Optional[int] = ..., max_diff: _Optional[int] = ..., difference: _Optional[int] = ..., can_insert: _Optional[bool] = ..., can_sample: _Optional[bool] = ...) -> None: ...

class InsertRequest(_message.Message):
    __slots__ = ("open", "begin", "chunk", "commit")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    open: Open
    begin: Begin
    chunk: _target_pb2.FeatureChunk
    commit: Commit
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., chunk: _Optional[_Union[_target_pb2.FeatureChunk, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("wire_version", "signature", "producer")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    signature: Signature
    producer: str
    def __init__(self, wire_version: _Optional[int] = ..., signature: _Optional[_Union[Signature, _Mapping]] = ..., producer: _Optional[str] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("sample_id", "token_ids", "loss_mask", "last_rows", "num_uses", "prompt", "epoch", "max_wait_s")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOSS_MASK_FIELD_NUMBER: _ClassVar[int]
    LAST_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_USES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    sample_id: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    loss_mask: _containers.RepeatedScalarFieldContainer[int]
    last_rows: _containers.RepeatedScalarFieldContainer[int]
    num_uses: int
    prompt: int
    epoch: int
    max_wait_s: float
    def __init__(self, sample_id: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., loss_mask: _Optional[_Iterable[int]] = ..., last_rows: _Optional[_Iterable[int]] = ..., num_uses: _Optional[int] = ..., prompt: _Optional[int] = ..., epoch: _Optional[int] = ..., max_wait_s: _Optional[float] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("sample_id",)
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    sample_id: int
    def __init__(self, sample_id: _Optional[int] = ...) -> None: ...

class InsertResponse(_message.Message):
    __slots__ = ("opened", "wait", "credit", "committed")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    wait: Wait
    credit: Credit
    committed: Committed
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("max_chunk_bytes", "max_tokens")
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_chunk_bytes: int
    max_tokens: int
    def __init__(self, max_chunk_bytes: _Optional[int] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("sample_id", "reason")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    sample_id: int
    reason: str
    def __init__(self, sample_id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("sample_id", "num_bytes")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    sample_id: int
    num_bytes: int
    def __init__(self, sample_id: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("sample_id", "already")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    ALREADY_FIELD_NUMBER: _ClassVar[int]
    sample_id: int
    already: bool
    def __init__(self, sample_id: _Optional[int] = ..., already: _Optional[bool] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("rank", "generation", "count", "lease_s", "max_wait_s", "sample_ids", "with_chunks")
    RANK_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_IDS_FIELD_NUMBER: _ClassVar[int]
    WITH_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    generation: int
    count: int
    lease_s: float
    max_wait_s: float
    sample_ids: _containers.RepeatedScalarFieldContainer[int]
    with_chunks: bool
    def __init__(self, rank: _Optional[int] = ..., generation: _Optional[int] = ..., count: _Optional[int] = ..., lease_s: _Optional[float] = ..., max_wait_s: _Optional[float] = ..., sample_ids: _Optional[_Iterable[int]] = ..., with_chunks: _Optional[bool] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ("lease", "chunk")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    lease: Lease
    chunk: _target_pb2.FeatureChunk
    def __init__(self, lease: _Optional[_Union[Lease, _Mapping]] = ..., chunk: _Optional[_Union[_target_pb2.FeatureChunk, _Mapping]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("lease_id", "sample_id", "attempt", "k", "importance", "prompt", "epoch", "reuse", "uses", "token_ids", "loss_mask", "last_rows", "chunks", "num_bytes", "producer")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REUSE_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOSS_MASK_FIELD_NUMBER: _ClassVar[int]
    LAST_ROWS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    sample_id: int
    attempt: int
    k: int
    importance: float
    prompt: int
    epoch: int
    reuse: int
    uses: Uses
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    loss_mask: _containers.RepeatedScalarFieldContainer[int]
    last_rows: _containers.RepeatedScalarFieldContainer[int]
    chunks: _containers.RepeatedCompositeFieldContainer[StoredChunk]
    num_bytes: int
    producer: str
    def __init__(self, lease_id: _Optional[str] = ..., sample_id: _Optional[int] = ..., attempt: _Optional[int] = ..., k: _Optional[int] = ..., importance: _Optional[float] = ..., prompt: _Optional[int] = ..., epoch: _Optional[int] = ..., reuse: _Optional[int] = ..., uses: _Optional[_Union[Uses, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., loss_mask: _Optional[_Iterable[int]] = ..., last_rows: _Optional[_Iterable[int]] = ..., chunks: _Optional[_Iterable[_Union[StoredChunk, _Mapping]]] = ..., num_bytes: _Optional[int] = ..., producer: _Optional[str] = ...) -> None: ...

class Uses(_message.Message):
    __slots__ = ("ks",)
    KS_FIELD_NUMBER: _ClassVar[int]
    ks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ks: _Optional[_Iterable[int]] = ...) -> None: ...

class StoredChunk(_message.Message):
    __slots__ = ("tensor", "row_start", "row_end", "num_bytes", "crc32c")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ROW_START_FIELD_NUMBER: _ClassVar[int]
    ROW_END_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    tensor: _target_pb2.TensorName
    row_start: int
    row_end: int
    num_bytes: int
    crc32c: int
    def __init__(self, tensor: _Optional[_Union[_target_pb2.TensorName, str]] = ..., row_start: _Optional[int] = ..., row_end: _Optional[int] = ..., num_bytes: _Optional[int] = ..., crc32c: _Optional[int] = ...) -> None: ...

class AckRequest(_message.Message):
    __slots__ = ("generation", "lease_ids")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    lease_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, generation: _Optional[int] = ..., lease_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class AckResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("generation", "lease_ids")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    lease_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, generation: _Optional[int] = ..., lease_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UpdatePrioritiesRequest(_message.Message):
    __slots__ = ("rejections",)
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    rejections: _containers.RepeatedCompositeFieldContainer[Rejection]
    def __init__(self, rejections: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("sample_id", "rejection")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    REJECTION_FIELD_NUMBER: _ClassVar[int]
    sample_id: int
    rejection: float
    def __init__(self, sample_id: _Optional[int] = ..., rejection: _Optional[float] = ...) -> None: ...

class UpdatePrioritiesResponse(_message.Message):
    __slots__ = ("num_found",)
    NUM_FOUND_FIELD_NUMBER: _ClassVar[int]
    num_found: int
    def __init__(self, num_found: _Optional[int] = ...) -> None: ...
