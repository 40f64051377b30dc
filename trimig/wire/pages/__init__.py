"""Records of RAM pages inside the sections ``ram``."""
