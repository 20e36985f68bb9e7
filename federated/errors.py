"""The one exception tree: what a person can mend, told in one line."""


class FederationError(Exception):
    """Something that the person at the keyboard can mend; the message says how."""


class BadReply(FederationError):
    """A device's reply that must not be used; the message says why."""


class Refused(FederationError):
    """The server does not take this device; the message is the server's."""


class NotYet(FederationError):
    """There is no server that this device can use for now; the message says why."""
