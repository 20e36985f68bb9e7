"""The one exception tree: what a person can correct, each with a message of one line."""

from __future__ import annotations


class FederationError(Exception):
    """Something that the user can correct; the message states how."""


class BadReply(FederationError):
    """A device's reply that must not be used; the message gives the reason."""


class Refused(FederationError):
    """The server does not take this device; the message is the server's."""


class NotYet(FederationError):
    """There is no server that this device can use for now; the message gives the reason."""
