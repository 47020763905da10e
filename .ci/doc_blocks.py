"""Run the code blocks of Markdown files that follow a line `<!-- run -->`, each file's in order in one scratch directory.

Usage: python .ci/doc_blocks.py README.md ...
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^<!-- run -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {"python": [sys.executable], "bash": ["bash", "-euo", "pipefail"]}


def main(names: list[str]) -> int:
    for name in names:
        blocks = BLOCK.findall((ROOT / name).read_text())
        if not blocks:
            print(f"{name}: no block is marked <!-- run -->", file=sys.stderr)
            return 1
        with tempfile.TemporaryDirectory() as scratch:
            for entry in ROOT.iterdir():
                if entry.name != "runs":  # what the blocks write stays in the scratch directory
                    (Path(scratch) / entry.name).symlink_to(entry)
            for i, (language, code) in enumerate(blocks, 1):
                began = time.monotonic()
                done = subprocess.run(COMMANDS[language], input=code, text=True, cwd=scratch, capture_output=True)
                print(f"{name}: block {i} of {len(blocks)} ({language}): {time.monotonic() - began:.0f} s")
                if done.returncode:
                    print(f"{code}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}", file=sys.stderr)
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
