"""Optional passes: each one changes how fast a model runs, and not what it computes."""
