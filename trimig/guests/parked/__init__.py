"""A guest that is kept in a file and is not run."""
