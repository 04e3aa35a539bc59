"""Fuzz one parser, guided by coverage: ``python tests/fuzz/run_atheris.py PROJECT TARGET -max_total_time=60``.

Needs ``pip install atheris``; ``tests/fuzz/run_all.sh`` goes through every target. A crash is written to ``crash-*``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(include=["treelora_cli", "json", "yaml", "safetensors"]):
    import targets as harness


def main() -> None:
    """Run libFuzzer on the named target, starting from the project's own file."""
    project, name, *options = sys.argv[1:]
    found, seeds = harness.targets(Path(project))
    if name == "list":
        print("\n".join(found))
        return
    corpus = Path(tempfile.mkdtemp())
    for number, data in enumerate(seeds[name]):
        (corpus / f"seed-{number}").write_bytes(data)
    largest = max(len(data) for data in seeds[name])
    atheris.Setup([sys.argv[0], f"-max_len={largest + 64}", *options, str(corpus)], found[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
