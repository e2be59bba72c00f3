#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Where the minutes of a test run are: a table of files on stdout, and a line for every test in a CSV file.

python -m pytest -n 2 -m "" --junitxml=results.xml
python tests/support/durations.py tests/durations.csv results.xml
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree


def main(table: str, *results: str) -> None:
    """Read pytest's results in JUnit's format, write the CSV file and print the table."""
    cases: dict[tuple[str, str], list[float]] = defaultdict(list)
    for case in (case for file in results for case in ElementTree.parse(file).getroot().iter("testcase")):
        name = case.attrib["classname"].removeprefix("tests.").replace(".", "/") + ".py"
        cases[name, case.attrib["name"].partition("[")[0]].append(float(case.attrib["time"]))
    with Path(table).open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("file", "test", "cases", "seconds", "longest"))
        for (file, test), seconds in sorted(cases.items()):
            writer.writerow((file, test, len(seconds), f"{sum(seconds):.1f}", f"{max(seconds):.1f}"))
    files: dict[str, list[float]] = defaultdict(list)
    for (file, _), seconds in cases.items():
        files[file] += seconds
    print("| file | tests | seconds | longest |\n|---|---:|---:|---:|")
    for file, seconds in sorted(files.items(), key=lambda entry: -sum(entry[1])):
        print(f"| {file} | {len(seconds)} | {sum(seconds):.0f} | {max(seconds):.1f} |")
    every = [second for seconds in files.values() for second in seconds]
    print(f"| all | {len(every)} | {sum(every):.0f} | {max(every):.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
