"""Files that others may write: appearing whole or not at all, read no further than allowed, and told apart."""
