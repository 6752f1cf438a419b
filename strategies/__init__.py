"""Server halves of the methods, one file each."""
