"""The algorithms: updates, strategies, rounds. No sockets and no torch in here."""
