"""A guest whose worker process writes its memory and can prove that no write was lost."""
