"""``python -m rewriter.cli``: the `reparam` command."""

from __future__ import annotations

from rewriter.cli import main

if __name__ == "__main__":
    main()
