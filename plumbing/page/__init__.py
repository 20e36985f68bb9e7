"""The page in the browser: a run as it happens, its devices, and the runs before it."""
