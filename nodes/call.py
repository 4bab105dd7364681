"""Runs one Python function on a node, for `node.python(function, …)`.

    python -m vmmc_emu.nodes.call REQUEST RESULT    descriptors: a file with the call, a pipe for its outcome

The call is a pickle of (sys.path, pickle of (function, arguments, keyword arguments)): the paths come
first, because what they lead to is needed to read the rest.  The outcome is 8 bytes of length and a
pickle of (True, result) or (False, exception, traceback as text).
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import traceback

import cloudpickle


def main(request: int, result: int) -> None:
    """Makes the call and writes its outcome."""
    os.set_inheritable(result, False)  # a child that outlives the call must not hold it
    with open(request, "rb") as file:
        path, call = pickle.load(file)
    sys.path[:] = path
    outcome: tuple[object, ...]
    try:
        function, arguments, keywords = pickle.loads(call)
        outcome = (True, function(*arguments, **keywords))
    except BaseException as error:  # whatever it is goes back to the caller
        outcome = (False, error, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        data = cloudpickle.dumps(outcome)
    except Exception as error:
        text = "".join(map(str, outcome[2:])) or traceback.format_exc()
        kind = "result" if outcome[0] else "exception"
        told = TypeError(
            f"the {kind} of the function, {type(outcome[1]).__name__}, cannot be sent back: {error}"
        )
        data = cloudpickle.dumps((False, told, text))
    with open(result, "wb") as file:
        file.write(struct.pack("Q", len(data)) + data)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
