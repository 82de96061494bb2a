"""Methods that change given pictures."""
