"""Methods that make every named thing appear, as itself."""
