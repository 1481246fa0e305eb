"""Run the benchmark: `python -m sqlqueue.bench`."""

import argparse
import sys

from sqlqueue.bench import LONG, MEASURES, bench

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sqlqueue.bench")
    parser.add_argument("--url", help="a database of the server to use; default: an embedded one")
    parser.add_argument("--quick", action="store_true", help="less than a minute")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--only", choices=[*MEASURES, *LONG], help="take one measure")
    given = parser.parse_args()
    sys.exit(bench(given.url, quick=given.quick, as_json=given.json, only=given.only))
