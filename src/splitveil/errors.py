"""Every error that Splitveil raises on purpose.

    SplitveilError
    ├── ConfigurationError          what was asked for cannot be done as asked (flags, arguments, files)
    │   ├── ParameterError          a lattice parameter set is malformed
    │   │   └── InsecureParametersError   … or offers less than 128 bits, and code did not allow that
    │   ├── AdapterError            an adapter folder cannot be served
    │   │   └── UnsupportedAdapterError   … because it uses a feature that is refused by name
    │   ├── BaseModelError          the base model does not fit the adapter, or cannot be cut
    │   └── DataError               a text file cannot be used: empty, unreadable, overlapping with another
    ├── ProtocolError               the other side sent something that the wire format forbids
    │   ├── PublicationError        a publication is malformed, or outside the limits
    │   └── VersionError            the other side speaks another version
    ├── ConnectionFailedError       no server there, another program there, or the connection broke
    ├── RefusedError                the server understood the request and refused it
    │   ├── UnknownAdapterError     … because it serves no adapter of that name
    │   ├── KeyRejectedError        … because the API key is wrong, revoked, expired, or for another adapter
    │   └── BudgetExceededError     … because so many rows are past the limit of this client
    ├── UndeclaredKnowledgeError    an attack reached for something that it has not declared
    ├── NonFiniteError              NaN or infinity where a number was expected
    └── MaskReuseError              a one-time mask was about to serve twice

Messages say what was wrong, what was got and expected, and what to do. They never contain a secret: no activation,
no weight, no mask, no key.
"""


class SplitveilError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with status 1."""


class ConfigurationError(SplitveilError):
    """What was asked for cannot be done as asked."""


class ParameterError(ConfigurationError):
    """A lattice parameter set is malformed."""


class InsecureParametersError(ParameterError):
    """A parameter set offers less than 128 bits of security, and code did not allow that."""


class AdapterError(ConfigurationError):
    """An adapter folder cannot be served: missing files, wrong shapes, values that are not finite."""


class UnsupportedAdapterError(AdapterError):
    """An adapter uses a feature that is refused by name."""


class BaseModelError(ConfigurationError):
    """The base model does not fit the adapter, or cannot be cut."""


class DataError(ConfigurationError):
    """A text file cannot be used: empty, unreadable, no such column, overlapping with another."""


class ProtocolError(SplitveilError):
    """The other side sent something that the wire format forbids."""


class PublicationError(ProtocolError):
    """A publication is malformed, or outside the limits."""


class VersionError(ProtocolError):
    """The other side speaks another version of the protocol."""


class ConnectionFailedError(SplitveilError):
    """No server there, another program there, or the connection broke."""


class RefusedError(SplitveilError):
    """The server understood the request and refused it."""


class UnknownAdapterError(RefusedError):
    """The server serves no adapter of that name."""


class KeyRejectedError(RefusedError):
    """The API key is wrong, revoked, expired, or for another adapter."""


class BudgetExceededError(RefusedError):
    """So many rows would be past the limit of this client."""


class UndeclaredKnowledgeError(SplitveilError):
    """An attack reached for something that it has not declared, or that this attacker does not have."""


class NonFiniteError(SplitveilError):
    """NaN or infinity where a number was expected."""


class MaskReuseError(SplitveilError):
    """A one-time mask was about to serve twice."""
