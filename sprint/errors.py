"""What can go wrong, told apart by whose mistake it is: the operator's, ours, a peer's, or the machine's.

Every message names the thing, its value and what was expected.
"""


class SprintError(Exception):
    """The root of every error that Sprint raises on purpose."""


class ConfigError(SprintError):
    """The operator's configuration can't be used; the message is one line that names the variable."""

    def __init__(self, variable: str, value: object, allowed: str) -> None:
        super().__init__(f"{variable}={value!s}: {allowed}")
        self.variable = variable


class LocalProtocolError(SprintError):
    """Our own code asked a protocol object for something that its state doesn't allow."""


class RemoteProtocolError(SprintError):
    """A peer broke its protocol so badly that the connection has to end."""


class HostError(SprintError):
    """The machine refused something: an address that can't be bound, a file that can't be written."""


class HeaderFileError(SprintError):
    """The header file belongs to another network or format, or another process holds it."""
