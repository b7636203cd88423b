"""Hold a filled-in exercise against its method's properties:

    python -m minipeft.check lora my_lora.py

The file is run. Exit code 0: all properties hold; 1: one does not, and is explained; 2: there is no such exercise.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

EXERCISES = {
    "attention": "causal self-attention with heads, padding and a cache",
    "lora": "a linear layer with a low-rank companion",
    "dora": "LoRA with each row's length trained apart",
    "ia3": "activations rescaled by a learned vector",
    "prefix": "learned keys and values before the text",
    "prompt": "learned input vectors before the text",
    "adapter": "a bottleneck behind each sub-layer",
    "bitfit": "only the biases are trained",
    "merging": "LoRA, DoRA and (IA)^3 folded into the weights, and taken out again",
}
WIDTH = 118


def main(words: list[str]) -> int:
    """Grade one file and print the outcome; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m minipeft.check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", choices=EXERCISES, metavar="METHOD", help=", ".join(EXERCISES))
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="your copy of exercises/METHOD.py")
    parser.add_argument("--list", action="store_true", help="the exercises")
    parser.add_argument("--seconds", type=_seconds, default=60, help="end a file that runs longer (default 60)")
    arguments = parser.parse_args(words)
    if arguments.list:
        print("\n".join(f"{name:10} {summary}" for name, summary in EXERCISES.items()))
        return 0
    if arguments.file is None:
        parser.error("METHOD and FILE are needed, or --list")
    return report(arguments.method, arguments.file, arguments.seconds)


def _seconds(word: str) -> float:
    if not 0 < float(word) < 1e6:
        raise argparse.ArgumentTypeError(f"must be positive and below a million, got {word}")
    return float(word)


def report(method: str, path: Path, seconds: float) -> int:
    """Print how each property of one file came out; 0 if all hold, else 1."""
    from minipeft.check.answers import AnswerError
    from minipeft.check.grading import grade, remaining, time_limit

    print(f"{method}: {path}")
    held = 0
    try:
        with time_limit(seconds, _end_of_time(path, seconds)):
            for title, refused in grade(method, path):
                print(f"  {'holds' if refused is None else 'FAILS'}   {title}")
                if refused is not None:
                    print_refused(refused)
                    rest = remaining(method, title)
                    if rest:
                        print(_wrapped("  then    ", "; ".join(rest)))
                    return 1
                held += 1
    except AnswerError as error:
        print(f"  FAILS   {error}")
        return 1
    print(f"all {held} properties hold")
    return 0


def print_refused(refused: Exception) -> None:
    """The lines below a property that does not hold."""
    is_error = not refused.expected
    unknown = "" if is_error else "of none of the mistakes known here: compare with the equation, term by term"
    rows = {"of": refused.what, "with": refused.given, "error" if is_error else "got": refused.got,
            "expected": refused.expected, "because": refused.because or unknown}
    for name, text in rows.items():
        if text:
            print(_wrapped(f"          {name:10}", text))


def _wrapped(start: str, text: str) -> str:
    whole_rows = re.sub(r"\[[^][]*\]", lambda row: row[0].replace(" ", "\0"), text)     # [1, 2, 3] stays in one line
    return textwrap.fill(whole_rows, WIDTH, initial_indent=start, subsequent_indent=" " * len(start),
                         break_long_words=False).replace("\0", " ")


def _end_of_time(path: Path, seconds: float) -> Callable[[], None]:
    """What to do with a file that does not end: say in which of its lines it is, and end the process."""
    learner = threading.main_thread().ident
    stdout, end_process = sys.stdout, os._exit                    # the file may have others in their place

    def end() -> None:
        frames = traceback.extract_stack(sys._current_frames()[learner])
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f" in line {lines[-1]}" if lines else ""
        print(f"  FAILS   it has not ended after {seconds:g} s{where}: is there an endless loop?", file=stdout,
              flush=True)
        end_process(1)

    return end


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader (head, less) has gone: what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
