"""A guest that is kept in memory or in a file and is not run."""
