"""Import what a SuperNode and the app on it import; fails the build of a base that cannot."""

import flwr
import flwr.clientapp
import flwr.serverapp.strategy
import flwr.supercore.cli.flower_superexec
import flwr.supernode.cli.flower_supernode
import flwr.supernode.cli.flwr_clientapp
import psutil
import safetensors.numpy

print(
    f"flwr {flwr.__version__}, psutil {psutil.__version__}, safetensors {safetensors.__version__}"
)
