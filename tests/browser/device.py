"""client.py with a handicap: `device.py SECONDS_A_STEP SYS_DIRECTORY FLAGS…`."""

import sys
import time
from functools import partial

from plumbing import cli

if __name__ == "__main__":
    cli.start("client.py")

    import client
    from plumbing.board import Telemetry

    pause, root, *flags = sys.argv[1:]
    if root:
        client.Telemetry = partial(Telemetry, root)
    report = client.Client._report

    def slowly(self, *args):
        time.sleep(float(pause))
        report(self, *args)

    client.Client._report = slowly
    client.main(flags)
