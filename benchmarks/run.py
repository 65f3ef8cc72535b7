"""All benchmarks, one after another: `make bench`, or with real models `python benchmarks/run.py --data DATA`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NEED_DATA = ("quality.py", "encoder.py")
TAKE_DATA = (*NEED_DATA, "speed.py")


def main() -> None:
    given = sys.argv[1:]
    for name in ("depth.py", "dryrun.py", "speed.py", *NEED_DATA):
        if name in NEED_DATA and "--data" not in given:
            print(f"{name}: skipped, it needs --data DATA")
            continue
        extra = given if name in TAKE_DATA else []
        subprocess.run([sys.executable, str(HERE / name), *extra], check=True)


if __name__ == "__main__":
    main()
