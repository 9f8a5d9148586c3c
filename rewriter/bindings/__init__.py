"""How uses of computed tensors ask for their values."""
