"""Fuzzing of the readers: by random changes of good files, or guided by coverage.

``python tools/fuzz.py random SECONDS``: every reader of tests/fuzz_targets.py in turn, each call within 10 s and 6 GB;
prints how many files were tried and keeps those that caused an exception other than ``UserError``, in fuzz-found.

``python tools/fuzz.py READER CORPUS [-max_total_time=60 ...]``: with atheris, which is no dependency: install it where
this is run.  CORPUS is a folder that keeps what reaches new code, then options of libFuzzer.  Stops at the first
exception other than ``UserError`` and leaves the file that caused it.

A file of a reader that is mended belongs into tests/corpus/READER.
"""

import argparse
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
warnings.simplefilter("error", RuntimeWarning)


def at_random(seconds: float, seed: int = 0) -> int:
    """The number of failures; a file that ends the process can be found again: the seed and the order are fixed."""
    from fuzz_targets import TARGETS, attempt, seeds
    from test_readers_hostile import WORDS, bounded, damaged

    folder, draw, tried, failed = Path(tempfile.mkdtemp()), random.Random(seed), 0, 0
    good = seeds(folder)
    for target in TARGETS:
        attempt(target, good[target][0], folder)
        end = time.monotonic() + seconds / len(TARGETS)
        while time.monotonic() < end:
            changes = [
                (draw.randrange(4), draw.random(), draw.choice([*WORDS, draw.randbytes(4)]), draw.randint(1, 64))
                for _ in range(draw.randint(1, 4))
            ]
            content, tried = damaged(draw.choice(good[target]), changes), tried + 1
            try:
                with bounded(10.0, 6 << 30):
                    attempt(target, content, folder)
            except Exception as error:
                failed += 1
                path = Path("fuzz-found", target, f"{failed}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                print(f"{path}: {type(error).__name__}: {error}", flush=True)
    print(f"{len(TARGETS)} readers, {tried:,} files, {failed} failures")
    return failed


def guided(name: str, corpus: Path, options: list[str]) -> None:
    """Until the time that the options give is over, or something is found."""
    import atheris

    with atheris.instrument_imports(include=["opustomo", "yaml"]):
        from fuzz_targets import attempt, seeds
    corpus.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    for number, content in enumerate(seeds(folder)[name]):
        (corpus / f"seed{number}").write_bytes(content)
    atheris.Setup([sys.argv[0], str(corpus), *options], lambda data: attempt(name, data, folder))
    atheris.Fuzz()


if __name__ == "__main__":
    line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    line.add_argument("reader", help="random, or a reader of tests/fuzz_targets.py")
    line.add_argument("amount", metavar="SECONDS|CORPUS")
    typed, more = line.parse_known_args()
    if typed.reader == "random":
        sys.exit(at_random(float(typed.amount)) > 0)
    guided(typed.reader, Path(typed.amount), more)
