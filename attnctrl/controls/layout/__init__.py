"""Methods that put objects where regions say."""
