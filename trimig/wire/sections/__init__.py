"""Readers of iterative sections: those with START, PART and END, whose content only their own format can divide."""
