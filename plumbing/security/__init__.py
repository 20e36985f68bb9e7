"""Who may take part: keys, admission, and the commands of the owner of a server."""
