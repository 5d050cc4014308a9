"""`python -m layerloop.components.decompose OUT OPTIONS PICTURES...`: the process behind `layerloop decompose`.

OPTIONS is JSON of DecomposeOptions. Status 0: all pictures are done; 1: some failed; 2: nothing could be started.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from layerloop.components.decompose.run import decompose
from layerloop.components.runtime.contract import end_process
from layerloop.components.runtime.environment import usable_environment
from layerloop.components.schema.decomposition import DecomposeOptions
from layerloop.components.schema.errors import LayerloopError


def main(argv: Sequence[str]) -> int:
    """Decompose, say what was made, and return the status."""
    if len(argv) < 3:
        print("error: this is the process behind `layerloop decompose`: use that", file=sys.stderr)
        return 2
    out, options, *pictures = argv
    try:
        with usable_environment():
            summary = decompose(pictures, out, DecomposeOptions.of(**json.loads(options)))
    except LayerloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for outcome in summary.outcomes:
        if outcome.folder is not None:
            print(outcome.folder)
    print(summary, file=sys.stderr)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
