from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Plan(_message.Message):
    __slots__ = ("device", "cloud", "beta1", "beta2", "epsilon", "weight_decay", "rank", "alpha", "targets", "seed", "freeze_embeddings")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CLOUD_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FREEZE_EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    device: int
    cloud: int
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    rank: int
    alpha: float
    targets: str
    seed: int
    freeze_embeddings: bool
    def __init__(self, device: _Optional[int] = ..., cloud: _Optional[int] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., epsilon: _Optional[float] = ..., weight_decay: _Optional[float] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., targets: _Optional[str] = ..., seed: _Optional[int] = ..., freeze_embeddings: _Optional[bool] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "base", "key", "cut", "shape", "plan", "token", "steps")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    version: int
    base: bytes
    key: str
    cut: int
    shape: int
    plan: Plan
    token: bytes
    steps: bytes
    def __init__(self, version: _Optional[int] = ..., base: _Optional[bytes] = ..., key: _Optional[str] = ..., cut: _Optional[int] = ..., shape: _Optional[int] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., token: _Optional[bytes] = ..., steps: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "blocks", "width", "vocabulary", "max_positions", "max_texts", "max_states", "step")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_TEXTS_FIELD_NUMBER: _ClassVar[int]
    MAX_STATES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    version: int
    blocks: int
    width: int
    vocabulary: int
    max_positions: int
    max_texts: int
    max_states: int
    step: int
    def __init__(self, version: _Optional[int] = ..., blocks: _Optional[int] = ..., width: _Optional[int] = ..., vocabulary: _Optional[int] = ..., max_positions: _Optional[int] = ..., max_texts: _Optional[int] = ..., max_states: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("encoding", "dtype", "values", "scales", "indices")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    encoding: int
    dtype: int
    values: bytes
    scales: bytes
    indices: bytes
    def __init__(self, encoding: _Optional[int] = ..., dtype: _Optional[int] = ..., values: _Optional[bytes] = ..., scales: _Optional[bytes] = ..., indices: _Optional[bytes] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("seq", "kind", "tensor", "texts", "positions", "seen", "mask", "labels", "number", "step")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    seq: int
    kind: int
    tensor: Tensor
    texts: int
    positions: int
    seen: int
    mask: bytes
    labels: bytes
    number: float
    step: int
    def __init__(self, seq: _Optional[int] = ..., kind: _Optional[int] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., texts: _Optional[int] = ..., positions: _Optional[int] = ..., seen: _Optional[int] = ..., mask: _Optional[bytes] = ..., labels: _Optional[bytes] = ..., number: _Optional[float] = ..., step: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("seq", "tensor", "loss")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    tensor: Tensor
    loss: float
    def __init__(self, seq: _Optional[int] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., loss: _Optional[float] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("seq", "message")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    message: str
    def __init__(self, seq: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("hello", "request")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    request: Request
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., request: _Optional[_Union[Request, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("welcome", "result", "refusal")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    result: Result
    refusal: Refusal
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...
