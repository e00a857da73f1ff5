"""Under H: its factor, the target that drift makes, heads and their rows, rows rounded."""
