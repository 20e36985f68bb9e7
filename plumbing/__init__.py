"""What is the same for every model: the wire, the fleet, checks, checkpoints, reports.

Nothing here imports server.py, client.py or utils.py.
"""

import os

# Flower reads this when it is imported. We never phone home.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

# gRPC reads this; its notes on connections that come and go are not for the operator.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
