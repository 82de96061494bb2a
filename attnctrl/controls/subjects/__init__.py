"""Methods that keep the look of given subjects."""
