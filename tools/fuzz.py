"""Coverage-guided fuzzing of the readers with atheris, which is no dependency: install it where this is run.

``python tools/fuzz.py READER CORPUS [-max_total_time=60 ...]``: READER of tests/fuzz_targets.py, CORPUS a folder that
keeps what reaches new code, options of libFuzzer.  Stops at the first exception other than ``UserError`` and leaves the
file that caused it; a file of a reader that is mended belongs into tests/corpus/READER.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
warnings.simplefilter("error", RuntimeWarning)
with atheris.instrument_imports(include=["opustomo", "yaml"]):
    from fuzz_targets import attempt, seeds

name, corpus = sys.argv[1], Path(sys.argv[2])
corpus.mkdir(parents=True, exist_ok=True)
folder = Path(tempfile.mkdtemp())
for number, content in enumerate(seeds(folder)[name]):
    (corpus / f"seed{number}").write_bytes(content)


def one(data: bytes) -> None:
    attempt(name, data, folder)


atheris.Setup([sys.argv[0], str(corpus), *sys.argv[3:]], one)
atheris.Fuzz()
