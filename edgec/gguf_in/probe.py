"""`python probe.py FILE`: how llama.cpp splits the texts on standard input. One JSON list each way.

A process of its own, because a vocabulary that llama.cpp does not like ends the process with an assertion; a script
and not a module, because importing the package it lies in would load torch.
"""

from __future__ import annotations

import json
import sys

_MISSING = 3


def main() -> int:
    try:
        import llama_cpp
    except ImportError:
        return _MISSING
    vocabulary = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
    texts = json.load(sys.stdin)
    answers = [vocabulary.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    sys.stdout.write(json.dumps(answers) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
