"""What the comparisons that are run as a module do with their result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from cdas_fast.errors import CDASError
from cdas_fast.storage import write_json, write_text

Compare = Callable[[argparse.Namespace], tuple[list[str], dict[str, Any]]]  # the table as lines, all as JSON values


def report(name: str, compare: Compare, options: argparse.Namespace) -> int:
    """Print the table, write NAME.txt and NAME.json to `options.output` if that is given, and return the exit code."""
    try:
        lines, values = compare(options)
        text = "\n".join(lines)
        print(text)
        if options.output is not None:
            write_text(options.output / f"{name}.txt", text + "\n")
            write_json(options.output / f"{name}.json", values)
    except CDASError as error:
        print(f"benchmarks.{name}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
