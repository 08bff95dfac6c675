"""Reading checkpoint folders, official or converted, as untrusted input, and writing converted ones."""
