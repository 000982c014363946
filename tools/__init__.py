"""Scripts that make files of the package; none of them is installed with it."""
