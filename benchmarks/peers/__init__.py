"""Other packages doing the same, each in a process of its own."""
