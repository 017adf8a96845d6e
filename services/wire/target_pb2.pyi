from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WireDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WIRE_DTYPE_UNSPECIFIED: _ClassVar[WireDtype]
    BF16: _ClassVar[WireDtype]
    FP16: _ClassVar[WireDtype]
    FP32: _ClassVar[WireDtype]
    FP8_E4M3: _ClassVar[WireDtype]

class TensorName(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_NAME_UNSPECIFIED: _ClassVar[TensorName]
    CONTEXT: _ClassVar[TensorName]
    LAST: _ClassVar[TensorName]

class LastRows(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAST_ROWS_UNSPECIFIED: _ClassVar[LastRows]
    BETWEEN: _ClassVar[LastRows]
    AFTER: _ClassVar[LastRows]
WIRE_DTYPE_UNSPECIFIED: WireDtype
BF16: WireDtype
FP16: WireDtype
FP32: WireDtype
FP8_E4M3: WireDtype
TENSOR_NAME_UNSPECIFIED: TensorName
CONTEXT: TensorName
LAST: TensorName
LAST_ROWS_UNSPECIFIED: LastRows
BETWEEN: LastRows
AFTER: LastRows

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("model_name", "fingerprint", "num_layers", "hidden_size", "vocab_size", "dtype", "max_tokens", "engine", "wire_version")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str
    max_tokens: int
    engine: str
    wire_version: int
    def __init__(self, model_name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., dtype: _Optional[str] = ..., max_tokens: _Optional[int] = ..., engine: _Optional[str] = ..., wire_version: _Optional[int] = ...) -> None: ...

class CaptureRequest(_message.Message):
    __slots__ = ("wire_version", "sample_id", "generation", "token_ids", "layer_ids", "last_rows", "dtype", "chunk_bytes", "generate")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LAYER_IDS_FIELD_NUMBER: _ClassVar[int]
    LAST_ROWS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    sample_id: int
    generation: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    layer_ids: _containers.RepeatedScalarFieldContainer[int]
    last_rows: _containers.RepeatedScalarFieldContainer[int]
    dtype: WireDtype
    chunk_bytes: int
    generate: Generate
    def __init__(self, wire_version: _Optional[int] = ..., sample_id: _Optional[int] = ..., generation: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., layer_ids: _Optional[_Iterable[int]] = ..., last_rows: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[WireDtype, str]] = ..., chunk_bytes: _Optional[int] = ..., generate: _Optional[_Union[Generate, _Mapping]] = ...) -> None: ...

class Generate(_message.Message):
    __slots__ = ("max_new_tokens", "temperature", "seed", "stop_token_ids", "last_rows")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LAST_ROWS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    temperature: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    last_rows: LastRows
    def __init__(self, max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., last_rows: _Optional[_Union[LastRows, str]] = ...) -> None: ...

class Totals(_message.Message):
    __slots__ = ("num_chunks", "context_rows", "last_rows", "num_bytes")
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_ROWS_FIELD_NUMBER: _ClassVar[int]
    LAST_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_chunks: int
    context_rows: int
    last_rows: int
    num_bytes: int
    def __init__(self, num_chunks: _Optional[int] = ..., context_rows: _Optional[int] = ..., last_rows: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class FeatureChunk(_message.Message):
    __slots__ = ("sample_id", "generation", "tensor", "row_start", "row_end", "row_width", "dtype", "crc32c", "totals", "answer_token_ids", "payload")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ROW_START_FIELD_NUMBER: _ClassVar[int]
    ROW_END_FIELD_NUMBER: _ClassVar[int]
    ROW_WIDTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    sample_id: int
    generation: int
    tensor: TensorName
    row_start: int
    row_end: int
    row_width: int
    dtype: WireDtype
    crc32c: int
    totals: Totals
    answer_token_ids: _containers.RepeatedScalarFieldContainer[int]
    payload: bytes
    def __init__(self, sample_id: _Optional[int] = ..., generation: _Optional[int] = ..., tensor: _Optional[_Union[TensorName, str]] = ..., row_start: _Optional[int] = ..., row_end: _Optional[int] = ..., row_width: _Optional[int] = ..., dtype: _Optional[_Union[WireDtype, str]] = ..., crc32c: _Optional[int] = ..., totals: _Optional[_Union[Totals, _Mapping]] = ..., answer_token_ids: _Optional[_Iterable[int]] = ..., payload: _Optional[bytes] = ...) -> None: ...
