"""Reading attention out: masks and points, from drawn and from given pictures."""
