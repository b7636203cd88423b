"""The process that has the pretended GPU: reads a case and its arguments per line, answers with what the case found.

    python worker.py GUARD FOLDER        GUARD: guard.cpp, compiled; it must come before torch
                                         FOLDER: for models, data and what runs write
"""

import contextlib
import ctypes
import json
import os
import sys
import traceback
from pathlib import Path


def main():
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests), str(tests.parent)]
    import cases
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            name, arguments = json.loads(line)
            try:
                answer = {"found": getattr(cases, name)(**arguments)}
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    main()
