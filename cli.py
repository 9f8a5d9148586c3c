"""What the `reparam` command runs; `python cli.py …` does the same from a checkout."""

from __future__ import annotations

from rewriter.cli import main

if __name__ == "__main__":
    main()
