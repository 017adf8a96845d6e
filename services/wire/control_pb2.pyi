from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Request(_message.Message):
    __slots__ = ("wire_version", "request_id", "status", "scale", "pause", "continue_run", "stop", "autoscale")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_RUN_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    AUTOSCALE_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    request_id: str
    status: Status
    scale: Scale
    pause: Pause
    continue_run: Continue
    stop: Stop
    autoscale: Autoscale
    def __init__(self, wire_version: _Optional[int] = ..., request_id: _Optional[str] = ..., status: _Optional[_Union[Status, _Mapping]] = ..., scale: _Optional[_Union[Scale, _Mapping]] = ..., pause: _Optional[_Union[Pause, _Mapping]] = ..., continue_run: _Optional[_Union[Continue, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., autoscale: _Optional[_Union[Autoscale, _Mapping]] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Scale(_message.Message):
    __slots__ = ("targets",)
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    targets: int
    def __init__(self, targets: _Optional[int] = ...) -> None: ...

class Autoscale(_message.Message):
    __slots__ = ("on",)
    ON_FIELD_NUMBER: _ClassVar[int]
    on: bool
    def __init__(self, on: _Optional[bool] = ...) -> None: ...

class Pause(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Continue(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Stop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Reply(_message.Message):
    __slots__ = ("wire_version", "request_id", "done", "refusal", "status")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    request_id: str
    done: Done
    refusal: Refusal
    status: RunStatus
    def __init__(self, wire_version: _Optional[int] = ..., request_id: _Optional[str] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., status: _Optional[_Union[RunStatus, _Mapping]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("message", "is_wrong_usage")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    IS_WRONG_USAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    is_wrong_usage: bool
    def __init__(self, message: _Optional[str] = ..., is_wrong_usage: _Optional[bool] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("run_id", "name", "output_dir", "attempt", "state", "phase", "step", "total_steps", "metrics", "learning_rate", "tokens_captured", "tokens_trained", "capture_tokens_per_s", "train_tokens_per_s", "trainer_wait_fraction", "resident_bytes", "peak_bytes", "capacity_bytes", "targets", "num_targets_wanted", "num_targets_most", "evaluations", "events", "started_s", "posted_s", "host", "pid", "target_model", "algorithm", "autoscaling")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_DIR_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_CAPTURED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TRAINED_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TRAIN_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TRAINER_WAIT_FRACTION_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    NUM_TARGETS_WANTED_FIELD_NUMBER: _ClassVar[int]
    NUM_TARGETS_MOST_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    POSTED_S_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODEL_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    AUTOSCALING_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    name: str
    output_dir: str
    attempt: int
    state: str
    phase: str
    step: int
    total_steps: int
    metrics: _containers.ScalarMap[str, float]
    learning_rate: float
    tokens_captured: int
    tokens_trained: int
    capture_tokens_per_s: float
    train_tokens_per_s: float
    trainer_wait_fraction: float
    resident_bytes: int
    peak_bytes: int
    capacity_bytes: int
    targets: _containers.RepeatedCompositeFieldContainer[TargetState]
    num_targets_wanted: int
    num_targets_most: int
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    started_s: float
    posted_s: float
    host: str
    pid: int
    target_model: str
    algorithm: str
    autoscaling: Autoscaling
    def __init__(self, run_id: _Optional[str] = ..., name: _Optional[str] = ..., output_dir: _Optional[str] = ..., attempt: _Optional[int] = ..., state: _Optional[str] = ..., phase: _Optional[str] = ..., step: _Optional[int] = ..., total_steps: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., learning_rate: _Optional[float] = ..., tokens_captured: _Optional[int] = ..., tokens_trained: _Optional[int] = ..., capture_tokens_per_s: _Optional[float] = ..., train_tokens_per_s: _Optional[float] = ..., trainer_wait_fraction: _Optional[float] = ..., resident_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[TargetState, _Mapping]]] = ..., num_targets_wanted: _Optional[int] = ..., num_targets_most: _Optional[int] = ..., evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., started_s: _Optional[float] = ..., posted_s: _Optional[float] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., target_model: _Optional[str] = ..., algorithm: _Optional[str] = ..., autoscaling: _Optional[_Union[Autoscaling, _Mapping]] = ...) -> None: ...

class Autoscaling(_message.Message):
    __slots__ = ("is_on", "min", "max")
    IS_ON_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    is_on: bool
    min: int
    max: int
    def __init__(self, is_on: _Optional[bool] = ..., min: _Optional[int] = ..., max: _Optional[int] = ...) -> None: ...

class TargetState(_message.Message):
    __slots__ = ("index", "state", "address", "message")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    index: int
    state: str
    address: str
    message: str
    def __init__(self, index: _Optional[int] = ..., state: _Optional[str] = ..., address: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("label", "step", "accepted_length", "interval_low", "interval_high")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_LOW_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_HIGH_FIELD_NUMBER: _ClassVar[int]
    label: str
    step: int
    accepted_length: float
    interval_low: float
    interval_high: float
    def __init__(self, label: _Optional[str] = ..., step: _Optional[int] = ..., accepted_length: _Optional[float] = ..., interval_low: _Optional[float] = ..., interval_high: _Optional[float] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("time_s", "kind", "message")
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    kind: str
    message: str
    def __init__(self, time_s: _Optional[float] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
