"""What is the same for every model: the wire, the fleet, checks, checkpoints, reports.

Nothing here imports server.py, client.py or utils.py.
"""

import atexit
import gc
import os
from typing import Any

# Flower reads this when it is imported. We never phone home.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

# gRPC reads this too. It has no switch for TLS 1.3 alone (https://github.com/grpc/grpc/issues/37305);
# this list names one cipher for TLS 1.2, which wants an RSA key, and all of ours are ECDSA.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"

# And this; its notes on connections that come and go, or that no file descriptor is left for,
# are not for the operator.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# Imports make 300,000 objects that stay, and looking for garbage among them again and again takes a
# fifth of a short run's processor time. The first look comes after so many, and what it leaves is
# left out of all others, which come as usual. At the end, when all goes anyway, there is none.
usual_thresholds = gc.get_threshold()


def leave_imports_aside(phase: str, info: dict[str, Any]) -> None:
    if phase == "stop":
        gc.callbacks.remove(leave_imports_aside)
        gc.set_threshold(*usual_thresholds)
        gc.freeze()


gc.callbacks.append(leave_imports_aside)
gc.set_threshold(300_000, *usual_thresholds[1:])
atexit.register(gc.freeze)
