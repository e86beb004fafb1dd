from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("version", "adapter", "have_digest", "key")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    HAVE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    version: int
    adapter: str
    have_digest: bytes
    key: str
    def __init__(self, version: _Optional[int] = ..., adapter: _Optional[str] = ..., have_digest: _Optional[bytes] = ..., key: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "digest", "publication_size", "max_rows")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PUBLICATION_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: bytes
    publication_size: int
    max_rows: int
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[bytes] = ..., publication_size: _Optional[int] = ..., max_rows: _Optional[int] = ...) -> None: ...

class PublicationChunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class KeyChunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Query(_message.Message):
    __slots__ = ("seq", "layers", "rows", "data")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    seq: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    rows: int
    data: bytes
    def __init__(self, seq: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ..., rows: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("seq", "data")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    seq: int
    data: bytes
    def __init__(self, seq: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("seq", "code", "message")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Refusal.Code]
        MALFORMED: _ClassVar[Refusal.Code]
        BUDGET: _ClassVar[Refusal.Code]
    UNSPECIFIED: Refusal.Code
    MALFORMED: Refusal.Code
    BUDGET: Refusal.Code
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    code: Refusal.Code
    message: str
    def __init__(self, seq: _Optional[int] = ..., code: _Optional[_Union[Refusal.Code, str]] = ..., message: _Optional[str] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("hello", "query", "keys")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    query: Query
    keys: KeyChunk
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., query: _Optional[_Union[Query, _Mapping]] = ..., keys: _Optional[_Union[KeyChunk, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("welcome", "chunk", "answer", "refusal")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    chunk: PublicationChunk
    answer: Answer
    refusal: Refusal
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., chunk: _Optional[_Union[PublicationChunk, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...
