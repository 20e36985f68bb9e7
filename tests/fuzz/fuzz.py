"""Fuzz what the server does with a device's bytes, guided by the code that they reach.

    python tests/fuzz/fuzz.py -max_total_time=60 NEW_INPUTS tests/fuzz/corpus

The arguments are libFuzzer's; new inputs go to the first folder. Ends with an error at the
first input that does harm (see targets.py), and leaves it in a file; give that file as the
only argument to run it alone. A process of its own: atheris changes the code that it watches.
"""

import ast
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DICTIONARY = ROOT / "tests/fuzz/words.dict"
WORDS = [
    ast.literal_eval(f"b{line}")
    for line in DICTIONARY.read_text().splitlines()
    if line.startswith('"')
]
TEXTS = b"ajs"  # targets that read text
TOKEN = re.compile(rb"'[^']*'|\w+|[(),:]")


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import atheris

    with atheris.instrument_imports(include=["federated", "plumbing", "numpy.lib", "tests.fuzz"]):
        from tests.fuzz import targets

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        """Change a token of a text, else what libFuzzer likes: it would seldom hit a whole one."""
        draw = random.Random(seed)
        tokens = [*TOKEN.finditer(data, 1)] if data[:1] in TEXTS else []
        if not tokens or draw.random() < 0.5:
            return atheris.Mutate(data, max_size)
        token = draw.choice(tokens)
        return (data[: token.start()] + draw.choice(WORDS) + data[token.end() :])[:max_size]

    # An input that takes 5 s, or 1 GB more, does harm, too.
    limits = ["-timeout=5", "-rss_limit_mb=2048", "-malloc_limit_mb=1024", "-max_len=4096"]
    arguments = [sys.argv[0], f"-dict={DICTIONARY}", *limits, *sys.argv[1:]]
    atheris.Setup(arguments, targets.check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
