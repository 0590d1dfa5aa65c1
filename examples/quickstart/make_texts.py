"""Make the quickstart's texts and tokenizer out of what this machine has; downloads nothing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.quickstart.corpora.build import main

if __name__ == "__main__":
    sys.exit(main())
