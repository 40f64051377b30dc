"""Pages of RAM on their way: batches of a pass, records of a stream, requests of postcopy, and their place at the end."""
