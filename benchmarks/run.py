"""The benchmarks that need no GPU and no other library, one after another: `make bench`.

    python benchmarks/run.py [--data DIR]    # with real models

Those of hours or of other libraries (two_bits.py, dit.py, dit_inputs.py, orientation.py, codes.py) are run by name.
"""

from __future__ import annotations

import subprocess
import sys

import record

NEED_DATA = ("quality.py", "encoder.py")
TAKE_DATA = (*NEED_DATA, "speed.py")


def main() -> None:
    args = record.parser(__doc__).parse_args()
    elsewhere = [] if args.results == record.HERE / "results" else ["--results", str(args.results)]
    for name in ("depth.py", "dryrun.py", "speed.py", *NEED_DATA):
        if name in NEED_DATA and args.data is None:
            print(f"{name}: skipped, it needs --data DATA")
            continue
        data = ["--data", str(args.data)] if name in TAKE_DATA and args.data else []
        subprocess.run([sys.executable, str(record.HERE / name), *elsewhere, *data], check=True)


if __name__ == "__main__":
    main()
